"""sweep.py: every run once, whatever dies, and tables that say what was measured."""

import argparse
import csv
import gc
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.state import PartialState
from helpers import ROOT, TORCHRUN, fresh_process, write_folder

import sweep
import train_imagenet
from common import build, loaders, report, settings
from common.errors import InputError, clear_errors

GRID = {"method": ["sam", "obf"], "lr": [0.01, 0.02], "seed": [0, 1]}
FORK = multiprocessing.get_context("fork")  # workers that need not import torch anew
gc.freeze()  # what is collected after a failed run is not what torch's import left


def write_sweep(tmp_path, *grids, **keys):
    usual = {
        "dataset": str(tmp_path / "images"),
        "model": "test_resnet",
        "img_size": 32,
        "batch_size": 4,
        "epochs": 1,
    }
    usual |= {"workers": 0, "crop_pct": 1.0}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"settings": usual, "grids": list(grids), **keys}))
    return [str(path), "--output", str(tmp_path / "out")]


def end_run(argv, results, script=train_imagenet):
    """Write what a run with these flags leaves: its settings and its results."""
    args = settings.parse(script.parser(), argv)
    _, _, args.m = loaders.split_batch(args, PartialState().num_processes)
    run = Path(args.output)
    run.mkdir(parents=True, exist_ok=True)
    (run / "settings.yaml").write_text(yaml.safe_dump(settings.resolved(args)))
    (run / "results.json").write_text(json.dumps({"last": results}))


def faked(monkeypatch, results=None, script=train_imagenet):
    """Replace training: a list of the points it is called with; ``results`` gives theirs."""
    calls = []

    def train(argv):
        name = Path(argv[argv.index("--output") + 1]).name
        calls.append(dict(part.split("=") for part in name.split(",")))
        usual = {"validation": 0.5, "test": 0.5}
        end_run(argv, results(calls[-1]) if results else usual, script)

    monkeypatch.setattr(script, "main", train)
    monkeypatch.setattr(report, "draw_curves", lambda *_: None)
    return calls


def table(tmp_path):
    return list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))


def test_every_point_is_trained_and_tabulated(tmp_path, capsys):
    write_folder(tmp_path / "images", splits=("train", "validation", "test"), images=4)
    sweep.main(write_sweep(tmp_path, {"method": ["sam", "base"], "seed": [0, 1]}))
    rows = table(tmp_path)
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("sam", "0"),
        ("sam", "1"),
        ("base", "0"),
        ("base", "1"),
    ]
    for row in rows:
        results = json.loads((Path(row["run"]) / "results.json").read_text())["last"]
        assert {key: float(row[key]) for key in results} == results
        saved = yaml.safe_load((Path(row["run"]) / "settings.yaml").read_text())
        assert (saved["method"], saved["seed"]) == (row["method"], int(row["seed"]))
    printed = capsys.readouterr().out
    for method in ("sam", "base"):
        values = [100 * float(row["test"]) for row in rows if row["method"] == method]
        assert f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}" in printed


@pytest.mark.slow
def test_two_processes_train_each_run_together(tmp_path):
    write_folder(tmp_path / "images", splits=("train", "validation", "test"), images=4)
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    command = [*TORCHRUN, "2", "sweep.py", *write_sweep(tmp_path, {"method": ["obf", "sam"]})]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
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


def test_a_run_that_was_removed_is_made_again_however_often(tmp_path, monkeypatch):
    calls, flags = faked(monkeypatch), write_sweep(tmp_path, {"seed": [0]})
    for _ in range(sweep.DEATHS + 1):
        sweep.main(flags)
        shutil.rmtree(tmp_path / "out" / "runs" / "seed=0")
    assert len(calls) == sweep.DEATHS + 1


def test_a_flag_that_is_cut_short_is_none_of_the_sweeps():
    args, rest = sweep.parse(["small.yaml", "--trial", "3", "--lis", "--trials", "2"])
    assert (args.trials, args.list, rest) == (2, False, ["--trial", "3", "--lis"])


def test_seeds_of_a_setting_are_one_curve(tmp_path, monkeypatch):
    faked(monkeypatch)
    drawn = []
    monkeypatch.setattr(report, "draw_curves", lambda curves, path: drawn.append(curves))
    monkeypatch.setattr(report, "read_metrics", lambda run: [run.name])
    sweep.main(write_sweep(tmp_path, {"method": ["sam", "base"], "seed": [0, 1]}))
    expected = {
        f"method={name}": [f"method={name},seed={seed}" for seed in (0, 1)]
        for name in ("sam", "base")
    }
    assert drawn == [expected]


def test_what_is_chosen_on_validation_is_reported_on_test(tmp_path, monkeypatch, capsys):
    # Validation prefers lr 0.02 for sam and 0.01 for obf; test would prefer the opposite.
    def results(point):
        right = (point["method"] == "sam") == (point["lr"] == "0.02")
        return {
            "validation": 0.9 if right else 0.8,
            "test": (0.3 if right else 0.6) + 0.02 * int(point["seed"]),
        }

    faked(monkeypatch, results)
    write_folder(tmp_path / "images", splits=("train", "validation"))
    sweep.main(write_sweep(tmp_path, GRID, choose=["lr"]))
    printed = [line for line in capsys.readouterr().out.splitlines() if "| lr=" in line]
    assert len(printed) == 2
    for line, best in zip(printed, ("lr=0.02", "lr=0.01")):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[1:] == [best, "2", "2", "90.00 ± 0.00", "31.00 ± 1.41"]


def test_without_validation_images_nothing_is_chosen(tmp_path, monkeypatch, capsys):
    calls = faked(monkeypatch, lambda point: {"test": 0.25})
    write_folder(tmp_path / "images", splits=("train", "test"))
    with pytest.raises(
        InputError, match="no validation images to choose on: give --validation-share"
    ):
        sweep.main(write_sweep(tmp_path, GRID, choose=["lr"]))
    assert calls == []
    sweep.main(write_sweep(tmp_path, GRID))
    assert re.search(r"lr=0\.01,method=sam.* +\| 2 +\| 25\.00 ± 0\.00", capsys.readouterr().out)


AXES = {
    "lr": {"low": 1e-3, "high": 1e-1, "log": True},
    "m": [1, 2],
    "weight_decay": {"low": 0, "high": 1e-2},
}


def test_random_points_are_the_same_again_and_within_their_ranges(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    for _ in range(2):
        sweep.main([*write_sweep(tmp_path, AXES), "--trials", "6"])
    assert len(calls) == 6
    args = argparse.Namespace(sweep="", trials=400, trial_seed=0)
    points = sweep.points_of(args, {"grids": [AXES]})
    drawn = [{key: str(value) for key, value in point.items()} for point in points[:6]]
    assert sorted(map(str, drawn)) == sorted(map(str, calls))
    rates, decays = (np.array([point[key] for point in points]) for key in ("lr", "weight_decay"))
    assert 1e-3 <= rates.min() < 2e-3 and 5e-2 < rates.max() <= 1e-1
    assert 0.4 < np.mean(rates < 1e-2) < 0.6  # uniform in the logarithm
    assert 0 <= decays.min() < 1e-3 and 9e-3 < decays.max() <= 1e-2
    assert 0.4 < np.mean(decays < 5e-3) < 0.6  # uniform
    assert 0.4 < np.mean([point["m"] == 1 for point in points]) < 0.6


def test_points_that_are_drawn_more_than_once_are_said_beside_the_output(
    tmp_path, monkeypatch, capsys
):
    calls = faked(monkeypatch)
    sweep.main([*write_sweep(tmp_path, {"m": [1, 2]}), "--trials", "6"])
    out, err = capsys.readouterr()
    said = f"{len(calls)} points are left of 6: some were drawn more than once"
    assert len(calls) <= 2 and said in err and said not in out
    sweep.main([*write_sweep(tmp_path, {"m": [1, 2]}), "--trials", "1"])
    assert "are left of" not in capsys.readouterr().err


def test_the_trial_seed_decides_the_points(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    sweep.main(
        [
            *write_sweep(tmp_path, {"lr": AXES["lr"], "m": [1, 2, 4]}),
            "--trials",
            "3",
            "--trial-seed",
            "7",
        ]
    )
    rng = np.random.default_rng(7)
    expected = [
        (np.exp(rng.uniform(np.log(1e-3), np.log(1e-1))), [1, 2, 4][rng.integers(3)])
        for _ in range(3)
    ]
    assert [(float(point["lr"]), int(point["m"])) for point in calls] == expected


def test_a_point_overrides_the_sweeps_settings_they_the_recipe_and_the_command_line_both(
    tmp_path, monkeypatch
):
    parsed = []

    def train(argv):
        parsed.append(settings.parse(settings.parser("", ""), argv))
        end_run(argv, {"test": 0.5})

    faked(monkeypatch)
    monkeypatch.setattr(train_imagenet, "main", train)
    recipe = {
        "lr": 0.11,
        "min_lr": 0.011,
        "momentum": 0.11,
        "hflip": 0.11,
        "smoothing": 0.11,
        "clip_grad": 1.1,
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "other.yaml").write_text(
        yaml.safe_dump({key: value + 0.01 for key, value in recipe.items()})
    )
    flags = write_sweep(tmp_path, {"momentum": [0.33], "clip_grad": [3.3]}, recipe="recipe.yaml")
    sweep_file = yaml.safe_load((tmp_path / "small.yaml").read_text())
    sweep_file["settings"] |= {"min_lr": 0.022, "momentum": 0.22, "hflip": 0.22}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(sweep_file))
    sweep.main([*flags, "--hflip", "0.44", "--smoothing", "0.44"])
    sweep.main(
        [*flags, "--recipe", str(tmp_path / "other.yaml"), "--output", str(tmp_path / "out2")]
    )
    keys = ("lr", "min_lr", "momentum", "clip_grad", "hflip", "smoothing", "epochs")
    first, second = ([getattr(args, key) for key in keys] for args in parsed)
    assert first == [0.11, 0.022, 0.33, 3.3, 0.44, 0.44, 1]
    assert [args.resume for args in parsed] == [
        "auto",
        "auto",
    ]  # else a run that was cut off could not go on
    assert second == pytest.approx([0.12, 0.022, 0.33, 3.3, 0.22, 0.12, 1])
    with pytest.raises(
        InputError, match=r"momentum is 0\.5 on the command line, and the sweep varies it: drop one"
    ):
        sweep.main([*flags, "--momentum", "0.5"])
    assert len(parsed) == 2


def test_null_takes_back_what_the_recipe_sets(tmp_path, monkeypatch):
    """In a grid and in the sweep's settings, of the sweep's recipe and of another."""
    for name, value in (("recipe", 1.5), ("other", 2.5)):
        recipe = {"clip_grad": value, "reprob": value / 10, "layer_decay": value / 5}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    flags = write_sweep(tmp_path, {"clip_grad": [None, 0.5]}, recipe="recipe.yaml")
    sweep_file = yaml.safe_load((tmp_path / "small.yaml").read_text())
    sweep_file["settings"]["layer_decay"] = None
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(sweep_file))
    other = ["--recipe", str(tmp_path / "other.yaml"), "--output", str(tmp_path / "other")]
    for changes, reprob in (([], 0.15), (other, 0.25)):
        calls, parsed = faked(monkeypatch), []
        train = train_imagenet.main

        def parse(argv):
            parsed.append(settings.parse(train_imagenet.parser(), argv))
            train(argv)

        monkeypatch.setattr(train_imagenet, "main", parse)
        sweep.main([*flags, *changes])
        assert [point["clip_grad"] for point in calls] == ["None", "0.5"]
        found = [(args.clip_grad, args.layer_decay, args.reprob) for args in parsed]
        assert found == [(None, None, reprob), (0.5, None, reprob)]


def test_an_unknown_key_of_the_recipe_names_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("learning_rat: 1")
    flags = write_sweep(tmp_path, {"seed": [0]}, recipe="recipe.yaml")
    with pytest.raises(InputError, match=r"the recipe .*/recipe\.yaml has an unknown key"):
        sweep.main(flags)


def test_what_every_run_has_of_its_own_is_refused(tmp_path):
    flags = write_sweep(tmp_path, {"seed": [0]})
    with pytest.raises(InputError, match="--resume there: every run of a sweep goes on from its"):
        sweep.main([*flags, "--resume", "there"])
    with pytest.raises(InputError, match=r"push_to_hub me/x: .*upload over each other, so drop it"):
        sweep.main([*flags, "--push-to-hub", "me/x"])
    for changes in ({"settings": {"output": "there"}}, {"grids": [{"output": ["a", "b"]}]}):
        flags = write_sweep(tmp_path, {"seed": [0]})
        content = yaml.safe_load((tmp_path / "small.yaml").read_text()) | changes
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(content))
        with pytest.raises(InputError, match="has output, and each run has its own: drop it"):
            sweep.main(flags)
    assert not (tmp_path / "out").exists()


def test_runs_with_different_splits_are_tabulated_and_drawn(tmp_path, monkeypatch, capsys):
    draw, save, drawn = report.draw_curves, report.save, []

    def results(point):
        run = tmp_path / "out" / "runs" / ",".join(f"{k}={v}" for k, v in point.items())
        held_out = {"validation": 0.25} if point["validation_share"] == "0.5" else {"test": 0.75}
        run.mkdir(parents=True)
        line = {"epoch": 1, "loss": 1.0, "train": 0.5, **held_out, "lr": 0.1, "rho": None}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        return held_out | {"test": 0.75}

    calls = faked(monkeypatch, results)
    monkeypatch.setattr(report, "draw_curves", draw)
    monkeypatch.setattr(report, "save", lambda figure, *a: drawn.append(figure) or save(figure, *a))
    sweep.main(write_sweep(tmp_path, {"validation_share": [None, 0.5], "seed": [0, 1]}))
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split("|") for line in printed.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in row] for row in rows]
    assert rows[0] == ["settings", "runs", "test %", "validation %"]
    assert rows[2] == ["validation_share=None", "2", "75.00 ± 0.00", "-"]
    assert rows[3] == ["validation_share=0.5", "2", "75.00 ± 0.00", "25.00 ± 0.00"]
    assert "none in bold, since only some runs have validation images" in printed
    assert [row["validation"] for row in table(tmp_path)] == ["", "0.25", "", "0.25"]
    panels = {axis.get_title(): axis for axis in drawn[0].axes if axis.get_visible()}
    for split, top1 in (("test", 0.75), ("validation", 0.25)):
        lines = panels[f"top-1 on {split}, %"].lines
        assert [list(line.get_ydata()) for line in lines if len(line.get_ydata())] == [[top1]]
    assert len(calls) == 4


def test_every_points_data_must_have_images_to_choose_on(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    write_folder(tmp_path / "images")
    write_folder(tmp_path / "without", splits=("train", "test"))
    for order in (["images", "without"], ["without", "images"]):
        grid = {"dataset": [str(tmp_path / name) for name in order], "lr": [0.1]}
        with pytest.raises(InputError, match="/without' has no validation images to choose on"):
            sweep.main(write_sweep(tmp_path, grid, choose=["lr"]))
    assert calls == []


def test_points_with_and_without_averages_are_of_one_sweep_in_any_order(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    for order in ([None, True], [True, None], [True, False, None]):
        sweep.main(write_sweep(tmp_path, {"model_ema": order}))
    assert [point["model_ema"] for point in calls] == ["None", "True", "False"]


def test_each_run_of_a_worker_is_compiled_as_it_says(tmp_path):
    Accelerator()  # as a sweep's own, before those of its runs
    for backend in (None, "eager", "aot_eager", None):
        args = argparse.Namespace(log_with=None, output=None, torchcompile=backend, freeze=0)
        model = build.build_accelerator(args).prepare(torch.nn.Linear(2, 2))
        assert isinstance(model, torch._dynamo.OptimizedModule) == (backend is not None)


def test_flags_of_one_script_alone_override_no_grid_either(tmp_path):
    flags = [*write_sweep(tmp_path, {"checkpoint": ["a.pth", "b.pth"]}), "--checkpoint", "c.pth"]
    with pytest.raises(InputError, match=r"checkpoint is c\.pth on the command line, .*: drop one"):
        sweep.main([*flags, "--script", "finetune_cifar"])


ERRORS = {
    "1": (InputError("the loss has not been finite"), "the loss has not been finite"),
    "2": (MemoryError(), "MemoryError"),
    "3": (
        torch.OutOfMemoryError("CUDA out of memory.\nTried"),
        "OutOfMemoryError: CUDA out of memory.",
    ),
    "4": (KeyError("missing"), "KeyError: 'missing'"),
    "5": (
        InputError(
            "Caught InputError in worker 0.\nTraceback\ncommon.errors.InputError: bad image"
        ),
        "bad image",
    ),
}


def test_a_failed_run_is_said_does_not_stop_the_others_and_is_tried_again(
    tmp_path, monkeypatch, capfd
):
    def fail(point):
        if point["seed"] in ERRORS:
            raise ERRORS[point["seed"]][0]
        return {"validation": 0.5, "test": 0.5}

    grid = {"seed": [1, 2, 0, 3, 4, 5, 6]}
    calls = faked(monkeypatch, fail)
    message = (
        "5 of 7 runs failed, with tracebacks in .*/logs; the same command tries them once more"
    )
    for _ in range(sweep.DEATHS):  # an error is not the death of a worker, however often
        with pytest.raises(InputError, match=message):
            sweep.main(write_sweep(tmp_path, grid))
        printed = capfd.readouterr()
        for seed, (error, reason) in ERRORS.items():
            assert printed.err.count(f"failed: seed={seed}: {reason}\n") == 1
            assert printed.out.split("written:")[1].count(f"\nseed={seed}: {reason}\n") == 1
            log = (tmp_path / "out" / "logs" / f"seed={seed}.txt").read_text()
            assert "Traceback" in log and type(error).__name__ in log
        assert "Traceback" not in printed.out + printed.err
        assert [row["seed"] for row in table(tmp_path)] == ["0", "6"]
    failing = ["1", "2", "3", "4", "5"]
    assert [point["seed"] for point in calls] == ["1", "2", "0", "3", "4", "5", "6", *2 * failing]
    monkeypatch.undo()
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, grid))
    assert [point["seed"] for point in calls] == failing
    assert len(table(tmp_path)) == 7


def test_what_failed_before_comes_after_what_is_new(tmp_path, monkeypatch):
    def fail(point):
        raise InputError("too large")

    faked(monkeypatch, fail)
    with pytest.raises(InputError, match="1 of 1 runs failed"):
        sweep.main(write_sweep(tmp_path, {"seed": [0]}))
    monkeypatch.undo()
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["1", "2", "0"]


def note(tmp_path, name, *lines):
    """Write into a point's history what a worker would."""
    file = tmp_path / "out" / "attempts" / f"{name}.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as history:
        history.writelines(f"{line}\n" for line in lines)


def test_a_run_that_failed_in_another_worker_is_not_tried_again_by_this_one(
    tmp_path, monkeypatch, capsys
):
    def fail(point):  # while this worker trains seed 0, another one fails with seed 1
        if point["seed"] == "0":
            note(tmp_path, "seed=1", "began", "failed: too large")
        return {"validation": 0.5}

    calls = faked(monkeypatch, fail)
    with pytest.raises(InputError, match="1 of 3 runs failed"):
        sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["0", "2"]
    assert "\nseed=1: too large\n" in capsys.readouterr().out


def test_a_run_at_which_workers_die_counts_as_failed_until_the_next_start(
    tmp_path, monkeypatch, capsys
):
    calls = faked(monkeypatch)
    note(tmp_path, "seed=1", "began", "stopped", *["began"] * sweep.DEATHS)
    note(tmp_path, "seed=2", *["began"] * sweep.DEATHS, "stopped")  # the last one did not die
    with pytest.raises(InputError, match="1 of 3 runs failed"):
        sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    reason = "3 workers died at it without a word; is there enough memory?"
    assert f"\nseed=1: {reason}\n" in capsys.readouterr().out
    assert [point["seed"] for point in calls] == ["0", "2"]
    sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    assert [point["seed"] for point in calls] == ["0", "2", "1"]


def test_a_run_does_not_keep_the_memory_of_one_that_failed(tmp_path, monkeypatch):
    held, alive = [], []

    def fail(point):
        alive.extend(reference() is not None for reference in held)
        model = torch.nn.Linear(2, 2)
        model.itself = model  # only garbage collection frees it
        held.append(weakref.ref(model))
        raise MemoryError

    faked(monkeypatch, fail)
    gc.disable()  # else Python may collect it by itself, at a time of its own
    try:
        with pytest.raises(InputError, match="3 of 3 runs failed"):
            sweep.main(write_sweep(tmp_path, {"seed": [0, 1, 2]}))
    finally:
        gc.enable()
    assert alive == [False] * 3


@pytest.mark.parametrize("error, code", [(SystemExit, None), (KeyboardInterrupt, 130)])
def test_sigterm_leaves_the_run_to_the_next_worker_at_once(
    tmp_path, monkeypatch, capsys, error, code
):
    def stop(point):
        raise error

    calls = faked(monkeypatch, stop)
    for number in range(1, 1 + sweep.DEATHS):
        with pytest.raises(SystemExit) as stopped:
            sweep.main(write_sweep(tmp_path, {"seed": [0]}))
        assert stopped.value.code == code and len(calls) == number
        assert "stopped in seed=0; the same command goes on\n" in capsys.readouterr().err
    monkeypatch.undo()
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"seed": [0]}))
    assert [point["seed"] for point in calls] == ["0"]


# --------------------------------------------------------------------------------------------------
# Two processes that train each run together


def process(rank, port, tmp_path, train, flags):
    """One of two, as torchrun would start it; what it prints goes to a file."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "1"}
    fresh_process()

    def main(argv):
        results = train(rank, Path(argv[argv.index("--output") + 1]).name)
        if rank == 0:
            end_run(argv, results)

    sweep.AGREE, train_imagenet.main = 3, main
    worker(tmp_path / f"process{rank}.txt", flags)


def worker(output, flags):
    """A process of its own."""
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    report.draw_curves = lambda *_: None
    with clear_errors():
        sweep.main(flags)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def together(tmp_path, train, flags):
    """The exit statuses and last lines of two processes."""
    port = free_port()
    arguments = [(rank, port, tmp_path, train, flags) for rank in range(2)]
    processes = [FORK.Process(target=process, args=each) for each in arguments]
    for each in processes:
        each.start()
    for each in processes:
        each.join(60)
    printed = [(tmp_path / f"process{rank}.txt").read_text() for rank in range(2)]
    assert "Traceback" not in "".join(printed), printed
    return [each.exitcode for each in processes], printed


@pytest.mark.slow
def test_processes_that_fail_at_the_same_place_go_on_with_the_next_run(tmp_path):
    def train(rank, name):
        if name == "seed=1":
            raise MemoryError("both")
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        if name == f"seed={2 + rank}":  # one process alone, when the work is done
            raise OSError(f"disk {rank} full")
        return {"test": total.item() / 4}

    status, printed = together(tmp_path, train, write_sweep(tmp_path, {"seed": [0, 1, 2, 3, 4]}))
    assert status == [1, 0]
    assert printed[0].endswith("/logs; the same command tries them once more\n")
    assert "error: 3 of 5 runs failed" in printed[0]
    for line in ("1: MemoryError: both", "2: OSError: disk 0 full", "3: OSError: disk 1 full"):
        assert f"\nseed={line}\n" in printed[0]
    # The main process has written the results of seed 3.
    assert [(row["seed"], row["test"]) for row in table(tmp_path)] == [(s, "0.5") for s in "034"]


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_process_that_fails_alone_ends_its_worker_and_a_restart_does_the_rest(tmp_path, failing):
    def train(rank, name):
        with (tmp_path / "calls.txt").open("a") as file:
            file.write(f"{rank} {name}\n")
        if (rank, name) == (failing, "seed=0"):
            raise MemoryError("alone")
        torch.distributed.all_reduce(torch.ones(1))
        return {"test": 0.5}

    flags = write_sweep(tmp_path, {"seed": [0, 1]})
    status, printed = together(tmp_path, train, flags)
    assert status == [1, 1]
    last = printed[failing].splitlines()[-1]
    assert last == "error: MemoryError: alone; after which this worker cannot go on: start it anew"
    assert "another process of this run died" in printed[1 - failing].splitlines()[-1]
    history = (tmp_path / "out" / "attempts" / "seed=0.txt").read_text().splitlines()
    assert history[0] == "began" and len(history) == (2 if failing == 0 else 1)
    status, printed = together(tmp_path, train, flags)
    assert status == [1, 1] and [row["seed"] for row in table(tmp_path)] == ["1"]
    if failing == 1:  # the main process never learns why: three times are enough
        together(tmp_path, train, flags)
        status, printed = together(tmp_path, train, flags)
        assert status == [1, 0] and "\nseed=0: 3 workers died at it" in printed[0]
    tried = (tmp_path / "calls.txt").read_text().splitlines()
    assert tried.count(f"{failing} seed=0") == (2 if failing == 0 else 3)
    assert tried.count("0 seed=1") == 1


# --------------------------------------------------------------------------------------------------
# Several workers


def start(tmp_path, flags, seconds=0.4):
    """A worker in a process of its own, whose runs leave lines in ``calls.txt``."""

    def train(argv):
        name = Path(argv[argv.index("--output") + 1]).name
        with (tmp_path / "calls.txt").open("a") as file:
            file.write(f"begin {name}\n")
        time.sleep(seconds)
        end_run(argv, {"validation": 0.5, "test": 0.5})
        with (tmp_path / "calls.txt").open("a") as file:
            file.write(f"end {name}\n")

    def run():
        train_imagenet.main = train
        worker(output, flags)

    output = tmp_path / f"worker{len(list(tmp_path.glob('worker*')))}.txt"
    output.touch()
    process = FORK.Process(target=run)
    process.start()
    process.output = output
    return process


def finish(*workers, seconds=90):
    """The exit statuses of workers, and what they printed."""
    for each in workers:
        each.join(seconds)
    return [each.exitcode for each in workers], [each.output.read_text() for each in workers]


def calls(tmp_path, what):
    path = tmp_path / "calls.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(" ", 1)[1] for line in lines if line.startswith(what)]


def wait_for_calls(tmp_path, number, seconds=60):
    deadline = time.monotonic() + seconds
    while len(calls(tmp_path, "begin")) < number and time.monotonic() < deadline:
        time.sleep(0.02)


def test_workers_share_the_points_and_the_last_one_prints_the_table(tmp_path):
    flags = write_sweep(tmp_path, GRID | {"seed": [0, 1, 2]})
    status, printed = finish(*(start(tmp_path, flags, seconds=0.2) for _ in range(3)))
    assert status == [0, 0, 0], printed
    assert len(calls(tmp_path, "begin")) == len(set(calls(tmp_path, "begin"))) == 12
    assert len(table(tmp_path)) == 12
    running = most = 0
    for line in (tmp_path / "calls.txt").read_text().splitlines():
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    assert most >= 2
    assert sum(text.count("| settings") for text in printed) == 1
    lines = [line for text in printed for line in text.splitlines()]
    assert "\r" not in "".join(lines)  # no line that another worker could write into
    assert all(sum(f"{name}:" in line for line in lines) == 1 for name in calls(tmp_path, "end"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.slow)])
def test_a_killed_sweep_does_what_is_left(tmp_path, name):
    flags = write_sweep(tmp_path, GRID)
    first = start(tmp_path, flags)
    wait_for_calls(tmp_path, 3)
    os.kill(first.pid, getattr(signal, name))
    finish(first)
    done, begun = calls(tmp_path, "end"), calls(tmp_path, "begin")
    assert 0 < len(done) < len(begun) < 8
    status, printed = finish(start(tmp_path, flags))
    assert status == [0], printed
    again = calls(tmp_path, "begin")[len(begun) :]
    assert sorted(again + done) == sorted(set(again + done)) and len(again + done) == 8
    assert len(table(tmp_path)) == 8


def test_the_point_of_a_killed_worker_is_taken_by_one_that_waits_for_it(tmp_path):
    flags = write_sweep(tmp_path, {"seed": [0]})
    first = start(tmp_path, flags, seconds=60)
    wait_for_calls(tmp_path, 1)
    second = start(tmp_path, flags, seconds=0)
    deadline = time.monotonic() + 60
    while "0/1" not in second.output.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.5)
    assert len(calls(tmp_path, "begin")) == 1  # it waits
    os.kill(first.pid, signal.SIGKILL)
    status, printed = finish(second)
    assert status == [0], printed
    assert calls(tmp_path, "begin") == ["seed=0"] * 2 and calls(tmp_path, "end") == ["seed=0"]
    assert len(table(tmp_path)) == 1 and "| settings" in printed[0]


def test_a_point_that_kills_every_worker_is_given_up(tmp_path, monkeypatch, capsys):
    flags = write_sweep(tmp_path, {"seed": [0]})
    for number in range(1, 1 + sweep.DEATHS):
        dying = start(tmp_path, flags, seconds=60)
        wait_for_calls(tmp_path, number)
        os.kill(dying.pid, signal.SIGKILL)
        finish(dying)
    tried = faked(monkeypatch)
    with pytest.raises(InputError, match="1 of 1 runs failed"):
        sweep.main(flags)
    assert tried == [] and "seed=0: 3 workers died at it" in capsys.readouterr().out


def test_a_result_that_was_cut_off_is_none(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    flags = write_sweep(tmp_path, {"seed": [0, 1]})
    sweep.main(flags)
    results = tmp_path / "out" / "runs" / "seed=1" / "results.json"
    results.write_text(results.read_text()[:9])
    sweep.main(flags)
    assert [point["seed"] for point in calls] == ["0", "1", "1"]


def listed(capsys, flags):
    sweep.main([*flags, "--list"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_the_listed_commands_train_the_points(tmp_path, capsys, monkeypatch):
    write_folder(tmp_path / "images", splits=("train", "validation", "test"), images=4)
    flags = write_sweep(tmp_path, {"method": ["sam", "base"]})
    flags[-1] = str(tmp_path / "it's out")
    commands = listed(capsys, flags)
    assert len(commands) == 2 and not (tmp_path / "it's out" / "runs").exists()
    subprocess.run(commands[1], shell=True, check=True, cwd=tmp_path, capture_output=True)
    assert listed(capsys, flags) == commands[:1]
    trained_here = faked(monkeypatch)
    sweep.main(flags)
    assert trained_here == [{"method": "sam"}]
    rows = list(csv.DictReader((tmp_path / "it's out" / "sweep.csv").open()))
    assert [row["method"] for row in rows] == ["sam", "base"]


@pytest.mark.parametrize(
    "grids, keys, message",
    [
        ([{"rhoo": [0.1]}], {}, "unknown key 'rhoo': did you mean 'rho'"),
        ([{"rho": []}], {}, r"the axis rho .* is \[\]"),
        ([{"rho": 0.1}], {}, r"the axis rho .* is 0\.1"),
        ([{"lr": {"low": 0.1}}], {}, "the axis lr"),
        ([{"lr": {"low": 0.2, "high": 0.1}}], {}, "the axis lr"),
        ([{"lr": {"low": 0.0, "high": 0.1, "log": True}}], {}, "the axis lr"),
        ([{"model": ["a" * 300]}], {}, "too long a name for a folder"),
        ([{"seed": [0]}], {"choose": ["lr"]}, "is to choose 'lr', which no grid varies"),
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
        sweep.main(
            write_sweep(tmp_path, {"seed": [0]}, *grids, **keys)
            if grids
            else write_sweep(tmp_path, **keys)
        )
    assert calls == []


def test_a_folder_of_other_settings_is_refused(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    flags = write_sweep(tmp_path, {"seed": [0]})
    sweep.main(flags)
    others = [
        (["--epochs", "2"], "epochs 1, and this sweep has 2: choose another --output"),
        (["--clip-grad", "1"], "clip_grad None, and this sweep has 1.0"),
        (["--script", "finetune_cifar"], "script 'train_imagenet', and this sweep has 'finetune_c"),
    ]
    seeds = [{"seed": [0, 1]}, {"seed": [1]}]  # with the point that is finished, and without it
    for (changed, message), grid in itertools.product(others, seeds):
        with pytest.raises(InputError, match=message):
            sweep.main([*write_sweep(tmp_path, grid), *changed])
        with pytest.raises(InputError, match=message):
            sweep.main([*write_sweep(tmp_path, grid), *changed, "--list"])
    assert len(calls) == 1
    for changed in (["--workers", "1"], ["--val-interval", "1"]):  # which change no result
        sweep.main([*write_sweep(tmp_path, {"seed": [0]}), *changed])
    sweep.main(write_sweep(tmp_path, {"seed": [1]}))
    assert [point["seed"] for point in calls] == ["0", "1"]


def test_a_finished_run_of_other_settings_is_refused(tmp_path, monkeypatch):
    """Settings that may differ between points are compared run by run."""
    calls = faked(monkeypatch)
    flags = write_sweep(tmp_path, {"method": ["sam"]})
    sweep.main(flags)
    for changed, message in (("--m", "m 4, and this sweep has 2"), ("--rho", "rho 0.05, .* 2.0")):
        with pytest.raises(InputError, match=f"runs/method=sam was trained with {message}"):
            sweep.main([*flags, changed, "2"])
    assert len(calls) == 1


def test_the_output_may_have_any_name(tmp_path, monkeypatch):
    faked(monkeypatch)
    for name in ("what?", "50%", "a[1] *", "#", "é ü"):
        sweep.main(
            [*write_sweep(tmp_path, {"seed": [0]})[:1], "--output", str(tmp_path / "o" / name)]
        )
        found = sorted(path.name for path in (tmp_path / "o" / name).iterdir())
        assert found == sorted([*"attempts locks runs sweep.csv sweep.yaml logs".split()])
    assert len(list((tmp_path / "o").iterdir())) == 5


def test_progress_goes_to_stderr_and_the_best_row_is_marked(tmp_path, monkeypatch, capsys):
    faked(monkeypatch, lambda point: {"validation": {"sam": 0.7, "obf": 0.8}[point["method"]]})
    sweep.main(write_sweep(tmp_path, {"method": ["sam", "obf"]}))
    out, err = capsys.readouterr()
    assert "2/2" in err and "/2 " not in out and "\r" not in err
    marked = [line for line in out.splitlines() if line.startswith("|") and "**" in line]
    assert len(marked) == 1 and "method=obf" in marked[0]


def test_a_value_with_slashes_is_no_folder_of_folders(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    sweep.main(write_sweep(tmp_path, {"model": ["hf-hub:one/model", "hf-hub:one/other"]}))
    assert [point["model"] for point in calls] == ["hf-hub:one%2Fmodel", "hf-hub:one%2Fother"]
    assert [row["model"] for row in table(tmp_path)] == ["hf-hub:one/model", "hf-hub:one/other"]


def test_a_sweep_of_dry_runs_is_refused(tmp_path, monkeypatch):
    calls = faked(monkeypatch)
    with pytest.raises(InputError, match="--dry-run trains nothing"):
        sweep.main([*write_sweep(tmp_path, {"seed": [0]}), "--dry-run"])
    assert calls == []
