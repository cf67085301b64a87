"""benchmarks/gpu.py, which takes a GPU, at its tiny size on the CPU."""

import functools
import importlib.util
import os
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import gpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def precision_of_its_own():
    """The training loop is measured in bf16, which neither later tests nor the programs that they
    start may inherit.
    """
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
def test_a_gradients_error_is_small_and_that_of_another_method_is_not(capsys, monkeypatch):
    gpu.gradients(CPU)
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == ["ok"] * 3
    exact = {name: gpu.gradient(name, CPU, None) for name in gpu.OURS}
    for one in exact:
        for other in exact:
            away = ((exact[one] - exact[other]).norm() / exact[other].norm()).item()
            assert one == other or away > max(gpu.MAX_ERROR.values()), (
                f"{one} could pass for {other}"
            )


def test_a_row_that_fails_says_so_in_a_line_and_the_others_go_on(capsys, monkeypatch):
    def broken(device, name):
        raise RuntimeError("out of\nmemory")

    def working(device):
        gpu.shown("(b) works", "1.5", "<= 1.0", fine=False)

    parts = [("a", functools.partial(broken, name="resnet50")), ("b", working), ("d", working)]
    monkeypatch.setattr(gpu, "parts_of", lambda device: parts)
    assert gpu.main(["--device", "cpu", "--rows", "a", "b"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "(a) resnet50: FAILED: RuntimeError: out of memory"
    assert lines[2].split("  ")[0] == "(b) works" and lines[2].endswith("target <= 1.0 MISSED")
    assert len(lines) == 4 and lines[3].endswith("FAILED: a")
    assert gpu.main(["--device", "cpu", "--rows", "b"]) == 0


def test_rows_without_their_packages_or_without_time_are_left_out_and_say_so(capsys, monkeypatch):
    monkeypatch.setattr(
        gpu, "parts_of", lambda device: [("a", lambda device: gpu.shown("(a)", "")), ("f", None)]
    )
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name)
    )
    assert gpu.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        lines[1]
        == "missing, so (d), (e) and (f) are left out: datasets; pip install -r requirements.txt"
    )
    assert lines[2].startswith("(a)") and len(lines) == 4
    monkeypatch.setattr(gpu, "SECONDS", 0)
    assert gpu.main(["--device", "cpu"]) == 0
    assert "left out, no time is left" in capsys.readouterr().out.splitlines()[2]


PARTS = {
    "a step by itself": gpu.no_waiting,
    "eager": functools.partial(
        gpu.step_ratios, name="test_resnet", compiled=False, micro_batches=True
    ),
    "compiled": functools.partial(
        gpu.step_ratios, name="test_resnet", compiled=True, micro_batches=False
    ),
    "the training loop": functools.partial(gpu.training_loop, name="test_resnet"),
    "killed and resumed": functools.partial(gpu.killed_and_resumed, config="cpu"),
    "accelerate launch": gpu.one_nccl_process,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_every_row_runs(name, capsys, monkeypatch):
    monkeypatch.setitem(
        gpu.SIZES, "cpu", {**gpu.SIZES["cpu"], "models": {"test_resnet": "resnet50"}, "rounds": 1}
    )
    PARTS[name](CPU)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if not line.startswith("device: ")]  # the loop says its device
    assert rows and all(row.startswith("(") for row in rows)
