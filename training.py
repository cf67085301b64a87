"""What the training scripts share: the one training loop."""

import dataclasses
import itertools
import json
import resource
import shutil
import signal
import time
from pathlib import Path

import datasets
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm

import builders
import checkpoints
import data
from data import InputError
from engine import Job, average_batch_norm, evaluate_top1, update
from settings import resolved, shared_on_resume

PATIENCE = 20  # updates in a row without a finite loss, after which a run gives up


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    epoch: int = 0
    step: int = 0  # updates of this epoch, including those skipped because fp16 gradients overflowed
    steps: int = 0  # the same, of all epochs
    updates: int = 0  # of all epochs, without those skipped: what the schedule follows
    loss: float = 0.0  # sum over this epoch's steps, in the main process
    best: float = -1.0


class Watch:
    """Notices SIGTERM and a loss that stays infinite or NaN; every process does so at the same update."""

    def __init__(self, accelerator):
        self.accelerator, self.terminated = accelerator, False
        self.interval, self.seen, self.start = 1, 0, time.monotonic()
        self.bad = torch.zeros((), device=accelerator.device)  # updates in a row without a finite loss

    def __enter__(self):
        self.previous = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.previous)

    def _terminate(self, *_):
        self.terminated = True

    def look(self, loss, step: int, now: bool):
        """Take note of a step's loss; about every 5 seconds, or ``now``, compare notes with the other processes.

        Returns:
            None, or the mean loss and whether to stop.

        Raises:
            InputError: after ``PATIENCE`` steps in a row without a finite loss.
        """
        self.bad = torch.where(loss.isfinite(), 0.0, self.bad + 1)
        self.seen += 1
        if self.seen < self.interval and not now:
            return None
        seconds = (time.monotonic() - self.start) / self.seen
        note = torch.tensor([self.terminated, seconds], device=loss.device)
        notes = self.accelerator.gather(torch.cat([note, torch.stack([loss.float(), self.bad])])[None])
        terminated, seconds, _, bad = notes.max(0).values.tolist()
        self.interval, self.seen, self.start = min(max(1, int(5 / seconds)), 100), 0, time.monotonic()
        if bad >= PATIENCE:
            raise InputError(
                f"the loss has not been finite since step {step - bad + 1:.0f}: lower lr or rho, or set clip_grad, and "
                f"start anew, or go on from the last good checkpoint with --resume auto"
            )
        return notes[:, 2].mean().item(), bool(terminated)


def train(args, accelerator: Accelerator, splits: datasets.DatasetDict, model: torch.nn.Module) -> dict[str, float]:
    """Train ``model`` on the split train; return the top-1 on all other splits of its best epoch on validation.

    Without a validation split the last epoch counts, and test shows progress. The README says what is written.

    Raises:
        InputError: settings that do not fit each other, the data or the checkpoint to resume from, data that cannot be
            read, a full disk, or a loss that stays infinite or NaN.
    """
    loaded, accumulation, m = builders.split_batch(args, accelerator.num_processes)
    config = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    config = resolve_data_config(config, model=model)
    train_transform, eval_transform = data.transforms(config, scale=args.scale, ratio=args.ratio, hflip=args.hflip)
    timm_config = checkpoints.timm_config(model, args, config, splits["train"].features["label"].names)
    ascending = max(1, round((args.perturb_fraction or 1) * m))  # examples of the ascent pass
    builders.check_model(model, config["input_size"], min(2, ascending), splits["train"].features["label"].num_classes)
    if args.head_bias is not None:
        torch.nn.init.constant_(model.get_classifier().bias, args.head_bias)
    criterion = builders.build_criterion(args)
    try:
        optimizer, objective = builders.build_optimizer(args, model), builders.build_objective(args, model, criterion)
    except (ValueError, TypeError, AssertionError) as error:
        raise InputError(str(error)) from error
    size, batches = builders.train_batches(args, accelerator, splits["train"], train_transform, loaded)
    if size < args.batch_size:
        raise InputError(f"batch_size {args.batch_size} exceeds the {size} training images: lower it")
    if args.push_to_hub and accelerator.is_main_process:
        checkpoints.check_hub(args.push_to_hub)

    to_input = data.to_input(config, next(model.parameters()).dtype)
    model, optimizer = accelerator.prepare(model, optimizer)
    job = Job(
        args, accelerator, model, optimizer, objective, criterion,
        to_input=to_input,
        m=m,
        accumulation=accumulation,
        batches=batches,
        steps=size // args.batch_size,
        schedule=builders.build_schedule(args, optimizer, size // args.batch_size),
        initial=[p.detach().clone() for p in model.parameters()] if args.shrink_perturb else [],
    )  # fmt: skip
    held_out = "validation" if "validation" in splits else "test"
    loaders = {
        split: builders.evaluation_loader(args, accelerator, ds, eval_transform, loaded, persistent=split == held_out)
        for split, ds in splits.items()
        if split != "train"
    }
    set_seed(args.seed, device_specific=True)  # each process draws dropout and random perturbations of its own
    if args.dry_run:
        return dry_run(job, loaders)
    folder = Path(args.output) / ("best" if held_out == "validation" else "last")
    run_epochs(job, held_out, loaders[held_out], folder, timm_config)
    return finish(job, loaders, folder)


def run_epochs(job, held_out, loader, folder, timm_config):
    """Train epoch by epoch, from a checkpoint if asked to; leave the model to use in ``folder``."""
    args, accelerator = job.args, job.accelerator
    progress = begin(job)
    hidden = {"disable": not accelerator.is_main_process, "dynamic_ncols": True}
    bar = tqdm(total=args.epochs * job.steps, initial=progress.steps, unit="step", **hidden)
    with Watch(accelerator) as watch, bar:
        while progress.epoch < args.epochs:
            bar.set_description(f"epoch {progress.epoch + 1}/{args.epochs}, best {max(progress.best, 0):.1%}")
            train_epoch(job, progress, watch, bar)
            average_batch_norm(job)
            top1 = evaluate_top1(job, loader)["top1"]
            accelerator.log({f"{held_out}/top1": top1}, progress.steps)
            if accelerator.is_main_process:
                with (Path(args.output) / "metrics.jsonl").open("a") as file:
                    line = {"epoch": progress.epoch, "loss": progress.loss / job.steps, held_out: top1}
                    file.write(json.dumps(line) + "\n")
            if top1 > progress.best or held_out == "test":
                checkpoints.save_model(accelerator, job.model, folder, timm_config)
            number, interval = progress.epoch + 1, args.save_interval
            if interval and (number % interval == 0 or number == args.epochs):
                kept = Path(args.output) / "epochs" / f"{number:04d}"
                checkpoints.save_model(accelerator, job.model, kept, timm_config)
            progress.best = max(progress.best, top1)
            progress.epoch, progress.step, progress.loss = progress.epoch + 1, 0, 0.0
            save_checkpoint(job, progress)


def train_epoch(job, progress, watch, bar):
    """Make the remaining steps of an epoch; stop the program, with a checkpoint, on SIGTERM."""
    job.model.train()
    job.schedule(progress.updates)
    interval, total = job.args.checkpoint_interval, torch.tensor(progress.loss, device=job.accelerator.device)
    batches = job.batches(progress.epoch, progress.step * job.accumulation)
    while progress.step < job.steps:
        shown = {key: value for key, value in job.optimizer.param_groups[0].items() if key in ("lr", "rho")}
        loss = update(job, batches)
        total += loss
        progress.step, progress.steps = progress.step + 1, progress.steps + 1
        if not job.optimizer.step_was_skipped:
            progress.updates += 1
            job.schedule(progress.updates)
        bar.update()
        due = interval is not None and progress.steps % interval == 0
        seen = watch.look(loss, progress.steps, now=due or progress.step == job.steps)
        if seen is None:
            continue
        mean, terminated = seen
        bar.set_postfix(loss=f"{mean:.3f}", **{key: f"{value:.4g}" for key, value in shown.items()})
        job.accelerator.log({f"train/{key}": value for key, value in {"loss": mean, **shown}.items()}, progress.steps)
        progress.loss = job.accelerator.reduce(total, "mean").item()
        if terminated or (due and progress.step < job.steps):
            save_checkpoint(job, progress)
        if terminated:
            bar.close()
            finish_trackers(job.accelerator)
            job.accelerator.print(f"stopped by SIGTERM after step {progress.steps}; go on with --resume auto")
            raise SystemExit
    next(batches, None)  # lets the loader know of the end


def finish_trackers(accelerator):
    """Let trackers write what they hold; ``Accelerator.end_training`` would end the process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()


def save_checkpoint(job, progress):
    """Save the state to resume from, unless it is no good: then the one before stays the newest."""
    average_batch_norm(job)
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in (*job.model.parameters(), *job.model.buffers())]
    finite = torch.stack([t.isfinite().all() for t in tensors if t.numel()]).all()
    if job.accelerator.gather(finite[None].long()).all():
        where = Path(job.args.output) / "checkpoints"
        state = (dataclasses.asdict(progress), identity(job), job.args.checkpoint_hist)
        checkpoints.save(job.accelerator, job.model, job.optimizer, where, *state)


def identity(job) -> dict:
    """What a run must have in common with the checkpoint that it resumes from."""
    return shared_on_resume(job.args) | {"num_classes": job.accelerator.unwrap_model(job.model).num_classes}


def begin(job) -> Progress:
    """Prepare the output folder and load the checkpoint to resume from, if any."""
    args, accelerator, output = job.args, job.accelerator, Path(job.args.output)
    path = checkpoints.find(args.resume, output / "checkpoints") if args.resume else None
    progress = Progress() if path is None else Progress(**checkpoints.read(path, identity(job)))
    accelerator.wait_for_everyone()  # the main process is about to change the folder
    if accelerator.is_main_process:
        if path is None:
            for old in ("checkpoints", "best", "last", "epochs"):
                shutil.rmtree(output / old, ignore_errors=True)
        output.mkdir(parents=True, exist_ok=True)
        metrics = output / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        metrics.write_text("".join(f"{line}\n" for line in lines[: progress.epoch]))
        (output / "settings.yaml").write_text(yaml.safe_dump(resolved(args), sort_keys=False))
    if path is not None:
        checkpoints.restore(accelerator, path)
        accelerator.print(f"resuming from {path}, after epoch {progress.epoch}, step {progress.step}")
    plain = {
        key: value if isinstance(value, (int, float, str)) else str(value) for key, value in resolved(args).items()
    }
    accelerator.init_trackers("sam-obf", plain)
    return progress


def dry_run(job, loaders):
    """Make two updates and evaluate a batch; print what a run would take, and write nothing."""
    args, accelerator = job.args, job.accelerator
    job.model.train()
    job.schedule(0)
    batches = itertools.chain.from_iterable(job.batches(epoch, 0) for epoch in range(2))
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        loss = update(job, batches).item()
        seconds = time.monotonic() - start
    job.model.eval()
    for loader in loaders.values():
        with torch.no_grad():
            job.model(job.to_input(next(iter(loader))["image"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if accelerator.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
    weights = sum(p.numel() for p in job.model.parameters())
    accelerator.print(
        f"dry run of {args.model} ({weights / 1e6:.1f} M weights) on {args.dataset}, method {args.method}: the loss is "
        f"{loss:.3f}\n{args.batch_size} examples per update: {accelerator.num_processes} processes x "
        f"{job.accumulation} loader batches x micro-batches of {job.m}\n{args.epochs} epochs of {job.steps} updates of "
        f"{seconds:.2f} s: about {args.epochs * job.steps * seconds / 3600:.1f} hours\npeak memory of process 0: "
        f"{peak:.1f} GiB on {accelerator.device}\nnothing was written"
    )
    return {}


def finish(job, loaders, folder):
    """Evaluate the model in ``folder`` on all splits, print and save the results, and upload it if asked to."""
    args, accelerator = job.args, job.accelerator
    weights = load_file(folder / "model.safetensors") if accelerator.is_main_process else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=accelerator.num_processes > 1)
    set_model_state_dict(job.model, weights, options=options)
    results = {split: evaluate_top1(job, loader) for split, loader in loaders.items()}
    top1 = {split: result["top1"] for split, result in results.items()}
    accelerator.log({f"final/{split}": value for split, value in top1.items()})
    finish_trackers(accelerator)
    accelerator.print(f"\nTop-1 accuracy of {args.model} trained with method {args.method}, {folder.name} epoch")
    accelerator.print(f"{'split':<12} {'images':>8} {'top-1':>8}")
    for split, result in results.items():
        accelerator.print(f"{split:<12} {result['examples']:>8} {result['top1']:>8.2%}")
    accelerator.print(f"\nThe model: timm.create_model('local-dir:{folder}', pretrained=True)")
    if accelerator.is_main_process:
        (Path(args.output) / "results.json").write_text(json.dumps(top1, indent=2) + "\n")
        if args.push_to_hub:
            checkpoints.push(args.push_to_hub, folder, resolved(args), top1)
    return top1
