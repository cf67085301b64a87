"""What a run is built of: its optimizer, schedule and loss are those of the settings."""

import argparse
import math
from argparse import Namespace

import accelerate.tracking
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import ascend_the_loss, small_recipe, train, write_folder
from timm.models import save_for_hf

import finetune_cifar
import train_imagenet
from common import build, loop, methods, settings
from common.errors import InputError
from sam_obf import SAM

K = 5


def network():
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, K)
    ).double()


@pytest.mark.parametrize(
    "share, examples, part", [(0.29, 100, 29), (0.7, 8, 6), (0.01, 8, 1), (None, 8, 8)]
)
def test_the_part_is_the_nearest_number_of_examples_and_one_at_least(share, examples, part):
    assert build.ascending(argparse.Namespace(perturb_fraction=share), examples) == part


@pytest.mark.parametrize("share, m, fits", [(0.25, 4, False), (0.5, 4, True), (None, 1, False)])
def test_a_model_is_tried_on_as_many_examples_as_a_pass_of_training_has(share, m, fits):
    """Batch norm over one value a channel fails in the ascent pass, if not in the descent pass."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    batches = Namespace(m=m, label_names=["a", "b"], config={"input_size": (3, 1, 1)})
    try:
        build.check_model(Namespace(perturb_fraction=share), model.train(), batches)
    except InputError as error:
        assert not fits and "cannot be trained on 1 at once (m, or its perturb_fr" in str(error)
    else:
        assert fits


@pytest.mark.parametrize("method", settings.METHODS)
def test_method_selects_objective_and_step(method):
    args = settings.parse(settings.parser("", ""), ["--method", method, "--output", "nowhere"])
    model, criterion = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    assert isinstance(optimizer, SAM) == (method != "base") == (objective is not None)
    ascended, _ = settings.METHODS[method]
    if ascended not in (methods.loss, methods.obf, methods.noise, methods.momentum):
        return  # none, or one that was added
    assert optimizer.adaptive == ("both" if "asam" in method else None)
    assert optimizer.gsam_alpha == (0.4 if "gsam" in method else 0.0)
    logits = torch.tensor([[2.0, 0.0, -1.0]], requires_grad=True)
    if method in ("random", "momentum"):  # no logit matters to them
        ascended = objective(model, torch.zeros(1, 2), torch.tensor([0]))
        g = torch.autograd.grad(ascended, list(model.parameters()))
        assert all(gi.any() == (method == "random") for gi in g)  # there is no momentum yet
        return
    # The target's logit falls in OBF, rises in none.
    (g,) = torch.autograd.grad(objective(lambda images: images, logits, torch.tensor([0])), logits)
    p, target = logits.detach().sigmoid(), torch.tensor([[1.0, 0, 0]])
    alpha = ((1 - 1 / 3 / p[0, 0]) / (1 - 1 / 3)).item()
    obf, loss = 1 / 3 - alpha * p - (1 - alpha) * target, logits.detach().softmax(-1) - target
    torch.testing.assert_close(g, obf if ascended is methods.obf else loss)


def test_the_random_perturbation_knows_neither_images_nor_labels():
    args = settings.parse(settings.parser("", ""), ["--method", "random", "--output", "nowhere"])
    torch.manual_seed(0)
    model, criterion = torch.nn.Linear(40, 50), build.build_criterion(args)
    objective = build.build_objective(args, criterion, None)
    batches = [(torch.randn(8, 40), torch.randint(0, 50, (8,))) for _ in range(2)]

    def gradient(function, seed, batch):
        torch.manual_seed(seed)
        grads = torch.autograd.grad(function(model, *batch), model.parameters())
        return torch.nn.utils.parameters_to_vector(grads)

    noise = gradient(objective, 1, batches[0])
    assert torch.equal(noise, gradient(objective, 1, batches[1]))
    assert not torch.equal(noise, gradient(objective, 2, batches[0]))
    assert abs(noise.mean()) < 0.1 and 0.9 < noise.std() < 1.1  # 2,050 draws of N(0, 1)
    assert abs(F.cosine_similarity(noise, gradient(ascend_the_loss, 1, batches[0]), 0)) < 0.1


def test_schedule_is_linear_after_warm_up_and_rho_follows():
    flags = "--lr 1 --min-lr 0.2 --warmup-epochs 2 --epochs 6 --method sam --output nowhere"
    flags += " --rho 0.5 --rho-min 0.1"
    args = settings.parse(settings.parser("", ""), flags.split())
    model = torch.nn.Linear(2, 3)
    optimizer = build.build_optimizer(args, model)
    schedule = build.build_schedule(args, optimizer, updates_per_epoch=10)
    for update, lr in ((0, 0.0), (10, 0.5), (20, 1.0), (40, 0.6), (59, 0.2 + 0.8 / 40), (60, 0.2)):
        schedule(update)
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(lr)
        assert group["rho"] == pytest.approx(0.1 + 0.4 * max(lr - 0.2, 0) / 0.8)


def test_schedules_equal_their_closed_forms():
    """After a linear warm-up lr falls to min_lr linearly, as half a cosine, or not at all."""
    lr, low, first, warmup, total, updates = 0.8, 0.2, 0.1, 2, 6, 10
    fall = {
        "poly": lambda part: lr + (low - lr) * part,
        "cosine": lambda part: low + (lr - low) * (1 + math.cos(math.pi * part)) / 2,
        "constant": lambda part: lr,
    }
    for sched, after in fall.items():
        flags = ["--lr", str(lr), "--min-lr", str(low), "--warmup-lr", str(first)]
        flags += ["--warmup-epochs", str(warmup), "--epochs", str(total)]
        flags += ["--sched", sched, "--method", "base", "--output", "nowhere"]
        args = settings.parse(settings.parser("", ""), flags)
        optimizer = build.build_optimizer(args, network())
        schedule = build.build_schedule(args, optimizer, updates)
        for update in (0, 1, 13, 19, 20, 21, 33, 59):
            schedule(update)
            part = (update - warmup * updates) / ((total - warmup) * updates)
            expected = (
                first + (lr - first) * update / (warmup * updates) if part < 0 else after(part)
            )
            assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), (
                sched,
                update,
            )


def test_momentum_needs_an_optimizer_that_has_it():
    flags = "--method momentum --opt momentum --momentum 0 --output nowhere"
    args = settings.parse(settings.parser("", ""), flags.split())
    optimizer = build.build_optimizer(args, network())
    with pytest.raises(settings.InputError, match="method momentum does not go with opt momentum"):
        build.build_objective(args, None, optimizer)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "adamw", "lookahead_adam"])
def test_fused_kernels_give_the_weights_of_the_plain_ones(opt):
    weights = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.GELU(), torch.nn.Conv2d(4, 5, 2)
        ).double()
        model = model.to(memory_format=torch.channels_last)
        flags = [
            "--opt", opt, "--opt-kwargs", f"fused={fused}",
            *"--method sam --weight-decay 0.1".split(),
        ]  # fmt: skip
        optimizer = build.build_optimizer(
            settings.parse(settings.parser("", ""), [*flags, "--output", "x"]), model
        )
        assert all(group["fused"] is fused for group in optimizer.param_groups)
        for _ in range(8):
            x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
            with optimizer.perturbed(lambda: model(x).square().mean()):
                model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in model.parameters()])
    for fused, plain in zip(*weights, strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-12, atol=1e-13)


def test_the_base_optimizer_gets_its_own_settings():
    flags = [
        *"--opt adamw --opt-kwargs betas=(0.5,0.6) eps=0.125 --method sam --output nowhere".split(),
    ]  # fmt: skip
    args = settings.parse(settings.parser("", ""), flags)
    optimizer = build.build_optimizer(args, network())
    assert type(optimizer.base_optimizer) is torch.optim.AdamW
    assert (
        optimizer.param_groups[0]["betas"] == (0.5, 0.6)
        and optimizer.param_groups[0]["eps"] == 0.125
    )


def test_a_model_is_compiled_by_one_backend(accelerator, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    with pytest.raises(
        settings.InputError, match="--torchcompile eager and Accelerate's --dynamo_backend inductor"
    ):
        build.build_accelerator(Namespace(log_with=None, output=None, torchcompile="eager"))


@pytest.mark.parametrize("script", [train_imagenet, finetune_cifar])
def test_head_bias_is_that_of_the_first_weights(tmp_path, monkeypatch, script):
    images, seen = write_folder(tmp_path / "images"), []
    model, trained = "test_resnet", tmp_path / "trained"
    if script is finetune_cifar:
        save_for_hf(timm.create_model(model, num_classes=2), trained, safe_serialization=True)
        model = str(trained)
    own = loop.train_epoch

    def train_epoch(job, *others):
        seen.append(job.model.get_classifier().bias.detach().clone())
        own(job, *others)

    monkeypatch.setattr(loop, "train_epoch", train_epoch)
    script.main(small_recipe(tmp_path, images, head_bias=-3.5, model=model))
    assert torch.equal(seen[0], torch.full((2,), -3.5))


@pytest.mark.parametrize("flags", [["--channels-last"], ["--no-channels-last"], []])
@pytest.mark.parametrize("script", [train_imagenet, finetune_cifar])
def test_model_and_input_have_the_memory_format(
    tmp_path, checkpoint, images, monkeypatch, script, flags
):
    """A network of convolutions is channels_last by default, and that is a setting of the run."""
    jobs = []
    monkeypatch.setattr(script, "dry_run", jobs.append)
    model = str(checkpoint) if script is finetune_cifar else "test_resnet"
    train(script, tmp_path, *flags, "--dry-run", dataset=str(images), model=model, method="base")
    last = flags != ["--no-channels-last"]
    layout = torch.channels_last if last else torch.contiguous_format
    shown = jobs[0].batches.to_input(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    for tensor in (
        shown,
        *(p for p in jobs[0].model.parameters() if p.shape[1:].numel() > p.shape[1:2].numel()),
    ):
        assert tensor.is_contiguous(memory_format=layout)
    assert jobs[0].args.channels_last is last


def test_missing_tracker_package_is_named(tmp_path, images, monkeypatch):
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    with pytest.raises(InputError, match="--log-with wandb needs its package: pip install wandb"):
        train(train_imagenet, tmp_path, dataset=str(images), model="test_resnet", log_with="wandb")
    assert not (tmp_path / "run").exists()


def test_fsdp_that_saves_what_needs_unpickling_is_refused(monkeypatch):
    plugin = type("Plugin", (), {"fsdp_version": 2, "state_dict_type": "SHARDED_STATE_DICT"})
    state = type("State", (), {"fsdp_plugin": plugin})
    fake = type("Fake", (), {"state": state, "device": torch.device("cpu")})
    monkeypatch.setattr(build, "Accelerator", lambda **kwargs: fake)
    with pytest.raises(InputError, match="fsdp_state_dict_type: FULL_STATE_DICT"):
        build.build_accelerator(
            type("Args", (), {"log_with": None, "output": None, "torchcompile": None, "freeze": 0})
        )


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "resnet51"}, "timm has no model 'resnet51'; the nearest are .*resnet50"),
        ({"model_kwargs": {"depth": 3}}, "timm cannot create 'test_resnet' with {'depth': 3}"),
        ({"model": "zzzzqqqq"}, "timm has no model 'zzzzqqqq'$"),
        (
            {"model": "resnet18.a1_in1k"},
            "trained model.* finetune_cifar.py, or .*--model resnet18$",
        ),
        ({"model": "local-dir:somewhere"}, "trained model.* fine-tune it with finetune_cifar.py"),
        ({"model": "hf-hub:somebody/model"}, "trained model.* fine-tune it with finetune_cifar.py"),
        ({"model": "/"}, "--model / is a trained model.* fine-tune it with finetune_cifar.py"),
        ({"opt": "sgdd"}, "timm has no optimizer 'sgdd': did you mean 'sgd[pw]?'"),
        ({"opt": "zzzzqqqq"}, "timm has no optimizer 'zzzzqqqq'$"),
        ({"batch_size": 512, "m": 512}, "batch_size 512 exceeds the 6 training images"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"gamma": 2.0}, "gamma is 2.0"),
        ({"batch_size": 6, "m": 4}, "m 4 does not divide"),
    ],
)
def test_settings_that_do_not_fit_end_before_anything_is_written(
    tmp_path, accelerator, changes, words
):
    dataset = write_folder(tmp_path / "images")
    with pytest.raises(InputError, match=words):
        train_imagenet.main(small_recipe(tmp_path, dataset, **changes))
    assert not (tmp_path / "run").exists()
