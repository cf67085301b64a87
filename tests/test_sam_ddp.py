"""SAM under DistributedDataParallel: two gloo processes give the mean of what each does alone.

torchrun runs it as ``test_sam_ddp.py OUTPUT``; then each process writes OUTPUT/RANK.
"""

import contextlib
import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from brute_force import VARIANTS, K, assert_close, brute_force_gradient, network
from torch.nn.parallel import DistributedDataParallel

from sam_obf import SAM, random_perturbation

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parent
all_reduce = dist.all_reduce
METHODS = ("plain", "asam-both", "gsam", "gsam-normalize")
HOLDS = ("wrapper", "bare model", "compiled")  # by SAM; DDP wraps the compiled model
ACCUMULATE = {  # where no_sync() stands in all micro-batches but the last, and in the closure
    "one micro-batch": (1, None, False),
    "exchanged every time": (3, None, False),
    "no_sync around the block": (3, "around", False),
    "no_sync in the body": (3, "inside", False),
    "no_sync in the closure": (1, None, True),
}


class Branches(torch.nn.Module):
    """Each process uses its own branch, and neither the third."""

    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(6, 8)
        self.branches = torch.nn.ModuleList(torch.nn.Linear(8, K) for _ in range(3))

    def forward(self, x, branch):
        return self.branches[branch](torch.tanh(self.trunk(x)))


def micro_batches(rank, number):
    generator = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(number, 8, 6, dtype=torch.float64, generator=generator)
    return list(zip(x, torch.randint(0, K, (number, 8), generator=generator)))


def new(kind=network, **options):
    torch.manual_seed(0)
    model = kind().double()
    ddp = DistributedDataParallel(model, **options)
    exchanges = []

    def hook(_, bucket):
        exchanges.append("in backward")
        mean = bucket.buffer().div_(dist.get_world_size())
        return all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])

    ddp.register_comm_hook(None, hook)
    return model, ddp, exchanges


@contextlib.contextmanager
def counted(exchanges):
    """Collectives that are called, beside those of the wrapper."""

    def counting(*args, **kwargs):
        exchanges.append("called")
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counting
    try:
        yield
    finally:
        dist.all_reduce = all_reduce


def gradients(rank, method, holds, accumulate):
    """The gradients after one step's micro-batches, and what was exchanged meanwhile."""
    number, where, in_closure = ACCUMULATE[accumulate]
    model, ddp, exchanges = new()
    if holds == "compiled":
        model.compile(backend="aot_eager")
    held = ddp if holds == "wrapper" else model
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), held, 0.3, **VARIANTS[method])
    for i, (x, y) in enumerate(micro_batches(rank, number)):
        quiet = where if i < number - 1 else None

        def closure(x=x, y=y):
            with ddp.no_sync() if in_closure else contextlib.nullcontext():
                return F.cross_entropy(ddp(x), y)

        with contextlib.ExitStack() as stack:
            stack.enter_context(counted(exchanges))
            if quiet == "around":
                stack.enter_context(ddp.no_sync())
            stack.enter_context(optimizer.perturbed(closure, loss_weight=1 / number))
            if quiet == "inside":
                stack.enter_context(ddp.no_sync())
            (F.cross_entropy(ddp(x), y) / number).backward()
        assert ddp.require_backward_grad_sync
    return [p.grad.clone() for p in model.parameters()], exchanges


def branches(rank, method):
    model, ddp, _ = new(Branches, find_unused_parameters=True)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, **VARIANTS[method])
    ((x, y),) = micro_batches(rank, 1)
    with optimizer.perturbed(lambda: F.cross_entropy(ddp(x, rank), y)):
        F.cross_entropy(ddp(x, rank), y).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def without_a_forward_pass(rank):
    """GSAM of a direction that each process draws: the wrapper is called in the body alone."""
    model, ddp, exchanges = new()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model, 0.3, gsam_alpha=0.4)
    ((x, y),) = micro_batches(rank, 1)
    torch.manual_seed(rank)
    with counted(exchanges), optimizer.perturbed(lambda: random_perturbation(model.parameters())):
        F.cross_entropy(ddp(x), y).backward()
    return [p.grad for p in model.parameters()]


def refusal():
    model, ddp, _ = new(static_graph=True)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), model)
    ((x, y),) = micro_batches(0, 1)
    try:
        with optimizer.perturbed(lambda: F.cross_entropy(ddp(x), y)):
            return "the body ran"
    except RuntimeError as error:
        return str(error)


def main(output):
    dist.init_process_group("gloo")
    rank, found = dist.get_rank(), {}
    for method in METHODS:
        for holds in HOLDS:
            for accumulate in ACCUMULATE:
                found[method, holds, accumulate] = gradients(rank, method, holds, accumulate)
        found[method, "branches"] = branches(rank, method)
    found["random"] = without_a_forward_pass(rank)
    found["static_graph"] = refusal()
    torch.save(found, output / str(rank))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, *launch, __file__, str(folder)]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=300)
    done = run(command, env=environment)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / str(rank), weights_only=True) for rank in (0, 1)]


def alone(rank, method, number):
    """The mean of what one process does with each of its micro-batches."""
    torch.manual_seed(0)
    model, total = network(), None
    for x, y in micro_batches(rank, number):
        loss = F.cross_entropy
        part, _ = brute_force_gradient(model, x, y, loss, [0.3] * 4, **VARIANTS[method])
        total = part if total is None else [a + b for a, b in zip(total, part)]
    return [t / number for t in total]


@pytest.mark.parametrize("accumulate", ACCUMULATE)
@pytest.mark.parametrize("holds", HOLDS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_the_mean_of_what_each_process_does_alone(found, method, holds, accumulate):
    number = ACCUMULATE[accumulate][0]
    expected = [(a + b) / 2 for a, b in zip(*(alone(rank, method, number) for rank in (0, 1)))]
    (first, exchanges), (second, _) = (results[method, holds, accumulate] for results in found)
    assert_close(first, expected)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    kind = "called" if method.startswith("gsam") else "in backward"
    assert exchanges == [kind] * (number if accumulate == "exchanged every time" else 1)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_one_process_uses_get_its_share_and_unused_ones_none(found, method):
    first, second = (results[method, "branches"] for results in found)
    expected = []
    for rank in (0, 1):
        torch.manual_seed(0)
        model = Branches().double()
        used = [*model.trunk.parameters(), *model.branches[rank].parameters()]

        class Used(torch.nn.Module):
            parameters = staticmethod(lambda used=used: iter(used))
            forward = staticmethod(lambda x, model=model, rank=rank: model(x, rank))

        ((x, y),) = micro_batches(rank, 1)
        loss = F.cross_entropy
        part, _ = brute_force_gradient(Used(), x, y, loss, [0.3] * 4, **VARIANTS[method])
        expected.append(part)
    assert_close(
        [first["trunk.weight"], first["trunk.bias"]],
        [(a + b) / 2 for a, b in zip(expected[0][:2], expected[1][:2])],
    )
    for rank in (0, 1):
        names = f"branches.{rank}.weight", f"branches.{rank}.bias"
        assert_close([first[name] for name in names], [g / 2 for g in expected[rank][2:]])
    for name, grad in first.items():
        assert (grad is None) is name.startswith("branches.2")
        assert grad is None or torch.equal(grad, second[name])


def test_gsam_with_a_random_direction_leaves_all_processes_the_same_gradient(found):
    assert_close(found[0]["random"], found[1]["random"], 0)


def test_a_static_graph_is_refused(found):
    assert "static_graph=True) expects one pass a step" in found[0]["static_graph"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
