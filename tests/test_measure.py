"""measure_forgetting.py: curvature and forgetting against doing it by hand, and bad input."""

import argparse
import copy
import csv
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
import yaml
from helpers import fresh_process, small_recipe, write_folder
from PIL import Image
from scipy.stats import kendalltau
from test_forgetting import counted_entropy
from timm.loss import LabelSmoothingCrossEntropy

import measure_forgetting
import train_imagenet
from common import data, loaders, loop, report
from common.errors import InputError
from forgetting import forgetting
from robustness import features, flatness, rank_correlations, sharpness

ROOT = Path(__file__).parent.parent
THRESHOLDS = [i / 50 for i in range(1, 50)]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(
        tmp_path_factory.mktemp("images"), splits=("train", "validation", "test"), images=6
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory, images):
    """Four finished runs with models of epochs 1 and 2."""
    folders = []
    for i, method in enumerate(["base", "sam", "obf", "asam"]):
        folder = tmp_path_factory.mktemp(f"run{i}")
        changes = {"rho": 0.05} if method != "base" else {}
        options = {
            "epochs": 2,
            "save_interval": 1,
            "seed": i,
            "method": method,
            "output": str(folder / "run"),
        }
        train_imagenet.main(small_recipe(folder, images, **options, **changes))
        folders.append(folder / "run")
    return folders


def measure(runs, tmp_path, *flags):
    output = ["--output", str(tmp_path / "out"), "--workers", "0", "--hessian-examples", "4"]
    return measure_forgetting.main(["--runs", *map(str, runs), "--rho", "0.05", *output, *flags])


@pytest.fixture
def curvature_aside(monkeypatch):
    """The Hessian takes most of the time of a measurement; here it is about something else."""
    found = {"lambda_max": 1.0, "lambda_max_se": 0.1, "trace": 2.0, "trace_se": 0.2}
    monkeypatch.setattr(measure_forgetting, "curvature", lambda *_: found)


def rows(tmp_path):
    return list(csv.DictReader((tmp_path / "out" / "measurements.csv").open()))


def by_hand(epoch, images, kind, link, rho, m, count, ascending=None):
    """Forgetting at ``THRESHOLDS`` and the gap, averaged over perturbations made here."""
    args = argparse.Namespace(examples=12, seed=0)
    _, transform = loaders.transforms(
        {
            "input_size": (3, 32, 32), "interpolation": "bilinear",
            "crop_pct": 1.0, "crop_mode": "center",
        },
        scale=(1, 1), ratio=(1, 1), hflip=0,
    )  # fmt: skip
    examples = loaders.Images(
        measure_forgetting.choose_images(args, data.load(str(images))["train"]), transform
    ).__getitems__(range(12))
    y = torch.tensor([example["label"] for example in examples])
    model = timm.create_model(f"local-dir:{epoch}", pretrained=True).eval()
    mean, std = (
        torch.tensor(model.pretrained_cfg[key]).reshape(3, 1, 1) for key in ("mean", "std")
    )
    x = torch.stack([(example["image"] / 255 - mean) / std for example in examples])
    with torch.no_grad():
        clean = link(model(x).double())
    forgotten, gaps = [], []
    for start in range(0, m * count, m):
        part, first = slice(start, start + m), slice(start, start + (ascending or m))
        before = F.cross_entropy(model(x[part]), y[part])
        ascended = F.cross_entropy(model(x[first]), y[first])
        if kind == "obf":
            logits = model(x[first])
            p = logits.detach().sigmoid()
            target = F.one_hot(y[first], 2)
            alpha = 0.5 * (1 - 0.5 / (p * target).sum(-1, keepdim=True)).clamp_min(0) / (1 - 0.5)
            ascended = ((0.5 - alpha * p - (1 - alpha) * target) * logits).sum(-1).mean()
        grads = torch.autograd.grad(ascended, list(model.parameters()))
        norm = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), grads):
                p += rho * g / norm
            perturbed = link(moved(x).double())
            gaps.append((F.cross_entropy(moved(x[part]), y[part]) - before).item())
        ordered = [math.inf, *sorted(perturbed.flatten().tolist(), reverse=True), -math.inf]
        for threshold in THRESHOLDS:
            # The threshold that gives as many labels lies between two neighbouring predictions.
            labels = (clean > threshold).sum()
            adjusted = (ordered[labels] + ordered[labels + 1]) / 2
            forgotten.append(
                counted_entropy(clean, y, threshold) - counted_entropy(perturbed, y, adjusted)
            )
    return np.mean(forgotten), np.mean(gaps)


@pytest.mark.usefixtures("curvature_aside")
@pytest.mark.parametrize("kind, link", [("sam", "softmax"), ("obf", "sigmoid")])
def test_forgetting_and_gap_are_those_of_perturbing_by_hand(runs, images, tmp_path, kind, link):
    function = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}[link]
    flags = ["--perturbations", kind, "--link", link, "--m", "4", "--micro-batches", "3"]
    flags += ["--gamma", "0.5"]
    flags += ["--thresholds", *map(str, THRESHOLDS)]
    measure(runs[1:2], tmp_path, *flags, "--rho", "0.3")
    measured = rows(tmp_path)
    assert [row["epoch"] for row in measured] == ["1", "2"]
    for row, epoch in zip(measured, sorted((runs[1] / "epochs").iterdir())):
        forgotten, gap = by_hand(epoch, images, kind, function, rho=0.3, m=4, count=3)
        assert row["epoch"] == "1" or abs(forgotten) > 1e-3  # there is something to compare
        assert float(row["forgetting"]) == pytest.approx(forgotten, abs=1e-9)
        assert float(row["sam_gap"]) == pytest.approx(gap, rel=1e-3, abs=1e-6)


@pytest.mark.slow
def test_run_of_four_gives_table_correlations_and_pictures(runs, tmp_path, capsys):
    found = measure(
        runs, tmp_path, "--perturbations", "own", "sam", "random", "--micro-batches", "2"
    )
    measured = rows(tmp_path)
    assert len(measured) == 4 * 2 * 3 - 2  # run, epoch, perturbation; base has none of its own
    assert {(row["perturbation"], row["epoch"]) for row in measured} == {
        (kind, epoch) for kind in ("own", "sam", "random") for epoch in "12"
    }
    for row in measured:
        results = json.loads((runs[0].parent / row["run"] / "results.json").read_text())
        assert float(row["accuracy"]) == results["last"]["test"]
    # Only three runs have a perturbation of their own, too few for a correlation.
    assert {(c["perturbation"], c["epochs"]) for c in found} == {
        (k, e) for k in ("sam", "random") for e in ("last", "mean")
    }
    last = [row for row in measured if row["perturbation"] == "sam" and row["epoch"] == "2"]
    expected = kendalltau(
        [-float(row["lambda_max"]) for row in last], [float(row["accuracy"]) for row in last]
    ).statistic
    which = {
        "perturbation": "sam",
        "epochs": "last",
        "quantity": "flatness",
        "target": "accuracy",
        "fixed": None,
    }
    (flatness,) = (c for c in found if which.items() <= c.items())
    assert flatness["tau"] == pytest.approx(expected, nan_ok=True)
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {f"{name}.png" for name in (
        "forgetting_accuracy", "flatness_accuracy", "forgetting_epochs", "forgetting_thresholds"
    )}  # fmt: skip
    printed = capsys.readouterr().out
    assert f"own: without {runs[0]}, as base makes no perturbation\n" in printed
    assert "Kendall's tau" in printed


@pytest.mark.slow
def test_two_processes_measure_the_same(runs, tmp_path):
    flags = ["--perturbations", "sam", "--micro-batches", "1"]
    measure(runs, tmp_path / "one", *flags)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launch += ["--nproc_per_node", "2"]
    script = ["measure_forgetting.py", "--runs", *map(str, runs), "--rho", "0.05"]
    script += ["--hessian-examples", "4", *flags]
    command = [*launch, *script, "--output", str(tmp_path / "two" / "out")]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert [one[key] for key in ("run", "epoch", "accuracy")] == [
            two[key] for key in ("run", "epoch", "accuracy")
        ]
        for key in ("forgetting", "sam_gap", "lambda_max"):
            assert float(one[key]) == pytest.approx(float(two[key]), rel=1e-4, abs=1e-6)


@pytest.mark.usefixtures("curvature_aside")
def test_finished_measurements_are_not_made_again(runs, tmp_path, monkeypatch):
    measure(runs[:1], tmp_path, "--micro-batches", "1")
    before = (tmp_path / "out" / "measurements.csv").read_text()
    monkeypatch.setattr(measure_forgetting, "measure", lambda *_: pytest.fail("measured again"))
    measure(runs[:1], tmp_path, "--micro-batches", "1")
    assert (tmp_path / "out" / "measurements.csv").read_text() == before
    others = [["2"], ["1", "--no-channels-last"], ["1", "--average-rho", "0.2"]]
    others += [["1", "--worst-rho", "0.1"], ["1", "--link", "sigmoid"]]
    others += [["1", "--hessian-examples", "5"]]
    for other in others:
        with pytest.raises(pytest.fail.Exception):
            measure(runs[:1], tmp_path, "--micro-batches", *other)


@pytest.mark.slow
@pytest.mark.usefixtures("curvature_aside")
def test_a_table_of_other_runs_is_not_replaced_without_a_word(runs, tmp_path, capsys):
    flags = ("--micro-batches", "1", "--perturbations", "sam")
    measure(runs[:2], tmp_path, *flags)
    measure([os.path.relpath(run) for run in runs[:2]], tmp_path, *flags)
    measure(runs[:3], tmp_path, *flags, "obf")
    assert "will no longer have" not in capsys.readouterr().out
    measure(runs[:2], tmp_path, *flags, "obf", "--epochs", "2")
    lost = [
        f"{run.resolve()} after epoch 1 ({kind})" for run in runs[:2] for kind in ("sam", "obf")
    ]
    said = "measurements.csv, correlations.json and the pictures will no longer have "
    said += f"{', '.join(lost)}, "
    assert said + f"{runs[2].resolve()}" in capsys.readouterr().out
    assert {row["run"] for row in rows(tmp_path)} == {str(run) for run in runs[:2]}


MEASURES = ("lambda_max", "trace", "average_sharpness", "worst_sharpness")


def test_the_table_has_all_measures_and_their_standard_errors(runs, tmp_path, capsys):
    measure(runs[1:2], tmp_path, "--perturbations", "sam", "--m", "4", "--micro-batches", "3")
    assert "forgetting is of softmax predictions" in capsys.readouterr().out
    for row in rows(tmp_path):
        for key in ("forgetting", "relevant_change", "sam_gap", *MEASURES):
            assert math.isfinite(float(row[key])) and float(row[f"{key}_se"]) >= 0
        assert row["link"] == "softmax" and int(row["feature_rank"]) >= 1
        assert (row["run"], row["seed"], row["method"]) == (str(runs[1]), "1", "sam")
        assert (int(row["trained_m"]), float(row["trained_rho"])) == (2, 0.05)
        assert float(row["measured_loss"]) > 0


@pytest.mark.usefixtures("curvature_aside")
def test_what_was_measured_before_there_were_these_measures_is_measured_anew(runs, tmp_path):
    flags = ["--micro-batches", "1", "--perturbations", "sam", "--epochs", "2"]
    measure(runs[1:2], tmp_path, *flags)
    (file,) = (tmp_path / "out" / "measurements").glob("*.json")
    record = json.loads(file.read_text())
    for key in ("average_rho", "worst_rho"):
        del record["request"][key]
    del record["worst_sharpness"]
    file.write_text(json.dumps(record))
    measure(runs[1:2], tmp_path, *flags)
    assert float(rows(tmp_path)[0]["worst_sharpness"]) >= 0


@pytest.mark.usefixtures("curvature_aside")
def test_too_few_runs_are_measured_but_not_correlated(runs, tmp_path, capsys):
    assert measure(runs[:3], tmp_path, "--perturbations", "sam", "--micro-batches", "1") == []
    assert len(rows(tmp_path)) == 6
    assert "at least 4 runs" in capsys.readouterr().out


@pytest.mark.usefixtures("curvature_aside")
def test_of_the_saved_epochs_some_can_be_measured_and_are_kept_for_the_others(
    runs, tmp_path, monkeypatch
):
    measure(runs[:1], tmp_path, "--micro-batches", "1", "--epochs", "2")
    assert {row["epoch"] for row in rows(tmp_path)} == {"2"}
    made, usual = [], measure_forgetting.measure
    monkeypatch.setattr(measure_forgetting, "measure", lambda *of: made.append(of[2]) or usual(*of))
    measure(runs[:1], tmp_path, "--micro-batches", "1")
    assert made == [1] and {row["epoch"] for row in rows(tmp_path)} == {"1", "2"}
    with pytest.raises(InputError, match=r"--epochs 3: the run .* saved 1, 2"):
        measure(runs[:1], tmp_path, "--epochs", "2", "3")


def altered(run, tmp_path, **changes):
    """A copy of a run with other settings."""
    shutil.copytree(run, tmp_path / "altered")
    saved = yaml.safe_load((run / "settings.yaml").read_text()) | changes
    (tmp_path / "altered" / "settings.yaml").write_text(yaml.safe_dump(saved))
    return tmp_path / "altered"


def test_runs_of_different_data_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match=r"share their dataset.*elsewhere"):
        measure([runs[0], altered(runs[1], tmp_path, dataset="elsewhere")], tmp_path)


def test_runs_of_different_class_counts_are_refused(runs, tmp_path):
    other = altered(runs[1], tmp_path)
    for file in other.glob("epochs/*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_classes": 7}))
    with pytest.raises(
        InputError, match=r"share their classes.* 2 \(cat, dog\) and .* 7 \(0, 1, 2, \.\.\.\)"
    ):
        measure([runs[0], other], tmp_path)


@pytest.mark.parametrize("names", [["dog", "cat"], ["cat", "wolf"]])
def test_a_run_on_classes_that_were_renamed_or_reordered_since_is_refused(runs, tmp_path, names):
    other = altered(runs[1], tmp_path)
    for file in other.glob("epochs/*/config.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": names}))
    words = rf"trained on the classes 2 \({', '.join(names)}\), and .* has 2 \(cat, dog\) now"
    with pytest.raises(InputError, match=words):
        measure([other], tmp_path)
    with pytest.raises(InputError, match="runs must share their classes"):
        measure([runs[0], other], tmp_path)


def test_a_run_without_epochs_and_an_unfinished_one_are_refused(runs, tmp_path):
    other = altered(runs[1], tmp_path)
    shutil.rmtree(other / "epochs")
    with pytest.raises(InputError, match="--save-interval"):
        measure([other], tmp_path)
    (other / "results.json").unlink()
    with pytest.raises(InputError, match=r"not finished.*--resume auto"):
        measure([other], tmp_path)
    with pytest.raises(InputError, match=r"no output folder.*settings\.yaml"):
        measure([tmp_path], tmp_path)


@pytest.mark.usefixtures("curvature_aside")
def test_a_run_of_before_a_setting_was_there_is_of_another_setting(runs, tmp_path):
    older = altered(runs[1], tmp_path)
    saved = yaml.safe_load((older / "settings.yaml").read_text())
    del saved["decoder"]
    (older / "settings.yaml").write_text(yaml.safe_dump(saved))
    for order in ([older, runs[1]], [runs[1], older]):
        measure(order, tmp_path, "--perturbations", "sam", "--micro-batches", "1")
        assert {row["setting"] for row in rows(tmp_path)} == {"decoder=pil", "decoder=None"}


@pytest.mark.usefixtures("curvature_aside")
def test_held_out_images_can_be_measured_on(runs, images, tmp_path, monkeypatch):
    seen, own = [], measure_forgetting.choose_images
    monkeypatch.setattr(
        measure_forgetting, "choose_images", lambda args, ds: seen.append(ds) or own(args, ds)
    )
    found = measure(
        runs, tmp_path, "--perturbations", "sam", "--micro-batches", "1", "--split", "test"
    )
    assert {image["path"] for image in seen[0]["image"]} == {
        str(p) for p in (images / "test").rglob("*.png")
    }
    assert {c["target"] for c in found} == {"accuracy"}  # no gap: these are no training images
    assert all(
        row["accuracy"] == row["measured_accuracy"] for row in rows(tmp_path) if row["epoch"] == "2"
    )
    with pytest.raises(
        InputError, match="has no split 'tset': choose --split train or validation or test"
    ):
        measure(runs, tmp_path, "--split", "tset")


def test_base_needs_a_rho(runs, tmp_path):
    with pytest.raises(InputError, match="give --rho"):
        measure_forgetting.main(["--runs", str(runs[0]), "--output", str(tmp_path)])


def test_base_alone_has_nothing_of_its_own_to_measure(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(measure_forgetting, "open_images", None)
    with pytest.raises(InputError, match=f"{runs[0]} was trained with method base.* sam$"):
        measure([runs[1], runs[0]], tmp_path, "--perturbations", "own")


@pytest.mark.usefixtures("curvature_aside")
@pytest.mark.parametrize("epoch", ["1", "2"])
def test_there_is_no_gap_between_two_epochs(runs, tmp_path, capsys, epoch):
    """Accuracy is the last epoch's."""
    flags = ["--perturbations", "random", "--micro-batches", "1", "--epochs", epoch]
    found = measure(runs, tmp_path, *flags)
    assert {c["target"] for c in found} == ({"accuracy"} | ({"-gap"} if epoch == "2" else set()))
    said = "accuracy is of each run's last epoch, which is not measured of "
    assert (said + str(runs[0]) in capsys.readouterr().out) == (epoch == "1")


@pytest.mark.usefixtures("curvature_aside")
def test_measuring_is_in_float32_whatever_accelerate_is_told(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    fresh_process()
    measure([runs[1]], tmp_path, "--perturbations", "random", "--micro-batches", "1")
    assert "precision: float32" in capsys.readouterr().out


def test_a_process_waits_for_anothers_models_longer_than_torch_does(runs, tmp_path, monkeypatch):
    """Of two processes one may have a day's work, and the other nothing."""
    asked = {}

    def record(**options):
        asked.update(options)
        raise InputError("enough")

    monkeypatch.setattr(measure_forgetting, "Accelerator", record)
    with pytest.raises(InputError, match="enough"):
        measure(runs, tmp_path)
    (handler,) = asked["kwargs_handlers"]
    assert handler.to_kwargs()["timeout"] > datetime.timedelta(days=1)


def test_a_runs_own_momentum_is_not_saved(runs, tmp_path):
    other = altered(runs[1], tmp_path, method="momentum", perturb_fraction=None)
    with pytest.raises(InputError, match="no momentum saved to perturb along: measure sam"):
        measure([other], tmp_path, "--perturbations", "own")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--thresholds", "0.5", "1"], r"thresholds is 1.0; it must lie in"),
        (["--examples", "1"], "--examples 1 cannot hold one of each of 2 classes"),
        (["--micro-batches", "0"], "micro_batches is 0"),
        (["--average-rho", "-1"], "average_rho is -1"),
        (["--worst-rho", "-1"], "worst_rho is -1"),
        (["--perturbations", "asam"], "invalid choice"),
    ],
)
def test_bad_flags_are_refused(runs, tmp_path, flags, message):
    with pytest.raises(InputError, match=message):
        measure(runs[:1], tmp_path, *flags)


def test_a_model_that_diverged_is_named_and_what_was_measured_is_kept(runs, tmp_path):
    other = altered(runs[1], tmp_path)
    file = other / "epochs" / "0002" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["fc.weight"].fill_(float("nan"))
    safetensors.torch.save_file(weights, file)
    with pytest.raises(InputError, match=r"epochs/0002.*not finite"):
        measure([other], tmp_path, "--perturbations", "sam", "--micro-batches", "1")
    assert len(list((tmp_path / "out" / "measurements").glob("*.json"))) == 1


# --------------------------------------------------------------------------------------------------
# What the run itself used


@pytest.mark.usefixtures("curvature_aside")
def test_own_ascends_on_the_runs_share_of_a_micro_batch_and_sam_on_all_of_it(
    runs, images, tmp_path
):
    run = altered(runs[1], tmp_path, perturb_fraction=0.5, rho=0.3)
    flags = ["--m", "4", "--micro-batches", "3", "--thresholds", *map(str, THRESHOLDS)]
    flags += ["--rho", "0.3", "--link", "sigmoid"]
    measure([run], tmp_path, *flags, "--perturbations", "own", "sam")
    for row in rows(tmp_path):
        epoch, ascending = (
            run / "epochs" / f"{int(row['epoch']):04d}",
            2 if row["perturbation"] == "own" else 4,
        )
        forgotten, gap = by_hand(
            epoch, images, "sam", torch.sigmoid, rho=0.3, m=4, count=3, ascending=ascending
        )
        assert float(row["forgetting"]) == pytest.approx(forgotten, abs=1e-9)
        assert float(row["sam_gap"]) == pytest.approx(gap, rel=1e-3, abs=1e-6)


def test_rho_that_followed_lr_is_that_of_the_epochs_last_update():
    own = argparse.Namespace(
        rho=0.5,
        rho_min=0.1,
        lr=0.2,
        min_lr=0.02,
        warmup_lr=0.0,
        sched="poly",
        epochs=4,
        warmup_epochs=1,
        batch_size=3,
    )
    # 11 images are 3 updates an epoch. Update 2 ends the warm-up with lr 2/3 of 0.2; from then on
    # lr falls in 9 equal parts from 0.2 to 0.02: update 5 has made 2 and update 11 has made 8.
    lrs = {1: 0.2 * 2 / 3, 2: 0.2 - 0.18 * 2 / 9, 4: 0.2 - 0.18 * 8 / 9}
    for epoch, lr in lrs.items():
        expected = 0.1 + 0.4 * (lr - 0.02) / 0.18
        assert measure_forgetting.rho_at(own, epoch, 11) == pytest.approx(expected)
    own.rho_min = None
    assert measure_forgetting.rho_at(own, 1, 11) == 0.5


@pytest.mark.usefixtures("curvature_aside")
@pytest.mark.parametrize("sched", ["poly", "cosine"])
def test_measured_rho_is_what_training_used_last_before_it_saved_the_model(
    images, tmp_path, monkeypatch, sched
):
    used, update = [], loop.update

    def recorded(job, batches, perturb):
        used.append(job.optimizer.param_groups[0]["rho"])
        return update(job, batches, perturb)

    monkeypatch.setattr(loop, "update", recorded)
    options = {
        "epochs": 3,
        "warmup_epochs": 1,
        "save_interval": 1,
        "method": "sam",
        "rho": 0.3,
        "rho_min": 0.05,
    }
    train_imagenet.main(small_recipe(tmp_path, images, sched=sched, **options))
    output = ["--output", str(tmp_path / "out"), "--workers", "0", "--hessian-examples", "4"]
    flags = ["--perturbations", "own", "sam", "--examples", "8"]  # of the 12 that it trained on
    measure_forgetting.main(["--runs", str(tmp_path / "run"), *output, *flags])
    for row in rows(tmp_path):
        assert float(row["rho"]) == pytest.approx(used[3 * int(row["epoch"]) - 1])
    assert len({row["rho"] for row in rows(tmp_path)}) > 1


def test_a_run_that_does_not_say_its_m_needs_one(runs, tmp_path):
    with pytest.raises(InputError, match="does not say its m, which its processes made: give --m"):
        measure([altered(runs[1], tmp_path, m=None)], tmp_path)
    with pytest.raises(InputError, match="12 images hold no micro-batch of m 13: raise --examples"):
        measure(runs[1:2], tmp_path, "--m", "13")


@pytest.mark.usefixtures("curvature_aside")
def test_fewer_perturbations_than_asked_for_are_said(runs, tmp_path, capsys):
    measure(runs[1:2], tmp_path, "--perturbations", "sam", "--m", "5", "--micro-batches", "2")
    assert "sam: 2 perturbations" not in capsys.readouterr().out
    measure(runs[1:2], tmp_path, "--perturbations", "sam", "--m", "5", "--micro-batches", "3")
    assert f"{runs[1]}, sam: 2 perturbations, as m is 5" in capsys.readouterr().out


@pytest.mark.usefixtures("curvature_aside")
def test_a_run_trained_otherwise_is_measured_anew(runs, tmp_path, monkeypatch):
    run = altered(runs[1], tmp_path)
    measure([run], tmp_path, "--perturbations", "own", "--micro-batches", "1")
    saved = yaml.safe_load((run / "settings.yaml").read_text())
    (run / "settings.yaml").write_text(yaml.safe_dump(saved | {"m": 3}))
    measure([run], tmp_path, "--perturbations", "own", "--micro-batches", "1")
    assert {row["m"] for row in rows(tmp_path)} == {"3"}


@pytest.mark.usefixtures("curvature_aside")
def test_a_model_replaced_in_place_is_measured_anew(runs, tmp_path):
    run = altered(runs[1], tmp_path)
    flags = ["--perturbations", "sam", "--micro-batches", "1"]
    measure([run], tmp_path, *flags)
    first, second = (row["sam_gap"] for row in rows(tmp_path))
    assert first != second
    shutil.copy(
        run / "epochs" / "0002" / "model.safetensors", run / "epochs" / "0001" / "model.safetensors"
    )
    measure([run], tmp_path, *flags)
    assert [row["sam_gap"] for row in rows(tmp_path)] == [second, second]


@pytest.mark.usefixtures("curvature_aside")
@pytest.mark.parametrize("examples", [6, 100])
def test_images_that_changed_in_place_are_measured_anew(runs, images, tmp_path, examples):
    shutil.copytree(images, tmp_path / "images")
    run = altered(runs[1], tmp_path, dataset=str(tmp_path / "images"))
    flags = ["--perturbations", "sam", "--micro-batches", "1", "--examples", str(examples)]
    found = []
    for _ in range(2):
        measure([run], tmp_path, *flags)
        found.append([row["sam_gap"] for row in rows(tmp_path)])
        for file in (tmp_path / "images" / "train").rglob("*.png"):
            Image.open(file).rotate(90).save(file)
    assert found[0] != found[1]


def test_a_runs_accuracy_is_that_of_its_last_epoch_on_test(tmp_path):
    for name in ("0002", "0010", "0001"):
        (tmp_path / "epochs" / name).mkdir(parents=True)
        (tmp_path / "epochs" / name / "config.json").write_text('{"num_classes": 3}')
    (tmp_path / "settings.yaml").write_text("method: sam")
    results = {"last": {"validation": 0.1, "test": 0.2}, "best": {"validation": 0.3, "test": 0.4}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    run = measure_forgetting.read_run(tmp_path)
    assert (run["accuracy"], run["settings"].method) == (0.2, "sam")
    assert run["label_names"] == ["0", "1", "2"]
    assert [epoch.name for epoch in run["epochs"]] == ["0001", "0002", "0010"]
    (tmp_path / "results.json").write_text(json.dumps({"last": {"validation": 0.1}}))
    assert measure_forgetting.read_run(tmp_path)["accuracy"] == 0.1


# --------------------------------------------------------------------------------------------------
# What cannot be said


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--perturbations", "sam", "sam"], "--perturbations names sam twice"),
        (["--thresholds", "0.5", "0.50"], "--thresholds names 0.5 twice"),
    ],
)
def test_what_would_count_twice(runs, tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        measure(runs[:1], tmp_path, *flags)
    with pytest.raises(InputError, match=f"--runs names {runs[0]} twice"):
        measure([runs[0], runs[0] / "epochs" / ".."], tmp_path)


def test_an_output_that_cannot_be_written(runs, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(
        InputError, match=f"cannot write to --output {tmp_path}/out .*: choose another"
    ):
        measure(runs, tmp_path)


@pytest.mark.usefixtures("curvature_aside")
def test_what_there_is_not_is_said_and_is_null_in_json(runs, tmp_path, capsys):
    found = measure(runs, tmp_path, "--perturbations", "sam", "--micro-batches", "1")
    assert len(found) == 2 * 2 * 3 * len(
        rank_correlations.QUANTITIES
    )  # epochs, targets; nothing, rho or method fixed
    printed = capsys.readouterr().out
    assert "nan" not in printed
    text = (tmp_path / "out" / "correlations.json").read_text()
    saved = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    flat = [one for one in saved["correlations"] if one["quantity"] == "flatness"]
    assert flat and all(one["above_p"] is None and one["runs"] == 4 for one in flat)


def test_a_sweeps_table_has_the_mean_over_seeds(capsys):
    rows = [
        {"point": {"seed": i}, "results": {"test": value}} for i, value in enumerate((0.5, 0.6))
    ]
    report.show_sweep(rows, [])
    assert f"55.00 ± {10 / math.sqrt(2):.2f}" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# One model, whose own perturbation differs from every default


def measured(trained=None, **changes):
    """``measure`` of a linear model, and what it needs."""
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3).double()
    model.get_classifier = lambda: model
    x, y = torch.randn(12, 5, dtype=torch.float64), torch.arange(12) % 3
    usual = {
        "examples": 12,
        "hessian_examples": 4,
        "thresholds": [0.2, 0.35, 0.5],
        "link": "softmax",
        "rho": None,
    }
    usual |= {
        "micro_batches": 2,
        "batch_size": 5,
        "average_rho": 0.1,
        "worst_rho": 0.01,
        "seed": 3,
        "miller_madow": True,
        "perturbations": ["own"],
        "m": None,
    }
    usual |= {"adjust_thresholds": True}
    args = argparse.Namespace(**usual | {"gamma": 1.0, "lam": None} | changes)
    own = argparse.Namespace(
        method="asam+obf", adaptive="before", rho=0.7, rho_min=None, m=3, perturb_fraction=1.0,
        gamma=0.5, lam=0.2, link="softmax", loss="ce", smoothing=0.1,
    )  # fmt: skip
    vars(own).update(trained or {})
    run = {"settings": own, "images": 12, "folder": "run"}

    def batches(start, stop, size=5):
        return list(zip(x[start:stop].split(size), y[start:stop].split(size)))

    return measure_forgetting.measure(args, run, 1, model, batches), model, x, y


def test_own_is_the_runs_method_rho_m_gamma_lambda_link_and_adaptive():
    result, model, x, y = measured()
    found, expected = result["perturbations"]["own"], []
    thresholds = torch.tensor([0.2, 0.35, 0.5], dtype=torch.float64)
    for part in (slice(0, 3), slice(3, 6)):
        logits = model(x[part])
        p, target = logits.detach().softmax(-1), F.one_hot(y[part], 3)
        alpha = 0.5 * ((1 - 0.2 / (p * target).sum(-1, keepdim=True)) / 0.8).clamp_min(0)
        assert alpha.max() > 0
        ascended = ((1 / 3 - alpha * p - (1 - alpha) * target) * logits).sum(-1).mean()
        grads = torch.autograd.grad(ascended, list(model.parameters()))
        grads = [w.detach().abs() * g for w, g in zip(model.parameters(), grads)]
        norm = sum(g.square().sum() for g in grads).sqrt()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for w, g in zip(moved.parameters(), grads):
                w += 0.7 * g / norm
            batch = (model(x).softmax(-1), moved(x).softmax(-1), y)
            criterion = LabelSmoothingCrossEntropy(0.1)
            gap = criterion(moved(x[part]), y[part]) - criterion(model(x[part]), y[part])
        info = forgetting([batch], thresholds, miller_madow=True)
        assert not torch.allclose(info["forgetting"], forgetting([batch], thresholds)["forgetting"])
        relevant = (info["relevant_perturbed"] - info["relevant"]).mean()
        expected.append((info["forgetting"].item(), relevant.item(), gap.item()))
    clean, bits = model(x).softmax(-1), []
    for threshold in (0.2, 0.35, 0.5):  # Miller and Madow: in each class, patterns seen less one
        labels = [(clean > threshold)[y == k].unique(dim=0) for k in y.unique()]
        nats = sum(len(patterns) - 1 for patterns in labels) / (2 * len(y))
        bits.append(counted_entropy(clean, y, threshold) + nats / np.log(2))
    assert result["information"] == pytest.approx(bits)
    for key, value in zip(("forgetting", "relevant_change", "sam_gap"), np.mean(expected, 0)):
        assert abs(value) > 1e-4
        assert found[key] == pytest.approx(value, rel=1e-6)


def test_images_that_fill_no_micro_batch_are_not_perturbed_with():
    """Twelve images hold two micro-batches of five."""
    two, more, one = (
        measured(m=5, micro_batches=number)[0]["perturbations"]["own"] for number in (2, 9, 1)
    )
    assert two == more and two["forgetting"] != one["forgetting"]


SHARED = {"dataset": "a", "validation_share": 0.1, "train_share": 0.1, "train_split": "train"}


@pytest.mark.parametrize(
    "key", ["dataset", "validation_share", "train_share", *vars(data.NO_NAMES)]
)
def test_runs_that_did_not_share_their_images_are_not_compared(key):
    def run(folder, **changes):
        own = argparse.Namespace(**SHARED | changes)
        return {"folder": folder, "settings": own, "label_names": ["cat", "dog"]}

    measure_forgetting.check_alike([run("one"), run("two")])
    words = f"must share their {key}: one has .* and two has other: measure them apart"
    with pytest.raises(InputError, match=words):
        measure_forgetting.check_alike([run("one"), run("two", **{key: "other"})])


def test_thresholds_at_which_every_image_has_a_pattern_of_its_own_are_named():
    labels = [0] * 8 + [1] * 2  # told apart entirely, they are 8/10 log2 8 + 2/10 log2 2 = 2.6 bits
    measured = [(None, None, {"information": bits}) for bits in ([2.6, 2.0, 2.4], [1.0, 2.0, 2.5])]
    assert measure_forgetting.saturated(measured, [0.1, 0.5, 0.9], labels) == [0.1, 0.9]


def test_the_same_thresholds_hold_for_the_perturbed_model_if_asked_for():
    found = {
        adjust: measured(adjust_thresholds=adjust, perturbations=["sam"], rho=0.7)[0]
        for adjust in (True, False)
    }
    same, adjusted = (
        found[adjust]["perturbations"]["sam"]["by_threshold"] for adjust in (False, True)
    )
    assert same != adjusted
    _, model, x, y = measured()
    lost = []
    for part in (slice(0, 3), slice(3, 6)):
        grads = torch.autograd.grad(
            LabelSmoothingCrossEntropy(0.1)(model(x[part]), y[part]), list(model.parameters())
        )
        norm = sum(g.square().sum() for g in grads).sqrt()
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for w, g in zip(moved.parameters(), grads):
                w += 0.7 * g / norm
            clean, perturbed = model(x).softmax(-1), moved(x).softmax(-1)
        lost.append(
            [
                counted_entropy(clean, y, t) - counted_entropy(perturbed, y, t)
                for t in (0.2, 0.35, 0.5)
            ]
        )
    corrected = measured(
        adjust_thresholds=False, perturbations=["sam"], rho=0.7, miller_madow=False
    )[0]
    assert corrected["perturbations"]["sam"]["by_threshold"] == pytest.approx(np.mean(lost, 0))


@pytest.mark.parametrize("link", ["sigmoid", "softmax"])
def test_confident_predictions_are_told_apart(link):
    """In single precision they are all 1, and thresholds between them would see no difference."""
    logits = torch.tensor([[20.0, 0.0], [25.0, 0.0], [30.0, 0.0], [35.0, 0.0]])
    found = measure_forgetting.logits_of(torch.nn.Identity(), [(logits, None)])
    found = measure_forgetting.predictions(found, link)
    sure = found[:, 0].tolist()
    assert sorted(set(sure)) == sure and sure[-1] < 1


def test_accuracy_on_the_images_measured_is_the_share_whose_most_likely_class_is_right():
    result, model, x, y = measured()
    assert result["measured_accuracy"] == (model(x).argmax(-1) == y).double().mean().item()


def test_others_than_own_have_gamma_and_lambda_of_the_flags_and_all_of_the_micro_batch():
    flags = {"perturbations": ["sam", "obf"], "rho": None, "m": None, "gamma": 0.3, "lam": 0.1}
    own = {
        "method": "asam+obf",
        "m": 3,
        "gamma": 0.5,
        "lam": 0.2,
        "link": "softmax",
        "perturb_fraction": 0.5,
    }
    run = {"settings": argparse.Namespace(**own), "folder": "run"}
    found = measure_forgetting.perturbations(argparse.Namespace(**flags), run, 0.7)
    for kind, of_obf in (("sam", [None] * 3), ("obf", [0.3, 0.1, "softmax"])):
        expected = {"method": kind, "m": 3, "perturb_fraction": 1.0, "rho": 0.7}
        assert vars(found[kind]) == expected | dict(zip(("gamma", "lam", "link"), of_obf))


@pytest.mark.parametrize("share, made", [(1.0, 2), (0.5, 4)])
def test_a_perturbation_that_is_the_same_as_another_is_made_once(monkeypatch, share, made):
    count, usual = [], measure_forgetting.forgetting
    monkeypatch.setattr(
        measure_forgetting, "forgetting", lambda *a, **k: count.append(1) or usual(*a, **k)
    )
    none = dict.fromkeys(("adaptive", "gamma", "lam", "link"))
    trained = {"method": "sam", "m": 4, "perturb_fraction": share, **none}
    found = measured(trained, perturbations=["own", "sam"])[0]["perturbations"]
    assert len(count) == made and (found["own"] == found["sam"]) == (made == 2)


def test_curvature_is_that_of_the_examples_asked_for():
    for count in (4, 12):
        result, model, x, y = measured(hessian_examples=count)
        batch = [(x[:count], y[:count])]
        own = flatness.curvature(model, LabelSmoothingCrossEntropy(0.1), lambda *_: batch, count)
        assert result["lambda_max"] == pytest.approx(own["lambda_max"], rel=1e-4)


def test_standard_errors_are_over_micro_batches():
    def forgotten(batches):
        return measured(micro_batches=batches)[0]["perturbations"]["own"]

    one, two = forgotten(1), forgotten(2)
    for key in ("forgetting", "relevant_change", "sam_gap"):
        other = 2 * two[key] - one[key]  # of the second micro-batch
        assert abs(one[key] - other) > 1e-4
        assert two[f"{key}_se"] == pytest.approx(abs(one[key] - other) / 2)
        assert one[f"{key}_se"] is None


@pytest.mark.parametrize("flag, m, count", [(None, 4, 3), (5, 5, 2), (20, 12, 1)])
def test_adaptive_sharpness_is_the_mean_over_micro_batches(monkeypatch, flag, m, count):
    monkeypatch.setattr(measure_forgetting, "SHARPNESS_M", 4)
    changes = {"m": flag} if flag != 20 else {"m": 20, "perturbations": []}
    result, model, x, y = measured(**changes)
    params, generator = list(model.parameters()), torch.Generator().manual_seed(3)
    average, worst = [], []
    for start in range(0, m * count, m):
        loss = sharpness.loss_of(model, x[start : start + m], y[start : start + m])
        draws, steps = measure_forgetting.DRAWS, measure_forgetting.STEPS
        average.append(sharpness.average_case(params, loss, 0.1, draws, generator))
        worst.append(sharpness.worst_case(params, loss, 0.01, steps))
    for key, values in (("average_sharpness", average), ("worst_sharpness", worst)):
        assert result[key] == pytest.approx(np.mean(values))
        error = np.std(values, ddof=1) / math.sqrt(count) if count > 1 else None
        assert result[f"{key}_se"] == pytest.approx(error)


def test_of_many_images_adaptive_sharpness_takes_some(monkeypatch):
    monkeypatch.setattr(measure_forgetting, "SHARPNESS_M", 4)
    every = measured()[0]["worst_sharpness"]
    monkeypatch.setattr(measure_forgetting, "SHARPNESS_IMAGES", 9)  # two micro-batches
    some = measured()[0]["worst_sharpness"]
    assert some != every and some == measured(examples=8)[0]["worst_sharpness"]


@pytest.mark.parametrize("setting, measure", [("average", "average"), ("worst", "worst")])
def test_each_sharpness_has_a_rho_of_its_own(setting, measure):
    usual, other = (measured(**{f"{setting}_rho": rho})[0] for rho in (0.01, 0.05))
    changed = {key for key in usual if usual[key] != other[key]}
    assert changed == {f"{measure}_sharpness"} and other[f"{measure}_sharpness"] != 0


def test_loss_and_feature_rank_are_of_the_images_measured():
    result, model, x, y = measured()
    expected = LabelSmoothingCrossEntropy(0.1)(model(x), y).item()
    assert result["measured_loss"] == pytest.approx(expected)
    assert result["feature_rank"] == features.rank(x)
    few = measured(examples=3)[0]  # span two dimensions
    assert few["feature_rank"] == 2 != result["feature_rank"]


@pytest.mark.parametrize(
    "loss, flag, link",
    [
        ("ce", None, "softmax"),
        ("bce", None, "sigmoid"),
        ("ce", "sigmoid", "sigmoid"),
        ("bce", "softmax", "softmax"),
    ],
)
def test_predictions_are_in_the_link_of_the_runs_loss_unless_one_is_given(loss, flag, link):
    result, model, x, y = measured({"loss": loss}, link=flag, miller_madow=False)
    function = {"softmax": lambda logits: logits.softmax(-1), "sigmoid": torch.sigmoid}[link]
    expected = [counted_entropy(function(model(x)), y, t) for t in (0.2, 0.35, 0.5)]
    assert result["link"] == link and result["information"] == pytest.approx(expected)


def test_a_shift_of_logits_that_softmax_ignores_changes_no_forgetting_by_default():
    def forgotten(shift, **changes):
        with pytest.MonkeyPatch.context() as patch:
            usual = measure_forgetting.logits_of
            shifted = lambda *of: usual(*of) + shift  # noqa: E731
            patch.setattr(measure_forgetting, "logits_of", shifted)
            return measured(**changes)[0]["perturbations"]["own"]["forgetting"]

    assert forgotten(1.0, link=None) == pytest.approx(forgotten(0.0, link=None))
    assert forgotten(1.0, link="sigmoid") != pytest.approx(forgotten(0.0, link="sigmoid"))


def test_images_that_are_made_anew_for_each_perturbation_give_the_same(monkeypatch):
    kept = measured()[0]
    monkeypatch.setattr(measure_forgetting, "KEPT", 0)
    assert measured()[0] == kept


def test_the_first_classifier_of_a_distilled_model_counts():
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=2)
    assert measure_forgetting.classifier_of(model) is model.head


def test_the_link_is_said():
    assert "of softmax predictions" in measure_forgetting.link_remark(["softmax"] * 2)
    both = measure_forgetting.link_remark(["softmax", "sigmoid", "softmax"])
    assert "softmax predictions for 2 and sigmoid predictions for 1 models" in both
    assert "give --link" in both


def test_defaults_are_those_of_the_page():
    args = measure_forgetting.parse(["--runs", "run"])
    assert (args.micro_batches, args.hessian_examples, args.link) == (16, 2048, None)


def test_noise_depends_on_the_seed_alone():
    def random(seed, before):
        draws = measured(perturbations=["random"], seed=seed)[0]["perturbations"]["random"][
            "sam_gap"
        ]
        torch.manual_seed(before)
        return draws

    assert random(3, before=1) == random(3, before=2) == random(3, before=3)
    assert random(4, before=1) != random(3, before=1)


@pytest.mark.parametrize(
    "counts, examples, words",
    [
        ((500, 499, 1), 100, "1 of 1000 images: give 1000$"),
        ((500, 497, 3), 100, "as c has 3 of 1000 images: give 334$"),
        ((20, 0, 20), 8, "there are no images of b: choose another --split"),
        ((20, 0, 20), 40, "there are no images of b: choose another --split"),
    ],
)
def test_a_class_that_none_of_the_chosen_images_might_show_is_named(counts, examples, words):
    def choose(examples):
        args = argparse.Namespace(examples=examples, seed=0)
        return measure_forgetting.choose_images(args, split)

    features = datasets.Features({"label": datasets.ClassLabel(names=["a", "b", "c"])})
    columns = {"label": np.repeat([0, 1, 2], counts)}
    split = datasets.Dataset.from_dict(columns, features=features)
    with pytest.raises(InputError, match=words):
        choose(examples)
    if given := re.search(r"give (\d+)", words):
        assert set(choose(int(given[1]))["label"]) == {0, 1, 2}


def test_so_many_examples_that_some_class_would_lack_the_rest_are_refused():
    features = datasets.Features(
        {"image": datasets.Value("int64"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    split = datasets.Dataset.from_dict(
        {"image": range(40), "label": [0, 1] * 20}, features=features
    )
    with pytest.raises(InputError, match="--examples 39 leaves out too few of 40 images: take all"):
        measure_forgetting.choose_images(argparse.Namespace(examples=39, seed=0), split)


def test_images_are_in_proportion_of_the_classes_and_others_for_another_seed():
    features = datasets.Features(
        {"image": datasets.Value("int64"), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    split = datasets.Dataset.from_dict(
        {"image": range(40), "label": [0] * 30 + [1] * 10}, features=features
    )
    chosen = {}
    for seed in (0, 1):
        images = measure_forgetting.choose_images(argparse.Namespace(examples=20, seed=seed), split)
        assert np.bincount(images["label"]).tolist() == [15, 5]
        chosen[seed] = set(images["image"])
        again = measure_forgetting.choose_images(argparse.Namespace(examples=20, seed=seed), split)
        assert again["image"] == images["image"]
    assert chosen[0] != chosen[1]
