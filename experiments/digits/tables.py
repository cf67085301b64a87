"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.digits.tables                    # write the tables anew
python -m experiments.digits.tables --collect outputs  # first make data/ anew, from outputs/
"""

import argparse
from pathlib import Path

import pandas as pd

from experiments.page import fill, interval, read, spread, write
from robustness import rank_correlations

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.digits.tables"
SWEEPS = ("methods", "obf", "m")
SPLITS = ("test", "recoloured", "rotated", "sketch", "occluded", "noisy")
NAMES = {  # of the rows, by method, gamma and perturb_fraction
    ("base", "", ""): "base",
    ("sam", "", ""): "SAM",
    ("random", "", ""): "random",
    ("gsam", "", ""): "GSAM",
    ("asam", "", ""): "ASAM",
    ("obf", "1.0", ""): "OBF, gamma 1",
    ("obf", "1e-12", ""): "OBF, gamma to 0",
    ("obf", "", "0.25"): "OBF, perturbation from a quarter",
}
QUANTITIES = {"forgetting": "forgetting, the run's own", "flatness": "flatness, -lambda_max"}
TARGETS = {"accuracy": "τ with test accuracy", "-gap": "τ with a small generalisation gap"}
SEED = 0  # of the bootstrap


def collect(outputs: Path):
    """Make the data files of the sweeps and of the measurement that are there."""
    files = {name: outputs / "digits" / name / "sweep.csv" for name in SWEEPS}
    files["forgetting"] = outputs / "digits" / "forgetting" / "measurements.csv"
    for name, file in files.items():
        if file.exists():
            rows = pd.read_csv(file, dtype=str, keep_default_na=False)
            write(DATA / f"{name}.csv", rows.assign(run=[Path(run).name for run in rows["run"]]))
        else:
            print(f"left as it is: what comes from {file}, which is not there")


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a method's runs, those of the lr and rho that are best on validation, over seeds."""
    means = runs.groupby(["lr", "rho"], sort=False)["validation"].mean().round(9)
    lr, rho = means.idxmax()
    return runs[(runs["lr"] == lr) & (runs["rho"] == rho)]


def methods_table() -> list[dict]:
    """Accuracy of each method, at its best lr and rho."""
    groups = read(DATA / "methods.csv").groupby(["method", "gamma", "perturb_fraction"])
    rows = []
    for key, name in NAMES.items():
        best = chosen(groups.get_group(key))
        lr, rho = best[["lr", "rho"]].iloc[0]
        row = {"method": name, "lr": lr, "rho": rho, "n": len(best)}
        rows.append(row | {f"{split}, %": spread(best[split], 100) for split in SPLITS})
    return rows


def obf_table() -> list[dict]:
    """Accuracy on test by gamma and lambda."""
    runs, rows = read(DATA / "obf.csv").astype({"gamma": float}), []
    for gamma, of_gamma in runs.groupby("gamma"):
        row = {"gamma": "to 0" if gamma < 1e-6 else f"{gamma:g}"}
        for lam, accuracies in of_gamma.groupby("lam")["test"]:
            row[f"lambda {lam:g}{' (1/K)' if lam == 0.1 else ''}: test, %"] = spread(
                accuracies, 100
            )
        rows.append(row)
    return rows


def forgetting_table() -> list[dict]:
    """Kendall's tau of forgetting and of flatness, with test accuracy and with a small gap."""
    runs = read(DATA / "forgetting.csv").astype({"rho": float})
    own = runs[runs["perturbation"] == "own"].to_dict("records")
    rows = {quantity: {"quantity": title} for quantity, title in QUANTITIES.items()}
    for found in rank_correlations.table(own, SEED):
        if found["quantity"] in rows and found["fixed"] is None:
            head = TARGETS[found["target"]] + (
                ", mean over epochs" if found["epochs"] == "mean" else ""
            )
            tau = interval(found["tau"], found["low"], found["high"])
            rows[found["quantity"]] |= {"runs": found["runs"], head: tau}
    return list(rows.values())


TABLES = {"methods": methods_table, "obf": obf_table, "forgetting": forgetting_table}


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make data/ from the runs there")
    args = p.parse_args(argv)
    if args.collect:
        collect(args.collect)
    fill(HERE / "README.md", SCRIPT, TABLES)


if __name__ == "__main__":
    main()
