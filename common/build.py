"""What a run is built of: accelerator, data, model, loss, perturbation, optimizer, schedule."""

import argparse
import dataclasses
import os
import warnings
from collections.abc import Callable

import torch
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, TorchDynamoPlugin, set_seed
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch.distributed.fsdp import StateDictType

from common import checkpoints, data, loaders
from common.device import announce, use_fast_kernels
from common.errors import InputError, did_you_mean
from common.methods import ASAM, GSAM, METHODS
from sam_obf import SAM, proportional_rho


@dataclasses.dataclass
class Job:
    """What a run works with."""

    args: argparse.Namespace
    accelerator: Accelerator
    model: torch.nn.Module
    timm_config: str  # from checkpoints.timm_config
    criterion: Callable
    objective: Callable | None  # what the perturbation ascends
    optimizer: torch.optim.Optimizer
    schedule: Callable  # from build_schedule
    batches: loaders.Batches
    ema: ModelEmaV3 | None = None  # the average of the model's weights, if asked for
    backbone: tuple = ()  # all modules but the classifier, if that is to train alone at first

    def __post_init__(self):
        # The first weights, for shrink-and-perturb.
        shrinks, params = self.args.shrink_perturb, self.model.parameters()
        self.initial = [p.detach().clone() for p in params] if shrinks else []
        # Of this epoch and process: the sum of the updates' losses, and the number of training
        # examples that the descent pass got right. They stay on the device, unread by the host.
        device = self.accelerator.device
        self.loss_sum, self.right = torch.zeros((), device=device), torch.zeros((), device=device)

    def train_mode(self, epoch: int) -> None:
        """Let the model train, or in the first ``args.freeze`` epochs its classifier alone.

        Meanwhile nothing else moves, batch norm's statistics included.
        """
        frozen = epoch < self.args.freeze
        self.model.train()
        for module in self.backbone:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(not frozen)
            if frozen and isinstance(module, torch.nn.modules.batchnorm._NormBase):
                module.eval()

    def rates(self) -> dict[str, float]:
        """lr and rho, where the method has one, of the classifier: with layer decay the highest."""
        group = max(self.optimizer.param_groups, key=lambda group: group["lr"])
        return {key: group[key] for key in ("lr", "rho") if key in group}


def build_job(args, create_model: Callable) -> Job:
    """Build a run from its settings; ``create_model(args, num_classes)`` is the script's own.

    Raises:
        InputError: settings, data, model and machine do not fit.
    """
    accelerator = build_accelerator(args)
    # Its cache is locked, so one process downloads. A barrier would time out if that takes long.
    shares = (args.streaming, args.validation_share, args.train_share)
    splits = data.load(args.dataset, *shares, data.Names.of(args))
    set_seed(args.seed)
    model = create_model(args, splits["train"].features["label"].num_classes)
    batches = loaders.open_splits(args, accelerator, splits, model)
    check_model(args, model, batches)
    set_head_bias(args, model)
    timm_config = checkpoints.timm_config(model, batches)
    model = model.to(memory_format=batches.memory_format)
    criterion = build_criterion(args)
    optimizer = build_optimizer(args, model)
    backbone = modules_to_freeze(args, accelerator, model)
    objective = build_objective(args, criterion, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    schedule = build_schedule(args, optimizer, batches.updates)
    ema = build_ema(args, accelerator, model)
    parts = (model, timm_config, criterion, objective, optimizer, schedule, batches, ema)
    return Job(args, accelerator, *parts, backbone)


def build_accelerator(args) -> Accelerator:
    """Accelerate as launched, with the run's tracker.

    Raises:
        InputError: the tracker's package is missing, two backends are to compile the model, or FSDP
            would save what only unpickling can load.
    """
    if args.log_with and LoggerType(args.log_with) not in get_available_trackers():
        package = args.log_with.replace("_", "-")
        raise InputError(f"--log-with {args.log_with} needs its package: pip install {package}")
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if args.torchcompile and launched != "no":
        both = f"--torchcompile {args.torchcompile} and Accelerate's --dynamo_backend {launched}"
        raise InputError(f"{both}: drop one")
    # Accelerate knows no other name yet.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    # Each process keeps batch norm statistics of its own; they are averaged before they are used or
    # saved. Exchanged gradients live in the buckets of the exchange, not in a copy.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, gradient_as_bucket_view=True,
        find_unused_parameters=args.freeze > 0,  # those that are frozen
    )  # fmt: skip
    accelerator = Accelerator(
        log_with=args.log_with,
        project_dir=args.output,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        kwargs_handlers=[ddp],
    )
    # All runs of a process share Accelerate's state: given above, the first one's would stay.
    accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend=args.torchcompile)
    use_fast_kernels(accelerator.device)
    fsdp, full = getattr(accelerator.state, "fsdp_plugin", None), StateDictType.FULL_STATE_DICT
    if fsdp is not None and (fsdp.fsdp_version != 2 or fsdp.state_dict_type != full):
        needed = "fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT"
        raise InputError(f"FSDP needs {needed}, as in fsdp2.yaml")
    announce(accelerator)
    return accelerator


def check_model(args, model, batches: loaders.Batches) -> None:
    """Try a forward pass as in training, on black images; the model and its buffers stay the same.

    Raises:
        InputError: the model does not take them, or does not return logits (examples, classes).
    """
    examples, num_classes = min(2, ascending(args, batches.m)), len(batches.label_names)
    input_size = batches.config["input_size"]
    images = torch.zeros(examples, *input_size, dtype=next(model.parameters()).dtype)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            logits = torch.func.functional_call(model, buffers, (images,))
        if logits.shape != (examples, num_classes):
            expected = (examples, num_classes)
            raise ValueError(f"it returns {tuple(logits.shape)}, not logits {expected}")
    except Exception as error:  # each model fails in its own way
        raise InputError(
            f"the model cannot be trained on {examples} at once (m, or its perturb_fraction) of "
            f"images {input_size}: {error}; change model, model_kwargs, img_size or m"
        ) from error


def set_head_bias(args, model) -> None:
    """Set the classifier's biases to ``head_bias``, unless that is None; all logits start near it.

    Raises:
        InputError: the classifier has no biases.
    """
    if args.head_bias is None:
        return
    bias = getattr(model.get_classifier(), "bias", None)
    if bias is None:
        needs = f"head_bias {args.head_bias} needs a classifier with biases"
        raise InputError(f"{needs}: {args.model} has none")
    torch.nn.init.constant_(bias, args.head_bias)


def modules_to_freeze(args, accelerator, model) -> tuple:
    """All modules of a model but its classifier, if that is to train alone at first.

    Raises:
        InputError: the model has no classifier, or with FSDP2, which decides at the start what is
            trained.
    """
    if not args.freeze:
        return ()
    if accelerator.is_fsdp2:
        raise InputError("--freeze does not go with FSDP2, which cannot unfreeze later: drop it")
    classifiers = model.get_classifier()  # several, of some distilled models
    classifiers = classifiers if isinstance(classifiers, (tuple, list)) else [classifiers]
    head = {module for classifier in classifiers for module in classifier.modules()}
    if not any(list(module.parameters(recurse=False)) for module in head):
        raise InputError(f"--freeze {args.freeze} needs a classifier: {args.model} has none")
    return tuple(module for module in model.modules() if module not in head)


def build_criterion(args):
    """The training loss, a function of logits and labels.

    Labels are class indices, which are smoothed here, or probabilities, which timm's Mixup did.
    """
    if args.loss == "bce":
        return BinaryCrossEntropy(args.smoothing, sum_classes=True)
    of_classes, of_soft = LabelSmoothingCrossEntropy(args.smoothing), SoftTargetCrossEntropy()

    def cross_entropy(logits, labels):
        return (of_soft if labels.is_floating_point() else of_classes)(logits, labels)

    return cross_entropy


def ascending(args, examples: int) -> int:
    """How many of a micro-batch's examples the ascent pass sees."""
    return max(1, round((args.perturb_fraction or 1) * examples))


def build_objective(args, criterion, optimizer):
    """What the perturbation ascends, a function of model, inputs and labels; None for method base.

    Raises:
        InputError: method momentum, and the optimizer keeps none.
    """
    ascent, _ = METHODS[args.method]
    return ascent and ascent(args, criterion, optimizer)


def build_optimizer(args, model):
    """timm's optimizer, inside SAM unless the method is base.

    Raises:
        InputError: timm or torch does not take the settings.
    """
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum}
    options["layer_decay"] = args.layer_decay
    ascent, _ = METHODS[args.method]
    variant = {key: value for key in ASAM | GSAM if (value := getattr(args, key)) is not None}
    try:
        base = create_optimizer_v2(model, args.opt, **options | args.opt_kwargs)
        # Else a GradScaler lets a fused one skip its step, and nobody sees it.
        base._step_supports_amp_scaling = False
        return SAM(base, model, args.rho, **variant) if ascent else base
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        message, known = str(error), list_optimizers()
        if args.opt.lower().removeprefix("lookahead_") not in known:
            message = f"timm has no optimizer {args.opt!r}{did_you_mean(args.opt, known)}"
        raise InputError(message) from error


def build_ema(args, accelerator, model) -> ModelEmaV3 | None:
    """timm's average of the weights of a prepared model, if asked for; alike in all processes.

    Raises:
        InputError: with FSDP2, where each process has a part of the weights only.
    """
    if not args.model_ema:
        return None
    if accelerator.is_fsdp2:
        raise InputError("--model-ema does not go with FSDP2, which shards the weights: drop it")
    plain = accelerator.unwrap_model(model, keep_torch_compile=False)
    return ModelEmaV3(plain, decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)


def build_schedule(args, optimizer, updates_per_epoch: int):
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

    def schedule(updates):
        scheduler.step_update(updates)
        if args.rho_min is not None:
            rhos = {"rho_min": args.rho_min, "rho_max": args.rho}
            proportional_rho(optimizer, **rhos, lr_min=args.min_lr, lr_max=args.lr)

    return schedule
