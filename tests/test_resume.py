"""Runs that are killed and resumed: the same weights in the end, or one clear message."""

import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock
from helpers import (
    ROOT,
    TORCHRUN,
    assert_same_run,
    final_weights,
    finish,
    in_process,
    metrics,
    recipe,
    short_run,
    start,
    updates_saved,
    wait_for,
    write_folder,
)

from common import checkpoints, loop, report, run
from common.errors import InputError
from common.settings import FREE_ON_RESUME

# ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch."""
    return write_folder(tmp_path_factory.mktemp("images"), images=8)


FORKS = multiprocessing.get_context("forkserver")  # of a process that has started no threads
FORKS.set_forkserver_preload(["train_imagenet"])


def train_apart(recipe, output, *flags):
    torch.set_num_threads(1)
    in_process(recipe, output, *flags)


def apart(function, *args):
    """Start it in a process of its own; a process that is killed leaves nothing but files."""
    process = FORKS.Process(target=function, args=args)
    process.start()
    return process


def finished(process):
    process.join(120)
    return process.exitcode == 0


@pytest.mark.slow
def test_killed_ten_times_and_resumed_equals_the_uninterrupted_run(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=8)
    assert finished(apart(train_apart, path, tmp_path / "whole"))
    output, rng = tmp_path / "killed", random.Random(0)
    for kill in range(10):
        process = apart(train_apart, path, output, "--resume", "auto")
        before, deadline = updates_saved(output), time.monotonic() + 60
        while updates_saved(output) <= before and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.08))  # into the next step, or the writing of its checkpoint
        process.kill()
        process.join()
        assert before < updates_saved(output) < 32, f"kill {kill} came too early or too late"
    assert finished(apart(train_apart, path, output, "--resume", "auto"))
    assert_same_run(tmp_path / "whole", output)


def die_while_writing(file, recipe, output):
    """Be killed half-way through the third checkpoint's ``file``."""
    torch_save, write_text, seen = torch.save, Path.write_text, []

    def die(target):
        if Path(target).name == file:
            seen.append(target)
        if len(seen) == 3:
            Path(target).write_bytes(b"half of")
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = lambda value, target, *args, **kwargs: die(target) or torch_save(value, target)
    Path.write_text = lambda target, text: die(target) or write_text(target, text)
    train_apart(recipe, output)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["optimizer.bin", "random_states_0.pkl", "progress.json"])
def test_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, images, file):
    path, output = recipe(tmp_path, images, workers=0, epochs=2), tmp_path / "run"
    assert finished(apart(train_apart, path, tmp_path / "whole"))
    process = apart(die_while_writing, file, path, output)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert updates_saved(output) == 2
    assert finished(apart(train_apart, path, output, "--resume", "auto"))
    assert_same_run(tmp_path / "whole", output)


@pytest.mark.slow
def test_killed_stream_resumes_where_it_was(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=2, streaming=True, train_num_samples=16)
    assert finished(apart(train_apart, path, tmp_path / "whole"))
    apart(die_while_writing, "optimizer.bin", path, tmp_path / "run").join()
    assert updates_saved(tmp_path / "run") == 2
    assert finished(apart(train_apart, path, tmp_path / "run", "--resume", "auto"))
    assert_same_run(tmp_path / "whole", tmp_path / "run")


# Another value of each setting that may change when a run is resumed. Left out are those that
# change what is drawn and rounded (docs/training.md says so), or need a package or a login.
LEFT_OUT = {"channels_last", "torchcompile", "log_with", "push_to_hub"}
CHANGED = {
    "workers": "--workers 1",
    "checkpoint_interval": "--checkpoint-interval 3",
    "checkpoint_hist": "--checkpoint-hist 1",
    "save_interval": "--save-interval 1",
    "output": "",
}


@pytest.fixture(scope="module")
def accumulating(tmp_path_factory, images):
    """The recipe and folder of a run that accumulates, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("accumulating")
    return short_run(folder, images, device_batch_size=2, checkpoint_hist=9)


@pytest.mark.slow
@pytest.mark.parametrize("key", sorted({*FREE_ON_RESUME} - LEFT_OUT))
def test_run_that_accumulates_resumes_at_the_same_image(tmp_path, accumulating, key):
    path, whole = accumulating
    shutil.copytree(whole, tmp_path / "resumed")
    for late in range(3, 9):
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / f"step-{late:08d}")
    in_process(path, tmp_path / "resumed", "--resume", "auto", *CHANGED[key].split())
    assert_same_run(whole, tmp_path / "resumed")


def die_while_evaluating(recipe, output):
    """Be killed in the evaluation of the second epoch."""
    evaluate, seen = run.evaluate_top1, []

    def die(*args):
        seen.append(args)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return evaluate(*args)

    run.evaluate_top1 = die
    train_apart(recipe, output)


@pytest.mark.slow
def test_kill_while_evaluating_costs_no_training(tmp_path, images, monkeypatch):
    path, output = (
        recipe(tmp_path, images, workers=0, epochs=2, checkpoint_interval=None),
        tmp_path / "run",
    )
    assert finished(apart(train_apart, path, tmp_path / "whole"))
    apart(die_while_evaluating, path, output).join()
    assert updates_saved(output) == 8
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 1
    monkeypatch.setattr(loop, "update", None)
    in_process(path, output, "--resume", "auto")
    assert_same_run(tmp_path / "whole", output)


@pytest.fixture(scope="module")
def whole_run_with_workers(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("workers")
    path = recipe(
        folder, images, epochs=8, checkpoint_interval=None
    )  # no checkpoint but a signal's and an epoch's
    finish(start(path, folder / "whole"))
    return path, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("how, code", [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_terminated_run_saves_exits_cleanly_and_resumes_with_loader_workers(
    tmp_path, whole_run_with_workers, how, code
):
    path, whole = whole_run_with_workers
    process = start(path, tmp_path / "run")
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000004", process)
    os.killpg(process.pid, how)  # schedulers and terminals send it to loader workers too
    out, err = process.communicate(timeout=300)
    assert process.returncode == code and "Traceback" not in err, err
    assert f"stopped by {how.name} after update" in out
    assert updates_saved(tmp_path / "run") < 32
    assert "resuming from" in finish(start(path, tmp_path / "run", "--resume", "auto"))
    assert_same_run(whole, tmp_path / "run")


@pytest.fixture(scope="module")
def whole_run_of_two(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("two")
    path = recipe(
        folder, images, epochs=8, method="obf", model="test_resnet", model_kwargs={}, img_size=32
    )
    finish(start(path, folder / "whole", processes=2))
    return path, folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_two_processes_killed_or_terminated_resume_to_the_same_weights(
    tmp_path, whole_run_of_two, how
):
    path, whole = whole_run_of_two
    process = start(path, tmp_path / "run", processes=2)
    wait_for(tmp_path / "run" / "checkpoints" / "step-00000005", process)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for pid in workers if how == signal.SIGKILL else [process.pid]:  # torchrun passes SIGTERM on
        os.kill(int(pid), how)
    process.communicate(timeout=180)
    assert 5 <= updates_saved(tmp_path / "run") < 32
    finish(start(path, tmp_path / "run", "--resume", "auto", processes=2))
    found, expected = final_weights(tmp_path / "run"), final_weights(whole)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    for line, other in zip(metrics(tmp_path / "run"), metrics(whole), strict=True):
        assert line == pytest.approx(other, rel=1e-5)


@pytest.mark.slow
def test_oldest_checkpoints_are_removed_and_the_best_model_kept(tmp_path, images):
    in_process(recipe(tmp_path, images, workers=0, checkpoint_hist=3), tmp_path / "run")
    names = sorted(file.name for file in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["step-00000010", "step-00000011", "step-00000012"]
    assert sorted(file.name for file in (tmp_path / "run" / "best").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.slow
def test_resuming_a_finished_run_trains_no_more_and_says_so(tmp_path, images, capsys):
    path = recipe(tmp_path, images, workers=0)
    first = in_process(path, tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert in_process(path, tmp_path / "run", "--resume", str(tmp_path / "run")) == first
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    said = "all 3 epochs are trained, so the models are only evaluated again"
    assert said in capsys.readouterr().out


@pytest.mark.slow
def test_a_resumed_run_says_how_far_it_is(tmp_path, images, capsys):
    path, first = short_run(tmp_path, images)
    for step, words in ((7, "1 of 2 epochs and 3 of 4 updates are trained"), (8, "all 2 epochs")):
        checkpoint = first / "checkpoints" / f"step-{step:08d}"
        in_process(path, tmp_path / str(step), "--resume", str(checkpoint))
        printed = capsys.readouterr()
        assert words in printed.out
        assert "8/8 updates" in printed.err


def test_another_run_s_checkpoint_brings_its_training_but_not_its_models_and_metrics(
    tmp_path, images
):
    path, first = short_run(tmp_path, images)
    other = tmp_path / "other"
    results = in_process(path, other, "--resume", str(first / "checkpoints" / "step-00000007"))
    assert results == json.loads((first / "results.json").read_text())["last"]
    assert metrics(other) == metrics(first)[1:]
    assert (other / "best/model.safetensors").read_bytes() == (
        other / "last/model.safetensors"
    ).read_bytes()
    assert sorted(os.listdir(other / "checkpoints")) == ["step-00000007", "step-00000008"]
    shutil.rmtree(first)
    assert in_process(path, other, "--resume", "auto") == results
    assert len((other / "metrics.jsonl").read_text().splitlines()) == 1


def die_in_training(monkeypatch, recipe, output, *flags):
    """Go on with a run that is killed before its first update."""
    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", None)
        with pytest.raises(TypeError):
            in_process(recipe, output, *flags)


def test_going_on_from_an_older_checkpoint_removes_the_newer_ones_and_the_results(
    tmp_path, images, monkeypatch, capsys
):
    path, whole = short_run(tmp_path, images)
    output = shutil.copytree(whole, tmp_path / "again")
    (output / "checkpoints" / "step-00000009").mkdir()  # what a kill left of one is none
    die_in_training(
        monkeypatch, path, output, "--resume", str(output / "checkpoints" / "step-00000007")
    )
    assert "goes on from before: checkpoints/step-00000008\n" in capsys.readouterr().out
    assert updates_saved(output) == 7 and not (output / "results.json").exists()
    (output / "checkpoints" / "step-00000008").mkdir()  # a kill while it was removed
    (output / "checkpoints" / "step-00000008" / "optimizer.bin").write_bytes(b"")
    in_process(path, output, "--resume", "auto")
    printed = capsys.readouterr().out
    assert "removed" not in printed and "1 of 2 epochs and 3 of 4 updates are trained" in printed
    assert_same_run(whole, output)
    assert updates_saved(output) == 8


def test_going_on_from_an_older_checkpoint_leaves_no_model_of_the_training_after_it(
    tmp_path, images, monkeypatch, capsys
):
    path, output = short_run(tmp_path, images, save_interval=1)
    first, second = report.metrics_rows(output)
    rows = [first, second | {"validation": 0.99}]  # so best/ is of the second epoch
    run.write_metrics(output, rows)
    older = str(output / "checkpoints" / "step-00000007")
    kept = (output / "epochs" / "0001" / "model.safetensors").read_bytes()
    die_in_training(monkeypatch, path, output, "--resume", older)
    said = "checkpoints/step-00000008, epochs/0002, best"
    assert f"since training goes on from before: {said}\n" in capsys.readouterr().out
    assert not (output / "best").exists() and os.listdir(output / "epochs") == ["0001"]
    in_process(path, output, "--resume", "auto")
    assert "run/best is gone: it begins anew with epoch 2\n" in capsys.readouterr().out
    assert (output / "epochs" / "0001" / "model.safetensors").read_bytes() == kept
    results = json.loads((output / "results.json").read_text())
    assert results["best"] == results["last"] and report.metrics_rows(output)[0] == first


@pytest.mark.parametrize("place", ["relative", "link"])
def test_a_runs_own_checkpoint_is_known_whatever_its_path(tmp_path, images, monkeypatch, place):
    path, whole = short_run(tmp_path, images)
    output = shutil.copytree(whole, tmp_path / "again")
    checkpoint = output / "checkpoints" / "step-00000007"
    flags = {"relative": ("../..", "."), "link": (output, output / "good")}[place]
    if place == "relative":
        monkeypatch.chdir(checkpoint)
    else:
        (output / "good").symlink_to(checkpoint)
    die_in_training(monkeypatch, path, Path(flags[0]), "--resume", str(flags[1]))
    assert metrics(output) == metrics(whole)[:1] and updates_saved(output) == 7
    monkeypatch.chdir(tmp_path)
    in_process(path, output, "--resume", "auto")
    assert_same_run(whole, output)


def test_a_copy_of_a_checkpoint_is_no_reason_to_remove_the_run_or_the_copy(
    tmp_path, images, monkeypatch
):
    path, whole = short_run(tmp_path, images)
    output = shutil.copytree(whole, tmp_path / "again")
    older = output / "checkpoints" / "step-00000007"
    shutil.copytree(older, output / "backup" / "step-00000007")
    with pytest.raises(InputError, match="again exists: continue that run with --resume auto"):
        in_process(path, output, "--resume", str(output / "backup" / "step-00000007"))
    assert_same_run(whole, output)
    copy = older.rename(older.with_name("step-00000007-good"))
    die_in_training(monkeypatch, path, output, "--resume", str(copy))
    assert os.listdir(copy.parent) == [copy.name]
    in_process(path, output, "--resume", str(copy))
    assert_same_run(whole, output)


def test_results_are_no_longer_there_once_a_run_trains_again(tmp_path, images, monkeypatch):
    """Whoever removes its newest checkpoint; a sweep would take the run for finished."""
    path, whole = short_run(tmp_path, images)
    output = shutil.copytree(whole, tmp_path / "again")
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    die_in_training(monkeypatch, path, output, "--resume", "auto")
    assert not (output / "results.json").exists()


def test_a_line_of_metrics_that_a_kill_cut_off_is_written_again(tmp_path, images, monkeypatch):
    path, whole = short_run(tmp_path, images)
    output = shutil.copytree(whole, tmp_path / "again")
    first, second = (whole / "metrics.jsonl").read_text().splitlines()
    for part in (second[:20], second[:-1], ""):
        (output / "metrics.jsonl").write_text(f"{first}\n{part}")
        in_process(path, output, "--resume", "auto")
        assert_same_run(whole, output)


@pytest.mark.slow
def test_run_whose_checkpoints_were_removed_is_not_trained_anew_unasked(
    tmp_path, images, monkeypatch
):
    path, output = short_run(tmp_path, images, save_interval=1)
    shutil.rmtree(output / "checkpoints")
    for missing in ("results.json", "last"):  # finished, or not yet
        with pytest.raises(
            InputError,
            match=r"has .*best, epochs of an earlier run, but no checkpoint .* --overwrite",
        ):
            in_process(path, output, "--resume", "auto")
        (shutil.rmtree if (output / missing).is_dir() else os.remove)(output / missing)
    (output / "results.json").write_text("of an earlier run")
    monkeypatch.setattr(run, "finish", lambda job: {})
    in_process(path, output, "--overwrite")
    assert not (output / "results.json").exists()


def test_finished_run_whose_best_model_was_removed_says_so(tmp_path, images):
    path, output = short_run(tmp_path, images)
    lines = [
        json.loads(line)["validation"]
        for line in (output / "metrics.jsonl").read_text().splitlines()
    ]
    shutil.rmtree(output / "best")
    if lines[1] > lines[0]:  # then the last epoch's evaluation, repeated, saves it again
        assert in_process(path, output, "--resume", "auto")
    else:
        with pytest.raises(InputError, match="run/best was removed since this run saved it"):
            in_process(path, output, "--resume", "auto")


ONLY_THE_MAIN_PROCESS_FAILS = """
import os, shutil, sys
sys.path.insert(0, os.getcwd())
import train_imagenet
from common import checkpoints, errors

def fail(*_):
    raise errors.InputError("the Hub is down")

full = shutil.disk_usage("/")._replace(free=1000)
if os.environ["RANK"] == "0" and sys.argv[1] == "disk":
    shutil.disk_usage = lambda path: full
fails = os.environ["RANK"] == "0" and sys.argv[1] == "hub"
checkpoints.check_hub = fail if fails else lambda repo: None
with errors.clear_errors():
    train_imagenet.main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "what, words", [("disk", "the disk is full. It needs"), ("hub", "the Hub is down")]
)
def test_all_processes_end_with_the_main_one_s_error(tmp_path, images, what, words):
    (tmp_path / "script.py").write_text(ONLY_THE_MAIN_PROCESS_FAILS)
    launch = [*TORCHRUN, "2"]
    launch += [
        "--log-dir", str(tmp_path / "logs"), "--redirects", "3", str(tmp_path / "script.py"),
        what,
    ]  # fmt: skip
    path = recipe(tmp_path, images, workers=0, push_to_hub="me/model")
    launch += ["--recipe", str(path), "--output", str(tmp_path / "run")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    subprocess.run(launch, cwd=ROOT, env=environment, capture_output=True, timeout=300)
    errors = [file.read_text() for file in tmp_path.glob("logs/**/stderr.log")]
    assert len(errors) == 2
    assert all(words in error and "another process" not in error for error in errors), errors


@pytest.mark.slow
def test_resume_auto_without_a_checkpoint_starts(tmp_path, images):
    assert in_process(recipe(tmp_path, images, workers=0), tmp_path / "run", "--resume", "auto")


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, words",
    [
        (
            ("--model", "test_resnet", "--model-kwargs", "--img-size", "32"),
            "is of a run with .*img_size 160.* 32",
        ),
        (
            ("--rho", "0.3"),
            "is of a run with rho 0.1, and this one has 0.3: resume with the same settings",
        ),
        (("--seed", "5"), "seed"),
        (("--lr", "0.06"), "is of a run with lr 0.05, and this one has 0.06"),
        (("--batch-size", "8"), "is of a run with batch_size 4, and this one has 8"),
        (("--epochs", "3"), "is of a run with epochs 2, and this one has 3"),
    ],
)
def test_checkpoint_of_other_settings_is_refused_and_kept(tmp_path, images, flags, words):
    path, output = short_run(tmp_path, images)
    with pytest.raises(InputError, match=words):
        in_process(path, output, "--resume", "auto", *flags)
    assert updates_saved(output) == 8


@pytest.mark.slow
def test_resumed_run_on_fewer_processes_keeps_the_m_that_nobody_gave(tmp_path, images):
    path = recipe(tmp_path, images, workers=0, epochs=2, m=None, batch_size=8)
    finish(start(path, tmp_path / "run", processes=2))
    with pytest.raises(
        InputError,
        match="is of a run with m 4, and this one has 8: resume with --m 4, or start anew",
    ):
        in_process(path, tmp_path / "run", "--resume", "auto")
    in_process(path, tmp_path / "run", "--resume", "auto", "--m", "4")


@pytest.mark.parametrize(
    "names, words",
    [
        (("cat", "dog", "emu"), "is of a run with number of classes 2, and this one has 3"),
        (("cat", "wolf"), "is of a run with class 1 'dog', and this one has 'wolf'"),
        (("dog", "cub"), "is of a run with class 0 'cat', and this one has 'cub'"),
    ],
)
def test_checkpoint_of_other_classes_is_refused(tmp_path, images, names, words):
    """Also of classes that were renamed, or whose order another name changes."""
    path, output = short_run(tmp_path, images)
    other = write_folder(tmp_path / "other", classes=names, images=8)
    whole, moved = shutil.move(images, tmp_path / "whole"), shutil.copytree(other, images)
    try:
        with pytest.raises(InputError, match=f"{words}: give it the classes that it had"):
            in_process(path, output, "--resume", "auto")
    finally:
        shutil.rmtree(moved)
        shutil.move(whole, images)


def test_two_runs_in_one_folder_are_one_too_many(tmp_path, images, monkeypatch):
    path, output = short_run(tmp_path, images)
    before = (output / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(run, "LOCK_WAIT", 0.1)
    with FileLock(output / ".run.lock"):
        for flag in (["--resume", "auto"], ["--overwrite"]):
            with pytest.raises(InputError, match=f"another run writes into {output}: stop it"):
                in_process(path, output, *flag)
    assert (output / "metrics.jsonl").read_bytes() == before
    in_process(path, output, "--resume", "auto")  # the lock went with its holder


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["model.safetensors", "optimizer.bin", "random_states_0.pkl", "progress.json"]
)
def test_truncated_checkpoint_is_named_and_the_one_before_resumes(tmp_path, images, file):
    path, output = short_run(tmp_path, images)
    broken = output / "checkpoints" / "step-00000008" / file
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(
        InputError, match=rf"{file}.*remove .*step-00000008 to resume from the one before"
    ):
        in_process(path, output, "--resume", "auto")
    shutil.rmtree(output / "checkpoints" / "step-00000008")
    assert in_process(path, output, "--resume", "auto")


@pytest.mark.parametrize("file", ["optimizer.bin", "model.safetensors"])
def test_damaged_checkpoint_is_one_clear_error(tmp_path, images, file):
    path, output = short_run(tmp_path, images)
    broken = output / "checkpoints" / "step-00000008" / file
    broken.write_bytes(b"?" * broken.stat().st_size)
    with pytest.raises(InputError, match=r"cannot load the checkpoint .*step-00000008"):
        in_process(path, output, "--resume", "auto")


def test_checkpoint_that_would_run_code_is_refused(tmp_path, images):
    path, output = short_run(tmp_path, images)

    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    folder = output / "checkpoints" / "step-00000008"
    torch.save({"state": Bomb()}, folder / "optimizer.bin")
    record = json.loads((folder / "progress.json").read_text())
    record["files"]["optimizer.bin"] = (folder / "optimizer.bin").stat().st_size
    (folder / "progress.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="cannot load the checkpoint"):
        in_process(path, output, "--resume", "auto")
    assert not (tmp_path / "exploded").exists()


def test_checkpoint_of_a_newer_format_says_so(tmp_path, images):
    path, output = short_run(tmp_path, images)
    file = output / "checkpoints" / "step-00000008" / "progress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(InputError, match="has format 99, newer than 2: update"):
        in_process(path, output, "--resume", "auto")


def test_a_setting_that_a_checkpoint_lacks_differs(tmp_path):
    saved = {"format": 2, "progress": {"updates": 3}, "settings": {"lr": 0.1}, "files": {}}
    (tmp_path / "progress.json").write_text(json.dumps(saved))
    assert checkpoints.read(tmp_path, {"lr": 0.1, "m": None}) == {"updates": 3}
    with pytest.raises(InputError, match=r"is of a run with rho None, and this one has 0\.2"):
        checkpoints.read(tmp_path, {"lr": 0.1, "rho": 0.2})


def test_a_runs_folder_stands_for_its_newest_checkpoint(tmp_path):
    for step in (7, 12, 9):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08d}" / "progress.json").touch()
    newest = tmp_path / "checkpoints" / "step-00000012"
    for folder in (tmp_path, newest.parent, newest):
        assert checkpoints.find(str(folder), tmp_path / "elsewhere") == newest
    assert checkpoints.find("auto", newest.parent) == newest


def test_resume_from_a_folder_without_checkpoints(tmp_path, images):
    with pytest.raises(InputError, match="there is no checkpoint in /nowhere"):
        in_process(recipe(tmp_path, images), tmp_path / "run", "--resume", "/nowhere")


def train_with_a_full_disk(recipe, output, message):
    """From the third checkpoint on, no file can grow beyond 50 kB."""
    save_state, calls, unlimited = Accelerator.save_state, [], resource.RLIM_INFINITY

    def save_with_a_full_disk(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, unlimited))
        return save_state(self, *args, **kwargs)

    Accelerator.save_state = save_with_a_full_disk
    try:
        train_apart(recipe, output)
    except InputError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
        message.write_text(str(error))


@pytest.mark.slow
def test_disk_that_fills_up_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, images):
    path, output, message = (
        recipe(tmp_path, images, workers=0, epochs=2),
        tmp_path / "run",
        tmp_path / "message",
    )
    assert finished(apart(train_with_a_full_disk, path, output, message))
    assert re.search(r"cannot write .* It needs \d+\.\d MiB, .* are free", message.read_text())
    assert sorted(os.listdir(output / "checkpoints")) == ["step-00000001", "step-00000002"]
    assert in_process(path, output, "--resume", "auto")


def test_full_disk_is_noticed_before_writing(tmp_path, images, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"the disk is full\. It needs [1-9]"):
        in_process(recipe(tmp_path, images, workers=0), tmp_path / "run")
