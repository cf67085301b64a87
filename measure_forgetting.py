"""Measure what perturbations make trained models forget, and how sharp the models are.

Of both it says how well they go with generalisation.
"""

import argparse
import collections
import csv
import datetime
import hashlib
import itertools
import json
import math
import warnings
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
import yaml
from accelerate import Accelerator, InitProcessGroupKwargs
from sklearn.model_selection import train_test_split
from timm.data import resolve_data_config
from timm.layers import set_fused_attn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

from common import allocator, build, checkpoints, data, folders, loaders, progress, settings
from common.device import announce
from common.errors import WORKER_REMEDY, InputError, clear_errors
from common.folders import class_name, some
from common.methods import METHODS
from common.report import pairs
from forgetting import conditional_entropy, forgetting, label_patterns
from robustness import features, flatness, rank_correlations, report, sharpness
from robustness.rank_correlations import MIN_RUNS
from sam_obf import SAM

SATURATED = 0.95  # of the bits that there can be
LINKS = {"ce": "softmax", "bce": "sigmoid"}  # in which a loss makes predictions from logits
KEPT = 2**30  # bytes of normalised images that are kept; more are made anew for each perturbation
HESSIAN_BATCH = 128  # at most: second derivatives take more memory, and on a CPU this is fastest
# Of adaptive sharpness: Andriushchenko et al. 2023 take as many images and examples that share a
# perturbation, and 20 steps. In five the loss rises by 98 % of what it does in 60, on CIFAR-10.
SHARPNESS_IMAGES, SHARPNESS_M, STEPS, DRAWS = 1024, 128, 5, 5


def parser() -> settings.Parser:
    """The flags."""
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=settings.DEFAULTS)
    optional = argparse.BooleanOptionalAction
    text = "output folders, trained with --save-interval (required)"
    p.add_argument("--runs", nargs="+", required=True, help=text)
    text = "which saved models of each run, by their epochs (all)"
    p.add_argument("--epochs", nargs="+", type=int, help=text)
    g = p.add_argument_group("perturbations")
    kinds = ["own", "sam", "obf", "random"]
    options = {"default": kinds[1:], "help": "own: the run's (sam obf random)"}
    g.add_argument("--perturbations", nargs="+", choices=kinds, **options)
    text = (
        "L2 norm of a perturbation, in units of the weights (the run's, in the last update of an "
        "epoch)"
    )
    g.add_argument("--rho", type=float, help=text)
    text = "examples that share a perturbation (the run's own; 128 for adaptive sharpness)"
    g.add_argument("--m", type=int, help=text)
    text = "OBF: 1 pushes to uniform, 0 only lowers the target (%(default)s)"
    g.add_argument("--gamma", type=float, default=1.0, help=text)
    text = "OBF: target's probability up to which gamma does not act (1 / classes)"
    g.add_argument("--lam", type=float, help=text)
    text = "perturbations to average over (%(default)s)"
    g.add_argument("--micro-batches", type=int, default=16, help=text)
    g = p.add_argument_group("measurement")
    thresholds = [i / 20 for i in range(1, 20)]
    options = {"default": thresholds, "help": "of predictions, probabilities (0.05 0.10 ... 0.95)"}
    g.add_argument("--thresholds", nargs="+", type=float, **options)
    text = "from logits to predictions (softmax if the run's loss is ce, sigmoid if bce)"
    g.add_argument("--link", choices=["sigmoid", "softmax"], help=text)
    g.add_argument("--miller-madow", action="store_true", help="correct the entropies' bias (no)")
    text = (
        "thresholds of the perturbed model at which it predicts as many labels, not the same ones "
        "(yes)"
    )
    g.add_argument("--adjust-thresholds", action=optional, default=True, help=text)
    text = "labelled images to measure on: train, test, ... (%(default)s)"
    g.add_argument("--split", default="train", help=text)
    text = "of these images, all classes alike (%(default)s)"
    g.add_argument("--examples", type=int, default=8192, help=text)
    text = "how many of them for lambda_max and the trace (%(default)s)"
    g.add_argument("--hessian-examples", type=int, default=2048, help=text)
    text = "average-case sharpness: a weight's noise, in units of the weight (%(default)s)"
    g.add_argument("--average-rho", type=float, default=0.1, help=text)
    text = "worst-case sharpness: how far a weight may move, in units of it (%(default)s)"
    g.add_argument("--worst-rho", type=float, default=0.002, help=text)
    g.add_argument("--batch-size", type=int, default=256, help="images at once (%(default)s)")
    g.add_argument("--workers", type=int, default=settings.WORKERS, help=settings.WORKERS_HELP)
    g.add_argument("--channels-last", action=optional, help=settings.CHANNELS_LAST_HELP)
    text = "of the choice of images, and the tests of tau (%(default)s)"
    g.add_argument("--seed", type=int, default=0, help=text)
    text = "folder of the results (%(default)s)"
    p.add_argument("--output", default="outputs/forgetting", help=text)
    return p


def parse(argv=None):
    """Read and check the flags.

    Raises:
        InputError: a flag or its value is wrong.
    """
    args = parser().parse_args(argv)
    ranges = {"thresholds": "(0, 1)"}
    ranges |= dict.fromkeys(("micro_batches", "examples", "hessian_examples"), "[1, inf)")
    for key in ("rho", "m", "gamma", "lam", "batch_size", "workers", "seed"):
        ranges[key] = settings.RANGES[key]
    ranges |= dict.fromkeys(("average_rho", "worst_rho"), settings.RANGES["rho"])
    settings.check_ranges(args, ranges)
    settings.check_once("--runs", [Path(folder).expanduser().resolve() for folder in args.runs])
    for key in ("perturbations", "thresholds", "epochs"):
        settings.check_once(f"--{key}", getattr(args, key) or [])
    return args


def read_run(folder: Path, wanted: list[int] | None = None) -> dict:
    """A finished run.

    Args:
        wanted: epochs; without it all that were saved.

    Returns:
        Its ``folder``, its ``settings``, ``epochs``, folders of models, the last one's ``accuracy``
        on test, or on validation where there are no test images, and ``label_names``.

    Raises:
        InputError: it is no run, is not finished, or has not saved any, or a wanted, epoch.
    """
    try:
        run = argparse.Namespace(**yaml.safe_load((folder / "settings.yaml").read_text()))
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{folder} is no output folder of a run: cannot read its settings.yaml ({error})"
        ) from error
    try:
        results = json.loads((folder / "results.json").read_text())["last"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"the run {folder} is not finished: go on with --resume auto ({error!r})"
        ) from error
    epochs = sorted(path.parent for path in folder.glob("epochs/*/config.json"))
    if not epochs:
        raise InputError(
            f"the run {folder} has no saved epochs: train it with --save-interval EPOCHS"
        )
    saved = [int(epoch.name) for epoch in epochs]
    for epoch in wanted or []:
        if epoch not in saved:
            raise InputError(
                f"--epochs {epoch}: the run {folder} saved {', '.join(map(str, saved))}"
            )
    config = json.loads((epochs[0] / "config.json").read_text())
    names = [class_name(name) for name in config.get("label_names") or []]
    outputs = config["num_classes"]
    return {
        "folder": folder,
        "settings": run,
        "accuracy": results["test" if "test" in results else "validation"],
        "epochs": [path for path, epoch in zip(epochs, saved) if not wanted or epoch in wanted],
        "label_names": names if len(names) == outputs else list(map(str, range(outputs))),
    }


def check_alike(runs):
    """Check that runs can be compared.

    Raises:
        InputError: they differ in their training images or classes.
    """
    names = vars(data.NO_NAMES)
    for run in runs[1:]:
        for key in ("dataset", "validation_share", "train_share", *names):
            first, other = (vars(r["settings"]).get(key) for r in (runs[0], run))
            if first != other:
                raise _differ(key, runs[0], first, run, other)
        first, other = (r["label_names"] for r in (runs[0], run))
        if first != other:
            raise _differ("classes", runs[0], describe(first), run, describe(other))


def _differ(what, first_run, first, other_run, other):
    return InputError(
        f"runs must share their {what}: {first_run['folder']} has {first} and "
        f"{other_run['folder']} has {other}: measure them apart"
    )


def describe(names):
    """How many class names there are, and the first of them."""
    return f"{len(names)} ({some(names)})"


def check_classes(run, split):
    """Check that a run's outputs are the classes of the images, in their order.

    Raises:
        InputError: the dataset was changed since.
    """
    trained, present = run["label_names"], split.features["label"].names
    if trained != present:
        raise InputError(
            f"the run {run['folder']} was trained on the classes {describe(trained)}, and "
            f"{run['settings'].dataset!r} has {describe(present)} now: measure it on the dataset "
            f"as it was"
        )


def rho_at(run_settings, epoch: int, images: int):
    """The rho of a run's last update in ``epoch``, from 1; None if it had no rho.

    ``images`` is how many it was trained on.
    """
    if run_settings.rho_min is None:
        return run_settings.rho
    steps = images // run_settings.batch_size
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], run_settings.lr)
    build.build_schedule(run_settings, optimizer, steps)(epoch * steps - 1)
    return optimizer.param_groups[0]["rho"]


def perturbations(args, run, rho) -> dict[str, argparse.Namespace]:
    """The settings of each perturbation to measure on a run.

    Args:
        rho: the run's own, which holds unless one is given.

    Raises:
        InputError: the run does not say its rho or m, and none is given; or its own perturbation is
            its momentum's.
    """
    trained, settings_by_kind = run["settings"], {}
    for kind in args.perturbations:
        if kind == "own" and METHODS[trained.method][0] is None:
            continue
        if kind == "own" and trained.method == "momentum":
            raise InputError(
                f"the run {run['folder']} has no momentum saved to perturb along: measure sam, obf "
                f"or random"
            )
        changes = {"rho": rho if args.rho is None else args.rho, "m": args.m or trained.m}
        if changes["rho"] is None:
            raise InputError(
                f"the run {run['folder']} has no rho, as it was trained with method base: give "
                f"--rho"
            )
        if changes["m"] is None:
            raise InputError(
                f"the run {run['folder']} does not say its m, which its processes made: give --m"
            )
        if kind != "own":
            of_obf = {"gamma": args.gamma, "lam": args.lam, "link": trained.link or "sigmoid"}
            changes |= {"method": kind, "perturb_fraction": 1.0}
            changes |= of_obf if kind == "obf" else dict.fromkeys(of_obf)
        settings_by_kind[kind] = argparse.Namespace(**vars(trained) | changes)
    return settings_by_kind


def check_perturbations(args, accelerator, runs):
    """Check what is to be measured, and say where "own" is left out.

    Raises:
        InputError: as ``perturbations``, or nothing can be measured on a run.
    """
    without = []
    for run in runs:
        found = perturbations(args, run, run["settings"].rho)
        if not found:
            raise InputError(
                f"the run {run['folder']} was trained with method base, which has no perturbation "
                f"of its own: leave it out, or give --perturbations sam"
            )
        without += [str(run["folder"])] if len(found) < len(set(args.perturbations)) else []
    if without:
        accelerator.print(f"own: without {some(without)}, as base makes no perturbation")


def choose_images(args, split):
    """Images to measure on, undecoded, with all classes in the proportions of the split.

    Raises:
        InputError: a class has no images, or so few that none might be chosen.
    """
    labels, names = np.asarray(split["label"]), split.features["label"].names
    classes, counts = len(names), np.bincount(labels, minlength=len(names))
    if missing := [names[i] for i in np.flatnonzero(counts == 0)]:
        raise InputError(f"there are no images of {some(missing)}: choose another --split")
    least = math.ceil(len(split) / counts.min())
    if args.examples < min(least, len(split)):
        rarest = names[counts.argmin()]
        raise InputError(
            f"--examples {args.examples} cannot hold one of each of {classes} classes in their "
            f"proportions, as {rarest} has {counts.min()} of {len(split)} images: give {least}"
        )
    if args.examples >= len(split):
        args.examples = len(split)
        return split.shuffle(seed=args.seed)
    if len(split) - args.examples < classes:
        raise InputError(
            f"--examples {args.examples} leaves out too few of {len(split)} images: take all of "
            f"them"
        )
    size = {"train_size": args.examples, "test_size": None, "random_state": args.seed}
    return split.select(train_test_split(range(len(split)), stratify=labels, **size)[0])


def revision(split) -> list[str]:
    """Names a split's images, so that what was measured on others is not taken for theirs."""
    files = {folders.on_disk(image["path"]) for image in split["image"] if image["bytes"] is None}
    return [split._fingerprint, folders.revision(sorted(files))]


def read_images(args, accelerator, split, config):
    """The images as a model's evaluation transform makes them, uint8, and their labels.

    Raises:
        InputError: an image cannot be read, or is lost on its way.
    """
    dataset = loaders.Images(split, loaders.evaluation_transform(config))
    workers = min(args.workers, len(split) // loaders.IMAGES_PER_WORKER)
    options = loaders.worker_options(accelerator, workers)
    parts = list(DataLoader(dataset, args.batch_size, **options))
    images, labels = (torch.cat([part[name] for part in parts]) for name in ("image", "label"))
    if len(images) != len(split):
        raise InputError(f"{len(images)} of {len(split)} images were read: {WORKER_REMEDY}")
    return images, labels


def open_batches(args, accelerator, split, model, cache):
    """A function of ``start`` and ``stop``: batches of the model's input, and labels."""
    config = resolve_data_config(model=model)
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    key = str([config[name] for name in keys])
    if key not in cache:
        cache[key] = read_images(args, accelerator, split, config)
    images, labels = cache[key]
    layout, device = loaders.memory_format(args.channels_last, model), accelerator.device
    to_input = loaders.to_input(config, torch.float32, layout)

    def batches(start, stop, size=args.batch_size):
        """Normalised images and labels, on the device, from ``start`` up to ``stop``."""
        examples = TensorDataset(images[start:stop], labels[start:stop])
        return DataLoader(
            examples,
            batch_size=None,
            sampler=BatchSampler(range(len(examples)), size, drop_last=False),
            collate_fn=lambda batch: (to_input(batch[0].to(device)), batch[1].to(device)),
        )

    return batches


@torch.no_grad()
def logits_of(model, batches):
    """Logits (examples, classes) in float64: in single precision many confident predictions are 1.

    Raises:
        ValueError: they are not finite.
    """
    logits = torch.cat([model(images) for images, _ in batches]).double()
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite: leave the run out, or lower --rho")
    return logits


def predictions(logits, link):
    """What a link makes of logits (examples, classes): as many numbers between 0 and 1."""
    return logits.sigmoid() if link == "sigmoid" else logits.softmax(-1)


def all_batches(batches, size):
    """The batches of all images: a list in memory, unless they exceed ``KEPT``."""
    ((image, _),) = batches(0, 1)
    everything = batches(0, size)
    return list(everything) if image.nbytes * size <= KEPT else everything


def measure(args, run, epoch: int, model, batches) -> dict:
    """All that is measured on one model, saved after ``epoch``.

    Args:
        batches: returns batches of the ``args.examples`` images and labels, from ``open_batches``.

    Returns:
        Of the model: ``link``; ``information``, in bits at each threshold; ``measured_accuracy``
        and ``measured_loss``, by the run's own loss; ``feature_rank``; and what ``curvature`` and
        ``adaptive_sharpness`` return. ``perturbations`` has by name what ``perturb`` returns.

    Raises:
        ValueError: its logits or its curvature are not finite.
    """
    model.eval().requires_grad_()
    trained, size = run["settings"], args.examples
    criterion, link = build.build_criterion(trained), args.link or LINKS[trained.loss]
    everything = all_batches(batches, size)
    labels = torch.cat([y for _, y in everything])
    with features.recorded(classifier_of(model)) as seen:
        logits = logits_of(model, everything)
    clean = predictions(logits, link)
    thresholds = torch.tensor(args.thresholds, dtype=torch.float64)
    options = {"miller_madow": args.miller_madow}
    information = conditional_entropy(label_patterns(clean, thresholds), labels, **options)
    result = {
        "link": link,
        "information": information.tolist(),
        "measured_accuracy": (clean.argmax(-1) == labels).double().mean().item(),
        "measured_loss": criterion(logits, labels).item(),
        "feature_rank": features.rank(torch.cat(seen).flatten(1)),
        **curvature(args, model, criterion, batches),
        **adaptive_sharpness(args, model, batches),
        "perturbations": {},
    }

    def forgotten():
        """What the model forgets with its weights as they are, beside ``clean``."""
        perturbed, adjust = predictions(logits_of(model, everything), link), args.adjust_thresholds
        return forgetting([(clean, perturbed, labels)], thresholds, adjust=adjust, **options)

    kinds = perturbations(args, run, rho_at(trained, epoch, run["images"]))
    for kind, changed in kinds.items():
        # The own perturbation of a run with SAM is steepest ascent.
        twin = next((done for done in result["perturbations"] if kinds[done] == changed), None)
        if twin:
            result["perturbations"][kind] = result["perturbations"][twin]
            continue
        torch.manual_seed(args.seed)
        averages = perturb(args, changed, model, criterion, batches, forgotten)
        result["perturbations"][kind] = {"rho": changed.rho, "m": changed.m, **averages}
    return result


def classifier_of(model):
    """The layer that makes logits of features; the first of several, as distilled models have."""
    classifier = model.get_classifier()
    return classifier[0] if isinstance(classifier, tuple) else classifier


def curvature(args, model, criterion, batches) -> dict:
    """``flatness.curvature`` of the run's own loss."""
    examples = min(args.hessian_examples, args.examples)

    def small_batches(start, stop):
        return batches(start, stop, min(args.batch_size, HESSIAN_BATCH))

    return flatness.curvature(model, criterion, small_batches, examples, args.seed)


def adaptive_sharpness(args, model, batches) -> dict:
    """Adaptive sharpness of the model, averaged over micro-batches: see ``sharpness``.

    The micro-batches and the noise are the same for all models.

    Returns:
        ``average_sharpness`` and ``worst_sharpness``, in units of the loss; and with ``_se`` their
        standard errors over micro-batches.
    """
    m = min(args.m or SHARPNESS_M, args.examples)
    count = max(1, min(SHARPNESS_IMAGES, args.examples) // m)
    params = list(model.parameters())
    generator = torch.Generator(params[0].device).manual_seed(args.seed)
    rises = {"average_sharpness": [], "worst_sharpness": []}
    for x, y in batches(0, count * m, m):
        loss = sharpness.loss_of(model, x, y)
        average = sharpness.average_case(params, loss, args.average_rho, DRAWS, generator)
        rises["average_sharpness"].append(average)
        rises["worst_sharpness"].append(sharpness.worst_case(params, loss, args.worst_rho, STEPS))
    return mean_and_error({key: torch.tensor(values) for key, values in rises.items()})


def perturb(args, changed, model, criterion, batches, forgotten) -> dict:
    """What a perturbation with the settings ``changed`` does, averaged over micro-batches.

    Args:
        forgotten: returns what the model forgets with its weights as they are: ``forgetting``'s.

    Returns:
        ``forgetting``, in bits; ``relevant_change`` of I(Y; Y_tau), in bits; ``sam_gap``, by how
        much the micro-batch's loss grows; with ``_se`` their standard errors over micro-batches,
        None for a single one; and ``by_threshold``, what forgetting is the mean of.
    """
    adaptive = changed.adaptive if "adaptive" in METHODS[changed.method][1] else None
    optimizer = SAM(torch.optim.SGD(model.parameters()), model, changed.rho, adaptive=adaptive)
    objective = build.build_objective(changed, criterion, optimizer)
    part = build.ascending(changed, changed.m)
    measures = []
    warnings.filterwarnings("ignore", "the block left no gradient")  # these blocks only look
    whole = args.examples // changed.m * changed.m
    for x, y in itertools.islice(batches(0, whole, changed.m), args.micro_batches):
        with torch.no_grad():
            before = criterion(model(x), y)
        with optimizer.perturbed(lambda: objective(model, x[:part], y[:part])), torch.no_grad():
            gap = criterion(model(x), y) - before
            info = forgotten()
        lost = info["information"] - info["information_perturbed"]
        gained = info["relevant_perturbed"] - info["relevant"]
        measures.append({"by_threshold": lost, "relevant_change": gained.mean(), "sam_gap": gap})
    values = {key: torch.stack([m[key].double() for m in measures]) for key in measures[0]}
    by_threshold = values.pop("by_threshold")
    values["forgetting"] = by_threshold.mean(1)
    return {"by_threshold": by_threshold.mean(0).tolist(), **mean_and_error(values)}


def mean_and_error(values: dict[str, torch.Tensor]) -> dict:
    """The mean of each (n,), and under the name with ``_se`` its standard error."""
    averages = {}
    for key, of_micro_batches in values.items():
        averages[key] = of_micro_batches.mean().item()
        averages[f"{key}_se"] = flatness.standard_error(of_micro_batches)
    return averages


def measure_all(args, accelerator, runs, split):
    """Measure every saved epoch of every run, on all processes together.

    Finished measurements are read from disk.

    Returns:
        Runs, epochs and records.
    """
    tasks = [(run, epoch) for run in runs for epoch in run["epochs"]]
    cache, hidden, images = {}, not accelerator.is_main_process, revision(split)
    with (
        accelerator.split_between_processes(tasks) as share,
        progress.bar("measuring", total=len(share), unit="model", disable=hidden) as bar,
    ):
        for run, epoch in share:
            model = checkpoints.open_model(str(epoch))
            layout = loaders.memory_format(args.channels_last, model)
            request = request_of(args, run, epoch, images, loaders.format_name(layout))
            if not is_measured(record_file(args, epoch), request):
                model = model.to(accelerator.device, memory_format=layout)
                batches = open_batches(args, accelerator, split, model, cache)
                try:
                    measured = measure(args, run, int(epoch.name), model, batches)
                except (ValueError, NotImplementedError) as error:  # torch lacks a derivative
                    raise InputError(f"cannot measure {epoch}: {error}") from error
                record = json.dumps({"request": request, **measured}, indent=2)
                checkpoints.write_whole(record_file(args, epoch), f"{record}\n")
            bar.update()
    accelerator.wait_for_everyone()
    records = [json.loads(record_file(args, epoch).read_text()) for _, epoch in tasks]
    return [(run, epoch, record) for (run, epoch), record in zip(tasks, records)]


def request_of(args, run, epoch, images, memory_format):
    """All that a measurement depends on, as JSON has it."""
    left_out = ("runs", "epochs", "output", "workers", "batch_size", "channels_last")
    weights = (epoch / "model.safetensors").stat()
    return {
        "model": str(epoch),
        "weights": [weights.st_size, weights.st_mtime_ns],
        **{key: value for key, value in vars(args).items() if key not in left_out},
        "run": vars(run["settings"]),
        "training_images": run["images"],
        "images": images,
        "versions": {module.__name__: module.__version__ for module in (torch, timm)},
        "memory_format": memory_format,  # the noise of random is drawn in memory's order
    }


def is_measured(file, request) -> bool:
    """Whether there is a finished measurement of the same."""
    return file.exists() and json.loads(file.read_text())["request"] == request


def saturated(measured, thresholds, labels) -> list[float]:
    """The thresholds at which nearly every image has a pattern of its own in some model.

    None can be forgotten there: I(X; Y_tau | Y) is above ``SATURATED`` of the most that it can be.
    """
    counts = np.bincount(labels)
    counts = counts[counts > 0]
    most = np.sum(counts * np.log2(counts)) / len(labels)
    highest = np.max([record["information"] for *_, record in measured], 0)
    limit = SATURATED * most
    return [threshold for threshold, bits in zip(thresholds, highest) if bits > limit]


def record_file(args, epoch):
    """Where the measurements of a saved epoch are kept."""
    name = hashlib.sha256(str(epoch.resolve()).encode()).hexdigest()[:16]
    return Path(args.output) / "measurements" / f"{name}.json"


def row_name(run, epoch, perturbation) -> str:
    """What the user is told of a row of the table."""
    return f"{Path(run).resolve()} after epoch {int(epoch)} ({perturbation})"


def earlier_rows(output) -> list[str]:
    """The rows of the table that is in the folder already."""
    try:
        with (output / "measurements.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [row_name(row["run"], row["epoch"], row["perturbation"]) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []


def table_of(measured) -> list[dict]:
    """One row for each run, epoch and perturbation.

    ``setting`` is what runs differ in, but for their seeds.
    """
    trained = {run["folder"]: settings.shared_on_resume(run["settings"]) for run, *_ in measured}
    keys = dict.fromkeys(key for run in trained.values() for key in run if key != "seed")
    first = next(iter(trained.values()))
    varied = [key for key in keys if any(r.get(key) != first.get(key) for r in trained.values())]
    rows = []
    for run, epoch, record in measured:
        shared = trained[run["folder"]]
        setting = pairs({key: shared.get(key) for key in varied})
        row = {"run": str(run["folder"]), "setting": setting, "seed": shared["seed"]}
        row |= {"method": shared["method"], "trained_m": shared["m"], "trained_rho": shared["rho"]}
        for kind, values in record["perturbations"].items():
            measures = {key: value for key, value in values.items() if key != "by_threshold"}
            own = {"request", "perturbations", "information"}
            measures |= {key: value for key, value in record.items() if key not in own}
            measures["information"] = float(np.mean(record["information"]))
            which = {"epoch": int(epoch.name), "perturbation": kind}
            rows.append({**row, **which, **measures, "accuracy": run["accuracy"]})
    return rows


def open_images(args, accelerator, runs):
    """The images to measure on; how many each run was trained on becomes its ``images``.

    Raises:
        InputError: they are not there, are too few, or not of the runs' classes.
    """
    shared = runs[0]["settings"]
    shares = {"validation_share": shared.validation_share, "train_share": shared.train_share}
    splits = data.load(shared.dataset, **shares, names=data.Names.of(shared))
    if args.split not in splits:
        raise InputError(
            f"{shared.dataset!r} has no split {args.split!r}: choose --split {' or '.join(splits)}"
        )
    noisy = {getattr(run["settings"], "label_noise", 0) for run in runs} != {0}
    if noisy and args.split == "train":
        accelerator.print("the labels are those of the dataset, without the runs' label_noise")
    split = choose_images(args, splits[args.split])
    for run in runs:
        check_classes(run, split)
        trained = run["settings"]
        run["images"] = (trained.streaming and trained.train_num_samples) or len(splits["train"])
        for kind, changed in perturbations(args, run, trained.rho).items():
            possible = args.examples // changed.m
            if not possible:
                raise InputError(
                    f"{args.examples} images hold no micro-batch of m {changed.m}: raise --examples"
                )
            if possible < args.micro_batches:
                accelerator.print(
                    f"{run['folder']}, {kind}: {possible} perturbations, as m is {changed.m}"
                )
    return split


def announce_lost_rows(args, runs, output):
    """Say which rows of an earlier table will be gone."""
    planned = []
    for run in runs:
        for epoch in run["epochs"]:
            for kind in perturbations(args, run, run["settings"].rho):
                planned.append(row_name(run["folder"], epoch.name, kind))
    files = f"{output}/measurements.csv, correlations.json and the pictures"
    settings.announce_replacement(files, earlier_rows(output), planned)


def write_results(args, output, rows, summaries):
    """Write measurements.csv and correlations.json."""
    with (output / "measurements.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    versions = {module.__name__: module.__version__ for module in (torch, timm, datasets)}
    plain = [{key: _plain(value) for key, value in summary.items()} for summary in summaries]
    content = {"correlations": plain, "settings": vars(args), "versions": versions}
    text = json.dumps(content, indent=2, allow_nan=False)
    (output / "correlations.json").write_text(f"{text}\n")


def _plain(value):
    """JSON has no NaN."""
    return None if isinstance(value, float) and math.isnan(value) else value


def link_remark(links) -> str:
    """In which link forgetting was measured."""
    counts = collections.Counter(links)
    if len(counts) == 1:
        return f"forgetting is of {next(iter(counts))} predictions (--link)"
    shares = " and ".join(f"{link} predictions for {count}" for link, count in counts.items())
    return f"forgetting is of {shares} models, as they were trained: give --link to compare them"


def without_last_epoch(runs) -> list[str]:
    """The runs of which another model is measured than the one whose accuracy is known."""
    measured = [(run, int(run["epochs"][-1].name)) for run in runs]
    return [str(run["folder"]) for run, last in measured if last < run["settings"].epochs]


def remarks(args, runs, measured, summaries, labels) -> list[str]:
    """What the user should know about the results."""
    lines = [link_remark(record["link"] for *_, record in measured)]
    if full := saturated(measured, args.thresholds, labels):
        lines.append(
            f"at thresholds {', '.join(map(str, full))} some model predicts labels of their own "
            f"for nearly all images, and what is forgotten cannot be seen: raise --examples, or "
            f"leave these --thresholds out"
        )
    if without := without_last_epoch(runs):
        lines.append(
            f"accuracy is of each run's last epoch, which is not measured of {some(without)}: so "
            f"there is no generalisation gap"
        )
    if not summaries:
        lines.append(
            f"no rank correlation: it needs at least {MIN_RUNS} runs with the same perturbation"
        )
    return lines


def main(argv=None):
    """Run as from the command line; the main process returns the rank correlations."""
    allocator.keep_freed_memory()
    args = parse(argv)
    settings.make_output(args.output)
    # A process may wait for another's models, and derivatives are of float32.
    patience = InitProcessGroupKwargs(timeout=datetime.timedelta(days=7))
    accelerator = Accelerator(mixed_precision="no", kwargs_handlers=[patience])
    announce(accelerator)
    set_fused_attn(False)  # it has no second derivatives
    runs = [read_run(Path(folder).expanduser(), args.epochs) for folder in args.runs]
    check_alike(runs)
    check_perturbations(args, accelerator, runs)
    split = open_images(args, accelerator, runs)
    output = Path(args.output)
    if accelerator.is_main_process:
        announce_lost_rows(args, runs, output)
    measured = measure_all(args, accelerator, runs, split)
    if not accelerator.is_main_process:
        return None
    rows = table_of(measured)
    gap = args.split == "train" and not without_last_epoch(runs)
    summaries = rank_correlations.table(rows, args.seed, gap=gap)
    write_results(args, output, rows, summaries)
    report.show_correlations(summaries)
    for line in remarks(args, runs, measured, summaries, split["label"]):
        print(line)
    report.draw_forgetting(measured, rows, summaries, args.thresholds, output)
    pictures = len(list(output.glob("*.png")))
    print(
        f"\nwritten: {output}/measurements.csv, correlations.json and {pictures} pictures, as png "
        f"and svg"
    )
    return summaries


if __name__ == "__main__":
    with clear_errors():
        main()
