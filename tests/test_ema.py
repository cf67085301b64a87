"""The average of the weights: what it is, that it resumes, and in several processes."""

import json
import math
import os
import shutil
import subprocess
from argparse import Namespace

import pytest
import timm
import torch
from accelerate import Accelerator
from helpers import (
    ROOT,
    TORCHRUN,
    fresh_process,
    in_process,
    logged_epochs,
    make_job,
    recipe,
    same,
    saved,
    write_folder,
)
from timm.utils import ModelEmaV3

import train_imagenet
from common import build, loop, run, settings
from common.errors import InputError

EMA = {"model_ema": True, "model_ema_decay": 0.7, "workers": 0, "epochs": 2}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_the_weights_weighted_by_powers_of_the_decay(
    tmp_path, images, monkeypatch, warmup
):
    weights, own = [], loop.update

    def update(job, *args):
        loss = own(job, *args)
        model = job.accelerator.unwrap_model(job.model)
        weights.append([p.detach().double() for p in model.parameters()])
        return loss

    monkeypatch.setattr(loop, "update", update)
    path = recipe(tmp_path, images, **EMA, model_ema_warmup=warmup)
    in_process(path, tmp_path / "run")
    assert len(weights) == 8
    average = weights[0]
    for step, now in enumerate(weights[1:], 1):
        decay = min(0.7, 1 - (1 + step) ** (-2 / 3)) if warmup else 0.7
        average = [decay * a + (1 - decay) * w for a, w in zip(average, now)]
    model = timm.create_model(f"local-dir:{tmp_path / 'run' / 'last_ema'}", pretrained=True)
    for ours, expected in zip(model.parameters(), average, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_run_is_the_same_beside_its_average_which_has_accuracies_of_its_own(tmp_path, images):
    plain = in_process(recipe(tmp_path, images, workers=0, epochs=2), tmp_path / "plain")
    averaged = in_process(recipe(tmp_path, images, **EMA), tmp_path / "run")
    assert plain == averaged
    for name in ("last", "best"):
        assert same(saved(tmp_path / "plain" / name), saved(tmp_path / "run" / name))
    assert not same(saved(tmp_path / "run" / "last"), saved(tmp_path / "run" / "last_ema"))
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results) == ["last", "best", "last_ema"]
    lines = logged_epochs(tmp_path / "run")
    assert lines[-1]["validation_ema"] == results["last_ema"]["validation"]
    assert all("validation_ema" not in line for line in logged_epochs(tmp_path / "plain"))
    assert not (tmp_path / "plain" / "last_ema").exists()


@pytest.mark.slow
def test_a_run_resumed_inside_an_epoch_has_the_same_average(tmp_path, images):
    path = recipe(tmp_path, images, **EMA, model="test_resnet", model_kwargs={}, img_size=32)
    in_process(path, tmp_path / "run", "--checkpoint-hist", "9")
    shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    for late in range(4, 9):  # the third update is inside the first epoch
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{late:08d}")
    shutil.rmtree(tmp_path / "resumed" / "last_ema")
    in_process(path, tmp_path / "resumed", "--resume", "auto", "--checkpoint-hist", "9")
    for name in ("last", "last_ema"):
        assert same(saved(tmp_path / "run" / name), saved(tmp_path / "resumed" / name))


def test_an_update_that_fp16_skips_does_not_count(accelerator):
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    good, bad, labels = torch.randn(4, 6), torch.full((4, 6), 1e37), torch.tensor([0, 1, 1, 0])
    pixels = [good, bad, good, bad, good]
    batches = iter([{"image": image, "label": labels} for image in pixels])
    ema = ModelEmaV3(model, decay=0.5)
    job = make_job(
        accelerator, model, optimizer, updates=5, train=lambda epoch, first: batches,
        schedule=lambda updates: None,
    )  # fmt: skip
    job.ema, states = ema, []
    loop.train_epoch(job, run.Progress(), lambda loss: states.append(model.weight.detach().clone()))
    expected = states[0]
    for weight in (states[2], states[4]):
        expected = 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(ema.module.weight, expected)


def test_mixed_precision_judges_the_average_by_its_own_weights(tmp_path, images):
    flags = f"--dataset {images} --model-ema --output {tmp_path / 'run'}".split()
    args = settings.parse(settings.parser("", ""), flags)
    fresh_process()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(torch.nn.Linear(3, 2))
    ema = build.build_ema(args, accelerator, model)
    with torch.no_grad():
        ema.module.weight.zero_()
        ema.module.bias.fill_(7.0)
    assert ema.module(torch.ones(1, 3)).tolist() == [[7.0, 7.0]]
    assert ema.module(torch.ones(1, 3)).dtype == torch.float32
    assert (model(torch.ones(1, 3)) != 7).all()


def test_it_is_refused_under_fsdp2_in_one_line():
    args, accelerator = Namespace(model_ema=True), Namespace(is_fsdp2=True)
    with pytest.raises(InputError, match=r"^--model-ema does not go with FSDP2[^\n]*$"):
        build.build_ema(args, accelerator, None)


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--model-ema-decay", "0.9"), "model_ema_decay has no effect without model_ema"),
        (("--model-ema-warmup",), "model_ema_warmup has no effect without model_ema"),
        (("--model-ema", "--model-ema-decay", "1"), r"model_ema_decay is 1.0; .* \[0, 1\)"),
    ],
)
def test_settings_without_effect_are_errors(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        settings.parse(train_imagenet.parser(), ["--output", str(tmp_path / "run"), *flags])


def test_its_decay_is_timms_and_is_written_down(tmp_path):
    flags = ["--output", str(tmp_path / "run")]
    args = settings.parse(train_imagenet.parser(), [*flags, "--model-ema"])
    assert (args.model_ema_decay, args.model_ema_warmup) == (0.9998, False)
    args = settings.parse(train_imagenet.parser(), flags)
    assert args.model_ema_decay is None and not args.model_ema


@pytest.mark.slow
def test_two_processes_have_one_average(tmp_path, images):
    """Also of images that are mixed: each micro-batch as in one process."""
    changes = {"model": "test_resnet", "model_kwargs": {}, "img_size": 32, "method": "obf"}
    changes |= {"mixup": 0.5, "cutmix": 0.5}
    path = recipe(tmp_path, images, **EMA, **changes, checkpoint_interval=None)
    command = [*TORCHRUN, "2", "train_imagenet.py", "--recipe", str(path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "two")], timeout=300, **options
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    in_process(path, tmp_path / "one")
    one, two = (saved(tmp_path / name / "last_ema") for name in ("one", "two"))
    for name, weight in one.items():
        if "running" not in name and "num_batches" not in name:  # two see other batches each
            torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-4)
    assert math.isfinite(logged_epochs(tmp_path / "two")[-1]["validation_ema"])
