"""The tables and pictures of CIFAR-10 in docs/results.md, from the data files in docs/cifar10/.

python docs/cifar10.py                    # rebuild them
python docs/cifar10.py --folders outputs  # write the folders of images that some of the experiments take
python docs/cifar10.py --collect outputs  # make the data files anew, from the finished experiments in outputs/
"""

import argparse
import csv
import json
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.special import expit, logit
from scipy.stats import linregress

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import data, report
from eval_robustness import predictions_folder
from robustness import statistics

HERE = Path(__file__).resolve().parent
FILES, PAGE, PICTURES = HERE / "cifar10", HERE / "results.md", HERE / "pictures"
TINY = "1e-12"  # OBF's gamma towards 0
# What a row of the table is: its name, the settings that are its own, forward and backward passes of a step.
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
    "OBF, gamma 1, from a quarter": ({"method": "obf", "gamma": "1.0", "perturb_fraction": "0.25"}, "1.25"),
    "SAM, every second step": ({"method": "sam", "perturb_interval": "2"}, "1.5"),
    "OBF, gamma 1, every second step": ({"method": "obf", "gamma": "1.0", "perturb_interval": "2"}, "1.5"),
}
OWN = {key for settings, _ in ROWS.values() for key in settings}  # by which rows are told apart
# Rows that are compared for the paper's claims: the first is to be better.
CLAIMS = [
    ("SAM", "base"),
    ("SAM", "random"),
    ("OBF, gamma 1", "SAM"),
    ("OBF, gamma to 0", "SAM"),
    ("ASAM + OBF, gamma to 0", "ASAM"),
    ("GSAM + OBF, gamma to 0", "GSAM"),
]
# Rows of the transfer table, methods before and in fine-tuning, and what row each is compared with.
TRANSFER = {
    "base, base": None,
    "sam, base": "base, base",
    "obf, base": "sam, base",
    "base, sam": "base, base",
    "base, obf": "base, sam",
}
SUBSET = 200  # images of a class, of those that are corrupted


def rows_of(file: Path) -> list[dict]:
    """The rows of a CSV file."""
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def read(name: str) -> list[dict]:
    """The rows of a data file."""
    return rows_of(FILES / f"{name}.csv")


def write(name: str, rows: list[dict]):
    """Write a data file, and say how many rows it has."""
    FILES.mkdir(exist_ok=True)
    with (FILES / f"{name}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    print(f"{name}.csv: {len(rows)} rows")  # a sweep may not have ended


# ----------------------------------------------------------------------------------------------------------------------
# From the experiments to the data files


def write_folders(outputs: Path, dataset: str):
    """Folders of CIFAR-10's images, as they are: some to corrupt, and both halves of the classes for transfer."""
    splits = data.load(dataset)
    names = splits["test"].features["label"].names
    write_images(outputs / "cifar10_subset", splits["test"], names, SUBSET)
    for half, own in (("first", names[:5]), ("second", names[5:])):
        for split, ds in splits.items():
            write_images(outputs / f"cifar10_{half}" / split, ds, own)


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


def row_of(point: dict) -> str:
    """The name in ``ROWS`` of a run of a sweep's table.

    Raises:
        ValueError: there is none.
    """
    own = {key: value for key, value in point.items() if key in OWN and value}
    for name, (settings, _) in ROWS.items():
        if settings == own:
            return name
    raise ValueError(f"{own} is no row of the table")


def collect_tune(outputs: Path):
    """What was tried for lr and rho."""
    rows = []
    for one in rows_of(outputs / "cifar10_tune" / "sweep.csv"):
        rows.append({"row": row_of(one), **{key: one.get(key, "") for key in ("lr", "rho", "validation")}})
    write("tune", rows)


def collect_time(outputs: Path):
    """What an epoch costs, but a run's first, in which kernels are chosen."""
    seconds = {}
    for one in rows_of(outputs / "cifar10_time" / "sweep.csv"):
        epochs = [line["seconds"] for line in report.read_metrics(Path(one["run"]))]
        seconds.setdefault(row_of(one), []).extend(epochs[1:])
    write("time", [{"row": row, "seconds": np.median(own)} for row, own in seconds.items()])


def predictions(evaluation: Path, model: str) -> Path:
    """Where an evaluation keeps what a model said of each image."""
    return predictions_folder(argparse.Namespace(output=evaluation), model)


def collect_runs(outputs: Path):
    """What the runs of the table came to, and on which images each was right."""
    on_test = json.loads((outputs / "cifar10_test" / "results.json").read_text())["results"]
    on_corrupted = json.loads((outputs / "cifar10_corrupted" / "results.json").read_text())["corrupted"]
    runs, right, shares = [], {}, {}
    for one in rows_of(outputs / "cifar10" / "sweep.csv"):
        model, name = f"{one['run']}/last", f"{row_of(one)}, seed {one['seed']}"
        measures, corrupted = on_test[model]["test"], on_corrupted[model]["subset"]
        run = {"run": name, "row": row_of(one), "seed": one["seed"], "rho": one["rho"]}
        run |= {key: measures[key] for key in ("top1", "nll", "ece")}
        run |= {"clean": corrupted["clean"], "corrupted": corrupted["mean"]}
        runs.append(run)
        right[name] = pq.read_table(predictions(outputs / "cifar10_test", model) / "test.parquet")["top1"]
        tables = sorted(predictions(outputs / "cifar10_corrupted", model).glob("subset.*.parquet"))
        shares[name] = np.mean([pq.read_table(table)["top1"].to_numpy() for table in tables], 0, dtype=np.float32)
    write("runs", runs)
    pq.write_table(pa.table(right), FILES / "right.parquet", compression="zstd")
    pq.write_table(pa.table(shares), FILES / "right_corrupted.parquet", compression="zstd")


def collect_transfer(outputs: Path):
    """Which images of the second half of the classes were told right after fine-tuning; how good models were before."""
    before = {one["run"]: one["test"] for one in rows_of(outputs / "cifar10_halves" / "sweep.csv")}
    runs, right = [], {}
    for one in rows_of(outputs / "cifar10_transfer" / "sweep.csv"):
        start = re.search(r"method=(\w+)", one["model"])[1]
        name = f"{start}, {one['method']}, seed {one['seed']}"
        table = predictions(outputs / "cifar10_transfer_test", f"{one['run']}/last") / "test.parquet"
        right[name] = pq.read_table(table)["top1"]
        run = {"run": name, "row": f"{start}, {one['method']}", "seed": one["seed"]}
        runs.append(run | {"before": before[str(Path(one["model"]).parent)]})
    write("transfer", runs)
    pq.write_table(pa.table(right), FILES / "right_transfer.parquet", compression="zstd")


def collect_m(outputs: Path):
    """The test accuracy of every run, and the m of its perturbations."""
    rows = rows_of(outputs / "cifar10_m" / "sweep.csv")
    write("m", [{key: one[key] for key in ("method", "rho", "m", "seed", "test")} for one in rows])


# ----------------------------------------------------------------------------------------------------------------------
# From the data files to the page


def per_image(name: str, runs: str = "runs") -> dict[str, dict[str, np.ndarray]]:
    """By row of the table and seed: a value for each image, from a Parquet file with a column for each run."""
    table, found = pq.read_table(FILES / f"{name}.parquet"), {}
    for run in read(runs):
        found.setdefault(run["row"], {})[run["seed"]] = table[run["run"]].to_numpy().astype(float)
    return found


def points(difference: dict) -> str:
    """A difference of shares with its interval, in points."""
    mean, low, high = (f"{100 * difference[key]:+.2f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def spread(values, factor=1.0) -> str:
    """Mean ± standard deviation."""
    values = factor * np.asarray(values, dtype=float)
    return f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in rows)


def groups() -> dict[str, list[dict]]:
    """The runs of each row of the table that has been run, in the order of ``ROWS``."""
    found = {name: [run for run in read("runs") if run["row"] == name] for name in ROWS}
    return {name: own for name, own in found.items() if own}


def against(values: dict, name: str, reference: str) -> dict:
    """The difference between two rows, over the seeds that both have, and images."""
    shared = values[name].keys() & values[reference].keys()
    return statistics.crossed(np.stack([values[name][seed] - values[reference][seed] for seed in sorted(shared)]))


def methods_table() -> str:
    """What each method is worth, for what it costs."""
    right, runs, lines = per_image("right"), groups(), []
    seconds = {one["row"]: float(one["seconds"]) for one in read("time")}
    seconds["base, twice the epochs"] = 2 * seconds["base"]
    for name, own in runs.items():
        top1, nll, ece = (np.array([run[key] for run in own], float) for key in ("top1", "nll", "ece"))
        differences = [
            "" if name == other else points(against(right, name, other))
            for other in ("base", "SAM", "base, twice the epochs")
        ]
        cost = [ROWS[name][1], f"{seconds[name] / seconds['base']:.2f}"]
        lines.append(
            [name, own[0]["rho"], *cost, spread(top1, 100), *differences, spread(nll), f"{100 * ece.mean():.1f}"]
        )
    head = [
        "method",
        "rho",
        "passes",
        "time",
        "test, %",
        "points above base",
        "above SAM",
        "above base for twice the epochs",
        "NLL",
        "ECE, %",
    ]
    return markdown(head, lines)


def verdict(difference: dict) -> str:
    """What a difference's interval says of the claim that it is above zero."""
    return "supported" if difference["low"] > 0 else "contradicted" if difference["high"] < 0 else "undecided"


def claims_table() -> str:
    """The paper's claims on accuracy and robustness."""
    files, lines = [per_image(name) for name in ("right", "right_corrupted")], []
    for name, reference in CLAIMS:
        found = [against(values, name, reference) for values in files]
        cells = [f"{points(one)}, {verdict(one)}" for one in found]
        lines.append([f"{name} beats {reference}", *cells])
    return markdown(["claim", "points on test", "points on corrupted images"], lines)


def tuning_table() -> str:
    """What was tried for lr and rho."""
    lines = []
    for name in ROWS:
        tries = [one for one in read("tune") if one["row"] == name]
        cells = [f"{one['rho'] or 'lr ' + one['lr']}: {100 * float(one['validation']):.2f}" for one in tries]
        if tries:
            best = int(np.argmax([float(one["validation"]) for one in tries]))
            cells[best] = f"**{cells[best]}**"
            lines.append([name, *cells])
    head = ["method", "rho: top-1 on validation, %"]
    return markdown(head + [""] * (max(map(len, lines)) - len(head)), lines)


def above_line() -> dict[str, np.ndarray]:
    """By row: points of each seed above the line of all runs, corrupted against clean accuracy on the logit scale."""
    runs = read("runs")
    clean, corrupted = (np.array([float(run[key]) for run in runs]) for key in ("clean", "corrupted"))
    line = linregress(logit(clean), logit(corrupted))
    above = corrupted - expit(line.slope * logit(clean) + line.intercept)
    return {name: above[[run["row"] == name for run in runs]] for name in groups()}


def robustness_table() -> str:
    """Accuracy on corrupted images."""
    shares, lines, above = per_image("right_corrupted"), [], above_line()
    for name, own in groups().items():
        accuracies = [spread([run[key] for run in own], 100) for key in ("clean", "corrupted")]
        difference = "" if name == "SAM" else points(against(shares, name, "SAM"))
        lines.append([name, *accuracies, difference, spread(above[name], 100)])
    return markdown(["method", "clean, %", "corrupted, %", "points above SAM", "points above the line"], lines)


def transfer_table() -> str:
    """Accuracy on five classes after training on the other five."""
    right, lines, before = per_image("right_transfer", "transfer"), [], report.series(read("transfer"), "row", "before")
    for name, rival in TRANSFER.items():
        means = [values.mean() for values in right[name].values()]
        difference = f"{points(against(right, name, rival))} above {rival}" if rival else ""
        lines.append([name, spread(before[name], 100), spread(means, 100), difference])
    head = ["trained with, fine-tuned with", "before, on the first five, %", "after, on the other five, %", "points"]
    return markdown(head, lines)


def by_m() -> dict[tuple, dict[int, list[float]]]:
    """By method and rho: accuracies by m, in %, of those that were trained with more than one m."""
    found = {}
    for one in read("m"):
        accuracies = found.setdefault((one["method"], float(one["rho"])), {})
        accuracies.setdefault(int(one["m"]), []).append(100 * float(one["test"]))
    return {key: found[key] for key in sorted(found, key=lambda key: (key[1], key[0] != "sam")) if len(found[key]) > 1}


def m_table() -> str:
    """Accuracy for each m."""
    found = by_m()
    ms = sorted({m for accuracies in found.values() for m in accuracies})
    lines = []
    for (method, rho), accuracies in found.items():
        cells = [spread(accuracies[m]) if m in accuracies else "" for m in ms]
        lines.append([method, f"{rho:g}", *cells])
    return markdown(["method", "rho", *(f"m {m}: test, %" for m in ms)], lines)


def fill_page(script: str, sections: dict):
    """Write tables, made by functions by name, to their places on the page: between two comments.

    Raises:
        SystemExit: the page has no place for any.
    """
    marked = re.compile(rf"(<!-- {script}: (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
    page, found = marked.subn(lambda place: f"{place[1]}\n{sections[place[2]]()}\n\n", PAGE.read_text())
    if not found:
        raise SystemExit(f"{PAGE} has no place for a table: <!-- {script}: {' or '.join(sections)} -->")
    PAGE.write_text(page)


def draw_methods(path):
    """Test accuracy of every run, and each method's difference to SAM."""
    right, runs = per_image("right"), groups()
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.9 + 0.36 * len(runs)), sharey=True, layout="constrained")
    for i, (name, own) in enumerate(runs.items()):
        top1 = 100 * np.array([float(run["top1"]) for run in own])
        axes[0].plot(top1, [i] * len(top1), "o", color="C0", alpha=0.4, markeredgecolor="none")
        axes[0].plot([top1.mean()], [i], "|", color="C0", markersize=16, markeredgewidth=2)
        if name != "SAM":
            difference = against(right, name, "SAM")
            middle, low, high = (100 * difference[key] for key in ("mean", "low", "high"))
            axes[1].errorbar(middle, i, xerr=[[middle - low], [high - middle]], fmt="o", color="C1", capsize=3)
    seeds = " or ".join(map(str, sorted({len(own) for own in runs.values()})))
    axes[0].set(yticks=range(len(runs)), yticklabels=runs, ylim=(len(runs) - 0.5, -0.5), xlabel="top-1 on test, %")
    axes[0].set_title(f"every seed (n = {seeds}), and their mean", fontsize=10)
    axes[1].set(xlabel="points above SAM")
    axes[1].set_title("difference to SAM", fontsize=10)
    axes[1].axvline(0, color="0.6", linewidth=1, zorder=0)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    paired = "of the same seeds and images in both methods"
    report.save(figure, path, f"Whiskers are 95 % intervals over seeds and images, {paired}.")


def draw_m(path):
    """Accuracy against m."""
    found = by_m()
    rhos, methods = (list(dict.fromkeys(key[i] for key in found)) for i in (1, 0))
    ms = sorted({m for accuracies in found.values() for m in accuracies})
    size = (3.4 * len(rhos) + 2, 3.6)
    shared = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(1, len(rhos), figsize=size, layout="constrained", **shared)
    for axis, rho in zip(axes.flat, rhos):
        for method in methods:
            if accuracies := found.get((method, rho)):
                colour = f"C{methods.index(method)}"
                report.band(axis, accuracies, color=colour, marker="o", label=method)
        axis.set_xscale("log", base=2)
        axis.set_xticks(ms, ms)
        axis.set(xlabel="m, examples of a perturbation", title=f"rho {rho:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set(ylabel="top-1 on test, %")
    axes[0, 0].legend(frameon=False)
    report.save(figure, path, "Lines are means over seeds, bands go from the least to the greatest.")


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--folders", type=Path, metavar="OUTPUTS", help="write the folders of images there")
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make the data files from the experiments there")
    p.add_argument("--dataset", default="uoft-cs/cifar10", help="CIFAR-10, for --folders (%(default)s)")
    args = p.parse_args(argv)
    if args.folders:
        write_folders(args.folders, args.dataset)
        return
    if args.collect:
        for collect, last in (
            (collect_tune, "cifar10_tune/sweep.csv"),
            (collect_time, "cifar10_time/sweep.csv"),
            (collect_runs, "cifar10_corrupted/results.json"),
            (collect_transfer, "cifar10_transfer_test/results.json"),
            (collect_m, "cifar10_m/sweep.csv"),
        ):
            if (args.collect / last).exists():
                collect(args.collect)
            else:
                print(f"left as it is: what ends with {args.collect / last}, which is not there")
    sections = {
        "tuning": tuning_table,
        "methods": methods_table,
        "claims": claims_table,
        "robustness": robustness_table,
        "transfer": transfer_table,
        "m": m_table,
    }
    fill_page("docs/cifar10.py", sections)
    for name, draw in (("runs", draw_methods), ("m", draw_m)):
        if (FILES / f"{name}.csv").exists():
            draw(PICTURES / f"cifar10_{draw.__name__.removeprefix('draw_')}.png")


if __name__ == "__main__":
    main()
