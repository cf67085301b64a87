"""The tables and pictures of this page, from the files in data/; run it from the repository's root.

python -m experiments.cifar10.tables                    # write them anew
python -m experiments.cifar10.tables --collect outputs  # first make data/ anew, from outputs/
python -m experiments.cifar10.tables --folders outputs  # only write the images that some runs take
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.special import expit, logit

from common import data, report
from experiments.page import corrected, fill, interval, p_value, read, spread, write
from robustness.intervals import holm, over_seeds
from robustness.predictions import folder_of

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.cifar10.tables"
TINY = "1e-12"  # OBF's gamma towards 0
# By a row's name: the settings that are its own, and the passes of a step, forward and backward.
ROWS = {
    "base": ({"method": "base"}, "1"),
    "base, twice the epochs": ({"method": "base", "epochs": "60"}, "1"),
    "label smoothing 0.1": ({"method": "base", "smoothing": "0.1"}, "1"),
    "random": ({"method": "random"}, "1 and a forward"),
    "SAM": ({"method": "sam"}, "2"),
    "OBF, gamma 1": ({"method": "obf", "gamma": "1.0"}, "2"),
    "OBF, gamma to 0": ({"method": "obf", "gamma": TINY}, "2"),
    "ASAM": ({"method": "asam"}, "2"),
    "ASAM + OBF, gamma to 0": ({"method": "asam+obf", "gamma": TINY}, "2"),
    "GSAM": ({"method": "gsam"}, "2"),
    "GSAM + OBF, gamma to 0": ({"method": "gsam+obf", "gamma": TINY}, "2"),
    "momentum (MSAM)": ({"method": "momentum"}, "1"),
    "SAM, from a quarter": ({"method": "sam", "perturb_fraction": "0.25"}, "1.25"),
    "OBF, gamma 1, from a quarter": (
        {"method": "obf", "gamma": "1.0", "perturb_fraction": "0.25"},
        "1.25",
    ),
    "SAM, every second step": ({"method": "sam", "perturb_interval": "2"}, "1.5"),
    "OBF, gamma 1, every second step": (
        {"method": "obf", "gamma": "1.0", "perturb_interval": "2"},
        "1.5",
    ),
}
OWN = {key for settings, _ in ROWS.values() for key in settings}  # by which rows are told apart
TWICE = "base, twice the epochs"
RIVALS = {
    "above base": "base",
    "above SAM": "SAM",
    "above twice the epochs": TWICE,
}
# Rows that are compared for the paper's claims: the first is to be better.
OBF_CLAIMS = [
    ("OBF, gamma 1", "SAM"),
    ("OBF, gamma to 0", "SAM"),
    ("ASAM + OBF, gamma to 0", "ASAM"),
    ("GSAM + OBF, gamma to 0", "GSAM"),
]
CLAIMS = [("SAM", "base"), ("SAM", "random"), *OBF_CLAIMS]
# Rows of the transfer table, methods before and in fine-tuning, and what row each is compared with.
TRANSFER = {
    "base, base": None,
    "sam, base": "base, base",
    "obf, base": "sam, base",
    "base, sam": "base, base",
    "base, obf": "base, sam",
}
SUBSET = 200  # images of a class, of those that are corrupted
TEST = 10_000  # images


# From the runs to the data files


def write_folders(outputs: Path, dataset: str):
    """Folders of images: some of CIFAR-10 to corrupt, and both halves of its classes."""
    splits = data.load(dataset)
    names = splits["test"].features["label"].names
    write_images(outputs / "cifar10" / "images" / "subset", splits["test"], names, SUBSET)
    for half, classes in (("first", names[:5]), ("second", names[5:])):
        for split, ds in splits.items():
            write_images(outputs / "cifar10" / "images" / half / split, ds, classes)


def write_images(folder, ds, classes, most=None):
    """The first ``most`` images of each of some classes, as CLASS/NUMBER in ``folder``."""
    names, written = ds.features["label"].names, dict.fromkeys(classes, 0)
    for number, row in enumerate(ds):
        name = names[row["label"]]
        if name not in written or written[name] == most:
            continue
        written[name] += 1
        file = folder / name / f"{number:05d}{Path(row['image']['path'] or '.png').suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"]["bytes"])


def read_sweep(folder: Path) -> pd.DataFrame:
    """The runs of a finished sweep, every value as the sweep wrote it."""
    return pd.read_csv(folder / "sweep.csv", dtype=str, keep_default_na=False)


def row_of(point: dict) -> str:
    """The name in ``ROWS`` of a run of a sweep's table.

    Raises:
        ValueError: there is none.
    """
    point = {key: value for key, value in point.items() if key in OWN and value}
    for name, (settings, _) in ROWS.items():
        if settings == point:
            return name
    raise ValueError(f"{point} is no row of the table")


def collect_tune(outputs: Path):
    """What was tried for lr and rho."""
    tried = read_sweep(outputs / "tune").to_dict("records")
    kept = ("lr", "rho", "validation")
    write(
        DATA / "tune.csv",
        [{"row": row_of(run)} | {key: run.get(key, "") for key in kept} for run in tried],
    )


def collect_time(outputs: Path):
    """What an epoch costs; not a run's first, in which kernels are chosen."""
    seconds = {}
    for run in read_sweep(outputs / "time").to_dict("records"):
        epochs = [line["seconds"] for line in report.read_metrics(Path(run["run"]))]
        seconds.setdefault(row_of(run), []).extend(epochs[1:])
    write(
        DATA / "time.csv",
        [{"row": row, "seconds": np.median(all_)} for row, all_ in seconds.items()],
    )


def collect_runs(outputs: Path):
    """What the runs of the table came to, and on which images each was right."""
    on_test = json.loads((outputs / "test" / "results.json").read_text())["results"]
    on_corrupted = json.loads((outputs / "corrupted" / "results.json").read_text())["corrupted"]
    runs, right, shares = [], {}, {}
    for run in read_sweep(outputs / "methods").to_dict("records"):
        model, name = f"{run['run']}/last", f"{row_of(run)}, seed {run['seed']}"
        measures, corrupted = on_test[model]["test"], on_corrupted[model]["subset"]
        row = {"run": name, "row": row_of(run), "seed": run["seed"], "rho": run["rho"]}
        row |= {key: measures[key] for key in ("top1", "nll", "ece")}
        runs.append(row | {"clean": corrupted["clean"], "corrupted": corrupted["mean"]})
        right[name] = pd.read_parquet(folder_of(outputs / "test", model) / "test.parquet")["top1"]
        files = sorted(folder_of(outputs / "corrupted", model).glob("subset.*.parquet"))
        shares[name] = np.mean(
            [pd.read_parquet(file)["top1"] for file in files], 0, dtype=np.float32
        )
    write(DATA / "runs.csv", runs)
    pd.DataFrame(right).to_parquet(DATA / "right.parquet", compression="zstd")
    pd.DataFrame(shares).to_parquet(DATA / "right_corrupted.parquet", compression="zstd")


def collect_transfer(outputs: Path):
    """Which images of the second half each model got right, and how good it was on the first."""
    before = read_sweep(outputs / "halves").set_index("run")["test"]
    runs, right = [], {}
    for run in read_sweep(outputs / "transfer").to_dict("records"):
        start = re.search(r"method=(\w+)", run["model"])[1]
        name = f"{start}, {run['method']}, seed {run['seed']}"
        folder = folder_of(outputs / "transfer_test", f"{run['run']}/last")
        right[name] = pd.read_parquet(folder / "test.parquet")["top1"]
        row = {"run": name, "row": f"{start}, {run['method']}", "seed": run["seed"]}
        runs.append(row | {"before": before[str(Path(run["model"]).parent)]})
    write(DATA / "transfer.csv", runs)
    pd.DataFrame(right).to_parquet(DATA / "right_transfer.parquet", compression="zstd")


def collect_m(outputs: Path):
    """The test accuracy of every run, and the m of its perturbations."""
    write(DATA / "m.csv", read_sweep(outputs / "m")[["method", "rho", "m", "seed", "test"]])
    write(DATA / "m_base.csv", read_sweep(outputs / "m_base")[["m", "seed", "test"]])


COLLECTED = {  # by the last file that must be there
    "tune/sweep.csv": collect_tune,
    "time/sweep.csv": collect_time,
    "corrupted/results.json": collect_runs,
    "transfer_test/results.json": collect_transfer,
    "m_base/sweep.csv": collect_m,
}


# From the data files to the page


def runs_by_row() -> dict[str, pd.DataFrame]:
    """The runs of each row of the table that has been run, in the order of ``ROWS``."""
    runs = read(DATA / "runs.csv")
    return {name: runs[runs["row"] == name] for name in ROWS if name in set(runs["row"])}


def per_image(name: str, runs: str = "runs") -> dict[str, dict[int, np.ndarray]]:
    """By row of the table and seed: a value for each image."""
    values, by_row = pd.read_parquet(DATA / f"{name}.parquet"), {}
    for run in read(DATA / f"{runs}.csv").itertuples():
        by_row.setdefault(run.row, {})[run.seed] = values[run.run].to_numpy(float)
    return by_row


def by_seed(values: dict, name: str, rival: str) -> np.ndarray:
    """How far a row is above another, for each seed that both have."""
    seeds = sorted(values[name].keys() & values[rival].keys())
    return np.array([np.mean(values[name][seed] - values[rival][seed]) for seed in seeds])


def difference(values: dict, name: str, rival: str, comparisons: int = 1) -> dict:
    """How far a row is above another, over seeds."""
    return over_seeds(by_seed(values, name, rival), comparisons)


def points(difference: dict) -> str:
    """A difference of shares with its interval, in points."""
    return interval(difference, 100)


def relative_time() -> dict[str, str]:
    """By row: the time of its training, in that of base."""
    seconds = read(DATA / "time.csv").set_index("row")["seconds"]
    seconds["base, twice the epochs"] = 2 * seconds["base"]
    return {row: f"{second / seconds['base']:.1f}" for row, second in seconds.items()}


def methods_table() -> list[dict]:
    """How good each method is, and what it costs."""
    time = relative_time()
    return [
        {
            "method": name,
            "rho": runs["rho"].iloc[0],
            "passes": ROWS[name][1],
            "time": time[name],
            "test, %": spread(runs["top1"], 100),
            "NLL": spread(runs["nll"]),
            "ECE, %": f"{100 * runs['ece'].mean():.1f}",
        }
        for name, runs in runs_by_row().items()
    ]


def compared() -> dict[tuple, dict]:
    """By row and a head of ``RIVALS``: the difference, with ``holm``, its p of all of them."""
    right, names = per_image("right"), list(runs_by_row())
    cells = [(name, head) for name in names for head in RIVALS if RIVALS[head] != name]
    return corrected({(name, head): difference(right, name, RIVALS[head]) for name, head in cells})


def differences_table() -> list[dict]:
    """How far each method is above three others; what Holm's correction leaves is in bold."""
    rows = {name: {"method": name} | dict.fromkeys(RIVALS, "") for name in runs_by_row()}
    for (name, head), one in compared().items():
        rows[name][head] = f"**{points(one)}**" if one["holm"] < 0.05 else points(one)
    return list(rows.values())


def verdict(mean: float, p: float) -> str:
    """What a difference says of the claim that it is above zero, by its corrected p."""
    if p >= 0.05:
        return "not shown"
    return "shown" if mean > 0 else "contradicted"


TESTED = {"points on test": "right", "points on corrupted images": "right_corrupted"}


def claims_table() -> list[dict]:
    """The paper's claims on accuracy and robustness; p values are Holm's, of the whole table."""
    rows = [{"claim": f"{name} beats {rival}"} for name, rival in CLAIMS]
    cells = [(row, pair, head) for head in TESTED for row, pair in zip(rows, CLAIMS)]
    found = [difference(per_image(TESTED[head]), *pair) for _, pair, head in cells]
    for (row, _, head), one, p in zip(cells, found, holm([one["p_value"] for one in found])):
        row[head] = f"{points(one)}, {p_value(p)}: {verdict(one['mean'], p)}"
    pooled = {
        "claim": f"OBF beats steepest ascent: these {len(OBF_CLAIMS)} together, p uncorrected"
    }
    for head, file in TESTED.items():
        values = per_image(file)
        one = over_seeds(np.mean([by_seed(values, *pair) for pair in OBF_CLAIMS], axis=0))
        pooled[head] = f"{points(one)}, {p_value(one['p_value'])}"
    return [*rows, pooled]


def best_table() -> list[dict]:
    """The most accurate method of one training's length, with the interval of a best of several."""
    right = per_image("right")
    names = [name for name in runs_by_row() if name not in ("base", "base, twice the epochs")]
    best = max(names, key=lambda name: by_seed(right, name, "base").mean())
    alone, among = (difference(right, best, "base", n) for n in (1, len(names)))
    p = holm([difference(right, name, "base")["p_value"] for name in names])[names.index(best)]
    heads = ("points above base (95 %)", f"the same, as the best of {len(names)}", "Holm")
    return [{"method": best} | dict(zip(heads, (points(alone), points(among), p_value(p))))]


def tuning_table() -> list[dict]:
    """What was tried for lr and rho."""
    tried, rows = read(DATA / "tune.csv"), []
    for name in ROWS:
        tries = tried[tried["row"] == name]
        if tries.empty:
            continue
        best, row = tries["validation"].idxmax(), {"method": name}
        for number, run in enumerate(tries.itertuples(), 1):
            cell = f"{run.rho or 'lr ' + run.lr}: {100 * run.validation:.2f}"
            row[f"try {number}"] = f"**{cell}**" if run.Index == best else cell
        rows.append(row)
    return rows


def above_line() -> pd.Series:
    """By run: points above the line of all runs, corrupted against clean accuracy, in logits.

    Accuracy on 2,000 clean images is noisy, which would make the line too flat. Its slope is
    that of the instrumental variable, accuracy on the 8,000 other test images, whose noise is
    another.
    """
    runs = read(DATA / "runs.csv")
    others = (TEST * runs["top1"] - 10 * SUBSET * runs["clean"]) / (TEST - 10 * SUBSET)
    clean, corrupted, instrument = (logit(x) for x in (runs["clean"], runs["corrupted"], others))
    slope = np.cov(instrument, corrupted)[0, 1] / np.cov(instrument, clean)[0, 1]
    return runs["corrupted"] - expit(corrupted.mean() + slope * (clean - clean.mean()))


def robustness_table() -> list[dict]:
    """Accuracy on corrupted images."""
    shares, above = per_image("right_corrupted"), above_line()
    return [
        {
            "method": name,
            "clean, %": spread(runs["clean"], 100),
            "corrupted, %": spread(runs["corrupted"], 100),
            "points above SAM": "" if name == "SAM" else points(difference(shares, name, "SAM")),
            "points above the line": spread(above[runs.index], 100),
        }
        for name, runs in runs_by_row().items()
    ]


def transfer_table() -> list[dict]:
    """Accuracy on five classes after training on the other five."""
    right, rows = per_image("right_transfer", "transfer"), []
    before = read(DATA / "transfer.csv").groupby("row")["before"]
    for name, rival in TRANSFER.items():
        after = [values.mean() for values in right[name].values()]
        rows.append(
            {
                "trained with, fine-tuned with": name,
                "before, on the first five, %": spread(before.get_group(name), 100),
                "after, on the other five, %": spread(after, 100),
                "points": f"{points(difference(right, name, rival))} above {rival}"
                if rival
                else "",
            }
        )
    return rows


def by_m() -> dict[tuple, pd.DataFrame]:
    """By rho and method, those that were trained with more than one m: their runs, SAM's first."""
    runs = read(DATA / "m.csv").sort_values(["rho", "method"], ascending=[True, False])
    groups = runs.groupby(["rho", "method"], sort=False)
    return {key: group for key, group in groups if group["m"].nunique() > 1}


def m_table() -> list[dict]:
    """Accuracy for each m."""
    groups = by_m()
    ms = sorted({m for runs in groups.values() for m in runs["m"]})
    rows = []
    for (rho, method), runs in groups.items():
        accuracies = runs.groupby("m")["test"]
        cells = {
            f"m {m}: test, %": spread(accuracies.get_group(m), 100)
            for m in ms
            if m in accuracies.groups
        }
        empty = {f"m {m}: test, %": "" for m in ms}
        rows.append({"method": method, "rho": rho} | empty | cells)
    return rows


def m_compared_table() -> list[dict]:
    """What a small m brings to SAM, beside a large one, base, base at as small an m, and base for
    twice the epochs; and what it brings to base.
    """
    runs, rows = read(DATA / "m.csv").astype({"rho": float}), []
    rivals = {"above base": "base", "above base for twice the epochs": TWICE}
    by_seed = {  # accuracies of the rivals
        head: pd.Series({seed: np.mean(right) for seed, right in per_image("right")[row].items()})
        for head, row in rivals.items()
    }
    controls = dict(list(read(DATA / "m_base.csv").set_index("seed").groupby("m")["test"]))
    runs = runs[(runs["method"] == "sam") & (runs["rho"] <= 0.1)]

    def row(name, accuracy, others):
        differences = {head: (accuracy - other).dropna() for head, other in others.items()}
        return {"": name} | {head: points(over_seeds(d)) for head, d in differences.items()}

    for rho, of_rho in runs.groupby("rho"):
        accuracies = of_rho.pivot(index="seed", columns="m", values="test")
        for m in accuracies.columns[accuracies.notna().all()][:-1]:
            others = {f"above SAM at m {accuracies.columns[-1]}": accuracies.iloc[:, -1]} | by_seed
            others |= {"above base at the same m": controls[m]} if m in controls else {}
            rows.append(row(f"SAM, rho {rho:g}, m {m}", accuracies[m], others))
    return rows + [row(f"base, m {m}", control, by_seed) for m, control in controls.items()]


def draw_methods(path):
    """Test accuracy of every run, and each method's difference to SAM."""
    right, by_row = per_image("right"), runs_by_row()
    size = (10, 0.9 + 0.36 * len(by_row))
    figure, (accuracies, differences) = plt.subplots(
        1, 2, figsize=size, sharey=True, layout="constrained"
    )
    for i, (name, runs) in enumerate(by_row.items()):
        top1 = 100 * runs["top1"]
        accuracies.plot(top1, [i] * len(top1), "o", color="C0", alpha=0.4, markeredgecolor="none")
        accuracies.plot([top1.mean()], [i], "|", color="C0", markersize=16, markeredgewidth=2)
        if name != "SAM":
            above = difference(right, name, "SAM")
            middle, low, high = (100 * above[key] for key in ("mean", "low", "high"))
            differences.errorbar(
                middle, i, xerr=[[middle - low], [high - middle]], fmt="o", color="C1", capsize=3
            )
    seeds = " or ".join(map(str, sorted({len(runs) for runs in by_row.values()})))
    accuracies.set(yticks=range(len(by_row)), yticklabels=by_row, ylim=(len(by_row) - 0.5, -0.5))
    accuracies.set(xlabel="top-1 on test, %")
    accuracies.set_title(f"every seed (n = {seeds}), and their mean", fontsize=10)
    differences.set(xlabel="points above SAM")
    differences.set_title("difference to SAM", fontsize=10)
    differences.axvline(0, color="0.6", linewidth=1, zorder=0)
    for axis in (accuracies, differences):
        axis.spines[["top", "right"]].set_visible(False)
    report.save(figure, path, "Whiskers are 95 % intervals over seeds, which both methods share.")


def draw_m(path):
    """Accuracy against m."""
    groups = by_m()
    rhos, methods = (list(dict.fromkeys(key[i] for key in groups)) for i in (0, 1))
    ms = sorted({m for runs in groups.values() for m in runs["m"]})
    size = (3.4 * len(rhos) + 2, 3.6)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(rhos), figsize=size, layout="constrained", **shared)
    for axis, rho in zip(axes.flat, rhos):
        for i, method in enumerate(methods):
            if (rho, method) in groups:
                accuracies = (
                    (100 * groups[rho, method].set_index("m")["test"]).groupby("m").agg(list)
                )
                report.band(axis, accuracies.to_dict(), color=f"C{i}", marker="o", label=method)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ms, ms)
        axis.set(xlabel="m, examples of a perturbation", title=f"rho {rho}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="top-1 on test, %")
    axes[0, 0].legend(frameon=False)
    report.save(
        figure, path, "Lines are means over seeds, bands go from the least to the greatest."
    )


TABLES = {
    "best": best_table,
    "claims": claims_table,
    "methods": methods_table,
    "differences": differences_table,
    "tuning": tuning_table,
    "robustness": robustness_table,
    "transfer": transfer_table,
    "m": m_table,
    "m_compared": m_compared_table,
}


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--folders", type=Path, metavar="OUTPUTS", help="write the folders of images there"
    )
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make data/ from the runs there")
    p.add_argument(
        "--dataset", default="uoft-cs/cifar10", help="CIFAR-10, for --folders (%(default)s)"
    )
    args = p.parse_args(argv)
    if args.folders:
        write_folders(args.folders, args.dataset)
        return
    for last, collect in COLLECTED.items() if args.collect else ():
        outputs = args.collect / "cifar10"
        if (outputs / last).exists():
            collect(outputs)
        else:
            print(f"left as it is: what ends with {outputs / last}, which is not there")
    fill(HERE / "README.md", SCRIPT, TABLES)
    draw_methods(HERE / "methods.png")
    draw_m(HERE / "m.png")


if __name__ == "__main__":
    main()
