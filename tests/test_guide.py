"""experiments/guide.py: its rows are those of the experiments' pages, and its places up to date."""

import re

import pytest

from experiments import guide, page
from experiments.cifar10 import tables as cifar10
from experiments.wrong_labels import tables as wrong_labels


def numbers(text):
    return re.findall(r"[+-]?[\d.]+", text)


def test_a_row_has_the_numbers_of_its_page():
    above = {row["method"]: row["above base"] for row in cifar10.differences_table()}
    times = {row["method"]: row["time"] for row in cifar10.methods_table()}
    for name, row in guide.with_right_labels().items():
        assert numbers(row["points above SGD (95 %)"]) == numbers(above[name])
        assert row["time"] == times[name] and row["n"] == 5
        surely = above[name].startswith("**")
        assert row["verdict"].startswith("shown") is surely
    decided = {row["comparison"]: row for row in wrong_labels.decisive()}
    for noise in wrong_labels.levels():
        for name, row in guide.with_wrong_labels(noise).items():
            if name == wrong_labels.BEST:
                assert row["verdict"] == "" and row["time"] == "1.0"
                continue
            expected = decided[f"{name} against {wrong_labels.LAST}"]
            assert row["points above SGD (95 %)"] == expected["points"]
            assert row["verdict"] == expected["verdict"]


def test_no_row_has_fewer_than_five_seeds():
    assert all(row["n"] >= 5 for row in guide.guide())


@pytest.mark.parametrize(
    "file, table", [("docs/guide.md", guide.guide), ("README.md", guide.headline)]
)
def test_the_guide_and_the_readme_have_the_tables_of_the_data(file, table):
    assert page.markdown(table()) in (page.ROOT / file).read_text(), f"run {guide.SCRIPT}"
