"""Tables and pictures: each number is where its head or its axis says."""

import json
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest

from common import report as runs_report
from robustness import published, report


@pytest.fixture
def drawn(monkeypatch):
    """The pictures as they are saved, each with its name and caption."""
    pictures = {}

    def save(figure, path, caption):
        pictures[path.stem] = (figure, caption)

    monkeypatch.setattr(runs_report, "save", save)
    yield pictures
    plt.close("all")


def texts(figure):
    """All that is written in a picture's panels and legends."""
    found = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    for axis in figure.axes:
        found += [
            axis.get_title(), axis.get_xlabel(), axis.get_ylabel(),
            *(text.get_text() for text in axis.texts),
        ]  # fmt: skip
        found += [
            text.get_text() for text in (axis.get_legend().get_texts() if axis.get_legend() else ())
        ]
    return found


@pytest.mark.parametrize(
    "names, short",
    [
        (["outputs/digits-obf/last"], ["digits-obf"]),
        (["outputs/a/last", "outputs/b/last", "resnet18.a1_in1k"], ["a", "b", "resnet18.a1_in1k"]),
        (["outputs/a/last", "outputs/a/best"], ["last", "best"]),
        (["outputs/a/last", "outputs/b/best"], ["a/last", "b/best"]),
        (
            ["outputs/x/seed=0/last", "elsewhere/x/seed=0/last"],
            ["outputs/x/seed=0", "elsewhere/x/seed=0"],
        ),
        (
            ["a" * 30 + "b" * 30, "a" * 30 + "c" * 30],
            ["a" * 20 + "..." + "b" * 20, "a" * 20 + "..." + "c" * 20],
        ),
        (["a" * 30 + "b" + "c" * 30, "a" * 30 + "d" + "c" * 30],) * 2,  # else both were "a...c"
        (["outputs/a/last", "a"], ["outputs/a/last", "a"]),  # else both were "a"
    ],
)
def test_names_for_pictures_are_short_and_differ(names, short):
    assert report.short_names(names) == dict(zip(names, short))


@pytest.mark.parametrize("values", [(0.001, 0.9), (0.98, 0.99), (0.681, 0.693), (0.0, 1.0), (0.5,)])
def test_the_logit_axis_holds_its_values_and_has_ticks_that_can_be_told_apart(values):
    figure, axis = plt.subplots(figsize=(4, 4))
    runs_report.logit_axis(axis, "y", values)
    low, high = axis.get_ylim()
    inside = np.clip(values, *runs_report.EDGES)
    assert low < min(inside) and max(inside) < high
    ticks = [tick for tick in axis.get_yticks() if low <= tick <= high]
    assert len(ticks) >= 2
    places = [axis.transData.transform((0, tick))[1] for tick in ticks]
    assert min(np.diff(places)) > 15  # pixels: a line of text
    assert all(
        abs(float(axis.yaxis.get_major_formatter()(tick)) - 100 * tick) < 1e-3 for tick in ticks
    )
    plt.close(figure)


def measured(top1, low, high, examples):
    return {"top1": top1, "top1_low": low, "top1_high": high, "examples": examples}


def test_small_accuracies_and_small_differences_are_visible(drawn, tmp_path):
    results = {
        "outputs/a/last": {
            "imagenet": measured(0.98, 0.979, 0.981, 50_000),
            "a-200": measured(0.001, 0.0005, 0.002, 7500),
        },
        "outputs/b/last": {
            "imagenet": measured(0.99, 0.989, 0.991, 50_000),
            "a-200": measured(0.002, 0.001, 0.003, 7500),
        },
    }
    report.draw(results, tmp_path / "accuracy.png")
    figure, caption = drawn["accuracy"]
    assert "95 % Wilson" in caption and "n images" in caption
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    for axis, name, n in zip(figure.axes, ("imagenet", "a-200"), ("50,000", "7,500")):
        assert axis.get_title() == f"{name}\nn = {n}"
        points = [100 * r[name]["top1"] for r in results.values()]
        places = axis.transData.transform([(point, 0) for point in points])[:, 0]
        assert abs(places[1] - places[0]) > 0.2 * axis.get_window_extent().width
        low, high = axis.get_xlim()
        assert low < min(100 * r[name]["top1_low"] for r in results.values())
        assert max(100 * r[name]["top1_high"] for r in results.values()) < high
    assert {"98.00", "99.00", "0.10", "0.20"} <= set(texts(figure))


@pytest.mark.pictures
def test_pictures_are_png_and_svg(tmp_path):
    report.draw({"a": {"test": measured(0.5, 0.4, 0.6, 10)}}, tmp_path / "accuracy.png")
    for ending, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (tmp_path / f"accuracy.{ending}").read_bytes().startswith(start)
    assert not plt.get_fignums()


def test_the_picture_of_effective_robustness_has_every_model_where_it_is(
    drawn, tmp_path, monkeypatch
):
    baseline = np.array([[0.5, 0.4], [0.6, 0.5], [0.7, 0.6], [0.8, 0.7]])
    monkeypatch.setattr(published, "baseline", lambda shift: baseline)
    monkeypatch.setattr(published, "line", lambda shift: (1.0, -0.4))
    one = {
        "clean": 0.75,
        "shifted": 0.68,
        "expected": 0.66,
        "above": 0.02,
        "low": 0.01,
        "high": 0.03,
    } | {"clean_images": 50_000, "shifted_images": 10_000}
    found = {
        "outputs/a/last": {"v2": one, "sketch": one},
        "outputs/b/last": {"v2": one | {"clean": 0.0, "shifted": 0.0}},
    }
    report.draw_effective(found, tmp_path / "effective.png")
    figure, _ = drawn["effective"]
    top = figure.axes[0]
    assert top.get_xscale() == top.get_yscale() == "logit"
    assert top.get_ylabel() == "top-1 on v2, % (n = 10,000)"
    assert figure.axes[2].get_xlabel() == "top-1 on imagenet, % (n = 50,000)"
    points = [tuple(line.get_xydata()[0]) for line in top.lines if line.get_marker() == "o"]
    assert points == [(0.75, 0.68), (runs_report.EDGES[0],) * 2]
    assert np.array_equal(top.collections[0].get_offsets(), baseline)
    legends = [
        [text.get_text() for text in axis.get_legend().get_texts()] for axis in figure.axes[2:]
    ]
    assert legends[0][2:] == ["a: +2.00 (+1.00 to +3.00)", "b: +2.00 (+1.00 to +3.00)"]
    assert legends[1][2:] == ["a: +2.00 (+1.00 to +3.00)"] and legends[0][0] == "timm's 4 models"


def test_effective_robustness_has_its_table_and_says_what_is_unusual(capsys):
    found = {
        "clean": 0.8, "shifted": 0.7, "expected": 0.68, "above": 0.02, "low": 0.01, "high": 0.03,
        "usual_low": -0.012, "usual_high": 0.013, "unusual": False, "extrapolated": False,
    }  # fmt: skip
    unusual = found | {"usual_high": 0.008, "unusual": True}
    report.show_effective({"a": {"v2": found, "sketch": unusual}}, markdown=True)
    *lines, last = capsys.readouterr().out.strip().splitlines()
    row = [cell.strip() for cell in lines[-2].strip("|").split("|")]
    assert row == [
        "a",
        "v2",
        "80.00",
        "70.00",
        "68.00",
        "+2.00",
        "+1.00 to +3.00",
        "-1.20 to +1.30",
    ]
    assert last == "a on sketch: unusual among timm's models of its accuracy"


def rows(run, values, **others):
    lines = [
        {"epoch": i + 1, "validation": v, "loss": 1.0, "run": run, **others}
        for i, v in enumerate(values)
    ]
    return lines


def line_of(axis, label):
    (line,) = (line for line in axis.lines if line.get_label().startswith(label))
    return line


def panels_of(figure):
    """The panels that are shown, by title."""
    return {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}


def test_curves_are_means_over_seeds_with_bands(drawn, tmp_path):
    several = [
        *rows("1", [0.5, 0.8, 0.9], lr=0.1, rho=0.2),
        *rows("2", [0.7, 0.6], lr=0.1, rho=0.3),
    ]
    runs_report.draw_curves(
        {"sam": several, "base": rows("3", [0.1, 0.2, 1.0], lr=0.1, rho=None)},
        tmp_path / "curves.png",
    )
    figure, caption = drawn["curves"]
    panels = panels_of(figure)
    accuracy, rho = panels["top-1 on validation, %"], panels["rho"]
    assert line_of(accuracy, "sam").get_xydata() == pytest.approx(
        np.array([[1, 0.6], [2, 0.7], [3, 0.9]])
    )
    assert line_of(accuracy, "base").get_ydata() == pytest.approx([0.1, 0.2, runs_report.EDGES[1]])
    (band,) = accuracy.collections
    assert {tuple(np.round(point, 6)) for point in band.get_paths()[0].vertices} >= {
        (1, 0.5), (1, 0.7), (2, 0.6), (2, 0.8),
    }  # fmt: skip
    assert "top-1 in training, %" not in panels  # runs of an older version had none
    assert len(line_of(rho, "base").get_xdata()) == 0
    (legend,) = figure.legends
    assert ["sam (2 runs)", "base"] == [text.get_text() for text in legend.get_texts()]
    assert "bands" in caption


def test_one_run_has_no_legend_a_constant_rho_no_panel_and_epochs_are_whole(drawn, tmp_path):
    runs_report.draw_curves({"run": rows("1", [0.5], lr=0.1, rho=0.05)}, tmp_path / "curves.png")
    figure, caption = drawn["curves"]
    panels = panels_of(figure)
    assert set(panels) == {"training loss", "top-1 on validation, %", "learning rate"}
    assert not figure.legends and "rho" not in caption and "bands" not in caption
    for axis in panels.values():
        low, high = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize("highest, scale", [(0.9, "linear"), (0.91, "logit")])
def test_only_accuracies_above_90_percent_are_on_the_logit_scale(drawn, tmp_path, highest, scale):
    groups = {"a": rows("1", [0.1, highest]), "b": rows("2", [0.1, 0.2])}
    runs_report.draw_curves(groups, tmp_path / "curves.png")
    figure, caption = drawn["curves"]
    axis = panels_of(figure)["top-1 on validation, %"]
    assert axis.get_yscale() == scale and ("logit" in caption) == (scale == "logit")
    assert axis.yaxis.get_major_formatter()(0.2) == "20"
    assert line_of(axis, "b").get_ydata() == pytest.approx([0.1, 0.2])


def test_of_many_curves_the_best_are_drawn_and_it_is_said(drawn, tmp_path):
    runs_report.draw_curves(
        {f"lr={i}": rows(str(i), [0.9, i / 50]) for i in range(30)}, tmp_path / "curves.png"
    )
    (legend,) = drawn["curves"][0].legends
    assert [text.get_text() for text in legend.get_texts()] == [f"lr={i}" for i in range(10, 30)]
    assert legend.get_title().get_text() == "the 20 best of 30 settings"


def test_metrics_of_an_older_run_without_a_loss_are_read(tmp_path):
    assert runs_report.read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"epoch": 1, "loss": None, "test": 0.5}) + "\n"
    )
    assert runs_report.read_metrics(tmp_path) == [
        {"epoch": 1, "loss": None, "test": 0.5, "run": str(tmp_path)}
    ]


def forgetting_row(run, method, m, rho, epoch, forgetting, kind="sam"):
    return {
        "run": run, "method": method, "m": m, "rho": rho, "epoch": epoch, "perturbation": kind,
        "accuracy": 0.9, "forgetting": forgetting, "lambda_max": 3.0,
    }  # fmt: skip


def test_pictures_of_forgetting_tell_methods_m_rho_and_seeds_apart(drawn, tmp_path):
    table, measured = [], []
    for i, (method, m, rho) in enumerate(
        [("sam", 8, 0.1), ("sam", 8, 0.1), ("sam", 32, 0.1), ("obf", 8, 0.2)]
    ):
        table += [forgetting_row(str(i), method, m, rho, epoch, i + 10 * epoch) for epoch in (1, 2)]
        records = [{"perturbations": {"sam": {"by_threshold": [i + epoch, i]}}} for epoch in (1, 2)]
        measured += [({"folder": str(i)}, None, record) for record in records]
    tau = {"perturbation": "sam", "epochs": "last", "tau": 0.25, "p_value": 0.2}
    tau |= {"target": "accuracy", "fixed": None}
    found = [
        tau | {"quantity": "forgetting"},
        tau | {"quantity": "flatness", "tau": np.nan, "p_value": np.nan},
    ]
    report.draw_forgetting(measured, table, found, [0.3, 0.6], tmp_path)
    figure, _ = drawn["forgetting_accuracy"]
    assert (
        figure.axes[0].get_title() == "perturbation: sam, n = 4 runs\nKendall's tau +0.25 (p 0.20)"
    )
    styles = [
        (line.get_color(), line.get_marker(), line.get_markersize())
        for line in figure.axes[0].lines
    ]
    assert styles[0] == styles[1] and len(set(styles)) == 3
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "sam", "obf", "m 8", "m 32", "rho 0.1", "rho 0.2",
    ]  # fmt: skip
    assert (
        drawn["flatness_accuracy"][0]
        .axes[0]
        .get_title()
        .endswith("is not there: all values are equal")
    )
    epochs, thresholds = (drawn[f"forgetting_{x}s"][0].axes[0] for x in ("epoch", "threshold"))
    assert (
        epochs.lines[0].get_xydata().tolist() == [[1, 10.5], [2, 20.5]]
        and len(epochs.collections) == 1
    )
    assert thresholds.lines[0].get_xydata().tolist() == [
        [0.3, 2.5],
        [0.6, 0.5],
    ]  # of the last epoch


def test_a_picture_of_too_few_runs_says_so(drawn, tmp_path):
    record = {"perturbations": {"sam": {"by_threshold": [0.1]}}}
    report.draw_forgetting(
        [({"folder": "0"}, None, record)],
        [forgetting_row("0", "sam", 8, 0.1, 1, 0.2)],
        [],
        [0.5],
        tmp_path,
    )
    title = drawn["forgetting_accuracy"][0].axes[0].get_title()
    assert title == "perturbation: sam, n = 1 runs\nKendall's tau is not there: too few runs"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def measures(top1):
    low_and_high = {"top1_low": top1 - 0.01, "top1_high": top1 + 0.03}
    return {
        "examples": 50, "top1": top1, **low_and_high, "top5": top1 + 0.1, "nll": 1.5,
        "ece": 0.045, "nll_low": 1.4, "nll_high": 1.6, "ece_low": 0.04, "ece_high": 0.05,
        "ece_scaled": 0.015, "ece_scaled_low": 0.0, "ece_scaled_high": 0.02,
    }  # fmt: skip


RESULTS = {
    "one": {"v2": measures(0.5), "r": measures(0.2)},
    "two": {"v2": measures(0.6), "r": measures(0.25)},
}


def test_measures_and_differences_stand_in_their_columns(capsys):
    differences = {"two": {"v2": {"difference": 0.1, "low": 0.02, "high": 0.18, "p_value": 0.0321}}}
    report.show(RESULTS, differences, markdown=True)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert cells(lines[0]) == [
        *"model benchmark images".split(), "top-1 %", "95 %", "top-5 %", "NLL", "95 %", "ECE %",
        "95 %", "scaled ECE %", "95 %",
    ]  # fmt: skip
    assert set(cells(lines[1])) == {"---"}
    assert cells(lines[2]) == [
        *"one v2 50 50.00".split(), "49.00 to 53.00", "60.00",
        "1.500", "1.400 to 1.600", "4.50", "4.00 to 5.00", "1.50", "0.00 to 2.00",
    ]  # fmt: skip
    assert cells(lines[5]) == [
        *"two r 50 25.00".split(), "24.00 to 28.00", "35.00",
        "1.500", "1.400 to 1.600", "4.50", "4.00 to 5.00", "1.50", "0.00 to 2.00",
    ]  # fmt: skip
    assert cells(lines[6]) == ["model", "benchmark", "top-1 points", "95 %", "p"]
    assert cells(lines[8]) == ["two", "v2", "+10.00", "+2.00 to +18.00", "0.0321"]


def test_correlations_stand_in_their_columns(capsys):
    found = {
        "perturbation": "sam", "epochs": "last", "quantity": "forgetting", "runs": 12, "tau": 0.5,
        "p_value": 0.03, "above_rival": -0.25, "above_p": 0.004, "tau_runs": 0.4, "reachable": 0.6,
        "target": "accuracy", "fixed": None,
    }  # fmt: skip
    nan = float("nan")
    of_m = found | {"fixed": "m", "tau": 0.75, "p_value": 0.2, "reachable": nan}
    flat = {"quantity": "flatness", "tau": 0.75, "above_rival": 0.0, "above_p": nan}
    nothing = dict.fromkeys(("tau", "p_value", "tau_runs"), nan)
    gap = found | {"target": "-gap", "tau": -0.5}
    rows = [found, of_m, found | flat, of_m | flat | nothing, gap, gap | {"fixed": "m"}]
    report.show_correlations(rows)
    of_accuracy, of_gap = capsys.readouterr().out.split("Kendall's tau with ")[1:]
    assert of_accuracy.startswith("test accuracy")
    assert of_gap.startswith("a small generalisation gap")
    head, line, other = of_accuracy.strip().splitlines()[-3:]
    row = {
        "tau": "+0.50 (p 0.03)", "above flatness": "-0.25 (p < 0.01)", "m fixed": "+0.75 (p 0.20)",
        "runs": "12", "tau of runs": "+0.40", "at most": "+0.60",
    }  # fmt: skip
    for name, value in row.items():
        assert f"{line}  "[head.index(f" {name}") + 1 :].startswith(f"{value}  "), name
    assert other.split()[3:] == ["+0.75", "(p", "0.03)", "+0.00", "-", "12", "+0.40", "+0.60"]
    assert " -0.50 " in of_gap


def test_what_is_the_same_for_two_perturbations_stands_once(capsys):
    row = {
        "epochs": "last", "quantity": "flatness", "runs": 12, "tau": 0.5, "p_value": 0.03,
        "above_rival": 0.0, "above_p": math.nan, "tau_runs": 0.4, "reachable": 0.6,
        "target": "accuracy", "fixed": None,
    }  # fmt: skip
    of_own, of_sam = ({"perturbation": kind, **row} for kind in ("own", "sam"))
    report.show_correlations([of_own, of_sam])
    assert capsys.readouterr().out.count("flatness  ") == 2  # the heading's, and one row
    report.show_correlations([of_own, of_sam | {"tau": 0.25, "runs": 9}])
    assert capsys.readouterr().out.count("flatness  ") == 3


def test_a_top5_that_is_always_right_is_not_shown(capsys):
    few = {key: value for key, value in measures(0.5).items() if key != "top5"}
    report.show({"m": {"few": few}}, {}, markdown=True)
    lines = capsys.readouterr().out.strip().splitlines()
    assert "top-5 %" not in cells(lines[0]) and len(cells(lines[2])) == 11
    report.show({"m": {"few": few, "many": measures(0.5)}}, {}, markdown=True)
    lines = capsys.readouterr().out.strip().splitlines()
    place = cells(lines[0]).index("top-5 %")
    assert [cells(line)[place] for line in lines[2:]] == ["-", "60.00"]


def corrupted_summary(blur, noise):
    return {
        "clean": 0.9, "corruptions": {"blur": dict(zip("123", blur)), "noise": {"1": noise}},
        "mean": 0.5, "low": 0.4, "high": 0.6,
    }  # fmt: skip


CORRUPTED = {
    "out/a/last": {"mine": corrupted_summary([0.8, 0.6, 0.4], 0.3)},
    "out/b/last": {"mine": corrupted_summary([0.7, 0.5, 0.3], 0.2)},
}


def test_corruptions_go_down_and_models_across(capsys):
    report.show_corrupted(CORRUPTED, markdown=True)
    lines = [cells(x) for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    assert lines[0] == ["benchmark", "corruption", "a", "b"]
    assert lines[2:] == [
        ["mine", "none: clean", "90.00", "90.00"], ["mine", "blur", "60.00", "50.00"],
        ["mine", "noise", "30.00", "20.00"], ["mine", "mean", "50.00", "50.00"],
        ["mine", "95 %", *["40.00 to 60.00"] * 2],
    ]  # fmt: skip


def test_the_picture_of_corruptions_has_a_line_a_model_from_clean_to_the_worst(drawn, tmp_path):
    report.draw_corrupted(CORRUPTED, "mine", tmp_path / "corrupted.png")
    figure, caption = drawn["corrupted"]
    blur, noise = figure.axes
    assert (blur.get_title(), noise.get_title()) == ("blur", "noise") and "mine" in caption
    assert line_of(blur, "b").get_xydata() == pytest.approx(
        np.array([[0, 90], [1, 70], [2, 50], [3, 30]])
    )
    assert line_of(noise, "a").get_ydata() == pytest.approx([90, 30])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
