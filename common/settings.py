"""Settings: flags, recipes and methods; a recipe's keys are the flags' names."""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import yaml
from accelerate.utils import LoggerType
from timm.utils import ParseKwargs

from common.device import use_fast_kernels  # noqa: F401, for scripts that do not import it from there yet
from common.errors import InputError, clear_errors, did_you_mean, lost_process  # noqa: F401, as above
from common.methods import METHODS

DEFAULTS = "In parentheses: the default."
CHANNELS_LAST_HELP = "channels innermost in memory (yes for models with more than one 2-d convolution)"
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of PIL and timm
# They change no result: not the order of images, nor what is drawn for them.
WORKERS = min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
WORKERS_HELP = "data loading processes of each process (the machine's cores, at most 4)"
TRACKERS = [name for name in LoggerType.list() if name != "all"]
# Flags about one execution of a run; the others are settings, which a recipe may hold and a resumed run must share.
NOT_SETTINGS = ("recipe", "overwrite", "resume", "print_config", "dry_run")
INTERVALS = ("checkpoint_interval", "checkpoint_hist", "save_interval")
FREE_ON_RESUME = ("output", "workers", "channels_last", "torchcompile", *INTERVALS, "log_with", "push_to_hub")
# Where a setting's value, or each of its values, must lie.
RANGES = {
    **dict.fromkeys(("batch_size", "epochs", "m", "device_batch_size", "img_size", *INTERVALS), "[1, inf)"),
    **dict.fromkeys(("lr", "min_lr", "warmup_lr", "weight_decay", "rho", "rho_min", "gsam_alpha"), "[0, inf)"),
    **dict.fromkeys(("hflip", "momentum", "shrink_perturb", "gamma"), "[0, 1]"),
    **dict.fromkeys(("smoothing", "lam"), "[0, 1)"),
    **dict.fromkeys(("scale", "perturb_fraction"), "(0, 1]"),
    **dict.fromkeys(("ratio", "clip_grad"), "(0, inf)"),
    "train_num_samples": "[1, inf)", "perturb_interval": "[1, inf)", "val_interval": "[1, inf)",
    "validation_share": "(0, 1)", "train_share": "(0, 1)", "head_bias": "(-inf, inf)", "workers": "[0, inf)",
    "seed": "[0, 2147483647]", "crop_pct": "[0.01, 1]",
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
    boolean = argparse.BooleanOptionalAction
    p.add_argument("--recipe", help="YAML file of settings, on top of those of its 'base'; flags override it (none)")
    p.add_argument("--print-config", action="store_true", help="print the resolved settings as a recipe and stop (no)")
    p.add_argument("--dry-run", action="store_true", help="try data, model, memory and two updates, write nothing (no)")
    g = p.add_argument_group("data")
    g.add_argument("--dataset", default="ILSVRC/imagenet-1k", help="'digits', a folder or a Hub dataset (%(default)s)")
    g.add_argument("--img-size", type=int, help="side of the model's input, pixels (the model's own)")
    g.add_argument("--crop-pct", type=float, help="evaluation's centre crop, share of the side (the model's own)")
    g.add_argument("--interpolation", choices=INTERPOLATIONS, help="of every resize (the model's own)")
    g.add_argument(
        "--scale", type=float, nargs=2, default=(0.05, 1.0), help="training crop's share of the area (0.05 1)"
    )
    g.add_argument("--ratio", type=float, nargs=2, default=(3 / 4, 4 / 3), help="its width over height (0.75 1.33)")
    g.add_argument("--hflip", type=float, default=0.5, help="probability of a horizontal flip (%(default)s)")
    decoders = "of training images; torchcodec, a package, is faster and resizes a little differently (%(default)s)"
    g.add_argument("--decoder", choices=["pil", "torchcodec"], default="pil", help=decoders)
    g.add_argument("--workers", type=int, default=WORKERS, help=WORKERS_HELP)
    g.add_argument("--streaming", action=boolean, help="read from the Hub as needed, store nothing (no)")
    g.add_argument("--validation-share", type=float, help="share of training images to hold out (the dataset's split)")
    g.add_argument("--train-share", type=float, help="share of the other training images to train on (all)")
    g.add_argument(
        "--train-num-samples", type=int, help="training images, if a streamed dataset does not say (it does)"
    )
    g = p.add_argument_group("model and loss")
    g.add_argument("--model", default="resnet50", help=model_help)
    g.add_argument(
        "--model-kwargs", nargs="*", action=KeyValues, default={}, help="KEY=VALUE, timm.create_model's (none)"
    )
    g.add_argument("--channels-last", action=boolean, help=CHANNELS_LAST_HELP)
    backends = ["inductor", "cudagraphs", "aot_eager", "eager"]
    g.add_argument("--torchcompile", nargs="?", const="inductor", choices=backends, help="torch.compile's backend (no)")
    g.add_argument("--head-bias", type=float, help="first value of the classifier's biases, a logit (timm's)")
    g.add_argument(
        "--loss", choices=["ce", "bce"], default="ce", help="bce: sigmoids, summed over classes (%(default)s)"
    )
    g.add_argument("--smoothing", type=float, default=0.0, help="label smoothing, a probability (%(default)s)")
    g = p.add_argument_group("optimization")
    g.add_argument("--opt", default="sgd", help="base optimizer, one of timm's (%(default)s)")
    g.add_argument(
        "--opt-kwargs", nargs="*", action=KeyValues, default={}, help="KEY=VALUE, the base optimizer's (none)"
    )
    g.add_argument("--lr", type=float, default=0.1, help="highest learning rate (%(default)s)")
    g.add_argument("--min-lr", type=float, default=0.0, help="learning rate at the end (%(default)s)")
    g.add_argument("--warmup-lr", type=float, default=0.0, help="learning rate at the start of warm-up (%(default)s)")
    schedules = ["poly", "cosine", "constant"]
    g.add_argument("--sched", choices=schedules, default="poly", help="how lr falls; poly: linearly (%(default)s)")
    g.add_argument("--epochs", type=int, default=90, help="passes over the data, warm-up included (%(default)s)")
    g.add_argument("--warmup-epochs", type=int, default=0, help="epochs in which lr rises (%(default)s)")
    g.add_argument("--momentum", type=float, default=0.9, help="of the base optimizer, if it has any (%(default)s)")
    g.add_argument("--weight-decay", type=float, default=0.0, help="none on biases and norms (%(default)s)")
    g.add_argument("--clip-grad", type=float, help="largest L2 norm of the gradient of an update (none)")
    g.add_argument("--batch-size", type=int, default=256, help="examples of an update, on all processes (%(default)s)")
    loaded = "examples that a process loads at once, at most (%(default)s, or m)"
    g.add_argument("--device-batch-size", type=int, default=256, help=loaded)
    pull = "pull to the first weights after an update, a share at the highest lr (none)"
    g.add_argument("--shrink-perturb", type=float, help=pull)
    g.add_argument("--seed", type=int, default=0, help="of weights, data order, augmentation and noise (%(default)s)")
    g = p.add_argument_group("perturbation")
    g.add_argument("--method", choices=METHODS, default="obf", help="the perturbation and the step (%(default)s)")
    g.add_argument("--m", type=int, help="examples that share a perturbation: m-sharpness (the device batch)")
    g.add_argument("--perturb-fraction", type=float, help="share of the m examples in the ascent pass (1.0)")
    g.add_argument("--perturb-interval", type=int, help="perturb in every K-th update, plain ones between (1)")
    g.add_argument("--rho", type=float, help="L2 norm of the perturbation, in units of the weights (0.05)")
    g.add_argument("--rho-min", type=float, help="makes rho follow lr, down to this at min-lr (rho: constant)")
    g.add_argument("--gamma", type=float, help="OBF: 1 pushes to uniform, 0 only lowers the target (1.0)")
    g.add_argument("--lam", type=float, help="OBF: target's probability up to which gamma does not act (1 / classes)")
    g.add_argument("--link", choices=["sigmoid", "softmax"], help="OBF: from logits to predictions (sigmoid)")
    g.add_argument("--adaptive", choices=["before", "after", "both"], help="ASAM: where |theta| enters (both)")
    g.add_argument("--gsam-alpha", type=float, help="GSAM: weight of the orthogonal part (0.4)")
    g.add_argument("--gsam-normalize", action=boolean, help="GSAM: scale g to unit norm first (no)")
    g = p.add_argument_group("output")
    g.add_argument("--output", help="folder of the run (outputs/DATASET-METHOD)")
    g.add_argument("--overwrite", action=boolean, help="replace an earlier run in that folder (no)")
    g.add_argument("--resume", help="a checkpoint, or 'auto': the output folder's newest, if there is any (none)")
    g.add_argument("--checkpoint-interval", type=int, help="updates between checkpoints (an epoch's)")
    g.add_argument("--checkpoint-hist", type=int, default=2, help="newest checkpoints to keep (%(default)s)")
    g.add_argument("--val-interval", type=int, default=1, help="epochs between validations (%(default)s)")
    g.add_argument("--save-interval", type=int, help="epochs between models to keep in OUTPUT/epochs (none)")
    g.add_argument("--log-with", choices=TRACKERS, help="experiment tracker, beside metrics.jsonl (none)")
    g.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the final model, with a card (no)")
    # Given above, Python 3.10 would add these to the help in words of its own.
    p.set_defaults(streaming=False, overwrite=False, **defaults)
    return p


def parse(p: argparse.ArgumentParser, argv=None) -> argparse.Namespace:
    """Read the recipe's settings, then the flags, which win.

    Raises:
        InputError: an unknown key (with the nearest valid one), a bad value, or settings that contradict each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    recipe = p.parse_known_args(argv)[0].recipe
    args, unknown = p.parse_known_args(
        (as_flags(p, read_recipe(Path(recipe)), f"the recipe {recipe}") if recipe else []) + argv
    )
    if unknown:
        hint = did_you_mean(unknown[0].split("=")[0], p._option_string_actions) or "; --help lists them all"
        raise InputError(f"unknown argument {unknown[0]}{hint}")
    resolve_method(args)
    check_ranges(args, RANGES)
    for key in ("scale", "ratio"):
        if getattr(args, key)[0] > getattr(args, key)[1]:
            raise InputError(f"{key} is {getattr(args, key)}; give the smaller value first")
    if not 0 <= args.warmup_epochs < args.epochs:
        raise InputError(f"warmup_epochs is {args.warmup_epochs}; it must lie between 0 and epochs, {args.epochs}")
    for key in ("min_lr", "warmup_lr"):
        if getattr(args, key) > args.lr:
            raise InputError(f"{key} is {getattr(args, key)}, above lr, {args.lr}, which is the highest: lower {key}")
    if args.rho_min is not None and not (args.rho_min <= args.rho and args.min_lr < args.lr):
        raise InputError(
            f"rho cannot follow lr from ({args.min_lr}, {args.rho_min}) to ({args.lr}, {args.rho}): choose rho_min in "
            f"[0, rho] and min_lr below lr, or drop rho_min for a constant rho"
        )
    args.output = args.output or f"outputs/{Path(args.dataset).name}-{args.method}"
    if args.print_config:
        print(yaml.safe_dump(resolved(args), sort_keys=False), end="")
        raise SystemExit
    check_decoder(args.decoder)
    if not args.dry_run:
        check_output(args)
    return args


def resolve_method(args) -> None:
    """Set the method's settings that were not given to their defaults, and those of other methods to None.

    Raises:
        InputError: a setting is given that only other methods have.
    """
    _, own = METHODS[args.method]
    for key in {key: None for _, options in METHODS.values() for key in options}:
        if getattr(args, key) is None:
            setattr(args, key, own.get(key))
        elif key not in own:
            users = ", ".join(name for name, (_, options) in METHODS.items() if key in options)
            raise InputError(f"{key} contradicts method {args.method}: drop it, or choose --method from {users}")


def check_decoder(decoder: str) -> None:
    """Check that the package of ``decoder`` can be loaded.

    Raises:
        InputError: it cannot.
    """
    if decoder == "torchcodec":
        try:
            import torchcodec.decoders  # noqa: F401
        except Exception as error:  # also an OSError or a RuntimeError, of a build for another torch
            reason = " ".join(str(error).split())
            raise InputError(
                "--decoder torchcodec cannot load its package: pip install 'torchcodec>=0.17', for a torch without "
                f"CUDA from the index that torch came from, or drop the flag ({reason})"
            ) from error


def check_output(args) -> None:
    """Check that the output folder can be written, and an earlier run there is replaced or continued only if asked.

    Raises:
        InputError: it is not so.
    """
    output = Path(os.path.abspath(args.output))
    place = next(path for path in (output, *output.parents) if os.path.exists(path))
    if not place.is_dir() or not os.access(place, os.W_OK):
        reason = "may not be written" if place.is_dir() else "is a file"
        raise InputError(f"cannot write to {args.output}: {place} {reason}; choose another --output")
    resumed = output if args.resume == "auto" else Path(os.path.abspath(args.resume or "/"))
    own = output in (resumed, *resumed.parents)
    if own and args.overwrite:
        raise InputError(f"--resume {args.resume} continues the run that --overwrite would replace: drop one of them")
    if place == output and not (own or args.overwrite):
        raise InputError(
            f"{args.output} exists: continue that run with --resume auto, replace it with --overwrite, or choose "
            f"another --output"
        )


def check_ranges(args, ranges: dict) -> None:
    """Check that numbers lie in their intervals, written as "[low, high)": round brackets exclude the end.

    Raises:
        InputError: one does not, or is not a number.
    """
    for key, interval in ranges.items():
        low, high = (float(end) for end in interval[1:-1].split(","))
        values = getattr(args, key) if isinstance(getattr(args, key), (list, tuple)) else [getattr(args, key)]
        for value in values:
            at_end = (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")
            if value is not None and not low < value < high and not at_end:
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
        raise InputError(f"cannot write to --output {folder} ({error.strerror}): choose another") from error


def announce_replacement(files: str, old: list[str], new: list[str]) -> None:
    """Say which ``old`` results of another command in the same folder are not among the ``new`` that replace them."""
    kept = set(new)
    if others := [key for key in old if key not in kept]:
        shown = ", ".join(others[:5]) + (", ..." if len(others) > 5 else "")
        print(
            f"{files} will no longer have {shown}: to keep them in, ask for them too (what is finished is not done "
            f"again), or choose another --output"
        )


def resolved(args) -> dict:
    """The settings of a run, as a recipe would hold them."""
    settings = {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}


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
        raise InputError(f"the recipe {path} must be a mapping of settings, KEY: VALUE; it is {settings!r}")
    base = settings.pop("base", None)
    return settings if base is None else read_recipe(path.parent / str(base), (*heirs, path.resolve())) | settings


def as_flags(p: argparse.ArgumentParser, settings: dict, where: str) -> list[str]:
    """Settings, found ``where``, as flags, so that argparse checks them alike.

    Raises:
        InputError: an unknown key, with the nearest one.
    """
    actions = {action.dest: action for action in p._actions if action.dest not in ("help", *NOT_SETTINGS)}
    flags = []
    for key, value in settings.items():
        if key not in actions:
            raise InputError(f"{where} has an unknown key {key!r}{did_you_mean(key, actions)}")
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
