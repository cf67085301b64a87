"""How much the loss rises around the weights, relative to each weight.

The measures are those of Andriushchenko et al. 2023 ("A modern look at the relationship between
sharpness and generalization", arXiv 2302.07011), with c = |w| and logits normalised.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F

# A loss is a function without arguments: the mean over one micro-batch at the weights as they are,
# a scalar with a graph where gradients are on.


def loss_of(model, images: torch.Tensor, labels: torch.Tensor) -> Callable:
    """The paper's loss of a micro-batch: cross-entropy of ``normalized`` logits.

    It is the same for all models, whatever they were trained with.

    Args:
        images: (m, ...), the model's input.
        labels: (m,), class indices.
    """
    return lambda: F.cross_entropy(normalized(model(images)), labels)


def normalized(logits: torch.Tensor) -> torch.Tensor:
    """Logits (examples, classes) over their standard deviation in each example.

    Without it, a network that is only more confident is sharper too. Those of two classes are -1
    and 1, so that only a change of the prediction is seen. (The paper's code divides by the norm of
    the centred logits, which is sqrt(classes) times as much. So its losses are others, but they are
    as blind to confidence.)
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

    Where the loss is quadratic with Hessian H, it is rho^2 / 2 times the sum of H_ii w_i^2.

    Args:
        params: the weights w.
        loss: L.
        rho: the noise's standard deviation, relative to each weight.
        draws: how many n to average over.
        generator: of torch, on the device of the weights.

    Returns:
        In units of the loss.
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
        params, loss: as for ``average_case``.
        rho: how far a weight may move, relative to it.
        steps: each costs a forward and a backward pass.

    Returns:
        In units of the loss; at least 0.
    """
    with _kept(params) as weights:
        radii = [rho * w.abs() for w in weights]
        before = highest = None
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps):
                value = loss()
            before = value.item() if before is None else before
            highest = value.item() if highest is None else max(highest, value.item())
            if step == steps:
                break
            grads = torch.autograd.grad(value, params, allow_unused=True, materialize_grads=True)
            with torch.no_grad():
                for p, w, radius, grad in zip(params, weights, radii, grads):
                    moved = p + 2 * (1 - step / steps) * radius * grad.sign()
                    p.copy_(torch.clamp(moved, w - radius, w + radius))
    return highest - before
