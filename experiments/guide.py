"""The tables of docs/guide.md and the README's first one, from the data of the experiments.

python -m experiments.guide
"""

import re

from experiments import page
from experiments.cifar10_20_seeds import tables as right_labels
from experiments.page import ROOT, compared, difference, fill, interval, verdict
from experiments.text import tables as texts
from experiments.wrong_labels import tables as wrong_labels

SCRIPT = "python -m experiments.guide"
RIGHT, WRONG = "right labels", "{:.0f} % of the labels wrong"
NAMES = {
    right_labels.TWICE: "SGD for twice the epochs",
    right_labels.UNTUNED: "SGD, the recipe's lr and weight decay",
    wrong_labels.BEST: "SGD, best epoch on held-out images",
}
# The README's rows, by their labels.
HEADLINE = {
    RIGHT: (right_labels.UNTUNED, "SAM", "OBF, gamma to 0", "ASAM", right_labels.TWICE),
    WRONG.format(40): (wrong_labels.BEST, "SAM", "OBF, gamma to 0", "SGD, weight decay 0.005"),
}

# The guide's first table: a situation, and the row that tells of it, by its labels or setting.
SITUATIONS = [
    ("few images, from scratch", RIGHT, "SAM"),
    ("the same, time for twice the epochs", RIGHT, right_labels.TWICE),
    ("the same, small m", RIGHT, "SAM, m 32"),
    ("many wrong labels", WRONG.format(40), "SGD, weight decay 0.005"),
    ("the same, at a small weight decay", WRONG.format(40), "SAM"),
    ("a language model", "sst5-2000", texts.TWICE),
    ("the same, many wrong labels", "trec-1000-wrong", "ASAM"),
]


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


def relative_time() -> dict[str, float]:
    """By row: its time in units of base's. OBF's does not depend on gamma."""
    time = page.relative_time(right_labels.runs_of_whole_seeds()).to_dict()
    return time | {"OBF, gamma 1": time["OBF, gamma to 0"]}


def with_right_labels() -> dict[str, dict]:
    """By row of experiments/cifar10_20_seeds: a row of the guide."""
    runs, time, lines = right_labels.runs_of_whole_seeds(), relative_time(), {}
    decided = compared(runs, right_labels.FAMILIES["1"])
    for row in (*HEADLINE[RIGHT], "SAM, m 32"):
        own = runs[runs["row"] == row]
        rho = 0 if row in NAMES else own["rho"].iloc[0]
        found = decided.get((row, "base")) or difference(runs, row, "base")
        how = (found, len(own), f"{time[row]:.1f}", right_labels.SIZE)
        lines[row] = line(RIGHT, row, rho, *how)
    return lines


def with_wrong_labels(noise: float) -> dict[str, dict]:
    """By row of experiments/wrong_labels: a row of the guide, above base's last epoch."""
    runs, time, lines = wrong_labels.runs_of(noise), relative_time(), {}
    decided, base = compared(runs, wrong_labels.pairs(runs)), wrong_labels.LAST
    for row, own in runs.groupby("row", sort=False):
        if row == base:
            continue
        found = decided.get((row, base)) or difference(runs, row, base)
        how = (found, len(own), f"{time.get(row, 1):.1f}", wrong_labels.SIZE)
        lines[row] = line(WRONG.format(100 * noise), row, own["rho"].iloc[0], *how)
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


def with_images() -> dict[str, dict[str, dict]]:
    """The guide's rows of images, by their labels."""
    wrong = {WRONG.format(100 * noise): with_wrong_labels(noise) for noise in wrong_labels.levels()}
    wrong[WRONG.format(40)] |= afterwards()
    return {RIGHT: with_right_labels(), **wrong}


def guide() -> list[dict]:
    """Every row of images."""
    return [row for lines in with_images().values() for row in lines.values()]


def with_text() -> dict[str, dict[str, dict]]:
    """The rows of a language model, by setting; what decides there is base for the same passes."""
    lines = {}
    for setting, runs in texts.measured().items():
        decided, time = compared(runs, texts.COMPARISONS), texts.relative_time(runs)
        for row in [row for row in texts.ROWS if row != "base"]:
            rho = runs["rho"][runs["row"] == row].iloc[0]
            found = {
                "sentences": f"`{setting}`",
                "trained with": f"{row}, rho {rho:g}" if rho else row,
                "points above base (95 %)": interval(difference(runs, row, "base")),
                "points above base for twice the epochs (95 %)": "",
                "n": runs["seed"].nunique(),
                "time": f"{time[row]:.1f}",
                "verdict": "",
            }
            if one := decided.get((row, texts.TWICE)):
                found["points above base for twice the epochs (95 %)"] = interval(one)
                found["verdict"] = verdict(one, texts.SIZE.get(setting, 1.0))
            lines.setdefault(setting, {})[row] = found
    return lines


def text() -> list[dict]:
    """Every row of a language model."""
    return [row for lines in with_text().values() for row in lines.values()]


def situations() -> list[dict]:
    """The rows of ``SITUATIONS``, each with a link to its page."""
    found, lines = with_images() | with_text(), []
    for situation, labels, row in SITUATIONS:
        one = found[labels][row]
        above = one.get("points above SGD (95 %)") or one["points above base (95 %)"]
        line = {"situation": situation, "tried": one["trained with"], "points above base": above}
        line |= {key: one[key] for key in ("n", "time", "verdict")}
        experiment = {RIGHT: "cifar10_20_seeds", WRONG.format(40): "wrong_labels"}.get(
            labels, "text"
        )
        lines.append(line | {"measured": f"[here](../experiments/{experiment}/README.md)"})
    return lines


def headline() -> list[dict]:
    """The README's rows."""
    found = with_images()
    return [found[labels][row] for labels, rows in HEADLINE.items() for row in rows]


if __name__ == "__main__":
    tables = {"situations": situations, "guide": guide, "text": text}
    fill(ROOT / "docs" / "guide.md", SCRIPT, tables)
    fill(ROOT / "README.md", SCRIPT, {"headline": headline})
