"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.text.tables                    # write the tables anew
python -m experiments.text.tables --collect outputs  # first make data/ anew, from outputs/text
"""

import json
from pathlib import Path

import pandas as pd

from experiments import page
from experiments.page import decisions, difference, interval, remake, spread, write
from experiments.text.run import FIRST_SEEDS, ROWS, SETTINGS

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.text.tables"
TWICE = "base, twice the epochs"
# Which row is to be better than which: those that decide, by the plan.
COMPARISONS = [
    *((row, TWICE) for row in ("SAM", "OBF, gamma 1", "OBF, gamma to 0", "ASAM")),
    ("OBF, gamma 1", "SAM"),
    ("OBF, gamma to 0", "SAM"),
]
# Points of accuracy that would matter, by the plan; elsewhere it is 1.
SIZE = {"trec-5452": 0.5}
COLUMNS = ["setting", "row", "lr", "rho", "seed", "accuracy", "nll"]
COST = ["updates", "seconds", "cpu_seconds"]


def collect(outputs: Path):
    """Make the data files from the runs that are there."""
    for part, columns in (
        ("tune", [*COLUMNS, *COST]),
        ("seeds", [*COLUMNS, "fitted", "fitted_wrong", *COST]),
    ):
        files = sorted((outputs / "text").glob(f"*/{part}/*.json"))
        runs = pd.DataFrame([json.loads(file.read_text()) for file in files], columns=columns)
        order = {name: i for i, name in enumerate([*SETTINGS, *ROWS])}
        keys = ["setting", "row", "lr", "rho", "seed"]
        runs = runs.sort_values(
            keys, key=lambda own: own.map(order) if own.name in keys[:2] else own
        )
        write(DATA / f"{part}.csv", runs.round(6))


def runs_of(setting: str) -> pd.DataFrame:
    """The runs of the seeds that every row of the setting has."""
    runs = pd.read_csv(DATA / "seeds.csv").rename(columns={"accuracy": "test"})
    runs = runs[runs["setting"] == setting]
    whole = runs.groupby("seed")["row"].nunique() == len(ROWS)
    return runs[runs["seed"].isin(whole[whole].index)]


def measured() -> dict[str, pd.DataFrame]:
    """The runs of each setting that has its first five seeds: fewer decide nothing."""
    found = {setting: runs_of(setting) for setting in SETTINGS}
    whole = [setting for setting in found if found[setting]["seed"].nunique() >= FIRST_SEEDS]
    return {setting: found[setting] for setting in whole}


def passes(runs: pd.DataFrame, row: str) -> float:
    """How many passes a row makes, in units of base's."""
    updates = runs.groupby("row")["updates"].first()
    return updates[row] / updates["base"] * (1 if ROWS[row][0] == "lr" else 2)


def relative_time(runs: pd.DataFrame) -> pd.Series:
    """By row: the processor's time in training, in units of base's."""
    seconds = runs.groupby("row")["cpu_seconds"].mean()
    return seconds / seconds["base"]


def decisive() -> list[dict]:
    """The comparisons that decide, corrected within each setting."""
    rows = [
        {"setting": f"`{setting}`", "n": runs["seed"].nunique(), **row}
        for setting, runs in measured().items()
        for row in decisions(runs, COMPARISONS, SIZE.get(setting, 1.0))
    ]
    return rows or [{"": "no setting has five seeds yet"}]


def accuracy() -> list[dict]:
    """Each row in each setting, with its cost."""
    rows = []
    for setting, runs in measured().items():
        time = relative_time(runs)
        for row in ROWS:
            own = runs[runs["row"] == row]
            above = difference(runs, row, "base")
            line = {
                "setting": f"`{setting}`",
                "row": row,
                "n": len(own),
                "lr": f"{own['lr'].iloc[0]:g}",
                "rho": f"{own['rho'].iloc[0]:g}",
                "test, %": spread(own["test"], 100),
                "points above base": "",
                "NLL": spread(own["nll"]),
                "passes": f"{passes(runs, row):g}",
                "time": f"{time[row]:.2f}",
            }
            if row != "base":
                line["points above base"] = interval(above)
            if own["fitted_wrong"].notna().all():
                line["wrong labels given back, %"] = spread(own["fitted_wrong"], 100)
            rows.append(line)
    return rows or [{"": "no setting has five seeds yet"}]


def tuning() -> list[dict]:
    """Accuracy on the sentences held out, for every value that was tried."""
    tries, rows = pd.read_csv(DATA / "tune.csv"), []
    for (setting, row), own in tries.groupby(["setting", "row"], sort=False):
        tuned = ROWS[row][0]
        values = page.best_in_bold(own.set_index(tuned)["accuracy"])
        rows.append({"setting": f"`{setting}`", "row": row, "lr or rho: held out, %": values})
    return rows or [{"": "nothing is tuned yet"}]


TABLES = {"decisive": decisive, "accuracy": accuracy, "tuning": tuning}


def main(argv=None):
    """Run as from the command line."""
    remake(__doc__, HERE / "README.md", SCRIPT, TABLES, collect, argv)


if __name__ == "__main__":
    main()
