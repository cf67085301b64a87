"""Evaluate classifiers on images of your own, ImageNet and its shifted sets, or the digits."""

import argparse
import contextlib
import csv
import functools
import hashlib
import itertools
import json
import re
from pathlib import Path

import datasets
import numpy as np
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from timm.data import resolve_data_config

from common import allocator, checkpoints, data, loaders, progress, settings
from common.device import announce, use_fast_kernels
from common.errors import WORKER_REMEDY, InputError, clear_errors
from common.folders import some
from robustness import (
    calibration,
    corruptions,
    labels,
    mistakes,
    predictions,
    published,
    report,
    sets,
    statistics,
)  # fmt: skip
from robustness.intervals import over_images
from robustness.sets import Protocol

BENCHMARKS = ("imagenet", "real", "a-clean", "r-clean", "v2", "r", "a", "sketch", "digits")
MAX_UNREADABLE = 1e-3  # of a set's images


def parser() -> settings.Parser:
    """The flags."""
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=settings.DEFAULTS)
    text = "folders of trained models (OUTPUT/best) or timm names (required)"
    p.add_argument("--model", nargs="+", required=True, help=text)
    settings.add_checkpoint_flags(p.add_argument, nargs="+")
    text = "sets to evaluate on (those of --data; without either, says which fit the models)"
    p.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=[], help=text)
    text = (
        "sets of your own, by any name: a folder CLASS/FILE, tar or zip files, or a Hub dataset; "
        "or where a benchmark, or ImageNet-C as c, lies (on the Hub)"
    )
    p.add_argument("--data", nargs="+", metavar="NAME=PLACE", default=[], help=text)
    settings.add_hub_flags(p.add_argument, None, "(validation, else test)")
    text = "evaluate sets that lack classes (no)"
    p.add_argument("--allow-partial", action="store_true", help=text)
    kinds = f"{', '.join(corruptions.CORRUPTIONS)}; each in 3 severities"
    text = f"also evaluate on the images corrupted: {kinds} (no)"
    p.add_argument("--corrupt", action="store_true", help=text)
    text = "side of the model's input, pixels (each model's own: of tests, if that differs)"
    p.add_argument("--img-size", type=int, help=text)
    text = "centre crop, share of the side (each model's own: of tests, if that differs)"
    p.add_argument("--crop-pct", type=float, help=text)
    text = "of the resize (each model's own)"
    p.add_argument("--interpolation", choices=settings.INTERPOLATIONS, help=text)
    text = "images of a process at once (%(default)s)"
    p.add_argument("--batch-size", type=int, default=256, help=text)
    p.add_argument("--workers", type=int, default=settings.WORKERS, help=settings.WORKERS_HELP)
    optional = argparse.BooleanOptionalAction
    p.add_argument("--channels-last", action=optional, help=settings.CHANNELS_LAST_HELP)
    text = "folder of the results (%(default)s)"
    p.add_argument("--output", default="outputs/robustness", help=text)
    text = "write results-BENCHMARK.csv with the columns of timm's (no)"
    p.add_argument("--csv", action="store_true", help=text)
    p.add_argument("--markdown", action="store_true", help="print Markdown tables (no)")
    return p


def parse(argv=None):
    """Read and check the flags; ``--data`` becomes a dictionary, and its names are benchmarks.

    Raises:
        InputError: a flag or its value is wrong.
    """
    args = parser().parse_args(argv)
    name_files(args)
    places = [item.partition("=")[::2] for item in args.data]
    taken = sets.taken_names(args.benchmarks)
    for name, place in places:
        if not re.fullmatch(r"\w[\w-]*", name) or not place:
            raise InputError(
                f"--data {name}={place}: give NAME=PLACE, the name in letters, digits, - and _"
            )
        if name in taken:
            raise InputError(
                f"--data {name}={place}: {name} is a set or a row of its own here: choose another "
                f"name"
            )
    settings.check_once("--data", [name for name, _ in places])
    settings.check_once("--benchmarks", args.benchmarks)
    if {"digits", "sketch"} <= set(args.benchmarks):
        raise InputError("the digits have a row sketch too: give sketch a command of its own")
    args.data = dict(places)
    read = {sets.images_of(benchmark) for benchmark in args.benchmarks}
    args.benchmarks += [name for name in args.data if name not in read]
    if not args.data and (names := data.Names.of(args).given()):
        flag = f"--{next(iter(names)).replace('_', '-')}"
        raise InputError(f"{flag} is about the sets of --data, and there are none: drop it")
    if args.corrupt and "c" in args.data:
        raise InputError(
            "--corrupt does not go with --data c=..., images that are corrupted: make two runs of "
            "them"
        )
    checked = ("batch_size", "img_size", "crop_pct", "workers")
    settings.check_ranges(args, {key: settings.RANGES[key] for key in checked})
    return args


def name_files(args):
    """Call models in files by these: ``args.model`` becomes the files, and ``args.architectures``
    says what each is. Without files that is empty.

    Raises:
        InputError: architectures and files are not as many, or ``--use-ema`` is about no file.
    """
    files, names = args.checkpoint or [], args.model
    if args.use_ema and not files:
        raise InputError("--use-ema has no effect without --checkpoint: drop it")
    if files and len(names) not in (1, len(files)):
        raise InputError(
            f"--checkpoint has {len(files)} files for {len(names)} architectures of --model: give "
            f"one for all of them, or one for each"
        )
    args.architectures = dict(zip(files, names * len(files) if len(names) == 1 else names))
    args.model = files or names


def open_models(args):
    """Each model with its preprocessing, by the name given.

    Raises:
        InputError: one cannot be loaded, is named twice, has not the outputs that the benchmarks
            need, or there are no benchmarks.
    """
    models, names_by_place = {}, {}
    for name in args.model:
        model, config = open_model(args, name)
        place = place_of_model(name, model)
        if place in names_by_place:
            raise InputError(
                f"--model {names_by_place[place]} and {name} are the same model: drop one"
            )
        names_by_place[place] = name
        check_names(name, model)
        for benchmark in args.benchmarks:
            if benchmark in (*BENCHMARKS, *sets.HUB):
                check_fit(name, model, benchmark)
        check_model(name, model, config)
        layout = loaders.memory_format(args.channels_last, model)
        models[name] = (model.to(memory_format=layout), config)
    names_by_folder = {}
    for name in models:
        folder = predictions.folder_of(args.output, name)
        first = names_by_folder.setdefault(folder, name)
        if first != name:
            raise InputError(f"--model {first} and {name} would share {folder}: rename one")
    if not args.benchmarks:
        raise InputError(nothing_to_do({name: model for name, (model, _) in models.items()}))
    return models


def open_model(args, name):
    """A model and its preprocessing.

    timm's own are judged at their size for tests, if they have one, as in timm's validate.py. A
    trained model's folder or file is judged at the size at which it was trained and validated.
    """
    model = open_weights(args, name)
    trained_here = name in args.architectures or folder_of(name) is not None
    wanted = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    wanted = {key: value for key, value in wanted.items() if value is not None}
    config = resolve_data_config(wanted, model=model, use_test_size=not trained_here)
    other = resolve_data_config(wanted, model=model, use_test_size=trained_here)
    if config != other:
        names = ("as trained", "timm's for tests")
        used, unused = names if trained_here else names[::-1]
        PartialState().print(
            f"{name}: evaluated at {size_flags(config)}, {used} ({unused}: {size_flags(other)})"
        )
    size = config["input_size"][-1]
    fixed = model.pretrained_cfg.get("fixed_input_size")
    if fixed and size != model.pretrained_cfg["input_size"][-1]:
        model = open_weights(args, name, size)
    return model, config


def open_weights(args, name, img_size=None):
    """The model of that name, of a file or not, to be evaluated."""
    if name not in args.architectures:
        return checkpoints.open_model(name, img_size=img_size).eval()
    options = {"use_ema": bool(args.use_ema)}
    return checkpoints.open_file(name, args.architectures[name], img_size, **options).eval()


def size_flags(config):
    """The size and crop of a data config, as flags."""
    return f"--img-size {config['input_size'][-1]} --crop-pct {config['crop_pct']:g}"


def folder_of(name) -> Path | None:
    """The folder that a model's name is; None if it is timm's or the Hub's."""
    folder = Path(name.removeprefix("local-dir:")).expanduser()
    return folder if folder.is_dir() else None


def place_of_model(name, model):
    """What tells a model from others, whatever it is called: its folder, or pretrained weights.

    Of a file it is the path.
    """
    place = Path(name.removeprefix("local-dir:")).expanduser()
    if place.exists():
        return place.resolve()
    pretrained = [model.pretrained_cfg.get(key) for key in ("architecture", "hf_hub_id")]
    return tuple(pretrained) if all(pretrained) else name


def check_names(name, model):
    """Check that all outputs of a model have names; say it if they are taken for ImageNet's.

    Raises:
        InputError: they have none, or others than there are outputs.
    """
    names = labels.label_names(model)
    if len(names) != model.num_classes:
        raise InputError(
            f"{name} has {model.num_classes} outputs and {len(names)} label_names: name them all, "
            f"in their order, in its config.json (timm.models.save_for_hf(..., "
            f"model_config={{'label_names': [...]}}))"
        )
    local = folder_of(name) or Path(name).is_file()
    if local and not model.pretrained_cfg.get("label_names"):
        PartialState().print(
            f"{name} has no label_names: its outputs are taken for ImageNet's 1000, in their order"
        )


def check_fit(model_name, model, benchmark, ds=None):
    """Check that each class of a set is one of a model's outputs.

    Raises:
        InputError: it is not so, with some names of both.
    """
    try:
        sets.output_order(sets.images_of(benchmark), ds, labels.label_names(model))
    except InputError as error:
        known = benchmark in sets.HUB
        remedy = "call a set of your own otherwise" if known else "rename its classes"
        raise InputError(
            f"{model_name} cannot be evaluated on {benchmark}: {error}: choose another set, or "
            f"{remedy}"
        ) from error


def nothing_to_do(models):
    """What to evaluate models on, said to one who did not."""
    fitting = []
    for benchmark in BENCHMARKS:
        with contextlib.suppress(InputError):
            for name, model in models.items():
                check_fit(name, model, benchmark)
            fitting.append(benchmark)
    name, model = next(iter(models.items()))
    suggested = f"--benchmarks {' '.join(fitting)}" if fitting else "no --benchmarks"
    return (
        f"nothing to evaluate on: {suggested} would fit, and --data NAME=PLACE, a folder "
        f"CLASS/FILE with classes called as the outputs of {name}: "
        f"{labels.quoted(labels.label_names(model))}"
    )


@torch.no_grad()
def check_model(name, model, config):
    """Try a model on a black image.

    Raises:
        InputError: it does not take images of that size in red, green and blue, does not return
            logits, or they are not finite.
    """
    loaders.evaluation_transform(config, name)
    size = tuple(config["input_size"])
    try:
        logits = model(torch.zeros(1, *size))
    except Exception as error:  # each model fails in its own way
        raise InputError(
            f"{name} does not take images of {size}: {error}; change --img-size"
        ) from error
    if logits.shape != (1, model.num_classes):
        shape = tuple(logits.shape)
        raise InputError(f"{name} returns {shape} for an image, not {model.num_classes} logits")
    if not logits.isfinite().all():
        raise InputError(
            f"{name}: its logits are not finite, even for a black image: leave it out, or train it "
            f"anew"
        )


def stored(ds) -> bool:
    """Whether a set is on this machine, and not streamed."""
    return isinstance(ds, datasets.Dataset)


def check_answers(which, ds, size=1000):
    """Look up the right answers of a stored set's images, which a pass would do only in its turn.

    Raises:
        InputError: an image has none.
    """
    pictures = sets.Pictures(which.name, ds, None, size)
    for rows in ds.iter(size):
        paths = [image["path"] for image in rows["image"]]
        numbers = [pictures.label(label, path) for label, path in zip(rows["label"], paths)]
        for benchmark in which.serves:
            list(labels.right_answers(benchmark, {"label": numbers, "path": paths}))


def predict(accelerator, model, config, which, ds, args):
    """One pass over a set's images.

    Returns:
        ``add_batch``'s columns by protocol, the surest mistakes by protocol, and the names of
        unreadable images.

    Raises:
        InputError: images were lost on their way, or have no right answer.
        FloatingPointError: logits are not finite.
    """
    loader = picture_loader(accelerator, model, config, which, ds, args)
    order = sets.output_order(which.name, ds, labels.label_names(model))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    layout = loaders.memory_format(args.channels_last, model)
    to_input = loaders.to_input(config, torch.float32, layout)
    names = output_names(which.name, ds, model)
    columns, wrong, unreadable, sent, received = {}, mistakes.Mistakes(), [], 0, 0
    total = variants(args) * len(ds) if stored(ds) else None
    hidden = not accelerator.is_main_process
    with progress.bar(str(which), total=total, unit="image", disable=hidden) as bar:
        for batch in loader:
            sent += batch.get("sent", 0)
            received += len(batch["key"]) + len(batch["unreadable"])
            unreadable += batch["unreadable"]
            if batch["key"]:
                logits = finite_logits(accelerator, model, to_input, batch)
                logits = logits if order is None else logits[:, order]
                add_batch(columns, wrong, which, batch, logits, names)
                bar.update(len(batch["key"]) * accelerator.num_processes)
    check_none_lost(which, args, total, sent, received, len(unreadable))
    tables = {p: scale(table) for p, table in merge_processes(which, columns).items()}
    return tables, merge_mistakes(wrong), sorted(gather_object(unreadable))


def picture_loader(accelerator, model, config, which, ds, args):
    """A loader of a set's images for this process."""
    pictures = sets.Pictures(
        which.name, ds, loaders.evaluation_transform(config), args.batch_size,
        label_names=labels.label_names(model), process=accelerator.process_index,
        processes=accelerator.num_processes, corrupt=args.corrupt,
        root=str(Path(which.place(args.data)).expanduser()) if which.corruption else "",
    )  # fmt: skip
    most = variants(args) * len(ds) // loaders.IMAGES_PER_WORKER if stored(ds) else ds.num_shards
    options = loaders.worker_options(accelerator, min(args.workers, most))
    return torch.utils.data.DataLoader(pictures, batch_size=None, collate_fn=collate, **options)


def variants(args) -> int:
    """How often a pass sees each image: as it is, and corrupted if asked to."""
    return 1 + args.corrupt * len(corruptions.CORRUPTIONS) * len(corruptions.SEVERITIES)


def collate(batch):
    """Stack a batch's images; in a worker into shared memory, so that a lack of it is an error."""
    images = torch.utils.data.default_collate(batch["image"]) if batch["image"] else None
    return batch | {"image": images}


@torch.no_grad()
def finite_logits(accelerator, model, to_input, batch):
    """A model's logits of a batch.

    Raises:
        FloatingPointError: they are not finite.
    """
    logits = model(to_input(batch["image"].to(accelerator.device, non_blocking=True)))
    if not logits.isfinite().all():
        row = logits.isfinite().all(-1).long().argmin().item()
        path = batch["path"][row] or "an image"
        raise FloatingPointError(f"the logits of {path} are not finite")
    return logits


def output_names(name, ds, model) -> list[str]:
    """The names of a model's outputs as a pass counts them."""
    names = labels.label_names(model)
    order = sets.output_order(name, ds, names)
    return [labels.readable(names[i]) for i in order or range(len(names))]


def add_batch(columns, wrong, which, batch, logits, names):
    """Append the scores of a batch by protocol, and for images as they are what can be read.

    That are ``file``, ``true`` and ``predicted``, names of classes.
    """
    if max(batch["label"]) >= logits.shape[-1]:
        raise InputError(
            f"{which}: the label {max(batch['label'])} is none of the {logits.shape[-1]} outputs"
        )
    corruption = batch["corruption"] or which.corruption
    severity = batch["severity"] or which.severity
    for benchmark in which.serves:
        for name, outputs, answers in labels.right_answers(benchmark, batch):
            protocol = Protocol(name, corruption, severity)
            scores = columns.setdefault(protocol, {})
            kept = add_scores(scores, logits, outputs, answers, batch["key"], bool(corruption))
            if kept and not batch["corruption"]:
                own_names = names if outputs is None else [names[i] for i in outputs]
                add_names(scores, kept, batch["path"], answers, own_names)
                wrong.add(protocol, batch["image"], kept, scores)


def check_none_lost(which, args, total, sent, received, unreadable):
    """Check that every image of a pass arrived.

    Args:
        total: images of the set in all variants; None if it is streamed.
        sent, received, unreadable: images that this process' loader sent, those that arrived, and
            those of them that could not be read, which have one variant.

    Raises:
        InputError: images are missing.
    """
    counts = gather_object([(sent, received, unreadable)])
    sent, received, unreadable = map(sum, zip(*counts))
    expected = sent if total is None else total - (variants(args) - 1) * unreadable
    if not sent == received == expected:
        raise InputError(
            f"{which}: {received} of {expected} images came to be evaluated, and nothing of this "
            f"pass was saved: {WORKER_REMEDY}"
        )


def add_scores(columns, logits, outputs, answers, keys, corrupted=False) -> list[int]:
    """Append the scores of the images that have a right answer; their places in the batch.

    ``label`` is the right answer, or -1 if there are several. What ``scale`` needs is not kept of
    corrupted images, which are many.
    """
    kept = [i for i, right in enumerate(answers) if right]
    if not kept:
        return kept
    logits = logits[kept] if outputs is None else logits[kept][:, outputs]
    right = torch.zeros(logits.shape, dtype=torch.bool)
    for row, i in enumerate(kept):
        right[row, answers[i]] = True
    right = right.to(logits.device)
    scores = statistics.score(logits, right)
    columns.setdefault("key", []).extend(keys[i] for i in kept)
    only = [answers[i][0] if len(answers[i]) == 1 else -1 for i in kept]
    columns.setdefault("label", []).extend(only)
    for name, values in scores.items():
        columns.setdefault(name, []).extend(values.tolist())
    if not corrupted:
        for name, values in calibration.at_temperatures(logits, right).items():
            columns.setdefault(f"{name}_by_temperature", []).extend(values)
    return kept


def scale(table: dict) -> dict:
    """Replace what ``calibration.at_temperatures`` says by the confidence after scaling."""
    names = [f"{name}_by_temperature" for name in ("confidence", "nll")]
    if set(names) <= table.keys():
        table["scaled"] = calibration.scaled_confidence(*(table.pop(name) for name in names))
    return table


def add_names(columns, kept, files, answers, names):
    """Append for the same images their files, and true and predicted classes by name."""
    true = [" | ".join(names[answer] for answer in answers[i]) for i in kept]
    predictions = columns["prediction"][-len(kept) :]
    columns.setdefault("file", []).extend(files[i] for i in kept)
    columns.setdefault("true", []).extend(true)
    columns.setdefault("predicted", []).extend(names[i] for i in predictions)


def merge_processes(which, columns):
    """The columns of all processes by protocol.

    Raises:
        InputError: no image has a right answer by one of them.
    """
    parts = gather_object([columns])
    protocols = sorted({protocol for part in parts for protocol in part}, key=str)
    tables = {
        protocol: merge([part[protocol] for part in parts if part.get(protocol)])
        for protocol in protocols
    }
    if empty := [protocol for protocol, table in tables.items() if not table]:
        raise InputError(f"{which}: no image has a right answer in {empty[0]}: leave it out")
    return tables


def merge_mistakes(wrong):
    """The surest mistakes of all processes by protocol."""
    by_protocol = {}
    for part in gather_object([wrong.by_protocol]):
        for protocol, found in part.items():
            by_protocol[protocol] = mistakes.surest(by_protocol.get(protocol, []) + found)
    return by_protocol


def merge(parts):
    """The processes' columns as one table, in the order of the keys."""
    if not parts:
        return {}
    table = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    order = np.argsort(table["key"])
    return {name: values[order] for name, values in table.items()}


def check_unreadable(name, tables, unreadable):
    """Let few images be unreadable.

    Raises:
        InputError: they are more than ``MAX_UNREADABLE`` of the set.
    """
    size = max((len(table["key"]) for table in tables.values()), default=0) + len(unreadable)
    if len(unreadable) > MAX_UNREADABLE * size:
        raise InputError(
            f"{name}: {len(unreadable)} of {size} images cannot be read, too many: mend or replace "
            f"{some(unreadable, most=5)}"
        )


def fingerprint(model):
    """A hash of a model's layers, weights and label names."""
    digest = hashlib.sha256(repr((model, labels.label_names(model))).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def request_of(args, accelerator, model_name, weights, config, which, ds, revision):
    """All that the result of a pass depends on, as JSON has it."""
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    request = {
        "model": model_name,
        "weights": weights,
        "benchmarks": which.serves,
        "data": which.place(args.data) or sets.HUB.get(which.name, "digits"),
        "revision": revision,
        "preprocessing": {key: config[key] for key in keys},
        "mean": config["mean"],
        "std": config["std"],
        "precision": accelerator.mixed_precision,
        "corrupt": corruptions.STRENGTHS if args.corrupt else None,
        "versions": {module.__name__: module.__version__ for module in (torch, timm)},
        # A streamed image is known by the loader worker that reads it.
        "stream": None if stored(ds) else [accelerator.num_processes, args.workers],
    }
    if which.name in args.data and (names := data.Names.of(args).given()):
        request["names"] = names
    if which.name not in (*sets.HUB, "digits"):
        request["turned"] = True  # as photographs' Exif tags say
    if which.corruption:
        request["images"] = "by file"  # their places among its own were their keys once
    return json.loads(json.dumps(request))


def evaluate_all(args, accelerator, models, opened):
    """Every model on every pass.

    What was finished before is known to the main process alone, and so is what this returns.

    Args:
        opened: the sets by pass.

    Returns:
        Columns by model and protocol; the classes' names by model and protocol's name; and what to
        say about each pass.

    Raises:
        InputError: images cannot be read, have no right answer, or have logits that are not finite.
    """
    tables, classes, notes, main = {}, {}, {}, accelerator.is_main_process
    revisions = {}
    for which, ds in opened.items() if main else ():
        revisions[which] = sets.revision(which, ds, which.place(args.data))
    for model_name, (model, config) in models.items():
        folder, tables[model_name] = predictions.folder_of(args.output, model_name), {}
        classes[model_name] = {}
        weights = fingerprint(model) if main else None
        for which, ds in opened.items():
            columns, request = None, None
            if main:
                request = request_of(
                    args, accelerator, model_name, weights, config, which, ds, revisions[which]
                )
                columns, record, changed = predictions.finished(folder, which, request)
                why = f": anew, as these have changed since: {', '.join(changed or ())}"
                done = ": finished before" if columns is not None else why if changed else ""
                print(f"{model_name} on {which}{done}")
            (missing,) = broadcast_object_list([columns is None])
            if missing:
                opened_model = (model_name, model, config)
                columns, record = run_pass(args, accelerator, opened_model, which, ds, request)
            if main:
                tables[model_name] |= columns
                classes[model_name] |= record["classes"]
                note = {**record["request"], "unreadable": record["unreadable"]}
                notes[f"{model_name} on {which}"] = note
    return tables, classes, notes


def run_pass(args, accelerator, opened_model, which, ds, request):
    """Evaluate a model on a pass; the main process saves, and draws the surest mistakes.

    Args:
        opened_model: name, model and data config.

    Returns:
        ``predictions.COLUMNS`` by protocol, and what was saved of the pass beside them.

    Raises:
        InputError: as ``evaluate_all`` does.
    """
    model_name, model, config = opened_model
    try:
        columns, wrong, unreadable = predict(accelerator, model, config, which, ds, args)
    except FloatingPointError as error:
        raise InputError(f"{model_name} on {which}: {error}: leave the model out") from error
    check_unreadable(which, columns, unreadable)
    if not accelerator.is_main_process:
        return None, None
    folder, root = predictions.folder_of(args.output, model_name), which.place(args.data)
    names = class_names(which, ds, model)
    record = predictions.save(folder, which, request, columns, unreadable, names, root)
    for protocol, found in wrong.items():
        wrong_ones = (~columns[protocol]["top1"]).sum()
        title = f"{model_name} on {protocol}: the {len(found)} surest of {wrong_ones} mistakes"
        path = folder / f"mistakes-{protocol}.png"
        path.unlink(missing_ok=True)
        if found and not protocol.corruption:
            mistakes.draw_mistakes(found, title, path)
    return predictions.without_names(columns), record


def class_names(which, ds, model) -> dict[str, list[str]]:
    """What the columns of a pass number as classes, by the protocol's name."""
    names, by_protocol = output_names(which.name, ds, model), {}
    for benchmark in which.serves:
        for name, outputs, _ in labels.right_answers(benchmark, {"label": [], "path": []}):
            by_protocol[name] = names if outputs is None else [names[i] for i in outputs]
    return by_protocol


def earlier_passes(output):
    """Models and sets of the results that are in the folder already."""
    try:
        return list(json.loads((output / "results.json").read_text())["passes"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def corrupted(tables: dict, means: dict) -> dict:
    """A model's accuracies on corrupted images, by set.

    Args:
        tables: the model's, by protocol.
        means: ``by_image`` of them.

    Returns:
        By protocol: top-1 on the images as they are (``clean``, None if they were not read) and by
        corruption and severity, and the corruptions' ``mean``.
    """
    summaries = {}
    for name, mean_by_image in means.items():
        top1 = {}
        for protocol, table in tables.items():
            if protocol.name == name and protocol.corruption:
                severities = top1.setdefault(protocol.corruption, {})
                severities[protocol.severity] = float(table["top1"].mean())
        clean = tables.get(Protocol(name))
        summaries[name] = {
            "clean": float(clean["top1"].mean()) if clean else None,
            "corruptions": top1,
            **({"mce": corruptions.mce(top1)} if name == "c" else {}),
            **statistics.mean(mean_by_image["top1"]),
        }
    return summaries


def by_image(tables) -> dict:
    """By set: the images' keys, and the share of each one's corruptions that a model got right."""
    parts, means = {}, {}
    for protocol, table in tables.items():
        if protocol.corruption:
            parts.setdefault(protocol.name, []).append(table)
    for name, corrupted_tables in parts.items():
        keys = functools.reduce(np.intersect1d, [table["key"] for table in corrupted_tables])
        right = [table["top1"][np.isin(table["key"], keys)] for table in corrupted_tables]
        means[name] = {"key": keys, "top1": np.mean(right, 0)}
    return means


def write_csv(folder, models, results):
    """Write ``results-PROTOCOL.csv``, with the columns of timm's tables, the best model first."""
    for protocol in dict.fromkeys(p for measured in results.values() for p in measured):
        rows = []
        for name, (model, config) in models.items():
            measures, setting = results[name][protocol], published.timm_setting(config)
            row = {"model": name, "img_size": setting["img_size"]}
            for key in ("top1", "top5"):
                known = key in measures  # there is no top-5 of five classes
                row[key] = f"{100 * measures[key]:.3f}" if known else ""
                row[f"{key}_err"] = f"{100 - 100 * measures[key]:.3f}" if known else ""
            row["param_count"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
            rows.append(row | {key: setting[key] for key in ("crop_pct", "interpolation")})
        with (folder / f"results-{protocol}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: -float(row["top1"])))


def matched(first: dict, other: dict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of two models was right, on the images that both have seen."""
    _, in_first, in_other = np.intersect1d(first["key"], other["key"], return_indices=True)
    return first["top1"][in_first], other["top1"][in_other]


def shifts_with_line(args, evaluated):
    """The protocols under shift that have a line, with the clean one of each; words on others.

    The digits have none: their sketch is another one.
    """
    if "digits" in args.benchmarks:
        return {}, []
    shifts = {
        shifted: clean for shifted, (clean, *_) in published.SHIFTS.items() if shifted in evaluated
    }
    lacking = {shifted: clean for shifted, clean in shifts.items() if clean not in evaluated}
    pairs = {shifted: clean for shifted, clean in shifts.items() if shifted not in lacking}
    words = []
    if lacking:
        needed = ", ".join(dict.fromkeys(lacking.values()))
        words.append(
            f"no effective robustness on {', '.join(lacking)}: it needs {needed} among --benchmarks"
        )
    if pairs and args.allow_partial:
        words.append(
            "no effective robustness with --allow-partial: timm's accuracies are those of whole "
            "sets"
        )
    return ({} if args.allow_partial else pairs), words


def effective_robustness(tables, pairs) -> dict:
    """``published.effective_robustness`` by model and protocol.

    Args:
        tables: by model and protocol.
        pairs: the clean protocol of each under shift.
    """
    by_model = {model: {} for model in tables} if pairs else {}
    for model, (shifted, clean) in itertools.product(by_model, pairs.items()):
        right = [tables[model][protocol]["top1"] for protocol in (clean, shifted)]
        by_model[model][shifted] = published.effective_robustness(*right, shifted)
    return by_model


def measures(table, names) -> dict:
    """``statistics.classification`` of a table, without a top-5 that is always right.

    ``ece_scaled``, with ends of an interval, is the ECE after temperature scaling.
    """
    found = statistics.classification(table)
    scaled = calibration.calibration_error(table["scaled"], table["top1"])
    found |= {"ece_scaled": scaled["ece"]}
    found |= {f"ece_scaled_{end}": scaled[end] for end in ("low", "high")}
    if len(names) <= 5:
        del found["top5"]
    return found


def summarise(args, tables, classes):
    """What results.json says of all models' columns, by model and protocol."""
    clean = {}
    for model, columns in tables.items():
        clean[model] = {p.name: table for p, table in columns.items() if not p.corruption}
    results, differences, means, on_corrupted = {}, {}, {}, {}
    first = args.model[0]
    for model, columns in clean.items():
        results[model] = {name: measures(c, classes[model][name]) for name, c in columns.items()}
        if args.corrupt or "c" in args.data:
            means[model] = by_image(tables[model])
            on_corrupted[model] = corrupted(tables[model], means[model])
        if model == first:
            continue
        differences[model] = {
            name: over_images(*matched(clean[first][name], c)) for name, c in columns.items()
        }
        for name, mean_by_image in means.get(model, {}).items():
            ours, theirs = matched(means[first][name], mean_by_image)
            on_corrupted[model][name]["difference_to_first"] = statistics.mean(theirs - ours)
    pairs, words = shifts_with_line(args, clean[first])
    summary = {
        "results": results,
        "differences_to_first": differences,
        "effective_robustness": effective_robustness(clean, pairs),
        **({"corrupted": on_corrupted} if on_corrupted else {}),
    }
    return summary, words


def write_results(output, summary, notes):
    """Write results.json, then remove the tables and pictures that belong to the earlier one."""
    versions = {module.__name__: module.__version__ for module in (torch, timm, datasets)}
    content = {**summary, "passes": notes, "versions": versions}
    earlier = earlier_files(output)
    checkpoints.write_whole(output / "results.json", json.dumps(content, indent=2) + "\n")
    for name in earlier:
        (output / name).unlink(missing_ok=True)


def earlier_files(output) -> list[str]:
    """The tables and pictures that belong to the results that are in the folder already."""
    try:
        summary = json.loads((output / "results.json").read_text())
        results, on_corrupted = summary["results"].values(), summary.get("corrupted", {}).values()
        tables = {f"results-{name}.csv" for by_set in results for name in by_set}
        pictures = {f"corrupted-{name}" for by_set in on_corrupted for name in by_set}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    pictures |= {"accuracy", "effective_robustness"}
    return [*tables, *(f"{name}.{suffix}" for name in pictures for suffix in ("png", "svg"))]


def show(args, models, summary, words, notes):
    """Print all tables."""
    report.show(summary["results"], summary["differences_to_first"], args.markdown)
    report.show_corrupted(summary.get("corrupted", {}), args.markdown)
    for line in words:
        print(f"\n{line}")
    if summary["effective_robustness"]:
        report.show_effective(summary["effective_robustness"], args.markdown)
    report.show_published(published.beside_ours(models, summary["results"]), args.markdown)
    for name, note in notes.items():
        if unreadable := note["unreadable"]:
            shown = unreadable[:5]
            print(f"{name}: left out {len(unreadable)} images that cannot be read: {shown}")


def draw_confusions(output, tables, classes):
    """Draw which class was taken for which, for each model and set of few classes."""
    for model, protocol, table in mistakes.one_answer_each(tables):
        path = predictions.folder_of(output, model) / f"confusion-{protocol}.png"
        title = f"{model} on {protocol}: {table['top1'].mean():.1%} of {len(table['key'])} right"
        mistakes.draw_confusions(table, classes[model][protocol.name], title, path)


def draw(output, summary) -> list[str]:
    """Draw the pictures that there is something for; returns their names."""
    names = []
    if any(summary["results"].values()):
        report.draw(summary["results"], output / "accuracy.png")
        names.append("accuracy")
    if summary["effective_robustness"]:
        report.draw_effective(summary["effective_robustness"], output / "effective_robustness.png")
        names.append("effective_robustness")
    corrupted_sets = {name for by_set in summary.get("corrupted", {}).values() for name in by_set}
    for name in sorted(corrupted_sets):
        report.draw_corrupted(summary["corrupted"], name, output / f"corrupted-{name}.png")
        names.append(f"corrupted-{name}")
    return names


def open_sets(args, accelerator, models):
    """The sets to read by pass; each is checked to fit each model.

    Raises:
        InputError: one cannot be opened, or does not fit.
    """
    opened = {}
    for which in sets.passes(args.benchmarks, args.data):
        own = which.name in args.data  # the flags are about sets that the user names
        names = data.Names.of(args) if own else data.NO_NAMES
        ds = sets.open_set(which, which.place(args.data), args.allow_partial, names)
        for model_name, (model, _) in models.items():
            if which.name in args.data and which.name not in sets.HUB:
                check_fit(model_name, model, which.name, ds)
                names = labels.label_names(model)
                if line := sets.mapping(which.name, ds, names, model_name):
                    accelerator.print(line)
        if stored(ds):
            check_answers(which, ds)
        opened[which] = ds
    return opened


def main(argv=None):
    """Run as from the command line; the main process returns measures by model and protocol."""
    allocator.keep_freed_memory()
    args = parse(argv)
    settings.make_output(args.output)
    accelerator = Accelerator()
    announce(accelerator)
    use_fast_kernels(accelerator.device)
    models = open_models(args)
    opened = open_sets(args, accelerator, models)
    output = Path(args.output)
    if accelerator.is_main_process:
        passes = [f"{model} on {which}" for model in models for which in opened]
        files = f"{output}/results.json and accuracy.png"
        settings.announce_replacement(files, earlier_passes(output), passes)
    tables, classes, notes = evaluate_all(args, accelerator, models, opened)
    if not accelerator.is_main_process:
        return None
    summary, words = summarise(args, tables, classes)
    write_results(output, summary, notes)
    if args.csv:
        write_csv(output, models, summary["results"])
    mistakes.write_per_class(output / "per_class.csv", tables, classes)
    show(args, models, summary, words, notes)
    drawn = "".join(f", {name}.png, {name}.svg" for name in draw(output, summary))
    draw_confusions(output, tables, classes)
    print(f"\nwritten: {output}/results.json, per_class.csv{drawn}")
    print(f"written: {output}/predictions/, with pictures of confused classes and of mistakes")
    return summary["results"]


if __name__ == "__main__":
    with clear_errors():
        main()
