"""How many dimensions a model's features fill.

The measure is that of Andriushchenko et al. 2023 ("Sharpness-aware minimization leads to low-rank
features", arXiv 2305.16292).
"""

import contextlib

import torch


@contextlib.contextmanager
def recorded(classifier: torch.nn.Module):
    """A list that gets what the classifier sees of each batch (batch, ...), in the block."""
    seen = []
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def rank(features: torch.Tensor, share: float = 0.99) -> int:
    """How many principal components hold ``share`` of the features' variance (section 3).

    Each dimension is centred over the examples, as principal components are. (The paper's code
    subtracts each example's mean over dimensions instead.)

    Args:
        features: (examples, dimensions), what the classifier sees.

    Returns:
        From 1 to dimensions; 0 where all examples have the same features.
    """
    covariance = torch.cov(features.double().T, correction=0).reshape(2 * features.shape[1:])
    variance = torch.linalg.eigvalsh(covariance).flip(0).clamp_min(0)
    if variance.sum() <= torch.finfo(torch.float64).eps * features.double().square().mean(0).sum():
        return 0  # only rounding is left
    return int((variance.cumsum(0) < share * variance.sum()).sum()) + 1
