# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""What measuring a model costs with every measure, beside an earlier commit with fewer of them.

The earlier one takes 4 micro-batches and lambda_max of 256 images, as ``experiments/forgetting``
was made; and, without a target, as much as is the default now. Whole commands for one saved model
of a run, one thread each; they take turns.

    mkdir before && git archive 259f06c | tar -x -C before
    python train_imagenet.py --recipe recipes/cifar/scratch.yaml --method obf --rho 0.1 --epochs 9 \
        --save-interval 9 --output outputs/one
    python benchmarks/measuring.py before outputs/one
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MAX_RATIO = 2.0
PAGE = ["--micro-batches", "4", "--hessian-examples", "256"]
SAME = ["--micro-batches", "16", "--hessian-examples", "2048"]


def seconds(checkout, run, flags) -> tuple[float, float]:
    """Of the command in a checkout: by the clock, and of the processor."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    epoch = str(max(int(path.name) for path in (run / "epochs").iterdir()))
    with tempfile.TemporaryDirectory() as output:
        command = [sys.executable, "measure_forgetting.py", "--runs", str(run), "--epochs", epoch]
        command += ["--perturbations", "own", "sam", "--examples", "5000", "--workers", "0"]
        start, used = time.perf_counter(), os.times()
        subprocess.run(
            [*command, *flags, "--output", output],
            cwd=checkout,
            env=environment,
            check=True,
            capture_output=True,
        )
        wall, now = time.perf_counter() - start, os.times()
    processor = now.children_user + now.children_system
    return wall, processor - used.children_user - used.children_system


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, help="a checkout of the earlier commit")
    parser.add_argument("run", type=Path, help="a finished run of the CIFAR-10 page's recipe")
    parser.add_argument("--rounds", type=int, default=3, help="(%(default)s)")
    args = parser.parse_args()
    contestants = {"before": (args.before, PAGE), "same settings": (args.before, SAME)}
    contestants["now"] = ROOT, []
    times = {name: [] for name in contestants}
    for _ in range(args.rounds):
        for name, (checkout, flags) in contestants.items():
            wall, processor = seconds(checkout, args.run.resolve(), flags)
            times[name].append((wall, processor))
            print(f"{name:<14} {wall:6.1f} s, {processor:6.1f} s of the processor", flush=True)
    for name, i in (("before", 0), ("before", 1), ("same settings", 1)):
        ratios = [now[i] / other[i] for now, other in zip(times["now"], times[name])]
        ratio, kind = statistics.median(ratios), ("by the clock", "in processor time")[i]
        verdict = "ok" if ratio <= MAX_RATIO else "MISSED"
        target = f"   target <= {MAX_RATIO} {verdict}" if name == "before" else ""
        print(
            f"now to {name}, {kind}: {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f}){target}"
        )


if __name__ == "__main__":
    main()
