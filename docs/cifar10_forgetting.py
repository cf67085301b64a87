"""The tables and pictures of forgetting on CIFAR-10 in docs/results.md, from the data files in docs/cifar10/.

python docs/cifar10_forgetting.py                    # rebuild them
python docs/cifar10_forgetting.py --collect outputs  # make the data files anew, from the measurements in outputs/
"""

import argparse
import functools
import itertools
from pathlib import Path

import cifar10
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import kendalltau

from common import report
from robustness import correlations

SPLITS = {"train": "training images", "test": "test images"}  # on which all models were measured
COMMON = "common"  # a measurement with the same perturbation for all models, whatever they were trained with
OTHERS = "perturbations"  # a measurement of the perturbations that most models were not trained with
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
OUTLYING = ("sam", 32, 0.2)  # the setting whose models are the least accurate though they forget much
ABOVE = ("above_rival", "above_low", "above_high")  # of a tau: its difference to flatness', with its interval
SEED = 0  # of the bootstrap


def collect(outputs: Path):
    """The data files of every measurement, and of the sweep of random perturbations, that is there."""
    measured = [*SPLITS, COMMON, OTHERS, *VARIANTS]
    files = {f"forgetting_{name}": outputs / f"cifar10_m_{name}" / "measurements.csv" for name in measured}
    for name, file in {**files, "random": outputs / "cifar10_random" / "sweep.csv"}.items():
        if file.exists():
            cifar10.write(name, [{**row, "run": Path(row["run"]).name} for row in cifar10.rows_of(file)])
        else:
            print(f"left as it is: what comes from {file}, which is not there")


def read(name: str) -> list[dict]:
    """Rows as ``measure_forgetting.table_of`` makes them."""
    words = ("run", "setting", "method", "perturbation")
    rows = cifar10.read(f"forgetting_{name}")
    return [{key: value if key in words else float(value) for key, value in row.items()} for row in rows]


def last_of(rows, kind: str) -> dict[str, dict]:
    """By run: its row of a perturbation after the last epoch."""
    ordered = sorted(rows, key=lambda row: row["epoch"])
    return {row["run"]: row for row in ordered if row["perturbation"] == kind}


def rows_on(split: str) -> list[dict]:
    """The rows of a split; on training images with those of ``COMMON``, which take lambda_max from the others."""
    rows = read(split)
    if split == "train":
        flat = {(row["run"], row["epoch"]): row["lambda_max"] for row in rows}
        common = {"perturbation": COMMON}
        rows += [{**row, **common, "lambda_max": flat[row["run"], row["epoch"]]} for row in read(COMMON)]
    return rows


@functools.cache
def taus(split: str):
    """The rank correlations on a split, as a function of what they are of."""
    found = correlations.table(rows_on(split), SEED, gap=split == "train")

    def tau(quantity, kind="sam", epochs="last", target="accuracy", fixed=None):
        which = {"perturbation": kind, "quantity": quantity, "epochs": epochs, "target": target, "fixed": fixed}
        return next(one for one in found if which.items() <= one.items())

    return tau


def measured(split: str) -> list[tuple[str, str, str]]:
    """What is compared with accuracy: names, perturbations and quantities; flatness is that of no perturbation."""
    found = {row["perturbation"] for row in rows_on(split)}
    return [
        (QUANTITIES[quantity] + (f", {KINDS[kind]}" if quantity != "flatness" else ""), kind, quantity)
        for kind in KINDS
        for quantity in QUANTITIES
        if kind in found and (quantity != "flatness" or kind == "sam")
    ]


def several_epochs(split: str, kind: str) -> bool:
    """Whether a mean over epochs is of more than the last."""
    return len({row["epoch"] for row in rows_on(split) if row["perturbation"] == kind}) > 1


def shown(tau: dict, names=("tau", "low", "high")) -> str:
    """A tau with its interval."""
    middle, low, high = (f"{tau[name]:+.2f}" for name in names)
    return f"{middle} ({low} to {high})"


def beside_flatness(tau: dict) -> list[str]:
    """A tau and by how much it is above flatness'."""
    return [shown(tau), "" if tau["quantity"] == "flatness" else shown(tau, ABOVE)]


def correlations_table(split: str, target="accuracy") -> str:
    """Kendall's tau of every quantity with a target."""
    tau, lines, training = taus(split), [], split == "train"
    for name, kind, quantity in measured(split):
        line = [name, *beside_flatness(tau(quantity, kind, target=target))]
        line += [shown(tau(quantity, kind, target=target, fixed=fixed)) for fixed in ("m", "rho", "method")]
        if training:
            mean = beside_flatness(tau(quantity, kind, "mean", target))
            line += mean if several_epochs(split, kind) else ["", ""]
        lines.append(line)
    head = [TARGETS[target], "all pairs", "above flatness'", "m fixed", "rho fixed", "method fixed"]
    return cifar10.markdown(head + ["mean over epochs", "above flatness', mean over epochs"] * training, lines)


def references_table() -> str:
    """What other, simpler predictors come to, each in place of flatness, and what one setting does."""
    rows, on_test = read("train"), last_of(read("test"), "own")
    own = list(last_of(rows, "own").values())
    sharpness = {(row["run"], row["epoch"]): row["lambda_max"] for row in rows}
    seeds = {}
    for row in own:
        seeds.setdefault(row["setting"], []).append(row)

    def of_other_seeds(row):
        return np.mean([other["accuracy"] for other in seeds[row["setting"]] if other["seed"] != row["seed"]])

    def outlying(row):
        return (row["method"], row["trained_m"], row["trained_rho"]) == OUTLYING

    predictors = {
        "the method alone: SAM above OBF": lambda row: float(row["method"] == "sam"),
        "test accuracy of the setting's other seeds": of_other_seeds,
        "accuracy on the training images": lambda row: row["measured_accuracy"],
        "flatness, on test images": lambda row: -on_test[row["run"]]["lambda_max"],
    }
    for epoch in sorted({row["epoch"] for row in rows}):
        name = f"flatness, after {epoch:.0f} epochs"
        predictors[name] = lambda row, epoch=epoch: -sharpness[row["run"], epoch]
    compared = {}
    for name, value in predictors.items():
        compared[name] = [{**row, "lambda_max": -value(row)} for row in own], "flatness"
    rest = [row for row in own if not outlying(row)]
    compared[f"flatness, on {len(rest)} models"] = rest, "flatness"
    compared[f"forgetting, the run's own, on {len(rest)} models"] = rest, "forgetting"
    lines = []
    for name, (of, quantity) in compared.items():
        line = [name]
        for target in TARGETS:
            found = correlations.correlate(of, correlations.TARGETS[target], SEED, None)
            one, other = found[quantity], found["forgetting"]
            line += [shown(one), "" if one is other else shown(other, ABOVE)]
        lines.append(line)
    head = ["predictor"]
    for title in TARGETS.values():
        head += [title, "own forgetting above it"]
    return cifar10.markdown(head, lines)


def estimates_table() -> str:
    """Whether another estimate of forgetting ranks the models alike."""
    titles, kinds = {"train": "as above", **VARIANTS}, ("own", "sam")
    last = {name: {kind: last_of(read(name), kind) for kind in kinds} for name in titles}
    runs = sorted(set.intersection(*(set(of) for by_kind in last.values() for of in by_kind.values())))
    lines = []
    for name, title in titles.items():
        line = [title]
        for kind in kinds:
            own = [last[name][kind][run] for run in runs]
            values, others = ([last[of][kind][run]["forgetting"] for run in runs] for of in (name, "train"))
            targets = [[target(row) for row in own] for target in correlations.TARGETS.values()]
            line += [f"{np.mean(values):+.3f}", *(f"{kendalltau(values, y)[0]:+.2f}" for y in (others, *targets))]
        lines.append(line)
    columns = ["bits", "τ with the first", *TARGETS.values()]
    head = [f"estimate (n = {len(runs)})", *(f"{KINDS[kind]}: {column}" for kind in kinds for column in columns)]
    return cifar10.markdown(head, lines)


def equal_rho_table() -> str:
    """What each perturbation makes the same weights forget, and how accurate models trained with it are; at one m."""
    random, lines = cifar10.read("random"), []
    (m,) = {float(row["m"]) for row in random}
    rows = [row for row in read("train") + read(OTHERS) if row["trained_m"] == m]
    kinds = {kind: last_of(rows, kind).values() for kind in ("sam", "obf", "random")}
    models = [(row["method"], row["trained_rho"], row["accuracy"]) for row in kinds["sam"]]
    models += [("random", float(row["rho"]), float(row["test"])) for row in random]
    for rho in sorted({rho for _, rho, _ in models}):
        bits = [[row["forgetting"] for row in of if row["trained_rho"] == rho] for of in kinds.values()]
        ends = [[accuracy for *own, accuracy in models if own == [kind, rho]] for kind in kinds]
        lines.append([f"{rho:g}", *map(cifar10.spread, bits), *(cifar10.spread(values, 100) for values in ends)])
    head = [f"forgetting of {kind}, bits" for kind in kinds] + [f"trained with {kind}, %" for kind in kinds]
    return cifar10.markdown([f"rho (m {m:g})", *head], lines)


def draw_scatter(path):
    """Forgetting and flatness against accuracy."""
    rows, tau = rows_on("train"), taus("train")
    panels = [(name, *of) for name, *of in measured("train") if of[1] in ("forgetting", "flatness")]
    figure, axes = plt.subplots(1, len(panels), figsize=(15, 4.2), sharey=True, layout="constrained")
    for axis, (name, kind, quantity) in zip(axes, panels):
        # SAM is first, as elsewhere.
        own = sorted(last_of(rows, kind).values(), key=lambda row: row["method"], reverse=True)
        style, handles = report.forgetting_styles(
            [{**row, "m": int(row["trained_m"]), "rho": row["trained_rho"]} for row in own]
        )
        for row in own:
            point = [correlations.QUANTITIES[quantity](row)], [100 * row["accuracy"]]
            marker = style(row["method"], int(row["trained_m"]), row["trained_rho"])
            axis.plot(*point, linestyle="", alpha=0.8, **marker)
        axis.set_title(f"{name}\nKendall's τ {shown(tau(quantity, kind))}", fontsize=10)
        axis.set(xlabel="-lambda_max" if quantity == "flatness" else "forgetting, bits")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="top-1 on test, %")
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    report.save(figure, path, f"A marker is one of {len(own)} models after the last epoch.")


def draw_taus(path):
    """Every correlation with test accuracy at a glance."""
    names = measured("train")
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(11, 6.5), sharey=True, sharex=True, layout="constrained")
    for axis, (split, title) in zip(axes, SPLITS.items()):
        tau, own = taus(split), measured(split)
        for j, (label, fixed) in enumerate(
            {"all pairs": None, "m fixed": "m", "rho fixed": "rho", "method fixed": "method"}.items()
        ):
            for i, (_, kind, quantity) in ((i, name) for i, name in enumerate(names) if name in own):
                one = tau(quantity, kind, fixed=fixed)
                ends = [[one["tau"] - one["low"]], [one["high"] - one["tau"]]]
                style = {"fmt": "os^D"[j], "markersize": 4, "color": f"C{j}", "capsize": 2, "label": "" if i else label}
                axis.errorbar([one["tau"]], [i + 0.2 * (j - 1.5)], xerr=np.maximum(ends, 0), **style)
        axis.axvline(0, color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel=f"Kendall's {TARGETS['accuracy']}", title=f"measured on {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=range(len(names)), yticklabels=[name for name, *_ in names], ylim=(len(names) - 0.5, -0.5))
    axes[1].legend(frameon=False, fontsize=9)
    report.save(figure, path, "Whiskers are 95 % bootstrap intervals over settings, each with all its seeds.")


def draw_epochs(path):
    """Forgetting over epochs."""
    rows = read("train")
    rhos, ms = (sorted({row[key] for row in rows}) for key in ("trained_rho", "trained_m"))
    panels = (("obf", "own"), ("obf", "sam"), ("sam", "sam"))  # SAM's own perturbation is steepest ascent
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 4.5), sharey=True, layout="constrained")
    colours = dict(zip(ms, plt.get_cmap("viridis")(np.linspace(0, 0.85, len(ms)))))
    dashes = dict(zip(rhos, itertools.cycle((":", "--", "-", "-.", (0, (6, 2))))))
    for axis, (method, kind) in zip(axes, panels):
        of = [row for row in rows if (row["method"], row["perturbation"]) == (method, kind)]
        for rho, m in itertools.product(rhos, ms):
            own = [row for row in of if (row["trained_rho"], row["trained_m"]) == (rho, m)]
            found = report.series(own, "epoch", "forgetting")
            if not found:
                continue
            style = {"color": colours[m], "linestyle": dashes[rho], "label": f"m {m:.0f}, rho {rho:g}"}
            axis.plot(sorted(found), [np.mean(found[epoch]) for epoch in sorted(found)], **style)
            for epoch, values in found.items():
                axis.plot([epoch] * len(values), values, ".", color=colours[m], alpha=0.5)
        axis.axhline(0, color="0.6", linewidth=1, zorder=0)
        axis.set_title(f"trained with {method}; perturbation: {KINDS[kind]}", fontsize=10)
        axis.set(xlabel="epoch", xticks=sorted({row["epoch"] for row in rows}))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="forgetting, bits")
    handles = {}
    for axis in axes:
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels())))
    figure.legend(handles.values(), handles, loc="outside right center", frameon=False, fontsize=8, handlelength=4)
    caption = "Points are models, lines means over seeds. Of a perturbation of the run's own m and rho."
    report.save(figure, path, caption)


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make the data files from the measurements there")
    args = p.parse_args(argv)
    if args.collect:
        collect(args.collect)
    sections = {
        "correlations": lambda: correlations_table("train"),
        "correlations_gap": lambda: correlations_table("train", "-gap"),
        "correlations_held_out": lambda: correlations_table("test"),
        "references": references_table,
        "estimates": estimates_table,
        "equal_rho": equal_rho_table,
    }
    cifar10.fill_page("docs/cifar10_forgetting.py", sections)
    for draw in (draw_scatter, draw_taus, draw_epochs):
        draw(cifar10.PICTURES / f"cifar10_forgetting_{draw.__name__.removeprefix('draw_')}.png")


if __name__ == "__main__":
    main()
