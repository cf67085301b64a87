"""A GPU's behaviour without one: fake tensors on "cuda" fail at every read of a value by the host.

The autograd engine needs a device, so the closure of ``step()`` sets the gradients by hand.
"""

import contextlib
from argparse import Namespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from common import build, loaders, loop, monitor, settings
from common.run import Progress
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
    """Its forward pass moves statistics, as batch norm's does."""

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
        loss = (
            objective(model(x), y)
            if optimizer.ascending
            else torch.nn.functional.cross_entropy(model(x), y)
        )
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        return loss

    return lambda: optimizer.step(closure)


def on_fake_cuda(dtype, variant, objective, base=torch.optim.SGD, **options):
    """A model, and a function that makes one step on it.

    None for the objective is the optimizer's momentum.
    """
    model = Network(dtype)
    groups = [
        {"params": model.layers[0].parameters()},
        {"params": model.layers[2].parameters(), "rho": 0.2},
    ]
    optimizer = SAM(base(groups, lr=0.1, **options), model, rho=0.5, **variant)
    x, y = (
        torch.randn(12, 6, device="cuda", dtype=dtype),
        torch.zeros(12, dtype=torch.long, device="cuda"),
    )
    objective = objective or (lambda z, y: momentum_perturbation(optimizer))
    return model, make_step(model, optimizer, objective, x, y)


def assert_on_cuda(model, dtype):
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.device.type == "cuda" and tensor.dtype == dtype


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "objective", [torch.nn.functional.cross_entropy, OutputBiasForgetting()], ids=["loss", "obf"]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_reads_no_value_on_the_host(variant, objective, dtype):
    with FakeTensorMode():
        model, step = on_fake_cuda(dtype, VARIANTS[variant], objective)
        step()
        step()
        assert_on_cuda(model, dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "base, options", [(torch.optim.SGD, {"momentum": 0.9}), (torch.optim.AdamW, {})]
)
def test_a_step_with_momentums_perturbation_reads_no_value_on_the_host(base, options, dtype):
    with FakeTensorMode():
        model, step = on_fake_cuda(dtype, {}, None, base, **options)
        step()  # without momentum yet
        step()
        assert_on_cuda(model, dtype)


class Prepared:
    """What Accelerate makes of an optimizer, as far as an update needs it."""

    step_was_skipped = False

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.step, self.zero_grad = optimizer.step, optimizer.zero_grad


def whole_update(flags, monkeypatch, to_input=None):
    """Two updates of the loop, and what watches them, but for the engine's backward passes."""

    def backward(loss):
        for p in model.parameters():
            p.grad = torch.randn_like(p) + (0 if p.grad is None else p.grad)

    usual = "--clip-grad 1 --shrink-perturb 0.1 --rho-min 0.01 --output nowhere".split()
    args = settings.parse(settings.parser("", ""), [*flags, *usual])
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 5, device="cuda"))
    criterion = build.build_criterion(args)
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    alone = {"no_sync": lambda _: contextlib.nullcontext(), "backward": backward, "scaler": None}
    clip = torch.nn.utils.clip_grad_norm_
    device = torch.device("cuda")
    accelerator = Namespace(
        **alone, is_fsdp2=False, num_processes=1, device=device, clip_grad_norm_=clip
    )
    config = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.1)}
    to_input = to_input or loaders.to_input(config, torch.float32)
    batches = Namespace(to_input=to_input, m=4, accumulation=2, updates=10)
    schedule = build.build_schedule(args, optimizer, batches.updates)
    job = build.Job(
        args, accelerator, model, None, criterion, objective, Prepared(optimizer),
        schedule=schedule, batches=batches,
    )  # fmt: skip
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8, device="cuda")
    labels = torch.zeros(8, dtype=torch.long, device="cuda")
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    job.args.checkpoint_interval = None
    progress = Progress()
    watch = monitor.Monitor(job, progress)
    watch.interval, watch.bar = 100, Namespace(update=lambda: None)
    for i in range(2):
        schedule(i)
        loss = loop.update(job, iter([{"image": images, "label": labels}] * 2))
        watch.after_update(loss)
    assert all(p.device.type == "cuda" for p in model.parameters())


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "obf", "--perturb-fraction", "0.5"],
        ["--method", "asam", "--opt", "adamw"],
        ["--method", "gsam", "--loss", "bce"],
        ["--method", "random"],
        ["--method", "momentum"],
    ],
    ids=lambda flags: flags[1],
)
def test_an_update_of_the_training_loop_reads_no_value_on_the_host(flags, monkeypatch):
    with FakeTensorMode():
        whole_update(flags, monkeypatch)


def test_a_read_in_an_update_shows_here(monkeypatch):
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        whole_update(
            ["--method", "obf"], monkeypatch, lambda x: x.float() if x.any() else x.float() + 1
        )


def test_a_read_by_the_host_shows_here():
    """Else the tests above could not fail."""
    with FakeTensorMode():
        _, step = on_fake_cuda(
            torch.float32, {}, lambda z, y: z.sum() if z.isfinite().all() else z.max()
        )
        with pytest.raises(DataDependentOutputException):
            step()
