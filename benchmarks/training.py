# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Images per second of whole training runs, beside timm's own train.py.

Both train the same model on the same folder of JPEG files, with the same augmentation, batch size,
workers, precision, memory format and optimizer, and evaluate and save after each epoch. Start and
first epoch are left out. They take turns, a run each, and a ratio compares two runs of the same
round. train.py is no part of timm's package:

    git clone --branch v1.0.28 https://github.com/huggingface/pytorch-image-models
    python benchmarks/training.py --timm pytorch-image-models
    python benchmarks/training.py --timm CHECKOUT --amp bf16 --folder imagenet --images 1281167
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from loader import write_photographs
from PIL import Image
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
MADE = 256  # different images, at most; an epoch has copies of them
METHODS = {"base": 1.0, "sam": 0.5, "obf": 0.5}  # shares of the target of base
# Targets of base, in images per second to those of timm: on a GPU, and on a CPU.
TARGETS = {
    "test_resnet": (1.0, 1.1), "vit_small_patch32_224": (1.0, 1.2), "resnet50": (1.0, 1.35)
}  # fmt: skip
# train.py as "tuned": the variables of glibc that do what common/allocator.py does.
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}
# Side of the input in pixels, batch size, images of an epoch to make up, channels_last, optimizer
MODELS = {
    "test_resnet": (32, 64, 4096, True, "sgd"),
    "vit_small_patch32_224": (224, 32, 512, False, "adamw"),
    "resnet50": (224, 32, 128, True, "sgd"),
}


def make_folder(folder, images, side):
    """A folder of images to train on and some to validate on; small ones for a small input."""
    for split, number in (("train", images), ("validation", 32)):
        (folder / split).mkdir(parents=True)
        write_photographs(folder / split, min(number, MADE))
        for path in list((folder / split).rglob("*.jpg")):
            if side < 64:
                Image.open(path).resize((4 * side // 3, side)).save(path, quality=92)
            for copy in range(1, number // MADE):
                path.with_stem(f"{path.stem}-{copy}").hardlink_to(path)


def commands(args, model, folder, output):
    """The runs, by name: a command, its folder, and a file that grows by a line with each epoch."""
    side, batch_size, _, channels_last, opt = MODELS[model]
    workers, epochs = str(args.workers), str(args.epochs)
    shared = [
        "--model",
        model,
        "--batch-size",
        str(batch_size),
        "--img-size",
        str(side),
        "--opt",
        opt,
        "--lr",
        "1e-3",
    ]
    shared += [
        "--weight-decay",
        "1e-3",
        "--epochs",
        epochs,
        "--warmup-epochs",
        "0",
        "--workers",
        workers,
    ]
    shared += [
        "--crop-pct",
        "0.875",
        "--interpolation",
        "bilinear",
        "--scale",
        "0.05",
        "1.0",
        "--output",
        str(output),
    ]
    classes = str(sum(1 for _ in (folder / "train").iterdir()))
    timm = [
        *shared,
        "--data-dir",
        str(folder),
        "--num-classes",
        classes,
        "--color-jitter",
        "0",
        "--smoothing",
        "0",
    ]
    timm += [
        "--train-interpolation",
        "bilinear",
        "--experiment",
        "run",
        "--device",
        args.device,
        "--sched",
        "cosine",
    ]
    timm += ["--checkpoint-hist", "2", *(["--channels-last"] if channels_last else [])]
    timm += (
        ["--amp", "--amp-dtype", {"bf16": "bfloat16", "fp16": "float16"}[args.amp]]
        if args.amp
        else []
    )
    checkout = Path(args.timm).resolve()
    runs = {"timm": ([str(checkout / "train.py"), *timm], checkout, output / "run" / "summary.csv")}
    own = [
        *shared,
        "--dataset",
        str(folder),
        "--sched",
        "cosine",
        "--overwrite",
        "--m",
        str(batch_size),
    ]
    own += ["--channels-last" if channels_last else "--no-channels-last"]
    for method in METHODS:
        command = [str(ROOT / "train_imagenet.py"), *own, "--method", method]
        runs[method] = (command, ROOT, output / "metrics.jsonl")
    return runs


def seconds_per_epoch(args, command, folder, file, variables):
    """Run to the end; the mean over all epochs but the first."""
    cpu = {"ACCELERATE_USE_CPU": "1"} if args.device == "cpu" else {}
    environment = {
        **os.environ,
        **cpu,
        **variables,
        "ACCELERATE_MIXED_PRECISION": args.amp or "no",
        "PYTHONPATH": str(folder),
    }
    file.unlink(missing_ok=True)
    ends, seen = [], 0
    with tempfile.TemporaryFile("w+") as log:
        run = subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdout=log, stderr=log
        )
        while run.poll() is None:
            lines = file.read_text().splitlines() if file.exists() else []
            lines = [line for line in lines if not line.startswith("epoch,")]  # timm's heading
            ends += [time.perf_counter()] * (len(lines) - seen)
            seen = len(lines)
            time.sleep(0.01)
        if run.returncode or len(ends) != args.epochs:
            log.seek(0)
            raise SystemExit(f"error: {' '.join(command)} failed:\n{log.read()[-2000:]}")
    return (ends[-1] - ends[0]) / (args.epochs - 1)


def compare(args, model, folder, images):
    peers = ("timm", "tuned") if args.device == "cpu" else ("timm",)
    seconds = {name: [] for name in (*peers, *METHODS)}
    for number in tqdm(range(args.rounds), desc=model, leave=False):
        for name in sorted(seconds, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory() as output:
                runs = commands(args, model, folder, Path(output) / "out")
                run = runs["timm" if name in peers else name]
                variables = TUNED if name == "tuned" else {}
                seconds[name].append(seconds_per_epoch(args, *run, variables))
                tqdm.write(f"{model} {name}: {seconds[name][-1]:.2f} s for {images} images")
    side, batch_size, *_ = MODELS[model]
    kind = f"{args.amp or 'fp32'}, {args.device}, {args.rounds} rounds"
    print(f"{model}, {side} pixels, batch {batch_size}, {kind}")
    for name in seconds:
        print(f"{name:<5} {images / statistics.median(seconds[name]):8.1f} images/s")
    for name, share in METHODS.items():
        target = share * TARGETS[model][args.device == "cpu"]
        for peer in peers:
            ratios = sorted(other / own for other, own in zip(seconds[peer], seconds[name]))
            ratio = statistics.median(ratios)
            verdict = f"   target >= {target:.2f} {'ok' if ratio >= target else 'MISSED'}"
            spread = f"({ratios[0]:.2f}-{ratios[-1]:.2f})"
            print(f"{name:<5} to {peer} {ratio:.3f} {spread}{verdict if peer == 'timm' else ''}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timm", required=True, help="a checkout of huggingface/pytorch-image-models, v1.0.x"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    parser.add_argument(
        "--folder", help="images as train/CLASS/FILE and validation/CLASS/FILE (made up)"
    )
    parser.add_argument(
        "--images", type=int, help="of an epoch: the folder's, or to make up (each model's own)"
    )
    parser.add_argument("--epochs", type=int, default=2, help="of a run, at least 2 (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--amp", choices=["bf16", "fp16"], help="mixed precision (none)")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    args = parser.parse_args()
    if not (Path(args.timm) / "train.py").exists():
        parser.error(
            f"--timm {args.timm} has no train.py: git clone https://github.com/huggingface/pytorch-image-models"
        )
    if args.epochs < 2 or (args.folder and not args.images):
        parser.error(
            "--epochs must be at least 2, since the first is left out; --folder needs --images"
        )
    for model in args.models:
        side, batch_size, usual, *_ = MODELS[model]
        images = (args.images or usual) // batch_size * batch_size
        with tempfile.TemporaryDirectory() as made_up:
            if not args.folder:
                make_folder(Path(made_up), images, side)
            compare(args, model, Path(args.folder or made_up).resolve(), images)


if __name__ == "__main__":
    main()
