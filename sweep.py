"""Train every point of a grid, or points drawn at random, and compare them.

Start it as often as you have GPUs, on any machines that share the output folder: every copy is a
worker that trains what no other one does.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import itertools
import json
import shlex
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import allocator, checkpoints, data, loaders, report, settings
from common.errors import InputError, clear_errors, lost_process
from common.methods import METHODS

DEATHS = 3  # of workers, without a word, in a row at the same point; then it counts as failed
AGREE = 600  # seconds in which all processes of a worker must come to the end of a run
MAX_NAME = 240  # bytes; ".lock" makes it a lock's


class Failed(InputError):
    """A run ended with an error on all processes of its worker, which goes on with the next one."""


def parser() -> settings.Parser:
    """The sweep's own flags."""
    others = f"{settings.DEFAULTS} Other flags are settings of every run."
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=others)
    p.add_argument("sweep", help="YAML file of grids, perhaps recipe, settings, choose (required)")
    scripts = ["train_imagenet", "finetune_cifar"]
    p.add_argument(
        "--script", choices=scripts, default=scripts[0], help="what a run is (%(default)s)"
    )
    in_place = "YAML file of settings, in place of the sweep's recipe (that)"
    p.add_argument("--recipe", help=in_place)
    p.add_argument("--trials", type=int, help="points to draw from each grid (all of them)")
    p.add_argument("--trial-seed", type=int, default=0, help="of the draw (%(default)s)")
    listed = "print a command for each unfinished point, for a scheduler, and train nothing (no)"
    p.add_argument("--list", action="store_true", help=listed)
    p.add_argument("--output", help="folder of the runs and tables (outputs/NAME of the sweep)")
    return p


def parse(argv=None):
    """Return the sweep's own arguments, and those for every run.

    Raises:
        InputError: a flag or its value is wrong.
    """
    args, rest = parser().parse_known_args(argv)
    args.output = Path(args.output or f"outputs/{Path(args.sweep).stem}")
    if args.trials is not None and args.trials < 1:
        raise InputError(f"trials is {args.trials}; it must be at least 1")
    return args, rest


def read_sweep(path: Path) -> dict:
    """The sweep file, checked.

    Raises:
        InputError: it cannot be read, has an unknown key, no grid, or an empty axis.
    """
    sweep = {"recipe": "", "settings": {}, "choose": [], "grids": []}
    for key, value in settings.read_recipe(path).items():
        if key not in sweep:
            raise InputError(f"{path} has an unknown key {key!r}: it takes {', '.join(sweep)}")
        if not isinstance(value, (type(sweep[key]), type(None))):
            kind = type(sweep[key]).__name__
            raise InputError(f"{path} has {key} {value!r}: it must be a {kind}")
        sweep[key] = value or sweep[key]
    if not sweep["grids"] or not all(isinstance(grid, dict) and grid for grid in sweep["grids"]):
        raise InputError(f"{path} needs grids: a list of mappings, each KEY: [VALUE, ...]")
    axes = list(itertools.chain.from_iterable(grid.items() for grid in sweep["grids"]))
    for key, axis in axes:
        if not is_range(axis) and not (isinstance(axis, list) and axis):
            raise InputError(
                f"the axis {key} of {path} is {axis!r}: give a list of values, or with --trials a "
                f"range {{low: ..., high: ..., log: true}}, low below high, and above 0 for log"
            )
    for key in sweep["choose"]:
        if key not in [varied for varied, _ in axes]:
            raise InputError(f"{path} is to choose {key!r}, which no grid varies")
    if "output" in [*sweep["settings"], *dict(axes)]:
        raise InputError(f"{path} has output, and each run has its own: drop it, and give --output")
    return sweep


def is_range(axis) -> bool:
    """Whether an axis is a mapping of low, high and perhaps log, that can be drawn from."""
    if not isinstance(axis, dict) or set(axis) - {"log"} != {"low", "high"}:
        return False
    low, high = axis["low"], axis["high"]
    numbers = all(isinstance(end, (int, float)) and abs(end) < 1e300 for end in (low, high))
    return numbers and low < high and (low > 0 or not axis.get("log"))


def points_of(args, sweep) -> list[dict]:
    """The settings that each run has of its own.

    Raises:
        InputError: a range without ``--trials``, or a name that is too long for a folder.
    """
    rng, points = np.random.default_rng(args.trial_seed), []
    for grid in sweep["grids"]:
        ranges = [key for key, axis in grid.items() if isinstance(axis, dict)]
        if args.trials is not None:
            for _ in range(args.trials):
                points.append({key: draw(rng, axis) for key, axis in grid.items()})
        elif ranges:
            raise InputError(
                f"the axis {ranges[0]} of {args.sweep} is a range: say how many --trials"
            )
        else:
            points += [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
    points = {name_of(point): point for point in points}
    longest = max(points, key=len)
    if len(longest.encode()) > MAX_NAME:
        remedy = "shorten values, or vary fewer keys"
        raise InputError(f"the run {longest!r} has too long a name for a folder: {remedy}")
    return list(points.values())


def draw(rng, axis):
    """A value of a list, or of a range, uniform or uniform in the logarithm."""
    if isinstance(axis, list):
        return axis[rng.integers(len(axis))]
    low, high = (np.log(axis[end]) if axis.get("log") else axis[end] for end in ("low", "high"))
    value = rng.uniform(low, high)
    return float(np.exp(value) if axis.get("log") else value)


def name_of(point: dict) -> str:
    """A point's name, also that of its folder: without slashes."""
    return report.pairs(point).replace("/", "%2F")


def flags_of(args, sweep, rest, point) -> list[str]:
    """The command line of a run, without --recipe: a point's null overrides what a recipe sets."""
    p = importlib.import_module(args.script).parser()
    path = args.recipe or (sweep["recipe"] and Path(args.sweep).parent / sweep["recipe"])
    recipe = settings.read_recipe(Path(path)) if path else {}
    settings.as_flags(p, recipe, f"the recipe {path}")  # to name it where a key is unknown
    own = recipe | sweep["settings"] | point
    flags = settings.as_flags(p, own, f"the sweep {args.sweep}")
    output = str(args.output / "runs" / name_of(point))
    return [*flags, *rest, "--output", output, "--resume", "auto"]


def check_flags(script, rest, axes):
    """Check that the command line sets nothing that a grid varies, and does train.

    Raises:
        InputError: it is not so.
    """
    p = script.parser()
    p.set_defaults(**dict.fromkeys(axes))
    given = vars(p.parse_known_args(rest)[0])
    if given["dry_run"]:
        raise InputError("--dry-run trains nothing to compare: use it on a run of --script")
    if given["resume"]:
        own = "every run of a sweep goes on from its own checkpoint"
        raise InputError(f"--resume {given['resume']}: {own}, so drop it")
    for key in axes:
        if given[key] is not None:
            where = "on the command line, and the sweep varies it"
            raise InputError(f"{key} is {given[key]} {where}: drop one")


def check_points(sweep, script, commands, processes) -> dict[str, argparse.Namespace]:
    """The settings of every point's run, checked.

    Raises:
        InputError: one cannot be trained, or there are no validation images to choose on.
    """
    checked = {name: settings.parse(script.parser(), flags) for name, flags in commands.items()}
    sources = {}
    for point in checked.values():
        if point.push_to_hub:
            over = "the runs of a sweep would upload over each other"
            raise InputError(f"push_to_hub {point.push_to_hub}: {over}, so drop it")
        _, _, point.m = loaders.split_batch(point, processes)
        shares = (point.streaming, point.validation_share, point.train_share)
        sources[(point.dataset, *shares, data.Names.of(point))] = None
    for source in sources if sweep["choose"] else ():
        if "validation" not in data.load(*source):
            what = f"{source[0]!r} has no validation images to choose on"
            raise InputError(f"{what}: give --validation-share")
    return checked


def check_folder(args, axes, checked):
    """Check that the folder holds nothing of other settings, and note there what all points share.

    Raises:
        InputError: it does, or it cannot be written.
    """
    # These may differ between points.
    of_methods = itertools.chain.from_iterable(own for _, own in METHODS.values())
    free = {"m", *axes, *of_methods, *settings.EMA}
    shared = {"script": args.script} | settings.resolved(next(iter(checked.values())))
    settings.make_output(args.output / "locks")
    file = args.output / "sweep.yaml"
    with FileLock(args.output / "locks" / "sweep.lock"):
        if not file.exists():
            checkpoints.write_whole(file, yaml.safe_dump(shared))
    check_same(args.output, settings.read_recipe(file), shared, free)
    for name, point in checked.items():
        if results_of(args, name) is not None:
            run = args.output / "runs" / name
            check_same(run, settings.read_recipe(run / "settings.yaml"), settings.resolved(point))


def check_same(where, earlier: dict, now: dict, free=()):
    """Check that settings are the same, but for those that are ``free`` or change no result.

    Raises:
        InputError: one differs.
    """
    for key in {**now, **earlier}:
        if key in (*free, *settings.FREE_ON_RESUME):
            continue
        if earlier.get(key) != now.get(key):
            differs = f"{key} {earlier.get(key)!r}, and this sweep has {now.get(key)!r}"
            raise InputError(f"{where} was trained with {differs}: choose another --output")


def results_of(args, name: str) -> dict | None:
    """Top-1 by split of a point's run, or None while it is not finished."""
    try:
        return json.loads((args.output / "runs" / name / "results.json").read_text())["last"]
    except (OSError, ValueError):  # not there, or cut off while it was written
        return None


def history_of(args, name: str) -> list[str]:
    """How the attempts at a point began and ended, a line each."""
    file = args.output / "attempts" / f"{name}.txt"
    return file.read_text().splitlines() if file.exists() else []


def claim(args, name: str):
    """The lock ``name``, held, or None if another process holds it.

    The system frees the locks of a process that ends, ``kill -9`` included.
    """
    try:
        return FileLock(args.output / "locks" / f"{name}.lock").acquire(blocking=False)
    except Timeout:
        return None


def attempt(args, name: str, run):
    """Train a point whose lock is held; its history says how that ends, unless the worker dies.

    Raises:
        InputError: the run failed, and this worker cannot go on.
        SystemExit: it was stopped by SIGTERM or Ctrl-C.
    """
    file = args.output / "attempts" / f"{name}.txt"
    file.parent.mkdir(exist_ok=True)
    deaths = itertools.takewhile("began".__eq__, reversed(history_of(args, name)))
    with file.open("a", buffering=1) as history:
        try:
            if len(list(deaths)) >= DEATHS:
                raise Failed(f"{DEATHS} workers died at it without a word; is there enough memory?")
            history.write("began\n")
            run(name)
            history.write("finished\n")
        except InputError as error:
            history.write(f"failed: {error}\n")
            print(f"failed: {name}: {error}", file=sys.stderr)
            if not isinstance(error, Failed):
                raise
        except (SystemExit, KeyboardInterrupt) as end:
            history.write("stopped\n")
            print(f"stopped in {name}; the same command goes on", file=sys.stderr)
            raise SystemExit(getattr(end, "code", 130)) from None


def work(args, names, run) -> dict[str, str]:
    """Train points until none is left; wait for those of other workers, which may die.

    ``run`` trains the point of a name; without one, it keeps this worker's processes waiting.

    Returns:
        Why points failed since this worker began, here or elsewhere; a restart tries them again.
    """
    began, earlier = time.monotonic(), {name: len(history_of(args, name)) for name in names}
    done = sum(results_of(args, name) is not None for name in names)

    def show(what):  # not redrawn, since workers may share a terminal
        now = sum(results_of(args, name) is not None for name in names)
        times = {"elapsed": time.monotonic() - began, "initial": done, "unit": "run"}
        print(tqdm.format_meter(now, len(names), prefix=what, **times), file=sys.stderr)

    def why_failed(name):
        last = history_of(args, name)[earlier[name] :][-1:]
        return last[0].removeprefix("failed: ") if last and last[0].startswith("failed") else None

    show(args.output.name)
    left = sorted(names, key=earlier.get)  # what failed or died may end this worker too: last
    while left:
        busy = []
        for name in left:
            lock = claim(args, name)
            if lock is None:
                busy.append(name)
                continue
            with lock:
                if results_of(args, name) is None and not why_failed(name):
                    attempt(args, name, run)
                    show(name)
        if busy == left:
            run()
            time.sleep(1)
        left = busy
    return {name: reason for name in names if (reason := why_failed(name))}


def join(args):
    """A lock that shows the other workers that this one lives."""
    return next(filter(None, (claim(args, f"worker-{number}") for number in itertools.count())))


def leave(args, presence) -> bool:
    """Give back what ``join`` returned; say whether no other worker is left."""
    locks = args.output / "locks"
    with FileLock(locks / "leave.lock"):
        presence.lock.release()
        claims = [claim(args, path.stem) for path in locks.glob("worker-*.lock")]
        for own in filter(None, claims):
            own.lock.release()
    return all(claims)


def train(args, script, commands, accelerator, group, name=""):
    """Train the main process's point on all processes of this worker; return its name.

    Its name is "" while there is none, and None when there will be no more.

    Raises:
        Failed: it failed; the processes can go on with another.
        InputError: they cannot.
    """
    (name,) = broadcast_object_list([name])
    if not name:
        return name
    reason = None
    log = args.output / "logs" / f"{name}.txt"
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            script.main(commands[name])
        except Exception as error:  # each library has its own, for a lack of memory too
            traceback.print_exc()
            if lost_process(error):
                raise
            reason = one_line(error)
    if reason:
        clear_device_cache(garbage_collection=True)  # of what it held
    agree(reason, accelerator, group)
    return name


def one_line(error: Exception) -> str:
    """What an error says."""
    if isinstance(error, InputError):
        return " ".join(str(error).split())
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def agree(reason, accelerator, group):
    """End a run on all processes, with the ``reason`` for which it failed on one, or None.

    Raises:
        Failed: it failed; the processes can go on with another.
        InputError: they cannot: the others hang in it, or the GPU takes no more work.
    """
    reasons = [reason] * accelerator.num_processes
    try:
        torch.zeros(1, device=accelerator.device).item()
        if group:
            torch.distributed.all_gather_object(reasons, reason, group=group)
    except RuntimeError as error:
        if reason is None:
            raise
        remedy = "after which this worker cannot go on: start it anew"
        raise InputError(f"{reason}; {remedy}") from error
    if any(reasons):
        raise Failed(next(filter(None, reasons)))


def tabulate(args, choose, points):
    """Write settings and results of finished runs into sweep.csv, draw curves, print means."""
    rows, curves = [], {}
    for name, point in points.items():
        results = results_of(args, name)
        if results is None:
            continue
        rows.append({"run": str(args.output / "runs" / name), "point": point, "results": results})
        others = report.pairs({key: value for key, value in point.items() if key != "seed"})
        metrics = report.read_metrics(Path(rows[-1]["run"]))
        curves.setdefault(others or "all seeds", []).extend(metrics)
    if rows:
        flat = [{"run": row["run"], **row["point"], **row["results"]} for row in rows]
        pd.DataFrame(flat, dtype=object).to_csv(args.output / "sweep.csv", index=False)
        report.show_sweep(rows, choose)
        report.draw_curves(curves, args.output / "curves.png")
        print(f"\nwritten: {args.output}/sweep.csv, curves.png, curves.svg, runs/, logs/")


def main(argv=None):
    """Run as from the command line."""
    allocator.keep_freed_memory()
    args, rest = parse(argv)
    sweep = read_sweep(Path(args.sweep))
    axes = {str(key): None for grid in sweep["grids"] for key in grid}
    points = {name_of(point): point for point in points_of(args, sweep)}
    script = importlib.import_module(args.script)
    check_flags(script, rest, axes)
    commands = {name: flags_of(args, sweep, rest, point) for name, point in points.items()}
    accelerator = Accelerator()
    checked = check_points(sweep, script, commands, accelerator.num_processes)
    check_folder(args, axes, checked)
    drawn = (args.trials or 0) * len(sweep["grids"])
    if len(points) < drawn:
        seen = f"{len(points)} points are left of {drawn}: some were drawn more than once"
        accelerator.print(seen, file=sys.stderr)
    if args.list:
        for name, flags in commands.items():
            if accelerator.is_main_process and results_of(args, name) is None:
                print(shlex.join([sys.executable, str(Path(script.__file__).resolve()), *flags]))
        return
    # Apart from the processes' usual group: one that failed would meet the others in an update.
    limit, several = datetime.timedelta(seconds=AGREE), accelerator.num_processes > 1
    group = torch.distributed.new_group(backend="gloo", timeout=limit) if several else None
    run = functools.partial(train, args, script, commands, accelerator, group)
    if not accelerator.is_main_process:
        name = ""
        while name is not None:
            with contextlib.suppress(Failed):
                name = run()
        return
    presence = join(args)
    try:
        failed = work(args, points, run)
    finally:
        last = leave(args, presence)
        if last:
            tabulate(args, sweep["choose"], points)
    run(None)
    if failed and last:
        print("", *(f"{name}: {why}" for name, why in failed.items()), sep="\n")
    if failed:
        raise InputError(
            f"{len(failed)} of {len(points)} runs failed, with tracebacks in {args.output}/logs; "
            f"the same command tries them once more"
        )


if __name__ == "__main__":
    with clear_errors():
        main()
