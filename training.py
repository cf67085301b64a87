"""What the training scripts share: the one training loop, evaluation and checkpoints."""

import contextlib
import functools
import json
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from safetensors.torch import load_file
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from tqdm.auto import tqdm

import data
from data import InputError
from sam_obf import SAM, OutputBiasForgetting, proportional_rho, random_perturbation
from settings import METHODS


@contextlib.contextmanager
def clear_errors():
    """End the program with an ``InputError``'s message alone, also when it comes from a data loading process."""
    try:
        yield
    except data.InputError as error:
        raise SystemExit(f"error: {str(error).split('data.InputError: ')[-1].strip()}") from None


class Top1(evaluate.Metric):
    """Top-1 accuracy: the share of ``predictions`` (class indices) equal to ``references``."""

    def _info(self):
        return evaluate.MetricInfo(
            description="Share of examples whose most likely class is the true one.",
            citation="",
            features=datasets.Features({name: datasets.Value("int64") for name in ("predictions", "references")}),
        )

    def _compute(self, predictions, references):
        return {"top1": float(np.mean(np.equal(predictions, references)))}


def evaluate_top1(accelerator, model, loader) -> float:
    """Top-1 accuracy, in [0, 1], of a prepared model on a prepared loader; every process returns it."""
    metric = Top1(keep_in_memory=True)
    model.eval()
    for batch in loader:
        with torch.no_grad():
            predictions = model(batch["image"]).argmax(-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["label"]))
        metric.add_batch(predictions=predictions.cpu(), references=references.cpu())
    return metric.compute()["top1"]


def split_batch(args, processes: int) -> tuple[int, int, int]:
    """Divide ``batch_size``: examples per loader batch, loader batches per update, examples per micro-batch.

    Raises:
        InputError: a number does not divide the next; the message names those that do.
    """
    share, rest = divmod(args.batch_size, processes)
    if rest:
        raise InputError(f"batch_size {args.batch_size} does not split over {processes} processes")
    loaded = args.device_batch_size or share
    m = args.m or loaded
    for name, part, whole_name, whole in (
        ("device_batch_size", loaded, "batch_size per process", share),
        ("m", m, "examples per loader batch", loaded),
    ):
        if whole % part:
            possible = ", ".join(str(i) for i in range(1, whole + 1) if whole % i == 0)
            raise InputError(f"{name} {part} does not divide the {whole} of {whole_name}: choose one of {possible}")
    return loaded, share // loaded, m


def build_objective(args, model, criterion):
    """The scalar that the method's perturbation ascends, as a function of logits and labels; None for method base."""
    ascent, _ = METHODS[args.method]
    if ascent == "obf":
        return OutputBiasForgetting(args.gamma, args.lam, args.link)
    if ascent == "noise":
        return lambda logits, labels: random_perturbation(model.parameters())
    return criterion if ascent == "loss" else None


def build_optimizer(args, model):
    """timm's optimizer, inside SAM unless the method is base."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay, "momentum": args.momentum}
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


def forward_backward(accelerator, model, optimizer, batch, *, objective, criterion, m, share, sync):
    """Leave the gradient of a loader batch in ``.grad``, micro-batch by micro-batch; return its loss (descent pass).

    ``share`` weighs each micro-batch; processes exchange gradients in the last descent pass, and only if ``sync``.
    """
    total = 0.0
    micro_batches = list(zip(batch["image"].split(m), batch["label"].split(m)))
    for i, (images, labels) in enumerate(micro_batches):

        def ascent():
            with accelerator.no_sync(model):
                return objective(model(images), labels)

        # Gradients are exchanged where the forward pass says so: hence the order of the two contexts.
        last = sync and i == len(micro_batches) - 1
        perturbed = contextlib.nullcontext()
        if objective is not None:
            perturbed = optimizer.optimizer.perturbed(ascent, loss_weight=share, grad_scaler=accelerator.scaler)
        with perturbed, contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = criterion(model(images), labels)
            accelerator.backward(loss * share)
        total += loss.detach() / len(micro_batches)
    return total


def train_epoch(args, accelerator, model, optimizer, loader, accumulate, accumulation, schedule, update, bar):
    """Make one epoch's updates, of ``accumulation`` loader batches each, counting from ``update``.

    ``accumulate(batch, sync=...)`` leaves a loader batch's gradient and returns its loss; ``schedule(update)`` sets lr
    and rho. Returns the number of updates made since the start of training, and the epoch's mean loss.
    """
    model.train()
    losses = []
    for i, batch in enumerate(loader):
        if i >= len(loader) // accumulation * accumulation:
            continue  # too few are left for an update
        sync = (i + 1) % accumulation == 0
        losses.append(accumulate(batch, sync=sync))
        if not sync:
            continue
        if args.clip_grad:
            accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
        optimizer.step()
        optimizer.zero_grad()
        if bar.n % 10 == 0:  # reading the loss waits for the device
            group = optimizer.param_groups[0]
            shown = {key: f"{group[key]:.4g}" for key in ("lr", "rho") if key in group}
            bar.set_postfix(loss=f"{losses[-1].item():.3f}", **shown)
        bar.update()
        if not optimizer.step_was_skipped:
            update += 1
            schedule(update)
    return update, accelerator.reduce(torch.stack(losses).mean(), "mean").item()


def train(args, accelerator: Accelerator, splits: datasets.DatasetDict, model: torch.nn.Module) -> dict[str, float]:
    """Train ``model`` on the split train; keep the best on validation; return its top-1 on that and all other splits.

    Writes into ``args.output``: ``settings.yaml``, ``metrics.jsonl`` (a line per epoch), ``results.json`` (top-1 per
    split) and the best model in timm's layout: ``timm.create_model("local-dir:OUTPUT/best", pretrained=True)``.

    Raises:
        InputError: settings that do not fit each other or the data, or an image that cannot be read.
    """
    loaded, accumulation, m = split_batch(args, accelerator.num_processes)
    config = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    config = resolve_data_config(config, model=model)
    train_transform, eval_transform = data.transforms(config, scale=args.scale, ratio=args.ratio, hflip=args.hflip)

    def loader(split, transform, **options):
        images = splits[split].with_transform(data.Images(transform))
        return torch.utils.data.DataLoader(images, loaded, num_workers=args.workers, **options)

    criterion = LabelSmoothingCrossEntropy(args.smoothing)
    if args.loss == "bce":
        criterion = BinaryCrossEntropy(args.smoothing, sum_classes=True)
    try:
        optimizer, objective = build_optimizer(args, model), build_objective(args, model, criterion)
    except (ValueError, AssertionError) as error:
        raise InputError(str(error)) from error
    keep = {"persistent_workers": args.workers > 0}
    model, optimizer, train_loader, validation = accelerator.prepare(
        model,
        optimizer,
        loader("train", train_transform, shuffle=True, drop_last=True, **keep),
        loader("validation", eval_transform, **keep),
    )
    updates_per_epoch = len(train_loader) // accumulation
    if updates_per_epoch < 1:
        raise InputError(f"batch_size {args.batch_size} exceeds the {len(splits['train'])} training images: lower it")
    schedule = build_schedule(args, optimizer, updates_per_epoch)
    accumulate = functools.partial(
        forward_backward,
        accelerator,
        model,
        optimizer,
        objective=objective,
        criterion=criterion,
        m=m,
        share=m / (loaded * accumulation),
    )

    output, main = Path(args.output), accelerator.is_main_process
    if main:
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.yaml").write_text(yaml.safe_dump(vars(args), sort_keys=False))
        (output / "metrics.jsonl").unlink(missing_ok=True)
    # Every process draws augmentations, dropout and random perturbations of its own.
    set_seed(args.seed, device_specific=True)
    best, update = -1.0, 0
    schedule(update)
    with tqdm(total=args.epochs * updates_per_epoch, unit="update", disable=not main, dynamic_ncols=True) as bar:
        for epoch in range(args.epochs):
            bar.set_description(f"epoch {epoch + 1}/{args.epochs}, best {max(best, 0):.1%}")
            train_loader.set_epoch(epoch)
            update, loss = train_epoch(
                args, accelerator, model, optimizer, train_loader, accumulate, accumulation, schedule, update, bar
            )
            top1 = evaluate_top1(accelerator, model, validation)
            if main:
                with (output / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"epoch": epoch, "loss": loss, "validation": top1}) + "\n")
                if top1 > best:
                    save(accelerator.unwrap_model(model), output / "best", args, config, splits)
            best = max(best, top1)

    unwrapped = accelerator.unwrap_model(model)
    if main:
        unwrapped.load_state_dict(load_file(output / "best" / "model.safetensors"))
    broadcast(unwrapped.state_dict())
    results = {}
    for split in splits:
        if split != "train":
            results[split] = evaluate_top1(accelerator, model, accelerator.prepare(loader(split, eval_transform)))
    if main:
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        report(args, splits, results)
    return results


def report(args, splits, results):
    print(f"\nTop-1 accuracy of {args.model} trained with method {args.method}, best epoch on validation")
    print(f"{'split':<12} {'images':>8} {'top-1':>8}")
    for split, top1 in results.items():
        print(f"{split:<12} {len(splits[split]):>8} {top1:>8.2%}")
    print(f"\nThe model: timm.create_model('local-dir:{args.output}/best', pretrained=True)")


def save(model, folder, args, config, splits):
    """Save a model in timm's layout: ``config.json`` and ``model.safetensors``."""
    save_for_hf(
        model,
        folder,
        model_config={"label_names": splits["train"].features["label"].names},
        model_args=args.model_kwargs,
        data_config=config,
        safe_serialization=True,
    )
