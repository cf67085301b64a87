"""What a run would take, from two updates of it."""

import itertools
import resource
import time

import torch

from common import loop
from common.build import Job


def dry_run(job: Job) -> None:
    """Make two updates and evaluate a batch; print what a run would take, and write nothing."""
    args, accelerator = job.args, job.accelerator
    job.model.train()
    job.schedule(0)
    batches = itertools.chain.from_iterable(job.batches.train(epoch, 0) for epoch in range(2))
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        loss = loop.update(job, batches).item()
        seconds = time.monotonic() - start
    job.model.eval()
    for loader in job.batches.evaluation.values():
        with torch.no_grad():
            job.model(job.batches.to_input(next(iter(loader))["image"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    weights = sum(p.numel() for p in job.model.parameters()) / 1e6
    updates, processes = job.batches.updates, accelerator.num_processes
    accumulation = count(job.batches.accumulation, "loader batch", "loader batches")
    accelerator.print(
        f"dry run of {args.model} ({weights:.1f} M weights) on {args.dataset}, "
        f"method {args.method}: the loss is {loss:.3f}\n"
        f"{args.batch_size} examples per update: {count(processes, 'process', 'processes')} x "
        f"{accumulation} x micro-batches of {job.batches.m}\n"
        f"{count(args.epochs, 'epoch')} of {count(updates, 'update')} of {duration(seconds)}: "
        f"about {duration(args.epochs * updates * seconds)}, and the evaluations\n"
        f"peak memory of process 0: {peak:.1f} GiB on {accelerator.device}\nnothing was written"
    )


def count(number: int, one: str, many: str = "") -> str:
    """A number of things, in words."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
