"""What the training scripts share: settings, the one training loop, evaluation and checkpoints."""

import argparse
import contextlib
import difflib
import json
import sys
from pathlib import Path

import datasets
import evaluate
import numpy as np
import safetensors.torch
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.data import resolve_data_config
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ParseKwargs
from tqdm.auto import tqdm

import data
from sam_obf import SAM, OutputBiasForgetting, proportional_rho, random_perturbation

# What the perturbation ascends, and the variant of the step.
METHODS = {
    "base": (None, None),
    "sam": ("loss", "sam"),
    "obf": ("obf", "sam"),
    "random": ("noise", "sam"),
    "gsam": ("loss", "gsam"),
    "asam": ("loss", "asam"),
    "gsam+obf": ("obf", "gsam"),
    "asam+obf": ("obf", "asam"),
}
# Settings that only some methods use: giving one to another method is an error.
USED_BY = {
    **dict.fromkeys(("rho", "rho_min"), lambda ascent, variant: variant is not None),
    **dict.fromkeys(("gamma", "lam", "link"), lambda ascent, variant: ascent == "obf"),
    **dict.fromkeys(("gsam_alpha", "gsam_normalize"), lambda ascent, variant: variant == "gsam"),
    "adaptive": lambda ascent, variant: variant == "asam",
}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise data.InputError(message)


def parser(description: str) -> argparse.ArgumentParser:
    """Flags, which are also the keys of a recipe."""
    p = Parser(description=description, allow_abbrev=False)
    boolean = argparse.BooleanOptionalAction
    p.add_argument("--recipe", help="YAML file of settings; flags override it")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="ILSVRC/imagenet-1k", help="'digits', a folder or a Hub dataset (%(default)s)")
    g.add_argument("--img-size", type=int, help="pixels (the model's own)")
    g.add_argument(
        "--crop-pct", type=float, help="centre crop of the evaluation, fraction of the side (the model's own)"
    )
    g.add_argument("--interpolation", help="of the evaluation and training resize (the model's own)")
    g.add_argument("--scale", type=float, nargs=2, default=(0.05, 1.0), help="crop's share of the area (0.05 1)")
    g.add_argument("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="crop's aspect ratio (0.75 1.33)")
    g.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip (%(default)s)")
    g.add_argument("--workers", type=int, default=4, help="data loading processes per process (%(default)s)")
    g = p.add_argument_group("model and loss")
    g.add_argument("--model", default="resnet50", help="timm architecture, trained from scratch (%(default)s)")
    g.add_argument("--model-kwargs", nargs="*", action=ParseKwargs, default={}, help="KEY=VALUE for timm.create_model")
    g.add_argument("--loss", choices=["ce", "bce"], default="ce", help="bce sums over classes (%(default)s)")
    g.add_argument("--smoothing", type=float, default=0.0, help="label smoothing (%(default)s)")
    g = p.add_argument_group("optimization")
    g.add_argument("--opt", default="sgd", help="base optimizer, any of timm's (%(default)s)")
    g.add_argument("--lr", type=float, default=0.1, help="highest learning rate (%(default)s)")
    g.add_argument("--min-lr", type=float, default=0.0, help="lowest, at the end (%(default)s)")
    g.add_argument("--warmup-lr", type=float, default=0.0, help="first, before warm-up (%(default)s)")
    g.add_argument(
        "--sched", choices=["poly", "cosine", "constant"], default="poly", help="poly is linear (%(default)s)"
    )
    g.add_argument("--epochs", type=int, default=90, help="warm-up included (%(default)s)")
    g.add_argument("--warmup-epochs", type=int, default=0, help="(%(default)s)")
    g.add_argument("--momentum", type=float, default=0.9, help="(%(default)s)")
    g.add_argument("--weight-decay", type=float, default=0.0, help="none on biases and norms (%(default)s)")
    g.add_argument("--clip-grad", type=float, help="largest L2 norm of the gradient of an update (none)")
    g.add_argument(
        "--batch-size", type=int, default=256, help="examples of one update, over all processes (%(default)s)"
    )
    g.add_argument("--device-batch-size", type=int, help="examples a process loads at once (all of its share)")
    g.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    g = p.add_argument_group("perturbation")
    g.add_argument("--method", choices=METHODS, default="obf", help="(%(default)s)")
    g.add_argument("--m", type=int, help="examples that share a perturbation: m-sharpness (the device batch)")
    g.add_argument("--rho", type=float, help="L2 norm of the perturbation (0.05)")
    g.add_argument("--rho-min", type=float, help="makes rho follow lr, down to this at min-lr (constant)")
    g.add_argument("--gamma", type=float, help="OBF: 1 pushes to uniform, 0 only lowers the target (1.0)")
    g.add_argument("--lam", type=float, help="OBF: target prediction below which gamma does not act (1 / classes)")
    g.add_argument("--link", choices=["sigmoid", "softmax"], help="OBF: from logits to predictions (sigmoid)")
    g.add_argument("--adaptive", choices=["before", "after", "both"], help="ASAM: where |theta| enters (both)")
    g.add_argument("--gsam-alpha", type=float, help="GSAM: weight of the orthogonal part (0.4)")
    g.add_argument("--gsam-normalize", action=boolean, help="GSAM: scale g to unit norm first (no)")
    g = p.add_argument_group("output")
    g.add_argument("--output", help="folder of the run (outputs/DATASET-METHOD)")
    g.add_argument("--overwrite", action=boolean, default=False, help="replace an earlier run in that folder")
    return p


def parse(p: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Read the recipe's settings, then the flags, which win.

    Raises:
        InputError: an unknown key (with the nearest valid one), a bad value, or settings that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe = p.parse_known_args(argv)[0].recipe
    args = p.parse_args((_recipe_flags(p, recipe) if recipe else []) + argv)
    ascent, variant = METHODS[args.method]
    for key, used in USED_BY.items():
        if getattr(args, key) is not None and not used(ascent, variant):
            users = ", ".join(name for name, method in METHODS.items() if used(*method))
            raise data.InputError(f"{key} contradicts method {args.method}: drop it, or choose --method from {users}")
    for key in ("batch_size", "epochs", "m", "device_batch_size", "img_size"):
        if getattr(args, key) is not None and getattr(args, key) < 1:
            raise data.InputError(f"{key} is {getattr(args, key)}; it must be at least 1")
    if not 0 <= args.warmup_epochs < args.epochs:
        raise data.InputError(f"warmup_epochs is {args.warmup_epochs}; it must lie between 0 and epochs, {args.epochs}")
    if args.rho_min is not None and not args.min_lr < args.lr:
        raise data.InputError(
            f"rho_min needs a learning rate that changes: min_lr {args.min_lr} is not below lr {args.lr}"
        )
    args.output = args.output or f"outputs/{Path(args.dataset).name}-{args.method}"
    if Path(args.output).exists() and not args.overwrite:
        raise data.InputError(f"{args.output} exists: choose another --output, or replace it with --overwrite")
    return args


def _recipe_flags(p, path):
    """The recipe as flags, so that argparse checks it like them."""
    try:
        settings = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise data.InputError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(settings, dict):
        raise data.InputError(f"the recipe {path} must be a mapping of settings, KEY: VALUE; it is {settings!r}")
    actions = {action.dest: action for action in p._actions if action.dest not in ("help", "recipe", "overwrite")}
    flags = []
    for key, value in settings.items():
        if key not in actions:
            nearest = difflib.get_close_matches(str(key), actions, 1, 0.0)[0]
            raise data.InputError(f"the recipe {path} has an unknown key {key!r}: did you mean {nearest!r}?")
        flag = f"--{key.replace('_', '-')}"
        if isinstance(actions[key], argparse.BooleanOptionalAction) and isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif isinstance(value, dict):
            flags += [flag, *(f"{name}={entry}" for name, entry in value.items())]
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags


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
        raise data.InputError(f"batch_size {args.batch_size} does not split over {processes} processes")
    loaded = args.device_batch_size or share
    m = args.m or loaded
    for name, part, whole_name, whole in (
        ("device_batch_size", loaded, "batch_size per process", share),
        ("m", m, "examples per loader batch", loaded),
    ):
        if whole % part:
            possible = ", ".join(str(i) for i in range(1, whole + 1) if whole % i == 0)
            raise data.InputError(
                f"{name} {part} does not divide the {whole} of {whole_name}: choose one of {possible}"
            )
    return loaded, share // loaded, m


def objective(args, params, criterion):
    """The scalar that a method's perturbation ascends, as a function of logits and labels; None for no method."""
    ascent, _ = METHODS[args.method]
    given = {key: getattr(args, key) for key in ("gamma", "lam", "link") if getattr(args, key) is not None}
    return {
        None: None,
        "loss": criterion,
        "obf": OutputBiasForgetting(**given),
        "noise": lambda logits, labels: random_perturbation(params),
    }[ascent]


def build_optimizer(args, model):
    """timm's optimizer, inside SAM unless the method is base.

    Raises:
        InputError: timm does not know the optimizer, or a setting is out of range.
    """
    _, variant = METHODS[args.method]
    options = {}
    if variant == "asam":
        options = {"adaptive": args.adaptive or "both"}
    elif variant == "gsam":
        options = {
            "gsam_alpha": 0.4 if args.gsam_alpha is None else args.gsam_alpha,
            "gsam_normalize": bool(args.gsam_normalize),
        }
    try:
        base = create_optimizer_v2(
            model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum
        )
        return SAM(base, model, 0.05 if args.rho is None else args.rho, **options) if variant else base
    except (ValueError, AssertionError) as error:
        raise data.InputError(f"opt {args.opt}, method {args.method}: {error}") from error


def forward_backward(accelerator, model, optimizer, batch, *, ascend, criterion, m, share, sync):
    """Leave the gradient of a loader batch in ``.grad``, micro-batch by micro-batch; return its loss (descent pass).

    ``share`` weighs each micro-batch; processes exchange gradients in the last descent pass, and only if ``sync``.
    """
    total = 0.0
    micro_batches = list(zip(batch["image"].split(m), batch["label"].split(m)))
    for i, (images, labels) in enumerate(micro_batches):

        def ascent():
            with accelerator.no_sync(model):
                return ascend(model(images), labels)

        # Gradients are exchanged where the forward pass says so: hence the order of the two contexts.
        last = sync and i == len(micro_batches) - 1
        perturbed = contextlib.nullcontext()
        if ascend is not None:
            perturbed = optimizer.optimizer.perturbed(ascent, loss_weight=share, grad_scaler=accelerator.scaler)
        with perturbed, contextlib.nullcontext() if last else accelerator.no_sync(model):
            loss = criterion(model(images), labels)
            accelerator.backward(loss * share)
        total += loss.detach() / len(micro_batches)
    return total


def train(args, accelerator: Accelerator, splits: datasets.DatasetDict, model: torch.nn.Module) -> dict[str, float]:
    """Train ``model`` on the split train; keep the best on validation; return its top-1 on that and all other splits.

    Writes into ``args.output``: ``settings.yaml``, ``metrics.jsonl`` (a line per epoch), ``results.json`` (top-1 per
    split) and the best model in timm's layout, which ``timm.create_model("local-dir:OUTPUT/best")`` opens.

    Raises:
        InputError: settings that do not fit each other or the data, or an image that cannot be read.
    """
    loaded, accumulation, m = split_batch(args, accelerator.num_processes)
    config = resolve_data_config(
        {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}, model=model
    )
    train_transform, eval_transform = data.transforms(config, scale=args.scale, ratio=args.ratio, hflip=args.hflip)

    def loader(split, transform, **options):
        images = splits[split].with_transform(data.Images(transform))
        return torch.utils.data.DataLoader(images, loaded, num_workers=args.workers, **options)

    criterion = LabelSmoothingCrossEntropy(args.smoothing)
    if args.loss == "bce":
        criterion = BinaryCrossEntropy(args.smoothing, sum_classes=True)
    ascend = objective(args, list(model.parameters()), criterion)
    keep = {"persistent_workers": args.workers > 0}
    model, optimizer, train_loader, val_loader = accelerator.prepare(
        model,
        build_optimizer(args, model),
        loader("train", train_transform, shuffle=True, drop_last=True, **keep),
        loader("validation", eval_transform, **keep),
    )
    updates_per_epoch = len(train_loader) // accumulation
    if updates_per_epoch < 1:
        raise data.InputError(f"batch_size {args.batch_size} exceeds the {len(splits['train'])} training images")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        args.sched,
        num_epochs=args.epochs - args.warmup_epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_prefix=True,
        warmup_lr=args.warmup_lr,
        min_lr=args.min_lr,
        decay_rate=1.0,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
    )

    def follow_schedule(update):
        scheduler.step_update(update)
        if args.rho_min is not None:
            proportional_rho(optimizer, rho_min=args.rho_min, rho_max=args.rho, lr_min=args.min_lr, lr_max=args.lr)

    output = Path(args.output)
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        (output / "settings.yaml").write_text(yaml.safe_dump(vars(args), sort_keys=False))
        (output / "metrics.jsonl").unlink(missing_ok=True)
    # Every process draws augmentations, dropout and random perturbations of its own.
    set_seed(args.seed, device_specific=True)
    best, update = -1.0, 0
    follow_schedule(update)
    bar = tqdm(
        total=args.epochs * updates_per_epoch,
        unit="update",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    for epoch in range(args.epochs):
        train_loader.set_epoch(epoch)
        model.train()
        losses = []
        for i, batch in enumerate(train_loader):
            if i >= updates_per_epoch * accumulation:
                continue  # too few are left for an update
            sync = (i + 1) % accumulation == 0
            share = m / loaded / accumulation
            step = {"ascend": ascend, "criterion": criterion, "m": m, "share": share, "sync": sync}
            losses.append(forward_backward(accelerator, model, optimizer, batch, **step))
            if not sync:
                continue
            if args.clip_grad:
                accelerator.clip_grad_norm_(model.parameters(), args.clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            group = optimizer.param_groups[0]
            if update % 10 == 0:  # reading the loss waits for the device
                shown = {key: f"{group[key]:.4g}" for key in ("lr", "rho") if key in group}
                bar.set_postfix(loss=f"{losses[-1].item():.3f}", **shown, val_top1=f"{max(best, 0):.2%}")
            bar.update()
            if not optimizer.step_was_skipped:
                update += 1
                follow_schedule(update)
        loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
        top1 = evaluate_top1(accelerator, model, val_loader)
        if accelerator.is_main_process:
            with (output / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"epoch": epoch, "loss": loss, "lr": group["lr"], "validation": top1}) + "\n")
            if top1 > best:
                save(accelerator.unwrap_model(model), output / "best", args, config, splits)
        best = max(best, top1)
    bar.close()

    accelerator.wait_for_everyone()
    weights = safetensors.torch.load_file(output / "best" / "model.safetensors")
    accelerator.unwrap_model(model).load_state_dict(weights)
    results = {}
    for split in splits:
        if split != "train":
            split_loader = accelerator.prepare(loader(split, eval_transform))
            results[split] = evaluate_top1(accelerator, model, split_loader)
    if accelerator.is_main_process:
        (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        rows = "\n".join(f"{split:<12} {len(splits[split]):>7} {top1:>8.2%}" for split, top1 in results.items())
        print(f"\n{args.method}, best epoch on validation\n{'split':<12} {'images':>7} {'top-1':>8}\n{rows}")
        print(f"\nThe model: timm.create_model('local-dir:{output / 'best'}')")
    return results


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
