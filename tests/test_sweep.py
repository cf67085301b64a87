"""sweep.py: every run once, whatever dies, and tables that say what was measured."""

import argparse
import csv
import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optuna
import pytest
import yaml
from optuna.trial import TrialState
from test_data import write_folder

import sweep
from common.settings import InputError

ROOT = Path(__file__).parent.parent
GRID = {"method": ["sam", "obf"], "lr": [0.01, 0.02], "seed": [0, 1]}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(sweep, "HEARTBEAT", 1)
    monkeypatch.setattr(sweep, "GRACE", 3)


def write_sweep(tmp_path, *grids, **keys):
    settings = {
        "dataset": str(tmp_path / "images"),
        "model": "test_resnet",
        "img_size": 32,
        "batch_size": 4,
        "epochs": 1,
    }
    settings |= {"workers": 0, "crop_pct": 1.0}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"settings": settings, "grids": list(grids), **keys}))
    return [str(path), "--output", str(tmp_path / "out")]


def faked(monkeypatch, results=None):
    """Replace training: a list of the settings it is called with; ``results`` gives what it returns."""
    calls = []

    def train(argv):
        calls.append({key: argv[argv.index(f"--{key}") + 1] if f"--{key}" in argv else None for key in ("output",)})
        point = dict(part.split("=") for part in Path(calls[-1]["output"]).name.split(","))
        calls[-1] = point
        return (results or (lambda point: {"validation": 0.5, "test": 0.5}))(point)

    import train_imagenet

    monkeypatch.setattr(train_imagenet, "main", train)
    return calls


def table(tmp_path):
    return list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))


def study(tmp_path):
    return optuna.load_study(study_name="out", storage=f"sqlite:///{tmp_path / 'out' / 'sweep.db'}")


def test_every_point_is_trained_and_tabulated(tmp_path, capsys):
    write_folder(tmp_path / "images", splits=("train", "validation", "test"), images=4)
    sweep.main(write_sweep(tmp_path, {"method": ["sam", "base"], "seed": [0, 1]}))
    rows = table(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [("sam", "0"), ("sam", "1"), ("base", "0"), ("base", "1")]
    for row in rows:
        results = json.loads((Path(row["run"]) / "results.json").read_text())["last"]
        assert {key: float(row[key]) for key in results} == results
        saved = yaml.safe_load((Path(row["run"]) / "settings.yaml").read_text())
        assert (saved["method"], saved["seed"]) == (row["method"], int(row["seed"]))
    printed = capsys.readouterr().out
    for method in ("sam", "base"):
        values = [100 * float(row["test"]) for row in rows if row["method"] == method]
        assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in printed


def test_two_processes_train_each_run_together(tmp_path):
    write_folder(tmp_path / "images", splits=("train", "validation", "test"), images=4)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "sweep.py"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    command = [*launch, *write_sweep(tmp_path, {"method": ["obf", "sam"]})]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(table(tmp_path)) == len(list((tmp_path / "out" / "runs").iterdir())) == 2
    assert done.stdout.count("written:") == 1


def test_finished_runs_are_never_repeated_and_a_grid_may_grow(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1]}))
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1]}))
    assert [point["seed"] for point in calls] == ["0", "1"]
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["0", "1", "2"]
    assert len(table(tmp_path)) == 3


def test_what_is_chosen_on_validation_is_reported_on_test(tmp_path, monkeypatch, capsys):
    # Validation prefers lr 0.02 for sam and 0.01 for obf; test would prefer the opposite.
    def results(point):
        right = (point["method"] == "sam") == (point["lr"] == "0.02")
        return {"validation": 0.9 if right else 0.8, "test": (0.3 if right else 0.6) + 0.02 * int(point["seed"])}

    faked(monkeypatch, results)
    write_folder(tmp_path / "images", splits=("train", "validation"))
    sweep.main(write_sweep(tmp_path, GRID, choose=["lr"]))
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| method")]
    assert len(printed) == 2
    for line, best in zip(printed, ("lr=0.02", "lr=0.01")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [best, "2", "2", "90.00 ± 0.00", "31.00 ± 1.41"]


def test_without_validation_images_nothing_is_chosen(tmp_path, monkeypatch, capsys):
    calls = faked(monkeypatch, lambda point: {"test": 0.25})
    write_folder(tmp_path / "images", splits=("train", "test"))
    with pytest.raises(InputError, match="no validation images to choose on: give --validation-share"):
        sweep.main(write_sweep(tmp_path, GRID, choose=["lr"]))
    assert calls == []
    sweep.main(write_sweep(tmp_path, GRID))
    assert re.search(r"lr=0\.01,method=sam +\| 2 +\| 25\.00 ± 0\.00", capsys.readouterr().out)


def test_random_points_are_the_same_again_and_within_their_ranges(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    axes = {"lr": {"low": 1e-3, "high": 1e-1, "log": True}, "weight_decay": {"low": 0, "high": 1e-2}, "m": [1, 2]}
    sweep.main([*write_sweep(tmp_path, axes), "--trials", "40"])
    sweep.main([*write_sweep(tmp_path, axes), "--trials", "40"])
    assert len(calls) == 40
    rates = np.array([float(point["lr"]) for point in calls])
    assert 1e-3 <= rates.min() < 2e-3 and 5e-2 < rates.max() <= 1e-1
    assert 0.25 < np.mean(rates < 1e-2) < 0.75  # uniform in the logarithm
    assert {point["m"] for point in calls} == {"1", "2"}


def test_a_failed_run_is_said_does_not_stop_the_others_and_is_tried_again(tmp_path, monkeypatch, capsys):
    def fail(point):
        if point["seed"] == "1":
            raise InputError("the loss has not been finite")
        return {"validation": 0.5}

    calls = faked(monkeypatch, fail)
    with pytest.raises(InputError, match="1 of 3 runs failed"):
        sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert "failed: seed=1: the loss has not been finite" in capsys.readouterr().out
    assert [row["seed"] for row in table(tmp_path)] == ["0", "2"]
    monkeypatch.undo()
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["1"]


def test_sigterm_leaves_the_run_to_the_next_worker_at_once(tmp_path, monkeypatch):
    def stop(point):
        raise SystemExit

    faked(monkeypatch, stop)
    with pytest.raises(SystemExit):
        sweep.main(write_sweep(tmp_path, {"seed": [0]}))
    assert [trial.state for trial in study(tmp_path).trials] == [TrialState.FAIL]
    monkeypatch.undo()
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0]}))
    assert len(calls) == 1


def start(tmp_path, grace=3):
    """A worker in a process of its own, whose runs take a second or two and leave a line in ``calls.txt``."""
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
import sweep, train_imagenet
sweep.HEARTBEAT, sweep.GRACE = 1, {grace}
def train(argv):
    name = argv[argv.index("--output") + 1].rsplit("/", 1)[1]
    with open({str(tmp_path / "calls.txt")!r}, "a") as file:
        file.write("begin " + name + "\\n")
    time.sleep(0.7)
    with open({str(tmp_path / "calls.txt")!r}, "a") as file:
        file.write("end " + name + "\\n")
    return {{"validation": 0.5}}
train_imagenet.main = train
sweep.main(sys.argv[1:])
"""
    command = [sys.executable, "-c", code, *write_sweep(tmp_path, GRID)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def calls(tmp_path, what):
    path = tmp_path / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(" ", 1)[1] for line in lines if line.startswith(what)]


def test_two_workers_share_the_work_and_lose_nothing(tmp_path):
    workers = [start(tmp_path, grace=60), start(tmp_path, grace=60)]
    outputs = [worker.communicate(timeout=90)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    assert len(calls(tmp_path, "begin")) == len(set(calls(tmp_path, "begin"))) == 8
    assert len(table(tmp_path)) == 8
    running = most = 0
    for line in (tmp_path / "calls.txt").read_text().splitlines():
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert most == 2


def test_two_workers_never_take_the_same_run(tmp_path):
    args = argparse.Namespace(output=tmp_path / "out", storage=None)
    queue = sweep.open_study(args, {})
    for _ in range(200):
        queue.enqueue_trial({})
    code = f"""
import argparse, pathlib, sys
sys.path[:0] = [{str(ROOT)!r}]
import sweep
study = sweep.open_study(argparse.Namespace(output=pathlib.Path({str(args.output)!r}), storage=None), {{}})
print("ready", flush=True)
input()
print([study.ask().number for _ in range(100)])
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([sys.executable, "-c", code], **pipes) for _ in range(2)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 2
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    taken = [number for worker in workers for number in json.loads(worker.communicate(timeout=90)[0])]
    assert sorted(taken) == list(range(200))


@pytest.mark.parametrize("signal", ["kill", "terminate"])
def test_a_killed_sweep_does_what_is_left(tmp_path, signal):
    first = start(tmp_path)
    deadline = time.monotonic() + 60
    while len(calls(tmp_path, "begin")) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    getattr(first, signal)()
    first.wait(timeout=30)
    done, begun = calls(tmp_path, "end"), calls(tmp_path, "begin")
    assert 0 < len(done) < len(begun) < 8
    second = start(tmp_path)
    output, _ = second.communicate(timeout=90)
    assert second.returncode == 0, output
    again = calls(tmp_path, "begin")[len(begun) :]
    assert sorted(again + done) == sorted(set(again + done)) and len(again + done) == 8
    assert len(table(tmp_path)) == 8


def test_a_queue_with_a_point_twice_runs_it_once(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    flags = write_sweep(tmp_path, {"seed": [0, 1]})
    sweep.main(flags)
    for _ in range(2):  # as by two workers at once
        study(tmp_path).enqueue_trial({}, user_attrs={"point": {"seed": 2}})
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["0", "1", "2"]
    assert len(study(tmp_path).get_trials(states=[TrialState.COMPLETE])) == 3


@pytest.mark.parametrize(
    "grids, keys, message",
    [
        ([{"rhoo": [0.1]}], {}, "unknown key 'rhoo': did you mean 'rho'"),
        ([{"rho": []}], {}, r"the axis rho .* is \[\]"),
        ([{"rho": 0.1}], {}, r"the axis rho .* is 0\.1"),
        ([{"lr": {"low": 0.1}}], {}, "the axis lr"),
        ([{"lr": {"low": 0.1, "high": 0.2}}], {}, "say how many --trials"),
        ([{"method": ["sam", "obff"]}], {}, "obff"),
        ([{"m": [3]}], {}, "m 3 does not divide batch_size 4: choose one of 1, 2, 4"),
        ([], {}, "needs grids"),
        ([{"seed": [0]}], {"axes": 1}, "unknown key 'axes'"),
    ],
)
def test_bad_sweeps_are_refused_before_any_run(tmp_path, monkeypatch, grids, keys, message):
    calls = faked(monkeypatch)
    with pytest.raises(InputError, match=message):
        sweep.main(write_sweep(tmp_path, {"seed": [0]}, *grids, **keys) if grids else write_sweep(tmp_path, **keys))
    assert calls == []


def test_a_storage_of_other_settings_is_refused(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0]}))
    with pytest.raises(InputError, match=r"holds a sweep with flags \[\].*'--epochs', '2'.*another --output"):
        sweep.main([*write_sweep(tmp_path, {"seed": [0, 1]}), "--epochs", "2"])
    assert len(calls) == 1


def test_a_locked_storage_is_named(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    monkeypatch.setattr(sweep, "ATTEMPTS", 1)
    monkeypatch.setattr(sweep, "TIMEOUT", 1)
    flags = write_sweep(tmp_path, {"seed": [0]})
    sweep.main(flags)
    with sqlite3.connect(tmp_path / "out" / "sweep.db") as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(InputError, match=r"cannot use the storage sqlite:.*locked.*Finished runs are kept"):
            sweep.main(flags)
        connection.rollback()
    sweep.main(flags)
    assert len(calls) == 1


def test_a_storage_of_another_version_is_named(tmp_path, monkeypatch):
    faked(monkeypatch)
    monkeypatch.setattr(sweep, "ATTEMPTS", 1)
    flags = write_sweep(tmp_path, {"seed": [0]})
    sweep.main(flags)
    with sqlite3.connect(tmp_path / "out" / "sweep.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'v99.0.0.a'")
    with pytest.raises(InputError, match=r"cannot use the storage.*another --storage"):
        sweep.main(flags)
