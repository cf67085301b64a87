"""Measures of a classifier's predictions, and intervals of their differences."""

import datasets
import evaluate
import numpy as np
import torch
from scipy.stats import binomtest, t

from common.metrics import in_memory

BINS = 15  # of the expected calibration error, as in Guo et al. 2017


def score(logits: torch.Tensor, right: torch.Tensor) -> dict[str, torch.Tensor]:
    """What ``Classification`` needs to know of each example.

    Args:
        logits: (examples, classes).
        right: (examples, classes), True for every right answer; at least one an example.

    Returns:
        (examples,) each: ``prediction`` (class index), ``top1`` and ``top5`` (a right answer is the
        first, is among the first five), ``nll`` (nats, of the right answers together) and
        ``confidence`` (of the prediction).
    """
    logits = logits.float()
    top = logits.topk(min(5, logits.shape[-1]), -1).indices
    hits = right.gather(-1, top)
    log_p = logits.log_softmax(-1)
    return {
        "prediction": top[:, 0],
        "top1": hits[:, 0],
        "top5": hits.any(-1),
        "nll": -log_p.masked_fill(~right, -torch.inf).logsumexp(-1),
        "confidence": log_p.gather(-1, top[:, :1]).squeeze(-1).exp(),
    }


class Classification(evaluate.Metric):
    """Top-1, top-5, negative log-likelihood and expected calibration error, of ``score``'s columns.

    ``top1_low`` and ``top1_high`` are the ends of the 95 % Wilson interval of top-1.
    """

    def _info(self):
        features = {name: datasets.Value("bool") for name in ("top1", "top5")}
        features |= {name: datasets.Value("float64") for name in ("nll", "confidence")}
        return evaluate.MetricInfo(
            description="Accuracy, likelihood and calibration of a classifier.",
            citation="",
            features=datasets.Features(features),
            format="numpy",
        )

    def _compute(self, top1, top5, nll, confidence):
        interval = binomtest(int(top1.sum()), len(top1)).proportion_ci(0.95, method="wilson")
        bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
        gaps = np.bincount(bins, confidence, BINS) - np.bincount(bins, top1, BINS)
        return {
            "top1": float(top1.mean()),
            "top1_low": float(interval.low),
            "top1_high": float(interval.high),
            "top5": float(top5.mean()),
            "nll": float(nll.mean()),
            "ece": float(np.abs(gaps).sum() / len(top1)),
            "examples": len(top1),
        }


def classification(columns: dict) -> dict[str, float]:
    """``Classification`` of ``score``'s columns, all of them or some examples' at a time."""
    metric = in_memory(Classification)
    names = ("top1", "top5", "nll", "confidence")
    metric.add_batch(**{name: np.asarray(columns[name]) for name in names})
    return metric.compute()


def paired(
    first: np.ndarray, other: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> dict[str, float]:
    """The difference in top-1, ``other`` less ``first``.

    Args:
        first, other: (images,) each, whether each model was right on the same images.

    Returns:
        ``difference``; ``low`` and ``high``, its 95 % bootstrap interval (percentiles over
        resampled images); and ``p_value``, McNemar's exact test that both are right equally often
        (two-sided).
    """
    gained, lost = int((other & ~first).sum()), int((first & ~other).sum())
    size = len(first)
    # Resampling images is drawing how many of them one model alone gets right.
    shares = np.array([gained, lost, size - gained - lost]) / size
    draws = np.random.default_rng(seed).multinomial(size, shares, resamples)
    low, high = np.percentile((draws[:, 0] - draws[:, 1]) / size, [2.5, 97.5])
    p_value = binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    interval = {"low": float(low), "high": float(high)}
    return {"difference": (gained - lost) / size, **interval, "p_value": float(p_value)}


def mean(values: np.ndarray) -> dict[str, float]:
    """The ``mean`` of a value of each image; ``low`` and ``high``, its normal 95 % interval."""
    middle, half = values.mean(), 1.96 * values.std() / len(values) ** 0.5
    return {"mean": float(middle), "low": float(middle - half), "high": float(middle + half)}


def crossed(differences: np.ndarray) -> dict[str, float]:
    """The mean of (seeds, images) differences between two methods, and its 95 % interval.

    The interval, ``low`` to ``high``, is over seeds and images, as neither are all that there could
    be. The mean varies with both, and their variances are added. That counts twice what is peculiar
    to one seed on one image (as the pigeonhole bootstrap does, Owen 2007). Student's t, with
    Satterthwaite's degrees of freedom, allows for few seeds; with three whose luck outweighs the
    images', it holds the truth in about 93 of 100 cases.

    Raises:
        ValueError: there is one seed alone.
    """
    if len(differences) < 2:
        raise ValueError("an interval over seeds needs at least two of them")
    variances, freedoms = [], []
    for axis in (1, 0):
        means = differences.mean(axis)
        variances.append(means.var(ddof=1) / len(means))
        freedoms.append(len(means) - 1)
    total = sum(variances)
    freedom = total**2 / sum(v**2 / f for v, f in zip(variances, freedoms)) if total else 1.0
    half = t.ppf(0.975, freedom) * total**0.5
    middle = differences.mean()
    return {"mean": float(middle), "low": float(middle - half), "high": float(middle + half)}
