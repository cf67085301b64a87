"""experiments/guide.py: its rows are those of the experiments' pages, and its places up to date."""

import pytest

from experiments import guide, page
from experiments.cifar10_20_seeds import tables as right_labels
from experiments.wrong_labels import tables as wrong_labels


def test_a_row_has_the_numbers_of_its_page():
    accuracy = {row["row"]: row for row in right_labels.accuracy()}
    decided = {row["comparison"]: row["verdict"] for row in right_labels.decisive()}
    for name, row in guide.with_right_labels().items():
        assert row["points above SGD (95 %)"] == accuracy[name]["points above base"]
        assert (row["n"], row["time"]) == (accuracy[name]["n"], accuracy[name]["time"])
        assert row["verdict"] == decided.get(f"{name} against base", "")
        assert row["trained with"].endswith(f"rho {accuracy[name]['rho']}") or name in guide.NAMES
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
    "file, table",
    [
        ("docs/guide.md", guide.situations),
        ("docs/guide.md", guide.guide),
        ("docs/guide.md", guide.text),
        ("README.md", guide.headline),
    ],
)
def test_the_guide_and_the_readme_have_the_tables_of_the_data(file, table):
    assert page.markdown(table()) in (page.ROOT / file).read_text(), f"run {guide.SCRIPT}"
