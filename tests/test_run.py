"""What a whole run of a training script does with its epochs, its processes and its transforms."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_data import write_folder
from test_training import small_recipe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two_processes.py wrote, by process, and the run's folder."""
    folder = tmp_path_factory.mktemp("two")
    images = write_folder(folder / "images", images=8)
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
