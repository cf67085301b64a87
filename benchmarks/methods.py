# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""Train the README's model of the digits with every method: how long it takes, and top-1 on the
test images.

# All eight, one after the other: about 5 minutes on two cores
python benchmarks/methods.py
python benchmarks/methods.py --methods sam obf
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.settings import METHODS

ROOT = Path(__file__).resolve().parents[1]
MAX_SECONDS, MIN_TOP1 = 240, 0.95


def verdict(fine):
    return "ok" if fine else "MISSED"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    args = parser.parse_args()
    print(f"{'method':<10} {'seconds':>8}  {'target':<14} {'test':>7}  target")
    for method in args.methods:
        with tempfile.TemporaryDirectory() as folder:
            flags = [
                "--recipe",
                "recipes/digits.yaml",
                "--method",
                method,
                "--output",
                folder,
                "--overwrite",
            ]
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "train_imagenet.py", *flags],
                cwd=ROOT,
                check=True,
                capture_output=True,
            )
            seconds = time.perf_counter() - start
            top1 = json.loads((Path(folder) / "results.json").read_text())["last"]["test"]
        in_time, good = verdict(seconds <= MAX_SECONDS), verdict(top1 > MIN_TOP1)
        cells = f"{method:<10} {seconds:8.1f}  <= {MAX_SECONDS} {in_time:<7} "
        print(cells + f"{top1:7.2%}  > {MIN_TOP1:.0%} {good}", flush=True)


if __name__ == "__main__":
    main()
