"""Settings made into objects: the accelerator, loss, optimizer, schedule and loaders of a run."""

import signal
import sys
import warnings

import datasets
import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, send_to_device
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch.distributed.fsdp import StateDictType

import data
from data import InputError
from sam_obf import SAM, OutputBiasForgetting, proportional_rho, random_perturbation
from settings import METHODS

IMAGES_PER_WORKER = 1000  # to evaluate: reading fewer takes less time than starting a worker


def build_accelerator(args) -> Accelerator:
    """Accelerate as launched, with the run's tracker.

    Raises:
        InputError: the tracker's package is missing, or FSDP would save what only unpickling can load.
    """
    if args.log_with and LoggerType(args.log_with) not in get_available_trackers():
        raise InputError(f"--log-with {args.log_with} needs its package: pip install {args.log_with.replace('_', '-')}")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate knows no other name yet
    accelerator = Accelerator(
        log_with=args.log_with,
        project_dir=args.output,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        # Each process keeps batch norm statistics of its own, which are averaged before they are used or saved.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT):
        raise InputError("FSDP needs fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT, as in fsdp2.yaml")
    return accelerator


def split_batch(args, processes: int) -> tuple[int, int, int]:
    """Divide ``batch_size``: examples per loader batch, loader batches per update, examples per micro-batch.

    Raises:
        InputError: m does not divide the batch, or it does not split over the processes; with what would.
    """
    unit = args.m or 1
    if args.batch_size % unit:
        raise InputError(f"m {unit} does not divide batch_size {args.batch_size}: {_divisors(args.batch_size)}")
    if args.batch_size // unit % processes:
        raise InputError(
            f"batch_size {args.batch_size} in micro-batches of {unit} does not split over {processes} processes: "
            f"{_divisors(args.batch_size // unit)} processes"
        )
    share = args.batch_size // processes
    loaded = max(n for n in range(unit, max(args.device_batch_size, unit) + 1, unit) if share % n == 0)
    return loaded, share // loaded, args.m or loaded


def check_model(model, input_size, examples: int, num_classes: int) -> None:
    """Try a forward pass as in training, on black images; the model and its batch norm stay as they are.

    Raises:
        InputError: the model does not take them, or does not return logits (examples, num_classes).
    """
    images = torch.zeros(examples, *input_size, dtype=next(model.parameters()).dtype)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            logits = torch.func.functional_call(model, buffers, (images,))
        if logits.shape != (examples, num_classes):
            raise ValueError(f"it returns {tuple(logits.shape)}, not logits {examples, num_classes}")
    except Exception as error:  # each model fails in its own way
        raise InputError(
            f"the model cannot be trained on {examples} at once (m, or its perturb_fraction) of images {input_size}: "
            f"{error}; change model, model_kwargs, img_size or m"
        ) from error


def _divisors(number):
    return "choose one of " + ", ".join(str(i) for i in range(1, number + 1) if number % i == 0)


def build_criterion(args):
    """The training loss, a function of logits and labels."""
    if args.loss == "bce":
        return BinaryCrossEntropy(args.smoothing, sum_classes=True)
    return LabelSmoothingCrossEntropy(args.smoothing)


def build_objective(args, model, criterion):
    """The scalar that the method's perturbation ascends, a function of logits and labels; None for method base."""
    ascent, _ = METHODS[args.method]
    if ascent == "obf":
        return OutputBiasForgetting(args.gamma, args.lam, args.link)
    if ascent == "noise":
        return lambda logits, labels: random_perturbation(model.parameters())
    return criterion if ascent == "loss" else None


def build_optimizer(args, model):
    """timm's optimizer, inside SAM unless the method is base."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum} | args.opt_kwargs
    base = create_optimizer_v2(model, args.opt, **options)
    _, variant = METHODS[args.method]
    if variant == "asam":
        return SAM(base, model, args.rho, adaptive=args.adaptive)
    if variant == "gsam":
        return SAM(base, model, args.rho, gsam_alpha=args.gsam_alpha, gsam_normalize=args.gsam_normalize)
    return SAM(base, model, args.rho) if variant == "sam" else base


def build_schedule(args, optimizer, updates_per_epoch):
    """A function of the number of updates made, which sets lr and, if it follows lr, rho."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs - args.warmup_epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_prefix=True,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        decay_rate=1.0,  # the power of poly
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )

    def schedule(update):
        scheduler.step_update(update)
        if args.rho_min is not None:
            limits = {"rho_min": args.rho_min, "rho_max": args.rho, "lr_min": args.min_lr, "lr_max": args.lr}
            proportional_rho(optimizer, **limits)

    return schedule


def worker_options(accelerator, workers: int) -> dict:
    """How a ``DataLoader`` of this project runs its workers."""
    # Before 3.12, CPython's child can deadlock if it forks while a thread of torch.distributed enters or leaves Python.
    risky = workers > 0 and accelerator.num_processes > 1 and sys.version_info < (3, 12)
    return {
        "num_workers": workers,
        "pin_memory": accelerator.device.type == "cuda",
        "multiprocessing_context": "spawn" if risky else None,
        "worker_init_fn": _outlive_sigterm,
    }


def _loader(args, accelerator, dataset, workers=None, **options):
    # A generator of its own: a loader's start would otherwise draw from the stream that a resumed run continues.
    options |= worker_options(accelerator, args.workers if workers is None else workers)
    return torch.utils.data.DataLoader(dataset, generator=torch.Generator(), **options)


def _outlive_sigterm(_):
    """A scheduler's SIGTERM reaches loader workers too, and the main process needs them for a minute at most."""
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))


def train_batches(args, accelerator, split, transform, loaded):
    """The number of training images, and a function: the batches of an epoch after the ``first`` of this process."""
    if isinstance(split, datasets.IterableDataset):
        known = (split.info.splits or {}).get("train")
        size = args.train_num_samples or (known and known.num_examples)
        if not size:
            raise InputError(f"{args.dataset!r} does not say how many images it streams: give --train-num-samples")
        return size, _streamed_batches(args, accelerator, split, transform, loaded)
    images = data.Images(split, transform, args.seed)
    options = {"sampler": data.EpochSampler(len(images), args.batch_size, args.seed), "drop_last": True}
    options["persistent_workers"] = args.workers > 0
    loader = accelerator.prepare(_loader(args, accelerator, images, batch_size=loaded, **options))

    def batches(epoch, first):
        loader.set_epoch(epoch)
        return iter(accelerator.skip_first_batches(loader, first) if first else loader)

    return len(images), batches


def _streamed_batches(args, accelerator, split, transform, loaded):
    rank = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    stream = data.Stream(split, transform, loaded, training=True, seed=args.seed, **rank)
    workers = min(args.workers, max(1, split.num_shards // accelerator.num_processes))  # a shard for each, if possible
    loader = _loader(args, accelerator, stream, min(args.workers, workers), batch_size=None)

    def batches(epoch, first):
        stream.epoch, stream.first = epoch, first
        return (send_to_device(batch, accelerator.device, non_blocking=True) for batch in loader)

    return batches


def evaluation_loader(args, accelerator, split, transform, loaded, persistent=False):
    """The prepared loader of a split in order; the main process alone reads a stream."""
    if isinstance(split, datasets.IterableDataset):
        stream = data.Stream(split, transform, loaded)
        return accelerator.prepare(_loader(args, accelerator, stream, min(args.workers, 1), batch_size=None))
    workers = min(args.workers, len(split) // IMAGES_PER_WORKER)
    options = {"batch_size": loaded, "persistent_workers": persistent and workers > 0}
    return accelerator.prepare(_loader(args, accelerator, data.Images(split, transform), workers, **options))
