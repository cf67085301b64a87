# Copyright 2026 The sam-obf authors. Licensed under the Apache License, Version 2.0.
"""What a classifier's outputs tell of its inputs, and what a perturbation makes it forget; in bits.

Outputs thresholded at tau are a set of classes, the pattern Y_tau in {0, 1}^K. It depends on the
input X alone, so that I(X; Y_tau | Y) = H(Y_tau | Y), estimated from how often each pattern occurs
in each class. Forgetting is what this falls by when the weights are perturbed (section 3 of the
paper: Vani et al., ICML 2024, arXiv 2406.06700).
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F

__all__ = ["adjusted_thresholds", "conditional_entropy", "forgetting", "label_patterns"]


def label_patterns(predictions: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """Name the set of classes predicted above each threshold.

    Args:
        predictions: (examples, classes).
        thresholds: (thresholds,).

    Returns:
        (examples, thresholds), int64: equal for equal sets. Different ones share a name with
        probability 2^-64.
    """
    values, classes = predictions.sort(-1)
    # A set's name is the sum, modulo 2^64, of random names of its classes: the largest few,
    # whatever the threshold.
    names = _names(predictions.shape[-1], classes, seed=0)[classes]
    sums = F.pad(names.flip(-1).cumsum(-1), (1, 0))
    up_to = thresholds.to(values).expand(len(values), -1).contiguous()
    return sums.gather(-1, values.shape[-1] - torch.searchsorted(values, up_to, right=True))


def conditional_entropy(
    patterns: torch.Tensor, given: torch.Tensor, *, miller_madow: bool = False
) -> torch.Tensor:
    """H(pattern | given) in bits, from counts: the plug-in estimate.

    Args:
        patterns: (examples, thresholds), from ``label_patterns``.
        given: (examples,), class indices; all equal for H(pattern).
        miller_madow: add (patterns seen - 1) / (2 examples) nats in each class, against the plug-in
            estimate's bias (Miller 1955).

    Returns:
        (thresholds,), float64.
    """
    joint, cells = _runs(patterns + _names(int(given.max()) + 1, given, seed=1)[given, None])
    marginal, groups = _runs(given[:, None])
    entropy = (marginal - joint) / len(given)
    if miller_madow:
        entropy += (cells - groups).double() / (2 * math.log(2) * len(given))
    return entropy


def adjusted_thresholds(labels: torch.Tensor, perturbed: torch.Tensor) -> torch.Tensor:
    """The thresholds at which a perturbed model predicts given numbers of labels.

    A perturbation shifts confidence too, and that alone is no forgetting: hence the numbers of the
    model as it is. Where several predictions are equal, no threshold may fit; then it predicts
    fewer.

    Args:
        labels: (thresholds,), how many predictions must exceed each, over all examples.
        perturbed: (examples, classes), the perturbed model's predictions.

    Returns:
        (thresholds,)
    """
    values = perturbed.flatten().sort().values
    return F.pad(values, (1, 0), value=-math.inf)[len(values) - labels]


def forgetting(
    batches: Iterable, thresholds: torch.Tensor, *, miller_madow: bool = False, adjust: bool = True
) -> dict[str, torch.Tensor]:
    """What a perturbation makes a model forget, from its predictions without and with it.

    It keeps the perturbed predictions, and one number for each example and threshold.

    Args:
        batches: of predictions (n, classes) in [0, 1], perturbed predictions (n, classes), and
            class indices (n,).
        thresholds: (thresholds,), each inside (0, 1).
        miller_madow: see ``conditional_entropy``.
        adjust: take the perturbed model's labels at ``adjusted_thresholds``, as the paper does, not
            at the same ones.

    Returns:
        ``forgetting``, the mean over thresholds of I(X; Y_tau | Y) - I(X; Yp_tau' | Y), and
        (thresholds,) each: ``information`` and ``information_perturbed``, these two terms;
        ``relevant`` and ``relevant_perturbed``, I(Y; Y_tau) and I(Y; Yp_tau'); ``adjusted``, tau'.
        All but tau' in bits.

    Raises:
        ValueError: a threshold outside (0, 1), a prediction that is not finite, or a class without
            an example.
    """
    outside = [threshold for threshold in thresholds.tolist() if not 0 < threshold < 1]
    if outside:
        raise ValueError(f"the threshold {outside[0]} does not lie inside (0, 1)")
    labels, parts = 0, []
    for clean, perturbed, target in batches:
        if not (clean.isfinite().all() and perturbed.isfinite().all()):
            raise ValueError("a prediction is not finite")
        labels += torch.stack([(clean > threshold).sum() for threshold in thresholds])
        parts.append((label_patterns(clean, thresholds), perturbed, target))
    clean, perturbed, target = map(torch.cat, zip(*parts))
    missing = set(range(perturbed.shape[-1])) - set(target.tolist())
    if missing:
        raise ValueError(
            f"class {min(missing)} has no example: I(X; Y_tau | Y) needs some of every class"
        )
    adjusted = adjusted_thresholds(labels, perturbed) if adjust else thresholds.to(perturbed)
    result = {"adjusted": adjusted}
    for name, patterns in (("", clean), ("_perturbed", label_patterns(perturbed, adjusted))):
        everything = torch.zeros_like(target)
        information = conditional_entropy(patterns, target, miller_madow=miller_madow)
        entropy = conditional_entropy(patterns, everything, miller_madow=miller_madow)
        result["information" + name] = information
        result["relevant" + name] = entropy - information
    result["forgetting"] = (result["information"] - result["information_perturbed"]).mean()
    return result


def _names(count, like, seed):
    """Random numbers by which to tell ``count`` classes, and sums of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(like.device)


def _runs(keys):
    """For each column: the sum of c log2 c over numbers c of equal keys, and how many differ."""
    keys = keys.sort(0).values
    first = F.pad(keys[1:] != keys[:-1], (0, 0, 1, 0), value=True)
    counts = torch.zeros(keys.shape, dtype=torch.float64, device=keys.device)
    counts.scatter_add_(0, first.cumsum(0) - 1, torch.ones_like(counts))
    return torch.xlogy(counts, counts).sum(0) / math.log(2), first.sum(0)
