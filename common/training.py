"""Training: what a run is built of, one update, one epoch, and the whole run."""

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator, DataLoaderConfiguration, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, set_seed
from safetensors.torch import load_file
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import StateDictType
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

from common import checkpoints, report
from common.loaders import Batches
from common.metrics import Top1
from common.settings import METHODS, InputError, did_you_mean, resolved, shared_on_resume, use_fast_kernels
from sam_obf import SAM, OutputBiasForgetting, momentum_perturbation, proportional_rho, random_perturbation

PATIENCE = 20  # updates in a row without a finite loss, after which a run gives up


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
    batches: Batches

    def __post_init__(self):
        # the first weights, for shrink-and-perturb
        self.initial = [p.detach().clone() for p in self.model.parameters()] if self.args.shrink_perturb else []
        # this epoch's training examples of this process that the descent pass got right, counted without a host read
        self.right = torch.zeros((), device=self.accelerator.device)


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    epoch: int = 0
    step: int = 0  # updates of this epoch, including those skipped because fp16 gradients overflowed
    steps: int = 0  # the same, of all epochs
    updates: int = 0  # of all epochs, without those skipped: what the schedule follows
    loss: float = 0.0  # sum over this epoch's steps, in the main process
    right: float = 0.0  # this epoch's examples, of all processes, whose most likely class was the true one
    seconds: float = 0.0  # that this epoch's steps took
    best: float = -1.0


def build_accelerator(args) -> Accelerator:
    """Accelerate as launched, with the run's tracker.

    Raises:
        InputError: the tracker's package is missing, two backends are to compile the model, or FSDP would save what
            only unpickling can load.
    """
    if args.log_with and LoggerType(args.log_with) not in get_available_trackers():
        raise InputError(f"--log-with {args.log_with} needs its package: pip install {args.log_with.replace('_', '-')}")
    launched = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if args.torchcompile and launched != "no":
        raise InputError(f"--torchcompile {args.torchcompile} and Accelerate's --dynamo_backend {launched}: drop one")
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")  # Accelerate knows no other name yet
    accelerator = Accelerator(
        log_with=args.log_with,
        project_dir=args.output,
        dataloader_config=DataLoaderConfiguration(non_blocking=True),
        dynamo_backend=args.torchcompile,
        # Each process keeps batch norm statistics of its own, which are averaged before they are used or saved.
        # Once exchanged, gradients live in the buckets in which they were, not in a copy.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    use_fast_kernels(accelerator.device)
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and (plugin.fsdp_version != 2 or plugin.state_dict_type != StateDictType.FULL_STATE_DICT):
        raise InputError("FSDP needs fsdp_version: 2 and fsdp_state_dict_type: FULL_STATE_DICT, as in fsdp2.yaml")
    return accelerator


def check_model(args, model, batches: Batches) -> None:
    """Try a forward pass as in training, on black images; the model and its batch norm stay as they are.

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
            raise ValueError(f"it returns {tuple(logits.shape)}, not logits {examples, num_classes}")
    except Exception as error:  # each model fails in its own way
        raise InputError(
            f"the model cannot be trained on {examples} at once (m, or its perturb_fraction) of images {input_size}: "
            f"{error}; change model, model_kwargs, img_size or m"
        ) from error


def set_head_bias(args, model) -> None:
    """Set the classifier's biases to ``head_bias``, near which all logits start then, unless that is None.

    Raises:
        InputError: the classifier has no biases.
    """
    if args.head_bias is None:
        return
    bias = getattr(model.get_classifier(), "bias", None)
    if bias is None:
        raise InputError(f"head_bias {args.head_bias} needs a classifier with biases: {args.model} has none")
    torch.nn.init.constant_(bias, args.head_bias)


def build_criterion(args):
    """The training loss, a function of logits and labels."""
    if args.loss == "bce":
        return BinaryCrossEntropy(args.smoothing, sum_classes=True)
    return LabelSmoothingCrossEntropy(args.smoothing)


def ascending(args, examples: int) -> int:
    """How many of a micro-batch's examples the ascent pass sees."""
    return max(1, round((args.perturb_fraction or 1) * examples))


def build_objective(args, criterion, optimizer):
    """What the method's perturbation ascends, a function of model, inputs and labels; None for method base.

    Raises:
        InputError: also when it is called: method momentum with an optimizer that keeps none.
    """
    forget = None
    if METHODS[args.method][0] == "obf":
        forget = OutputBiasForgetting(args.gamma, args.lam, args.link)

    def noise(model, images, labels):
        model(images)  # moves batch norm's statistics, at the weights as they are
        return random_perturbation(model.parameters())

    def momentum(*_):
        try:
            return momentum_perturbation(optimizer)
        except ValueError as error:
            raise InputError(f"method momentum does not go with opt {args.opt}: {error}") from error

    if args.method == "momentum":
        momentum()
    return {
        None: None,
        "loss": lambda model, images, labels: criterion(model(images), labels),
        "obf": lambda model, images, labels: forget(model(images), labels),
        "noise": noise,
        "momentum": momentum,
    }[METHODS[args.method][0]]


def build_optimizer(args, model):
    """timm's optimizer, inside SAM unless the method is base.

    Raises:
        InputError: timm or torch does not take the settings.
    """
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum} | args.opt_kwargs
    _, variant = METHODS[args.method]
    own = {}
    if variant == "asam":
        own = {"adaptive": args.adaptive}
    elif variant == "gsam":
        own = {"gsam_alpha": args.gsam_alpha, "gsam_normalize": args.gsam_normalize}
    try:
        base = create_optimizer_v2(model, args.opt, **options)
        base._step_supports_amp_scaling = False  # else a GradScaler lets a fused one skip its step, and nobody sees it
        return SAM(base, model, args.rho, **own) if variant else base
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        message, known = str(error), list_optimizers()
        if args.opt.lower().removeprefix("lookahead_") not in known:
            message = f"timm has no optimizer {args.opt!r}{did_you_mean(args.opt, known)}"
        raise InputError(message) from error


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


def _alone(job):
    """No exchange of gradients; but FSDP2 has no gradients before it has exchanged them."""
    return contextlib.nullcontext() if job.accelerator.is_fsdp2 else job.accelerator.no_sync(job.model)


def forward_backward(job: Job, batch: dict, objective: Callable | None, sync: bool) -> torch.Tensor:
    """Leave the gradient of a loader batch in ``.grad``, micro-batch by micro-batch; return its loss (descent pass).

    Without an ``objective`` to ascend, there is no perturbation. Processes exchange gradients in the last descent pass,
    and only if ``sync``.
    """
    total = 0.0
    micro_batches = list(zip(batch["image"].split(job.batches.m), batch["label"].split(job.batches.m)))
    share = 1 / (len(micro_batches) * job.batches.accumulation)
    for i, (images, labels) in enumerate(micro_batches):
        images = job.batches.to_input(images)

        def ascent():
            part = ascending(job.args, len(images))
            with _alone(job):
                return objective(job.model, images[:part], labels[:part])

        perturbed = contextlib.nullcontext()
        if objective is not None:
            scaler = job.accelerator.scaler
            perturbed = job.optimizer.optimizer.perturbed(ascent, loss_weight=share, grad_scaler=scaler)
        # DDP exchanges gradients where the forward pass says so: hence the order of the two contexts.
        exchange = sync and i == len(micro_batches) - 1
        with perturbed, contextlib.nullcontext() if exchange else _alone(job):
            logits = job.model(images)
            loss = job.criterion(logits, labels)
            job.accelerator.backward(loss * share)
        total += loss.detach() / len(micro_batches)
        job.right += (logits.argmax(-1) == labels).sum()
    return total


def update(job: Job, batches, perturb: bool = True) -> torch.Tensor:
    """Make one update from the next ``accumulation`` loader batches; return their mean loss in this process.

    Without ``perturb`` it is the base optimizer's.
    """
    total, objective = 0.0, job.objective if perturb else None
    # GSAM replaces each micro-batch's gradient after its backward pass, too late for DDP's own exchange.
    late = getattr(job.optimizer.optimizer, "gsam_alpha", 0) > 0 and not job.accelerator.is_fsdp2
    for i in range(job.batches.accumulation):
        last = i == job.batches.accumulation - 1
        total += forward_backward(job, next(batches), objective, sync=last and not late) / job.batches.accumulation
    if late and job.accelerator.num_processes > 1:
        grads = [p.grad for p in job.model.parameters() if p.grad is not None]
        mean = job.accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))
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


def evaluate_top1(job: Job, loader) -> dict:
    """Top-1 accuracy, in [0, 1], and number of examples of a prepared loader; every process returns them."""
    metric = Top1(keep_in_memory=True)
    job.model.eval()
    for batch in loader:
        with torch.no_grad():
            predictions = job.model(job.batches.to_input(batch["image"])).argmax(-1)
        predictions, references = job.accelerator.gather_for_metrics((predictions, batch["label"]))
        metric.add_batch(predictions=predictions.cpu(), references=references.cpu())
    return metric.compute()


class Watch:
    """Notices SIGTERM, Ctrl-C and a loss that stays infinite or NaN; every process does so at the same update."""

    def __init__(self, accelerator, patience: int = PATIENCE):
        self.accelerator, self.patience, self.signal = accelerator, patience, 0
        self.interval, self.seen, self.start = 1, 0, time.monotonic()
        self.bad = torch.zeros((), device=accelerator.device)  # updates in a row without a finite loss
        self.known_bad = 0.0  # the largest of all processes, at the last comparison

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _stop(self, number, _):
        self.signal = number
        if number == signal.SIGINT:  # a second one ends the program at once
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def look(self, loss, step: int, now: bool):
        """Take note of a step's loss; about every 5 seconds, or ``now``, compare notes with the other processes.

        Returns:
            None, or the mean loss and the signal to stop by, 0 if none.

        Raises:
            InputError: after ``patience`` steps in a row without a finite loss.
        """
        self.bad = torch.where(loss.isfinite(), 0.0, self.bad + 1)
        self.seen += 1
        if self.seen < self.interval and not now:
            return None
        seconds = (time.monotonic() - self.start) / self.seen
        note = torch.tensor([self.signal, seconds], device=loss.device)
        notes = self.accelerator.gather(torch.cat([note, torch.stack([loss.float(), self.bad])])[None])
        number, seconds, _, self.known_bad = notes.max(0).values.tolist()
        self.interval, self.seen, self.start = min(max(1, int(5 / seconds)), 100), 0, time.monotonic()
        if self.known_bad >= self.patience:
            raise self.diverged(step)
        return notes[:, 2].mean().item(), int(number)

    def diverged(self, step) -> InputError:
        """The error to end a run with."""
        return InputError(
            f"the loss has not been finite since step {step - self.known_bad + 1:.0f}: lower lr or rho, or set "
            f"clip_grad, and start anew, or go on from the last good checkpoint with --resume auto"
        )


def train_epoch(job, progress, watch, bar):
    """Make the remaining steps of an epoch; stop the program, with a checkpoint, on SIGTERM or Ctrl-C."""
    if progress.step == job.batches.steps:  # a run resumed before the evaluation
        return
    job.model.train()
    job.schedule(progress.updates)
    interval, total = job.args.checkpoint_interval, torch.tensor(progress.loss, device=job.accelerator.device)
    job.right.fill_(progress.right / job.accelerator.num_processes)
    start = time.monotonic() - progress.seconds
    batches = job.batches.train(progress.epoch, progress.step * job.batches.accumulation)
    while progress.step < job.batches.steps:
        shown = {key: value for key, value in job.optimizer.param_groups[0].items() if key in ("lr", "rho")}
        loss = update(job, batches, perturb=progress.steps % (job.args.perturb_interval or 1) == 0)
        total += loss
        progress.step, progress.steps = progress.step + 1, progress.steps + 1
        if not job.optimizer.step_was_skipped:
            progress.updates += 1
            job.schedule(progress.updates)
        bar.update()
        due = interval is not None and progress.steps % interval == 0
        seen = watch.look(loss, progress.steps, now=due or progress.step == job.batches.steps)
        if seen is None:
            continue
        mean, stop = seen
        sums = job.accelerator.reduce(torch.stack([total, job.right]), "mean").tolist()
        progress.loss, progress.right = sums[0], sums[1] * job.accelerator.num_processes
        progress.seconds = time.monotonic() - start
        average = f"{progress.loss / progress.step:.3f}"  # over the epoch
        bar.set_postfix(loss=average, **{key: f"{value:.4g}" for key, value in shown.items()})
        job.accelerator.log({f"train/{key}": value for key, value in {"loss": mean, **shown}.items()}, progress.steps)
        if stop or (due and progress.step < job.batches.steps):
            save_checkpoint(job, progress)
        if stop:
            bar.close()
            finish_trackers(job.accelerator)
            name = signal.Signals(stop).name
            job.accelerator.print(f"stopped by {name} after step {progress.steps}; go on with --resume auto")
            raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)
    next(batches, None)  # lets the loader know of the end


def fit(job: Job) -> None:
    """Train epoch by epoch, from a checkpoint if asked to; what is written, docs/training.md says.

    Raises:
        InputError: settings that do not fit the checkpoint to resume from, data that cannot be read, a full disk, or a
            loss that stays infinite or NaN.
    """
    args, accelerator, held_out = job.args, job.accelerator, job.batches.held_out
    set_seed(args.seed, device_specific=True)  # each process draws dropout and random perturbations of its own
    progress = begin(job)
    hidden = {"disable": not accelerator.is_main_process, "dynamic_ncols": True}
    bar = tqdm(total=args.epochs * job.batches.steps, initial=progress.steps, unit="step", **hidden)
    with Watch(accelerator, min(PATIENCE, job.batches.steps)) as watch, bar:
        while progress.epoch < args.epochs:
            best = f", best {progress.best:.1%}" if progress.best >= 0 else ""
            bar.set_description(f"epoch {progress.epoch + 1}/{args.epochs}{best}")
            train_epoch(job, progress, watch, bar)
            # Before the evaluation, so that a kill during that costs no training; a resumed run then repeats it.
            if not save_checkpoint(job, progress):
                raise watch.diverged(progress.steps)
            save_model(job, "last")
            number, top1 = progress.epoch + 1, None
            if args.save_interval and (number % args.save_interval == 0 or number == args.epochs):
                save_model(job, f"epochs/{number:04d}")
            if number % args.val_interval == 0 or number == args.epochs:
                top1 = evaluate_top1(job, job.batches.evaluation[held_out])["top1"]
                accelerator.log({f"{held_out}/top1": top1}, progress.steps)
                if top1 > progress.best and held_out == "validation":
                    save_model(job, "best")
                progress.best = max(progress.best, top1)
            loss = progress.loss / job.batches.steps
            line = {"epoch": progress.epoch, "loss": loss if math.isfinite(loss) else None}
            line |= {"train": progress.right / (job.batches.steps * args.batch_size), held_out: top1}
            line |= {key: job.optimizer.param_groups[0].get(key) for key in ("lr", "rho")}  # at the epoch's end
            line["seconds"] = round(progress.seconds, 3)
            with checkpoints.fail_together(accelerator), checkpoints.writing(job.args.output):
                if accelerator.is_main_process:
                    with (Path(args.output) / "metrics.jsonl").open("a") as file:
                        file.write(json.dumps(line) + "\n")
            progress = dataclasses.replace(progress, epoch=progress.epoch + 1, step=0, loss=0.0, right=0.0, seconds=0.0)


def save_model(job, name):
    """Save the model into a folder of the run's output."""
    checkpoints.save_model(job.accelerator, job.model, Path(job.args.output) / name, job.timm_config)


def begin(job) -> Progress:
    """Prepare the output folder and load the checkpoint to resume from, if any.

    Raises:
        InputError: there is no such checkpoint, or not of such a run; the folder cannot be written, or its checkpoints
            were removed; the Hub does not take the model.
    """
    args, accelerator, output = job.args, job.accelerator, Path(job.args.output)
    with checkpoints.fail_together(accelerator):
        if args.push_to_hub and accelerator.is_main_process:
            checkpoints.check_hub(args.push_to_hub)
    path = checkpoints.find(args.resume, output / "checkpoints") if args.resume else None
    trained = [name for name in ("results.json", "last", "best", "epochs") if (output / name).exists()]
    if args.resume == "auto" and path is None and trained:
        raise InputError(
            f"{output} has {', '.join(trained)} of an earlier run, but no checkpoint to resume from: replace that run "
            f"with --overwrite, or choose another --output"
        )
    progress = Progress() if path is None else Progress(**checkpoints.read(path, identity(job)))
    own = path is not None and path.parent.resolve() == (output / "checkpoints").resolve()
    if not own:
        progress.best = -1.0  # another run's best model stays with it
    accelerator.wait_for_everyone()  # the main process is about to change the folder
    with checkpoints.fail_together(accelerator), checkpoints.writing(output):
        if accelerator.is_main_process:
            if not own:
                for old in ("checkpoints", "best", "last", "epochs"):
                    shutil.rmtree(output / old, ignore_errors=True)
                for old in ("metrics.jsonl", "results.json", "curves.png", "curves.svg"):
                    (output / old).unlink(missing_ok=True)
            output.mkdir(parents=True, exist_ok=True)
            metrics = output / "metrics.jsonl"
            lines = metrics.read_text().splitlines() if metrics.exists() else []
            kept = [line for line in lines if json.loads(line)["epoch"] < progress.epoch]
            metrics.write_text("".join(f"{line}\n" for line in kept))
            (output / "settings.yaml").write_text(yaml.safe_dump(resolved(args), sort_keys=False))
    if path is not None:
        checkpoints.restore(accelerator, path)
        accelerator.print(f"resuming from {path}, after epoch {progress.epoch}, step {progress.step}")
    if path is not None and not own:
        accelerator.print(f"metrics.jsonl, best/ and epochs/ of {output} begin here: earlier epochs' stay in that run")
        save_checkpoint(job, progress)  # for --resume auto
    plain = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in resolved(args).items()
    }
    accelerator.init_trackers("sam-obf", plain)
    return progress


def save_checkpoint(job, progress) -> bool:
    """Save the state to resume from, if all of it is finite, and say whether: else the one before stays the newest."""
    average_batch_norm(job)
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*job.model.parameters(), *job.model.buffers())]
    finite = torch.stack([t.isfinite().all() for t in tensors if t.numel()]).all()
    good = bool(job.accelerator.gather(finite[None].long()).all())
    if good:
        where = Path(job.args.output) / "checkpoints"
        state = (dataclasses.asdict(progress), identity(job), job.args.checkpoint_hist)
        checkpoints.save(job.accelerator, job.model, job.optimizer, where, *state)
    return good


def identity(job) -> dict:
    """What a run must have in common with the checkpoint that it resumes from."""
    # FSDP2 perturbs with the micro-batches of all processes together.
    processes = {"fsdp2_processes": job.accelerator.num_processes} if job.accelerator.is_fsdp2 else {}
    return shared_on_resume(job.args) | processes | {"num_classes": job.accelerator.unwrap_model(job.model).num_classes}


def final_evaluation(job: Job) -> dict[str, float]:
    """Evaluate the saved models on all splits but train; print and save top-1; upload if asked to.

    The models are that of the last epoch, "last", which counts, and with validation images the one that is "best" on
    them, whose top-1 on them is too good by that choice.

    Returns:
        Top-1, in [0, 1], of the last epoch by split.

    Raises:
        InputError: a model is missing, or the results cannot be written or uploaded.
    """
    args, accelerator, output = job.args, job.accelerator, Path(job.args.output)
    results, top1 = {}, {}
    for name in ("last", "best") if job.batches.held_out == "validation" else ("last",):
        load_model(job, output / name)
        results[name] = {split: evaluate_top1(job, loader) for split, loader in job.batches.evaluation.items()}
        top1[name] = {split: result["top1"] for split, result in results[name].items()}
        accelerator.log({f"{name}/{split}": value for split, value in top1[name].items()})
    finish_trackers(accelerator)
    accelerator.print(f"\nTop-1 accuracy of {args.model} trained with method {args.method}:")
    accelerator.print("the last epoch" + (", and the epoch that is best on validation" if "best" in results else ""))
    accelerator.print(f"{'split':<12} {'images':>8}" + "".join(f" {name:>8}" for name in results))
    for split, result in results["last"].items():
        cells = "".join(f" {values[split]:>8.2%}" for values in top1.values())
        accelerator.print(f"{split:<12} {result['examples']:>8}{cells}")
    for name in results:
        accelerator.print(f"{name}: timm.create_model('local-dir:{output / name}', pretrained=True)")
    with checkpoints.fail_together(accelerator), checkpoints.writing(output):
        if accelerator.is_main_process:
            (output / "results.json").write_text(json.dumps(top1, indent=2) + "\n")
            report.draw_curves({output.name: report.read_metrics(output)}, output / "curves.png")
            if args.push_to_hub:
                checkpoints.push(args.push_to_hub, output / "last", resolved(args), top1["last"])
    return top1["last"]


def load_model(job, folder):
    """Load the weights of a model that ``save_model`` has saved.

    Raises:
        InputError: it is not there.
    """
    with checkpoints.fail_together(job.accelerator):
        if job.accelerator.is_main_process and not (folder / "model.safetensors").exists():
            raise InputError(f"{folder} was removed since this run saved it: start anew with --overwrite")
    weights = load_file(folder / "model.safetensors") if job.accelerator.is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=job.accelerator.num_processes > 1)
    set_model_state_dict(job.model, weights, options=options)


def finish_trackers(accelerator):
    """Let trackers write what they hold; ``Accelerator.end_training`` would end the process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()


def dry_run(job: Job) -> dict:
    """Make two updates and evaluate a batch; print what a run would take, and write nothing."""
    args, accelerator = job.args, job.accelerator
    job.model.train()
    job.schedule(0)
    batches = itertools.chain.from_iterable(job.batches.train(epoch, 0) for epoch in range(2))
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        loss = update(job, batches).item()
        seconds = time.monotonic() - start
    job.model.eval()
    for loader in job.batches.evaluation.values():
        with torch.no_grad():
            job.model(job.batches.to_input(next(iter(loader))["image"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    weights = sum(p.numel() for p in job.model.parameters())
    steps, processes = job.batches.steps, count(accelerator.num_processes, "process", "processes")
    accumulation = count(job.batches.accumulation, "loader batch", "loader batches")
    accelerator.print(
        f"dry run of {args.model} ({weights / 1e6:.1f} M weights) on {args.dataset}, method {args.method}: the loss is "
        f"{loss:.3f}\n{args.batch_size} examples per update: {processes} x {accumulation} x micro-batches of "
        f"{job.batches.m}\n{count(args.epochs, 'epoch')} of {count(steps, 'update')} of {duration(seconds)}: about "
        f"{duration(args.epochs * steps * seconds)}, and the evaluations\npeak memory of process 0: {peak:.1f} GiB on "
        f"{accelerator.device}\nnothing was written"
    )
    return {}


def count(number: int, one: str, many: str = "") -> str:
    """A number of things, in words."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} seconds" if seconds < 10 else f"{seconds:.0f} seconds"
