"""The tables and pictures of forgetting on CIFAR-10 in docs/results.md, from the data files in docs/cifar10/.

python docs/cifar10_forgetting.py                    # rebuild them
python docs/cifar10_forgetting.py --collect outputs  # make the data files anew, from the measurements in outputs/
"""

import argparse
import functools
from pathlib import Path

import cifar10
import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import kendalltau

import measure_forgetting
from common import report

SPLITS = {"train": "training images", "test": "held-out images"}  # on which all models were measured
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
KINDS = {"own": "the run's own", "sam": "steepest ascent"}  # perturbations of which correlations are shown
SEED = 0  # of the bootstrap


def collect(outputs: Path):
    """The data files of every measurement that is there."""
    for name in [*SPLITS, *VARIANTS]:
        file = outputs / f"cifar10_m_{name}" / "measurements.csv"
        if file.exists():
            rows = cifar10.rows_of(file)
            cifar10.write(f"forgetting_{name}", [{**row, "run": Path(row["run"]).name} for row in rows])
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


@functools.cache
def taus(name: str):
    """The rank correlations on a split, as a function of what they are of."""
    found = measure_forgetting.correlations(read(name), SEED, gap=name == "train")

    def tau(quantity, kind="sam", epochs="last", target="accuracy", fixed=None):
        which = {"perturbation": kind, "quantity": quantity, "epochs": epochs, "target": target, "fixed": fixed}
        return next(one for one in found if which.items() <= one.items())

    return tau


def measured() -> list[tuple[str, str, str]]:
    """What is compared with accuracy: names, perturbations and quantities; flatness is that of no perturbation."""
    return [
        (QUANTITIES[quantity] + (f", {KINDS[kind]}" if quantity != "flatness" else ""), kind, quantity)
        for kind in KINDS
        for quantity in QUANTITIES
        if quantity != "flatness" or kind == "sam"
    ]


def shown(tau: dict, names=("tau", "low", "high")) -> str:
    """A tau with its interval."""
    middle, low, high = (f"{tau[name]:+.2f}" for name in names)
    return f"{middle} ({low} to {high})"


def correlations_table(split: str) -> str:
    """Kendall's tau of every quantity."""
    tau, lines = taus(split), []
    for name, kind, quantity in measured():
        last, mean = (tau(quantity, kind, epochs) for epochs in ("last", "mean"))
        above = "" if quantity == "flatness" else shown(last, ("above_rival", "above_low", "above_high"))
        line = [name, shown(last), above, shown(mean)]
        if split == "train":
            line.append(shown(tau(quantity, kind, target="-gap")))
        lines.append(line + [f"{tau(quantity, kind, fixed=fixed)['tau']:+.2f}" for fixed in ("m", "rho", "method")])
    head = ["τ with test accuracy", "last epoch", "above flatness'", "mean over epochs"]
    head += ["with a small gap"] * (split == "train") + ["m fixed", "rho fixed", "method fixed"]
    return cifar10.markdown(head, lines)


def estimates_table() -> str:
    """Whether another estimate of forgetting ranks the models alike."""
    titles, lines = {"train": "as above", **VARIANTS}, []
    last = {
        name: {kind: last_of(rows, kind) for kind in KINDS} for name, rows in ((name, read(name)) for name in titles)
    }
    for name, title in titles.items():
        line = [title]
        for kind in KINDS:
            own, usual = last[name][kind], last["train"][kind]
            runs = [run for run in usual if all(run in last[variant][kind] for variant in VARIANTS)]
            values, others = ([of[run]["forgetting"] for run in runs] for of in (own, usual))
            accuracies = [own[run]["accuracy"] for run in runs]
            line += [f"{np.mean(values):+.3f}", *(f"{kendalltau(values, y)[0]:+.2f}" for y in (others, accuracies))]
        lines.append(line)
    columns = ["bits", "τ with the first", "τ with accuracy"]
    return cifar10.markdown(["estimate", *(f"{title}: {c}" for title in KINDS.values() for c in columns)], lines)


def equal_rho_table() -> str:
    """What each perturbation makes the same weights forget, and how accurate models trained with it become."""
    rows, lines = read("train"), []
    by_kind = {kind: last_of(rows, kind) for kind in ("sam", "obf", "random")}
    rhos, methods = (sorted({row[key] for row in by_kind["sam"].values()}) for key in ("trained_rho", "method"))
    for rho in rhos:
        own = {kind: [row for row in of.values() if row["trained_rho"] == rho] for kind, of in by_kind.items()}
        bits = [cifar10.spread([row["forgetting"] for row in own[kind]]) for kind in by_kind]
        ends = [[row["accuracy"] for row in own["sam"] if row["method"] == method] for method in methods]
        lines.append([f"{rho:g}", *bits, *(cifar10.spread(values, 100) if values else "" for values in ends)])
    head = [f"forgetting of {kind}, bits" for kind in by_kind] + [f"trained with {method}, %" for method in methods]
    return cifar10.markdown(["rho", *head], lines)


def draw_scatter(path):
    """Forgetting and flatness against accuracy."""
    rows, tau = read("train"), taus("train")
    panels = [(name, *of) for name, *of in measured() if of[1] in ("forgetting", "flatness")]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.2), sharey=True, layout="constrained")
    for axis, (name, kind, quantity) in zip(axes, panels):
        own = last_of(rows, kind).values()
        style, handles = report.forgetting_styles(
            [{**row, "m": int(row["trained_m"]), "rho": row["trained_rho"]} for row in own]
        )
        for row in own:
            point = [measure_forgetting.QUANTITIES[quantity](row)], [100 * row["accuracy"]]
            marker = style(row["method"], int(row["trained_m"]), row["trained_rho"])
            axis.plot(*point, linestyle="", alpha=0.8, **marker)
        axis.set_title(f"{name}\nKendall's τ {shown(tau(quantity, kind))}", fontsize=10)
        axis.set(xlabel="-lambda_max" if quantity == "flatness" else "bits")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="top-1 on test, %")
    figure.legend(handles=handles, loc="outside right center", frameon=False)
    report.save(figure, path, f"A marker is one of {len(own)} models after the last epoch.")


def draw_taus(path):
    """Every correlation with test accuracy at a glance."""
    names = measured()
    figure, axes = plt.subplots(1, len(SPLITS), figsize=(11, 4), sharey=True, sharex=True, layout="constrained")
    for axis, (split, title) in zip(axes, SPLITS.items()):
        tau = taus(split)
        for j, (label, choice) in enumerate(
            {"last epoch": {}, "mean over epochs": {"epochs": "mean"}, "rho fixed": {"fixed": "rho"}}.items()
        ):
            for i, (_, kind, quantity) in enumerate(names):
                one = tau(quantity, kind, **choice)
                ends = [[one["tau"] - one["low"]], [one["high"] - one["tau"]]]
                style = {"fmt": "os^"[j], "color": f"C{j}", "capsize": 2, "label": "" if i else label}
                axis.errorbar([one["tau"]], [i + 0.22 * (j - 1)], xerr=np.maximum(ends, 0), **style)
        axis.axvline(0, color="0.6", linewidth=1, zorder=0)
        axis.set(xlabel="Kendall's τ with test accuracy", title=f"measured on {title}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(yticks=range(len(names)), yticklabels=[name for name, *_ in names], ylim=(len(names) - 0.5, -0.5))
    axes[1].legend(frameon=False, fontsize=9)
    report.save(figure, path, "Whiskers are 95 % bootstrap intervals over settings, each with all its seeds.")


def draw_epochs(path):
    """Forgetting over epochs."""
    rows = [row for row in read("train") if row["perturbation"] in KINDS]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    ms = sorted({row["trained_m"] for row in rows})
    size = (4.2 * len(methods) + 1, 3.3 * len(KINDS))
    figure, axes = plt.subplots(
        len(KINDS), len(methods), figsize=size, sharey="row", squeeze=False, layout="constrained"
    )
    rhos = sorted({row["trained_rho"] for row in rows})
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(ms)))
    for line, kind in zip(axes, KINDS):
        for axis, method in zip(line, methods):
            for (m, colour), (rho, dash) in ((a, b) for a in zip(ms, colours) for b in zip(rhos, (":", "--", "-"))):
                own = [r for r in rows if (r["perturbation"], r["method"]) == (kind, method)]
                own = [r for r in own if (r["trained_m"], r["trained_rho"]) == (m, rho)]
                if own:
                    found = report.series(own, "epoch", "forgetting")
                    style = {"color": colour, "linestyle": dash, "marker": ".", "label": f"m {m:.0f}, rho {rho:g}"}
                    axis.plot(sorted(found), [np.mean(found[epoch]) for epoch in sorted(found)], **style)
            axis.axhline(0, color="0.6", linewidth=1, zorder=0)
            axis.set_title(f"trained with {method}; perturbation: {KINDS[kind]}", fontsize=10)
            axis.set(xlabel="epoch")
            axis.spines[["top", "right"]].set_visible(False)
        line[0].set(ylabel="forgetting, bits")
    handles = max((axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[0]))
    figure.legend(*handles, loc="outside right center", frameon=False, fontsize=8)
    report.save(figure, path, "Means over seeds. Of a perturbation of the run's own m and rho.")


def main(argv=None):
    """Run as from the command line."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--collect", type=Path, metavar="OUTPUTS", help="make the data files from the measurements there")
    args = p.parse_args(argv)
    if args.collect:
        collect(args.collect)
    sections = {
        "correlations": lambda: correlations_table("train"),
        "correlations_held_out": lambda: correlations_table("test"),
        "estimates": estimates_table,
        "equal_rho": equal_rho_table,
    }
    cifar10.fill_page("docs/cifar10_forgetting.py", sections)
    for draw in (draw_scatter, draw_taus, draw_epochs):
        draw(cifar10.PICTURES / f"cifar10_forgetting_{draw.__name__.removeprefix('draw_')}.png")


if __name__ == "__main__":
    main()
