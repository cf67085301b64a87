"""The benchmarks that need no GPU and no checkout of timm, each at a tiny size, at which its
figures mean nothing.
"""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command, words",
    [
        ("allocator.py --models test_resnet --rounds 1", "page faults"),
        ("evaluation.py --images 24 --rounds 1 --corrupt-images 2", "throughput, ours to timm's"),
        ("loader.py --images 64 --rounds 1", "of timm's"),
        (
            "step.py --device cpu --models mlp --batch-size 8 --rounds 1",
            "the host's share of a block",
        ),
    ],
)
def test_a_benchmark_runs(command, words):
    script, *flags = command.split()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *flags],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert words in done.stdout
