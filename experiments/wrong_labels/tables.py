"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.wrong_labels.tables                    # write the tables anew
python -m experiments.wrong_labels.tables --collect outputs  # first make data/ anew, from outputs/
"""

from pathlib import Path

import pandas as pd
import torch

from common import data
from experiments import page
from experiments.page import decisions, difference, finished, interval, remake, spread, write

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.wrong_labels.tables"
METHODS = {
    ("base", ""): "base",
    ("sam", ""): "SAM",
    ("asam", ""): "ASAM",
    ("obf", "1.0"): "OBF, gamma 1",
    ("obf", "1e-12"): "OBF, gamma to 0",
}
LAST, BEST = "base, last epoch", "base, best epoch"
SIZE = 1.0  # points that would matter, by the plan
# What was tried afterwards, at 40 %: by setting, the recipe's value and a name.
CONTROLS = {
    "epochs": (30, "{} epochs"),
    "weight_decay": (5e-4, "weight decay {:g}"),
    "smoothing": (0.0, "label smoothing {:g}"),
}


def collect(outputs: Path):
    """Make the data files from the runs that are there."""
    rows = []
    for run, settings, results in finished(outputs / "wrong_labels"):
        gamma = str(settings["gamma"]) if settings["method"] == "obf" else ""
        row = METHODS[settings["method"], gamma]
        rho = "" if row == "base" else settings["rho"]
        for name in ("last", "best") if row == "base" else ("last",):
            line = {"noise": settings["label_noise"], "rho": rho, "seed": settings["seed"]}
            line["row"] = {"last": LAST, "best": BEST}[name] if row == "base" else row
            line |= results[name] | {"reproduced": reproduced(run / name, settings)}
            rows.append(line)
        print(run.name)
    order = [LAST, BEST, *METHODS.values()]
    runs = pd.DataFrame(rows)[["noise", "row", "rho", "seed", "validation", "test", "reproduced"]]
    runs["at"] = runs["row"].map(order.index)
    runs = runs.sort_values(["noise", "at", "rho", "seed"], ascending=[False, True, True, True])
    write(DATA / "runs.csv", runs.drop(columns="at").round(6))
    collect_controls(outputs)


def collect_controls(outputs: Path):
    """Make the data file of what was tried afterwards, from the runs that are there."""
    rows = []
    for run, settings, results in finished(outputs / "wrong_labels_controls"):
        changed = {key: settings[key] for key in CONTROLS if settings[key] != CONTROLS[key][0]}
        ((key, value),) = changed.items()
        method = "SGD" if settings["method"] == "base" else f"SAM, rho {settings['rho']:g}"
        name = f"{method}, {CONTROLS[key][1].format(value)}"
        line = {"control": name, "seed": settings["seed"]}
        line |= results["last"] | {"reproduced": reproduced(run / "last", settings)}
        rows.append(line)
    write(DATA / "controls.csv", pd.DataFrame(rows).sort_values(["control", "seed"]).round(6))


def reproduced(model: Path, settings: dict) -> float:
    """The share of a run's wrong labels that its model predicts, on images without augmentation."""
    split = page.training_images(settings)
    labels = torch.from_numpy(data.noisy_labels(split, settings["label_noise"], settings["seed"]))
    wrong = (labels != torch.tensor(split["label"])).nonzero().flatten()
    predicted = page.predicted(model, split[wrong.tolist()]["image"])
    return (predicted == labels[wrong]).double().mean().item()


def read() -> pd.DataFrame:
    """Every run; ``chosen`` are those at the rho that the first two seeds prefer, held out."""
    runs = pd.read_csv(DATA / "runs.csv")
    runs["rho"] = runs["rho"].fillna(0)  # base
    first = runs[runs["seed"].isin([300, 301])]
    means = first.groupby(["noise", "row", "rho"])["validation"].mean().reset_index()
    best = means.loc[means.groupby(["noise", "row"])["validation"].idxmax()]
    chosen = best.set_index(["noise", "row"])["rho"]
    runs["chosen"] = [run.rho == chosen[run.noise, run.row] for run in runs.itertuples()]
    return runs


def runs_of(noise: float) -> pd.DataFrame:
    """The runs of each row at one noise level, at its rho."""
    runs = read()
    return runs[(runs["noise"] == noise) & runs["chosen"]]


def levels() -> list[float]:
    """The noise levels at which every row has five seeds."""
    runs = read()
    runs = runs[runs["chosen"]]
    counts = runs.groupby(["noise", "row"])["seed"].nunique().unstack(fill_value=0)
    return [noise for noise in counts.index[::-1] if (counts.loc[noise] >= 5).all()]


def pairs(runs: pd.DataFrame) -> list[tuple[str, str]]:
    """The comparisons that decide: the first row is to be better than the second."""
    methods = [row for row in runs["row"].unique() if row not in (LAST, BEST)]
    found = [(row, rival) for rival in (BEST, LAST) for row in methods]
    return found + [(row, "SAM") for row in methods if row.startswith("OBF")]


def accuracy() -> list[dict]:
    """Each row, and what its model reproduces of the wrong labels."""
    lines = []
    for noise in levels():
        for row, own in runs_of(noise).groupby("row", sort=False):
            line = {"wrong labels": f"{noise:.0%}", "row": row, "n": len(own)}
            line["rho"] = f"{own['rho'].iloc[0]:g}" if row not in (LAST, BEST) else ""
            line["test, %"] = spread(own["test"], 100)
            line["of the wrong labels reproduced, %"] = spread(own["reproduced"], 100)
            lines.append(line)
    return lines


def decisive() -> list[dict]:
    """The comparisons that decide, with their verdicts, corrected within each noise level."""
    by_level = {noise: runs_of(noise) for noise in levels()}
    return [
        {"wrong labels": f"{noise:.0%}", **line}
        for noise, runs in by_level.items()
        for line in decisions(runs, pairs(runs), SIZE)
    ]


def tuning() -> list[dict]:
    """What was tried for rho: the mean of two seeds on clean held-out images, and on test."""
    runs, lines = read(), []
    runs = runs[runs["seed"].isin([300, 301]) & ~runs["row"].isin([LAST, BEST])]
    for (noise, row), own in runs.groupby(["noise", "row"], sort=False):
        means = own.groupby("rho")[["validation", "test"]].mean()
        cells = page.best_in_bold(means["validation"], means["test"])
        lines.append(
            {"wrong labels": f"{noise:.0%}", "method": row, "rho: held out, % (test, %)": cells}
        )
    return lines


def with_controls() -> pd.DataFrame:
    """The runs at 40 %, and what was tried afterwards."""
    tried = pd.read_csv(DATA / "controls.csv").rename(columns={"control": "row"})
    return pd.concat([runs_of(0.4), tried])


def controls() -> list[dict]:
    """What other settings reach, beside base and SAM at the recipe's."""
    runs, lines = with_controls(), []
    for name, own in runs[runs["noise"].isna()].groupby("row", sort=False):
        line = {"with 40 % wrong labels": name, "n": len(own)}
        line["test, %"] = spread(own["test"], 100)
        line["of the wrong labels reproduced, %"] = spread(own["reproduced"], 100)
        for rival in (LAST, "SAM"):
            found = difference(runs, name, rival)
            line[f"above {rival}"] = interval(found)
        lines.append(line)
    return lines


TABLES = {"decisive": decisive, "accuracy": accuracy, "controls": controls, "tuning": tuning}


def main(argv=None):
    """Run as from the command line."""
    remake(__doc__, HERE / "README.md", SCRIPT, TABLES, collect, argv)


if __name__ == "__main__":
    main()
