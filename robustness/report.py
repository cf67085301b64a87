"""Tables and pictures of evaluations and measurements."""

import itertools
import math
from pathlib import PurePath

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from scipy.special import expit, logit

from common import report
from robustness import published

matplotlib.use("agg")

MAX_NAME = 45  # letters of a model's name that a picture has room for


def percent(value):
    """A share as text in %."""
    return f"{100 * value:.2f}"


def points(value):
    """A difference of shares as text, in points."""
    return f"{100 * value:+.2f}"


def show(results, differences, markdown):
    """Print every model's measures by benchmark, and the differences to the first model."""
    rows = [(m, b, r) for m, benchmarks in results.items() for b, r in benchmarks.items()]
    top5 = ["top-5 %"] if any("top5" in r for *_, r in rows) else []
    head = ["model", "benchmark", "images", "top-1 %", "95 %", *top5, "NLL", "95 %"]
    lines = [[*head, "ECE %", "95 %", "scaled ECE %", "95 %"]]
    for model, benchmark, r in rows:
        cells = [model, benchmark, str(r["examples"]), percent(r["top1"])]
        cells.append(f"{percent(r['top1_low'])} to {percent(r['top1_high'])}")
        cells += [percent(r["top5"]) if "top5" in r else "-"] if top5 else []
        cells += [f"{r['nll']:.3f}", f"{r['nll_low']:.3f} to {r['nll_high']:.3f}"]
        for name in ("ece", "ece_scaled"):
            cells += [
                percent(r[name]),
                f"{percent(r[f'{name}_low'])} to {percent(r[f'{name}_high'])}",
            ]
        lines.append(cells)
    print()
    report.table(lines, markdown)
    lines = [["model", "benchmark", "top-1 points", "95 %", "p"]]
    for model, benchmarks in differences.items():
        for benchmark, d in benchmarks.items():
            interval = f"{points(d['low'])} to {points(d['high'])}"
            p_value = f"{d['p_value']:.3g}"
            lines.append([model, benchmark, points(d["difference"]), interval, p_value])
    if differences:
        print(
            f"\nAgainst {next(iter(results))}, on the same images (Tango's interval, McNemar's "
            f"test):\n"
        )
        report.table(lines, markdown)


def show_corrupted(corrupted, markdown):
    """Print top-1 by set and corruption, mean over severities, a column for each model.

    Then the differences of the means over corruptions.
    """
    if not any(corrupted.values()):
        return
    print(
        "\nTop-1 on corrupted images, %, mean over severities; the last rows are the mean over"
        "\ncorruptions and its normal 95 % interval over images:\n"
    )
    names = short_names(corrupted)
    lines = [["benchmark", "corruption", *names.values()]]
    for name in dict.fromkeys(name for by_set in corrupted.values() for name in by_set):
        lines += _corruption_lines(name, [by_set.get(name) for by_set in corrupted.values()])
    report.table(lines, markdown)
    summaries = [(m, name, s) for m, by_set in corrupted.items() for name, s in by_set.items()]
    lines = [["model", "benchmark", "top-1 points", "95 %"]]
    for model, name, summary in summaries:
        if d := summary.get("difference_to_first"):
            interval = f"{points(d['low'])} to {points(d['high'])}"
            lines.append([model, name, points(d["mean"]), interval])
    if len(lines) > 1:
        print(f"\nMean over corruptions, against {next(iter(corrupted))}, on the same images:\n")
        report.table(lines, markdown)
    for model, name, summary in summaries:
        if "mce" in summary:
            mce = "not known, as it lacks some of the 15 corruptions in 5 severities"
            if summary["mce"] is not None:
                mce = f"{percent(summary['mce'])} % of AlexNet's error"
            print(f"{model} on {name}: mean error {percent(1 - summary['mean'])} %; mCE {mce}")


def _corruption_lines(name, summaries):
    """A set's lines, a cell for each model's summary; None where it has not seen the set."""

    def line(what, cell):
        return [name, what, *("-" if summary is None else cell(summary) for summary in summaries)]

    def mean_top1(corruption):
        def cell(summary):
            top1 = summary["corruptions"].get(corruption)
            return percent(np.mean(list(top1.values()))) if top1 else "-"

        return cell

    seen = [summary for summary in summaries if summary is not None]
    lines = []
    if any(summary["clean"] is not None for summary in seen):
        lines.append(
            line("none: clean", lambda s: "-" if s["clean"] is None else percent(s["clean"]))
        )
    kinds = dict.fromkeys(kind for summary in seen for kind in summary["corruptions"])
    lines += [line(kind, mean_top1(kind)) for kind in kinds]
    lines.append(line("mean", lambda s: percent(s["mean"])))
    return [*lines, line("95 %", lambda s: f"{percent(s['low'])} to {percent(s['high'])}")]


def draw_corrupted(corrupted, name, path):
    """Top-1 on a set by severity, a panel for each corruption and a line for each model.

    Args:
        corrupted: the models' summaries by set.
        name: of the set.
    """
    names = short_names(corrupted)
    summaries = {names[m]: by_set[name] for m, by_set in corrupted.items() if name in by_set}
    kinds = list(dict.fromkeys(kind for s in summaries.values() for kind in s["corruptions"]))
    columns = min(len(kinds), 5 if len(kinds) > 9 else 3)
    rows = -(-len(kinds) // columns)
    grid = {"sharex": True, "sharey": True, "squeeze": False, "layout": "constrained"}
    size = (2.4 * columns + 1.5, 1 + 1.9 * rows)
    figure, axes = plt.subplots(rows, columns, figsize=size, **grid)
    for axis, kind in itertools.zip_longest(axes.flat, kinds):
        axis.set_visible(kind is not None)
        for i, (model, summary) in enumerate(summaries.items()):
            top1 = {int(key): value for key, value in summary["corruptions"].get(kind, {}).items()}
            if summary["clean"] is not None:
                top1[0] = summary["clean"]
            severities = sorted(top1)
            values = [100 * top1[severity] for severity in severities]
            axis.plot(severities, values, color=f"C{i}", marker=".", label=model)
        axis.set_title(kind, fontsize=10)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    figure.supylabel("top-1, %", fontsize=10)
    if len(summaries) > 1:
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside upper center", frameon=False, fontsize=8)
    caption = f"Top-1 on {name} by severity of each corruption"
    clean = any(summary["clean"] is not None for summary in summaries.values())
    report.save(figure, path, f"{caption}{'; 0: as the images are' if clean else ''}.")


def show_published(published_by_model, markdown):
    """Print top-1 beside what timm publishes, or the sizes and crops at which it does."""
    lines = [["model", "benchmark", "top-1 %", "timm's %", "difference"]]
    for model, beside in published_by_model.items():
        for name, (ours, timms) in beside.get("top1", {}).items():
            lines.append([model, name, f"{ours:.3f}", f"{timms:.3f}", f"{ours - timms:+.3f}"])
    if len(lines) > 1:
        print("\nBeside what timm publishes at the same size, crop and interpolation:\n")
        report.table(lines, markdown)
    for model, beside in published_by_model.items():
        if settings := beside.get("elsewhere"):
            shown = " or ".join(map(_as_flags, settings))
            print(f"\n{model}: to compare with what timm publishes, evaluate with {shown}")


def _as_flags(setting):
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in setting.items())


def show_effective(effective, markdown):
    """Print ``published.effective_robustness`` of every model under every shift."""
    head = ["model", "benchmark", "clean %", "top-1 %", "line %", "points above", "95 %"]
    lines = [[*head, "timm's near it"]]
    for model, shifts in effective.items():
        for shift, r in shifts.items():
            accuracies = [percent(r[key]) for key in ("clean", "shifted", "expected")]
            interval = f"{points(r['low'])} to {points(r['high'])}"
            usual = f"{points(r['usual_low'])} to {points(r['usual_high'])}"
            lines.append([model, shift, *accuracies, points(r["above"]), interval, usual])
    print(
        "\nEffective robustness: above the line through timm's models trained on ImageNet-1k alone"
        "\n(bootstrap interval over images and over these models; last, where 95 % of the"
        f"\n{published.NEIGHBOURS} whose clean accuracy is nearest lie):\n"
    )
    report.table(lines, markdown)
    for model, shifts in effective.items():
        for shift in (shift for shift, r in shifts.items() if r["unusual"]):
            print(f"{model} on {shift}: unusual among timm's models of its accuracy")
        for shift in (shift for shift, r in shifts.items() if r["extrapolated"]):
            print(
                f"{model} on {shift}: the line is extrapolated, as no model of timm's has such a "
                f"clean accuracy"
            )


def short_names(names) -> dict[str, str]:
    """Models' names for a picture.

    Folders are without what they have in common, and without a "last" or "best" of all.
    """
    parts = {name: list(PurePath(name).parts) for name in names}
    folders = [steps for steps in parts.values() if len(steps) > 1]
    if {steps[-1] for steps in folders} in ({"last"}, {"best"}):
        for steps in folders:
            steps.pop()
    while folders and len({steps[0] for steps in folders}) == 1 and min(map(len, folders)) > 1:
        for steps in folders:
            steps.pop(0)
    short = {name: "/".join(steps) for name, steps in parts.items()}
    for name, text in short.items():
        short[name] = f"{text[:20]}...{text[-20:]}" if len(text) > MAX_NAME else text
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def draw(results, path):
    """A panel for each benchmark, with every model's top-1 and its 95 % interval."""
    names = short_names(results)
    benchmarks = list(dict.fromkeys(b for measured in results.values() for b in measured))
    columns = min(len(benchmarks), 5)
    rows = -(-len(benchmarks) // columns)
    width = 0.6 + 0.09 * max(map(len, names.values())) + 1.9 * columns
    size = (width, 0.7 + rows * (0.8 + 0.32 * len(results)))
    grid = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=size, **grid)
    for axis, benchmark in itertools.zip_longest(axes.flat, benchmarks):
        if benchmark is None:
            axis.set_visible(False)
        else:
            _draw_benchmark(axis, benchmark, [measured[benchmark] for measured in results.values()])
    ends = (len(results) - 0.5, -0.6)
    axes[0, 0].set(yticks=range(len(results)), yticklabels=names.values(), ylim=ends)
    caption = "Top-1 accuracy in %, with its 95 % Wilson interval over n images."
    report.save(figure, path, f"{caption} Each panel has its own axis.")


def _draw_benchmark(axis, benchmark, measures):
    style = {"fmt": "o", "capsize": 3, "markersize": 4}
    above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 8}
    for i, r in enumerate(measures):
        low, top1, high = (100 * r[key] for key in ("top1_low", "top1", "top1_high"))
        axis.errorbar(top1, i, xerr=[[top1 - low], [high - top1]], color=f"C{i}", **style)
        axis.annotate(f"{top1:.2f}", (top1, i), **above)
    axis.set_title(f"{benchmark}\nn = {measures[-1]['examples']:,}", fontsize=10)
    axis.margins(x=0.2)
    axis.xaxis.set_major_locator(MaxNLocator(3))
    axis.spines[["top", "right"]].set_visible(False)


def draw_effective(effective, path):
    """For each shift, above: accuracy under it against clean accuracy, of timm's models and ours.

    Below: the points above timm's line.
    """
    names = short_names(effective)
    shifts = list(dict.fromkeys(shift for measured in effective.values() for shift in measured))
    size = (4.4 * len(shifts), 7.4 + 0.2 * len(effective))
    grid = {"sharex": "col", "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(2, len(shifts), figsize=size, **grid)
    for (top, bottom), shift in zip(axes.T, shifts):
        ours = [measured[shift] for measured in effective.values() if shift in measured]
        _draw_timms(top, bottom, shift, ours)
        for i, (model, measured) in enumerate(effective.items()):
            if shift in measured:
                _draw_ours(top, bottom, measured[shift], names[model], f"C{i}")
        clean, n = published.SHIFTS[shift][0], ours[0]
        top.set(ylabel=f"top-1 on {shift}, % (n = {n['shifted_images']:,})")
        bottom.set(xlabel=f"top-1 on {clean}, % (n = {n['clean_images']:,})")
        bottom.set(ylabel=f"{shift}: points above the line")
        bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    caption = (
        "Grey: timm's models that were trained on ImageNet-1k alone. Top: accuracies on the logit "
        "scale. Bottom: effective robustness, the points above the line, with 95 % bootstrap "
        "intervals over images and over timm's models."
    )
    report.save(figure, path, caption)


def _draw_timms(top, bottom, shift, ours):
    """timm's models and the line through them, on axes that have room for ``ours``."""
    timms, fitted = published.baseline(shift), published.line(shift)
    report.logit_axis(top, "x", [*timms[:, 0], *(r["clean"] for r in ours)])
    report.logit_axis(top, "y", [*timms[:, 1], *(r["shifted"] for r in ours)])
    grid = expit(np.linspace(*logit(top.get_xlim()), 100))
    top.scatter(*timms.T, s=6, color="0.75")
    top.plot(grid, published.expected(grid, *fitted), color="0.4")
    above = 100 * (timms[:, 1] - published.expected(timms[:, 0], *fitted))
    label = f"timm's {len(timms)} models"
    bottom.scatter(timms[:, 0], above, s=6, color="0.75", label=label)
    bottom.axhline(0, color="0.4", label="the line through them")


def _draw_ours(top, bottom, r, name, colour):
    x, y = (np.clip(r[key], *report.EDGES) for key in ("clean", "shifted"))
    label = f"{name}: {points(r['above'])} ({points(r['low'])} to {points(r['high'])})"
    style = {"color": colour, "markeredgecolor": "white"}
    top.plot(x, y, "o", **style)
    bottom.vlines(x, 100 * r["low"], 100 * r["high"], color=colour)
    bottom.plot(x, 100 * r["above"], "o", label=label, **style)


def show_correlations(correlations):
    """Print Kendall's tau of every quantity with each target; "-" is what there is not.

    What is the same for the next perturbation, as of flatness over the same runs, stands once.
    """
    fixed = list(dict.fromkeys(c["fixed"] for c in correlations if c["fixed"]))
    head = ["perturbation", "epochs", "quantity", "tau", "above flatness"]
    names = ("perturbation", "epochs", "quantity")
    for target, shown in (("accuracy", "test accuracy"), ("-gap", "a small generalisation gap")):
        lines = [[*head, *(f"{key} fixed" for key in fixed), "runs", "tau of runs", "at most"]]
        of_target = [c for c in correlations if c["target"] == target]
        shown_before = set()
        by_fixed = {(*(c[name] for name in names), c["fixed"]): c for c in of_target}
        for c in (c for c in of_target if not c["fixed"]):
            which = tuple(c[name] for name in names)
            cells = [tested(c["tau"], c["p_value"]), tested(c["above_rival"], c["above_p"])]
            for key in fixed:  # which of them vary depends on the perturbation's runs
                within = by_fixed.get((*which, key))
                cells.append(tested(within["tau"], within["p_value"]) if within else "-")
            cells += [str(c["runs"]), tested(c["tau_runs"]), tested(c["reachable"])]
            same = (*which[1:], *cells)
            lines += [] if same in shown_before else [[*which, *cells]]
            shown_before.add(same)
        if of_target:
            print(
                f"\nKendall's tau with {shown}, of settings by the means over their seeds (p of "
                f"permuting them;\nlast, of single runs, and the most that their settings tell):\n"
            )
            report.table(lines, False)


def tested(value, p_value=None) -> str:
    """A tau, or a difference of two, with its p value if there is one; "-" if it is NaN."""
    if math.isnan(value):
        return "-"
    if p_value is None or math.isnan(p_value):
        return f"{value:+.2f}"
    return f"{value:+.2f} (p {p_value:.2f})" if p_value >= 0.01 else f"{value:+.2f} (p < 0.01)"


def forgetting_styles(rows):
    """Methods differ in colour, m in shape and rho in size.

    Returns:
        A function of the three, and the legend's handles.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ms, rhos = (sorted({row[key] for row in rows}) for key in ("m", "rho"))
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    shapes = dict(zip(ms, itertools.cycle("os^DvP*X")))
    sizes = dict(zip(rhos, np.linspace(5, 9, len(rhos))))

    def style(method, m, rho):
        marker = {"marker": shapes[m], "markersize": sizes[rho], "markeredgecolor": "white"}
        return {"color": colours[method], **marker}

    def handle(label, method=methods[0], m=ms[0], rho=rhos[-1], **changed):
        return Line2D([], [], linestyle="", label=label, **style(method, m, rho) | changed)

    shown = rhos if len(rhos) <= 4 else [rhos[0], rhos[-1]]
    handles = [handle(method, method, marker="s") for method in methods]
    handles += [handle(f"m {m}", m=m, color="0.5") for m in ms]
    return style, handles + [handle(f"rho {rho:.3g}", rho=rho, color="0.5") for rho in shown]


def draw_forgetting(measured, rows, correlations, thresholds, folder):
    """Forgetting and flatness against accuracy, and forgetting over epochs and thresholds.

    Args:
        measured, rows, correlations: from measure_forgetting.py.
    """
    last = {}
    for row in sorted(rows, key=lambda row: row["epoch"]):
        last[row["run"], row["perturbation"]] = row
    style, handles = forgetting_styles(last.values())
    kinds = list(dict.fromkeys(row["perturbation"] for row in rows))
    most = max(kinds, key=[kind for _, kind in last].count)  # flatness is the same for each
    curves = _curves(measured, rows, thresholds)

    def panels(name, kinds, labels, caption, draw):
        size = (4.2 * len(kinds) + 1.2, 4.2)
        grid = {"sharey": True, "squeeze": False, "layout": "constrained"}
        figure, axes = plt.subplots(1, len(kinds), figsize=size, **grid)
        for axis, kind in zip(axes[0], kinds):
            by_run = {run: row for (run, of), row in last.items() if of == kind}
            title = f"perturbation: {kind}, n = {len(by_run)} runs{draw(axis, kind, by_run)}"
            axis.set_title(title, fontsize=10)
            axis.set(xlabel=labels[0])
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set(ylabel=labels[1])
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        report.save(figure, folder / name, caption)

    def against_accuracy(name, kinds, xlabel, quantity, value):
        caption = "A marker is a run, after its last measured epoch; Kendall's tau is of settings, "
        caption += "by the means over their seeds."

        def draw(axis, kind, by_run):
            for row in by_run.values():
                marker = style(row["method"], row["m"], row["rho"])
                axis.plot(value(row), 100 * row["accuracy"], linestyle="", alpha=0.8, **marker)
            return f"\nKendall's tau {described(correlations, kind, quantity)}"

        panels(name, kinds, (xlabel, "accuracy, %"), caption, draw)

    def over(x, every):
        def draw(axis, kind, by_run):
            groups = {}
            for run, row in by_run.items():
                setting = (row["method"], row["m"], row["rho"])
                groups.setdefault(setting, []).extend(curves[run, kind][x])
            for setting, rows_of_setting in groups.items():
                line = report.series(rows_of_setting, x, "forgetting")
                report.band(axis, line, linewidth=1, markevery=every, **style(*setting))
            axis.xaxis.set_major_locator(MaxNLocator(integer=x == "epoch"))
            return ""

        caption = "Lines are means over runs of one method, m and rho; bands go from the least to "
        labels = (x, "forgetting, bits")
        panels(f"forgetting_{x}s", kinds, labels, f"{caption}the greatest.", draw)

    forgotten = ("forgetting, bits", "forgetting", lambda row: row["forgetting"])
    flat = ("flatness, -lambda_max", "flatness", lambda row: -row["lambda_max"])
    against_accuracy("forgetting_accuracy", kinds, *forgotten)
    against_accuracy("flatness_accuracy", [most], *flat)
    over("epoch", every=1)
    over("threshold", every=max(1, len(thresholds) // 5))


def _curves(measured, rows, thresholds):
    """Forgetting over epochs, and over thresholds after the last, by run and perturbation."""
    curves = {}
    for row in rows:
        curve = curves.setdefault((row["run"], row["perturbation"]), {"epoch": []})
        curve["epoch"].append(row)
    for run, _, record in measured:  # a run's last epoch comes last
        for kind, values in record["perturbations"].items():
            curves[str(run["folder"]), kind]["threshold"] = [
                {"threshold": threshold, "forgetting": bits}
                for threshold, bits in zip(thresholds, values["by_threshold"])
            ]
    return curves


def described(correlations, kind, quantity) -> str:
    """A tau after the last epoch, with its p value, or why there is none."""
    which = {"perturbation": kind, "epochs": "last", "quantity": quantity}
    which |= {"target": "accuracy", "fixed": None}
    c = next((c for c in correlations if which.items() <= c.items()), None)
    if c is None:
        return "is not there: too few runs"
    if np.isnan(c["tau"]):
        return "is not there: all values are equal"
    return tested(c["tau"], c["p_value"])
