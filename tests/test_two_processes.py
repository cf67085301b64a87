"""Two gloo processes: sharded optimizers, DDP's buckets, and steps that are skipped together.

Run by torchrun, it makes the comparisons itself.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from sam_obf import SAM, momentum_perturbation


@pytest.mark.slow
@pytest.mark.parametrize("what", ["zero", "buckets", "overflow"])
def test_two_processes(what):
    launch = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split(), __file__, what]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(
        [sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)
    ).double()


def train(ddp, base, alone=True, **variant):
    optimizer = SAM(base, ddp, rho=0.3, **variant)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    noise = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        x, y = (
            torch.randn(12, 6, generator=noise).double(),
            torch.randint(0, 5, (12,), generator=noise),
        )

        def ascent(x=x, y=y):
            with ddp.no_sync() if alone else contextlib.nullcontext():
                return F.cross_entropy(ddp(x), y)

        with optimizer.perturbed(ascent):
            F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return list(ddp.parameters())


def zero():
    for kind, options in (
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
        (torch.optim.AdamW, {"lr": 0.02}),
    ):
        one, two = DistributedDataParallel(network()), DistributedDataParallel(network())
        sharded = ZeroRedundancyOptimizer(two.parameters(), kind, **options)
        expected = train(one, kind(one.parameters(), **options))
        assert_same(train(two, sharded), expected)
        assert len(sharded.optim.state) < len(expected)
        with pytest.raises(ValueError, match="use FSDP2 or plain DDP"):
            momentum_perturbation(sharded)


def buckets():
    """Gradients that are views of DDP's buckets, which the descent pass fills, change nothing."""
    for alone in (False, True):
        for variant in ({}, {"gsam_alpha": 0.4})[: 1 + alone]:
            results = []
            for view in (False, True):
                ddp = DistributedDataParallel(network(), gradient_as_bucket_view=view)
                results.append(
                    train(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1), alone, **variant)
                )
            # GSAM's dot products sum in another order where memory is aligned otherwise.
            torch.testing.assert_close(*results, rtol=1e-12 if variant else 0, atol=0)


def overflow():
    """The ascent of one process overflows: both skip the step and lower their scale."""
    for view in (False, True):
        ddp = DistributedDataParallel(network().float(), gradient_as_bucket_view=view)
        optimizer = SAM(torch.optim.SGD(ddp.parameters(), lr=0.1), ddp, rho=0.3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
        start, (x, y) = (
            [p.detach().clone() for p in ddp.parameters()],
            (torch.ones(4, 6), torch.arange(4)),
        )
        skipped = []
        for factor in (1e36 if dist.get_rank() == 1 else 1.0, 1.0):

            def ascent(factor=factor):
                with ddp.no_sync():
                    return factor * F.cross_entropy(ddp(x), y)

            with optimizer.perturbed(ascent, grad_scaler=scaler):
                scaler.scale(F.cross_entropy(ddp(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert scaler.get_scale() == 2.0**11
            skipped.append(all(torch.equal(a, b) for a, b in zip(ddp.parameters(), start)))
        assert skipped == [True, False]
        mine = torch.cat([p.detach().flatten() for p in ddp.parameters()])
        other = mine.clone()
        dist.broadcast(other, 0)
        assert torch.equal(mine, other)


def assert_same(a, b):
    assert all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    {"zero": zero, "buckets": buckets, "overflow": overflow}[sys.argv[1]]()
    dist.destroy_process_group()
