"""Tables and pictures: each number where its head or its axis says."""

import argparse

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import report


@pytest.fixture
def figures(monkeypatch):
    """The pictures stay open: what they show can be looked at."""
    monkeypatch.setattr(plt, "close", lambda figure: None)
    yield lambda: [plt.figure(number) for number in plt.get_fignums()]
    monkeypatch.undo()
    plt.close("all")


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def measures(top1):
    low_and_high = {"top1_low": top1 - 0.01, "top1_high": top1 + 0.03}
    return {"examples": 50, "top1": top1, **low_and_high, "top5": top1 + 0.1, "nll": 1.5, "ece": 0.045}


RESULTS = {"one": {"v2": measures(0.5), "r": measures(0.2)}, "two": {"v2": measures(0.6), "r": measures(0.25)}}


def test_measures_and_differences_stand_in_their_columns(capsys):
    differences = {"two": {"v2": {"difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.0321}}}
    report.show(RESULTS, differences, markdown=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert cells(lines[0]) == ["model", "benchmark", "images", "top-1 %", "95 %", "top-5 %", "NLL", "ECE %"]
    assert set(cells(lines[1])) == {"---"}
    assert cells(lines[2]) == ["one", "v2", "50", "50.00", "49.00 to 53.00", "60.00", "1.500", "4.50"]
    assert cells(lines[5]) == ["two", "r", "50", "25.00", "24.00 to 28.00", "35.00", "1.500", "4.50"]
    assert cells(lines[6]) == ["model", "benchmark", "top-1 points", "95 %", "p"]
    assert cells(lines[8]) == ["two", "v2", "+10.00", "+2.00 to +18.00", "0.0321"]


def test_error_bars_reach_from_the_low_end_to_the_high(figures, tmp_path):
    report.draw(RESULTS, tmp_path / "accuracy.png")
    (figure,) = figures()
    for bars, measured in zip(figure.axes[0].containers[1::2], RESULTS.values(), strict=True):
        assert [bar.get_height() for bar in bars] == pytest.approx([100 * one["top1"] for one in measured.values()])
        ends = np.array(bars.errorbar.lines[2][0].get_segments())[:, :, 1]
        expected = [[100 * one["top1_low"], 100 * one["top1_high"]] for one in measured.values()]
        np.testing.assert_allclose(ends, expected)


def test_correlations_stand_in_their_columns(capsys):
    found = {"perturbation": "sam", "epochs": "last", "quantity": "forgetting", "runs": 12, "tau": 0.5, "low": 0.1}
    found |= {"high": 0.7, "p_value": 0.02, "above_rival": -0.25, "above_low": -0.4, "above_high": float("nan")}
    report.show_correlations([found])
    head, line = capsys.readouterr().out.splitlines()[-2:]
    row = {"tau": "+0.50", "95 %": "+0.10 to +0.70", "p": "0.02", "above flatness": "-0.25"}
    for name, value in row.items():
        assert line[head.index(f" {name} ") + 1 :].startswith(f"{value} "), name
    assert line.endswith("  -")  # of the second interval, one end is not a number


def test_pictures_of_forgetting_show_the_last_epoch_and_means_over_runs(figures, tmp_path):
    rows = [
        {"run": run, "method": "obf", "perturbation": "sam", "epoch": epoch, "forgetting": 0.1 * epoch + run,
         "lambda_max": 10 * epoch + run, "accuracy": 0.5 + 0.1 * run}
        for run in (0, 1) for epoch in (1, 2)
    ]  # fmt: skip
    measured = [
        ({"folder": row["run"], "settings": argparse.Namespace(method="obf")}, None,
         {"perturbations": {"sam": {"by_threshold": [row["forgetting"], 2 * row["forgetting"]]}}})
        for row in rows
    ]  # fmt: skip
    report.draw_forgetting(measured, rows, [0.3, 0.6], tmp_path)
    forgetting, flatness, epochs, thresholds = (figure.axes[0] for figure in figures())
    np.testing.assert_allclose(forgetting.collections[0].get_offsets(), [[0.2, 50], [1.2, 60]])
    np.testing.assert_allclose(flatness.collections[0].get_offsets(), [[-20, 50], [-21, 60]])
    np.testing.assert_allclose(epochs.lines[0].get_xydata(), [[1, 0.6], [2, 0.7]])
    np.testing.assert_allclose(thresholds.lines[0].get_xydata(), [[0.3, 0.7], [0.6, 1.4]])
    names = ["forgetting_accuracy", "flatness_accuracy", "forgetting_epochs", "forgetting_thresholds"]
    assert {file.stem for file in tmp_path.iterdir()} == set(names)
