"""Intervals and tests: of differences over seeds and over images, and of rank correlations over
settings.
"""

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import norm, ttest_1samp
from statsmodels.stats.multitest import multipletests

Z = norm.ppf(0.975)


def over_seeds(differences: np.ndarray, comparisons: int = 1) -> dict[str, float]:
    """The mean difference between two methods, whose runs are paired by seed.

    Args:
        differences: (seeds,), of accuracies or of any other measure.
        comparisons: how many differences there were to choose this one from. The interval is wider
            by that: all of them hold their truth together in 95 % of cases (Bonferroni).

    Returns:
        ``mean``; ``low`` and ``high``, its 95 % interval; and ``p_value``, of Student's paired t
        test. Which images were drawn counts only as far as it favours one method:
        `benchmarks/intervals.py` shows how often the interval holds the truth.

    Raises:
        ValueError: there is one seed alone.
    """
    differences = np.asarray(differences, dtype=float)
    if len(differences) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    mean = float(differences.mean())
    if np.ptp(differences) == 0:  # no spread, so no t statistic
        return {"mean": mean, "low": mean, "high": mean, "p_value": float(mean == 0)}
    result = ttest_1samp(differences, 0)
    low, high = result.confidence_interval(1 - 0.05 / comparisons)
    return {"mean": mean, "low": float(low), "high": float(high), "p_value": float(result.pvalue)}


def over_images(first: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """The difference in accuracy, ``other`` less ``first``, of two models on the same images.

    Args:
        first, other: (images,), whether each model was right.

    Returns:
        ``difference``; ``low`` and ``high``, Tango's 95 % score interval (Tango 1998); and
        ``p_value``, of McNemar's test without continuity correction. They agree: the interval holds
        0 where p is above 0.05, and only there.
    """
    first, other = np.asarray(first, bool), np.asarray(other, bool)
    gained, lost, size = int((other & ~first).sum()), int((first & ~other).sum()), len(first)
    difference = (gained - lost) / size
    result = {"difference": difference, "low": -1.0, "high": 1.0}
    for end, limit, bound in (("low", -1.0, Z), ("high", 1.0, -Z)):
        if difference != limit:

            def beyond(true, bound=bound):
                return _score(true, gained, lost, size) - bound

            result[end] = float(brentq(beyond, limit * (1 - 1e-12), difference))
    z = (gained - lost) / np.sqrt(gained + lost) if gained + lost else 0.0
    return result | {"p_value": float(2 * norm.sf(abs(z)))}


def _score(difference, gained, lost, size):
    """Tango's score statistic of a true ``difference``; 0 where it is the one observed."""
    # The likeliest probability that only ``first`` is right, given the difference.
    b = (2 * size - gained + lost) * difference - gained - lost
    c = -lost * difference * (1 - difference)
    probability = (np.sqrt(max(b * b - 8 * size * c, 0)) - b) / (4 * size)
    variance = size * (2 * probability + difference * (1 - difference))
    residual = gained - lost - size * difference
    if residual == 0:
        return 0.0
    return residual / np.sqrt(variance) if variance > 0 else np.copysign(np.inf, residual)


def holm(p_values) -> np.ndarray:
    """P values adjusted for being read together (Holm 1979), of the comparisons of one table."""
    return multipletests(p_values, method="holm")[1]


def kendall(x: np.ndarray, y: np.ndarray, strata: np.ndarray) -> float:
    """Kendall's tau-b over pairs that share their stratum; nan where all of them are tied."""
    signs = [np.sign(np.subtract.outer(v, v)) for v in (np.asarray(x, float), np.asarray(y, float))]
    strata = np.asarray(strata)
    signs = [s * (strata[:, None] == strata) for s in signs]
    both = np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    return float((signs[0] * signs[1]).sum() / both) if both else float("nan")


def kendall_test(
    runs: pd.DataFrame, x: str, y: str, within: str, resamples: int = 9999, seed: int = 0
) -> dict[str, float]:
    """Whether a quantity ranks settings as ``y`` does, among those that share ``within``, such as
    the method.

    Runs of one setting share their luck in the setting, so settings are what is tested: the means
    over their seeds.

    Args:
        runs: a row a run, with the columns ``setting``, ``within``, ``x`` and ``y``.

    Returns:
        ``tau`` over setting means, pairs of one stratum alone; ``p_value``, two-sided, of permuting
        the settings' means of ``x`` within each stratum; and ``settings``, their number.
    """
    means = runs.groupby([within, "setting"], as_index=False)[[x, y]].mean()
    strata = pd.factorize(means[within])[0]
    tau = kendall(means[x], means[y], strata)
    rng, order = np.random.default_rng(seed), np.argsort(strata, kind="stable")
    values, targets, strata = means[x].to_numpy()[order], means[y].to_numpy()[order], strata[order]
    more = 1
    for _ in range(resamples):
        # Sorting random keys by stratum permutes inside each.
        shuffled = np.lexsort((rng.random(len(values)), strata))
        more += abs(kendall(values[shuffled], targets, strata)) >= abs(tau) - 1e-12
    return {"tau": tau, "p_value": more / (resamples + 1), "settings": len(means)}


def explained(runs: pd.DataFrame, y: str) -> float:
    """The share of the variance of ``y``, in [0, 1], that a run's ``setting`` explains; the rest is
    its seed's luck.

    The intraclass correlation ICC(1) of a one-way analysis of variance.
    """
    groups = [group.to_numpy() for _, group in runs.groupby("setting")[y]]
    sizes = np.array([len(group) for group in groups])
    between = sum(len(g) * (g.mean() - runs[y].mean()) ** 2 for g in groups) / (len(groups) - 1)
    within = sum(((g - g.mean()) ** 2).sum() for g in groups) / (sizes.sum() - len(groups))
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(groups) - 1)
    share = (between - within) / (between + (size - 1) * within) if between + within else 0.0
    return float(min(max(share, 0.0), 1.0))


def ceiling(share: float) -> float:
    """Kendall's tau with single runs' ``y`` that perfect knowledge of their setting reaches, if
    ``y`` is normal.

    Args:
        share: from ``explained``. The correlation of a setting's true mean with a run is its square
            root.
    """
    return 2 / np.pi * np.arcsin(np.sqrt(share))
