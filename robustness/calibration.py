"""Whether a model's confidence is how often it is right, as it is and after temperature scaling."""

import numpy as np
import torch

BINS = 15  # of the expected calibration error, as in Guo et al. 2017
TEMPERATURES = np.geomspace(1 / 8, 8, 49)  # the middle one is 1
DRAWS = 2000


def at_temperatures(logits: torch.Tensor, right: torch.Tensor) -> dict[str, np.ndarray]:
    """What temperature scaling needs to know of examples (Guo et al. 2017, section 4.2).

    Args:
        logits: (examples, classes).
        right: (examples, classes), True for every right answer.

    Returns:
        (examples, ``TEMPERATURES``) each, in single precision: ``confidence`` of the prediction,
        and ``nll`` of the right answers together, of the logits divided by each temperature.
    """
    confidences, likelihoods = [], []
    for temperature in TEMPERATURES:
        log_p = (logits.float() / temperature).log_softmax(-1)
        confidences.append(log_p.amax(-1).exp())
        likelihoods.append(-log_p.masked_fill(~right, -torch.inf).logsumexp(-1))
    columns = {"confidence": confidences, "nll": likelihoods}
    return {name: torch.stack(values, -1).cpu().numpy() for name, values in columns.items()}


def scaled_confidence(confidence: np.ndarray, nll: np.ndarray) -> np.ndarray:
    """Confidences (examples,) after temperature scaling, of every second example by the temperature
    that is likeliest on the others.

    So no example has a part in its own temperature, and no other images are needed. A single
    example keeps its confidence.

    Args:
        confidence, nll: (examples, ``TEMPERATURES``), from ``at_temperatures``.
    """
    confidence = confidence.astype(float)  # so that what is read back is counted alike
    scaled = confidence[:, len(TEMPERATURES) // 2].copy()
    for half in (0, 1):
        if len(others := nll[1 - half :: 2]):
            place = _least(others.mean(0, dtype=float))
            below = min(int(place), len(TEMPERATURES) - 2)
            low, high = confidence[half::2, below], confidence[half::2, below + 1]
            scaled[half::2] = low + (place - below) * (high - low)
    return scaled


def _least(values: np.ndarray) -> float:
    """Where values (n,) are least: between two of them, by the parabola through three."""
    least = int(values.argmin())
    if not 0 < least < len(values) - 1:
        return float(least)
    before, at, after = values[least - 1 : least + 2]
    bend = before - 2 * at + after
    return least + (before - after) / (2 * bend) if bend > 0 else float(least)


def calibration_error(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """The expected calibration error, over ``BINS`` of confidence.

    Args:
        confidence: (examples,) in [0, 1].
        right: (examples,), whether the prediction was.

    Returns:
        ``ece`` in [0, 1]; ``low`` and ``high``, a 95 % interval. The error of few images is too
        large, as noise does not cancel between bins. The interval takes account of that: it is a
        basic bootstrap, each bin's mean drawn as normal, and begins at 0 where a calibrated model
        would often have such an error. `benchmarks/intervals.py` shows how often it holds the
        truth.
    """
    size, bins = len(right), np.minimum((confidence * BINS).astype(int), BINS - 1)
    gaps = confidence - right
    mean = np.bincount(bins, gaps, BINS) / size
    variance = (np.bincount(bins, gaps**2, BINS) / size - mean**2) / size
    if_calibrated = np.bincount(bins, confidence * (1 - confidence), BINS) / size**2
    noise = np.random.default_rng(0).normal(size=(DRAWS, BINS))
    error = np.abs(mean).sum()
    drawn = np.abs(mean + noise * np.sqrt(np.maximum(variance, 0))).sum(1)
    least, most = np.percentile(drawn, [2.5, 97.5])
    by_chance = np.percentile(np.abs(noise * np.sqrt(if_calibrated)).sum(1), 97.5)
    low = 0.0 if error <= by_chance else max(2 * error - most, 0.0)
    return {"ece": float(error), "low": float(low), "high": float(max(2 * error - least, error))}
