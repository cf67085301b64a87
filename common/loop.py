"""How SAM is driven: an epoch, an update of it, and both passes over a micro-batch."""

import contextlib
from collections.abc import Callable

import torch

from common.build import Job, ascending


def train_epoch(job: Job, progress, after_update: Callable) -> None:
    """Make the updates that are left of an epoch.

    ``progress`` says how far the run has come, and is kept up to date. ``after_update`` gets each
    update's loss; it may end the program.
    """
    if progress.epoch_updates == job.batches.updates:  # resumed between training and evaluation
        return
    job.train_mode(progress.epoch)
    job.loss_sum.fill_(progress.loss)
    job.right.fill_(progress.right / job.accelerator.num_processes)
    loaded = progress.epoch_updates * job.batches.accumulation
    batches = job.batches.train(progress.epoch, loaded)
    while progress.epoch_updates < job.batches.updates:
        job.schedule(progress.updates - progress.skipped)
        perturb = progress.updates % (job.args.perturb_interval or 1) == 0
        loss = update(job, batches, perturb)
        job.loss_sum += loss
        progress.epoch_updates += 1
        progress.updates += 1
        progress.skipped += job.optimizer.step_was_skipped
        if job.ema and not job.optimizer.step_was_skipped:
            job.ema.update(job.model, step=progress.updates - progress.skipped)
        after_update(loss)
    next(batches, None)  # lets the loader know of the end


def update(job: Job, batches, perturb: bool = True) -> torch.Tensor:
    """Update the weights once, from the next ``accumulation`` loader batches.

    Without ``perturb`` it is the base optimizer's update.

    Returns:
        The batches' mean loss in this process.
    """
    total, objective = 0.0, job.objective if perturb else None
    for i in range(job.batches.accumulation):
        last = i == job.batches.accumulation - 1
        loss = forward_backward(job, next(batches), objective, sync=last)
        total += loss / job.batches.accumulation
    if job.args.clip_grad:
        job.accelerator.clip_grad_norm_(job.model.parameters(), job.args.clip_grad)
    job.optimizer.step()
    job.optimizer.zero_grad()
    if job.initial and not job.optimizer.step_was_skipped:  # fp16 skips a step that overflowed
        share = job.args.shrink_perturb * job.rates()["lr"] / job.args.lr
        with torch.no_grad():
            torch._foreach_lerp_(list(job.model.parameters()), job.initial, share)
    return total


def forward_backward(job: Job, batch: dict, objective: Callable | None, sync: bool) -> torch.Tensor:
    """Add the gradient of a loader batch to ``.grad``, micro-batch by micro-batch.

    Args:
        objective: what the ascent pass ascends; None for no perturbation.
        sync: exchange gradients between processes, in the last descent pass.

    Returns:
        The descent passes' mean loss.
    """
    total, m = 0.0, job.batches.m
    micro_batches = list(zip(batch["image"].split(m), batch["label"].split(m)))
    share = 1 / (len(micro_batches) * job.batches.accumulation)
    for i, (images, labels) in enumerate(micro_batches):
        images = job.batches.to_input(images)

        def ascent():
            part = ascending(job.args, len(images))
            return objective(job.model, images[:part], labels[:part])

        perturbed = contextlib.nullcontext()
        if objective is not None:
            options = {"loss_weight": share, "grad_scaler": job.accelerator.scaler}
            perturbed = job.optimizer.optimizer.perturbed(ascent, **options)
        # The ascent pass exchanges no gradients, and of the descent passes only an update's last
        # does. But FSDP2 has none before it has exchanged them.
        exchanges = (sync and i == len(micro_batches) - 1) or job.accelerator.is_fsdp2
        alone = contextlib.nullcontext() if exchanges else job.accelerator.no_sync(job.model)
        with perturbed, alone:
            logits = job.model(images)
            loss = job.criterion(logits, labels)
            job.accelerator.backward(loss * share)
        total += loss.detach() / len(micro_batches)
        if not labels.is_floating_point():  # mixed images have no one right answer
            job.right += (logits.argmax(-1) == labels).sum()
    return total
