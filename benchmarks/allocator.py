# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""What it saves on a CPU to keep freed memory, as the scripts do: ``common/allocator.py``.

Steps of training and evaluation, with it and without, each in a process of its own, in turns:
processor time (that of the user and of the system), page faults, and peak memory. With a checkout
of timm, also eval_robustness.py beside timm's validate.py, whole commands, on the same photographs.
"tuned" is the same validate.py with glibc's variables set by hand.

    python benchmarks/allocator.py
    git clone --branch v1.0.28 https://github.com/huggingface/pytorch-image-models
    python benchmarks/allocator.py --timm pytorch-image-models
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from evaluation import name_like_imagenet
from loader import write_photographs
from timm.models import save_for_hf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import allocator

ROOT = Path(__file__).resolve().parents[1]
# Side of the input in pixels, batch size, channels_last.
MODELS = {
    "resnet50": (224, 16, True),
    "tf_efficientnet_lite0": (224, 16, True),
    "vit_small_patch32_224": (224, 32, False),
    "test_resnet": (32, 64, True),
}
EVALUATED, TARGET = "tf_efficientnet_lite0", 1.6  # of validate.py's images per second
TUNED = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**40)}


def measure_step(name, training, keep, steps=5):
    """Print what a step takes in this process, as JSON; the first two steps do not count."""
    if keep:
        allocator.keep_freed_memory()
    torch.manual_seed(0)
    side, batch_size, channels_last = MODELS[name]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(batch_size, 3, side, side).to(memory_format=layout)
    labels = torch.arange(batch_size) % 10
    model = timm.create_model(name, num_classes=10).train(training).to(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    for step in range(2 + steps):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_SELF)
        with torch.set_grad_enabled(training):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        if training:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = resource.getrusage(resource.RUSAGE_SELF)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    faults = (after.ru_minflt - before.ru_minflt) / steps
    print(json.dumps([seconds / steps, faults, after.ru_maxrss / 2**20]))


def compare_steps(models, rounds):
    for name in models:
        for training in (True, False):
            values = {"leave": [], "keep": []}
            for number in tqdm(range(rounds), desc=name, leave=False):
                for what in sorted(values, reverse=bool(number % 2)):
                    kind = "train" if training else "evaluate"
                    command = [sys.executable, __file__, "--step", name, kind, what]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    values[what].append(json.loads(done.stdout))
            print(f"{name}, {'training' if training else 'evaluating'}")
            for what, rows in values.items():
                seconds, faults, peak = (statistics.median(column) for column in zip(*rows))
                shown = f"{seconds:8.3f} s of processor time, {faults:9.0f} page faults"
                print(f"  {what:<6} {shown}, peak {peak:.2f} GiB")


def run(command, folder, log, **environment):
    """Seconds by the clock and of processor time that a command takes, its workers' too."""
    start = time.perf_counter()
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", **environment}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        log.seek(0)
        raise SystemExit(f"error: {' '.join(command)} failed:\n{log.read()[-2000:]}")
    return time.perf_counter() - start, usage.ru_utime + usage.ru_stime


def compare_commands(args, folder):
    photographs, model = folder / "photographs", folder / "model"
    photographs.mkdir()
    write_photographs(photographs, args.images)
    name_like_imagenet(photographs)
    save_for_hf(timm.create_model(EVALUATED), model, safe_serialization=True)
    shared = ["--batch-size", 64, "--workers", args.workers, "--img-size", 224]
    own = [ROOT / "eval_robustness.py", *shared, "--model", model, "--benchmarks", "imagenet"]
    own += ["--data", f"imagenet={photographs}", "--allow-partial", "--crop-pct", 0.875]
    checkout = Path(args.timm).resolve()
    theirs = [checkout / "validate.py", *shared, "--model", EVALUATED, "--data-dir", photographs]
    theirs += ["--checkpoint", model / "model.safetensors", "--crop-pct", 0.875, "--device", "cpu"]
    seconds = {"ours": [], "timm": [], "tuned": []}
    for number in tqdm(range(args.rounds), desc="commands", leave=False):
        for name in sorted(seconds, reverse=bool(number % 2)):
            with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as log:
                if name == "ours":
                    measured = run([*own, "--output", output], ROOT, log)
                else:
                    tuned = TUNED if name == "tuned" else {}
                    measured = run(theirs, checkout, log, PYTHONPATH=str(checkout), **tuned)
                seconds[name].append(measured)
    print(f"{EVALUATED}, {args.images} photographs, whole commands, {args.rounds} rounds, medians")
    for name, rows in seconds.items():
        clock, processor = (statistics.median(column) for column in zip(*rows))
        ratios = [row[0] / own_row[0] for row, own_row in zip(rows, seconds["ours"])]
        ratio = f"   ours is {statistics.median(ratios):.2f} times as fast"
        verdict = "ok" if statistics.median(ratios) >= TARGET else "MISSED"
        ratio += f", target >= {TARGET} {verdict}" if name == "timm" else ""
        print(f"{name:<6} {clock:7.1f} s, {processor:7.1f} s of processor time{ratio}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timm", help="a checkout of huggingface/pytorch-image-models, v1.0.x")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="(all)")
    parser.add_argument("--images", type=int, default=1024, help="to evaluate (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    parser.add_argument("--step", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        name, kind, what = args.step
        return measure_step(name, kind == "train", what == "keep")
    if args.timm:
        with tempfile.TemporaryDirectory() as folder:
            return compare_commands(args, Path(folder))
    compare_steps(args.models, args.rounds)


if __name__ == "__main__":
    main()
