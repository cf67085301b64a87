"""The runs of experiments/text: which there are, what they train on, workers that share them."""

import argparse
import json

import datasets
import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student

pytest.importorskip("transformers", reason="needs transformers: pip install -r requirements.txt")
from experiments.text import run, tables


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


def test_runs_in_the_data_files_are_not_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    there = tmp_path / "outputs" / "text"
    make_all(there, "trec-1000", lambda point: 1 / (1 + point["lr"] + point["rho"]) - 1e-6)
    tables.collect(tmp_path / "outputs")
    elsewhere = tmp_path / "elsewhere"
    run.restore(elsewhere, tmp_path)
    points = run.points_of(elsewhere, "trec-1000")
    assert points == run.points_of(there, "trec-1000")
    for point in points:
        assert run.result_of(elsewhere, point)["accuracy"] == pytest.approx(
            run.result_of(there, point)["accuracy"], abs=1e-6
        )
    kept = run.file_of(elsewhere, points[0])
    kept.write_text(json.dumps({"accuracy": 0.0}))  # what is made here is not replaced
    run.restore(elsewhere, tmp_path)
    assert run.result_of(elsewhere, points[0]) == {"accuracy": 0.0}


def test_five_seeds_of_every_setting_come_before_more_of_any(tmp_path):
    make_all(tmp_path, "trec-1000", lambda point: point["lr"])
    for done in (tmp_path / "trec-1000" / "seeds").glob("*.json"):
        done.unlink()
    points = run.to_make(tmp_path, ["trec-1000", "trec-5452"])
    assert [p["setting"] for p in points[:90:30]] == ["trec-1000", "trec-5452", "trec-1000"]
    assert [p["seed"] for p in points] == sorted([*range(5)] * 6) * 2 + sorted([*range(5, 10)] * 6)
    run.write_result(run.file_of(tmp_path, points[0]), points[0])
    assert run.to_make(tmp_path, ["trec-1000", "trec-5452"]) == points[1:]


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


def test_labels_without_names(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(SystemExit, match="label must have the classes' names"):
        run.sentences(str(tmp_path), run.SETTINGS["trec-1000"], "tune", 0)


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


def seeds_file(folder, differences):
    """Runs of one setting: base for twice the epochs at 80 %, other rows above it by seed."""
    rows = []
    for row in run.ROWS:
        for seed, points in enumerate(differences.get(row, [0.0] * 5)):
            one = {"setting": "trec-5452", "row": row, "lr": 1e-4, "rho": 0.1, "seed": seed}
            rows.append({**one, "accuracy": 0.8 + points / 100, "nll": 1.0, "cpu_seconds": 2.0})
            rows[-1]["updates"] = 680 if "twice" in row else 340
    rows.append({**rows[0], "seed": 99})  # a seed that other rows lack
    frame = pd.DataFrame(rows, columns=[*tables.COLUMNS, "fitted", "fitted_wrong", *tables.COST])
    frame.to_csv(folder / "seeds.csv", index=False)


def test_what_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    ahead = {
        "SAM": [2.0, 2.2, 1.8, 2.1, 1.9],
        "OBF, gamma 1": [0.1, -0.1, 0.2, -0.2, 0.01],
        "OBF, gamma to 0": [4.0, -4.0, 3.0, -3.0, 0.1],
        "ASAM": [-0.3, -0.31, -0.29, -0.3, -0.3],
    }
    seeds_file(tmp_path, ahead)
    rows = tables.decisive()
    assert {row["n"] for row in rows} == {5} and len(rows) == 6
    p = []
    for row, other in tables.COMPARISONS:
        x = np.subtract(ahead[row], ahead.get(other, 0.0))
        t = x.mean() / (x.std(ddof=1) / 5**0.5)
        p.append(2 * student.sf(abs(t), 4))
        half = student.ppf(0.975, 4) * x.std(ddof=1) / 5**0.5
        text = f"{x.mean():+.2f} ({x.mean() - half:+.2f} to {x.mean() + half:+.2f})"
        assert rows[len(p) - 1]["points"] == text
    corrected, most = {}, 0.0
    for rank, i in enumerate(np.argsort(p)):
        most = max(most, min(1.0, (6 - rank) * p[i]))
        corrected[i] = f"p {most:.2f}" if most >= 0.01 else "p < 0.01"
    assert [row["Holm"] for row in rows] == [corrected[i] for i in range(6)]
    assert [row["verdict"] for row in rows] == [
        "shown, and it matters",
        "too small to matter",
        "not shown",
        "shown worse",
        "shown worse, and it matters",
        "not shown",
    ]


def test_fewer_than_five_seeds_decide_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    seeds_file(tmp_path, dict.fromkeys(run.ROWS, [0.0] * 4))
    assert not tables.measured()
    assert tables.decisive() == tables.accuracy() == [{"": "no setting has five seeds yet"}]
    seeds_file(tmp_path, {})
    assert list(tables.measured()) == ["trec-5452"]


def test_every_row_against_base(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    seeds_file(tmp_path, {"base": [1.0, 2.0, 3.0, 2.0, 2.0]})
    rows = tables.accuracy()
    assert [row["row"] for row in rows] == list(run.ROWS)
    assert rows[0]["test, %"] == "82.00 ± 0.71" and rows[0]["points above base"] == ""
    assert rows[2]["points above base"] == "-2.00 (-2.88 to -1.12)" and rows[2]["time"] == "1.00"
    assert "wrong labels given back, %" not in rows[0]
    assert [row["passes"] for row in rows] == ["1", "2", "2", "2", "2", "2"]


def test_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path / "data")
    make_all(tmp_path / "text", "trec-1000", lambda point: 0.5)
    tables.collect(tmp_path)
    tries, seeds = (pd.read_csv(tmp_path / "data" / f"{name}.csv") for name in ("tune", "seeds"))
    assert len(tries) == 48 and len(seeds) == 60
    assert list(seeds["row"][:20]) == ["base"] * 10 + ["base, twice the epochs"] * 10
    shown = tables.tuning()
    assert shown[0]["lr or rho: held out, %"].startswith("**2e-06: 50.0**, 5e-06: 50.0, ")
