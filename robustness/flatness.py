"""The rival explanation of what makes SAM generalise: how flat the loss is."""

import warnings

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh

# torch's own forward derivatives, and a package that curvlinops imports, use torch.jit.script.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)
from curvlinops import HessianLinearOperator  # noqa: E402


class _MeanLoss(torch.nn.Module):
    """A loss that says what curvlinops asks.

    timm's average over a batch, but say "none" or nothing.
    """

    reduction = "mean"

    def __init__(self, criterion):
        super().__init__()
        self.criterion = criterion

    def forward(self, logits, labels):
        return self.criterion(logits, labels)


def largest_eigenvalue(model, criterion, batches, size: int) -> float:
    """The largest eigenvalue of the Hessian of the mean loss over ``size`` examples, by Lanczos.

    ``batches`` yields inputs and labels, the same each time; ``criterion`` averages over a batch.

    Raises:
        ValueError: Lanczos' method finds none, as where the loss has no second derivative.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    options = {"num_data": size, "check_deterministic": False}
    loss = _MeanLoss(criterion)
    hessian = HessianLinearOperator(model, loss, params, batches, **options).to_scipy()
    start = np.random.default_rng(0).standard_normal(hessian.shape[0]).astype(hessian.dtype)
    try:
        # That of trained networks stands apart: 8 vectors take half the products that 20 do, which
        # are scipy's default.
        options = {"which": "LA", "tol": 1e-4, "return_eigenvectors": False}
        largest = float(eigsh(hessian, k=1, v0=start, ncv=min(8, len(start)), **options)[0])
    except ArpackError as error:
        raise ValueError(f"no largest eigenvalue of the Hessian: {error}") from error
    if not np.isfinite(largest):
        raise ValueError("the largest eigenvalue of the Hessian is not finite")
    return largest
