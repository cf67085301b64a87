"""experiments/cifar10_20_seeds: its rows and tables on invented data, and its page's tables."""

import itertools
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from experiments import page
from experiments.cifar10_20_seeds import tables

SEEDS = range(100, 104)
POINTS = dict.fromkeys(tables.ORDER, 0.0) | {"SAM": 0.02, tables.FOUR_TIMES: 0.01}


@pytest.fixture
def invented(tmp_path, monkeypatch):
    """The last seed lacks a row of the first family; the second family has two seeds."""
    monkeypatch.setattr(tables, "DATA", tmp_path)
    second = {name for pair in tables.FAMILIES["2"] for name in pair} - {tables.TWICE}
    runs = []
    for row, seed in itertools.product(tables.ORDER, SEEDS):
        if (row, seed) == ("ASAM", 103) or (row in second and seed > 101):
            continue
        luck = 0.01 * (seed % 3) + 0.0005 * np.sin(7 * seed * (1 + POINTS[row]))
        run = {
            "row": row,
            "weight_decay": 0.01,
            "rho": 0.05,
            "seed": seed,
            "test": 0.6 + POINTS[row] + luck,
        }
        epochs = 120 if "four" in row else 60 if "twice" in row else 30
        seconds = epochs * (1 if row.startswith("base") else 2)
        run |= {"epochs": epochs, "seconds": seconds * (1 if seed < 102 else 3)}  # slower then
        runs.append(run | {"nll": 1.0, "ece": 0.1, "train": 0.9})
    page.write(tmp_path / "runs.csv", runs)
    tried = []
    for seed, lr, weight_decay in itertools.product((90, 91), (0.1, 0.2), (0.001, 0.01)):
        # The best of one run alone is not the best by the mean of both.
        held_out = 0.5 + lr - weight_decay + (0.3 if (seed, lr) == (90, 0.1) else 0)
        held_out -= 0.5 if (seed, lr) == (91, 0.1) else 0
        point = {"lr": lr, "weight_decay": weight_decay, "seed": seed, "validation": held_out}
        tried.append({"row": "base", "rho": 0.0} | point)
    for seed, rho in itertools.product((90, 91), (0.1, 0.2)):
        point = {"lr": 0.2, "weight_decay": 0.001, "rho": rho, "seed": seed}
        tried.append({"row": "SAM", "validation": 0.7 - rho} | point)
    page.write(tmp_path / "tune.csv", tried)


def test_a_seed_counts_where_every_row_of_the_first_family_has_it(invented):
    table = {row["row"]: row for row in tables.accuracy()}
    assert list(table) == tables.ORDER
    assert {row["n"] for name, row in table.items() if name in ("base", "SAM", "ASAM")} == {3}
    assert table[tables.FOUR_TIMES]["n"] == 2
    assert [table[name]["passes"] for name in tables.ORDER] == [1, 1, 1, 2, 2, 2, 2, 2, 4, 4, 4, 4]
    assert table["SAM"]["time"] == "2.0" and table[tables.FOUR_TIMES]["time"] == "4.0"
    assert table["base"]["rho"] == "" and table["SAM"]["rho"] == "0.05"
    assert float(re.match(r"[+-][\d.]+", table["SAM"]["points above base"])[0]) == pytest.approx(
        2, abs=0.1
    )


def test_p_values_are_corrected_within_each_family(invented):
    table = tables.decisive()
    assert [row["family"] for row in table] == ["1"] * 10 + ["2"] * 4
    runs = tables.runs_of_whole_seeds()
    for family, pairs in tables.FAMILIES.items():
        own = [row for row in table if row["family"] == family]
        for row, found in zip(own, page.compared(runs, pairs).values()):
            assert row["Holm"] == page.p_value(found["holm"])
    assert table[0]["comparison"] == "SAM against base"
    assert table[0]["verdict"] == "shown, and it matters"


def test_two_seeds_choose_lr_and_weight_decay_together_and_rho(invented):
    assert tables.base() == [
        {"weight_decay, held out, %": "0.001", "lr 0.1": "49.9", "lr 0.2": "**69.9**"},
        {"weight_decay, held out, %": "0.01", "lr 0.1": "49.0", "lr 0.2": "69.0"},
    ]
    assert tables.rho() == [
        {"row": "SAM, weight decay 0.001", "rho: held out, %": "**0.1: 60.0**, 0.2: 50.0"}
    ]


def test_data_files_are_made_from_the_runs_and_their_evaluation(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path / "data")
    split = {"image": [3, 1, 2, 0], "label": [3, 1, 2, 1]}
    monkeypatch.setattr(page, "training_images", lambda settings: split)
    monkeypatch.setattr(page, "predicted", lambda model, images: torch.tensor(images))
    settings = {"batch_size": 128, "m": 128, "lr": 0.2, "weight_decay": 0.001, "rho": 0.05}
    judged = {}

    def pretend(sweep, name, top1, seconds, **own):
        run = tmp_path / sweep / "runs" / name
        run.mkdir(parents=True)
        (run / "settings.yaml").write_text(yaml.safe_dump(settings | own))
        results = {"last": {"validation": top1, "test": top1}, "best": {"test": 0.0}}
        (run / "results.json").write_text(json.dumps(results))
        lines = [json.dumps({"epoch": i + 1, "seconds": one}) for i, one in enumerate(seconds)]
        (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        judged[str(run / "last")] = {"test": {"nll": 1.5, "ece": 0.2}}

    tuned = {"method": "base", "epochs": 30, "seed": 90}
    pretend("cifar10_20_seeds_tune", "a", 0.6, [1.0], **tuned)
    pretend("cifar10_20_seeds_rho", "a", 0.7, [1.0], **tuned | {"method": "obf"})
    pretend("cifar10_20_seeds", "a", 0.61, [1.0, 2.5], method="base", epochs=120, seed=100)
    pretend("cifar10_20_seeds", "b", 0.62, [4.0], method="sam", epochs=60, seed=101, m=32)
    pretend("cifar10_20_seeds", "c", 0.63, [4.0], method="sam", epochs=60, seed=100, m=32)
    (tmp_path / "cifar10_20_seeds_test").mkdir()
    found = tmp_path / "cifar10_20_seeds_test" / "results.json"
    found.write_text(json.dumps({"results": judged}))
    tables.collect(tmp_path)

    runs = pd.read_csv(tmp_path / "data" / "runs.csv")
    assert runs["row"].tolist() == ["SAM, m 32, twice the epochs"] * 2 + [tables.FOUR_TIMES]
    assert runs["seed"].tolist() == [100, 101, 100]
    recipe = {"method": "base", "epochs": 30, "m": 128, "batch_size": 128, "weight_decay": 5e-4}
    assert tables.row_of(recipe | {"seed": 90}) == "base"
    assert tables.row_of(recipe | {"seed": 100}) == tables.UNTUNED
    assert runs["test"].tolist() == [0.63, 0.62, 0.61]
    assert runs["seconds"].tolist() == [4.0, 4.0, 3.5]
    assert set(runs["nll"]) == {1.5} and set(runs["train"]) == {0.75}
    tried = pd.read_csv(tmp_path / "data" / "tune.csv")
    assert tried["row"].tolist() == ["base", "OBF, gamma to 0"]
    assert tried["validation"].tolist() == [0.6, 0.7]

    # Another machine has other runs, and one of the same, made anew.
    for sweep in ("cifar10_20_seeds", "cifar10_20_seeds_tune", "cifar10_20_seeds_rho"):
        shutil.rmtree(tmp_path / sweep)
    pretend("cifar10_20_seeds_tune", "a", 0.65, [1.0], **tuned)
    pretend("cifar10_20_seeds", "a", 0.64, [1.0], method="base", epochs=120, seed=100)
    pretend("cifar10_20_seeds", "b", 0.66, [1.0], method="base", epochs=30, seed=100)
    found.write_text(json.dumps({"results": judged}))
    tables.collect(tmp_path)
    runs = pd.read_csv(tmp_path / "data" / "runs.csv")
    assert runs["row"].tolist()[:3] == ["base", *["SAM, m 32, twice the epochs"] * 2]
    assert runs["test"].tolist() == [0.66, 0.63, 0.62, 0.64]
    assert pd.read_csv(tmp_path / "data" / "tune.csv")["validation"].tolist() == [0.65, 0.7]


@pytest.mark.skipif(not (tables.DATA / "runs.csv").exists(), reason="the runs have not ended yet")
@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_has_the_tables_of_the_data(name):
    text = (tables.HERE / "README.md").read_text()
    assert page.markdown(tables.TABLES[name]()) in text, f"run {tables.SCRIPT}"
