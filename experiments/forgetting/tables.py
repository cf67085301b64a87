"""The tables and pictures of this page, from the files in data/; run it from the repository's root.

python -m experiments.forgetting.tables                    # write the tables and pictures anew
python -m experiments.forgetting.tables --collect outputs  # first make data/ anew, from outputs/
"""

import argparse
import functools
import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from common import report
from experiments.page import fill, read, spread, write
from robustness import rank_correlations
from robustness.report import forgetting_styles, tested

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
SCRIPT = "python -m experiments.forgetting.tables"
SPLITS = {"train": "training images", "test": "test images"}  # on which all models were measured
COMMON = "common"  # a measurement with the same perturbation for all models
OTHERS = (
    "perturbations"  # a measurement of the perturbations that most models were not trained with
)
# Other estimates of the same, of the models of one seed.
VARIANTS = {
    "miller_madow": "Miller-Madow",
    "examples_2500": "2,500 images",
    "examples_1000": "1,000 images",
    "thresholds": "thresholds 0.25, 0.5, 0.75 alone",
    "softmax": "softmax",
    "same_thresholds": "the same thresholds",
}
QUANTITIES = {
    "forgetting": "forgetting",
    "relevant_change": "change of I(Y; Ŷ)",
    "flatness": "flatness, -lambda_max",
    "-sam_gap": "-SAM gap",
}
# Perturbations of which correlations are shown; the last is of ``COMMON``.
KINDS = {"own": "the run's own", "sam": "steepest ascent", COMMON: "the same for all"}
TARGETS = {"accuracy": "τ with test accuracy", "-gap": "τ with a small generalisation gap"}
OUTLYING = (
    "sam",
    32,
    0.2,
)  # the setting whose models are the least accurate though they forget much
SEED = 0  # of the tests


def collect(outputs: Path):
    """Make the data files of the measurements that are there, and of the random sweep."""
    names = [*SPLITS, COMMON, OTHERS, *VARIANTS]
    files = {name: outputs / "forgetting" / name / "measurements.csv" for name in names}
    for name, file in {**files, "random": outputs / "forgetting" / "random" / "sweep.csv"}.items():
        if file.exists():
            rows = pd.read_csv(file, dtype=str, keep_default_na=False)
            write(DATA / f"{name}.csv", rows.assign(run=[Path(run).name for run in rows["run"]]))
        else:
            print(f"left as it is: what comes from {file}, which is not there")


@functools.cache
def measured(name: str) -> pd.DataFrame:
    """A measurement: a row for each run, epoch and perturbation."""
    return read(DATA / f"{name}.csv").astype({"rho": float})


def last_epoch(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The rows of a perturbation after the last epoch, by run."""
    rows = rows[rows["perturbation"] == kind].sort_values("epoch", kind="stable")
    return rows.groupby("run", sort=False).tail(1).set_index("run", drop=False)


def measured_on(split: str) -> pd.DataFrame:
    """The rows of a split; for training images ``COMMON`` too, with the lambda_max of the rest."""
    rows = measured(split)
    if split != "train":
        return rows
    flat = rows.drop_duplicates(["run", "epoch"])[["run", "epoch", "lambda_max"]]
    common = measured(COMMON).drop(columns="lambda_max").merge(flat, on=["run", "epoch"])
    return pd.concat([rows, common.assign(perturbation=COMMON)], ignore_index=True)


@functools.cache
def taus(split: str):
    """The rank correlations on a split, as a function of what they are of."""
    rows = measured_on(split).to_dict("records")
    correlations = rank_correlations.table(rows, SEED, gap=split == "train")

    def tau(quantity, kind="sam", epochs="last", target="accuracy", fixed=None):
        which = {"perturbation": kind, "quantity": quantity, "epochs": epochs}
        which |= {"target": target, "fixed": fixed}
        return next(found for found in correlations if which.items() <= found.items())

    return tau


def compared(split: str) -> list[tuple[str, str, str]]:
    """What is compared with accuracy: names, perturbations and quantities.

    Flatness is that of no perturbation, and stands among steepest ascent's.
    """
    kinds = set(measured_on(split)["perturbation"])
    return [
        (title if quantity == "flatness" else f"{title}, {KINDS[kind]}", kind, quantity)
        for kind in KINDS
        for quantity, title in QUANTITIES.items()
        if kind in kinds and (quantity != "flatness" or kind == "sam")
    ]


def several_epochs(split: str, kind: str) -> bool:
    """Whether a mean over epochs is of more than the last."""
    rows = measured_on(split)
    return rows.loc[rows["perturbation"] == kind, "epoch"].nunique() > 1


def correlations_table(split: str, target: str = "accuracy") -> list[dict]:
    """Kendall's tau of every quantity with a target."""
    tau, rows = taus(split), []
    for name, kind, quantity in compared(split):
        last = tau(quantity, kind, target=target)
        row = {TARGETS[target]: name, "all pairs": tested(last["tau"], last["p_value"])}
        for fixed in ("method", "m", "rho"):
            within = tau(quantity, kind, target=target, fixed=fixed)
            row[f"{fixed} fixed"] = tested(within["tau"], within["p_value"])
        row["above flatness'"] = above_flatness(last)
        if split == "train" and several_epochs(split, kind):
            mean = tau(quantity, kind, "mean", target)
            row["mean over epochs"] = tested(mean["tau"], mean["p_value"])
            row["above flatness', mean over epochs"] = above_flatness(mean)
        row["of single models"] = tested(last["tau_runs"])
        rows.append(row)
    return rows


def above_flatness(tau: dict) -> str:
    """By how much a tau exceeds flatness', or whatever took its place."""
    return "" if tau["quantity"] == "flatness" else tested(tau["above_rival"], tau["above_p"])


def predictors() -> dict[str, pd.Series]:
    """Simpler predictors of accuracy, by name: a value for each run."""
    rows = measured("train")
    runs, on_test = last_epoch(rows, "own"), last_epoch(measured("test"), "own")
    found = {
        "the method alone: SAM above OBF": (runs["method"] == "sam").astype(float),
        "accuracy on the training images": runs["measured_accuracy"],
        "flatness, on test images": -on_test["lambda_max"],
    }
    for epoch, measured_then in rows[rows["perturbation"] == "own"].groupby("epoch"):
        found[f"flatness, after {epoch} epochs"] = -measured_then.set_index("run")["lambda_max"]
    return found


def references_table() -> list[dict]:
    """What simpler predictors come to, each in place of flatness; and what one setting does."""
    runs = last_epoch(measured("train"), "own")
    entries = {
        name: (runs.assign(lambda_max=-values.reindex(runs.index)), "flatness")
        for name, values in predictors().items()
    }
    settings = zip(runs["method"], runs["trained_m"], runs["trained_rho"])
    rest = runs[[setting != OUTLYING for setting in settings]]
    entries[f"flatness, on {len(rest)} models"] = rest, "flatness"
    entries[f"forgetting, the run's own, on {len(rest)} models"] = rest, "forgetting"
    rows = []
    for name, (of, quantity) in entries.items():
        row = {"predictor": name}
        for target, title in TARGETS.items():
            function = rank_correlations.TARGETS[target]
            everywhere = rank_correlations.correlate(of, function, SEED)
            within = rank_correlations.correlate(of, function, SEED, "method")[quantity]
            found = everywhere[quantity]
            row[title] = tested(found["tau"], found["p_value"])
            row[f"{title}, method fixed"] = tested(within["tau"], within["p_value"])
            own = everywhere["forgetting"]
            lead = "" if own is found else tested(own["above_rival"], own["above_p"])
            row[f"own forgetting above it ({'accuracy' if target == 'accuracy' else 'gap'})"] = lead
        rows.append(row)
    return rows


def explained_table() -> list[dict]:
    """How much of the variance of each quantity settings explain, and what that means for tau."""
    runs, own = last_epoch(measured("train"), "sam"), last_epoch(measured("train"), "own")
    values = {
        "accuracy on test": runs["accuracy"],
        "generalisation gap": -rank_correlations.TARGETS["-gap"](runs),
        "forgetting, the run's own": own["forgetting"],
        "forgetting, steepest ascent": runs["forgetting"],
        "lambda_max": runs["lambda_max"],
    }
    rows = []
    for name, of in values.items():
        by_setting = rank_correlations.explained(of, runs["setting"])
        row = {"quantity": name, "share of variance": f"{by_setting:.0%}"}
        row["highest τ with single models"] = f"{rank_correlations.ceiling(by_setting):.2f}"
        rows.append(row)
    return rows


def estimates_table(kind: str) -> list[dict]:
    """Whether another estimate of a perturbation's forgetting ranks the models alike."""
    titles = {"train": "as above", **VARIANTS}
    last = {name: last_epoch(measured(name), kind) for name in titles}
    runs = sorted(set.intersection(*(set(rows.index) for rows in last.values())))
    first, rows = last["train"].loc[runs, "forgetting"], []
    for name, title in titles.items():
        own = last[name].loc[runs]
        row = {f"estimate (n = {len(runs)})": title, "bits": f"{own['forgetting'].mean():+.3f}"}
        row["τ with the first"] = f"{kendalltau(own['forgetting'], first)[0]:+.2f}"
        for target, head in TARGETS.items():
            values = rank_correlations.TARGETS[target](own)
            row[head] = f"{kendalltau(own['forgetting'], values)[0]:+.2f}"
        rows.append(row)
    return rows


def equal_rho_table() -> list[dict]:
    """At one m: what each perturbation makes the same weights forget, and how good it trains."""
    random = measured("random").rename(columns={"rho": "trained_rho", "test": "accuracy"})
    (m,) = set(random["m"])
    rows = pd.concat([measured("train"), measured(OTHERS)])
    rows = rows[rows["trained_m"] == m]
    models = pd.concat([last_epoch(rows, "sam"), random])
    kinds, table = ("sam", "obf", "random"), []
    for rho, trained in models.groupby("trained_rho"):
        row = {f"rho (m {m})": f"{rho:g}"}
        for kind in kinds:
            measurements = last_epoch(rows, kind)
            row[f"forgetting of {kind}, bits"] = spread(
                measurements.loc[measurements["trained_rho"] == rho, "forgetting"]
            )
        for kind in kinds:
            row[f"trained with {kind}, %"] = spread(
                trained.loc[trained["method"] == kind, "accuracy"], 100
            )
        table.append(row)
    return table


def draw_scatter(path):
    """Forgetting and flatness against accuracy."""
    rows, tau = measured_on("train"), taus("train")
    panels = [panel for panel in compared("train") if panel[2] in ("forgetting", "flatness")]
    shape = {"figsize": (15, 4.2), "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), **shape)
    for axis, (name, kind, quantity) in zip(axes, panels):
        # SAM is first, as elsewhere.
        runs = last_epoch(rows, kind).sort_values("method", ascending=False, kind="stable")
        runs = runs.assign(m=runs["trained_m"], rho=runs["trained_rho"]).to_dict("records")
        style, handles = forgetting_styles(runs)
        for run in runs:
            column, sign = rank_correlations.QUANTITIES[quantity]
            point = [sign * run[column]], [100 * run["accuracy"]]
            axis.plot(*point, linestyle="", alpha=0.8, **style(run["method"], run["m"], run["rho"]))
        found = tau(quantity, kind)
        axis.set_title(f"{name}\nKendall's τ {tested(found['tau'], found['p_value'])}", fontsize=10)
        axis.set(xlabel="-lambda_max" if quantity == "flatness" else "forgetting, bits")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="top-1 on test, %")
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    report.save(figure, path, f"A marker is one of {len(runs)} models after the last epoch.")


def draw_taus(path):
    """Every correlation with test accuracy at a glance."""
    names = compared("train")
    shape = {"figsize": (11, 6.5), "sharey": True, "sharex": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(SPLITS), **shape)
    pairs = {"all pairs": None, "method fixed": "method", "m fixed": "m", "rho fixed": "rho"}
    for axis, (split, title) in zip(axes, SPLITS.items()):
        tau, there = taus(split), compared(split)
        shown = [(i, name) for i, name in enumerate(names) if name in there]
        for j, (label, fixed) in enumerate(pairs.items()):
            found = [tau(quantity, kind, fixed=fixed) for _, (_, kind, quantity) in shown]
            places = [i + 0.15 * (j - 1.5) for i, _ in shown]
            values = [f["tau"] for f in found]
            style = {"color": f"C{j}", "marker": "os^D"[j], "linestyle": ""}
            axis.plot(values, places, fillstyle="none", label=label, **style)
            sure = [(v, p) for v, p, f in zip(values, places, found) if f["p_value"] < 0.05]
            axis.plot(*zip(*sure) if sure else ([], []), **style)
        axis.axvline(0, color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel=f"Kendall's {TARGETS['accuracy']}", title=f"measured on {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=range(len(names)), yticklabels=[name for name, *_ in names])
    axes[0].set(ylim=(len(names) - 0.5, -0.5))
    axes[1].legend(frameon=False, fontsize=9)
    report.save(figure, path, "Of settings. Filled markers: p below 0.05, uncorrected.")


def draw_epochs(path):
    """Forgetting over epochs."""
    rows = measured("train")
    rhos, ms = (sorted(rows[key].unique()) for key in ("trained_rho", "trained_m"))
    panels = (
        ("obf", "own"),
        ("obf", "sam"),
        ("sam", "sam"),
    )  # SAM's own perturbation is steepest ascent
    shape = {"figsize": (14, 4.5), "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(1, len(panels), **shape)
    colours = dict(zip(ms, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(ms)))))
    dashes = dict(zip(rhos, itertools.cycle((":", "--", "-", "-.", (0, (6, 2))))))
    handles = {}
    for axis, (method, kind) in zip(axes, panels):
        panel = rows[(rows["method"] == method) & (rows["perturbation"] == kind)]
        for (rho, m), setting in panel.groupby(["trained_rho", "trained_m"]):
            means = setting.groupby("epoch")["forgetting"].mean()
            style = {"color": colours[m], "linestyle": dashes[rho]}
            (handles[f"m {m}, rho {rho:g}"],) = axis.plot(means.index, means, **style)
            axis.plot(setting["epoch"], setting["forgetting"], ".", color=colours[m], alpha=0.5)
        axis.axhline(0, color="0.6", linewidth=1, zorder=0)
        axis.set_title(f"trained with {method}; perturbation: {KINDS[kind]}", fontsize=10)
        axis.set(xlabel="epoch", xticks=sorted(rows["epoch"].unique()))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="forgetting, bits")
    legend = {"loc": "outside right center", "frameon": False, "fontsize": 8, "handlelength": 4}
    figure.legend(handles.values(), handles, **legend)
    caption = (
        "Points are models, lines means over seeds. The perturbation has the run's own m and rho."
    )
    report.save(figure, path, caption)


TABLES = {
    "correlations": lambda: correlations_table("train"),
    "correlations_gap": lambda: correlations_table("train", "-gap"),
    "correlations_held_out": lambda: correlations_table("test"),
    "references": references_table,
    "explained": explained_table,
    "estimates_own": lambda: estimates_table("own"),
    "equal_rho": equal_rho_table,
}


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument(
        "--collect", type=Path, metavar="OUTPUTS", help="make data/ from the measurements there"
    )
    args = p.parse_args(argv)
    if args.collect:
        collect(args.collect)
    fill(HERE / "README.md", SCRIPT, TABLES)
    for draw in (draw_scatter, draw_taus, draw_epochs):
        draw(HERE / f"{draw.__name__.removeprefix('draw_')}.png")


if __name__ == "__main__":
    main()
