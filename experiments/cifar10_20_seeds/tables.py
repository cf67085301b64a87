"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.cifar10_20_seeds.tables                    # write the tables anew
python -m experiments.cifar10_20_seeds.tables --collect outputs  # first data/, from outputs/
"""

import json
from pathlib import Path

import pandas as pd
import torch

from experiments import page
from experiments.page import decisions, difference, interval, spread

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.cifar10_20_seeds.tables"
METHODS = {"base": "base", "sam": "SAM", "asam": "ASAM", "obf": "OBF, gamma to 0"}
EPOCHS = {30: "", 60: ", twice the epochs", 120: ", four times the epochs"}
TWICE, FOUR_TIMES = "base, twice the epochs", "base, four times the epochs"
UNTUNED = "base, the recipe's lr and weight decay"
RECIPE, FIRST_SEED = 5e-4, 100  # that weight decay; smaller seeds are for tuning
ORDER = ["base", UNTUNED, "base, m 32", TWICE, "SAM", "SAM, m 32", "ASAM", "OBF, gamma to 0"]
ORDER += [f"{name}, twice the epochs" for name in ("SAM", "SAM, m 32", "ASAM")] + [FOUR_TIMES]
KEYS = ["row", "epochs", "lr", "weight_decay", "rho", "seed"]  # by which runs are told apart
SIZE = 0.5  # points that would matter, by the plan
# Which row is to be better than which, by the plan's families.
FAMILIES = {
    "1": [
        ("SAM", "base"),
        ("ASAM", "base"),
        ("OBF, gamma to 0", "base"),
        ("SAM, m 32", "base, m 32"),
        ("SAM, m 32", "SAM"),
        ("base, m 32", "base"),
        ("OBF, gamma to 0", "SAM"),
        (TWICE, "base"),
        (TWICE, "SAM, m 32"),
        (TWICE, "ASAM"),
    ],
    "2": [
        *((f"{name}, twice the epochs", FOUR_TIMES) for name in ("SAM", "SAM, m 32", "ASAM")),
        (FOUR_TIMES, TWICE),
    ],
}


def row_of(settings: dict) -> str:
    """The name of a run's row."""
    if settings["weight_decay"] == RECIPE and settings["seed"] >= FIRST_SEED:
        return UNTUNED
    m = f", m {settings['m']}" if settings["m"] != settings["batch_size"] else ""
    return METHODS[settings["method"]] + m + EPOCHS[settings["epochs"]]


def collect(outputs: Path):
    """Add the runs that are there, and their models' evaluation, to the data files."""
    sweeps = [outputs / f"cifar10_20_seeds_{name}" for name in ("tune", "rho")]
    tried = [line for sweep in sweeps for *_, line in page.lines_of(sweep, row_of, KEYS)]
    page.update(DATA / "tune.csv", tried, KEYS, ORDER)

    judged = json.loads((outputs / "cifar10_20_seeds_test" / "results.json").read_text())["results"]
    lines = []
    for run, settings, line in page.lines_of(outputs / "cifar10_20_seeds", row_of, KEYS):
        measures = judged[str(run / "last")]["test"]
        split = page.training_images(settings)
        right = page.predicted(run / "last", split["image"]) == torch.tensor(split["label"])
        line |= {"nll": measures["nll"], "ece": measures["ece"]}
        lines.append(line | {"train": right.double().mean().item()})
    page.update(DATA / "runs.csv", lines, KEYS, ORDER)


def runs_of_whole_seeds() -> pd.DataFrame:
    """The runs of the seeds that every row of the first family has."""
    runs = pd.read_csv(DATA / "runs.csv")
    rows = {row for pair in FAMILIES["1"] for row in pair}
    counts = runs[runs["row"].isin(rows)].groupby("seed")["row"].nunique()
    return runs[runs["seed"].isin(counts.index[counts == len(rows)])]


def decisive() -> list[dict]:
    """The comparisons that decide, corrected within each family all of whose rows have run."""
    runs = runs_of_whole_seeds()
    return [
        {"family": family, **line}
        for family, pairs in FAMILIES.items()
        if {row for pair in pairs for row in pair} <= set(runs["row"])
        for line in decisions(runs, pairs, SIZE)
    ]


def passes(own: pd.DataFrame) -> int:
    """How many passes the runs of a row make, in units of base's."""
    return own["epochs"].iloc[0] // 30 * (1 if own["row"].iloc[0].startswith("base") else 2)


def accuracy() -> list[dict]:
    """Each row, with its cost."""
    runs = runs_of_whole_seeds()
    time, lines = page.relative_time(runs), []
    for row, own in runs.groupby("row", sort=False):
        line = {"row": row, "n": len(own)}
        line["weight decay"] = f"{own['weight_decay'].iloc[0]:g}"
        line["rho"] = "" if row.startswith("base") else f"{own['rho'].iloc[0]:g}"
        line |= {"passes": passes(own), "time": f"{time[row]:.1f}"}
        line["test, %"] = spread(own["test"], 100)
        line["points above base"] = "" if row == "base" else interval(difference(runs, row, "base"))
        line |= {"NLL": spread(own["nll"]), "ECE, %": f"{100 * own['ece'].mean():.1f}"}
        lines.append(line | {"on training images, %": f"{100 * own['train'].mean():.1f}"})
    return lines


def base() -> list[dict]:
    """What base was tried with."""
    tried = pd.read_csv(DATA / "tune.csv")
    return page.tried_together(tried[tried["row"] == "base"], "weight_decay", "lr")


def rho() -> list[dict]:
    """What each method was tried with, at base's lr."""
    tried = pd.read_csv(DATA / "tune.csv")
    tried = tried[tried["row"] != "base"]
    names = tried["row"] + tried["weight_decay"].map(", weight decay {:g}".format)
    return page.tried(tried.assign(row=names), "rho")


TABLES = {"decisive": decisive, "accuracy": accuracy, "base": base, "rho": rho}


def main(argv=None):
    """Run as from the command line."""
    page.remake(__doc__, HERE / "README.md", SCRIPT, TABLES, collect, argv)


if __name__ == "__main__":
    main()
