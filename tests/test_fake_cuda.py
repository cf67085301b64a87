"""A GPU's behaviour without one: fake tensors on "cuda" fail at every read of a value by the host.

The autograd engine needs a device, so the closure of ``step()`` sets the gradients by hand.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from sam_obf import SAM, OutputBiasForgetting, momentum_perturbation

TYPES = [torch.float32, torch.bfloat16, torch.float16]
VARIANTS = {
    "sam": {},
    "asam-before": {"adaptive": "before"},
    "asam-after": {"adaptive": "after"},
    "asam-both": {"adaptive": "both"},
    "gsam": {"gsam_alpha": 0.4},
    "gsam-normalize": {"gsam_alpha": 0.4, "gsam_normalize": True},
}


class Network(torch.nn.Module):
    """Its forward pass moves statistics, as batch norm's does, whose own kernel is not the matter here."""

    def __init__(self, dtype):
        super().__init__()
        where = {"device": "cuda", "dtype": dtype}
        layers = [torch.nn.Linear(6, 8, **where), torch.nn.Tanh(), torch.nn.Linear(8, 5, **where)]
        self.layers = torch.nn.Sequential(*layers)
        self.register_buffer("mean", torch.zeros(6, **where))
        self.register_buffer("replaced", torch.zeros(6, **where))

    def forward(self, x):
        self.mean.lerp_(x.mean(0), 0.1)
        self.replaced = 0.9 * self.replaced + x.mean(0)
        return self.layers(x)


def make_step(model, optimizer, objective, x, y):
    """Return a function that makes both passes and the step, with gradients of its own making."""

    def closure():
        optimizer.zero_grad()
        loss = objective(model(x), y) if optimizer.ascending else torch.nn.functional.cross_entropy(model(x), y)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return loss

    return lambda: optimizer.step(closure)


def on_fake_cuda(dtype, variant, objective, base=torch.optim.SGD, **options):
    """A model, and a function that makes one step on it; None for the objective is the optimizer's momentum."""
    model = Network(dtype)
    groups = [{"params": model.layers[0].parameters()}, {"params": model.layers[2].parameters(), "rho": 0.2}]
    optimizer = SAM(base(groups, lr=0.1, **options), model, rho=0.5, **variant)
    x, y = torch.randn(12, 6, device="cuda", dtype=dtype), torch.zeros(12, dtype=torch.long, device="cuda")
    objective = objective or (lambda z, y: momentum_perturbation(optimizer))
    return model, make_step(model, optimizer, objective, x, y)


def assert_on_cuda(model, dtype):
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == "cuda" and tensor.dtype == dtype


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("objective", [torch.nn.functional.cross_entropy, OutputBiasForgetting()], ids=["loss", "obf"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_reads_no_value_on_the_host(variant, objective, dtype):
    with FakeTensorMode():
        model, step = on_fake_cuda(dtype, VARIANTS[variant], objective)
        step()
        step()
        assert_on_cuda(model, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("base, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})])
def test_a_step_with_momentums_perturbation_reads_no_value_on_the_host(base, options, dtype):
    with FakeTensorMode():
        model, step = on_fake_cuda(dtype, {}, None, base, **options)
        step()  # without momentum yet
        step()
        assert_on_cuda(model, dtype)


def test_a_read_by_the_host_shows_here():
    """Else the tests above could not fail."""
    with FakeTensorMode():
        _, step = on_fake_cuda(torch.float32, {}, lambda z, y: z.sum() if z.isfinite().all() else z.max())
        with pytest.raises(DataDependentOutputException):
            step()
