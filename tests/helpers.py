"""What tests share: small data sets, small runs, and what they left behind."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image
from safetensors.torch import load_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

import train_imagenet
from common import build, checkpoints

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]


def fresh_process():
    """Let Accelerate forget what it was in this process."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()


# ------------------------------------------------------------------------------------------------
# Data


def write_folder(root, splits=("train", "val"), classes=("cat", "dog"), images=3):
    """Images of noise as SPLIT/CLASS/FILE."""
    rng = np.random.RandomState(0)
    for split in splits:
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                pixels = rng.randint(0, 255, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{split}_{name}_{i}.png")
    return root


def write_cifar100(root, train=12, test=6):
    """A copy of the Hub's uoft-cs/cifar100: parquet files with three columns."""
    names = {"fine_label": [f"fine{i}" for i in range(100)]}
    names["coarse_label"] = [f"coarse{i}" for i in range(20)]
    features = {"img": datasets.Image()}
    features |= {key: datasets.ClassLabel(names=value) for key, value in names.items()}
    (root / "cifar100").mkdir(parents=True)
    for split, size in (("train", train), ("test", test)):
        images = [Image.new("RGB", (32, 32), (i, 0, 0)) for i in range(size)]
        labels = {"fine_label": [i % 3 for i in range(size)], "coarse_label": [0] * size}
        columns = {"img": images, **labels}
        ds = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        ds.to_parquet(root / "cifar100" / f"{split}-00000-of-00001.parquet")
    return root


# ------------------------------------------------------------------------------------------------
# The loop, without a script


def make_job(accelerator, model, optimizer, **changes):
    """A job of micro-batches of four, with cross-entropy and no perturbation."""
    batches = {"to_input": lambda images: images, "m": 4, "accumulation": 1}
    batches |= {"train": None, "updates": 1}
    batches |= {key: changes.pop(key) for key in batches if key in changes}
    settings = {"clip_grad": None, "perturb_fraction": 1.0, "perturb_interval": 1}
    settings |= {"shrink_perturb": None, "lr": 0.1, "checkpoint_interval": None, "freeze": 0}
    args = argparse.Namespace(**settings | changes.pop("args", {}))
    parts = {"objective": None, "criterion": F.cross_entropy, "schedule": None}
    parts |= {"timm_config": None, **changes, "model": model, "optimizer": optimizer}
    parts["batches"] = argparse.Namespace(**batches)
    return build.Job(args, accelerator, **parts)


def ascend_the_loss(model, images, labels):
    return F.cross_entropy(model(images), labels)


# ------------------------------------------------------------------------------------------------
# A model that costs next to nothing


class TinyNet(torch.nn.Module):
    """A convolution, batch norm, dropout and a classifier, as timm's models have them."""

    def __init__(self, num_classes=2, in_chans=3, width=4, drop_rate=0.0):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.conv = torch.nn.Conv2d(in_chans, width, 3, stride=2)
        self.norm = torch.nn.BatchNorm2d(width)
        self.drop = torch.nn.Dropout(drop_rate)
        self.fc = torch.nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((-2, -1))))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = torch.nn.Linear(self.fc.in_features, num_classes)

    def group_matcher(self, coarse=False):
        return {"stem": "^conv", "blocks": [("^norm", (0,)), ("^fc", (99999,))]}


# timm looks here when a model of this file is registered.
default_cfgs = {
    "tiny_net": {
        "input_size": (3, 16, 16), "interpolation": "bilinear", "crop_pct": 0.9,
        "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.25), "first_conv": "conv", "classifier": "fc",
    }
}  # fmt: skip
default_cfgs = generate_default_cfgs(default_cfgs)


@register_model
def tiny_net(pretrained=False, **kwargs):
    """timm's name for ``TinyNet``."""
    return build_model_with_cfg(TinyNet, "tiny_net", pretrained, **kwargs)


# ------------------------------------------------------------------------------------------------
# Runs


def small_recipe(tmp_path, dataset, **changes):
    """Flags of a run of one epoch of a small ResNet, in ``tmp_path/run``."""
    recipe = {"dataset": str(dataset), "model": "test_resnet", "img_size": 32, "crop_pct": 1.0}
    recipe |= {"epochs": 1, "batch_size": 4, "m": 2, "workers": 0, "lr": 0.01, "hflip": 0.0}
    recipe |= {"output": str(tmp_path / "run"), **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return ["--recipe", str(tmp_path / "recipe.yaml")]


def train(script, tmp_path, *flags, dataset, **changes):
    """Run a script with ``small_recipe`` in this process."""
    fresh_process()
    return script.main([*small_recipe(tmp_path, dataset, **changes), *flags])


# Dropout, augmentation, workers, a schedule for lr and rho, noise in the perturbation, momentum:
# all must resume.
RESUMABLE = {
    "model": "test_vit", "img_size": 160, "epochs": 3, "batch_size": 4, "m": 2, "workers": 1,
    "lr": 0.05, "opt": "sgd", "model_kwargs": {"proj_drop_rate": 0.1}, "method": "random",
    "rho": 0.1, "rho_min": 0.01, "warmup_epochs": 1, "checkpoint_interval": 1, "scale": [0.3, 1.0],
}  # fmt: skip


def recipe(tmp_path, images, **changes):
    """The file of ``RESUMABLE`` with changes."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**RESUMABLE, "dataset": str(images), **changes}))
    return path


def in_process(recipe, output, *flags):
    """Run train_imagenet.py in this process."""
    fresh_process()
    return train_imagenet.main(["--recipe", str(recipe), "--output", str(output), *flags])


TRAINED = {}  # by images, the folder of a short run that was trained once


def short_run(tmp_path, images, **changes):
    """A run of two epochs, with the checkpoints of updates 7 and 8; its recipe and folder."""
    path = recipe(tmp_path, images, workers=0, epochs=2, **changes)
    if changes or images not in TRAINED:
        in_process(path, tmp_path / "run")
    if not changes:
        kept = TRAINED.setdefault(images, images.with_name(f"{images.name}_short_run"))
        source, target = (tmp_path / "run", kept) if not kept.exists() else (kept, tmp_path / "run")
        shutil.copytree(source, target)
    return path, tmp_path / "run"


def run_script(*argv):
    """Run train_imagenet.py in a process of its own."""
    command = [sys.executable, str(ROOT / "train_imagenet.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def start(recipe, output, *flags, processes=1):
    """Start train_imagenet.py on the CPU, in processes of its own."""
    command = [sys.executable] if processes == 1 else [*TORCHRUN, str(processes)]
    command += ["train_imagenet.py", "--recipe", str(recipe), "--output", str(output), *flags]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options = {"cwd": ROOT, "env": environment, "start_new_session": True}
    return subprocess.Popen(command, **options, **pipes)


def finish(process):
    """Wait for a process that succeeds; what it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for(path, process):
    """Wait until there is a path, or the process has ended."""
    deadline = time.monotonic() + 240
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)


# ------------------------------------------------------------------------------------------------
# What a run left behind


def saved(folder):
    """The weights of a saved model."""
    return load_file(folder / "model.safetensors")


def same(one, other):
    """Whether two models have the same weights."""
    return all(torch.equal(one[name], other[name]) for name in one)


def final_weights(output):
    """The weights of a run's newest checkpoint."""
    return saved(checkpoints.find("auto", output / "checkpoints"))


def updates_saved(output):
    """The number of updates before a run's newest checkpoint."""
    newest = checkpoints.find("auto", output / "checkpoints")
    return int(newest.name.split("-")[1]) if newest else 0


def logged_epochs(output):
    """A run's lines of metrics."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def metrics(output):
    """A run's lines, without the time that they took."""
    lines = logged_epochs(output)
    for line in lines:
        del line["seconds"]
    return lines


def assert_same_run(one, other):
    """Bit for bit: weights, metrics, results."""
    assert metrics(one) == metrics(other)
    for file in ("results.json", "best/model.safetensors", "last/model.safetensors"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file
    for a, b in zip(final_weights(one).values(), final_weights(other).values(), strict=True):
        assert torch.equal(a, b)
