"""Evaluate classifiers on images of your own, on ImageNet and its shifted sets, or on the digits and theirs."""

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
import evaluate
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import timm
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list, gather_object
from timm.data import create_transform, resolve_data_config
from tqdm.auto import tqdm

from common import checkpoints, loaders, settings
from common.settings import InputError
from robustness import corruptions, published, report, sets, statistics

BENCHMARKS = ("imagenet", "real", "a-clean", "r-clean", "v2", "r", "a", "sketch", "digits")


def parser() -> settings.Parser:
    """The flags."""
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=settings.DEFAULTS)
    p.add_argument(
        "--model", nargs="+", required=True, help="folders of trained models (OUTPUT/best) or timm names (required)"
    )
    known = "sets to evaluate on (those of --data; without either, says which fit the models)"
    p.add_argument("--benchmarks", nargs="+", choices=BENCHMARKS, default=[], help=known)
    place = "sets of your own, by any name: a folder CLASS/FILE, tar or zip files, or a Hub dataset; or where a"
    known = f"{place} benchmark, or ImageNet-C as c, lies (on the Hub)"
    p.add_argument("--data", nargs="+", metavar="NAME=PLACE", default=[], help=known)
    p.add_argument("--allow-partial", action="store_true", help="evaluate sets that lack classes (no)")
    kinds = f"{', '.join(corruptions.CORRUPTIONS)}; each in 3 severities"
    p.add_argument("--corrupt", action="store_true", help=f"also evaluate on the images corrupted: {kinds} (no)")
    p.add_argument("--img-size", type=int, help="side of the model's input, pixels (each model's own)")
    p.add_argument("--crop-pct", type=float, help="centre crop, share of the side (each model's own)")
    p.add_argument("--interpolation", choices=settings.INTERPOLATIONS, help="of the resize (each model's own)")
    p.add_argument("--batch-size", type=int, default=256, help="images of a process at once (%(default)s)")
    p.add_argument("--workers", type=int, default=settings.WORKERS, help=settings.WORKERS_HELP)
    p.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help=settings.CHANNELS_LAST_HELP)
    p.add_argument("--output", default="outputs/robustness", help="folder of the results (%(default)s)")
    p.add_argument("--csv", action="store_true", help="write results-BENCHMARK.csv with the columns of timm's (no)")
    p.add_argument("--markdown", action="store_true", help="print Markdown tables (no)")
    return p


def parse(argv=None):
    """Read and check the flags; ``--data`` becomes a dictionary, and its names are benchmarks.

    Raises:
        InputError: a flag or its value is wrong.
    """
    args = parser().parse_args(argv)
    places = [item.partition("=")[::2] for item in args.data]
    for name, place in places:
        if not re.fullmatch(r"\w[\w-]*", name) or not place:
            raise InputError(f"--data {name}={place}: give NAME=PLACE, the name in letters, digits, - and _")
        if name in sets.taken_names(args.benchmarks):
            raise InputError(f"--data {name}={place}: {name} is a set or a row of its own here: choose another name")
    settings.check_once("--data", [name for name, _ in places])
    settings.check_once("--benchmarks", args.benchmarks)
    args.data = dict(places)
    read = {sets.pass_of(benchmark) for benchmark in args.benchmarks}
    args.benchmarks += [name for name in args.data if name not in read]
    if args.corrupt and "c" in args.data:
        raise InputError("--corrupt does not go with --data c=..., images that are corrupted: make two runs of them")
    settings.check_ranges(
        args, {key: settings.RANGES[key] for key in ("batch_size", "img_size", "crop_pct", "workers")}
    )
    return args


def open_models(args):
    """Each model with its preprocessing, by the name given.

    Raises:
        InputError: one cannot be loaded, is named twice, has not the outputs that the benchmarks need, or there are no
            benchmarks.
    """
    models, places = {}, {}
    for name in args.model:
        model = checkpoints.open_model(name).eval()
        folder = Path(name.removeprefix("local-dir:")).expanduser()
        pretrained = [model.pretrained_cfg.get(key) for key in ("architecture", "hf_hub_id")]
        place = folder.resolve() if folder.is_dir() else tuple(pretrained) if all(pretrained) else name
        if place in places:
            raise InputError(f"--model {places[place]} and {name} are the same model: drop one")
        places[place] = name
        if args.img_size and model.pretrained_cfg.get("fixed_input_size"):
            model = checkpoints.open_model(name, img_size=args.img_size).eval()
        if len(label_names(model)) != model.num_classes:
            raise InputError(
                f"{name} has {model.num_classes} outputs and {len(label_names(model))} label_names: name them all, in "
                f"their order, in its config.json (timm.models.save_for_hf(..., model_config={{'label_names': [...]}}))"
            )
        if folder.is_dir() and not model.pretrained_cfg.get("label_names"):
            PartialState().print(
                f"{name} has no label_names: its outputs are taken for ImageNet's 1000, in their order"
            )
        for benchmark in (b for b in args.benchmarks if b in (*BENCHMARKS, *sets.HUB)):
            check_fit(name, model, benchmark)
        wanted = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
        config = resolve_data_config({key: v for key, v in wanted.items() if v is not None}, model=model)
        check_model(name, model, config)
        models[name] = (model.to(memory_format=loaders.memory_format(args.channels_last, model)), config)
    folders = {}
    for name in models:
        other = folders.setdefault(predictions_folder(args, name), name)
        if other != name:
            raise InputError(f"--model {other} and {name} would share {predictions_folder(args, name)}: rename one")
    if not args.benchmarks:
        raise InputError(nothing_to_do({name: model for name, (model, _) in models.items()}))
    return models


def label_names(model) -> list[str]:
    """The names of a model's outputs, from its ``config.json``; ImageNet's, where 1000 have none, as of timm's own."""
    names = model.pretrained_cfg.get("label_names") or (sets.WORDNET if model.num_classes == 1000 else [])
    if isinstance(names, dict):  # by output, as timm allows
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [str(name) for name in names]


def check_fit(model_name, model, benchmark, ds=None):
    """Check that each class of a set is one of a model's outputs.

    Raises:
        InputError: it is not so, with some names of both.
    """
    try:
        sets.order_of(sets.pass_of(benchmark), ds, label_names(model))
    except InputError as error:
        own = "call a set of your own otherwise" if benchmark in sets.HUB else "rename its classes"
        raise InputError(
            f"{model_name} cannot be evaluated on {benchmark}: {error}: choose another set, or {own}"
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
    known = f"--benchmarks {' '.join(fitting)}" if fitting else "no --benchmarks"
    return (
        f"nothing to evaluate on: {known} would fit, and --data NAME=PLACE, a folder CLASS/FILE with classes called as "
        f"the outputs of {name}: {sets.some(label_names(model))}"
    )


@torch.no_grad()
def check_model(name, model, config):
    """Try a model on a black image.

    Raises:
        InputError: it does not take images of that size, does not return logits, or they are not finite.
    """
    size = tuple(config["input_size"])
    try:
        logits = model(torch.zeros(1, *size))
    except Exception as error:  # each model fails in its own way
        raise InputError(f"{name} does not take images of {size}: {error}; change --img-size") from error
    if logits.shape != (1, model.num_classes):
        raise InputError(f"{name} returns {tuple(logits.shape)} for an image, not {model.num_classes} logits")
    if not logits.isfinite().all():
        raise InputError(f"{name}: its logits are not finite, even for a black image: leave it out, or train it anew")


def predictions_folder(args, model_name):
    """Where a model's predictions are kept."""
    return Path(args.output) / "predictions" / re.sub(r"[^\w.-]+", "_", model_name)


def stored(ds) -> bool:
    """Whether a set is on this machine, and not streamed."""
    return isinstance(ds, datasets.Dataset)


def right_answers(benchmark, batch):
    """The protocols of a benchmark: name, logits' columns (None: all) and each image's right answers among them."""
    labels = [[label] for label in batch["label"]]
    if benchmark != "real" and -1 in batch["label"]:
        raise InputError(
            f"{benchmark}: an image has no label: its file name must end like _n01440764.JPEG, or its folder be a class"
        )
    if benchmark == "real":
        real = sets.real_labels()
        yield "real", None, [real[sets.validation_number(path)] for path in batch["path"]]
    elif benchmark.removesuffix("-clean") in sets.SUBSETS:
        own = sets.SUBSETS[benchmark.removesuffix("-clean")]
        places = {index: place for place, index in enumerate(own)}
        answers = [[places[label]] if label in places else [] for label in batch["label"]]
        if benchmark.endswith("-clean"):  # ImageNet's own images of these classes
            yield benchmark, own, answers
        else:
            yield f"{benchmark}-200", own, answers
            yield f"{benchmark}-1000", None, labels
    else:
        yield benchmark, None, labels


def check_answers(name, ds, benchmarks, size=1000):
    """Look up the right answers of a stored set's images, which a pass would do only as it comes to them.

    Raises:
        InputError: an image has none.
    """
    pictures = sets.Pictures(name.partition(":")[0], ds, None, size)
    for rows in ds.iter(size):
        paths = [image["path"] for image in rows["image"]]
        labels = [pictures.label(label, path) for label, path in zip(rows["label"], paths)]
        for benchmark in benchmarks:
            list(right_answers(benchmark, {"label": labels, "path": paths}))


@torch.no_grad()
def predict(accelerator, model, config, name, ds, benchmarks, args):
    """One pass over a set's images: by protocol, ``statistics.score``'s columns; and the names of unreadable images.

    Raises:
        FloatingPointError: logits are not finite.
    """
    keys = ("input_size", "interpolation", "crop_pct", "crop_mode")
    transform = create_transform(**{key: config[key] for key in keys}, normalize=False)
    rank = {"process": accelerator.process_index, "processes": accelerator.num_processes}
    options = {**rank, "corrupt": args.corrupt}
    pictures = sets.Pictures(name.partition(":")[0], ds, transform, args.batch_size, **options)
    times = 1 + args.corrupt * len(corruptions.CORRUPTIONS) * len(corruptions.SEVERITIES)
    workers = min(args.workers, times * len(ds) // loaders.IMAGES_PER_WORKER if stored(ds) else ds.num_shards)
    options = loaders.worker_options(accelerator, workers)
    loader = torch.utils.data.DataLoader(pictures, batch_size=None, collate_fn=collate, **options)
    order = sets.order_of(name.partition(":")[0], ds, label_names(model))
    model = accelerator.prepare_model(model, evaluation_mode=True)
    to_input = loaders.to_input(config, torch.float32, loaders.memory_format(args.channels_last, model))
    columns, unreadable = {}, []
    shown = {"desc": name, "unit": "image", "disable": not accelerator.is_main_process, "dynamic_ncols": True}
    with tqdm(total=times * len(ds) if stored(ds) else None, **shown) as bar:
        for batch in loader:
            unreadable += batch["unreadable"]
            if not batch["key"]:
                continue
            logits = model(to_input(batch["image"].to(accelerator.device, non_blocking=True)))
            if not logits.isfinite().all():
                row = logits.isfinite().all(-1).long().argmin().item()
                raise FloatingPointError(f"the logits of {batch['path'][row] or 'an image'} are not finite")
            logits = logits if order is None else logits[:, order]
            if max(batch["label"]) >= logits.shape[-1]:
                raise InputError(f"{name}: the label {max(batch['label'])} is none of the {logits.shape[-1]} outputs")
            for benchmark in benchmarks:
                for protocol, outputs, answers in right_answers(benchmark, batch):
                    protocol += f".{batch['corruption']}" if batch["corruption"] else ""
                    add_scores(columns.setdefault(protocol, {}), logits, outputs, answers, batch["key"])
            bar.update(len(batch["key"]) * accelerator.num_processes)
    parts = gather_object([columns])
    protocols = sorted({protocol for part in parts for protocol in part})
    merged = {protocol: merge([part[protocol] for part in parts if part.get(protocol)]) for protocol in protocols}
    if none := [protocol for protocol, table in merged.items() if not table]:
        raise InputError(f"{name}: no image has a right answer in {none[0]}: leave it out")
    return merged, sorted(gather_object(unreadable))


def collate(batch):
    """Stack a batch's images; a batch may have none that could be read."""
    return batch | {"image": torch.stack(batch["image"]) if batch["image"] else None}


def add_scores(columns, logits, outputs, answers, keys):
    """Append the scores of the images that have a right answer."""
    kept = [i for i, right in enumerate(answers) if right]
    if not kept:
        return
    logits = logits[kept] if outputs is None else logits[kept][:, outputs]
    right = torch.zeros(logits.shape, dtype=torch.bool)
    for row, i in enumerate(kept):
        right[row, answers[i]] = True
    scores = statistics.score(logits, right.to(logits.device))
    columns.setdefault("key", []).extend(keys[i] for i in kept)
    for name, values in scores.items():
        columns.setdefault(name, []).extend(values.tolist())


def merge(parts):
    """The processes' columns as one table, in the order of the keys."""
    if not parts:
        return {}
    merged = {name: np.concatenate([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    order = np.argsort(merged["key"])
    return {name: values[order] for name, values in merged.items()}


def finished(folder, name, request):
    """A pass that an earlier run finished: its columns by protocol, its record, and what its request had otherwise.

    Columns are None if that is anything, and all three if there is no such pass.
    """
    try:
        record = json.loads((folder / f"{name}.json").read_text())
        old = record["request"]
        changed = sorted(key for key in {*old, *request} if old.get(key) != request.get(key))
        if changed:
            return None, record, changed
        tables = {protocol: pq.read_table(folder / f"{protocol}.parquet") for protocol in record["protocols"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None, None, None
    columns = {p: {key: np.asarray(values) for key, values in t.to_pydict().items()} for p, t in tables.items()}
    return columns, record, []


def save(folder, name, request, columns, unreadable):
    """Write each protocol's columns as Parquet, and last the record that the pass is finished."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").unlink(missing_ok=True)  # it speaks for the tables, which are about to change
    for protocol, table in columns.items():
        pq.write_table(pa.table(table), folder / f"{protocol}.parquet")
    record = {"request": request, "protocols": list(columns), "unreadable": unreadable}
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def check_unreadable(name, columns, unreadable):
    """Let few images be unreadable.

    Raises:
        InputError: they are more than ``sets.MAX_UNREADABLE`` of the set.
    """
    size = max(len(table["key"]) for table in columns.values()) + len(unreadable) if columns else len(unreadable)
    if len(unreadable) > sets.MAX_UNREADABLE * size:
        shown = ", ".join(unreadable[:5]) + (", ..." if len(unreadable) > 5 else "")
        raise InputError(
            f"{name}: {len(unreadable)} of {size} images cannot be read, too many: mend or replace {shown}"
        )


def fingerprint(model):
    """A hash of a model's layers, weights and label names."""
    digest = hashlib.sha256(repr((model, label_names(model))).encode())
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def request_of(args, accelerator, model_name, weights, config, name, benchmarks, ds, revision):
    """All that the result of a pass depends on, as JSON has it."""
    request = {
        "model": model_name, "weights": weights, "benchmarks": benchmarks,
        "data": sets.place_of(name, args.data) or sets.HUB.get(name, "digits"), "revision": revision,
        "preprocessing": {key: config[key] for key in ("input_size", "interpolation", "crop_pct", "crop_mode")},
        "mean": config["mean"], "std": config["std"], "precision": accelerator.mixed_precision,
        "corrupt": corruptions.STRENGTHS if args.corrupt else None,
        "versions": {module.__name__: module.__version__ for module in (torch, timm)},
        # A streamed image is known by the loader worker that reads it.
        "stream": None if stored(ds) else [accelerator.num_processes, args.workers],
    }  # fmt: skip
    return json.loads(json.dumps(request))


def evaluate_all(args, accelerator, models, plan, opened):
    """Every model on every pass of ``plan``: columns by model and protocol, and what to say about each pass.

    What was finished before is known to the main process alone, and so are columns and notes.

    Raises:
        InputError: images cannot be read, have no right answer, or have logits that are not finite.
    """
    tables, notes, main = {}, {}, accelerator.is_main_process
    places = {name: sets.place_of(name, args.data) for name in plan if main}
    revisions = {name: sets.revision(name, opened[name], place) for name, place in places.items()}
    for model_name, (model, config) in models.items():
        folder, tables[model_name] = predictions_folder(args, model_name), {}
        weights = fingerprint(model) if main else None
        layout = loaders.format_name(loaders.memory_format(args.channels_last, model))
        accelerator.print(f"memory format of {model_name}: {layout}")
        for name, benchmarks in plan.items():
            columns, unreadable = None, []
            if main:
                which = (name, benchmarks, opened[name], revisions[name])
                request = request_of(args, accelerator, model_name, weights, config, *which)
                columns, record, changed = finished(folder, name, request)
                why = f": anew, as these have changed since: {', '.join(changed)}" if changed else ""
                print(f"{model_name} on {name}{why if columns is None else ': finished before'}")
            (missing,) = broadcast_object_list([columns is None])
            if missing:
                try:
                    columns, unreadable = predict(accelerator, model, config, name, opened[name], benchmarks, args)
                except FloatingPointError as error:
                    raise InputError(f"{model_name} on {name}: {error}: leave the model out") from error
                check_unreadable(name, columns, unreadable)
                if main:
                    record = save(folder, name, request, columns, unreadable)
            if main:
                tables[model_name] |= columns
                notes[f"{model_name} on {name}"] = {**record["request"], "unreadable": record["unreadable"]}
    return tables, notes


def earlier_passes(output):
    """Models and sets of the results that are in the folder already."""
    try:
        return list(json.loads((output / "results.json").read_text())["passes"])
    except (OSError, ValueError, KeyError, TypeError):
        return []


def corrupted(tables: dict, means: dict) -> dict:
    """By set: top-1 on it as it is (``clean``) and by corruption and severity, and the corruptions' ``mean``.

    ``tables`` are one model's, by protocol; those of corrupted images are called PROTOCOL.CORRUPTION-SEVERITY.
    ``means`` are ``by_image`` of them.
    """
    found = {}
    for name in (name for name in tables if "." in name):
        protocol, _, kind = name.partition(".")
        corruption, _, severity = kind.rpartition("-")
        found.setdefault(protocol, {}).setdefault(corruption, {})[severity] = float(tables[name]["top1"].mean())
    return {
        protocol: {
            "clean": float(tables[protocol]["top1"].mean()) if protocol in tables else None,
            "corruptions": rows,
            **({"mce": corruptions.mce(rows)} if protocol == "c" else {}),
            **statistics.mean(means[protocol]["top1"]),
        }
        for protocol, rows in found.items()
    }


def by_image(tables) -> dict:
    """By set: the images' keys, and for each the share of its corruptions on which one model was right."""
    parts, found = {}, {}
    for name, table in tables.items():
        protocol, _, kind = name.partition(".")
        if kind:
            parts.setdefault(protocol, []).append(table)
    for protocol, own in parts.items():
        keys = functools.reduce(np.intersect1d, [table["key"] for table in own])
        found[protocol] = {"key": keys, "top1": np.mean([t["top1"][np.isin(t["key"], keys)] for t in own], 0)}
    return found


# timm's tables of results, by protocol.
TIMM = {
    "imagenet": "imagenet", "real": "imagenet-real", "v2": "imagenetv2-matched-frequency", "sketch": "imagenet-sketch",
    "r-200": "imagenet-r", "r-clean": "imagenet-r-clean", "a-200": "imagenet-a", "a-clean": "imagenet-a-clean",
}  # fmt: skip


def timm_setting(config):
    """Size, crop and interpolation, as timm's tables of results have them."""
    return {
        "img_size": str(config["input_size"][-1]),
        "crop_pct": f"{config['crop_pct']:.3f}",
        "interpolation": config["interpolation"],
    }


def published_beside(models, results):
    """By model of timm's: top-1 in % that timm publishes at its size and crop, by protocol; or at which it does."""
    found = {}
    for name, (model, config) in models.items():
        if Path(name.removeprefix("local-dir:")).expanduser().is_dir():
            continue
        own = f"{model.pretrained_cfg.get('architecture')}.{model.pretrained_cfg.get('tag')}"
        rows = [row for row in published.results() if row["model"] == own]
        here = timm_setting(config)
        same = [row for row in rows if all(row[key] == value for key, value in here.items())]
        shown = [p for p in results[name] if p in TIMM]
        if same and shown:
            top1 = {p: (100 * results[name][p]["top1"], float(same[0][TIMM[p]])) for p in shown if same[0][TIMM[p]]}
            found[name] = {"top1": top1}
        elif rows and shown:
            found[name] = {"elsewhere": [{key: row[key] for key in here} for row in rows]}
    return found


def write_csv(folder, models, results):
    """Write ``results-PROTOCOL.csv``, with the columns of timm's tables of results, the best model first."""
    for protocol in dict.fromkeys(p for measured in results.values() for p in measured):
        rows = []
        for name, (model, config) in models.items():
            r, setting = results[name][protocol], timm_setting(config)
            rows.append({"model": name, "img_size": setting["img_size"]})
            for k in ("top1", "top5"):
                rows[-1] |= {k: f"{100 * r[k]:.3f}", f"{k}_err": f"{100 - 100 * r[k]:.3f}"}
            rows[-1]["param_count"] = f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}"
            rows[-1] |= {key: setting[key] for key in ("crop_pct", "interpolation")}
        with (folder / f"results-{protocol}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(sorted(rows, key=lambda row: -float(row["top1"])))


def matched(first: dict, other: dict) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of two models was right, on the images that both have seen."""
    _, one, two = np.intersect1d(first["key"], other["key"], return_indices=True)
    return first["top1"][one], other["top1"][two]


def effective_robustness(args, tables) -> dict:
    """``published.effective_robustness`` by model and protocol, of those for which there is a line.

    For the others it is said what they lack.
    """
    evaluated = next(iter(tables.values()))
    shifts = {shifted: clean for shifted, (clean, *_) in published.SHIFTS.items() if shifted in evaluated}
    lacking = {shifted: clean for shifted, clean in shifts.items() if clean not in evaluated}
    if lacking:
        needed = ", ".join(dict.fromkeys(lacking.values()))
        print(f"\nno effective robustness on {', '.join(lacking)}: it needs {needed} among --benchmarks")
    pairs = {shifted: clean for shifted, clean in shifts.items() if shifted not in lacking}
    if pairs and args.allow_partial:
        print("\nno effective robustness with --allow-partial: timm's accuracies are those of whole sets")
    if not pairs or args.allow_partial:
        return {}
    return {
        model: {
            shifted: published.effective_robustness(protocols[clean]["top1"], protocols[shifted]["top1"], shifted)
            for shifted, clean in pairs.items()
        }
        for model, protocols in tables.items()
    }


def main(argv=None):
    """Run as from the command line; the main process returns measures by model and protocol."""
    args = parse(argv)
    settings.make_output(args.output)
    accelerator = Accelerator()
    settings.use_fast_kernels(accelerator.device)
    models = open_models(args)
    plan = sets.passes(args.benchmarks, args.data)
    places = {name: sets.place_of(name, args.data) for name in plan}
    opened = {name: sets.open_set(name, places[name], args.allow_partial) for name in plan}
    for name, ds in opened.items():
        for model_name, (model, _) in models.items():
            if name in args.data and name not in sets.HUB:
                check_fit(model_name, model, name, ds)
                accelerator.print(sets.mapping(name, ds, label_names(model), model_name))
        if stored(ds):
            check_answers(name, ds, plan[name])
    if accelerator.is_main_process:
        passes = [f"{model} on {name}" for model in models for name in plan]
        files = f"{args.output}/results.json and accuracy.png"
        settings.announce_replacement(files, earlier_passes(Path(args.output)), passes)
    tables, notes = evaluate_all(args, accelerator, models, plan, opened)
    if not accelerator.is_main_process:
        return None
    clean = {model: {p: table for p, table in ts.items() if "." not in p} for model, ts in tables.items()}
    results = {model: {p: statistics.classification(table) for p, table in ts.items()} for model, ts in clean.items()}
    first, *others = args.model
    differences = {
        model: {p: statistics.paired(*matched(clean[first][p], table)) for p, table in clean[model].items()}
        for model in others
    }
    means = {model: by_image(ts) for model, ts in tables.items() if args.corrupt or "c" in args.data}
    corruption = {model: corrupted(tables[model], own) for model, own in means.items()}
    for model, p in itertools.product(others, means.get(first, ())):
        one, two = matched(means[first][p], means[model][p])
        corruption[model][p]["difference_to_first"] = statistics.mean(two - one)
    versions = {module.__name__: module.__version__ for module in (torch, timm, datasets, evaluate)}
    for old in Path(args.output).glob("effective_robustness.*"):
        old.unlink()
    effective = effective_robustness(args, clean)
    saved = {"results": results, "differences_to_first": differences, "passes": notes, "versions": versions}
    saved |= {"effective_robustness": effective} | ({"corrupted": corruption} if corruption else {})
    evaluate.save(Path(args.output) / "results.json", **saved)
    report.show(results, differences, args.markdown)
    report.show_corrupted(corruption, args.markdown)
    if effective:
        report.show_effective(effective, args.markdown)
        report.draw_effective(effective, Path(args.output) / "effective_robustness.png")
    report.show_published(published_beside(models, results), args.markdown)
    if args.csv:
        write_csv(Path(args.output), models, results)
    for name, note in notes.items():
        if note["unreadable"]:
            print(f"{name}: left out {len(note['unreadable'])} images that cannot be read: {note['unreadable'][:5]}")
    pictures = {"accuracy": any(results.values()), "effective_robustness": effective}
    if pictures["accuracy"]:
        report.draw(results, Path(args.output) / "accuracy.png")
    drawn = "".join(f", {name}.png, {name}.svg" for name, there in pictures.items() if there)
    print(f"\nwritten: {args.output}/results.json{drawn}, predictions/")
    return results


if __name__ == "__main__":
    with settings.clear_errors():
        main()
