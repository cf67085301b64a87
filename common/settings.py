"""Settings: flags, recipes and methods; a recipe's keys are the flags' names."""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import yaml
from accelerate.utils import LoggerType
from timm.utils import ParseKwargs

from common.errors import InputError, did_you_mean
from common.methods import METHODS

DEFAULTS = "In parentheses: the default."
CHANNELS_LAST_HELP = "channels innermost in memory (yes if the model has several 2-d convolutions)"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of PIL and timm
# They change no result: not the order of images, nor what is drawn for them.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
WORKERS = min(4, CORES or 1)
WORKERS_HELP = "data loading processes of each process (the machine's cores, at most 4)"
TRACKERS = [name for name in LoggerType.list() if name != "all"]
BOOLEAN = argparse.BooleanOptionalAction

# Flags about one execution of a run. The others are settings: a recipe may hold them, and a resumed
# run must share them but for those that change no result.
NOT_SETTINGS = ("recipe", "overwrite", "resume", "print_config", "dry_run")
INTERVALS = ("checkpoint_interval", "checkpoint_hist", "save_interval")
FREE_ON_RESUME = (
    "output", "workers", "channels_last", "torchcompile", "log_with", "push_to_hub", *INTERVALS
)  # fmt: skip
EMA = {"model_ema_decay": 0.9998, "model_ema_warmup": False}  # defaults, with model_ema alone
# Where a setting's value, or each of its values, must lie.
RANGES = {
    **dict.fromkeys(("batch_size", "device_batch_size", "m", "train_num_samples"), "[1, inf)"),
    **dict.fromkeys(("epochs", "img_size", "perturb_interval", "val_interval"), "[1, inf)"),
    **dict.fromkeys(INTERVALS, "[1, inf)"),
    **dict.fromkeys(("lr", "min_lr", "warmup_lr", "weight_decay", "workers", "freeze"), "[0, inf)"),
    **dict.fromkeys(("rho", "rho_min", "gsam_alpha"), "[0, inf)"),
    **dict.fromkeys(("hflip", "vflip", "reprob"), "[0, 1]"),
    **dict.fromkeys(("momentum", "shrink_perturb", "gamma"), "[0, 1]"),
    **dict.fromkeys(("mixup", "cutmix"), "[0, inf)"),
    **dict.fromkeys(("smoothing", "lam", "model_ema_decay", "label_noise"), "[0, 1)"),
    **dict.fromkeys(("scale", "perturb_fraction", "layer_decay"), "(0, 1]"),
    **dict.fromkeys(("validation_share", "train_share"), "(0, 1)"),
    **dict.fromkeys(("ratio", "clip_grad", "color_jitter"), "(0, inf)"),
    "head_bias": "(-inf, inf)", "seed": "[0, 2147483647]", "crop_pct": "[0.01, 1]",
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """Raises ``InputError`` where argparse would print its usage and exit."""

    def error(self, message):
        raise InputError(message)


class KeyValues(ParseKwargs):
    """timm's KEY=VALUE pairs, with an error for what is none."""

    def __call__(self, parser, namespace, values, option_string=None):
        wrong = [value for value in values if "=" not in value]
        if wrong:
            parser.error(f"{option_string} takes KEY=VALUE, not {wrong[0]!r}")
        super().__call__(parser, namespace, values, option_string)


def parser(description: str, model_help: str, **defaults) -> argparse.ArgumentParser:
    """Flags, which are also the keys of a recipe, with a script's own ``defaults``."""
    p = Parser(description=description, allow_abbrev=False, epilog=DEFAULTS)
    add_execution_flags(p.add_argument)
    add_data_flags(p.add_argument_group("data").add_argument)
    add_model_flags(p.add_argument_group("model and loss").add_argument, model_help)
    add_optimization_flags(p.add_argument_group("optimization").add_argument)
    add_perturbation_flags(p.add_argument_group("perturbation").add_argument)
    add_output_flags(p.add_argument_group("output").add_argument)
    # Given above, Python 3.10 would add these to the help in words of its own.
    p.set_defaults(streaming=False, overwrite=False, **defaults)
    return p


# fmt: off
def add_execution_flags(add):
    """Flags that are no settings, so no recipe holds them."""
    add("--recipe", help="YAML file of settings, on top of its 'base'; flags override it (none)")
    add("--print-config", action="store_true",
        help="print the resolved settings as a recipe and stop (no)")
    add("--dry-run", action="store_true",
        help="try data, model, memory and two updates; write nothing (no)")


def add_data_flags(add):
    """The images, and what is done to them."""
    add("--dataset", default="ILSVRC/imagenet-1k",
        help="'digits', a folder or a Hub dataset (%(default)s)")
    add_hub_flags(add, "(train)", "(validation, else test)")
    add("--img-size", type=int, help="side of the model's input, pixels (the model's own)")
    add("--crop-pct", type=float,
        help="evaluation's centre crop, share of the side (the model's own)")
    add("--interpolation", choices=INTERPOLATIONS, help="of every resize (the model's own)")
    add("--scale", type=float, nargs=2, default=(0.05, 1.0),
        help="training crop's share of the area, from and to (0.05 1)")
    add("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3),
        help="training crop's width over height, from and to (0.75 1.33)")
    add("--hflip", type=float, default=0.5, help="probability of a horizontal flip (%(default)s)")
    add("--vflip", type=float, default=0.0, help="probability of a vertical flip (%(default)s)")
    add("--aa", metavar="POLICY",
        help="timm's augmentation: rand-m9-mstd0.5, original, augmix-m3-w3, 3a, ... (none)")
    add("--color-jitter", type=float,
        help="strength of random brightness, contrast and saturation (none)")
    add("--reprob", type=float, default=0.0,
        help="probability of erasing a rectangle, with noise (%(default)s)")
    add("--mixup", type=float, default=0.0, help="mixup's alpha; 0: no mixup (%(default)s)")
    add("--cutmix", type=float, default=0.0, help="CutMix's alpha; 0: no CutMix (%(default)s)")
    add("--decoder", choices=["pil", "torchcodec"], default="pil",
        help="of training images; torchcodec, a package, is faster but resizes a bit differently "
             "(%(default)s)")
    add("--workers", type=int, default=WORKERS, help=WORKERS_HELP)
    add("--streaming", action=BOOLEAN, help="read from the Hub as needed, store nothing (no)")
    add("--validation-share", type=float,
        help="share of training images to hold out (the dataset's split)")
    add("--train-share", type=float, help="share of the other training images to train on (all)")
    add("--train-num-samples", type=int,
        help="training images, if a streamed dataset does not say (it does)")
    add("--label-noise", type=float, default=0.0,
        help="share of training images that get another class, for experiments (%(default)s)")


def add_hub_flags(add, train: str | None, held_out: str):
    """What a dataset of the Hub calls its parts, of all scripts that open one.

    ``train`` and ``held_out`` are the splits' usual names, in parentheses; without the first there
    is no flag for it.
    """
    if train:
        add("--train-split", metavar="NAME", help=f"a Hub dataset's training split {train}")
    add("--val-split", metavar="NAME", help=f"its split to validate on {held_out}")
    add("--image-key", metavar="NAME", help="its image column (the only one)")
    add("--label-key", metavar="NAME", help="its label column (label, labels, fine_label, cls)")
    add("--dataset-config", metavar="NAME", help="its configuration (the dataset's default)")


def add_model_flags(add, model_help):
    """The model, its first weights and its loss."""
    add("--model", default="resnet50", help=model_help)
    add("--model-kwargs", nargs="*", action=KeyValues, default={},
        help="KEY=VALUE, timm.create_model's (none)")
    add("--channels-last", action=BOOLEAN, help=CHANNELS_LAST_HELP)
    add("--torchcompile", nargs="?", const="inductor",
        choices=["inductor", "cudagraphs", "aot_eager", "eager"],
        help="torch.compile's backend (no)")
    add("--head-bias", type=float, help="first value of the classifier's biases, a logit (timm's)")
    add("--loss", choices=["ce", "bce"], default="ce",
        help="bce: sigmoids, summed over classes (%(default)s)")
    add("--smoothing", type=float, default=0.0, help="label smoothing, a probability (%(default)s)")


def add_optimization_flags(add):
    """The base optimizer, its schedule and its batches."""
    add("--opt", default="sgd", help="base optimizer, one of timm's (%(default)s)")
    add("--opt-kwargs", nargs="*", action=KeyValues, default={},
        help="KEY=VALUE, the base optimizer's (none)")
    add("--lr", type=float, default=0.1, help="highest learning rate (%(default)s)")
    add("--min-lr", type=float, default=0.0, help="learning rate at the end (%(default)s)")
    add("--warmup-lr", type=float, default=0.0,
        help="learning rate at the start of warm-up (%(default)s)")
    add("--sched", choices=["poly", "cosine", "constant"], default="poly",
        help="how lr falls; poly: linearly (%(default)s)")
    add("--epochs", type=int, default=90,
        help="passes over the data, warm-up included (%(default)s)")
    add("--warmup-epochs", type=int, default=0, help="epochs in which lr rises (%(default)s)")
    add("--momentum", type=float, default=0.9,
        help="of the base optimizer, if it has any (%(default)s)")
    add("--weight-decay", type=float, default=0.0, help="none on biases and norms (%(default)s)")
    add("--layer-decay", type=float,
        help="factor on the learning rate from each layer to the one before it (none)")
    add("--freeze", type=int, default=0,
        help="first epochs in which the classifier alone trains (%(default)s)")
    add("--clip-grad", type=float, help="largest L2 norm of the gradient of an update (none)")
    add("--batch-size", type=int, default=256,
        help="examples of an update, on all processes (%(default)s)")
    add("--device-batch-size", type=int, default=256,
        help="examples that a process loads at once, at most (%(default)s, or m)")
    add("--model-ema", action=BOOLEAN,
        help="also average the weights over the updates, evaluate that and save it (no)")
    add("--model-ema-decay", type=float, help="what an update leaves of the average (0.9998)")
    add("--model-ema-warmup", action=BOOLEAN,
        help="let the decay rise from 0, for short runs (no)")
    add("--shrink-perturb", type=float,
        help="after each update, pull to the first weights by this share, at the highest lr (none)")
    add("--seed", type=int, default=0,
        help="of weights, data order, augmentation and noise (%(default)s)")


def add_perturbation_flags(add):
    """The method and its settings; ``METHODS`` has their defaults."""
    add("--method", choices=METHODS, default="obf",
        help="the perturbation and the step (%(default)s)")
    add("--m", type=int, help="examples that share a perturbation: m-sharpness (the device batch)")
    add("--perturb-fraction", type=float, help="share of the m examples in the ascent pass (1.0)")
    add("--perturb-interval", type=int,
        help="perturb in every K-th update; the others are plain (1)")
    add("--rho", type=float, help="L2 norm of the perturbation, in units of the weights (0.05)")
    add("--rho-min", type=float, help="makes rho follow lr, down to this at min-lr (rho: constant)")
    add("--gamma", type=float, help="OBF: 1 pushes to uniform, 0 only lowers the target (1.0)")
    add("--lam", type=float,
        help="OBF: target's probability up to which gamma does not act (1 / classes)")
    add("--link", choices=["sigmoid", "softmax"],
        help="OBF: from logits to predictions (sigmoid)")
    add("--adaptive", choices=["before", "after", "both"],
        help="ASAM: where |theta| enters (both)")
    add("--gsam-alpha", type=float, help="GSAM: weight of the orthogonal part (0.4)")
    add("--gsam-normalize", action=BOOLEAN, help="GSAM: scale g to unit norm first (no)")


def add_checkpoint_flags(add, **options):
    """Weights in a file, of those scripts that open trained models."""
    add("--checkpoint", metavar="PATH", **options,
        help="weights of the architecture --model: .safetensors, .pth, .pth.tar (none)")
    add("--use-ema", action=BOOLEAN, help="take that file's averaged weights (no)")


def add_output_flags(add):
    """What a run writes, and what it goes on from."""
    add("--output", help="folder of the run (outputs/DATASET-METHOD)")
    add("--overwrite", action=BOOLEAN, help="replace an earlier run in that folder (no)")
    add("--resume",
        help="a checkpoint, or 'auto': the output folder's newest, if there is any (none)")
    add("--checkpoint-interval", type=int, help="updates between checkpoints (an epoch's)")
    add("--checkpoint-hist", type=int, default=2, help="newest checkpoints to keep (%(default)s)")
    add("--val-interval", type=int, default=1, help="epochs between validations (%(default)s)")
    add("--save-interval", type=int,
        help="epochs between models to keep in OUTPUT/epochs (none)")
    add("--log-with", choices=TRACKERS, help="experiment tracker, beside metrics.jsonl (none)")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the final model, with a card (no)")
# fmt: on


def parse(p: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Read the recipe's settings, then the flags, which win.

    Raises:
        InputError: an unknown key (with the nearest valid one), a bad value, or settings that
            contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe, flags = p.parse_known_args(argv)[0].recipe, []
    if recipe:
        flags = as_flags(p, read_recipe(Path(recipe)), f"the recipe {recipe}")
    args, unknown = p.parse_known_args(flags + argv)
    if unknown:
        known = p._option_string_actions
        hint = did_you_mean(unknown[0].split("=")[0], known) or "; --help lists them all"
        raise InputError(f"unknown argument {unknown[0]}{hint}")
    resolve_method(args)
    resolve_ema(args)
    check_values(args)
    args.output = args.output or f"outputs/{Path(args.dataset).name}-{args.method}"
    if args.print_config:
        print(yaml.safe_dump(resolved(args), sort_keys=False), end="")
        raise SystemExit
    check_decoder(args.decoder)
    output = Path(os.path.abspath(args.output))
    check_writable(output)
    if not args.dry_run:
        check_earlier_run(args, output)
    return args


def resolve_method(args) -> None:
    """Give the method's settings their defaults; those of other methods become None.

    Raises:
        InputError: a setting is given that only other methods have.
    """
    _, defaults = METHODS[args.method]
    for key in {key: None for _, others in METHODS.values() for key in others}:
        if getattr(args, key) is None:
            setattr(args, key, defaults.get(key))
        elif key not in defaults:
            users = ", ".join(name for name, (_, others) in METHODS.items() if key in others)
            remedy = f"drop it, or choose --method from {users}"
            raise InputError(f"{key} contradicts method {args.method}: {remedy}")


def resolve_ema(args) -> None:
    """Give the averaged weights' decay its default.

    Raises:
        InputError: a setting of theirs is given, and they are not asked for.
    """
    for key, default in EMA.items():
        if args.model_ema and getattr(args, key) is None:
            setattr(args, key, default)
        elif not args.model_ema and getattr(args, key):
            raise InputError(f"{key} has no effect without model_ema: drop it, or add --model-ema")


def check_values(args) -> None:
    """Check that values lie in their ranges, and do not contradict each other.

    Raises:
        InputError: one does not, or two do.
    """
    check_ranges(args, RANGES)
    for key in ("scale", "ratio"):
        low, high = getattr(args, key)
        if low > high:
            raise InputError(f"{key} is {getattr(args, key)}; give the smaller value first")
    if args.aa and args.color_jitter and "3a" not in args.aa:
        raise InputError(
            f"color_jitter has no effect beside aa {args.aa}, which changes colours itself: drop "
            "one of them"
        )
    if args.train_num_samples and not args.streaming:
        raise InputError("train_num_samples has no effect without streaming: drop it")
    if args.label_noise and args.streaming:
        raise InputError("label_noise does not go with streaming: drop one of them")
    if args.aa and args.decoder == "torchcodec":
        raise InputError("--decoder torchcodec does not go with --aa, which takes PIL's images")
    if not 0 <= args.warmup_epochs < args.epochs:
        between = f"it must lie between 0 and epochs, {args.epochs}"
        raise InputError(f"warmup_epochs is {args.warmup_epochs}; {between}")
    if args.freeze >= args.epochs:
        left = f"leaves no epoch of {args.epochs} to train the rest"
        raise InputError(f"freeze {args.freeze} {left}: lower it")
    for key in ("min_lr", "warmup_lr"):
        if getattr(args, key) > args.lr:
            above = f"above lr, {args.lr}, which is the highest"
            raise InputError(f"{key} is {getattr(args, key)}, {above}: lower {key}")
    if args.rho_min is None:
        return
    if args.rho_min > args.rho or args.min_lr >= args.lr:
        raise InputError(
            f"rho cannot follow lr from ({args.min_lr}, {args.rho_min}) to ({args.lr}, {args.rho}):"
            " choose rho_min in [0, rho] and min_lr below lr, or drop rho_min for a constant rho"
        )


def check_decoder(decoder: str) -> None:
    """Check that the package of ``decoder`` can be loaded.

    Raises:
        InputError: it cannot.
    """
    if decoder != "torchcodec":
        return
    try:
        import torchcodec.decoders  # noqa: F401
    except Exception as error:  # also an OSError or a RuntimeError, of a build for another torch
        reason = " ".join(str(error).split())
        raise InputError(
            "--decoder torchcodec cannot load its package: pip install 'torchcodec>=0.17', for a "
            f"torch without CUDA from the index that torch came from, or drop the flag ({reason})"
        ) from error


def check_writable(output: Path) -> None:
    """Check that the output folder can be written, or else be made, by trying it.

    Raises:
        InputError: it cannot.
    """
    place = next(path for path in (output, *output.parents) if os.path.exists(path))
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        reason = "is a file" if place.is_file() else f"may not be written ({error.strerror})"
        choose = "choose another --output"
        raise InputError(f"cannot write to {output}: {place} {reason}; {choose}") from error


def check_earlier_run(args, output: Path) -> None:
    """Check that an earlier run in the output folder is replaced or continued only if asked to.

    Raises:
        InputError: it is not so.
    """
    resumed, own = Path(args.resume or "/").resolve(), output.resolve() / "checkpoints"
    continues = args.resume == "auto" or own in (resumed, resumed.parent, resumed / "checkpoints")
    if continues and args.overwrite:
        both = f"--resume {args.resume} continues the run that --overwrite would replace"
        raise InputError(f"{both}: drop one of them")
    if output.exists() and not (continues or args.overwrite):
        raise InputError(
            f"{args.output} exists: continue that run with --resume auto, replace it with "
            "--overwrite, or choose another --output"
        )


def check_ranges(args, ranges: dict) -> None:
    """Check that numbers lie in their intervals.

    They are written as "[low, high)"; round brackets exclude the end.

    Raises:
        InputError: one does not, or is not a number.
    """
    for key, interval in ranges.items():
        low, high = (float(end) for end in interval[1:-1].split(","))
        given = getattr(args, key)
        for value in given if isinstance(given, (list, tuple)) else [given]:
            at_low = value == low and interval[0] == "["
            at_high = value == high and interval[-1] == "]"
            if value is not None and not (low < value < high or at_low or at_high):
                raise InputError(f"{key} is {value}; it must lie in {interval}")


def check_once(flag: str, values: list) -> None:
    """Check that a flag names nothing twice, which would count twice.

    Raises:
        InputError: it does.
    """
    for value in values:
        if values.count(value) > 1:
            raise InputError(f"{flag} names {value} twice: drop one")


def make_output(folder: str) -> None:
    """Make the folder of the results, before long work.

    Raises:
        InputError: it cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"cannot write to --output {folder} ({error.strerror})"
        raise InputError(f"{reason}: choose another") from error


def announce_replacement(files: str, old: list[str], new: list[str]) -> None:
    """Say which ``old`` results, of another command in the same folder, the ``new`` ones lack."""
    kept = set(new)
    if others := [key for key in old if key not in kept]:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(
            f"{files} will no longer have {shown}: to keep them in, ask for them too (what is "
            "finished is not done again), or choose another --output"
        )


def resolved(args) -> dict:
    """The settings of a run, as a recipe would hold them."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    return json.loads(json.dumps(settings))  # tuples are lists, also within --opt-kwargs


def shared_on_resume(args) -> dict:
    """The settings that a resumed run must share with the checkpoint's."""
    return {key: value for key, value in resolved(args).items() if key not in FREE_ON_RESUME}


def read_recipe(path: Path, heirs: tuple = ()) -> dict:
    """The settings of a recipe on top of those of its ``base``, a path relative to it.

    Raises:
        InputError: it cannot be read, is no mapping, or is its own base.
    """
    if path.resolve() in heirs:
        raise InputError(f"the recipe {path} is its own base: drop one 'base'")
    try:
        settings = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())  # yaml's has several lines
        raise InputError(f"cannot read the recipe {path}: {reason}") from error
    if not isinstance(settings, dict):
        mapping = "must be a mapping of settings, KEY: VALUE"
        raise InputError(f"the recipe {path} {mapping}; it is {settings!r}")
    base = settings.pop("base", None)
    if base is None:
        return settings
    return read_recipe(path.parent / str(base), (*heirs, path.resolve())) | settings


def as_flags(p: argparse.ArgumentParser, settings: dict, where: str) -> list[str]:
    """Settings, found ``where``, as flags, so that argparse checks them alike.

    Raises:
        InputError: an unknown key, with the nearest one.
    """
    no_keys, flags = ("help", *NOT_SETTINGS), []
    actions = {action.dest: action for action in p._actions if action.dest not in no_keys}
    for key, value in settings.items():
        if key not in actions:
            raise InputError(f"{where} has an unknown key {key!r}{did_you_mean(key, actions)}")
        flag = f"--{key.replace('_', '-')}"
        if isinstance(actions[key], BOOLEAN) and isinstance(value, bool):
            flags.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, list):
            flags += [flag, *map(str, value)]
        elif isinstance(value, dict):
            flags += [flag, *(f"{name}={entry}" for name, entry in value.items())]
        elif value is not None:
            flags.append(f"{flag}={value}")
    return flags
