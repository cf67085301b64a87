"""Tables and pictures of evaluations and measurements."""

import itertools
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


def show(results, differences, markdown):
    """Print every model's measures on every benchmark, and the differences to the first model."""
    lines = [["model", "benchmark", "images", "top-1 %", "95 %", "top-5 %", "NLL", "ECE %"]]
    for model, benchmarks in results.items():
        for benchmark, r in benchmarks.items():
            interval = f"{100 * r['top1_low']:.2f} to {100 * r['top1_high']:.2f}"
            measures = (f"{100 * r['top1']:.2f}", interval, f"{100 * r['top5']:.2f}", f"{r['nll']:.3f}")
            lines.append([model, benchmark, str(r["examples"]), *measures, f"{100 * r['ece']:.2f}"])
    print()
    report.table(lines, markdown)
    lines = [["model", "benchmark", "top-1 points", "95 %", "p"]]
    for model, benchmarks in differences.items():
        for benchmark, d in benchmarks.items():
            interval = f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}"
            lines.append([model, benchmark, f"{100 * d['difference']:+.2f}", interval, f"{d['p_value']:.3g}"])
    if differences:
        print(f"\nAgainst {next(iter(results))}, on the same images (bootstrap interval, McNemar's exact test):\n")
        report.table(lines, markdown)


def show_corrupted(corrupted, markdown):
    """Print top-1 by model, set, corruption and severity; the means over corruptions, and their differences."""
    tops = [top1 for sets in corrupted.values() for found in sets.values() for top1 in found["corruptions"].values()]
    severities = sorted({severity for top1 in tops for severity in top1})
    lines = [["model", "benchmark", "corruption", *severities, "mean %", "95 %"]]
    means = [["model", "benchmark", "top-1 points", "95 %"]]
    empty = [""] * len(severities)
    for model, sets in corrupted.items():
        for name, found in sets.items():
            if found["clean"] is not None:
                lines.append([model, name, "none: clean", *empty, f"{100 * found['clean']:.2f}", ""])
            for corruption, top1 in found["corruptions"].items():
                cells = [f"{100 * top1[severity]:.2f}" if severity in top1 else "-" for severity in severities]
                lines.append([model, name, corruption, *cells, f"{100 * np.mean(list(top1.values())):.2f}", ""])
            interval = f"{100 * found['low']:.2f} to {100 * found['high']:.2f}"
            lines.append([model, name, "mean", *empty, f"{100 * found['mean']:.2f}", interval])
            if d := found.get("difference_to_first"):
                interval = f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}"
                means.append([model, name, f"{100 * d['mean']:+.2f}", interval])
    if corrupted:
        print("\nTop-1 on corrupted images, %, by severity (normal intervals over images):\n")
        report.table(lines, markdown)
    if len(means) > 1:
        print(f"\nMean over corruptions, against {next(iter(corrupted))}, on the same images:\n")
        report.table(means, markdown)
    for model, name, found in ((m, name, found) for m, sets in corrupted.items() for name, found in sets.items()):
        if "mce" in found:
            mce = "not known, as it lacks some of the 15 corruptions in 5 severities"
            mce = mce if found["mce"] is None else f"{100 * found['mce']:.2f} % of AlexNet's error"
            print(f"{model} on {name}: mean error {100 - 100 * found['mean']:.2f} %; mCE {mce}")


def show_published(found, markdown):
    """Print top-1 beside what timm publishes, or the sizes and crops at which it does."""
    lines = [["model", "benchmark", "top-1 %", "timm's %", "difference"]]
    for model, one in found.items():
        for name, (ours, timms) in one.get("top1", {}).items():
            lines.append([model, name, f"{ours:.3f}", f"{timms:.3f}", f"{ours - timms:+.3f}"])
    if len(lines) > 1:
        print("\nBeside what timm publishes at the same size, crop and interpolation:\n")
        report.table(lines, markdown)
    for model, one in found.items():
        if settings := one.get("elsewhere"):
            shown = " or ".join(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in s.items()) for s in settings)
            print(f"\n{model}: to compare with what timm publishes, evaluate with {shown}")


def show_effective(found, markdown):
    """Print ``published.effective_robustness`` of every model under every shift."""
    lines = [["model", "benchmark", "clean %", "top-1 %", "line %", "points above", "95 %", "timm's models"]]
    for model, shifts in found.items():
        for shift, r in shifts.items():
            accuracies = [f"{100 * r[key]:.2f}" for key in ("clean", "shifted", "expected")]
            interval = f"{100 * r['low']:+.2f} to {100 * r['high']:+.2f}"
            lines.append(
                [model, shift, *accuracies, f"{100 * r['above']:+.2f}", interval, f"± {100 * r['spread']:.2f}"]
            )
    print(
        "\nEffective robustness: above the line through timm's models trained on ImageNet-1k alone (bootstrap interval"
    )
    print("over images and over these models; last, the models' own standard deviation around the line):\n")
    report.table(lines, markdown)
    for model, shifts in found.items():
        for shift in (shift for shift, r in shifts.items() if r["extrapolated"]):
            print(f"{model} on {shift}: the line is extrapolated, as no model of timm's has such a clean accuracy")


def short_names(names) -> dict[str, str]:
    """Models' names for a picture: folders without what they have in common, and without a "last" or "best" of all."""
    parts = {name: list(PurePath(name).parts) for name in names}
    folders = [own for own in parts.values() if len(own) > 1]
    if {own[-1] for own in folders} in ({"last"}, {"best"}):
        for own in folders:
            own.pop()
    while folders and len({own[0] for own in folders}) == 1 and min(map(len, folders)) > 1:
        for own in folders:
            own.pop(0)
    short = {name: "/".join(own) for name, own in parts.items()}
    short = {name: f"{own[:20]}...{own[-20:]}" if len(own) > MAX_NAME else own for name, own in short.items()}
    return short if len(set(short.values())) == len(short) else {name: name for name in names}


def draw(results, path):
    """A panel for each benchmark, with every model's top-1 and its 95 % interval."""
    names, benchmarks = short_names(results), list(dict.fromkeys(b for measured in results.values() for b in measured))
    columns = min(len(benchmarks), 5)
    rows = -(-len(benchmarks) // columns)
    size = (0.6 + 0.09 * max(map(len, names.values())) + 1.9 * columns, 0.7 + rows * (0.8 + 0.32 * len(results)))
    figure, axes = plt.subplots(rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axis, benchmark in itertools.zip_longest(axes.flat, benchmarks):
        if benchmark is None:
            axis.set_visible(False)
            continue
        for i, measured in enumerate(results.values()):
            r = measured[benchmark]
            low, top1, high = (100 * r[key] for key in ("top1_low", "top1", "top1_high"))
            axis.errorbar(top1, i, xerr=[[top1 - low], [high - top1]], fmt="o", color=f"C{i}", capsize=3, markersize=4)
            axis.annotate(f"{top1:.2f}", (top1, i), (0, 4), textcoords="offset points", ha="center", fontsize=8)
        axis.set_title(f"{benchmark}\nn = {r['examples']:,}", fontsize=10)
        axis.margins(x=0.2)
        axis.xaxis.set_major_locator(MaxNLocator(3))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(yticks=range(len(results)), yticklabels=names.values(), ylim=(len(results) - 0.5, -0.6))
    report.save(
        figure, path, "Top-1 accuracy in %, with its 95 % Wilson interval over n images. Each panel has its own axis."
    )


def draw_effective(found, path):
    """For each shift, above: accuracy under it against clean accuracy, of timm's models, their line, and ours.

    Below: the points above the line.
    """
    names, shifts = short_names(found), list(dict.fromkeys(shift for measured in found.values() for shift in measured))
    size = (4.4 * len(shifts), 7.4 + 0.2 * len(found))
    figure, axes = plt.subplots(2, len(shifts), figsize=size, sharex="col", squeeze=False, layout="constrained")
    for (top, bottom), shift in zip(axes.T, shifts):
        timms, ours = published.baseline(shift), [r[shift] for r in found.values() if shift in r]
        report.logit_axis(top, "x", [*timms[:, 0], *(r["clean"] for r in ours)])
        report.logit_axis(top, "y", [*timms[:, 1], *(r["shifted"] for r in ours)])
        grid = expit(np.linspace(*logit(top.get_xlim()), 100))
        top.scatter(*timms.T, s=6, color="0.75")
        top.plot(grid, published.expected(grid, *published.line(shift)), color="0.4")
        above = 100 * (timms[:, 1] - published.expected(timms[:, 0], *published.line(shift)))
        bottom.scatter(timms[:, 0], above, s=6, color="0.75", label=f"timm's {len(timms)} models")
        bottom.axhline(0, color="0.4", label="the line through them")
        for model, r in ((model, measured[shift]) for model, measured in found.items() if shift in measured):
            x, y = (np.clip(r[key], *report.EDGES) for key in ("clean", "shifted"))
            middle, low, high = (100 * r[key] for key in ("above", "low", "high"))
            label = f"{names[model]}: {middle:+.2f} ({low:+.2f} to {high:+.2f})"
            colour = f"C{list(found).index(model)}"
            top.plot(x, y, "o", color=colour, markeredgecolor="white")
            bottom.vlines(x, low, high, color=colour)
            bottom.plot(x, middle, "o", color=colour, markeredgecolor="white", label=label)
        clean, n = published.SHIFTS[shift][0], [f"n = {ours[0][key]:,}" for key in ("clean_images", "shifted_images")]
        top.set(ylabel=f"top-1 on {shift}, % ({n[1]})")
        bottom.set(xlabel=f"top-1 on {clean}, % ({n[0]})", ylabel=f"{shift}: points above the line")
        bottom.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=8)
        for axis in (top, bottom):
            axis.spines[["top", "right"]].set_visible(False)
    marks = "Grey: timm's models that were trained on ImageNet-1k alone. Top: accuracies on the logit scale."
    whiskers = "with 95 % bootstrap intervals over images and over timm's models"
    report.save(figure, path, f"{marks} Bottom: effective robustness, the points above the line, {whiskers}.")


def show_correlations(found):
    """Print Kendall's tau of every quantity with each target; "-" is what there is not."""
    fixed = list(dict.fromkeys(c["fixed"] for c in found if c["fixed"]))
    for target, name in (("accuracy", "test accuracy"), ("-gap", "a small generalisation gap")):
        lines = [["perturbation", "epochs", "quantity", "runs", "tau", "95 %", "above flatness", "95 %"]]
        lines[0] += [f"{key} fixed" for key in fixed]
        own = {(c["perturbation"], c["epochs"], c["quantity"], c["fixed"]): c for c in found if c["target"] == target}
        for (*names, given), c in own.items():
            if given:
                continue
            tau = [f"{c['tau']:+.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}"]
            above = [f"{c['above_rival']:+.2f}", f"{c['above_low']:+.2f} to {c['above_high']:+.2f}"]
            partial = [f"{own[(*names, key)]['tau']:+.2f}" if (*names, key) in own else "nan" for key in fixed]
            lines.append([*names, str(c["runs"]), *("-" if "nan" in cell else cell for cell in tau + above + partial)])
        if own:
            print(f"\nKendall's tau with {name} (bootstrap intervals over settings, each with all its seeds):\n")
            report.table(lines, False)


def forgetting_styles(rows):
    """Methods differ in colour, m in shape and rho in size: a function of the three, and the legend's handles."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ms, rhos = (sorted({row[key] for row in rows}) for key in ("m", "rho"))
    colours = {method: f"C{i}" for i, method in enumerate(methods)}
    shapes, sizes = dict(zip(ms, itertools.cycle("os^DvP*X"))), dict(zip(rhos, np.linspace(5, 9, len(rhos))))

    def style(method, m, rho):
        return {"color": colours[method], "marker": shapes[m], "markersize": sizes[rho], "markeredgecolor": "white"}

    def handle(label, method=methods[0], m=ms[0], rho=rhos[-1], **changed):
        return Line2D([], [], linestyle="", label=label, **style(method, m, rho) | changed)

    shown = rhos if len(rhos) <= 4 else [rhos[0], rhos[-1]]
    handles = [handle(method, method, marker="s") for method in methods]
    handles += [handle(f"m {m}", m=m, color="0.5") for m in ms]
    return style, handles + [handle(f"rho {rho:.3g}", rho=rho, color="0.5") for rho in shown]


def draw_forgetting(measured, rows, found, thresholds, folder):
    """Forgetting and flatness against accuracy, with the taus ``found``, and forgetting over epochs and thresholds."""
    last = {(row["run"], row["perturbation"]): row for row in sorted(rows, key=lambda row: row["epoch"])}
    style, handles = forgetting_styles(last.values())
    kinds = list(dict.fromkeys(row["perturbation"] for row in rows))
    most = max(kinds, key=[kind for _, kind in last].count)  # flatness is the same for each
    curves = {key: {"epoch": [], "threshold": []} for key in last}
    for row in rows:
        curves[row["run"], row["perturbation"]]["epoch"].append(row)
    for run, _, record in measured:  # a run's last epoch comes last
        for kind, values in record["perturbations"].items():
            points = zip(thresholds, values["by_threshold"])
            curves[str(run["folder"]), kind]["threshold"] = [{"threshold": t, "forgetting": bits} for t, bits in points]

    def panels(name, kinds, xlabel, ylabel, caption, draw):
        size = (4.2 * len(kinds) + 1.2, 4.2)
        figure, axes = plt.subplots(1, len(kinds), figsize=size, sharey=True, squeeze=False, layout="constrained")
        for axis, kind in zip(axes[0], kinds):
            own = {run: row for (run, of), row in last.items() if of == kind}
            axis.set_title(f"perturbation: {kind}, n = {len(own)} runs{draw(axis, kind, own)}", fontsize=10)
            axis.set(xlabel=xlabel)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set(ylabel=ylabel)
        figure.legend(handles=handles, loc="outside right center", frameon=False)
        report.save(figure, folder / name, caption)

    def against_accuracy(name, kinds, xlabel, quantity, value):
        caption = "A marker is a run, after its last epoch; Kendall's tau has a 95 % bootstrap interval over settings."

        def draw(axis, kind, own):
            for row in own.values():
                point = [value(row)], [100 * row["accuracy"]]
                axis.plot(*point, linestyle="", alpha=0.8, **style(row["method"], row["m"], row["rho"]))
            return f"\nKendall's tau {described(found, kind, quantity)}"

        panels(name, kinds, xlabel, "accuracy, %", caption, draw)

    def over(x, every):
        def draw(axis, kind, own):
            groups = {}
            for run, row in own.items():
                groups.setdefault((row["method"], row["m"], row["rho"]), []).extend(curves[run, kind][x])
            for setting, points in groups.items():
                report.band(
                    axis, report.series(points, x, "forgetting"), linewidth=1, markevery=every, **style(*setting)
                )
            axis.xaxis.set_major_locator(MaxNLocator(integer=x == "epoch"))
            return ""

        means = "Lines are means over runs of one method, m and rho; bands go from the least to the greatest."
        panels(f"forgetting_{x}s", kinds, x, "forgetting, bits", means, draw)

    against_accuracy("forgetting_accuracy", kinds, "forgetting, bits", "forgetting", lambda row: row["forgetting"])
    against_accuracy("flatness_accuracy", [most], "flatness, -lambda_max", "flatness", lambda row: -row["lambda_max"])
    over("epoch", every=1)
    over("threshold", every=max(1, len(thresholds) // 5))


def described(found, kind, quantity) -> str:
    """A tau after the last epoch, with its interval, or why there is none."""
    which = {"perturbation": kind, "epochs": "last", "quantity": quantity, "target": "accuracy", "fixed": None}
    own = [c for c in found if which.items() <= c.items()]
    if not own:
        return "is not there: too few runs"
    if np.isnan(own[0]["tau"]):
        return "is not there: all values are equal"
    few = np.isnan(own[0]["low"])
    interval = "too few settings for an interval" if few else f"{own[0]['low']:+.2f} to {own[0]['high']:+.2f}"
    return f"{own[0]['tau']:+.2f} ({interval})"
