"""Tables and pictures."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("agg")


def show(results, differences, markdown):
    """Print every model's measures on every benchmark, and the differences to the first model."""
    lines = [["model", "benchmark", "images", "top-1 %", "95 %", "top-5 %", "NLL", "ECE %"]]
    for model, benchmarks in results.items():
        for benchmark, r in benchmarks.items():
            interval = f"{100 * r['top1_low']:.2f} to {100 * r['top1_high']:.2f}"
            measures = (f"{100 * r['top1']:.2f}", interval, f"{100 * r['top5']:.2f}", f"{r['nll']:.3f}")
            lines.append([model, benchmark, str(r["examples"]), *measures, f"{100 * r['ece']:.2f}"])
    print()
    table(lines, markdown)
    lines = [["model", "benchmark", "top-1 points", "95 %", "p"]]
    for model, benchmarks in differences.items():
        for benchmark, d in benchmarks.items():
            interval = f"{100 * d['low']:+.2f} to {100 * d['high']:+.2f}"
            lines.append([model, benchmark, f"{100 * d['difference']:+.2f}", interval, f"{d['p_value']:.3g}"])
    if differences:
        print(f"\nAgainst {next(iter(results))}, on the same images (bootstrap interval, McNemar's exact test):\n")
        table(lines, markdown)


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
        table(lines, markdown)
    if len(means) > 1:
        print(f"\nMean over corruptions, against {next(iter(corrupted))}, on the same images:\n")
        table(means, markdown)
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
        table(lines, markdown)
    for model, one in found.items():
        if settings := one.get("elsewhere"):
            shown = " or ".join(" ".join(f"--{k.replace('_', '-')} {v}" for k, v in s.items()) for s in settings)
            print(f"\n{model}: to compare with what timm publishes, evaluate with {shown}")


def table(lines, markdown):
    """Print rows of text in columns; the first is the head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    separator, edge = (" | ", "|") if markdown else ("  ", "")
    for i, line in enumerate(lines):
        cells = separator.join(cell.ljust(width) for cell, width in zip(line, widths))
        print(f"{edge} {cells} {edge}" if markdown else cells.rstrip())
        if markdown and i == 0:
            print("|" + "|".join(" --- " for _ in line) + "|")


def draw(results, path):
    """A bar for each model on each benchmark, with the 95 % interval of top-1."""
    benchmarks = list(next(iter(results.values())))
    figure, axes = plt.subplots(figsize=(2 + 1.1 * len(benchmarks) + 0.3 * len(results), 4), layout="constrained")
    width = 0.8 / len(results)
    for i, (model, measured) in enumerate(results.items()):
        top1 = np.array([[100 * measured[b][key] for b in benchmarks] for key in ("top1", "top1_low", "top1_high")])
        errors = [top1[0] - top1[1], top1[2] - top1[0]]
        places = np.arange(len(benchmarks)) + (i - (len(results) - 1) / 2) * width
        axes.bar(places, top1[0], width, yerr=errors, capsize=2, label=model)
    axes.set(ylabel="top-1 accuracy, %", ylim=(0, 100), xticks=range(len(benchmarks)), xticklabels=benchmarks)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def show_correlations(found):
    """Print Kendall's tau of every quantity with accuracy; "-" is what there is not."""
    lines = [["perturbation", "epochs", "quantity", "runs", "tau", "95 %", "p", "above flatness", "95 %"]]
    for c in found:
        names = [c["perturbation"], c["epochs"], c["quantity"], str(c["runs"])]
        tau = [f"{c['tau']:+.2f}", f"{c['low']:+.2f} to {c['high']:+.2f}", f"{c['p_value']:.2g}"]
        above = [f"{c['above_rival']:+.2f}", f"{c['above_low']:+.2f} to {c['above_high']:+.2f}"]
        lines.append([*names, *("-" if "nan" in cell else cell for cell in tau + above)])
    if found:
        print("\nKendall's tau with test accuracy (bootstrap intervals over runs):\n")
        table(lines, False)


def draw_forgetting(measured, rows, thresholds, folder):
    """Forgetting and flatness against accuracy, and forgetting over epochs and thresholds."""
    kinds = list(dict.fromkeys(row["perturbation"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colours = {name: f"C{i}" for i, name in enumerate(methods)}
    last = {(row["run"], row["perturbation"]): row for row in sorted(rows, key=lambda row: row["epoch"])}.values()

    def panels(name, xlabel, ylabel, points):
        figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 3.6), sharey=True, layout="constrained")
        for axis, kind in zip(np.atleast_1d(axes), kinds):
            for method in methods:
                points(axis, kind, method)
            axis.set(xlabel=xlabel, title=f"perturbation: {kind}")
            axis.spines[["top", "right"]].set_visible(False)
        np.atleast_1d(axes)[0].set(ylabel=ylabel)
        figure.legend(*np.atleast_1d(axes)[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
        figure.savefig(folder / f"{name}.png", dpi=150)
        plt.close(figure)

    def against_accuracy(quantity):
        def points(axis, kind, method):
            chosen = [row for row in last if row["perturbation"] == kind and row["method"] == method]
            values = [quantity(row) for row in chosen], [100 * row["accuracy"] for row in chosen]
            axis.scatter(*values, color=colours[method], label=method, s=14, alpha=0.7)

        return points

    def over_epochs(axis, kind, method):
        chosen = [row for row in rows if row["perturbation"] == kind and row["method"] == method]
        epochs = sorted({row["epoch"] for row in chosen})
        values = [np.mean([row["forgetting"] for row in chosen if row["epoch"] == epoch]) for epoch in epochs]
        axis.plot(epochs, values, "o-", color=colours[method], label=method, markersize=4)

    def over_thresholds(axis, kind, method):
        chosen = {}
        for run, _, record in measured:  # a run's last epoch comes last
            if run["settings"].method == method and kind in record["perturbations"]:
                chosen[run["folder"]] = record["perturbations"][kind]["by_threshold"]
        if chosen:
            axis.plot(thresholds, np.mean(list(chosen.values()), 0), color=colours[method], label=method)

    accuracy, bits = "accuracy, %", "forgetting, bits"
    panels("forgetting_accuracy", bits, accuracy, against_accuracy(lambda row: row["forgetting"]))
    panels("flatness_accuracy", "flatness, -lambda_max", accuracy, against_accuracy(lambda row: -row["lambda_max"]))
    panels("forgetting_epochs", "epoch", bits, over_epochs)
    panels("forgetting_thresholds", "threshold", bits, over_thresholds)


def pairs(point: dict) -> str:
    """Settings in one line: key=value,..."""
    return ",".join(f"{key}={value}" for key, value in point.items())


def show_sweep(rows, choose):
    """Print top-1, mean and standard deviation over seeds, by settings; of those to ``choose``, the best on validation.

    Each row has a ``point``, the settings of a run, and its ``results``, top-1 in [0, 1] by split.
    """
    groups = {}
    for row in rows:
        point = row["point"]
        shown = {key: value for key, value in point.items() if key not in ("seed", *choose)}
        chosen = {key: point[key] for key in choose if key in point}
        groups.setdefault(pairs(shown), {}).setdefault(pairs(chosen), []).append(row["results"])
    splits = list(rows[0]["results"])
    lines = [["settings", *(["chosen", "of"] if choose else []), "runs", *(f"{split} %" for split in splits)]]
    for shown, candidates in groups.items():
        chosen = next(iter(candidates))
        if choose:
            chosen = max(candidates, key=lambda name: np.mean([result["validation"] for result in candidates[name]]))
        results = candidates[chosen]
        cells = [shown, *([chosen, str(len(candidates))] if choose else []), str(len(results))]
        for split in splits:
            values = [100 * result[split] for result in results]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}")
        lines.append(cells)
    print("\nTop-1, mean ± standard deviation over seeds" + (", best on validation" if choose else "") + ":\n")
    table(lines, True)
