"""How well what is measured of runs goes with how good they are: Kendall's tau and tests.

Runs of one setting differ by their seeds' luck alone. So the tests are of settings, by the means
over their seeds. `benchmarks/intervals.py` shows how often they reject what is true.
"""

import itertools
import math

import numpy as np
import pandas as pd

MIN_RUNS = 4  # for a rank correlation
DRAWS = 1999  # of each test
# What is compared with test accuracy: columns, and a sign with which more should be better. Flat
# models have a small largest eigenvalue.
QUANTITIES = {
    "forgetting": ("forgetting", 1),
    "relevant_change": ("relevant_change", 1),
    "flatness": ("lambda_max", -1),
    "-trace": ("trace", -1),
    "-average_sharpness": ("average_sharpness", -1),
    "-worst_sharpness": ("worst_sharpness", -1),
    "-sam_gap": ("sam_gap", -1),
    "-feature_rank": ("feature_rank", -1),
    "-measured_loss": ("measured_loss", -1),
}
# What they are compared with: good models have high accuracy on test, and a small gap to that on
# training images.
TARGETS = {
    "accuracy": lambda runs: runs["accuracy"],
    "-gap": lambda runs: runs["accuracy"] - runs["measured_accuracy"],
}
# Settings of the runs, each of which alone may drive both, and the columns that have them.
FIXED = {"m": "trained_m", "rho": "trained_rho", "method": "method"}


def kendall(x, y, pairs) -> np.ndarray:
    """Kendall's tau-b between x and y.

    Args:
        x, y: (..., n); leading dimensions are broadcast.
        pairs: (n, n), whether a pair counts.

    Returns:
        (...), NaN where all pairs of x, or of y, are tied.
    """
    x, y = (np.sign(v[..., :, None] - v[..., None, :]) for v in map(np.asarray, (x, y)))
    x, y = ((signs * pairs).astype(np.int8) for signs in (x, y))
    agreement, xs, ys = ((a * b).sum((-2, -1), dtype=float) for a, b in ((x, y), (x, x), (y, y)))
    with np.errstate(invalid="ignore"):
        return agreement / np.sqrt(xs * ys)


def equal(values) -> np.ndarray:
    """(n, n), which pairs of values are equal."""
    codes = _codes(values)
    return codes[:, None] == codes


def permutation_test(x, y, strata, seed: int) -> float:
    """The two-sided p value of Kendall's tau over pairs of one stratum, if nothing but the stratum
    relates x and y: x is permuted within each.

    Args:
        x, y, strata: (settings,)
    """
    rng, (x, y), codes = np.random.default_rng(seed), map(np.asarray, (x, y)), _codes(strata)
    keys = rng.random((DRAWS, len(x))), np.broadcast_to(codes, (DRAWS, len(x)))
    # Sorted by stratum, and in it by chance.
    places, shuffled = np.argsort(codes, kind="stable"), np.lexsort(keys, axis=-1)
    drawn = kendall(x[shuffled], y[places], equal(codes[places]))
    return _two_sided(kendall(x, y, equal(codes)), drawn)


def swap_test(x, rival, y, strata, seed: int) -> float:
    """The two-sided p value of the difference between two Kendall's taus with y, if x and its rival
    tell equally much: their ranks, within strata, are swapped for settings drawn at random.

    Args:
        x, rival, y, strata: (settings,)
    """
    rng, codes = np.random.default_rng(seed), _codes(strata)
    x, rival = (pd.Series(np.asarray(v)).groupby(codes).rank().to_numpy() for v in (x, rival))
    swapped = rng.random((DRAWS, len(x))) < 0.5
    swapped[0] = False
    firsts, others = np.where(swapped, rival, x), np.where(swapped, x, rival)
    pairs = equal(codes)
    difference = kendall(firsts, y, pairs) - kendall(others, y, pairs)
    return _two_sided(difference[0], difference[1:])


def _codes(strata):
    return pd.factorize(pd.Series(strata))[0]


def _two_sided(found, drawn) -> float:
    """The share of draws, ``found`` among them, that are as far from 0."""
    if np.isnan(found):
        return math.nan
    return float((1 + (np.abs(drawn) >= abs(found) - 1e-12).sum()) / (1 + len(drawn)))


def explained(values, settings) -> float:
    """The share of the variance of runs' values, in [0, 1], that their settings explain; the rest
    is their seeds' luck.

    The intraclass correlation ICC(1) of a one-way analysis of variance (Shrout and Fleiss 1979);
    NaN where no setting has two runs, or there is one setting alone.
    """
    groups = pd.Series(np.asarray(values, float)).groupby(_codes(settings))
    sizes, runs = groups.size(), len(values)
    if len(sizes) in (1, runs):
        return math.nan
    between = (sizes * (groups.mean() - np.mean(values)) ** 2).sum() / (len(sizes) - 1)
    within = (groups.var(ddof=0) * sizes).sum() / (runs - len(sizes))
    size = (runs - (sizes**2).sum() / runs) / (len(sizes) - 1)
    total = between + (size - 1) * within
    return float(np.clip((between - within) / total, 0, 1)) if total else 0.0


def ceiling(share: float) -> float:
    """Kendall's tau with single runs' values that perfect knowledge of their settings reaches, if
    values are normal.

    Args:
        share: from ``explained``. The correlation of a setting's true mean with a run is its square
            root.
    """
    return 2 / math.pi * math.asin(math.sqrt(share))


def correlate(runs: pd.DataFrame, target, seed: int, fixed: str | None = None) -> dict[str, dict]:
    """How well each of ``QUANTITIES`` that runs have ranks them and their settings by a target.

    Args:
        runs: a row for each run, with flatness among its columns.
        target: a function of them, as of ``TARGETS``.
        fixed: None, or one of ``FIXED``: pairs share its value, as in the conditional measures of
            Jiang et al. 2020.

    Returns:
        By quantity ``tau_runs``, Kendall's tau-b over single runs of different settings; ``tau``
        over the means of settings, with ``p_value`` of ``permutation_test``; and ``above_rival``,
        by how much that tau exceeds flatness', with ``above_p`` of ``swap_test``. NaN are the
        values of what is equal in all runs, and the rival's own ``above_p``.
    """
    stratum = runs[FIXED[fixed]].astype(str) if fixed else pd.Series("", runs.index)
    quantities = {name: sign * runs[of] for name, (of, sign) in QUANTITIES.items() if of in runs}
    others = {"target": target(runs), "setting": runs["setting"], "stratum": stratum}
    single = pd.DataFrame(quantities | others)
    means = single.groupby(["stratum", "setting"], as_index=False).mean()
    of_settings, strata = means["target"].to_numpy(), means["stratum"]
    between = equal(single["stratum"]) & ~equal(single["setting"])
    pairs = equal(strata)
    rival = kendall(means["flatness"], of_settings, pairs)
    found = {}
    for name in quantities:
        tau = kendall(means[name], of_settings, pairs)
        values = {
            "tau_runs": kendall(single[name], single["target"], between),
            "tau": tau,
            "p_value": permutation_test(means[name], of_settings, strata, seed),
            "above_rival": tau - rival,
            "above_p": math.nan,
        }
        if name != "flatness":
            both = means[name], means["flatness"]
            values["above_p"] = swap_test(*both, of_settings, strata, seed)
        found[name] = {key: float(value) for key, value in values.items()}
    return found


def table(rows: list[dict], seed: int, gap: bool = True) -> list[dict]:
    """``correlate`` for each perturbation that has enough runs, and for each of ``TARGETS``.

    A run counts with its last epoch, and besides that with the mean over its epochs. Nothing is
    fixed but what varies. ``reachable`` is the ``ceiling`` of ``tau_runs``.

    Args:
        rows: one for each run, epoch and perturbation.
        gap: whether it is a target; without training images there is none.
    """
    summaries, targets = [], [name for name in TARGETS if name == "accuracy" or gap]
    for kind, measured in pd.DataFrame(rows).groupby("perturbation", sort=False):
        last = measured.sort_values("epoch", kind="stable").groupby("run", sort=False).tail(1)
        last = last.set_index("run")
        if len(last) < MIN_RUNS:
            continue
        measures = [column for column, _ in QUANTITIES.values() if column in measured]
        means = last.assign(**measured.groupby("run")[measures].mean())
        varied = [key for key, column in FIXED.items() if last[column].nunique(dropna=False) > 1]
        for (epochs, chosen), target, fixed in itertools.product(
            (("last", last), ("mean", means)), targets, (None, *varied)
        ):
            which = {"perturbation": kind, "epochs": epochs, "target": target, "fixed": fixed}
            which |= {"runs": len(chosen), "settings": chosen["setting"].nunique()}
            share = explained(TARGETS[target](chosen), chosen["setting"])
            which["reachable"] = ceiling(share) if not fixed else math.nan
            for name, found in correlate(chosen, TARGETS[target], seed, fixed).items():
                summaries.append({**which, "quantity": name, **found})
    return summaries
