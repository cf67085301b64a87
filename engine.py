"""One update of the weights, and one evaluation, on however many processes."""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable

import datasets
import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import distribute_bn
from torch.nn.utils import parameters_to_vector, vector_to_parameters


class Top1(evaluate.Metric):
    """Top-1 accuracy: the share of ``predictions`` (class indices) equal to ``references``, and their number."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of examples whose most likely class is the true one.",
            citation="",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        return {"top1": float(np.mean(np.equal(predictions, references))), "examples": len(references)}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a run works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    objective: Callable | None  # what the perturbation ascends
    criterion: Callable
    to_input: Callable  # from a batch's images to the model's input
    m: int  # examples of a micro-batch
    accumulation: int  # loader batches of an update
    batches: Callable  # builders.train_batches
    steps: int  # updates of an epoch
    schedule: Callable  # builders.build_schedule
    initial: list  # the first weights, for shrink-and-perturb


def evaluate_top1(job: Job, loader) -> dict:
    """Top-1 accuracy, in [0, 1], and number of examples of a prepared loader; every process returns them."""
    metric = Top1(keep_in_memory=True)
    job.model.eval()
    for batch in loader:
        with torch.no_grad():
            predictions = job.model(job.to_input(batch["image"])).argmax(-1)
        predictions, references = job.accelerator.gather_for_metrics((predictions, batch["label"]))
        metric.add_batch(predictions=predictions.cpu(), references=references.cpu())
    return metric.compute()


def _alone(job):
    """No exchange of gradients; but FSDP2 has no gradients before it has exchanged them."""
    return contextlib.nullcontext() if job.accelerator.is_fsdp2 else job.accelerator.no_sync(job.model)


def forward_backward(job: Job, batch: dict, sync: bool) -> torch.Tensor:
    """Leave the gradient of a loader batch in ``.grad``, micro-batch by micro-batch; return its loss (descent pass).

    Processes exchange gradients in the last descent pass, and only if ``sync``.
    """
    total = 0.0
    micro_batches = list(zip(batch["image"].split(job.m), batch["label"].split(job.m)))
    share = 1 / (len(micro_batches) * job.accumulation)
    for i, (images, labels) in enumerate(micro_batches):
        images = job.to_input(images)

        def ascent():
            part = max(1, round(job.args.perturb_fraction * len(images)))
            with _alone(job):
                return job.objective(job.model(images[:part]), labels[:part])

        perturbed = contextlib.nullcontext()
        if job.objective is not None:
            scaler = job.accelerator.scaler
            perturbed = job.optimizer.optimizer.perturbed(ascent, loss_weight=share, grad_scaler=scaler)
        # DDP exchanges gradients where the forward pass says so: hence the order of the two contexts.
        exchange = sync and i == len(micro_batches) - 1
        with perturbed, contextlib.nullcontext() if exchange else _alone(job):
            loss = job.criterion(job.model(images), labels)
            job.accelerator.backward(loss * share)
        total += loss.detach() / len(micro_batches)
    return total


def update(job: Job, batches) -> torch.Tensor:
    """Make one update from the next ``accumulation`` loader batches; return their mean loss in this process."""
    total = 0.0
    # GSAM replaces each micro-batch's gradient after its backward pass, too late for DDP's own exchange.
    late = getattr(job.optimizer.optimizer, "gsam_alpha", 0) > 0 and not job.accelerator.is_fsdp2
    for i in range(job.accumulation):
        last = i == job.accumulation - 1
        total += forward_backward(job, next(batches), sync=last and not late) / job.accumulation
    if late and job.accelerator.num_processes > 1:
        grads = [p.grad for p in job.model.parameters() if p.grad is not None]
        vector_to_parameters(job.accelerator.reduce(parameters_to_vector(grads), "mean"), grads)
    if job.args.clip_grad:
        job.accelerator.clip_grad_norm_(job.model.parameters(), job.args.clip_grad)
    job.optimizer.step()
    job.optimizer.zero_grad()
    if job.initial and not job.optimizer.step_was_skipped:
        factor = job.args.shrink_perturb * job.optimizer.param_groups[0]["lr"] / job.args.lr
        with torch.no_grad():
            torch._foreach_lerp_(list(job.model.parameters()), job.initial, factor)
    return total


def average_batch_norm(job):
    """Average over processes the statistics that each has of its own."""
    if job.accelerator.num_processes > 1:
        distribute_bn(job.accelerator.unwrap_model(job.model), job.accelerator.num_processes, reduce=True)
