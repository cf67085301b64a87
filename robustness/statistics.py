"""Measures of a classifier's predictions."""

import datasets
import evaluate
import numpy as np
import torch
from scipy.stats import binomtest

from common.metrics import in_memory
from robustness.calibration import calibration_error


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

    The ends of 95 % intervals are ``top1_low`` and ``top1_high`` (Wilson's), ``nll_low`` and
    ``nll_high`` (the normal one), ``ece_low`` and ``ece_high`` (of ``calibration_error``).
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
        likelihood, error = mean(nll), calibration_error(confidence, top1)
        return {
            "top1": float(top1.mean()),
            "top1_low": float(interval.low),
            "top1_high": float(interval.high),
            "top5": float(top5.mean()),
            "nll": likelihood["mean"],
            "nll_low": likelihood["low"],
            "nll_high": likelihood["high"],
            "ece": error["ece"],
            "ece_low": error["low"],
            "ece_high": error["high"],
            "examples": len(top1),
        }


def classification(columns: dict) -> dict[str, float]:
    """``Classification`` of ``score``'s columns, all of them or some examples' at a time."""
    metric = in_memory(Classification)
    names = ("top1", "top5", "nll", "confidence")
    metric.add_batch(**{name: np.asarray(columns[name]) for name in names})
    return metric.compute()


def mean(values: np.ndarray) -> dict[str, float]:
    """The ``mean`` of a value of each image; ``low`` and ``high``, its normal 95 % interval."""
    middle, half = values.mean(), 1.96 * values.std() / len(values) ** 0.5
    return {"mean": float(middle), "low": float(middle - half), "high": float(middle + half)}
