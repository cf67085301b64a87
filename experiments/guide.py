"""The tables of docs/guide.md and the README's first one, from the data of the experiments.

python -m experiments.guide
"""

import re

from experiments.cifar10 import tables as cifar10
from experiments.page import ROOT, compared, difference, fill, interval, verdict
from experiments.text import tables as texts
from experiments.wrong_labels import tables as wrong_labels

SCRIPT = "python -m experiments.guide"
RIGHT, WRONG = "right labels", "{:.0f} % of the labels wrong"
# Points that would matter with right labels: those of experiments/cifar10_20_seeds/plan.md.
SIZE = 0.5
NAMES = {
    cifar10.TWICE: "SGD for twice the epochs",
    wrong_labels.BEST: "SGD, best epoch on held-out images",
}
# The README's rows, by their labels.
HEADLINE = {
    RIGHT: ("SAM", "OBF, gamma 1", "ASAM", cifar10.TWICE),
    WRONG.format(40): (wrong_labels.BEST, "SAM", "OBF, gamma to 0", "SGD, weight decay 0.005"),
}


def line(labels, row, rho, found, n, time, size) -> dict:
    """A row of the guide; a difference without ``holm`` has no verdict."""
    name = NAMES.get(row, row)
    return {
        "training images": labels,
        "trained with": f"{name}, rho {float(rho):g}" if rho else name,
        "points above SGD (95 %)": interval(found),
        "n": n,
        "time": time,
        "verdict": verdict(found, size) if "holm" in found else "",
    }


def with_right_labels() -> dict[str, dict]:
    """By row of experiments/cifar10: a row of the guide."""
    found, runs, time = cifar10.compared(), cifar10.runs_by_row(), cifar10.relative_time()
    lines = {}
    for row in ("SAM", "OBF, gamma 1", "OBF, gamma to 0", "ASAM", cifar10.TWICE):
        one, own = found[row, "above base"], runs[row]
        points = one | {key: 100 * one[key] for key in ("mean", "low", "high")}
        lines[row] = line(RIGHT, row, own["rho"].iloc[0], points, len(own), time[row], SIZE)
    return lines


def with_wrong_labels(noise: float) -> dict[str, dict]:
    """By row of experiments/wrong_labels: a row of the guide, above base's last epoch."""
    runs = wrong_labels.runs_of(noise)
    found = compared(runs, wrong_labels.pairs(runs))
    time, lines = cifar10.relative_time(), {}
    for row, own in runs.groupby("row", sort=False):
        if row == wrong_labels.LAST:
            continue
        pair, rho = (row, wrong_labels.LAST), own["rho"].iloc[0]
        one = found[pair] if pair in found else difference(runs, *pair)
        how = (len(own), time.get(row, time["base"]), wrong_labels.SIZE)
        lines[row] = line(WRONG.format(100 * noise), row, rho, one, *how)
    return lines


def afterwards() -> dict[str, dict]:
    """By what was tried of base at 40 %, without a plan: a row of the guide."""
    runs, lines = wrong_labels.with_controls(), {}
    for row, own in runs.groupby("row", sort=False):
        if not row.startswith("SGD"):
            continue
        one = difference(runs, row, wrong_labels.LAST)
        epochs = re.search(r"(\d+) epochs", row)
        time = int(epochs[1]) / wrong_labels.CONTROLS["epochs"][0] if epochs else 1
        how = (len(own), f"{time:.1f}", wrong_labels.SIZE)
        lines[row] = line(WRONG.format(40), row, "", one, *how) | {"verdict": "not planned"}
    return lines


def situations() -> dict[str, dict[str, dict]]:
    """The rows of the guide, by their labels."""
    wrong = {WRONG.format(100 * noise): with_wrong_labels(noise) for noise in wrong_labels.levels()}
    wrong[WRONG.format(40)] |= afterwards()
    return {RIGHT: with_right_labels(), **wrong}


def guide() -> list[dict]:
    """Every row."""
    return [row for lines in situations().values() for row in lines.values()]


def text() -> list[dict]:
    """Every row with a language model; what decides there is base for the same passes."""
    rows = []
    for setting, runs in texts.measured().items():
        decided = compared(runs, texts.COMPARISONS)
        for row in [row for row in texts.ROWS if row != "base"]:
            above = difference(runs, row, "base")
            rho = runs["rho"][runs["row"] == row].iloc[0]
            found = {
                "sentences": f"`{setting}`",
                "trained with": f"{row}, rho {rho:g}" if rho else row,
                "points above base (95 %)": interval(above),
                "points above base for twice the epochs (95 %)": "",
                "n": runs["seed"].nunique(),
                "passes": f"{texts.passes(runs, row):g}",
                "verdict": "",
            }
            if one := decided.get((row, texts.TWICE)):
                found["points above base for twice the epochs (95 %)"] = interval(one)
                found["verdict"] = verdict(one, texts.SIZE.get(setting, 1.0))
            rows.append(found)
    return rows or [{"": "no setting has five seeds yet"}]


def headline() -> list[dict]:
    """The README's rows."""
    found = situations()
    return [found[labels][row] for labels, rows in HEADLINE.items() for row in rows]


if __name__ == "__main__":
    fill(ROOT / "docs" / "guide.md", SCRIPT, {"guide": guide, "text": text})
    fill(ROOT / "README.md", SCRIPT, {"headline": headline})
