"""Intervals and tests of differences: over seeds, and over images."""

import numpy as np
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
