"""What trains, and how fast: a frozen backbone, and a learning rate that decays by layers."""

import argparse
import os
import shutil
import subprocess

import pytest
import timm
import torch
from helpers import (
    ROOT,
    TORCHRUN,
    fresh_process,
    in_process,
    logged_epochs,
    recipe,
    same,
    saved,
    small_recipe,
    train,
    write_folder,
)

import finetune_cifar
import train_imagenet
from common import build, settings
from common.errors import InputError
from sam_obf import SAM


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


def is_head(name):
    return name.startswith(("fc.", "head."))


@pytest.mark.parametrize("method", ["base", "obf", "random", "momentum", "gsam"])
def test_only_the_classifier_moves_in_the_frozen_epochs(tmp_path, images, checkpoint, method):
    """Batch norm's statistics stay too; then everything trains."""
    flags = {"model": str(checkpoint), "method": method, "freeze": 2, "epochs": 3, "lr": 0.1}
    train(finetune_cifar, tmp_path, dataset=images, save_interval=1, **flags)
    first, second, third = (saved(tmp_path / "run" / "epochs" / f"000{i}") for i in (1, 2, 3))
    start = saved(checkpoint)
    for name in first:
        if is_head(name):
            assert not torch.equal(first[name], second[name])
        else:
            assert torch.equal(first[name], start[name]) and torch.equal(second[name], start[name])
    moved = [name for name in third if not torch.equal(third[name], second[name])]
    assert len(moved) > 0.9 * len(third)


def test_a_classifier_of_several_layers_trains_whole(accelerator):
    """As a perceptron in the place of timm's linear layer, or LeViT's with its batch norm."""
    model = timm.create_model("test_resnet", num_classes=2)
    head = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    model.get_classifier = lambda: head
    args = argparse.Namespace(freeze=1, model="test_resnet")
    frozen = build.modules_to_freeze(args, accelerator, model)
    assert {model.conv1, model.fc} < set(frozen) and not set(head.modules()) & set(frozen)


def test_the_perturbation_is_of_length_rho_on_what_trains(tmp_path, images, monkeypatch):
    lengths, perturbed = [], SAM.perturbed

    def measured(self, closure, **options):
        before = [p.detach().clone() for p in self._parameters_of_groups()]
        block = perturbed(self, closure, **options)
        enter = type(block).__enter__

        class Block:
            def __enter__(self_):
                result = enter(block)
                now = list(self._parameters_of_groups())
                norms = [(a.detach() - b).norm() for a, b in zip(now, before)]
                lengths.append((torch.stack(norms).norm().item(), sum(n > 0 for n in norms).item()))
                return result

            def __exit__(self_, *error):
                return block.__exit__(*error)

        return Block()

    def parameters_of_groups(self):
        return [p for group in self.param_groups for p in group["params"]]

    monkeypatch.setattr(SAM, "_parameters_of_groups", parameters_of_groups, raising=False)
    monkeypatch.setattr(SAM, "perturbed", measured)
    changes = {"model_kwargs": {}, "method": "sam", "rho_min": None, "workers": 0, "freeze": 1}
    in_process(recipe(tmp_path, images, epochs=2, **changes), tmp_path / "run")
    assert [norm for norm, _ in lengths] == pytest.approx([0.1] * len(lengths), rel=1e-3)
    half = len(lengths) // 2
    assert {number for _, number in lengths[:half]} == {2}  # the head's weight and bias
    assert all(number > 10 for _, number in lengths[half:])


@pytest.mark.slow
def test_a_run_resumed_in_a_frozen_epoch_and_after_it_is_the_same(tmp_path, images):
    path = recipe(
        tmp_path, images, workers=0, freeze=1, epochs=2, model="test_resnet", model_kwargs={},
        img_size=32, method="obf",
    )  # fmt: skip
    in_process(path, tmp_path / "run", "--checkpoint-hist", "9")
    for first in (2, 4, 6):
        copy = shutil.copytree(tmp_path / "run", tmp_path / f"resumed{first}")
        for late in range(first + 1, 9):
            shutil.rmtree(copy / "checkpoints" / f"step-{late:08d}")
        in_process(path, copy, "--resume", "auto", "--checkpoint-hist", "9")
        assert same(saved(tmp_path / "run" / "last"), saved(copy / "last"))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"freeze": 2, "epochs": 2}, "freeze 2 leaves no epoch of 2 to train the rest"),
        ({"freeze": -1}, "freeze is -1"),
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
    ],
)
def test_wrong_values_are_named(tmp_path, images, changes, words):
    fresh_process()
    with pytest.raises(InputError, match=words):
        train_imagenet.main(small_recipe(tmp_path, images, **changes))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["obf", "gsam"])
def test_two_processes_freeze_and_thaw_as_one_does(tmp_path, images, method):
    changes = {"model": "test_resnet", "model_kwargs": {}, "img_size": 32, "workers": 0}
    changes |= {"method": method, "freeze": 1, "epochs": 2, "checkpoint_interval": None}
    path = recipe(tmp_path, images, **changes)
    command = [*TORCHRUN, "2", "train_imagenet.py", "--recipe", str(path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([*command, "--output", str(tmp_path / "two")], timeout=300, **options)
    assert done.returncode == 0, done.stderr
    in_process(path, tmp_path / "one")
    one, two = (saved(tmp_path / name / "last") for name in ("one", "two"))
    for name, weight in one.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(weight, two[name], rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------
# Layers


def optimizer_of(tmp_path, *flags):
    flags = ["--output", str(tmp_path / "run"), *flags]
    args = settings.parse(train_imagenet.parser(), flags)
    model = timm.create_model("test_vit", num_classes=3)
    return args, model, build.build_optimizer(args, model)


def test_lr_decays_from_the_head_to_the_stem_and_the_heads_is_shown(tmp_path):
    flags = ["--layer-decay", "0.5", "--lr", "0.8", "--min-lr", "0.2", "--epochs", "4"]
    args, model, optimizer = optimizer_of(tmp_path, *flags, "--rho", "0.3")
    schedule = build.build_schedule(args, optimizer, 10)
    for update, highest in ((0, 0.8), (20, 0.5), (40, 0.2)):
        schedule(update)
        lr_of = {}
        for group in optimizer.param_groups:
            lr_of |= {id(p): group["lr"] for p in group["params"]}
        named = {name: lr_of[id(p)] for name, p in model.named_parameters()}
        assert named["head.weight"] == pytest.approx(highest)
        deepest = len(model.blocks)
        for i in range(deepest):
            expected = highest * 0.5 ** (deepest - i)
            assert named[f"blocks.{i}.mlp.fc1.weight"] == pytest.approx(expected)
        assert named["pos_embed"] == pytest.approx(highest * 0.5 ** (deepest + 1))


def test_metrics_have_the_heads_lr_and_rho(tmp_path, images):
    changes = {"layer_decay": 0.5, "method": "sam", "lr": 0.08, "sched": "constant", "rho": 0.3}
    train(train_imagenet, tmp_path, dataset=images, **changes)
    (line,) = logged_epochs(tmp_path / "run")
    assert (line["lr"], line["rho"]) == (pytest.approx(0.08), 0.3)


def test_each_layers_rho_follows_its_own_lr(tmp_path):
    flags = ["--layer-decay", "0.5", "--lr", "0.8", "--epochs", "4", "--rho", "0.4"]
    args, _, optimizer = optimizer_of(tmp_path, *flags, "--rho-min", "0.0")
    build.build_schedule(args, optimizer, 10)(0)
    for group in optimizer.param_groups:
        assert group["rho"] == pytest.approx(0.4 * group["lr"] / 0.8)
