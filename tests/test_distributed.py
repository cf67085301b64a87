"""Two gloo processes against one: the same weights, and no more communication than there has to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from updates import METHODS

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What updates.py writes, by name of the launch."""
    folder = tmp_path_factory.mktemp("updates")
    launches = {"one, m 2": (1, 2, []), "one, m 4": (1, 4, ["interleaved"])}
    launches |= {"ddp": (2, 2, []), "fsdp2": (2, 2, ["fsdp2"])}
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(TESTS.parent)}
    found = {}
    for name, (processes, m, flags) in launches.items():
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = [str(TESTS / "updates.py"), str(m), str(folder / name), *flags]
        command = [sys.executable, *(launch if processes > 1 else []), *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        found[name] = load_file(folder / name)
    return found


def entries(results, launch, method, accumulation):
    start = f"{method} {accumulation} "
    tensors = {name.removeprefix(start): value for name, value in results[launch].items() if name.startswith(start)}
    return tensors, tensors.pop("collectives").item(), tensors.pop("sharded").item()


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_ddp_equals_one_process_with_the_same_micro_batches_in_one_exchange(results, method, accumulation):
    expected, _, _ = entries(results, "one, m 2", method, accumulation)
    weights, collectives, _ = entries(results, "ddp", method, accumulation)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)
    assert collectives == 1  # the all-reduce of the descent passes; in the ascent passes, none


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_fsdp2_equals_one_process_with_micro_batches_of_all_processes_together(results, method, accumulation):
    expected, _, _ = entries(results, "one, m 4", method, accumulation)
    weights, _, sharded = entries(results, "fsdp2", method, accumulation)
    assert sharded
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-9)


def test_micro_batches_matter_here(results):
    """Else the two tests above could not fail."""
    for method in METHODS[1:]:
        two, four = (entries(results, launch, method, 1)[0] for launch in ("one, m 2", "one, m 4"))
        assert max((two[name] - four[name]).abs().max() for name in two) > 1e-3
