"""What sam_obf.py computes, written out in explicit loops over examples and parameters.

Only ``OBJECTIVES`` calls sam_obf.py: it pairs each objective with its definition.
"""

import torch
import torch.nn.functional as F

from sam_obf import OutputBiasForgetting

K = 5  # classes


def network(batch_norm=False, dtype=torch.float64):
    layers = [torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, K)]
    if batch_norm:
        layers.insert(1, torch.nn.BatchNorm1d(8))
    return torch.nn.Sequential(*layers).to(dtype)


def batches(n, size=12, dtype=torch.float64):
    return [(torch.randn(size, 6, dtype=dtype), torch.randint(0, K, (size,))) for _ in range(n)]


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def assert_same(a, b):
    for left, right in zip(a, b, strict=True):
        assert torch.equal(left, right)


def assert_close(a, b, tolerance=1e-11):
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance)


def obf_by_definition(logits, y, gamma=1.0, lam=None, link="sigmoid"):
    """(1 - alpha) CE(p, y) - CE(p, u), example by example, with alpha a Python number."""
    k = logits.shape[1]
    lam = 1 / k if lam is None else lam
    total = 0
    for z, label in zip(logits, y):
        p = torch.sigmoid(z) if link == "sigmoid" else torch.softmax(z, 0)
        p_y = p[label].item()
        alpha = gamma * max(0.0, (1 - lam / p_y) / (1 - lam)) if p_y > 0 else 0.0
        cross_entropies = []
        for q in (torch.eye(k, dtype=z.dtype)[label], torch.full((k,), 1 / k, dtype=z.dtype)):
            if link == "softmax":
                cross_entropies.append(-(q * torch.log(p)).sum())
            else:
                cross_entropies.append(-(q * torch.log(p) + (1 - q) * torch.log(1 - p)).sum())
        total = total + (1 - alpha) * cross_entropies[0] - cross_entropies[1]
    return total / len(y)


OBJECTIVES = {
    "sam": (lambda z, y: F.cross_entropy(z, y),) * 2,
    "obf": (OutputBiasForgetting(), obf_by_definition),
    "obf-gamma-0": (
        OutputBiasForgetting(gamma=0.0),
        lambda z, y: obf_by_definition(z, y, gamma=0.0),
    ),
    "obf-softmax": (
        OutputBiasForgetting(0.7, 0.1, "softmax"),
        lambda z, y: obf_by_definition(z, y, 0.7, 0.1, "softmax"),
    ),
    "random": None,
}


def brute_force_gradient(
    model, x, y, objective, rhos, adaptive=None, gsam_alpha=0.0, gsam_normalize=False, g=None
):
    """The gradient that one micro-batch contributes, and its perturbation, by parameter."""
    params = list(model.parameters())
    if g is None:
        g = list(torch.autograd.grad(objective(model(x), y), params))
    before = [p.detach().clone() for p in params]
    weighted = []
    for p, gi in zip(before, g):
        weighted.append(gi * p.abs() if adaptive in ("before", "both") else gi)
    norm = sum((w**2).sum() for w in weighted).sqrt() + 1e-12
    eps = []
    for p, w, rho in zip(before, weighted, rhos):
        eps.append(rho * (w * p.abs() if adaptive in ("after", "both") else w) / norm)
    for p, e in zip(params, eps):
        p.data = p.data + e
    gp = list(torch.autograd.grad(F.cross_entropy(model(x), y), params))
    for p, b in zip(params, before):
        p.data = b
    if gsam_alpha:
        if gsam_normalize:
            length = sum((gi**2).sum() for gi in g).sqrt() + 1e-12
            g = [gi / length for gi in g]
        c = sum((gi * gpi).sum() for gi, gpi in zip(g, gp)) / sum((gpi**2).sum() for gpi in gp)
        gp = [gpi - gsam_alpha * (gi - c * gpi) for gi, gpi in zip(g, gp)]
    return gp, eps


BASES = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.02, weight_decay=0.1),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
}


VARIANTS = {
    "plain": {},
    "asam-before": {"adaptive": "before"},
    "asam-after": {"adaptive": "after"},
    "asam-both": {"adaptive": "both"},
    "gsam": {"gsam_alpha": 0.4},
    "gsam-normalize": {"gsam_alpha": 0.4, "gsam_normalize": True},
}
