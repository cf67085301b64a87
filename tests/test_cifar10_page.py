"""docs/cifar10.py, which makes the page's tables and pictures, on invented data files."""

import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy.special import expit, logit
from scipy.stats import linregress

from robustness import statistics

ROOT = Path(__file__).parent.parent


@pytest.fixture
def page(tmp_path):
    """The script's names, at home in a folder with data of two methods, three seeds and forty images."""
    script = runpy.run_path(str(ROOT / "docs" / "cifar10.py"))
    names = script["main"].__globals__
    names.update(FILES=tmp_path / "data", PAGE=tmp_path / "page.md", PICTURES=tmp_path)
    rng, runs, right = np.random.default_rng(0), [], {}
    for row in ("base", "SAM", "base, twice the epochs"):
        for seed in range(3):
            run = f"{row}, seed {seed}"
            right[run] = rng.random(40) < 0.6
            values = dict(zip(("nll", "ece", "clean", "corrupted"), rng.uniform(0.4, 0.6, 4)))
            values |= {"rho": "", "top1": right[run].mean()}
            runs.append({"run": run, "row": row, "seed": seed} | values)
    names["write"]("time", [{"row": "base", "seconds": 4.0}, {"row": "SAM", "seconds": 8.4}])
    names["write"]("runs", runs)
    names["write"]("tune", [{"row": "SAM", "lr": "", "rho": r, "validation": v} for r, v in ((0.1, 0.5), (0.2, 0.6))])
    for name in ("right", "right_corrupted"):
        pq.write_table(pa.table(right), names["FILES"] / f"{name}.parquet")
    return names, runs, right


def cells(text, row):
    line = next(line for line in text.splitlines() if line.startswith(f"| {row} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_hold_means_costs_and_paired_differences(page, tmp_path):
    names, runs, right = page
    marks = "<!-- docs/cifar10.py: {} -->\nold\n<!-- end -->\n"
    names["PAGE"].write_text("above\n" + marks.format("methods") + marks.format("tuning") + "below\n")
    names["main"]([])
    text = names["PAGE"].read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    _, _, _, time, top1, _, to_sam, *_ = cells(text, "base")
    values = [100 * run["top1"] for run in runs[:3]]
    assert (time, top1) == ("1.00", f"{np.mean(values):.2f} ± {np.std(values, ddof=1):.2f}")
    pairs = [right[f"base, seed {i}"].astype(float) - right[f"SAM, seed {i}"] for i in range(3)]
    expected = statistics.crossed(np.stack(pairs))
    assert to_sam == "{mean:+.2f} ({low:+.2f} to {high:+.2f})".format(**{k: 100 * v for k, v in expected.items()})
    assert cells(text, "base, twice the epochs")[3] == "2.00" and cells(text, "SAM")[3] == "2.10"
    assert "**0.2: 60.00**" in text and "**0.1" not in text
    assert (tmp_path / "cifar10_methods.png").exists() and (tmp_path / "cifar10_methods.svg").exists()
    names["main"]([])
    assert names["PAGE"].read_text() == text


def test_the_pages_tables_are_those_of_the_data_files(tmp_path):
    names = runpy.run_path(str(ROOT / "docs" / "cifar10.py"))["main"].__globals__
    text = names["PAGE"].read_text()
    names.update(PAGE=tmp_path / "page.md", PICTURES=tmp_path)
    names["PAGE"].write_text(text)
    names["main"]([])
    assert names["PAGE"].read_text() == text, "run python docs/cifar10.py"


def test_transfer_pairs_each_row_with_its_rival(page):
    names, *_ = page
    rng, runs, right = np.random.default_rng(1), [], {}
    for row in names["TRANSFER"]:
        for seed in range(3):
            run = f"{row}, seed {seed}"
            right[run] = rng.random(40) < 0.6
            runs.append({"run": run, "row": row, "seed": seed, "before": 0.7 + seed / 100})
    names["write"]("transfer", runs)
    pq.write_table(pa.table(right), names["FILES"] / "right_transfer.parquet")
    pairs = [right[f"obf, base, seed {i}"].astype(float) - right[f"sam, base, seed {i}"] for i in range(3)]
    expected = names["points"](statistics.crossed(np.stack(pairs)))
    assert cells(names["transfer_table"](), "obf, base")[1::2] == ["71.00 ± 1.00", f"{expected} above sam, base"]


def test_points_above_the_line_are_those_of_all_runs(page):
    names, runs, _ = page
    clean, corrupted = (np.array([run[key] for run in runs]) for key in ("clean", "corrupted"))
    line = linregress(logit(clean), logit(corrupted))
    above = corrupted - expit(line.slope * logit(clean) + line.intercept)
    assert names["above_line"]()["SAM"] == pytest.approx(above[3:6])


@pytest.mark.parametrize(
    "low, high, word", [(0.1, 0.2, "supported"), (-0.2, -0.1, "contradicted"), (-1, 1, "undecided")]
)
def test_a_claim_is_decided_by_an_interval_without_zero(page, low, high, word):
    assert page[0]["verdict"]({"low": low, "high": high}) == word


def test_a_page_without_a_place_is_refused_and_seeds_are_matched_by_number(page):
    names, *_ = page
    names["PAGE"].write_text("nothing")
    with pytest.raises(SystemExit, match="no place for a table"):
        names["main"]([])
    values = {"one": {"0": np.zeros(4), "2": np.ones(4)}, "other": {"2": np.zeros(4), "0": np.zeros(4), "1": None}}
    assert names["against"](values, "one", "other")["mean"] == 0.5


def test_twice_the_epochs_is_twice_the_recipes(page):
    names, *_ = page
    recipe = yaml.safe_load((ROOT / "recipes" / "cifar" / "scratch.yaml").read_text())
    assert int(names["ROWS"]["base, twice the epochs"][0]["epochs"]) == 2 * recipe["epochs"]
    assert names["row_of"]({"method": "base", "epochs": "60", "seed": "1", "lr": "0.1"}) == "base, twice the epochs"
    with pytest.raises(ValueError, match="no row of the table"):
        names["row_of"]({"method": "sam", "epochs": "7"})


def test_accuracy_by_m_has_means_over_seeds_of_what_was_trained_with_several_m(page, tmp_path):
    names, *_ = page
    rows = [{"method": "sam", "rho": 0.05, "m": m, "seed": s, "test": 0.6 + s / 100} for m in (16, 128) for s in (0, 2)]
    rows += [{"method": "obf", "rho": 0.05, "m": m, "seed": s, "test": 0.5 + s / 100} for m in (16, 32) for s in (0, 1)]
    names["write"]("m", [*rows, {"method": "sam", "rho": 0.2, "m": 128, "seed": 0, "test": 0.9}])
    text = names["m_table"]()
    assert cells(text, "sam")[1:] == ["0.05", "61.00 ± 1.41", "", "61.00 ± 1.41"]
    assert cells(text, "obf")[1:] == ["0.05", "50.50 ± 0.71", "50.50 ± 0.71", ""]
    assert text.count("| sam |") == 1
    names["draw_m"](tmp_path / "m.png")
    assert (tmp_path / "m.png").exists()
