"""The training loop: what an update is, and a run from the command line to a checkpoint that timm opens elsewhere."""

import argparse
import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from test_data import write_folder
from timm.loss import BinaryCrossEntropy

import train_imagenet
from common import build, dry_run, loaders, loop, run, settings
from common.settings import InputError
from sam_obf import SAM

ROOT = Path(__file__).parent.parent


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    return Accelerator(cpu=True)


def small_recipe(tmp_path, dataset, **changes):
    recipe = {
        "dataset": str(dataset), "model": "test_resnet", "img_size": 32, "crop_pct": 1.0, "epochs": 1, "batch_size": 4,
        "workers": 0, "lr": 0.01, "hflip": 0.0, "m": 2, "output": str(tmp_path / "run"), **changes,
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--recipe", str(tmp_path / "recipe.yaml")]


def make_job(accelerator, model, optimizer, **changes):
    batches = {"to_input": lambda images: images, "m": 4, "accumulation": 1, "train": None, "steps": 1}
    batches |= {key: changes.pop(key) for key in batches if key in changes}
    usual = {
        "clip_grad": None,
        "perturb_fraction": 1.0,
        "shrink_perturb": None,
        "lr": 0.1,
        "checkpoint_interval": None,
        "perturb_interval": 1,
    }
    args = argparse.Namespace(**usual | changes.pop("args", {}))
    parts = {"objective": None, "criterion": F.cross_entropy, "schedule": None, "timm_config": None, **changes}
    parts |= {"model": model, "optimizer": optimizer, "batches": argparse.Namespace(**batches)}
    return build.Job(args, accelerator, **parts)


def ascend_the_loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


def run_script(*argv):
    command = [sys.executable, str(ROOT / "train_imagenet.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("m", [2, 4])
def test_update_is_the_mean_over_micro_batches_of_the_gradient_at_their_own_perturbed_weights(
    accelerator, m, accumulation
):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    reference = copy.deepcopy(model)
    images, labels = torch.randn(4 * accumulation, 6).double(), torch.randint(0, 3, (4 * accumulation,))

    model, optimizer = accelerator.prepare(model, SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, rho=0.3))
    for i in range(accumulation):
        batch = {"image": images[4 * i : 4 * i + 4], "label": labels[4 * i : 4 * i + 4]}
        job = make_job(accelerator, model, optimizer, objective=ascend_the_loss, m=m, accumulation=accumulation)
        loop.forward_backward(job, batch, job.objective, sync=i == accumulation - 1)

    params, total = list(reference.parameters()), None
    for x, y in zip(images.split(m), labels.split(m)):
        g = torch.autograd.grad(F.cross_entropy(reference(x), y), params)
        norm = sum((gi**2).sum() for gi in g).sqrt()
        moved = copy.deepcopy(reference)
        for p, gi in zip(moved.parameters(), g):
            p.data += 0.3 * gi / norm
        gp = torch.autograd.grad(F.cross_entropy(moved(x), y), list(moved.parameters()))
        total = gp if total is None else [a + b for a, b in zip(total, gp)]
    for p, gradient in zip(model.parameters(), total):
        torch.testing.assert_close(p.grad, gradient * m / len(images), rtol=1e-10, atol=1e-12)


def test_perturbation_of_a_part_of_the_micro_batch_is_that_of_its_first_examples(accelerator):
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    images, labels = torch.randn(8, 6).double(), torch.randint(0, 3, (8,))
    params = list(model.parameters())
    g = torch.autograd.grad(F.cross_entropy(model(images[:2]), labels[:2]), params)
    norm = sum((gi**2).sum() for gi in g).sqrt()
    moved = copy.deepcopy(model)
    for p, gi in zip(moved.parameters(), g):
        p.data += 0.3 * gi / norm
    gp = torch.autograd.grad(F.cross_entropy(moved(images), labels), list(moved.parameters()))

    model, optimizer = accelerator.prepare(model, SAM(torch.optim.SGD(params, lr=0.1), model, rho=0.3))
    args = {"perturb_fraction": 0.25}
    job = make_job(accelerator, model, optimizer, args=args, objective=ascend_the_loss, m=8)
    loop.forward_backward(job, {"image": images, "label": labels}, job.objective, sync=True)
    for p, gradient in zip(params, gp):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("share, examples, part", [(0.29, 100, 29), (0.7, 8, 6), (0.01, 8, 1), (None, 8, 8)])
def test_the_part_is_the_nearest_number_of_examples_and_one_at_least(share, examples, part):
    assert build.ascending(argparse.Namespace(perturb_fraction=share), examples) == part


@pytest.mark.parametrize("loss", [F.cross_entropy, BinaryCrossEntropy()], ids=["ce", "bce"])
def test_right_answers_are_counted_at_the_weights_of_the_descent_pass(accelerator, loss):
    """A perturbation long enough to change most predictions, and two micro-batches of each of two loader batches."""
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 3).double()
    images, labels = torch.randn(16, 6).double(), torch.randint(0, 3, (16,))
    expected, clean = 0, (model(images).argmax(-1) == labels).sum().item()
    for x, y in zip(images.split(4), labels.split(4)):
        g = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
        norm = sum((gi**2).sum() for gi in g).sqrt()
        weight, bias = (p + 5 * gi / norm for p, gi in zip(model.parameters(), g))
        expected += ((x @ weight.T + bias).argmax(-1) == y).sum().item()
    model, optimizer = accelerator.prepare(model, SAM(torch.optim.SGD(model.parameters(), lr=0.0), model, rho=5.0))
    job = make_job(
        accelerator, model, optimizer, m=4, accumulation=2, criterion=loss, objective=lambda f, x, y: loss(f(x), y)
    )
    loop.update(job, iter([{"image": images[i : i + 8], "label": labels[i : i + 8]} for i in (0, 8)]))
    assert job.right.item() == expected != clean


def test_shrink_and_perturb_pulls_to_the_first_weights_in_proportion_to_lr(accelerator):
    model = torch.nn.Linear(3, 2).double()
    weight = model.weight.detach().clone()
    initial = [torch.full_like(p, 7.0) for p in model.parameters()]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    images, labels = torch.randn(4, 3).double(), torch.tensor([0, 1, 1, 0])
    job = make_job(accelerator, model, optimizer, args={"shrink_perturb": 0.01, "lr": 0.2})
    job.initial = initial
    loss = F.cross_entropy(images @ weight.T + model.bias.detach(), labels)
    (g,) = torch.autograd.grad(
        F.cross_entropy(images @ weight.requires_grad_().T + model.bias.detach(), labels), weight
    )
    assert loop.update(job, iter([{"image": images, "label": labels}])).item() == pytest.approx(loss.item())
    factor = 0.01 * 0.05 / 0.2
    torch.testing.assert_close(model.weight.data, factor * 7 + (1 - factor) * (weight.detach() - 0.05 * g))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", ["base", "sam"])
def test_step_skipped_for_overflow_moves_neither_weights_nor_schedule(accelerator, method, fused):
    """fp16's loss scaling, which works on a CPU too: the second of three steps overflows."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    model = torch.nn.Linear(3, 2)
    flags = ["--method", method, "--opt-kwargs", f"fused={fused}", "--output", "nowhere"]
    args = settings.parse(settings.parser("", ""), flags)
    model, optimizer = accelerator.prepare(model, build.build_optimizer(args, model))
    scheduled, weights = [], []
    images = [torch.ones(4, 3), torch.full((4, 3), 1e37), torch.ones(4, 3)]
    job = make_job(
        accelerator, model, optimizer, objective=None if method == "base" else ascend_the_loss, steps=3,
        train=lambda epoch, first: iter([{"image": x, "label": torch.tensor([0, 1, 1, 0])} for x in images]),
        schedule=scheduled.append,
        to_input=lambda x: weights.append(model.weight.detach().clone()) or x,
    )  # fmt: skip
    progress = run.Progress()
    loop.train_epoch(job, progress, lambda loss: None)
    assert (progress.updates, progress.skipped) == (3, 1)
    assert scheduled == [0, 1, 1, 2]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])
    assert accelerator.scaler.get_scale() == 2.0**9
    assert all(p.isfinite().all() for p in model.parameters())


def batch_settings(**values):
    return argparse.Namespace(**({"batch_size": 4096, "device_batch_size": 256, "m": None} | values))


@pytest.mark.parametrize(
    "values, processes, split",
    [
        ({}, 8, (256, 2, 256)),
        ({"m": 64}, 1, (256, 16, 64)),
        ({"m": 64}, 8, (256, 2, 64)),
        ({"m": 64}, 32, (128, 1, 64)),  # what a process loads at once shrinks with its share
        ({"m": 64, "device_batch_size": 200}, 8, (128, 4, 64)),
        ({"m": 64, "device_batch_size": 32}, 8, (64, 8, 64)),
        ({"m": 3, "batch_size": 60}, 4, (15, 1, 3)),
        ({"batch_size": 6}, 2, (3, 1, 3)),
        ({"m": 1, "batch_size": 1018}, 2, (1, 509, 1)),  # tiny, but asked for
    ],
)
def test_batch_splits_into_loader_batches_and_micro_batches(values, processes, split):
    assert loaders.split_batch(batch_settings(**values), processes) == split


@pytest.mark.parametrize(
    "values, processes, words",
    [
        ({"m": 48}, 8, "m 48 does not divide batch_size 4096: choose one of 1, 2, 4,"),
        ({}, 3, "4096 in micro-batches of 1 does not split over 3 processes: choose one of 1, 2, 4"),
        ({"m": 64, "batch_size": 384}, 4, "does not split over 4 processes: choose one of 1, 2, 3, 6 processes"),
        ({"batch_size": 1018}, 2, "in loader batches of 1, .* choose batch_size 1020, or give --m, .* 1, 509$"),
    ],
)
def test_batch_that_does_not_split_names_what_does(values, processes, words):
    with pytest.raises(InputError, match=words):
        loaders.split_batch(batch_settings(**values), processes)


@pytest.mark.parametrize("method", settings.METHODS)
def test_method_selects_objective_and_step(method):
    args = settings.parse(settings.parser("", ""), ["--method", method, "--output", "nowhere"])
    model, criterion = torch.nn.Linear(2, 3), torch.nn.CrossEntropyLoss()
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    assert isinstance(optimizer, SAM) == (method != "base") == (objective is not None)
    if method == "base":
        return
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
    torch.testing.assert_close(g, obf if "obf" in method else loss)


def test_schedule_is_linear_after_warm_up_and_rho_follows():
    flags = "--lr 1 --min-lr 0.2 --warmup-epochs 2 --epochs 6 --rho 0.5 --rho-min 0.1 --output nowhere --method sam"
    args = settings.parse(settings.parser("", ""), flags.split())
    model = torch.nn.Linear(2, 3)
    optimizer = build.build_optimizer(args, model)
    schedule = build.build_schedule(args, optimizer, updates_per_epoch=10)
    for update, lr in ((0, 0.0), (10, 0.5), (20, 1.0), (40, 0.6), (59, 0.2 + 0.8 / 40), (60, 0.2)):
        schedule(update)
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(lr)
        assert group["rho"] == pytest.approx(0.1 + 0.4 * max(lr - 0.2, 0) / 0.8)


@pytest.mark.parametrize("size", [1, 5, 7, 10])
def test_top1_counts_every_example_once(accelerator, size):
    torch.manual_seed(size)
    logits, labels = torch.randn(size, 4), torch.randint(0, 4, (size,))
    examples = [{"image": row, "label": label} for row, label in zip(logits, labels)]
    loader = accelerator.prepare(torch.utils.data.DataLoader(examples, batch_size=3))
    model = torch.nn.Identity()
    result = run.evaluate_top1(make_job(accelerator, model, None), loader)
    assert result["examples"] == size and not model.training
    assert result["top1"] == pytest.approx(
        sum(row.argmax() == label for row, label in zip(logits, labels)).item() / size
    )


# ----------------------------------------------------------------------------------------------------------------------
# Runs


OPENED_ELSEWHERE = """
import sys, timm, torch
from common import dry_run, data, loaders
from timm.data import create_transform, resolve_data_config
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
model = model.to(memory_format=torch.channels_last)  # as in training: another format rounds otherwise
images = loaders.Images(data.load("digits")["test"], create_transform(**resolve_data_config({}, model=model)))
loader = torch.utils.data.DataLoader(images, 100)
with torch.no_grad():
    right = sum((model(batch["image"]).argmax(-1) == batch["label"]).sum().item() for batch in loader)
print(right / 697)
"""


@pytest.mark.slow
def test_digits_run_leaves_a_checkpoint_that_another_process_opens_with_the_same_accuracy(tmp_path):
    flags = [
        "--recipe",
        "recipes/digits.yaml",
        "--epochs",
        "4",
        "--warmup-epochs",
        "1",
        "--output",
        str(tmp_path / "run"),
    ]
    done = run_script(*flags)
    assert done.returncode == 0, done.stderr
    assert "epoch 1/4:" in done.stderr and "epoch 2/4, best " in done.stderr
    assert "loss=" in done.stderr and "lr=" in done.stderr and "rho=" in done.stderr  # the progress bar
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(saved) == ["last", "best"]
    results = saved["best"]
    assert list(saved["last"]) == list(results)
    assert list(results) == ["validation", "test", "recoloured", "rotated", "sketch", "occluded", "noisy"]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["split", "images", "last", "best"] in lines
    for split, top1 in results.items():
        assert any(line[:1] == [split] and line[2:] == [f"{saved['last'][split]:.2%}", f"{top1:.2%}"] for line in lines)
    assert results["test"] > 0.5  # four epochs, ten classes
    epochs = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [0, 1, 2, 3]
    assert all(f"loss={line['loss']:.3f}, " in done.stderr for line in epochs)  # at its end, the epoch's mean
    assert results["validation"] == max(line["validation"] for line in epochs)
    assert saved["last"]["validation"] == epochs[-1]["validation"]
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["gamma"] == 1.0

    best = tmp_path / "run" / "best"
    assert sorted(file.name for file in best.iterdir()) == ["config.json", "model.safetensors"]
    opened = subprocess.run(
        [sys.executable, "-c", OPENED_ELSEWHERE, str(best)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert float(opened.stdout) == results["test"], opened.stderr


@pytest.mark.parametrize("method", settings.METHODS)
def test_every_method_trains_on_a_folder(tmp_path, method, accelerator):
    dataset = write_folder(tmp_path / "images", images=5)
    options = {
        "method": method,
        "device_batch_size": 4,
        "batch_size": 8,
        "clip_grad": 1.0,
        "loss": "bce",
        "smoothing": 0.1,
    }
    argv = small_recipe(tmp_path, dataset, epochs=2, opt="adamw", weight_decay=0.1, **options)
    assert set(train_imagenet.main(argv)) == {"validation"}
    assert (tmp_path / "run" / "last" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path, accelerator):
    dataset = write_folder(tmp_path / "images", images=8)
    weights = []
    for seed in (0, 0, 1):
        argv = [*small_recipe(tmp_path, dataset, method="random", workers=2), "--seed", str(seed), "--overwrite"]
        train_imagenet.main(argv)
        weights.append((tmp_path / "run" / "best" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_last_and_best_are_the_epochs_that_they_say(tmp_path, accelerator, monkeypatch):
    """Epochs 2 and 3 are equally good: the earlier one is the best."""
    dataset = write_folder(tmp_path / "images")
    top1 = iter([0.5, 0.9, 0.9, 0.7, 0.11, 0.22])  # of four epochs, then of the saved models
    monkeypatch.setattr(run, "evaluate_top1", lambda *_: {"top1": next(top1), "examples": 6})
    returned = train_imagenet.main(small_recipe(tmp_path, dataset, epochs=4, save_interval=1))
    weights = {file.parent.name: file.read_bytes() for file in (tmp_path / "run").rglob("*/model.safetensors")}
    assert weights["best"] == weights["0002"] and weights["last"] == weights["0004"]
    assert len({weights[name] for name in ("0001", "0002", "0003", "0004")}) == 4
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved == {"last": {"validation": 0.11}, "best": {"validation": 0.22}}
    assert returned == saved["last"]


@pytest.mark.parametrize(
    "seconds, words",
    [(0.021, "0.021 seconds"), (40, "40 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours"), (950400, "11 days")],
)
def test_duration_is_in_a_sensible_unit(seconds, words):
    assert dry_run.duration(seconds) == words


def test_m_that_was_not_given_is_said_and_written_into_the_settings(tmp_path, accelerator, capsys):
    dataset = write_folder(tmp_path / "images")
    train_imagenet.main(small_recipe(tmp_path, dataset, m=None, batch_size=6, device_batch_size=3))
    assert "m is 3: without --m" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())["m"] == 3


# ----------------------------------------------------------------------------------------------------------------------
# Bad input: the message is the last word, and there is no traceback


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_image_ends_the_run_with_its_name(tmp_path, workers):
    dataset = write_folder(tmp_path / "images")
    bad = dataset / "train" / "dog" / "bad.jpg"
    bad.write_bytes(b"not an image")
    done = run_script(*small_recipe(tmp_path, dataset, workers=workers, batch_size=7, m=7))
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"error: cannot read the image {bad}: replace or remove it (UnidentifiedImageError(")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model": "resnet51"}, "timm has no model 'resnet51'; the nearest are .*resnet50"),
        ({"model_kwargs": {"depth": 3}}, "timm cannot create 'test_resnet' with {'depth': 3}"),
        ({"model": "zzzzqqqq"}, "timm has no model 'zzzzqqqq'$"),
        ({"opt": "sgdd"}, "timm has no optimizer 'sgdd': did you mean 'sgd[pw]?'"),
        ({"opt": "zzzzqqqq"}, "timm has no optimizer 'zzzzqqqq'$"),
        ({"batch_size": 512, "m": 512}, "batch_size 512 exceeds the 6 training images"),
        ({"rho": -1.0}, "rho is -1.0"),
        ({"gamma": 2.0}, "gamma is 2.0"),
        ({"batch_size": 6, "m": 4}, "m 4 does not divide"),
    ],
)
def test_settings_that_do_not_fit_end_before_anything_is_written(tmp_path, accelerator, changes, words):
    dataset = write_folder(tmp_path / "images")
    with pytest.raises(InputError, match=words):
        train_imagenet.main(small_recipe(tmp_path, dataset, **changes))
    assert not (tmp_path / "run").exists()


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
