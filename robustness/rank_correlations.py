"""How well what is measured of runs goes with how good they are: Kendall's tau and intervals."""

import itertools
import math

import numpy as np

MIN_RUNS = 4  # for a rank correlation
MIN_SETTINGS = 10  # for its bootstrap interval
RESAMPLES = 2000
MEASURES = ("forgetting", "relevant_change", "lambda_max", "sam_gap")  # of a model
# What is compared with test accuracy; flat models have a small largest eigenvalue, and a small gap.
QUANTITIES = {
    "forgetting": lambda row: row["forgetting"],
    "relevant_change": lambda row: row["relevant_change"],
    "flatness": lambda row: -row["lambda_max"],
    "-sam_gap": lambda row: -row["sam_gap"],
}
# What they are compared with: good models have high accuracy on test, and a small gap to that on
# training images.
TARGETS = {
    "accuracy": lambda row: row["accuracy"],
    "-gap": lambda row: row["accuracy"] - row["measured_accuracy"],
}
# Settings of the runs, each of which alone may drive both, and where a row has them.
FIXED = {"m": "trained_m", "rho": "trained_rho", "method": "method"}


def kendall(x, y, settings, strata, weights) -> np.ndarray:
    """Kendall's tau-b between x and y, over pairs of runs.

    A pair differs in its setting and shares its stratum: seeds of one setting differ by luck alone.
    A draw that has a setting twice has four times its pairs.

    Args:
        x, y, settings, strata: (runs,) each.
        weights: (draws, runs), how often a draw has each run.

    Returns:
        (draws,), NaN where all of x or all of y are equal.
    """
    ranks = map(_ranks, (x, y, settings, strata))
    x, y, settings, strata = (np.subtract.outer(values, values) for values in ranks)
    x, y = (np.sign(differences) * (settings != 0) * (strata == 0) for differences in (x, y))
    products = (x * y, x * x, y * y)
    agreement, xs, ys = (((weights @ product) * weights).sum(1) for product in products)
    with np.errstate(invalid="ignore"):
        return agreement / np.sqrt(xs * ys)


def _ranks(values):
    return np.unique(np.asarray(values), return_inverse=True)[1]


def draws(groups, seed: int) -> np.ndarray:
    """How often each run counts: (1 + ``RESAMPLES``, runs).

    First that is once, then with its group, which is drawn with replacement.
    """
    group = _ranks(groups)
    rng, size = np.random.default_rng(seed), group.max() + 1
    counts = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return np.concatenate([np.ones((1, len(group))), counts[:, group]]).astype(float)


def correlate(rows: list[dict], target, seed: int, fixed: str | None = None) -> dict[str, dict]:
    """Kendall's tau-b of each of ``QUANTITIES`` with a target: ``kendall``.

    It is over all runs, or those that share a value.

    Args:
        rows: one for each run.
        target: a function of a row, as of ``TARGETS``.
        fixed: None, or one of ``FIXED``, as in the conditional measures of Jiang et al. 2020.

    Returns:
        By quantity ``tau``; ``low`` and ``high``, its 95 % bootstrap interval; ``above_rival``, by
        how much tau exceeds flatness', with ``above_low`` and ``above_high`` likewise. Intervals
        are percentiles over resampled settings, each with all its seeds, and NaN with fewer than
        ``MIN_SETTINGS``. NaN too is the tau of equal values.
    """
    groups = [row["setting"] for row in rows]
    weights = draws(groups, seed)
    strata = [str(row[FIXED[fixed]]) if fixed else "" for row in rows]
    y = [target(row) for row in rows]
    taus = {}
    for name, quantity in QUANTITIES.items():
        taus[name] = kendall([quantity(row) for row in rows], y, groups, strata, weights)
    enough = len(set(groups)) >= MIN_SETTINGS
    summaries = {}
    for name, tau in taus.items():
        above = tau - taus["flatness"]
        low, high = _interval(tau[1:], enough)
        above_low, above_high = _interval(above[1:], enough)
        values = {"tau": tau[0], "low": low, "high": high}
        values |= {"above_rival": above[0], "above_low": above_low, "above_high": above_high}
        summaries[name] = {key: float(value) for key, value in values.items()}
    return summaries


def _interval(drawn, enough):
    drawn = drawn[np.isfinite(drawn)]  # runs of equal values have no tau
    return np.percentile(drawn, [2.5, 97.5]) if enough and len(drawn) else (math.nan, math.nan)


def table(rows: list[dict], seed: int, gap: bool = True) -> list[dict]:
    """``correlate`` for each perturbation that has enough runs, and for each of ``TARGETS``.

    A run counts with its last epoch, and besides that with the mean over its epochs. Nothing is
    fixed but what varies.

    Args:
        rows: one for each run, epoch and perturbation.
        gap: whether it is a target; without training images there is none.
    """
    summaries, targets = [], [name for name in TARGETS if name == "accuracy" or gap]
    for kind in dict.fromkeys(row["perturbation"] for row in rows):
        runs = {}
        for row in rows:
            if row["perturbation"] == kind:
                runs.setdefault(row["run"], []).append(row)
        if len(runs) < MIN_RUNS:
            continue
        last = [max(epochs, key=lambda row: row["epoch"]) for epochs in runs.values()]
        means = [row | _means(runs[row["run"]]) for row in last]
        varied = [key for key, column in FIXED.items() if len({row[column] for row in last}) > 1]
        for (epochs, chosen), target, fixed in itertools.product(
            (("last", last), ("mean", means)), targets, (None, *varied)
        ):
            which = {"perturbation": kind, "epochs": epochs, "target": target, "fixed": fixed}
            which |= {"runs": len(chosen), "settings": len({row["setting"] for row in chosen})}
            for name, tau in correlate(chosen, TARGETS[target], seed, fixed).items():
                summaries.append({**which, "quantity": name, **tau})
    return summaries


def _means(rows):
    return {key: np.mean([row[key] for row in rows]) for key in MEASURES}
