"""Ten updates of a small float64 model by several methods, on however many processes.

    updates.py OUTPUT

test_distributed.py runs it. Process 0 writes the weights, and the number of collectives of one more
update, into OUTPUT/ddp and OUTPUT/fsdp2, safetensors files. The optimizer is SGD, since AdamW's
update is the same for a sum as for a mean. Each of two processes has two micro-batches in a loader
batch; ``interleaved`` gives one process, in a micro-batch, what two have at once.
"""

import gc
import sys
from argparse import Namespace
from pathlib import Path

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.profiler import profile

from common import build, loop, settings

LOADED, STEPS = 8, 10  # examples that all processes load at once; updates
CLIP = 0.5  # shortens most gradients
MICRO_BATCH = 2  # examples
METHODS = ("base", "sam", "obf", "asam", "gsam")


def run(accelerator, m, method, accumulation, interleaved):
    flags = ["--method", method, *"--lr 0.2 --opt sgd --momentum 0.5 --output nowhere".split()]
    args = settings.parse(
        settings.parser("", ""), [*flags, *([] if method == "base" else ["--rho", "0.1"])]
    )
    torch.manual_seed(0)
    layers = [torch.nn.Unflatten(1, (2, 3, 1)), torch.nn.Conv2d(2, 4, (2, 1)), torch.nn.Flatten()]
    layers += [
        torch.nn.Linear(8, 33), torch.nn.Tanh(), torch.nn.LayerNorm(33), torch.nn.Linear(33, 5),
    ]  # fmt: skip
    model = torch.nn.Sequential(*layers).double()
    model = model.to(
        memory_format=torch.contiguous_format if accelerator.is_fsdp2 else torch.channels_last
    )
    examples = (STEPS + 1) * accumulation * LOADED
    images, labels = torch.randn(examples, 6).double(), torch.randint(0, 5, (examples,))
    if interleaved:
        order = torch.arange(examples).view(-1, 2, 2, LOADED // 4).transpose(1, 2).flatten()
        images, labels = images[order], labels[order]
    criterion = build.build_criterion(args)
    optimizer = build.build_optimizer(args, model)
    objective = build.build_objective(args, criterion, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    share = LOADED // accelerator.num_processes
    batches = (
        {"image": images[start : start + share], "label": labels[start : start + share]}
        for start in range(accelerator.process_index * share, examples, LOADED)
    )
    args = Namespace(clip_grad=CLIP, perturb_fraction=1.0, shrink_perturb=None)
    split = Namespace(to_input=lambda images: images, m=m, accumulation=accumulation)
    job = build.Job(
        args, accelerator, model, None, criterion, objective, optimizer, schedule=None,
        batches=split,
    )  # fmt: skip
    for _ in range(STEPS):
        loop.update(job, batches)
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    weights = {
        name: value.clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    sharded = sum(p.numel() for p in model.parameters()) > sum(
        (p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters()
    )
    with profile() as profiler:
        loop.update(job, batches)
    calls = sum(
        event.name().startswith("c10d::") for event in profiler.profiler.kineto_results.events()
    )
    accelerator.free_memory()
    views = getattr(model, "gradient_as_bucket_view", False)
    found = {"collectives": calls, "sharded": sharded, "views": views}
    return weights | {key: torch.tensor(value) for key, value in found.items()}


def every_method(accelerator, m, interleaved=False):
    gc.freeze()  # what is imported is no garbage, and Accelerate looks for some after each method
    tensors = {}
    for method in METHODS:
        for accumulation in (1, 2):
            result = run(accelerator, m, method, accumulation, interleaved)
            tensors |= {f"{method} {accumulation} {name}": value for name, value in result.items()}
    return tensors


if __name__ == "__main__":
    output = Path(sys.argv[1])
    accelerator = build.build_accelerator(
        Namespace(log_with=None, output=None, torchcompile=None, freeze=0)
    )
    ddp = every_method(accelerator, MICRO_BATCH)
    # The launcher's setting works on GPUs only.
    shard_everything = {
        "auto_wrap_policy": "size_based_wrap",
        "min_num_params": 100,
        "fsdp_version": 2,
    }
    plugin = FullyShardedDataParallelPlugin(state_dict_type="FULL_STATE_DICT", **shard_everything)
    PartialState().distributed_type = accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    fsdp2 = every_method(accelerator, MICRO_BATCH)
    if accelerator.is_main_process:
        save_file(ddp, output / "ddp")
        save_file(fsdp2, output / "fsdp2")
