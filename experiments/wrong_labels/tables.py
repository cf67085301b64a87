"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.wrong_labels.tables                    # write the tables anew
python -m experiments.wrong_labels.tables --collect outputs  # first make data/ anew, from outputs/
"""

import functools
import json
from pathlib import Path

import pandas as pd
import timm
import torch
import yaml
from timm.data import create_transform, resolve_data_config

from common import data
from common.images import decode
from experiments.page import corrected, interval, p_value, remake, spread, verdict, write
from robustness.intervals import over_seeds

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
    folder = outputs / "wrong_labels"
    finished = sorted(folder.glob("runs/*/results.json"))
    for run in (file.parent for file in finished):
        settings = yaml.safe_load((run / "settings.yaml").read_text())
        gamma = str(settings["gamma"]) if settings["method"] == "obf" else ""
        row = METHODS[settings["method"], gamma]
        rho = "" if row == "base" else settings["rho"]
        results = json.loads((run / "results.json").read_text())
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
    for file in sorted((outputs / "wrong_labels_controls").glob("runs/*/results.json")):
        settings = yaml.safe_load((file.parent / "settings.yaml").read_text())
        changed = {key: settings[key] for key in CONTROLS if settings[key] != CONTROLS[key][0]}
        ((key, value),) = changed.items()
        method = "SGD" if settings["method"] == "base" else f"SAM, rho {settings['rho']:g}"
        name = f"{method}, {CONTROLS[key][1].format(value)}"
        line = {"control": name, "seed": settings["seed"]}
        line |= json.loads(file.read_text())["last"]
        rows.append(line | {"reproduced": reproduced(file.parent / "last", settings)})
    write(DATA / "controls.csv", pd.DataFrame(rows).sort_values(["control", "seed"]).round(6))


@functools.cache
def training_images(dataset: str, validation_share: float, train_share: float):
    """What all runs trained on, with the right labels."""
    return data.load(dataset, False, validation_share, train_share)["train"]


def reproduced(model: Path, settings: dict) -> float:
    """The share of a run's wrong labels that its model predicts, on images without augmentation."""
    shares = (settings["validation_share"], settings["train_share"])
    split = training_images(settings["dataset"], *shares)
    labels = torch.from_numpy(data.noisy_labels(split, settings["label_noise"], settings["seed"]))
    wrong = (labels != torch.tensor(split["label"])).nonzero().flatten()
    opened = timm.create_model(f"local-dir:{model}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=opened))
    images = torch.stack([transform(decode(row)) for row in split[wrong.tolist()]["image"]])
    with torch.no_grad():
        return (opened(images).argmax(-1) == labels[wrong]).double().mean().item()


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


def by_row(noise: float) -> dict[str, pd.DataFrame]:
    """The runs of each row at one noise level, at its rho."""
    runs = read()
    runs = runs[(runs["noise"] == noise) & runs["chosen"]]
    return {row: own.set_index("seed") for row, own in runs.groupby("row", sort=False)}


def levels() -> list[float]:
    """The noise levels at which every row has five seeds."""
    runs = read()
    runs = runs[runs["chosen"]]
    counts = runs.groupby(["noise", "row"])["seed"].nunique().unstack(fill_value=0)
    return [noise for noise in counts.index[::-1] if (counts.loc[noise] >= 5).all()]


def difference(rows: dict[str, pd.DataFrame], row: str, rival: str) -> dict:
    """How many points of accuracy on test a row is above another, over seeds."""
    return over_seeds(100 * (rows[row]["test"] - rows[rival]["test"]).dropna())


def compared(noise: float) -> dict[tuple, dict]:
    """By row and rival: the difference in points, with ``holm``, corrected within the level."""
    rows = by_row(noise)
    methods = [row for row in rows if row not in (LAST, BEST)]
    pairs = [(row, rival) for rival in (BEST, LAST) for row in methods]
    pairs += [(row, "SAM") for row in methods if row.startswith("OBF")]
    return corrected({pair: difference(rows, *pair) for pair in pairs})


def accuracy() -> list[dict]:
    """Each row, and what its model reproduces of the wrong labels."""
    lines = []
    for noise in levels():
        for row, own in by_row(noise).items():
            line = {"wrong labels": f"{noise:.0%}", "row": row, "n": len(own)}
            line["rho"] = f"{own['rho'].iloc[0]:g}" if row not in (LAST, BEST) else ""
            line["test, %"] = spread(own["test"], 100)
            line["of the wrong labels reproduced, %"] = spread(own["reproduced"], 100)
            lines.append(line)
    return lines


def decisive() -> list[dict]:
    """The comparisons that decide, with their verdicts."""
    lines = []
    for noise in levels():
        for (row, rival), found in compared(noise).items():
            line = {"wrong labels": f"{noise:.0%}", "comparison": f"{row} against {rival}"}
            line["points"] = interval(found["mean"], found["low"], found["high"])
            line |= {"Holm": p_value(found["holm"]), "verdict": verdict(found, SIZE)}
            lines.append(line)
    return lines


def tuning() -> list[dict]:
    """What was tried for rho: the mean of two seeds on clean held-out images, and on test."""
    runs, lines = read(), []
    runs = runs[runs["seed"].isin([300, 301]) & ~runs["row"].isin([LAST, BEST])]
    for (noise, row), own in runs.groupby(["noise", "row"], sort=False):
        cells = []
        for (rho, chosen), tries in own.groupby(["rho", "chosen"]):
            means = 100 * tries[["validation", "test"]].mean()
            cell = f"{rho:g}: {means['validation']:.1f} ({means['test']:.1f})"
            cells.append(f"**{cell}**" if chosen else cell)
        line = {"wrong labels": f"{noise:.0%}", "method": row}
        lines.append(line | {"rho: held out, % (test, %)": ", ".join(cells)})
    return lines


def tried() -> dict[str, pd.DataFrame]:
    """The runs of what was tried afterwards, at 40 %."""
    runs = pd.read_csv(DATA / "controls.csv")
    return {name: own.set_index("seed") for name, own in runs.groupby("control", sort=False)}


def controls() -> list[dict]:
    """What other settings reach, beside base and SAM at the recipe's."""
    rows, lines = by_row(0.4) | tried(), []
    for name in tried():
        line = {"with 40 % wrong labels": name, "n": len(rows[name])}
        line["test, %"] = spread(rows[name]["test"], 100)
        line["of the wrong labels reproduced, %"] = spread(rows[name]["reproduced"], 100)
        for rival in (LAST, "SAM"):
            found = difference(rows, name, rival)
            line[f"above {rival}"] = interval(found["mean"], found["low"], found["high"])
        lines.append(line)
    return lines


TABLES = {"decisive": decisive, "accuracy": accuracy, "controls": controls, "tuning": tuning}


def main(argv=None):
    """Run as from the command line."""
    remake(__doc__, HERE / "README.md", SCRIPT, TABLES, collect, argv)


if __name__ == "__main__":
    main()
