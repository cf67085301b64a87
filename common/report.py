"""Tables and pictures of training runs, and what all pictures share."""

import itertools
import json
import textwrap
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from scipy.special import expit, logit

matplotlib.use("agg")

EDGES = (
    5e-4,
    1 - 5e-4,
)  # where accuracies of 0 and 1 are drawn: on the logit scale they are infinite
PERCENT = (0.1, 0.2, 0.5, 1, 2, 5, *range(10, 100, 10), 95, 98, 99, 99.5, 99.8, 99.9)  # ticks
MAX_CURVES = 20  # that a picture can tell apart
HIGH = 0.9  # accuracies above it are crowded on a linear axis


def table(lines, markdown):
    """Print rows of text in columns; the first is the head."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    separator, edge = (" | ", "|") if markdown else ("  ", "")
    for i, line in enumerate(lines):
        cells = separator.join(cell.ljust(width) for cell, width in zip(line, widths))
        print(f"{edge} {cells} {edge}" if markdown else cells.rstrip())
        if markdown and i == 0:
            print("|" + "|".join(" --- " for _ in line) + "|")


def save(figure, path, caption, suffixes=(".png", ".svg"), dpi=150):
    """Write a picture as PNG and as SVG, below it what its marks mean."""
    caption = caption.replace(" %", "\N{NO-BREAK SPACE}%")
    figure.supxlabel(textwrap.fill(caption, int(13 * figure.get_figwidth())), fontsize=9)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once is enough
    for suffix in suffixes:
        figure.savefig(path.with_suffix(suffix), dpi=dpi)
    plt.close(figure)


def logit_axis(panel, which, values):
    """Put the axis ``which`` ("x" or "y") on the logit scale.

    On it 0.1 % is far from 1 %, and 98 % from 99 %. Its limits fit the ``values``, accuracies in
    [0, 1].
    """
    ends = logit(np.clip([np.min(values), np.max(values)], *EDGES))
    low, high = ends + np.array([-1, 1]) * max(0.05 * np.ptp(ends), 0.05)
    ticks, nearest = [], (high - low) / 9
    for tick in PERCENT:
        place = logit(tick / 100)
        apart = not ticks or place - logit(ticks[-1] / 100) > nearest
        if low <= place <= high and apart:
            ticks.append(tick)
    if len(ticks) < 3:
        linear = MaxNLocator(5).tick_values(*100 * expit([low, high]))
        ticks = [tick for tick in linear if 0 < tick < 100]
    panel.set(**{f"{which}scale": "logit"})
    axis = panel.xaxis if which == "x" else panel.yaxis
    axis.set_major_locator(FixedLocator(np.array(ticks) / 100))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda tick, _: f"{100 * tick:g}")
    panel.set(**{f"{which}lim": expit([low, high])})


def series(rows, x, y):
    """The values of ``y`` by those of ``x``; what is None is left out."""
    values = {}
    for row in rows:
        if row.get(y) is not None:
            values.setdefault(row[x], []).append(row[y])
    return values


def band(axis, values, **style):
    """The means of a ``series`` as a line, and a band from the least to the greatest value."""
    xs = sorted(values)
    axis.plot(xs, [np.mean(values[x]) for x in xs], **style)
    if any(len(several) > 1 for several in values.values()):
        low, high = ([end(values[x]) for x in xs] for end in (min, max))
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)


def metrics_rows(folder: Path) -> list[dict]:
    """The lines of a run's ``metrics.jsonl``, without one that a kill cut off."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def read_metrics(folder: Path) -> list[dict]:
    """``metrics_rows``; in each, ``run`` is the folder."""
    return [{**row, "run": str(folder)} for row in metrics_rows(folder)]


def draw_curves(groups, path):
    """Loss, accuracy, lr and a rho that changes, over epochs; what no run has is left out.

    Args:
        groups: by name, ``read_metrics`` of a run, or of all runs that differ in the seed alone.
            Of more than ``MAX_CURVES`` the best on the held-out images at the end are drawn.
    """
    own = {name: held_out_of(rows[0]) for name, rows in groups.items()}

    def final(name):
        accuracies = series(groups[name], "epoch", own[name])
        return np.mean(accuracies[max(accuracies)])

    best = sorted(groups, key=final, reverse=True)[:MAX_CURVES]
    shown = {name: rows for name, rows in groups.items() if name in best}
    runs = {name: len({row["run"] for row in rows}) for name, rows in shown.items()}
    labels = {name: f"{name} ({runs[name]} runs)" if runs[name] > 1 else name for name in shown}
    held_out = dict.fromkeys(own[name] for name in shown)
    titles = {"loss": "training loss", **{key: f"top-1 on {key}, %" for key in held_out}}
    titles |= {"train": "top-1 in training, %", "lr": "learning rate", "rho": "rho"}
    curves = {key: {n: series(rows, "epoch", key) for n, rows in shown.items()} for key in titles}
    panels = [key for key in titles if any(curves[key].values())]
    if "rho" in panels and not any(map(_changes, curves["rho"].values())):
        panels.remove("rho")
    top1 = [v for key in (*held_out, "train") for v in _values(curves[key])]
    logits = max(top1) > HIGH
    grid = {"layout": "constrained", "squeeze": False}
    columns = min(len(panels), 3 if len(panels) > 4 else 2)
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 3.2 * rows), **grid)
    for axis, key in itertools.zip_longest(axes.flat, panels):
        axis.set_visible(key is not None)
        if key is not None:
            accuracy = key in (*held_out, "train")
            _draw_panel(axis, curves[key], labels, titles[key], accuracy, logits)
    if len(shown) > 1:
        several = f"the {len(shown)} best of {len(groups)} settings"
        title = several if len(shown) < len(groups) else None
        handles = axes[0, 0].get_legend_handles_labels()
        figure.legend(*handles, loc="outside right", frameon=False, fontsize=8, title=title)
    save(figure, path, _about_curves(panels, logits, max(runs.values()) > 1))


def held_out_of(accuracies: dict) -> str:
    """The split that a run is judged on while it trains: validation, else test."""
    return "validation" if "validation" in accuracies else "test"


def _values(curves):
    return [v for curve in curves.values() for several in curve.values() for v in several]


def _changes(curve):
    return len({value for several in curve.values() for value in several}) > 1


def _draw_panel(axis, curves, labels, title, accuracy, logits):
    """One quantity over epochs, a line for each group of runs."""
    if accuracy and logits:
        logit_axis(axis, "y", _values(curves))
        for name, curve in curves.items():
            curves[name] = {epoch: np.clip(several, *EDGES) for epoch, several in curve.items()}
    elif accuracy:
        axis.yaxis.set_major_formatter(lambda tick, _: f"{100 * tick:g}")
    colors = plt.get_cmap("tab10" if len(curves) <= 10 else "tab20")
    for i, (name, curve) in enumerate(curves.items()):
        band(axis, curve, color=colors(i), label=labels[name], marker=".")
    axis.set(xlabel="epoch", title=title)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.spines[["top", "right"]].set_visible(False)


def _about_curves(panels, logits, several):
    """What the marks of the picture mean."""
    parts = ["Loss and accuracy in training are those of augmented images, with SAM at perturbed "]
    parts.append("weights")
    parts.append("; accuracies are on the logit scale" if logits else "")
    rates = "learning rate and rho are" if "rho" in panels else "the learning rate is"
    parts.append(f"; {rates} that of an epoch's last update.")
    if several:
        parts.append(" Lines are means over seeds, bands go from the least to the greatest.")
    return "".join(parts)


def pairs(point: dict) -> str:
    """Settings in one line: key=value,..."""
    return ",".join(f"{key}={value}" for key, value in point.items())


def show_sweep(rows, choose):
    """Print top-1, mean and standard deviation over seeds, by settings.

    Of the settings to ``choose``, the best on validation. Each row has a ``point``, the settings of
    a run, and its ``results``, top-1 in [0, 1] by split.
    """
    groups = {}
    for row in rows:
        point = row["point"]
        shown = {key: value for key, value in point.items() if key not in ("seed", *choose)}
        chosen = {key: point[key] for key in choose if key in point}
        candidates = groups.setdefault(pairs(shown), {})
        candidates.setdefault(pairs(chosen), []).append(row["results"])
    splits = list(dict.fromkeys(split for row in rows for split in row["results"]))
    held_out = {held_out_of(row["results"]) for row in rows}
    head = ["settings", "chosen", "of", "runs"] if choose else ["settings", "runs"]
    lines = [head + [f"{split} %" for split in splits]]
    means = []
    for shown, candidates in groups.items():
        chosen = next(iter(candidates))
        if choose:
            chosen = max(candidates, key=lambda name: mean_top1(candidates[name], "validation"))
        results = candidates[chosen]
        means.append(mean_top1(results, held_out_of(results[0])))
        cells = [shown, chosen, str(len(candidates))] if choose else [shown]
        cells.append(str(len(results)))
        for split in splits:
            values = [100 * result[split] for result in results if split in result]
            spread = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.2f}{spread}" if values else "-")
        lines.append(cells)
    marked = f"the best on {min(held_out)} in bold"
    if len(held_out) > 1:
        marked = "none in bold, since only some runs have validation images"
    elif len(means) > 1:
        best = lines[1 + int(np.argmax(means))]
        best[0] = f"**{best[0]}**"
    print(f"\nTop-1, mean ± standard deviation over seeds; {marked}:\n")
    table(lines, True)


def mean_top1(results, split):
    """The mean over runs of top-1 on a split."""
    return np.mean([result[split] for result in results])
