"""The run around its loop: start or resume it, save, evaluate, and write what it found."""

import contextlib
import dataclasses
import json
import math
import shutil
from pathlib import Path

import torch
import yaml
from accelerate.utils import set_seed
from filelock import FileLock, Timeout
from safetensors.torch import load_file
from timm.utils import distribute_bn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor

from common import checkpoints, report
from common.build import Job
from common.errors import WORKER_REMEDY, InputError
from common.folders import some
from common.metrics import Top1, in_memory
from common.settings import resolved, shared_on_resume

MODELS = ("last", "last_ema", "best", "epochs")  # folders of them in the output folder
TRACKED = "sam-obf"  # trackers' name for runs; TensorBoard's is a folder beside these
# Of a run, beside its settings.
FILES = ("metrics.jsonl", "results.json", "curves.png", "curves.svg")
LOCK_WAIT = 20  # seconds, since loader workers of a killed run hold its lock for some
REMEDY = "lower lr or rho, or set clip_grad, and start anew; what was saved before is intact"


@dataclasses.dataclass
class Progress:
    """How far a run has come; a checkpoint holds it."""

    epoch: int = 0
    epoch_updates: int = 0  # of this epoch
    updates: int = 0  # of all epochs
    skipped: int = 0  # of these, since fp16 gradients overflowed; the schedule does not count them
    loss: float = 0.0  # sum over this epoch's updates, mean over processes
    right: float = 0.0  # this epoch's examples whose most likely class was the true one
    seconds: float = 0.0  # that this epoch's updates took
    best: float = -1.0  # top-1 on the held-out images

    def next_epoch(self) -> None:
        """Count an epoch."""
        self.epoch, self.epoch_updates = self.epoch + 1, 0
        self.loss = self.right = self.seconds = 0.0


@contextlib.contextmanager
def started(job: Job):
    """Lock the output folder; start or resume the run in it; give its ``Progress``.

    Raises:
        InputError: another run has the lock, the Hub does not take the model, or as ``start``.
    """
    output = Path(job.args.output)
    lock = FileLock(output / ".run.lock")
    with checkpoints.fail_together(job.accelerator), checkpoints.writing(output):
        if job.accelerator.is_main_process:
            if job.args.push_to_hub:
                checkpoints.check_hub(job.args.push_to_hub)
            output.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire(LOCK_WAIT)
            except Timeout as error:
                remedy = "stop it, wait for its end, or choose another --output"
                raise InputError(f"another run writes into {output}: {remedy}") from error
    try:
        yield start(job)
    finally:
        lock.release()
        with contextlib.suppress(OSError):
            output.rmdir()  # if there is nothing in it: the run did not start


def start(job: Job) -> Progress:
    """Make the output folder ready, and load the checkpoint to resume from, if any.

    Raises:
        InputError: there is no such checkpoint, or it is of another run; the folder cannot be
            written, or has models but no checkpoints.
    """
    args, accelerator, output = job.args, job.accelerator, Path(job.args.output)
    # Each process draws dropout and random perturbations of its own.
    set_seed(args.seed, device_specific=True)
    checkpoint = find_checkpoint(args)
    progress = Progress()
    if checkpoint:
        progress = Progress(**checkpoints.read(checkpoint, identity(job)))
    continues = checkpoint and checkpoint.resolve().parent == (output / "checkpoints").resolve()
    trained = trained_epochs(job, progress)
    later = later_than(output, trained, progress) if continues else []
    chooses = job.batches.held_out == "validation" and progress.best >= 0
    gone = continues and chooses and trained < args.epochs and not (output / "best").exists()
    if gone:
        accelerator.print(f"{output}/best is gone: it begins anew with epoch {progress.epoch + 1}")
    if not continues or gone or output / "best" in later:
        progress.best = -1.0  # another run's best model stays with it
    if checkpoint:
        checkpoints.restore(accelerator, job.ema, checkpoint)
        accelerator.print(f"resuming from {checkpoint}: {reached(job, progress, output)}")
    accelerator.wait_for_everyone()  # the main process is about to change the folder
    with checkpoints.fail_together(accelerator), checkpoints.writing(output):
        if accelerator.is_main_process:
            if trained < args.epochs:
                (output / "results.json").unlink(missing_ok=True)  # of a run that was finished
            prepare_folder(output, resolved(args), progress.epoch if continues else None, later)
    if checkpoint and not continues:
        begin = f"metrics.jsonl, best/ and epochs/ of {output} begin here"
        accelerator.print(f"{begin}: earlier epochs' stay in that run")
        save_checkpoint(job, progress)  # for --resume auto
    plain = (int, float, str)  # what every tracker takes
    config = {k: v if isinstance(v, plain) else str(v) for k, v in resolved(args).items()}
    accelerator.init_trackers(TRACKED, config)
    return progress


def trained_epochs(job: Job, progress: Progress) -> int:
    """How many epochs are trained, evaluated or not."""
    return progress.epoch + (progress.epoch_updates == job.batches.updates)


def reached(job: Job, progress: Progress, output: Path) -> str:
    """How far a resumed run has come, in words."""
    updates, epochs = job.batches.updates, job.args.epochs
    trained = trained_epochs(job, progress)
    if trained == epochs:
        left = "only evaluated again" if (output / "results.json").exists() else "now evaluated"
        return f"all {epochs} epochs are trained, so the models are {left}"
    part = "" if trained > progress.epoch else f" and {progress.epoch_updates} of {updates} updates"
    return f"{trained} of {epochs} epochs{part} are trained"


def find_checkpoint(args) -> Path | None:
    """The checkpoint to resume from, or None.

    Raises:
        InputError: there is none where ``args.resume`` says, or its run's were removed.
    """
    output = Path(args.output)
    if not args.resume:
        return None
    checkpoint = checkpoints.find(args.resume, output / "checkpoints")
    trained = [name for name in ("results.json", *MODELS) if (output / name).exists()]
    if checkpoint is None and trained:
        raise InputError(
            f"{output} has {', '.join(trained)} of an earlier run, but no checkpoint to resume "
            f"from: replace that run with --overwrite, or choose another --output"
        )
    return checkpoint


def later_than(output: Path, epoch: int, progress: Progress) -> list[Path]:
    """What a run has kept of its training after ``progress``, in which it trained ``epoch`` epochs.

    These are checkpoints, models by epoch, and the best model if a later epoch was the best.
    """
    later = checkpoints.newer(output / "checkpoints", progress.updates)
    models = sorted((output / "epochs").glob(4 * "[0-9]"))
    later += [model for model in models if int(model.name) > epoch]
    rows = [row for row in report.metrics_rows(output) if row["epoch"] > epoch]
    if any((row.get("validation") or -1) > progress.best for row in rows):
        later.append(output / "best")
    return later


def prepare_folder(output: Path, settings: dict, epoch: int | None, later: list[Path]) -> None:
    """Keep of an earlier run what it wrote in its first ``epoch`` ones, or nothing if None.

    ``later`` is what it kept after that.
    """
    if epoch is None:
        for name in ("checkpoints", TRACKED, *MODELS):
            shutil.rmtree(output / name, ignore_errors=True)
        for name in FILES:
            (output / name).unlink(missing_ok=True)
    if later:
        names = [str(path.relative_to(output)) for path in later]
        print(f"removed from {output}, since training goes on from before: {some(names)}")
        checkpoints.remove(later)
    output.mkdir(parents=True, exist_ok=True)
    write_metrics(output, [row for row in report.metrics_rows(output) if row["epoch"] <= epoch])
    (output / "settings.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))


def write_metrics(output: Path, rows: list[dict]) -> None:
    """Write ``metrics.jsonl``, a row a line."""
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    checkpoints.write_whole(output / "metrics.jsonl", lines)


def identity(job: Job) -> dict:
    """What a run must have in common with the checkpoint that it resumes from."""
    # FSDP2 perturbs with the micro-batches of all processes together.
    processes = job.accelerator.num_processes if job.accelerator.is_fsdp2 else None
    others = {"fsdp2_processes": processes, "label_names": job.batches.label_names}
    return shared_on_resume(job.args) | others


def save_checkpoint(job: Job, progress: Progress) -> None:
    """Save the state to resume from.

    Raises:
        InputError: a weight is not finite, and never will be again; or it cannot be written.
    """
    average_batch_norm(job)
    tensors = [*job.model.parameters(), *job.model.buffers()]
    tensors = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    finite = torch.stack([t.isfinite().all() for t in tensors if t.numel()]).all()
    if not job.accelerator.gather(finite[None].long()).all():
        raise InputError(f"the weights are not finite after update {progress.updates}: {REMEDY}")
    folder = Path(job.args.output) / "checkpoints"
    record = {"progress": dataclasses.asdict(progress), "settings": identity(job)}
    state = (job.accelerator, job.model, job.optimizer, job.ema)
    checkpoints.save(*state, folder, record, job.args.checkpoint_hist)


def average_batch_norm(job: Job) -> None:
    """Average over processes the statistics that each has of its own."""
    if job.accelerator.num_processes > 1:
        model = job.accelerator.unwrap_model(job.model)
        distribute_bn(model, job.accelerator.num_processes, reduce=True)
        if job.ema:
            distribute_bn(job.ema, job.accelerator.num_processes, reduce=True)


def save_model(job: Job, name: str, model=None) -> None:
    """Save the model, or another with its layout, into a folder of the run's output."""
    folder = Path(job.args.output) / name
    model = job.model if model is None else model
    checkpoints.save_model(job.accelerator, model, folder, job.timm_config)


def save_last(job: Job) -> None:
    """Save the model into ``last``, and the average of its weights, if there is one, beside it."""
    save_model(job, "last")
    if job.ema:
        save_model(job, "last_ema", job.ema.module)


def load_model(job: Job, name: str) -> None:
    """Load the weights that ``save_model`` has saved.

    Raises:
        InputError: they are not there.
    """
    folder, weights = Path(job.args.output) / name, {}
    with checkpoints.fail_together(job.accelerator):
        if job.accelerator.is_main_process:
            if not (folder / "model.safetensors").exists():
                removed = f"{folder} was removed since this run saved it"
                raise InputError(f"{removed}: start anew with --overwrite")
            weights = load_file(folder / "model.safetensors")
    several = job.accelerator.num_processes > 1
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=several)
    set_model_state_dict(job.model, weights, options=options)


def due(args, progress: Progress, interval: int | None) -> bool:
    """Whether an interval, in epochs, ends with this epoch; the last epoch ends all but None."""
    number = progress.epoch + 1
    return interval is not None and (number % interval == 0 or number == args.epochs)


def validate(job: Job, progress: Progress) -> float | None:
    """Top-1, in [0, 1], on the held-out split; None in an epoch without a validation."""
    if not due(job.args, progress, job.args.val_interval):
        return None
    split = job.batches.held_out
    top1 = evaluate_top1(job, job.batches.evaluation[split])["top1"]
    job.accelerator.log({f"{split}/top1": top1}, progress.updates)
    return top1


def validate_ema(job: Job, progress: Progress) -> float | None:
    """What ``validate`` says, of the averaged weights; None also if there are none."""
    if job.ema is None or not due(job.args, progress, job.args.val_interval):
        return None
    split = job.batches.held_out
    top1 = evaluate_top1(job, job.batches.evaluation[split], job.ema.module)["top1"]
    job.accelerator.log({f"{split}/top1_ema": top1}, progress.updates)
    return top1


def evaluate_top1(job: Job, loader, model=None) -> dict:
    """Top-1, in [0, 1], and the number of examples of a prepared loader, in every process.

    Another ``model`` is judged in place of the run's own.
    """
    metric, model = in_memory(Top1), job.model if model is None else model
    model.eval()
    for batch in loader:
        with torch.no_grad():
            predictions = model(job.batches.to_input(batch["image"])).argmax(-1)
        pair = (predictions, batch["label"])
        predictions, labels = job.accelerator.gather_for_metrics(pair)
        metric.add_batch(predictions=predictions.cpu(), references=labels.cpu())
    result = metric.compute()
    examples = result["examples"]
    expected = len(loader.dataset) if hasattr(loader.dataset, "__len__") else examples
    if examples != expected:
        raise InputError(f"{examples} of {expected} images came to be evaluated: {WORKER_REMEDY}")
    return result


def is_best(job: Job, progress: Progress, top1: float | None) -> bool:
    """Whether an epoch's top-1 on validation images is the best so far."""
    return job.batches.held_out == "validation" and top1 is not None and top1 > progress.best


def log_epoch(
    job: Job, progress: Progress, top1: float | None, ema_top1: float | None = None
) -> None:
    """Write an epoch's line of metrics.jsonl; lr and rho are those of its last update."""
    updates = job.batches.updates
    loss = progress.loss / updates
    line = {"epoch": progress.epoch + 1, "loss": loss if math.isfinite(loss) else None}
    mixed = job.args.mixup or job.args.cutmix
    line["train"] = None if mixed else progress.right / (updates * job.args.batch_size)
    line[job.batches.held_out] = top1
    if job.ema:
        line[f"{job.batches.held_out}_ema"] = ema_top1
    line |= {"lr": None, "rho": None} | job.rates()
    line["seconds"] = round(progress.seconds, 3)
    output = Path(job.args.output)
    with checkpoints.fail_together(job.accelerator), checkpoints.writing(output):
        if job.accelerator.is_main_process:
            write_metrics(output, [*report.metrics_rows(output), line])


def evaluate_saved(job: Job) -> dict[str, dict]:
    """Evaluate the saved models on all splits but train.

    "last", the last epoch's, is what counts. With validation images there is "best", the best epoch
    on them; its top-1 on them is too good by that choice. "last_ema" is the average of the weights.

    Returns:
        By model and split, what ``evaluate_top1`` does.

    Raises:
        InputError: a model is missing.
    """
    results = {}
    names = ["last"] + ["best"] * (job.batches.held_out == "validation")
    for name in names + ["last_ema"] * (job.ema is not None):
        load_model(job, name)
        splits = job.batches.evaluation.items()
        results[name] = {split: evaluate_top1(job, loader) for split, loader in splits}
        job.accelerator.log({f"{name}/{split}": r["top1"] for split, r in results[name].items()})
    finish_trackers(job.accelerator)
    return results


def print_results(job: Job, results: dict) -> None:
    """Print the top-1 of ``evaluate_saved``, and how to open the models."""
    say, args = job.accelerator.print, job.args
    say(f"\nTop-1 accuracy of {args.model} trained with method {args.method}:")
    best = ", and the epoch that is best on validation" if "best" in results else ""
    average = ", and the average of the weights" if job.ema else ""
    say(f"the last epoch{best}{average}")
    say(f"{'split':<12} {'images':>8}" + "".join(f" {name:>8}" for name in results))
    for split, result in results["last"].items():
        cells = "".join(f" {result_of[split]['top1']:>8.2%}" for result_of in results.values())
        say(f"{split:<12} {result['examples']:>8}{cells}")
    for name in results:
        say(f"{name}: timm.create_model('local-dir:{Path(args.output) / name}', pretrained=True)")


def write_results(job: Job, results: dict) -> None:
    """Write the top-1 of ``evaluate_saved``, and the curves; upload the model if asked to.

    Raises:
        InputError: they cannot be written or uploaded.
    """
    args, output, top1 = job.args, Path(job.args.output), {}
    for name, splits in results.items():
        top1[name] = {split: result["top1"] for split, result in splits.items()}
    with checkpoints.fail_together(job.accelerator), checkpoints.writing(output):
        if job.accelerator.is_main_process:
            checkpoints.write_whole(output / "results.json", json.dumps(top1, indent=2) + "\n")
            report.draw_curves({output.name: report.read_metrics(output)}, output / "curves.png")
            if args.push_to_hub:
                last = (output / "last", resolved(args), top1["last"])
                checkpoints.push(args.push_to_hub, *last)


def finish(job: Job) -> dict[str, float]:
    """Evaluate the saved models; print and write the results.

    Returns:
        Top-1, in [0, 1], of the last epoch by split.

    Raises:
        InputError: a model is missing, or the results cannot be written or uploaded.
    """
    results = evaluate_saved(job)
    print_results(job, results)
    write_results(job, results)
    job.accelerator.print(f"written: {job.args.output}/, with results.json and curves.png")
    return {split: result["top1"] for split, result in results["last"].items()}


def finish_trackers(accelerator) -> None:
    """Let trackers write what they hold; Accelerate's own way would end the process group too."""
    for tracker in accelerator.trackers:
        tracker.finish()
