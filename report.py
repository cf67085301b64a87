"""Tables and pictures of accuracies."""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

matplotlib.use("agg")


def matched(first: dict, other: dict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of two models was right, on the images that both have seen."""
    _, one, two = np.intersect1d(first["key"], other["key"], return_indices=True)
    return first["top1"][one], other["top1"][two]


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
