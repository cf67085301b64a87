"""experiments/digits: its tables on invented data, and whether its page is up to date."""

import itertools

import pytest

from experiments import page
from experiments.digits import tables


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "DATA", tmp_path)
    return tmp_path


def test_a_method_is_shown_at_the_lr_and_rho_that_are_best_on_validation(data):
    rows = []
    for method, gamma, fraction in tables.NAMES:
        for lr, rho, seed in itertools.product((0.025, 0.05), ("", 0.02), (0, 1)):
            point = {"method": method, "gamma": gamma, "perturb_fraction": fraction}
            point |= {"lr": lr, "rho": rho, "seed": seed}
            best = (lr, rho) == (0.05, 0.02)
            point["validation"] = 0.9 + best / 100 - seed / 20  # of seed 1 less than of any seed 0
            rows.append(point | dict.fromkeys(tables.SPLITS, 0.8 + best / 10 + seed / 100))
    page.write(data / "methods.csv", rows)
    table = tables.methods_table()
    assert [row["method"] for row in table] == list(tables.NAMES.values())
    for row in table:
        assert (row["lr"], row["rho"], row["n"]) == ("0.05", "0.02", 2)
        assert row["sketch, %"] == "90.50 ± 0.71"


def test_differences_are_paired_by_seed_and_bold_if_they_survive_correction(data):
    rows, noise = [], [0.0, 0.02, 0.01, -0.01, 0.03]  # of a seed, alike in all methods
    for (method, gamma, fraction), seed in itertools.product(tables.NAMES, range(5)):
        point = {"method": method, "gamma": gamma, "perturb_fraction": fraction}
        point |= {"lr": 0.1, "rho": "", "seed": seed, "validation": 0.9}
        luck = 0.001 * (seed % 2)
        sure, unsure = 0.05 * (method == "sam") + luck, 0.01 * (seed - 2)
        accuracies = dict.fromkeys(tables.SPLITS, 0.5 + noise[seed])
        if method != "base":
            accuracies["test"] += sure
            accuracies["noisy"] += unsure
        rows.append(point | accuracies)
    page.write(data / "methods.csv", rows)
    table = {row["points above base"]: row for row in tables.differences_table()}
    assert list(table) == list(tables.NAMES.values())[1:]
    assert table["SAM"]["test"].startswith("**+5.04 (")
    assert table["SAM"]["noisy"].startswith("+0.00 (-1.96")


@pytest.mark.skipif(not (tables.HERE / "data").exists(), reason="the runs have not ended yet")
@pytest.mark.parametrize("name", tables.TABLES)
def test_the_page_has_the_tables_of_the_data(name):
    text = (tables.HERE / "README.md").read_text()
    assert page.markdown(tables.TABLES[name]()) in text, f"run {tables.SCRIPT}"
