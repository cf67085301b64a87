"""What stops a run: signals, and a loss that is not finite."""

import json
import math
import signal
from argparse import Namespace

import pytest
import torch
from accelerate import Accelerator
from helpers import (
    assert_same_run,
    final_weights,
    in_process,
    recipe,
    updates_saved,
    write_folder,
)

from common import loop, monitor, run
from common.errors import InputError


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


def test_the_first_ctrl_c_is_noted_and_the_second_ends_at_once():
    previous = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a shell's background jobs ignore Ctrl-C
    parts = {"args": Namespace(epochs=1), "batches": Namespace(updates=1)}
    job = Namespace(accelerator=Accelerator(cpu=True), **parts)
    outlived = 0
    with pytest.raises(KeyboardInterrupt), monitor.Monitor(job, run.Progress()):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            outlived += 1
    assert outlived == 1
    assert signal.signal(signal.SIGINT, previous) is signal.default_int_handler


@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_in_the_last_epochs_evaluation_stops_the_run_which_goes_on(
    tmp_path, images, monkeypatch, capsys, how, code
):
    """Or a sweep would begin its next run, and never stop."""
    path, validate, seen = recipe(tmp_path, images, workers=0, epochs=2), run.validate, []

    def interrupted(job, progress):
        seen.append(progress.epoch)
        if progress.epoch == 1:
            signal.raise_signal(how)
        return validate(job, progress)

    in_process(path, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(run, "validate", interrupted)
        in_process(path, tmp_path / "run")
    assert stopped.value.code == code and seen == [0, 1]
    assert f"stopped by {how.name} after update 8; go on" in capsys.readouterr().out
    assert not (tmp_path / "run" / "results.json").exists()
    in_process(path, tmp_path / "run", "--resume", "auto")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_updates_without_a_finite_loss_count_in_a_row():
    parts = {"args": Namespace(epochs=1, checkpoint_interval=None), "batches": Namespace(updates=9)}
    job = Namespace(accelerator=Accelerator(cpu=True), **parts)
    with monitor.Monitor(job, run.Progress()) as watch:
        watch.interval = 100
        counts = []
        for loss in (math.nan, math.inf, 1.0, math.nan):
            watch.after_update(torch.tensor(loss))
            counts.append(watch.bad.item())
    assert counts == [1, 2, 0, 1]


def test_loss_that_stays_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=8, lr=1e30, rho_min=None, warmup_epochs=0)
    with pytest.raises(
        InputError,
        match=r"has not been finite since update [23]:|weights are not finite after update",
    ):
        in_process(path, tmp_path / "run")
    assert updates_saved(tmp_path / "run") in (1, 2)
    assert all(tensor.isfinite().all() for tensor in final_weights(tmp_path / "run").values())


def test_loss_that_is_nan_in_a_short_run_saves_no_model(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=1, lr=1e30, rho_min=None, warmup_epochs=0)
    with pytest.raises(
        InputError,
        match=r"has not been finite since update [23]:|weights are not finite after update",
    ):
        in_process(path, tmp_path / "run")
    assert not (tmp_path / "run" / "best").exists() and not (tmp_path / "run" / "last").exists()
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("bad", [1, 4])
def test_nan_loss_of_finite_weights_is_null_in_the_metrics_and_for_a_whole_epoch_an_error(
    tmp_path, images, monkeypatch, bad
):
    update, seen = loop.update, []

    def sometimes_nan(*args, **kwargs):
        seen.append(update(*args, **kwargs))
        return torch.tensor(float("nan")) if len(seen) <= bad else seen[-1]

    monkeypatch.setattr(loop, "update", sometimes_nan)
    path = recipe(tmp_path, images, workers=0, epochs=1, warmup_epochs=0)
    if bad == 4:
        with pytest.raises(InputError, match="has not been finite since update 1:"):
            in_process(path, tmp_path / "run")
        return
    in_process(path, tmp_path / "run")
    assert (
        json.loads((tmp_path / "run" / "metrics.jsonl").read_text(), parse_constant=pytest.fail)[
            "loss"
        ]
        is None
    )


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("rho, warned", [(50.0, True), (0.05, False)])
def test_a_rho_that_destroys_training_is_said_once(tmp_path, images, capsys, loss, rho, warned):
    """Guessing has log 2 by cross-entropy, and twice that by binary ones."""
    changes = {"method": "sam", "rho": rho, "rho_min": None, "loss": loss, "workers": 0}
    in_process(recipe(tmp_path, images, epochs=2, **changes), tmp_path / "run")
    out = capsys.readouterr().out
    guessing = {"ce": "0.6931", "bce": "1.386"}[loss]
    line = f"and guessing has {guessing}: lr 0.05 or rho {rho} may be too high"
    assert out.count("warning: the loss of the first epoch is") == out.count(line) == warned
