"""What a whole run of a training script does with its epochs, its processes and its transforms."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from test_data import write_folder
from test_training import small_recipe
from timm.models import save_for_hf

import finetune_cifar
import train_imagenet
from common import loop, report, run

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two_processes.py wrote, by process, and the run's folder."""
    folder = tmp_path_factory.mktemp("two")
    images = write_folder(folder / "images", images=7)  # of 14, two processes evaluate four at a time
    flags = [*small_recipe(folder, images), "--epochs", "2", "--scale", "0.2", "1", "--method", "random"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests" / "two_processes.py"), str(folder), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [load_file(folder / f"{rank}.safetensors") for rank in range(2)], folder / "run"


def test_each_process_draws_noise_of_its_own(processes):
    (one, two), _ = processes
    assert not torch.isclose(one["noise"], two["noise"]).any()


@pytest.mark.parametrize("epoch", [0, 1])
def test_batch_norm_is_the_mean_over_processes_before_it_is_evaluated(processes, epoch):
    (one, two), _ = processes
    own = [process[f"own {epoch}"] for process in (one, two)]
    assert not torch.allclose(*own)
    for process in (one, two):
        torch.testing.assert_close(process[f"evaluated {epoch}"], (own[0] + own[1]) / 2)


def test_training_accuracy_is_that_of_all_processes_images(processes):
    (one, two), run = processes
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    right = [[int(process[f"right {epoch}"]) for process in (one, two)] for epoch in (0, 1)]
    assert any(first != second for first, second in right)
    assert [12 * line["train"] for line in lines] == [sum(both) for both in right]


def test_two_processes_evaluate_every_image_once(processes):
    assert [process["examples"].item() for process in processes[0]] == [14, 14]


# ----------------------------------------------------------------------------------------------------------------------
# One run in this process, whose accuracies on validation are made up


SCRIPTED = [0.2, 0.5, 0.5, 0.4]  # top-1 on validation after each epoch


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A finished run of four epochs with ``SCRIPTED`` accuracies, and what its final evaluation looked at."""
    folder = tmp_path_factory.mktemp("scripted")
    images = write_folder(folder / "images", splits=("train", "val", "test"), images=4)
    told, finally_seen = iter(SCRIPTED), []

    def evaluate_top1(job, loader):
        weights = {name: value.clone() for name, value in job.accelerator.unwrap_model(job.model).state_dict().items()}
        accuracy = next(told, None)
        if accuracy is None:
            finally_seen.append(weights)
            for p in job.model.parameters():  # whatever is in memory now, what is saved counts
                p.data.add_(1.0)
            return {"top1": 0.25, "examples": 8}
        return {"top1": accuracy, "examples": 8}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "evaluate_top1", evaluate_top1)
        flags = [
            *small_recipe(folder, images),
            "--epochs",
            "4",
            "--save-interval",
            "2",
            "--head-bias",
            "-3",
            "--lr",
            "0.1",
        ]
        train_imagenet.main([*flags, "--method", "base"])
    return folder / "run", finally_seen


def saved(folder):
    return load_file(folder / "model.safetensors")


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def test_epochs_are_kept_by_their_number_from_one(scripted):
    run, _ = scripted
    assert sorted(path.name for path in (run / "epochs").iterdir()) == ["0002", "0004"]


def test_last_is_the_last_epoch_and_best_the_first_of_the_best(scripted):
    run, _ = scripted
    assert same(saved(run / "last"), saved(run / "epochs" / "0004"))
    assert same(saved(run / "best"), saved(run / "epochs" / "0002"))  # not the third, as good, nor the fourth, worse
    assert not same(saved(run / "best"), saved(run / "last"))


def test_the_final_evaluation_is_of_the_models_that_were_saved(scripted):
    run, seen = scripted
    expected = [saved(run / "last")] * 2 + [saved(run / "best")] * 2  # on validation and test
    assert len(seen) == 4
    # Each split is evaluated after the one before has spoilt the weights in memory: only the first of a model is whole.
    assert same(seen[0], expected[0]) and same(seen[2], expected[2])


def test_metrics_have_one_line_for_each_epoch_with_its_accuracy(scripted):
    run, _ = scripted
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["validation"]) for line in lines] == list(enumerate(SCRIPTED))


def test_metrics_have_what_the_epoch_trained_with_and_how_well(tmp_path, monkeypatch):
    images, seen = write_folder(tmp_path / "images", images=5), []
    update = loop.update

    def recorded(job, batches, perturb):
        before = job.right.item()
        loss = update(job, batches, perturb)
        seen.append((loss.item(), job.right.item() - before))
        return loss

    monkeypatch.setattr(loop, "update", recorded)
    recipe = {"epochs": 3, "warmup_epochs": 1, "method": "sam", "rho": 0.3, "rho_min": 0.1, "lr": 0.01, "min_lr": 0.001}
    train_imagenet.main(small_recipe(tmp_path, images, **recipe))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = len(seen) // 3
    assert steps > 1
    for i, line in enumerate(lines):
        losses, right = zip(*seen[i * steps : (i + 1) * steps])
        assert line["loss"] == pytest.approx(sum(losses) / steps) and line["train"] == sum(right) / (4 * steps)
        assert line["rho"] == pytest.approx(0.1 + 0.2 * (line["lr"] - 0.001) / 0.009) and line["seconds"] > 0
    assert [line["lr"] for line in lines] == pytest.approx([0.01, 0.0055, 0.001])
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / "run" / f"curves.{ending}").read_bytes().startswith(start)


def test_metrics_have_the_mean_loss_of_each_epoch_and_the_last_epoch_is_kept_too(tmp_path, monkeypatch):
    images = write_folder(tmp_path / "images", images=4)  # two updates an epoch
    losses, modes, own = [], [], loop.update

    def update(job, *args, **options):
        modes.append(job.model.training)
        losses.append(own(job, *args, **options).item())
        return torch.tensor(losses[-1])

    monkeypatch.setattr(loop, "update", update)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=3, save_interval=2))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = [sum(losses[start : start + 2]) / 2 for start in (0, 2, 4)]
    assert [line["loss"] for line in lines] == pytest.approx(expected) and len(losses) == 6
    assert all(modes)  # after an evaluation too
    assert sorted(path.name for path in (tmp_path / "run" / "epochs").iterdir()) == ["0002", "0003"]


def test_epochs_between_validations_and_the_last_one_are_validated_and_the_weights_are_the_same(tmp_path):
    images, outputs = write_folder(tmp_path / "images", images=4), {}
    for interval in (1, 2, 9):
        outputs[interval] = tmp_path / str(interval)
        output = str(outputs[interval])
        train_imagenet.main(small_recipe(tmp_path, images, epochs=5, val_interval=interval, output=output))
    rows = {key: [row["validation"] for row in report.read_metrics(output)] for key, output in outputs.items()}
    every = rows[1]
    assert rows[2] == [None, every[1], None, every[3], every[4]] and rows[9] == [None] * 4 + [every[4]]
    for interval in (2, 9):
        assert same(saved(outputs[1] / "last"), saved(outputs[interval] / "last"))
        assert (outputs[interval] / "best").exists() and (outputs[interval] / "curves.png").exists()


def test_each_epoch_sees_the_images_in_an_order_and_crops_of_its_own(tmp_path, monkeypatch):
    images = write_folder(tmp_path / "images", images=8)
    seen, forward_backward = [], loop.forward_backward

    def recorded(job, batch, *args, **options):
        seen.append((batch["image"].sum((1, 2, 3)).tolist(), batch["label"].tolist()))
        return forward_backward(job, batch, *args, **options)

    monkeypatch.setattr(loop, "forward_backward", recorded)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=3))
    epochs = [[list(itertools.chain(*parts)) for parts in zip(*seen[i : i + 4])] for i in (0, 4, 8)]
    for i, (pixels, labels) in enumerate(epochs):
        assert sorted(labels) == [0] * 8 + [1] * 8
        assert all(not set(pixels) & set(other) and labels != order for other, order in epochs[:i])


def test_without_validation_images_last_is_saved_and_there_is_no_best(tmp_path):
    images = write_folder(tmp_path / "images", splits=("train", "test"), images=4)
    train_imagenet.main(small_recipe(tmp_path, images, epochs=2, save_interval=1))
    assert same(saved(tmp_path / "run" / "last"), saved(tmp_path / "run" / "epochs" / "0002"))
    assert not same(saved(tmp_path / "run" / "last"), saved(tmp_path / "run" / "epochs" / "0001"))
    assert not (tmp_path / "run" / "best").exists()
    assert set(json.loads((tmp_path / "run" / "results.json").read_text())) == {"last"}


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
