"""Measure what perturbations make trained models forget, how sharp these are, and which goes with generalisation."""

import argparse
import csv
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
from accelerate import Accelerator
from sklearn.model_selection import train_test_split
from timm.data import resolve_data_config
from timm.layers import set_fused_attn
from torch.utils.data import BatchSampler, DataLoader, TensorDataset
from tqdm.auto import tqdm

from common import build, checkpoints, data, loaders, settings
from common.report import pairs
from common.settings import InputError
from forgetting import conditional_entropy, forgetting, label_patterns
from robustness import flatness, report
from sam_obf import SAM

MIN_RUNS = 4  # for a rank correlation
MIN_SETTINGS = 10  # for its bootstrap interval
RESAMPLES = 2000
SATURATED = 0.95
MEASURES = ("forgetting", "relevant_change", "lambda_max", "sam_gap")  # of a model
# What is compared with test accuracy; flat models have a small largest eigenvalue, and a small gap.
QUANTITIES = {
    "forgetting": lambda row: row["forgetting"],
    "relevant_change": lambda row: row["relevant_change"],
    "flatness": lambda row: -row["lambda_max"],
    "-sam_gap": lambda row: -row["sam_gap"],
}
# What they are compared with: good models have high accuracy on test, and a small gap to that on training images.
TARGETS = {"accuracy": lambda row: row["accuracy"], "-gap": lambda row: row["accuracy"] - row["measured_accuracy"]}
# Settings of the runs, each of which alone may be what drives both, and where a row has them.
FIXED = {"m": "trained_m", "rho": "trained_rho", "method": "method"}


def parser() -> settings.Parser:
    """The flags."""
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=settings.DEFAULTS)
    p.add_argument("--runs", nargs="+", required=True, help="output folders, trained with --save-interval (required)")
    p.add_argument("--epochs", nargs="+", type=int, help="which saved models of each run, by their epochs (all)")
    g = p.add_argument_group("perturbations")
    kinds = ["own", "sam", "obf", "random"]
    g.add_argument(
        "--perturbations", nargs="+", choices=kinds, default=kinds[1:], help="own: the run's (sam obf random)"
    )
    rho = "L2 norm of a perturbation, in units of the weights (the run's, in the last update of an epoch)"
    g.add_argument("--rho", type=float, help=rho)
    g.add_argument("--m", type=int, help="examples that share a perturbation (the run's own)")
    g.add_argument(
        "--gamma", type=float, default=1.0, help="OBF: 1 pushes to uniform, 0 only lowers the target (%(default)s)"
    )
    g.add_argument("--lam", type=float, help="OBF: target's probability up to which gamma does not act (1 / classes)")
    g.add_argument("--micro-batches", type=int, default=8, help="perturbations to average over (%(default)s)")
    g = p.add_argument_group("measurement")
    thresholds = [i / 20 for i in range(1, 20)]
    g.add_argument(
        "--thresholds",
        nargs="+",
        type=float,
        default=thresholds,
        help="of predictions, probabilities (0.05 0.10 ... 0.95)",
    )
    links = ["sigmoid", "softmax"]
    g.add_argument("--link", choices=links, default=links[0], help="from logits to predictions (%(default)s)")
    g.add_argument("--miller-madow", action="store_true", help="correct the entropies' bias (no)")
    equal = "thresholds of the perturbed model at which it predicts as many labels, not the same ones (yes)"
    g.add_argument("--adjust-thresholds", action=argparse.BooleanOptionalAction, default=True, help=equal)
    g.add_argument("--split", default="train", help="labelled images to measure on: train, test, ... (%(default)s)")
    g.add_argument("--examples", type=int, default=8192, help="of these images, all classes alike (%(default)s)")
    g.add_argument("--hessian-examples", type=int, help="how many of them for lambda_max (all)")
    g.add_argument("--batch-size", type=int, default=256, help="images at once (%(default)s)")
    g.add_argument("--workers", type=int, default=settings.WORKERS, help=settings.WORKERS_HELP)
    g.add_argument("--channels-last", action=argparse.BooleanOptionalAction, help=settings.CHANNELS_LAST_HELP)
    g.add_argument("--seed", type=int, default=0, help="of the choice of images, and the bootstrap (%(default)s)")
    p.add_argument("--output", default="outputs/forgetting", help="folder of the results (%(default)s)")
    return p


def parse(argv=None):
    """Read and check the flags.

    Raises:
        InputError: a flag or its value is wrong.
    """
    args = parser().parse_args(argv)
    own = {"thresholds": "(0, 1)", **dict.fromkeys(("micro_batches", "examples", "hessian_examples"), "[1, inf)")}
    shared = ("rho", "m", "gamma", "lam", "batch_size", "workers", "seed")
    settings.check_ranges(args, own | {key: settings.RANGES[key] for key in shared})
    settings.check_once("--runs", [Path(folder).expanduser().resolve() for folder in args.runs])
    for key in ("perturbations", "thresholds", "epochs"):
        settings.check_once(f"--{key}", getattr(args, key) or [])
    return args


def read_run(folder: Path, wanted: list[int] | None = None) -> dict:
    """A finished run: its ``settings``, ``epochs``, folders of models, and the last one's ``accuracy`` on test.

    Without test images, the accuracy is that on validation. ``wanted`` are the epochs; without it all that were saved.

    Raises:
        InputError: it is no run, is not finished, or has not saved any, or a wanted, epoch.
    """
    try:
        run = argparse.Namespace(**yaml.safe_load((folder / "settings.yaml").read_text()))
    except (OSError, TypeError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{folder} is no output folder of a run: cannot read its settings.yaml ({error})") from error
    try:
        results = json.loads((folder / "results.json").read_text())["last"]
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"the run {folder} is not finished: go on with --resume auto ({error!r})") from error
    epochs = sorted(path.parent for path in folder.glob("epochs/*/config.json"))
    if not epochs:
        raise InputError(f"the run {folder} has no saved epochs: train it with --save-interval EPOCHS")
    saved = [int(epoch.name) for epoch in epochs]
    for epoch in wanted or []:
        if epoch not in saved:
            raise InputError(f"--epochs {epoch}: the run {folder} saved {', '.join(map(str, saved))}")
    epochs = [path for path, epoch in zip(epochs, saved) if not wanted or epoch in wanted]
    classes = json.loads((epochs[0] / "config.json").read_text())["num_classes"]
    split = "test" if "test" in results else "validation"
    return {"folder": folder, "settings": run, "accuracy": results[split], "epochs": epochs, "classes": classes}


def check_alike(runs):
    """Raise ``InputError`` if runs differ in their training images or number of classes."""
    shared = {
        "dataset": lambda run: run["settings"].dataset,
        "validation_share": lambda run: run["settings"].validation_share,
        "train_share": lambda run: run["settings"].train_share,
        "classes": lambda run: run["classes"],
    }
    for run in runs[1:]:
        for what, value in shared.items():
            if value(run) != value(runs[0]):
                raise InputError(
                    f"runs must share their {what}: {runs[0]['folder']} has {value(runs[0])} and {run['folder']} has "
                    f"{value(run)}: measure them apart"
                )


def rho_at(own, epoch: int, images: int):
    """The rho of a run's last update in ``epoch``, from 1, on so many training images; None if it had no rho."""
    if own.rho_min is None:
        return own.rho
    steps = images // own.batch_size
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], own.lr)
    build.build_schedule(own, optimizer, steps)(epoch * steps - 1)
    return optimizer.param_groups[0]["rho"]


def perturbations(args, run, rho) -> dict[str, argparse.Namespace]:
    """The settings of each perturbation to measure on a run, whose own ``rho`` holds unless one is given.

    Raises:
        InputError: the run does not say its rho or m, and none is given; or its own perturbation is its momentum's.
    """
    own, result = run["settings"], {}
    trained = settings.METHODS[own.method][0] is not None
    for kind in args.perturbations:
        if kind == "own" and not trained:
            continue
        if kind == "own" and own.method == "momentum":
            raise InputError(
                f"the run {run['folder']} has no momentum saved to perturb along: measure sam, obf or random"
            )
        changes = {"rho": rho if args.rho is None else args.rho, "m": args.m or own.m}
        if changes["rho"] is None:
            raise InputError(f"the run {run['folder']} has no rho, as it was trained with method base: give --rho")
        if changes["m"] is None:
            raise InputError(f"the run {run['folder']} does not say its m, which its processes made: give --m")
        if kind != "own":
            of_obf = {"gamma": args.gamma, "lam": args.lam, "link": own.link or "sigmoid"}
            changes |= {"method": kind, "perturb_fraction": 1.0, **(of_obf if kind == "obf" else dict.fromkeys(of_obf))}
        result[kind] = argparse.Namespace(**vars(own) | changes)
    return result


def choose_images(args, split):
    """Images to measure on, undecoded, with all classes in the proportions of the split."""
    labels = np.asarray(split["label"])
    classes = len(split.features["label"].names)
    if args.examples < classes:
        raise InputError(f"--examples {args.examples} cannot hold one of each of {classes} classes: raise it")
    if args.examples >= len(split):
        args.examples = len(split)
        return split.shuffle(seed=args.seed)
    if len(split) - args.examples < classes:
        raise InputError(f"--examples {args.examples} leaves out too few of {len(split)} images: take all of them")
    size = {"train_size": args.examples, "test_size": None, "random_state": args.seed}
    return split.select(train_test_split(range(len(split)), stratify=labels, **size)[0])


def open_batches(args, accelerator, split, model, cache):
    """The images as the model's evaluation transform makes them: uint8, labels, and ``batches``, a function of both."""
    config = resolve_data_config(model=model)
    key = str([config[name] for name in ("input_size", "interpolation", "crop_pct", "crop_mode")])
    if key not in cache:
        _, transform = loaders.transforms(config, scale=(1, 1), ratio=(1, 1), hflip=0)
        workers = min(args.workers, len(split) // loaders.IMAGES_PER_WORKER)
        options = loaders.worker_options(accelerator, workers)
        parts = list(DataLoader(loaders.Images(split, transform), args.batch_size, **options))
        cache[key] = [torch.cat([part[name] for part in parts]) for name in ("image", "label")]
    images, labels = cache[key]
    layout, device = loaders.memory_format(args.channels_last, model), accelerator.device
    to_input = loaders.to_input(config, torch.float32, layout)

    def batches(start, stop, size=args.batch_size):
        """Normalised images and labels, on the device, of the examples from ``start`` up to ``stop``."""
        return DataLoader(
            TensorDataset(images[start:stop], labels[start:stop]),
            batch_size=None,
            sampler=BatchSampler(range(len(images[start:stop])), size, drop_last=False),
            collate_fn=lambda batch: (to_input(batch[0].to(device)), batch[1].to(device)),
        )

    return batches


@torch.no_grad()
def predict(model, batches, link):
    """Predictions (examples, classes) in float64: in single precision many confident ones are 1."""
    logits = torch.cat([model(images) for images, _ in batches]).double()
    if not logits.isfinite().all():
        raise ValueError("its logits are not finite: leave the run out, or lower --rho")
    return logits.sigmoid() if link == "sigmoid" else logits.softmax(-1)


def measure(args, run, epoch: int, model, batches) -> dict:
    """All that is measured on one model, as saved after ``epoch``, in bits and units of the loss."""
    model.eval().requires_grad_()
    criterion, size = build.build_criterion(run["settings"]), args.examples
    flat = min(args.hessian_examples or size, size)
    thresholds = torch.tensor(args.thresholds, dtype=torch.float64)
    everything = batches(0, size)
    labels = torch.cat([y for _, y in everything])
    clean = predict(model, everything, args.link)
    result = {"lambda_max": flatness.largest_eigenvalue(model, criterion, batches(0, flat), flat), "perturbations": {}}
    result["measured_accuracy"] = (clean.argmax(-1) == labels).double().mean().item()
    result["information"] = conditional_entropy(label_patterns(clean, thresholds), labels).tolist()
    kinds = perturbations(args, run, rho_at(run["settings"], epoch, run["images"]))
    for kind, own in kinds.items():
        # The own perturbation of a run with SAM is steepest ascent.
        if twin := next((other for other in result["perturbations"] if kinds[other] == own), None):
            result["perturbations"][kind] = result["perturbations"][twin]
            continue
        adaptive = own.adaptive if "adaptive" in settings.METHODS[own.method][1] else None
        optimizer = SAM(torch.optim.SGD(model.parameters()), model, own.rho, adaptive=adaptive)
        objective = build.build_objective(own, criterion, optimizer)
        part = build.ascending(own, own.m)
        torch.manual_seed(args.seed)
        each = []
        warnings.filterwarnings("ignore", "the block left no gradient")  # these blocks only look
        for x, y in itertools.islice(batches(0, size // own.m * own.m, own.m), args.micro_batches):
            with torch.no_grad():
                before = criterion(model(x), y)
            with optimizer.perturbed(lambda: objective(model, x[:part], y[:part])), torch.no_grad():
                gap = criterion(model(x), y) - before
                perturbed = predict(model, everything, args.link)
            options = {"miller_madow": args.miller_madow, "adjust": args.adjust_thresholds}
            info = forgetting([(clean, perturbed, labels)], thresholds, **options)
            lost = info["information"] - info["information_perturbed"]
            gained = info["relevant_perturbed"] - info["relevant"]
            each.append({"by_threshold": lost, "relevant_change": gained.mean(), "sam_gap": gap})
        means = {key: torch.stack([one[key].double() for one in each]).mean(0).tolist() for key in each[0]}
        means["forgetting"] = float(np.mean(means["by_threshold"]))
        result["perturbations"][kind] = {"rho": own.rho, "m": own.m, **means}
    return result


def measure_all(args, accelerator, runs, split):
    """Measure every saved epoch of every run, on all processes together; finished measurements are read from disk."""
    tasks = [(run, epoch) for run in runs for epoch in run["epochs"]]
    left_out = ("runs", "epochs", "output", "workers", "batch_size", "channels_last")
    kept = {key: value for key, value in vars(args).items() if key not in left_out}
    versions = {module.__name__: module.__version__ for module in (torch, timm)}
    cache, said = {}, set()
    with accelerator.split_between_processes(tasks) as own:
        for run, epoch in tqdm(own, unit="model", disable=not accelerator.is_main_process, dynamic_ncols=True):
            weights = (epoch / "model.safetensors").stat()
            request = {"model": str(epoch), "weights": [weights.st_size, weights.st_mtime_ns], **kept}
            request |= {"run": vars(run["settings"]), "images": run["images"], "versions": versions}
            model = checkpoints.open_model(str(epoch))
            layout = loaders.memory_format(args.channels_last, model)
            request["memory_format"] = loaders.format_name(layout)  # the noise of random is drawn in memory's order
            file = record_file(args, epoch)
            if file.exists() and json.loads(file.read_text())["request"] == request:
                continue
            line = f"memory format of {run['settings'].model}: {request['memory_format']}"
            if line not in said:
                accelerator.print(line)
                said.add(line)
            model = model.to(accelerator.device, memory_format=layout)
            batches = open_batches(args, accelerator, split, model, cache)
            try:
                measured = measure(args, run, int(epoch.name), model, batches)
            except (ValueError, NotImplementedError) as error:  # the latter where torch lacks a second derivative
                raise InputError(f"cannot measure {epoch}: {error}") from error
            draft = file.with_suffix(".draft")
            draft.parent.mkdir(parents=True, exist_ok=True)
            draft.write_text(json.dumps({"request": request, **measured}, indent=2) + "\n")
            draft.replace(file)
    accelerator.wait_for_everyone()
    return [(run, epoch, json.loads(record_file(args, epoch).read_text())) for run, epoch in tasks]


def saturated(measured, thresholds, labels) -> list[float]:
    """The thresholds at which nearly every image has a pattern of its own in some model, so that none can be forgotten.

    There I(X; Y_tau | Y) is above ``SATURATED`` of the most that it can be.
    """
    counts = np.bincount(labels)
    most = np.sum(counts * np.log2(counts, where=counts > 0, out=np.zeros(len(counts)))) / len(labels)
    highest = np.max([record["information"] for *_, record in measured], 0)
    return [threshold for threshold, bits in zip(thresholds, highest) if bits > SATURATED * most]


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
            return [row_name(row["run"], row["epoch"], row["perturbation"]) for row in csv.DictReader(file)]
    except (OSError, ValueError, KeyError, TypeError, csv.Error):
        return []


def table_of(measured) -> list[dict]:
    """One row for each run, epoch and perturbation; ``setting`` is what runs differ in, but for their seeds."""
    trained = {run["folder"]: settings.shared_on_resume(run["settings"]) for run, *_ in measured}
    keys = dict.fromkeys(key for own in trained.values() for key in own if key != "seed")
    first = next(iter(trained.values()))
    varied = [key for key in keys if any(own.get(key) != first.get(key) for own in trained.values())]
    rows = []
    for run, epoch, record in measured:
        own = trained[run["folder"]]
        row = {"run": str(run["folder"]), "setting": pairs({key: own.get(key) for key in varied})}
        row |= {"seed": own["seed"], "method": own["method"], "trained_m": own["m"], "trained_rho": own["rho"]}
        for kind, values in record["perturbations"].items():
            found = {key: value for key, value in values.items() if key != "by_threshold"}
            found |= {key: record[key] for key in ("lambda_max", "measured_accuracy")}
            found["information"] = float(np.mean(record["information"]))
            rows.append({**row, "epoch": int(epoch.name), "perturbation": kind, **found, "accuracy": run["accuracy"]})
    return rows


def kendall(x, y, settings, strata, weights) -> np.ndarray:
    """Kendall's tau-b between x and y over those pairs of runs that differ in their setting and share their stratum.

    Seeds of one setting differ by luck alone; and a draw that has a setting twice has four times its pairs.

    Args:
        x, y, settings, strata: (runs,) each.
        weights: (draws, runs), how often a draw has each run.

    Returns:
        (draws,), NaN where all of x or all of y are equal.
    """
    x, y, settings, strata = (np.subtract.outer(v, v) for v in map(_ranks, (x, y, settings, strata)))
    x, y = (np.sign(differences) * (settings != 0) * (strata == 0) for differences in (x, y))
    agreement, xs, ys = (((weights @ pairs) * weights).sum(1) for pairs in (x * y, x * x, y * y))
    with np.errstate(invalid="ignore"):
        return agreement / np.sqrt(xs * ys)


def _ranks(values):
    return np.unique(np.asarray(values), return_inverse=True)[1]


def draws(groups, seed: int) -> np.ndarray:
    """(1 + ``RESAMPLES``, runs): how often each run counts, first once, then with its group, drawn with replacement."""
    group = _ranks(groups)
    rng, size = np.random.default_rng(seed), group.max() + 1
    counts = rng.multinomial(size, np.full(size, 1 / size), RESAMPLES)
    return np.concatenate([np.ones((1, len(group))), counts[:, group]]).astype(float)


def correlate(rows: list[dict], target, seed: int, fixed: str | None = None) -> dict[str, dict]:
    """Kendall's tau-b of each of ``QUANTITIES`` with a target, over all runs or those that share a value: ``kendall``.

    Args:
        rows: one for each run.
        target: a function of a row, as of ``TARGETS``.
        fixed: None, or one of ``FIXED``, as in the conditional measures of Jiang et al. 2020.

    Returns:
        By quantity ``tau``; ``low`` and ``high``, its 95 % bootstrap interval; ``above_rival``, by how much tau exceeds
        flatness', with ``above_low`` and ``above_high`` likewise. Intervals are percentiles over resampled settings,
        each with all its seeds, and NaN with fewer than ``MIN_SETTINGS``. NaN too is the tau of equal values.
    """
    groups = [row["setting"] for row in rows]
    weights = draws(groups, seed)
    strata = [str(row[FIXED[fixed]]) if fixed else "" for row in rows]
    y = [target(row) for row in rows]
    taus = {name: kendall([of(row) for row in rows], y, groups, strata, weights) for name, of in QUANTITIES.items()}
    enough = len(set(groups)) >= MIN_SETTINGS
    found = {}
    for name, tau in taus.items():
        above = tau - taus["flatness"]
        (low, high), (above_low, above_high) = (_interval(d[1:]) if enough else [math.nan] * 2 for d in (tau, above))
        found[name] = {"tau": tau[0], "low": low, "high": high, "above_rival": above[0]}
        found[name] |= {"above_low": above_low, "above_high": above_high}
    return {name: {key: float(value) for key, value in values.items()} for name, values in found.items()}


def _interval(drawn):
    drawn = drawn[np.isfinite(drawn)]  # runs of equal values have no tau
    return np.percentile(drawn, [2.5, 97.5]) if len(drawn) else (math.nan, math.nan)


def correlations(rows: list[dict], seed: int, gap: bool = True) -> list[dict]:
    """``correlate`` for each perturbation in ``table_of``'s rows that has enough runs, and for each of ``TARGETS``.

    A run counts with its last epoch, and besides that with the mean over its epochs. Without ``gap``, it is left out:
    the images were no training images. Nothing is fixed but what varies.
    """
    found, targets = [], [name for name in TARGETS if name == "accuracy" or gap]
    for kind in dict.fromkeys(row["perturbation"] for row in rows):
        runs = {}
        for row in rows:
            if row["perturbation"] == kind:
                runs.setdefault(row["run"], []).append(row)
        if len(runs) < MIN_RUNS:
            continue
        last = [max(own, key=lambda row: row["epoch"]) for own in runs.values()]
        means = [{**row, **{key: np.mean([r[key] for r in runs[row["run"]]]) for key in MEASURES}} for row in last]
        varied = [key for key, column in FIXED.items() if len({row[column] for row in last}) > 1]
        for (epochs, own), target, fixed in itertools.product(
            (("last", last), ("mean", means)), targets, (None, *varied)
        ):
            for name, tau in correlate(own, TARGETS[target], seed, fixed).items():
                which = {"perturbation": kind, "epochs": epochs, "quantity": name, "target": target, "fixed": fixed}
                found.append({**which, "runs": len(own), "settings": len({row["setting"] for row in own}), **tau})
    return found


def main(argv=None):
    """Run as from the command line; the main process returns the rank correlations."""
    args = parse(argv)
    settings.make_output(args.output)
    accelerator = Accelerator()
    set_fused_attn(False)  # it has no second derivatives
    runs = [read_run(Path(folder).expanduser(), args.epochs) for folder in args.runs]
    check_alike(runs)
    for run in runs:  # before the images are looked for
        perturbations(args, run, run["settings"].rho)
    shared = runs[0]["settings"]
    shares = {"validation_share": shared.validation_share, "train_share": shared.train_share}
    splits = data.load(shared.dataset, **shares)
    if args.split not in splits:
        raise InputError(f"{shared.dataset!r} has no split {args.split!r}: choose --split {' or '.join(splits)}")
    split = choose_images(args, splits[args.split])
    for run in runs:
        run["images"] = (run["settings"].streaming and run["settings"].train_num_samples) or len(splits["train"])
        for kind, own in perturbations(args, run, run["settings"].rho).items():
            if own.m > args.examples:
                raise InputError(f"{args.examples} images hold no micro-batch of m {own.m}: raise --examples")
            if args.examples // own.m < args.micro_batches:
                accelerator.print(f"{run['folder']}, {kind}: {args.examples // own.m} perturbations, as m is {own.m}")
    output = Path(args.output)
    if accelerator.is_main_process:
        planned = []
        for run in runs:
            kinds = perturbations(args, run, run["settings"].rho)
            planned += [row_name(run["folder"], epoch.name, kind) for epoch in run["epochs"] for kind in kinds]
        files = f"{output}/measurements.csv, correlations.json and the pictures"
        settings.announce_replacement(files, earlier_rows(output), planned)
    measured = measure_all(args, accelerator, runs, split)
    if not accelerator.is_main_process:
        return None
    rows = table_of(measured)
    if full := saturated(measured, args.thresholds, split["label"]):
        print(
            f"at thresholds {', '.join(map(str, full))} some model predicts labels of their own for nearly all images, "
            f"and what is forgotten cannot be seen: raise --examples, or leave these --thresholds out"
        )
    with (output / "measurements.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    found = correlations(rows, args.seed, gap=args.split == "train")
    versions = {module.__name__: module.__version__ for module in (torch, timm, datasets)}
    # JSON has no NaN.
    plain = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in one.items()} for one in found]
    saved = {"correlations": plain, "settings": vars(args), "versions": versions}
    (output / "correlations.json").write_text(json.dumps(saved, indent=2, allow_nan=False) + "\n")
    report.show_correlations(found)
    if not found:
        print(f"no rank correlation: it needs at least {MIN_RUNS} runs with the same perturbation")
    if any(one["settings"] < MIN_SETTINGS for one in found):
        print(f"no interval: of fewer than {MIN_SETTINGS} settings, each with all its seeds, it would mean nothing")
    report.draw_forgetting(measured, rows, found, args.thresholds, output)
    pictures = len(list(output.glob("*.png")))
    print(f"\nwritten: {output}/measurements.csv, correlations.json and {pictures} pictures, as png and svg")
    return found


if __name__ == "__main__":
    with settings.clear_errors():
        main()
