"""How much the loss rises around the weights, relative to each weight; and the rank of features.

The measures are those of Andriushchenko et al. 2023 ("A modern look at the relationship between
sharpness and generalization", arXiv 2302.07011) and 2023b ("Sharpness-aware minimization leads to
low-rank features", arXiv 2305.16292).
"""

import contextlib
from collections.abc import Callable

import torch


def normalized(logits: torch.Tensor) -> torch.Tensor:
    """Logits (examples, classes) over their standard deviation in each example (2023, section 2).

    Without it, a network that is only more confident is sharper too.
    """
    return logits / logits.std(-1, correction=0, keepdim=True).clamp_min(1e-12)


@contextlib.contextmanager
def _kept(params):
    """Put the weights back, bit for bit."""
    copies = [p.detach().clone() for p in params]
    try:
        yield copies
    finally:
        with torch.no_grad():
            torch._foreach_copy_(params, copies)


def average_case(params: list, loss: Callable, rho: float, draws: int, generator) -> float:
    """Adaptive average-case sharpness: E[L(w + rho |w| n)] - L(w), n drawn from N(0, I).

    Args:
        params: the weights w.
        loss: returns L, a scalar, at the weights as they are.
        rho: relative to each weight.
        draws: how many n to average over.
        generator: of torch, on the device of the weights.
    """
    with torch.no_grad(), _kept(params) as weights:
        before, total = loss().item(), 0.0
        for _ in range(draws):
            for p, w in zip(params, weights):
                noise = torch.randn(w.shape, generator=generator, dtype=w.dtype, device=w.device)
                p.copy_(w + rho * w.abs() * noise)
            total += loss().item()
    return total / draws - before


def worst_case(params: list, loss: Callable, rho: float, steps: int = 20) -> float:
    """Adaptive worst-case sharpness: the maximum of L(w + d) - L(w) over |d| <= rho |w|,
    elementwise.

    It is found by projected ascent along the gradient's sign, in steps that shrink to nothing; the
    highest loss on the way counts. So it is a lower bound, as with the paper's Auto-PGD.

    Args:
        params, loss, rho: as for ``average_case``.
        steps: each costs a forward and a backward pass.
    """
    with _kept(params) as weights:
        radii = [rho * w.abs() for w in weights]
        before = highest = None
        for step in range(steps + 1):
            value = loss()
            before = value.item() if before is None else before
            highest = value.item() if highest is None else max(highest, value.item())
            if step == steps:
                break
            grads = torch.autograd.grad(value, params)
            with torch.no_grad():
                for p, w, radius, grad in zip(params, weights, radii, grads):
                    moved = p + 2 * (1 - step / steps) * radius * grad.sign()
                    p.copy_(torch.clamp(moved, w - radius, w + radius))
    return highest - before


def feature_rank(features: torch.Tensor, share: float = 0.99) -> int:
    """How many principal components hold ``share`` of the features' variance (2023b, section 3).

    Args:
        features: (examples, dimensions), what the classifier sees.
    """
    centred = features.double() - features.double().mean(0)
    variance = torch.linalg.svdvals(centred).square()
    if variance.sum() == 0:
        return 0
    return int((variance.cumsum(0) < share * variance.sum()).sum()) + 1
