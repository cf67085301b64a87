"""The tables of this page, from the files in data/; run it from the repository's root.

python -m experiments.digits.tables                    # write the tables anew
python -m experiments.digits.tables --collect outputs  # first make data/ anew, from outputs/
"""

from pathlib import Path

import pandas as pd

from experiments.page import interval, read, remake, spread, write
from robustness.intervals import holm, over_seeds

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.digits.tables"
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


def collect(outputs: Path):
    """Make the data file of the sweep that is there."""
    rows = pd.read_csv(outputs / "digits" / "methods" / "sweep.csv", dtype=str)
    rows = rows.fillna("")
    write(DATA / "methods.csv", rows.assign(run=[Path(run).name for run in rows["run"]]))


def chosen(runs: pd.DataFrame) -> pd.DataFrame:
    """Of a method's runs, those of the lr and rho that are best on validation, over seeds."""
    means = runs.groupby(["lr", "rho"], sort=False)["validation"].mean().round(9)
    lr, rho = means.idxmax()
    return runs[(runs["lr"] == lr) & (runs["rho"] == rho)]


def best_runs() -> dict[str, pd.DataFrame]:
    """By row of the table: the runs of its best lr and rho."""
    groups = read(DATA / "methods.csv").groupby(["method", "gamma", "perturb_fraction"])
    return {name: chosen(groups.get_group(key)) for key, name in NAMES.items()}


def methods_table() -> list[dict]:
    """Accuracy of each method, at its best lr and rho."""
    rows = []
    for name, best in best_runs().items():
        lr, rho = best[["lr", "rho"]].iloc[0]
        row = {"method": name, "lr": lr, "rho": rho, "n": len(best)}
        rows.append(row | {f"{split}, %": spread(best[split], 100) for split in SPLITS})
    return rows


def differences_table() -> list[dict]:
    """Points above base, paired by seed; what Holm's correction leaves is in bold."""
    by_seed = {name: best.set_index("seed") for name, best in best_runs().items()}
    base, rows = by_seed.pop("base"), {name: {"points above base": name} for name in by_seed}
    cells = [(name, split) for name in rows for split in SPLITS]
    found = [over_seeds(100 * (by_seed[name][split] - base[split])) for name, split in cells]
    for (name, split), one, p in zip(cells, found, holm([one["p_value"] for one in found])):
        text = interval(one)
        rows[name][split] = f"**{text}**" if p < 0.05 else text
    for name, runs in by_seed.items():
        one = over_seeds(100 * (runs["test"] - base_at(runs["lr"].iloc[0])["test"]))
        rows[name]["test, base at the same lr"] = interval(one)
    return list(rows.values())


def base_at(lr: str) -> pd.DataFrame:
    """Base's runs of an lr, by seed."""
    runs = read(DATA / "methods.csv")
    return runs[(runs["method"] == "base") & (runs["lr"] == lr)].set_index("seed")


TABLES = {"methods": methods_table, "differences": differences_table}


def main(argv=None):
    """Run as from the command line."""
    remake(__doc__, HERE / "README.md", SCRIPT, TABLES, collect, argv)


if __name__ == "__main__":
    main()
