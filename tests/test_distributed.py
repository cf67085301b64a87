"""Two gloo processes against one: the same weights, and no needless communication."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers import TORCHRUN, fresh_process
from safetensors.torch import load_file
from updates import METHODS, MICRO_BATCH, every_method

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What updates.py finds, by kind of launch."""
    folder = tmp_path_factory.mktemp("updates")
    command = [*TORCHRUN, "2", str(TESTS / "updates.py"), str(folder)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(TESTS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {name: load_file(folder / name) for name in ("ddp", "fsdp2")}
    fresh_process()
    accelerator = Accelerator(cpu=True)
    found["one, m 2"] = every_method(accelerator, MICRO_BATCH)
    found["one, m 4"] = every_method(accelerator, 2 * MICRO_BATCH, interleaved=True)
    return found


def entries(results, launch, method, accumulation):
    start = f"{method} {accumulation} "
    tensors = {
        name.removeprefix(start): value
        for name, value in results[launch].items()
        if name.startswith(start)
    }
    return tensors, *(tensors.pop(key).item() for key in ("collectives", "sharded", "views"))


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_ddp_equals_one_process_with_the_same_micro_batches_in_one_exchange(
    results, method, accumulation
):
    expected, *_ = entries(results, "one, m 2", method, accumulation)
    weights, collectives, _, views = entries(results, "ddp", method, accumulation)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)
    assert collectives == 1  # the all-reduce of the descent passes; in the ascent passes, none
    assert views  # gradients in DDP's buckets: no copy of them


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_equals_one_process_with_micro_batches_of_all_processes_together(
    results, method, accumulation
):
    expected, *_ = entries(results, "one, m 4", method, accumulation)
    weights, _, sharded, _ = entries(results, "fsdp2", method, accumulation)
    assert sharded
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)


def test_micro_batches_matter_here(results):
    """Else the two tests above could not fail."""
    for method in METHODS[1:]:
        two, four = (entries(results, launch, method, 1)[0] for launch in ("one, m 2", "one, m 4"))
        assert max((two[name] - four[name]).abs().max() for name in two) > 1e-3
