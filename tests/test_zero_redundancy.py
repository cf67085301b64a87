"""ZeroRedundancyOptimizer on two gloo processes: the weights of plain DDP. Run by torchrun, it compares them itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.optim import ZeroRedundancyOptimizer

from sam_obf import SAM, momentum_perturbation


def test_zero_redundancy_optimizer_equals_plain_ddp():
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, *launch], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def train(sharded, kind, options, adaptive):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5)).double()
    ddp = torch.nn.parallel.DistributedDataParallel(model)
    base = (
        ZeroRedundancyOptimizer(model.parameters(), kind, **options) if sharded else kind(ddp.parameters(), **options)
    )
    optimizer = SAM(base, ddp, rho=0.3, adaptive=adaptive)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
    noise = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(5):
        x, y = torch.randn(12, 6, generator=noise).double(), torch.randint(0, 5, (12,), generator=noise)

        def ascent(x=x, y=y):
            with ddp.no_sync():
                return F.cross_entropy(ddp(x), y)

        with optimizer.perturbed(ascent):
            F.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    if sharded:
        with pytest.raises(ValueError, match="use FSDP2 or plain DDP"):
            momentum_perturbation(base)
        states = sum(len(base.optim.state[p]) > 0 for p in base.optim.state)
        assert states < len(list(model.parameters()))
    return list(model.parameters())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for kind, options in ((torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 0.02})):
        for adaptive in (None, "both"):
            pair = (train(sharded, kind, options, adaptive) for sharded in (False, True))
            assert all(torch.equal(a, b) for a, b in zip(*pair, strict=True))
    dist.destroy_process_group()
