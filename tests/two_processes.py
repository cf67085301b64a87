"""A run of train_imagenet.py on two processes that writes down what each holds.

    two_processes.py OUTPUT FLAGS ...

OUTPUT/RANK.safetensors gets each process's first random numbers; by epoch, the first batch norm's
own statistics at the end of the training images, and those that are evaluated, of the weights and
of their average; how many training images the process got right; and the number of images that
were evaluated.
"""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

import train_imagenet
from common import loop, run

seen = {}


def statistics(job):
    own = {"": job.accelerator.unwrap_model(job.model), " average": job.ema}
    return {
        name: next(
            buffer.clone() for key, buffer in model.named_buffers() if key.endswith("running_var")
        )
        for name, model in own.items()
    }


def train_epoch(job, progress, *others):
    state = torch.get_rng_state()
    seen.setdefault("noise", torch.rand(8))
    torch.set_rng_state(state)
    own_train_epoch(job, progress, *others)
    seen.update({f"own{name} {progress.epoch}": x for name, x in statistics(job).items()})
    seen[f"right {progress.epoch}"] = job.right.clone()


def evaluate_top1(job, *others):
    epoch = sum(key.startswith("own average") for key in seen) - 1
    for name, found in statistics(job).items():
        seen.setdefault(f"evaluated{name} {epoch}", found)
    result = own_evaluate_top1(job, *others)
    seen["examples"] = torch.tensor(result["examples"])
    return result


own_train_epoch, loop.train_epoch = loop.train_epoch, train_epoch
own_evaluate_top1, run.evaluate_top1 = run.evaluate_top1, evaluate_top1
output = Path(sys.argv[1])
train_imagenet.main([*sys.argv[2:], "--output", str(output / "run")])
save_file(seen, output / f"{PartialState().process_index}.safetensors")
PartialState().destroy_process_group()
