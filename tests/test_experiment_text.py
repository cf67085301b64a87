"""The runs of experiments/text: which there are, what they train on, workers that share them."""

import argparse
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements.txt")
FOLDER = Path(__file__).parent.parent / "experiments" / "text"
sys.path.insert(0, str(FOLDER))
import run  # noqa: E402


def pretend(output, point, accuracy):
    file = run.file_of(output, point)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**point, "accuracy": accuracy}))


def make_all(output, setting, accuracy_of):
    """Pretend runs until none is left; the tries of each row, in the order in which they came."""
    tries = {}
    while todo := [
        point for point in run.points_of(output, setting) if not run.file_of(output, point).exists()
    ]:
        point = todo[0]
        if point["part"] == "tune":
            tries.setdefault(point["row"], []).append(point[run.ROWS[point["row"]][0]])
        pretend(output, point, accuracy_of(point))
    return tries


def test_the_best_lies_inside_the_grid_or_the_grid_grows(tmp_path):
    best = {
        **{"base": 1e-4, "base, twice the epochs": 1e-5, "SAM": 0.5, "OBF, gamma 1": 0.02},
        **{"OBF, gamma to 0": 1e9, "ASAM": 0.02},
    }

    def accuracy(point):
        tuned = run.ROWS[point["row"]][0]
        return -abs(np.log(point[tuned] / best[point["row"]]))

    tries = make_all(tmp_path, "trec-1000", accuracy)
    rho = [0.01, 0.02, 0.05, 0.1, 0.2]
    assert tries == {
        "base": run.LR,
        "base, twice the epochs": [*run.LR, 1e-5, 5e-6],
        "SAM": [*rho, 0.5, 1.0],
        "OBF, gamma 1": rho,
        "OBF, gamma to 0": [*rho, 0.5, 1.0, 2.0],  # eight, and no more
        "ASAM": [*run.ASAM_RHO, 0.05, 0.02, 0.01],
    }
    seeds = [p for p in run.points_of(tmp_path, "trec-1000") if p["part"] == "seeds"]
    assert len(seeds) == 60
    found = {p["row"]: (p["lr"], p["rho"]) for p in seeds}
    assert found == {
        "base": (1e-4, 0.0),
        "base, twice the epochs": (1e-5, 0.0),
        "SAM": (1e-4, 0.5),
        "OBF, gamma 1": (1e-4, 0.02),
        "OBF, gamma to 0": (1e-4, 2.0),
        "ASAM": (1e-4, 0.02),
    }
    assert [p["seed"] for p in seeds[:7]] == [0] * 6 + [1]
    taken_over = run.points_of(tmp_path, "trec-5452")
    assert {p["row"]: (p["lr"], p["rho"]) for p in taken_over} == found
    assert len(taken_over) == 30 and {p["part"] for p in taken_over} == {"seeds"}


def test_of_equals_the_least(tmp_path):
    tries = make_all(tmp_path, "trec-1000", lambda point: 0.5)
    assert tries["SAM"] == [0.01, 0.02, 0.05, 0.1, 0.2, 0.005, 0.002, 0.001]
    rhos = {p["rho"] for p in run.points_of(tmp_path, "trec-1000") if p["part"] == "seeds"}
    assert 0.001 in rhos


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    label = datasets.ClassLabel(names=list("abcdef"))
    for split, size in (("train", 2100), ("test", 20)):
        rows = {
            "text": [f"{split} {i}" for i in range(size)],
            "label": [i % 6 for i in range(size)],
        }
        features = datasets.Features({"text": datasets.Value("string"), "label": label})
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"{split}.parquet")
    return str(folder)


def test_sentences(questions):
    setting = {"examples": 1000, "noise": 0.4}
    train, held_out = run.sentences(questions, setting, "tune", 3)
    true = [int(text.split()[1]) % 6 for text in train["text"]]
    changed = np.array(true) != np.array(train["label"])
    assert changed.sum() == 400 and np.array_equal(changed, train["wrong"])
    assert np.bincount((np.array(train["label"]) - true) % 6, minlength=6)[1:].min() > 40
    assert len(held_out) == 1000 and not set(held_out["text"]) & set(train["text"])
    assert [int(text.split()[1]) % 6 for text in held_out["text"]] == list(held_out["label"])
    other, again = run.sentences(questions, setting, "tune", 4)
    assert again["text"] == held_out["text"] and set(other["text"]) != set(train["text"])
    judged, test = run.sentences(questions, setting, "seeds", 3)
    assert judged["text"] == train["text"] and judged["label"] == train["label"]
    assert len(test) == 20
    everything, _ = run.sentences(questions, {"examples": 2100, "noise": 0.0}, "seeds", 0)
    assert len(set(everything["text"])) == 2100 and not any(everything["wrong"])


def test_workers_share_and_a_result_is_whole(tmp_path, monkeypatch):
    args = argparse.Namespace(output=tmp_path)
    todo, made = run.points_of(tmp_path, "trec-1000")[:2], []

    def made_up(args, point):
        made.append(point)
        if len(made) == 1:  # another worker, that comes while the first is at work
            assert run.make_one(args, todo) and not run.make_one(args, todo)
        return {**point, "accuracy": 0.5, "cpu_seconds": 1.0}

    monkeypatch.setattr(run, "run", made_up)
    assert run.make_one(args, todo)
    assert made == todo and not run.make_one(args, todo)
    assert run.result_of(tmp_path, todo[0])["accuracy"] == 0.5

    third = run.points_of(tmp_path, "trec-1000")[2:3]
    monkeypatch.setattr(run, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run.make_one(args, third)
    monkeypatch.setattr(run, "run", made_up)
    assert run.result_of(tmp_path, third[0]) is None and run.make_one(args, third)
