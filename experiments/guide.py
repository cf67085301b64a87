"""The table of docs/guide.md and the README's first one, from the data of the experiments.

python -m experiments.guide
"""

from collections.abc import Iterator

from experiments.cifar10 import tables as cifar10
from experiments.page import ROOT, fill, interval, verdict
from experiments.wrong_labels import tables as wrong_labels

SCRIPT = "python -m experiments.guide"
FEW = "from scratch, 5,000 images"
# Points that would matter, fixed before the runs of experiments/cifar10_20_seeds.
CIFAR10_SIZE = 0.5
# The README's rows: by situation, what was used.
BEST = {
    FEW: ("SAM", "OBF, gamma 1", "ASAM", "base, twice the epochs"),
    "the same, 40 % of the labels wrong": ("SAM", "OBF, gamma 1", "ASAM", wrong_labels.BEST),
}


def line(situation, row, rho, found, n, time, size, page) -> dict:
    """A row of the guide; without ``holm`` a difference has no verdict."""
    name = f"{row}, ρ {rho}" if rho else row
    return {
        "situation": situation,
        "trained with": name,
        "points above SGD (95 %)": interval(found["mean"], found["low"], found["high"]),
        "n": n,
        "time": time,
        "worth it?": verdict(found, size) if "holm" in found else "costs nothing",
        "runs": f"[{page}](../experiments/{page}/README.md)",
    }


def from_scratch() -> Iterator[tuple]:
    """Few images, a network from scratch; p values are corrected over all rows of its page."""
    found, runs, time = cifar10.corrected(), cifar10.runs_by_row(), cifar10.relative_time()
    for row, own in runs.items():
        if row == "base":
            continue
        one = found[row, "above base"]
        points = one | {key: 100 * one[key] for key in ("mean", "low", "high")}
        rho = own["rho"].iloc[0]
        yield row, line(FEW, row, rho, points, len(own), time[row], CIFAR10_SIZE, "cifar10")


def with_wrong_labels() -> Iterator[tuple]:
    """Wrong labels, above base's last epoch."""
    time = cifar10.relative_time()
    for noise in wrong_labels.levels():
        situation = f"the same, {noise:.0%} of the labels wrong".replace("%", " %")
        found, rows = wrong_labels.compared(noise), wrong_labels.by_row(noise)
        for row, own in rows.items():
            if row == wrong_labels.LAST:
                continue
            rho = "" if row == wrong_labels.BEST else f"{own['rho'].iloc[0]:g}"
            one = found.get((row, wrong_labels.LAST))
            one = one or wrong_labels.difference(rows, row, wrong_labels.LAST)
            cost = time.get(row, "1.0")
            made = line(situation, row, rho, one, len(own), cost, wrong_labels.SIZE, "wrong_labels")
            yield situation, row, made
