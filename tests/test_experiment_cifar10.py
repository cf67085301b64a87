"""experiments/cifar10: its tables on invented data, and whether its page is up to date."""

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import yaml
from helpers import fresh_process
from PIL import Image
from scipy.special import expit, logit
from scipy.stats import linregress
from timm.models import save_for_hf

import eval_robustness
from experiments import page
from experiments.cifar10 import tables
from robustness.intervals import over_seeds


def rows_of(function) -> dict[str, dict]:
    """A table's rows, by their first cell."""
    return {next(iter(row.values())): row for row in function()}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Data of three methods, three seeds and forty images; returns the runs, and who was right."""
    monkeypatch.setattr(tables, "DATA", tmp_path)
    rng, runs, right = np.random.default_rng(0), [], {}
    for row in ("base", "SAM", "base, twice the epochs"):
        for seed in range(3):
            run = f"{row}, seed {seed}"
            right[run] = rng.random(40) < 0.6
            values = dict(zip(("nll", "ece", "clean", "corrupted"), rng.uniform(0.4, 0.6, 4)))
            values |= {"rho": "", "top1": right[run].mean()}
            runs.append({"run": run, "row": row, "seed": seed} | values)
    seconds = [{"row": "base", "seconds": 4.0}, {"row": "SAM", "seconds": 8.4}]
    page.write(tmp_path / "time.csv", seconds)
    page.write(tmp_path / "runs.csv", runs)
    for name in ("right", "right_corrupted"):
        pd.DataFrame(right).to_parquet(tmp_path / f"{name}.parquet")
    return pd.DataFrame(runs), right


def test_accuracy_and_cost(data):
    runs, _ = data
    rows = rows_of(tables.methods_table)
    values = 100 * runs["top1"][:3]
    assert rows["base"]["test, %"] == f"{values.mean():.2f} ± {values.std():.2f}"
    assert [rows[name]["time"] for name in rows] == ["1.0", "2.0", "2.1"]


def test_differences_are_paired_by_seed_and_image(data):
    _, right = data
    pairs = [right[f"base, seed {i}"].astype(float) - right[f"SAM, seed {i}"] for i in range(3)]
    expected = over_seeds(np.mean(pairs, axis=1))
    shown = rows_of(tables.differences_table)["base"]["above SAM"]
    numbers = [100 * expected[key] for key in ("mean", "low", "high")]
    assert shown == "{:+.2f} ({:+.2f} to {:+.2f})".format(*numbers)


def test_only_seeds_that_both_rows_have_are_compared():
    one = {0: np.zeros(4), 2: np.ones(4)}
    other = {2: np.zeros(4), 0: np.zeros(4), 1: None}
    assert tables.difference({"one": one, "other": other}, "one", "other")["mean"] == 0.5


def test_the_best_try_is_marked(data, tmp_path):
    tries = ((0.1, 0.5), (0.2, 0.6))
    rows = [{"row": "SAM", "lr": "", "rho": rho, "validation": top1} for rho, top1 in tries]
    page.write(tmp_path / "tune.csv", rows)
    assert tables.tuning_table() == [
        {"method": "SAM", "try 1": "0.1: 50.00", "try 2": "**0.2: 60.00**"}
    ]


def test_transfer_pairs_each_row_with_its_rival(data, tmp_path):
    rng, runs, right = np.random.default_rng(1), [], {}
    for row in tables.TRANSFER:
        for seed in range(3):
            run = f"{row}, seed {seed}"
            right[run] = rng.random(40) < 0.6
            runs.append({"run": run, "row": row, "seed": seed, "before": 0.7 + seed / 100})
    page.write(tmp_path / "transfer.csv", runs)
    pd.DataFrame(right).to_parquet(tmp_path / "right_transfer.parquet")
    pairs = [
        right[f"obf, base, seed {i}"].astype(float) - right[f"sam, base, seed {i}"]
        for i in range(3)
    ]
    row = rows_of(tables.transfer_table)["obf, base"]
    assert row["before, on the first five, %"] == "71.00 ± 1.00"
    assert row["points"] == f"{tables.points(over_seeds(np.mean(pairs, axis=1)))} above sam, base"


def test_the_lines_slope_is_not_flattened_by_the_noise_of_few_images(data, tmp_path):
    rng, slope = np.random.default_rng(0), 0.8
    true = rng.normal(0.6, 0.1, 4000)  # logits
    runs = pd.DataFrame({"run": "a", "row": "base", "seed": range(4000)})
    runs["clean"], others = (expit(true + rng.normal(0, 0.1, 4000)) for _ in range(2))
    runs["top1"] = 0.2 * runs["clean"] + 0.8 * others
    runs["corrupted"] = expit(slope * true - 0.5)
    page.write(tmp_path / "runs.csv", runs)
    expected = runs["corrupted"] - expit(slope * logit(runs["clean"]) - 0.5)
    assert tables.above_line().to_numpy() == pytest.approx(expected.to_numpy(), abs=0.003)
    flat = linregress(logit(runs["clean"]), logit(runs["corrupted"])).slope
    assert flat == pytest.approx(slope / 2, abs=0.05)  # what the test above tells it from


@pytest.mark.parametrize(
    "mean, p, word",
    [(0.1, 0.04, "shown"), (-0.1, 0.04, "contradicted"), (-0.1, 0.05, "not shown")],
)
def test_a_claim_is_decided_by_its_corrected_p(mean, p, word):
    assert tables.verdict(mean, p) == word


def test_accuracy_by_m_is_of_what_was_trained_with_several_m(data, tmp_path):
    own = {"method": "sam", "rho": 0.05}
    rows = [own | {"m": m, "seed": s, "test": 0.6 + s / 100} for m in (16, 128) for s in (0, 2)]
    own = {"method": "obf", "rho": 0.05}
    rows += [own | {"m": m, "seed": s, "test": 0.5 + s / 100} for m in (16, 32) for s in (0, 1)]
    rows.append({"method": "sam", "rho": 0.2, "m": 128, "seed": 0, "test": 0.9})
    page.write(tmp_path / "m.csv", rows)
    sam, obf = tables.m_table()
    assert list(sam.values()) == ["sam", "0.05", "61.00 ± 1.41", "", "61.00 ± 1.41"]
    assert list(obf.values()) == ["obf", "0.05", "50.50 ± 0.71", "50.50 ± 0.71", ""]
    tables.draw_m(tmp_path / "m.png")
    tables.draw_methods(tmp_path / "methods.png")
    assert (tmp_path / "m.png").exists() and (tmp_path / "methods.png").exists()


def test_sam_at_a_small_m_is_beside_base_at_the_same_m(data, tmp_path):
    own = {"method": "sam", "rho": 0.05}
    accuracies = {32: (0.7, 0.72), 64: (0.66, 0.67), 128: (0.6, 0.61)}
    rows = [
        own | {"m": m, "seed": s, "test": a}
        for m in accuracies
        for s, a in enumerate(accuracies[m])
    ]
    page.write(tmp_path / "m.csv", rows)
    control = [{"m": 32, "seed": s, "test": a} for s, a in enumerate((0.5, 0.53))]
    page.write(tmp_path / "m_base.csv", control)
    small, middle, base = tables.m_compared_table()
    assert [row[""] for row in (small, middle, base)] == [
        "SAM, rho 0.05, m 32", "SAM, rho 0.05, m 64", "base, m 32",
    ]  # fmt: skip
    assert small["above SAM at m 128"].startswith("+10.50")
    assert small["above base at the same m"].startswith("+19.50")
    assert "above base at the same m" not in middle
    right = tables.per_image("right")["base"]
    expected = 100 * np.mean([0.5 - right[0].mean(), 0.53 - right[1].mean()])
    assert base["above base"].startswith(f"{expected:+.2f}")


def test_runs_find_their_rows():
    recipe = yaml.safe_load((page.ROOT / "recipes" / "cifar" / "scratch.yaml").read_text())
    twice = {"method": "base", "epochs": str(2 * recipe["epochs"]), "seed": "1", "lr": "0.1"}
    assert tables.row_of(twice) == "base, twice the epochs"
    with pytest.raises(ValueError, match="no row of the table"):
        tables.row_of({"method": "sam", "epochs": "7"})


def test_data_is_collected_from_what_sweep_and_evaluation_write(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path / "data")
    outputs = tmp_path / "cifar10"
    rng, classes = np.random.default_rng(0), ["cat", "dog"]
    for name in (f"{label}/{i}.png" for label in classes for i in range(4)):
        file = tmp_path / "images" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=2)
    run = outputs / "methods" / "runs" / "method=sam,rho=0.05,seed=3"
    names = {"label_names": classes}
    config = {"input_size": (3, 32, 32)}
    options = {"model_config": names, "data_config": config, "safe_serialization": True}
    save_for_hf(model, run / "last", **options)
    sweep = {"run": run, "method": "sam", "rho": 0.05, "seed": 3, "test": 0.5}
    pd.DataFrame([sweep]).to_csv(outputs / "methods" / "sweep.csv", index=False)
    fresh_process()
    common = ["--model", str(run / "last"), "--workers", "0", "--data"]
    images = tmp_path / "images"
    on_test = [f"test={images}", "--output", str(outputs / "test")]
    eval_robustness.main(common + on_test)
    on_subset = [f"subset={images}", "--corrupt", "--output", str(outputs / "corrupted")]
    eval_robustness.main(common + on_subset)
    tables.collect_runs(outputs)
    (found,) = page.read(tmp_path / "data" / "runs.csv").to_dict("records")
    assert (found["run"], found["rho"], found["seed"]) == ("SAM, seed 3", "0.05", 3)
    right = tables.per_image("right")["SAM"][3]
    shares = tables.per_image("right_corrupted")["SAM"][3]
    assert len(right) == len(shares) == 8 and found["top1"] == right.mean() == found["clean"]
    assert found["corrupted"] == pytest.approx(shares.mean())


def test_a_page_has_a_place_for_every_table_and_no_other(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("above\n<!-- script: one -->\nold\n<!-- end -->\nbelow\n")
    made = {"one": lambda: [{"a": 1}, {"a": 2, "b": 3}]}
    page.fill(file, "script", made)
    text = file.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "| a | b |\n| --- | --- |\n| 1 |  |\n| 2 | 3 |\n" in text
    page.fill(file, "script", made)
    assert file.read_text() == text
    for wrong in ({}, made | {"two": list}):
        with pytest.raises(SystemExit, match="differ in their tables"):
            page.fill(file, "script", wrong)
    assert file.read_text() == text


@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_has_the_tables_of_the_data(name):
    text = (tables.HERE / "README.md").read_text()
    assert page.markdown(tables.TABLES[name]()) in text, f"run {tables.SCRIPT}"
