"""Every number that a script reports is computed anew, by another route, from what it stored.

The settings are such that a likely mistake would give another number: several epochs, a run that
is resumed inside one, unequal sets, few images.
"""

import argparse
import csv
import io
import json
import math
import re
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
import yaml
from helpers import fresh_process, logged_epochs, train, write_folder
from PIL import Image
from scipy.stats import norm
from test_every_flag import EVALUATED, LABELS, Evaluation, places, run_once  # noqa: F401
from test_every_setting import Watch
from timm.data import create_transform, resolve_data_config

import eval_robustness
import train_imagenet
from common import dry_run, loop, monitor, run
from robustness import corruptions, report

Z = norm.ppf(0.975)


# ------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Four updates an epoch of 4 images; 32 validation images, 24 of test."""
    root = tmp_path_factory.mktemp("images")
    write_folder(root, splits=("train",), images=8)
    write_folder(root, splits=("val",), images=16)
    return write_folder(root, splits=("test",), images=12)


@pytest.fixture
def clock(monkeypatch):
    """Time stands still, but the n-th update takes 2**n seconds, and an evaluation 0.25."""
    now, updates = [1000.0], [0]
    stand_in = argparse.Namespace(monotonic=lambda: now[0])
    for module in (monitor, dry_run):
        monkeypatch.setattr(module, "time", stand_in)
    update, evaluate = loop.update, run.evaluate_top1

    def slow_update(*args):
        now[0] += 2 ** updates[0]
        updates[0] += 1
        return update(*args)

    def slow_evaluation(*args):
        now[0] += 0.25
        return evaluate(*args)

    monkeypatch.setattr(loop, "update", slow_update)
    monkeypatch.setattr(run, "evaluate_top1", slow_evaluation)
    return now


# The last model, the best one and the average differ in their accuracies with these.
TINY = {"model": "tiny_net", "img_size": 16, "epochs": 3, "lr": 0.2, "save_interval": 1, "seed": 10}


def top1_by_hand(folder, images):
    """The accuracy on a folder of images of a saved model, as anybody would open it."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    right = []
    for path in sorted(images.glob("*/*")):
        with torch.no_grad():
            answer = model(transform(Image.open(path).convert("RGB"))[None]).argmax().item()
        right.append(["cat", "dog"][answer] == path.parent.name)
    return np.mean(right)


@pytest.mark.slow
@pytest.mark.parametrize("stopped_after", [None, 2, 5, 8])
def test_a_run_reports_the_seconds_of_its_updates_and_the_accuracies_of_its_models(
    tmp_path, images, clock, monkeypatch, stopped_after
):
    flags = {"dataset": str(images), "model_ema": True, "model_ema_decay": 0.5, **TINY}
    own = loop.update

    def update(job, batches, perturb=True):
        loss, updates = own(job, batches, perturb), int(math.log2(clock[0] - 999))
        if updates == stopped_after:
            signal.raise_signal(signal.SIGTERM)
        return loss

    if stopped_after:
        with monkeypatch.context() as patch, pytest.raises(SystemExit):
            patch.setattr(loop, "update", update)
            train(train_imagenet, tmp_path, **flags)
        clock[0] += 5000.5  # until it is resumed
    results = train(train_imagenet, tmp_path, "--resume", "auto", **flags)
    lines, output = logged_epochs(tmp_path / "run"), tmp_path / "run"
    for number, line in enumerate(lines):
        assert line["seconds"] == sum(2**n for n in range(4 * number, 4 * number + 4))
        folder = output / "epochs" / f"{number + 1:04d}"
        assert line["validation"] == pytest.approx(top1_by_hand(folder, images / "val"))
    saved = json.loads((output / "results.json").read_text())
    assert set(saved) == {"last", "best", "last_ema"} and results == saved["last"]
    for split in ("validation", "test"):
        assert len({saved[name][split] for name in saved}) == 3, "these tell no models apart"
    for name, top1 in saved.items():
        for split, folder in (("validation", "val"), ("test", "test")):
            expected = top1_by_hand(output / name, images / folder)
            assert top1[split] == pytest.approx(expected), (name, split)
    best = max(lines, key=lambda line: line["validation"])  # the first of the best
    assert saved["best"]["validation"] == best["validation"]
    assert saved["last_ema"]["validation"] == lines[-1]["validation_ema"]


@pytest.mark.slow
def test_a_tracker_gets_what_is_logged_with_the_number_of_updates_made(tmp_path, images):
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(monkeypatch)
        monkeypatch.setattr(monitor, "LOOK", 0)  # after each update
        flags = {"dataset": str(images), "log_with": "tensorboard", "val_interval": 2, **TINY}
        train(train_imagenet, tmp_path, **flags, method="sam", rho=0.1, model_ema=True)
    tracked, lines = {}, logged_epochs(tmp_path / "run")
    for step, values in watch.parts["tracked"]:
        for key, value in values.items():
            tracked.setdefault(key, {})[step] = value
    assert list(tracked["train/loss"]) == list(range(1, 13))
    losses = list(tracked["train/loss"].values())
    for number, line in enumerate(lines):
        assert line["loss"] == pytest.approx(np.mean(losses[4 * number : 4 * number + 4]))
        for key in ("lr", "rho"):
            assert tracked[f"train/{key}"][4 * number + 4] == line[key]
    evaluated = {8: lines[1], 12: lines[2]}
    assert tracked["validation/top1"] == {n: line["validation"] for n, line in evaluated.items()}
    averages = {n: line["validation_ema"] for n, line in evaluated.items()}
    assert tracked["validation/top1_ema"] == averages
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    for name, top1 in saved.items():
        for split, value in top1.items():
            assert tracked[f"{name}/{split}"] == {None: value}


@pytest.mark.slow
def test_the_card_of_an_uploaded_model_states_every_setting_and_accuracy(tmp_path, images):
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(monkeypatch)
        flags = {"dataset": str(images), "push_to_hub": "me/model", "weight_decay": 0.0, **TINY}
        results = train(train_imagenet, tmp_path, **flags)
    (card,) = watch.parts["uploaded"]
    stated = dict(re.findall(r"^ *- (\w+): (.*)$", card, re.MULTILINE))
    for split, top1 in results.items():
        assert stated[split] == f"{100 * top1:.2f}%"
    settings = yaml.safe_load((tmp_path / "run" / "settings.yaml").read_text())
    for key, value in settings.items():
        assert (key in stated) == (value is not None), key
        if isinstance(value, (bool, int, float)):  # False and 0 are settings too
            assert stated[key] == str(value), key


def test_a_dry_run_says_what_all_updates_take(tmp_path, images, clock, capsys):
    train(train_imagenet, tmp_path, "--dry-run", dataset=str(images), **TINY)
    printed = capsys.readouterr().out
    # The second of two updates counts; it takes 2 seconds.
    assert "3 epochs of 4 updates of 2 seconds: about 24 seconds, and the evaluations" in printed
    peak = float(re.search(r"peak memory of process 0: ([\d.]+) GiB on cpu", printed)[1])
    status = Path("/proc/self/status").read_text()
    kibibytes = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # the highest resident size
    assert peak == pytest.approx(kibibytes / 2**20, abs=0.1) and peak > 0.1


# ------------------------------------------------------------------------------------------------
# Evaluation


@pytest.fixture(scope="module")
def evaluated(places, run_once):  # noqa: F811
    """Two models on images as they are and corrupted; what was written, and what was drawn."""
    drawn = {}

    def draw(axis, benchmark, measures):
        errorbar = axis.errorbar

        def seen(x, y, xerr, **style):
            drawn[benchmark, y] = (x - xerr[0][0], x, x + xerr[1][0])
            return errorbar(x, y, xerr=xerr, **style)

        axis.errorbar = seen
        own(axis, benchmark, measures)

    own = report._draw_benchmark
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(report, "_draw_benchmark", draw)
        flags = {"model": ["<trained>", "<other_trained>"], "corrupt": True, "csv": True}
        spare = {"dataset_config": "more", "val_split": "spare"}
        fresh_process()
        done = run_once(eval_robustness, Evaluation, {**EVALUATED, **flags, **spare})
    return done, drawn


def tables_of(done):
    """What is stored of each model's predictions, by model and protocol."""
    tables = {}
    for name in json.loads((done.folder / "results.json").read_text())["results"]:
        folder = eval_robustness.predictions.folder_of(str(done.folder), name)
        for path in folder.glob("*.parquet"):
            columns = pq.read_table(path).to_pydict()
            tables.setdefault(name, {})[path.stem] = {k: np.array(v) for k, v in columns.items()}
    return tables


@pytest.mark.slow
def test_each_number_of_an_evaluation_is_that_of_its_stored_predictions(evaluated):
    done, drawn = evaluated
    saved, tables = json.loads((done.folder / "results.json").read_text()), tables_of(done)
    right = {}
    for number, (model, by_protocol) in enumerate(saved["results"].items()):
        table, found = tables[model]["own"], by_protocol["own"]
        right[model] = (table["prediction"] == table["label"]).astype(float)
        p, n = right[model].mean(), len(right[model])
        assert (found["top1"], found["examples"]) == (pytest.approx(p), 16)
        centre, half = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n * n))
        ends = [(centre - half) / (1 + Z**2 / n), (centre + half) / (1 + Z**2 / n)]
        assert [found["top1_low"], found["top1_high"]] == pytest.approx(ends)
        assert drawn["own", number] == pytest.approx([100 * v for v in (ends[0], p, ends[1])])
        assert found["nll"] == pytest.approx(table["nll"].mean())
        assert not np.allclose(table["confidence"], table["scaled"], atol=0.01)
        for name, surety in (("ece", table["confidence"]), ("ece_scaled", table["scaled"])):
            bins = np.minimum(np.floor(15 * surety), 14)  # certainty belongs to the last
            gaps = [(surety - right[model])[bins == number].sum() for number in range(15)]
            gap = np.abs(gaps).sum() / n
            assert found[name] == pytest.approx(gap)
        check_corrupted(saved["corrupted"][model]["own"], tables[model], p)
    first, other = right
    difference = saved["differences_to_first"][other]["own"]
    assert difference["difference"] == pytest.approx((right[other] - right[first]).mean())
    # By image, over all corruptions.
    means = {model: corrupted_means(tables[model]) for model in tables}
    apart = means[other] - means[first]
    found = saved["corrupted"][other]["own"]["difference_to_first"]
    assert [found[key] for key in ("low", "mean", "high")] == pytest.approx(normal_interval(apart))


def corrupted_means(tables):
    """The share of its corruptions that each image was right in."""
    rows = [table["top1"] for name, table in sorted(tables.items()) if "-" in name]
    assert len(rows) == 3 * len(corruptions.CORRUPTIONS)
    return np.mean(rows, 0)


def normal_interval(values):
    half = 1.96 * math.sqrt(np.mean((values - values.mean()) ** 2) / len(values))
    return [values.mean() - half, values.mean(), values.mean() + half]


def check_corrupted(found, tables, clean):
    assert found["clean"] == pytest.approx(clean)
    for kind, by_severity in found["corruptions"].items():
        for severity, top1 in by_severity.items():
            table = tables[f"own.{kind}-{severity}"]
            assert top1 == pytest.approx((table["prediction"] == table["label"]).mean())
    ends = normal_interval(corrupted_means(tables))
    assert [found[key] for key in ("low", "mean", "high")] == pytest.approx(ends)


@pytest.mark.slow
def test_the_tables_of_an_evaluation_have_the_same_numbers(evaluated):
    done, _ = evaluated
    saved, tables = json.loads((done.folder / "results.json").read_text()), tables_of(done)
    with (done.folder / "results-own.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2
    for row in rows:
        top1 = 100 * saved["results"][row["model"]]["own"]["top1"]
        values = [row["top1"], row["top1_err"]]
        assert values == [f"{top1:.3f}", f"{100 - top1:.3f}"]
    with (done.folder / "per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        table = tables[row["model"]]["own"]
        mine = table["true"] == row["class"]
        assert row["class"] in LABELS and int(row["images"]) == mine.sum() == 8
        assert float(row["top1"]) == 100 * (table["predicted"][mine] == row["class"]).mean()
        wrong = table["predicted"][mine & (table["predicted"] != row["class"])]
        assert row["taken for"] in ["", *wrong]
        assert int(row["times"]) == (wrong == row["taken for"]).sum()
        assert all((wrong == name).sum() <= int(row["times"]) for name in LABELS)
    (printed,) = done.parts["printed"]
    for model, by_protocol in saved["results"].items():
        found = by_protocol["own"]
        cells = [found["examples"], *(f"{100 * found[key]:.2f}" for key in ("top1", "top1_low"))]
        line = next(
            line for line in map(str.split, printed.splitlines()) if line[:2] == [model, "own"]
        )
        rest = ["to", f"{100 * found['top1_high']:.2f}"]
        for name, factor, digits in (("nll", 1, 3), ("ece", 100, 2), ("ece_scaled", 100, 2)):
            middle, low, high = (
                f"{factor * found[f'{name}{end}']:.{digits}f}" for end in ("", "_low", "_high")
            )
            rest += [middle, low, "to", high]
        assert line == [model, "own", *map(str, cells), *rest]


@pytest.mark.slow
def test_each_score_that_is_stored_is_that_of_the_saved_model_on_the_image(evaluated, places):  # noqa: F811
    done, _ = evaluated
    pictures = pq.read_table(places / "data" / "data" / "more-spare.parquet").to_pylist()
    for name, tables in tables_of(done).items():
        table, model = tables["own"], timm.create_model(f"local-dir:{name}", pretrained=True).eval()
        transform = create_transform(**resolve_data_config(model=model))
        for row, key in enumerate(table["key"]):
            picture = pictures[int(key.removeprefix("0 of 1: "))]  # of one reader
            image = transform(Image.open(io.BytesIO(picture["image"]["bytes"])))
            with torch.no_grad():
                p = model(image[None])[0].softmax(-1)
            true = ["cat", "dog"][picture["label"]]
            assert table["true"][row] == true
            assert table["predicted"][row] == LABELS[p.argmax()]
            assert table["top1"][row] == (LABELS[p.argmax()] == true)
            assert table["confidence"][row] == pytest.approx(p.max().item(), rel=1e-3)
            nll = -math.log(p[LABELS.index(true)])
            assert table["nll"][row] == pytest.approx(nll, rel=1e-3, abs=1e-4)
