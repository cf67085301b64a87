"""Train every point of a grid, or points drawn at random, with any number of workers on one storage; compare them."""

import contextlib
import csv
import importlib
import itertools
import json
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from optuna.trial import TrialState
from tqdm.auto import tqdm

from common import data, loaders, report, settings
from common.settings import InputError

ATTEMPTS, TIMEOUT = 3, 20  # to open the storage; seconds that SQLite waits for its lock
HEARTBEAT, GRACE = 10, 60  # seconds; a worker that is silent for longer has died
MAX_NAME = 240  # bytes; ".txt" makes it a log's
KINDS = {"recipe": str, "settings": dict, "choose": list, "grids": list}  # the keys of a sweep
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)


def parser() -> settings.Parser:
    """The sweep's own flags."""
    others = f"{settings.DEFAULTS} Other flags are settings of every run."
    p = settings.Parser(description=__doc__, allow_abbrev=False, epilog=others)
    p.add_argument("sweep", help="YAML file of grids, perhaps recipe, settings and choose, as in sweeps/ (required)")
    scripts = ["train_imagenet", "finetune_cifar"]
    p.add_argument("--script", choices=scripts, default=scripts[0], help="what a run is (%(default)s)")
    p.add_argument("--trials", type=int, help="points to draw from each grid (all of them)")
    p.add_argument("--trial-seed", type=int, default=0, help="of the draw (%(default)s)")
    p.add_argument("--storage", help="Optuna's URL of a database that all workers share (OUTPUT/sweep.db)")
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
    given = {key: value for key, value in settings.read_recipe(path).items() if value is not None}
    sweep = {"recipe": "", "settings": {}, "choose": [], "grids": [], **given}
    unknown = sorted(map(str, set(sweep) - set(KINDS)))
    if unknown:
        raise InputError(f"the sweep {path} has an unknown key {unknown[0]!r}: it takes {', '.join(sorted(KINDS))}")
    for key, kind in KINDS.items():
        if not isinstance(sweep[key], kind):
            raise InputError(f"the sweep {path} has {key} {sweep[key]!r}: it must be a {kind.__name__}")
    grids = sweep["grids"]
    if not grids or not all(isinstance(grid, dict) and grid for grid in grids):
        raise InputError(f"the sweep {path} needs grids: a list of mappings, each KEY: [VALUE, ...]; it has {grids!r}")
    for key, axis in itertools.chain.from_iterable(grid.items() for grid in grids):
        if not is_range(axis) and not (isinstance(axis, list) and axis):
            raise InputError(
                f"the axis {key} of the sweep {path} is {axis!r}: give a list of values, or with --trials a range "
                f"{{low: ..., high: ..., log: true}}, low below high, and above 0 for log"
            )
    for key in map(str, sweep["choose"]):
        if not any(key in grid for grid in grids):
            raise InputError(f"the sweep {path} is to choose {key!r}, which no grid varies")
    try:
        json.dumps(grids)
    except TypeError as error:  # a date, or binary data
        raise InputError(f"the sweep {path} has a value that cannot be stored: {error}") from error
    return sweep


def is_range(axis) -> bool:
    """Whether an axis of a sweep is a mapping of low, high and perhaps log, that can be drawn from."""
    if not isinstance(axis, dict) or set(axis) - {"log"} != {"low", "high"}:
        return False
    low, high = axis["low"], axis["high"]
    numbers = all(isinstance(end, (int, float)) and abs(end) < 1e300 for end in (low, high))
    return numbers and low < high and (low > 0 or not axis.get("log"))


def points_of(args, sweep) -> list[dict]:
    """The settings that each run has of its own."""
    rng, points = np.random.default_rng(args.trial_seed), []
    for grid in sweep["grids"]:
        ranges = [key for key, axis in grid.items() if isinstance(axis, dict)]
        if args.trials is None:
            if ranges:
                raise InputError(f"the axis {ranges[0]} of the sweep {args.sweep} is a range: say how many --trials")
            points += [dict(zip(grid, values)) for values in itertools.product(*grid.values())]
        else:
            points += [{key: draw(rng, axis) for key, axis in grid.items()} for _ in range(args.trials)]
    points = {name_of(point): point for point in points}
    longest = max(points, key=len)
    if len(longest.encode()) > MAX_NAME:
        raise InputError(f"the run {longest!r} has too long a name for a folder: shorten values, or vary fewer keys")
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


def flags_of(args, sweep, rest, point):
    """The command line of a run."""
    p = settings.parser("", "")
    recipe = ["--recipe", str(Path(args.sweep).parent / sweep["recipe"])] if sweep["recipe"] else []
    own = settings.as_flags(p, sweep["settings"] | point, f"the sweep {args.sweep}")
    return [*recipe, *own, *rest, "--output", str(args.output / "runs" / name_of(point)), "--resume", "auto"]


def open_study(args, shared: dict):
    """The queue of runs, which all workers share; ``shared`` are the settings that all its runs have in common.

    Raises:
        InputError: the storage cannot be used, or holds a sweep of other settings.
    """
    args.output.mkdir(parents=True, exist_ok=True)
    url = args.storage or f"sqlite:///{args.output / 'sweep.db'}"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sqlite = url.startswith("sqlite")
    engine = {"connect_args": {"timeout": TIMEOUT}} if sqlite else {}
    options = {"study_name": args.output.name, "direction": "maximize", "load_if_exists": True}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            storage = optuna.storages.RDBStorage(url, engine, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            if sqlite:  # which has no SELECT ... FOR UPDATE: two workers would take the same run
                sqlalchemy.event.listen(storage.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
            study = optuna.create_study(storage=storage, **options)
            earlier = study.user_attrs.get("shared", shared)
            study.set_user_attr("shared", earlier)
            break
        except (RuntimeError, sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
            if attempt == ATTEMPTS:
                reason = str(error).splitlines()[0]
                raise InputError(
                    f"cannot use the storage {url}: {reason}. End the program that locks it; or if another version of "
                    f"Optuna wrote it, choose another --storage. Finished runs are kept"
                ) from error
            time.sleep(1)  # another worker may be creating it
    for key in sorted(set(earlier) & set(shared)):
        if earlier[key] != shared[key]:
            differs = f"{key} {earlier[key]!r}, and this one has {shared[key]!r}"
            raise InputError(f"{url} holds a sweep with {differs}: choose another --output")
    return study


def trials(study, *states):
    """The sweep's own trials by the names of their points; of a point's, the first."""
    found = {}
    for trial in study.get_trials(deepcopy=False, states=states):
        if "point" in trial.user_attrs:
            found.setdefault(name_of(trial.user_attrs["point"]), trial)
    return found


def work(study, points, run, idle):
    """Call ``run`` for every point that is left, until none is: those too whose worker has died, after a minute.

    Returns:
        The names of points that failed here; a restart tries them again.
    """
    failed = set()

    def objective(trial):
        point = trial.user_attrs.get("point")
        first = trials(study, TrialState.COMPLETE, *UNFINISHED).get(name_of(point)) if point else None
        if first is None or first.number < trial.number:  # another worker took the last one, or queued it too
            raise optuna.TrialPruned
        try:
            results = run(point)
        except InputError as error:
            failed.add(name_of(point))
            tqdm.write(f"failed: {name_of(point)}: {error}")
            raise
        except SystemExit:  # by SIGTERM
            study.tell(trial, state=TrialState.FAIL)
            raise
        trial.set_user_attr("results", results)
        return results.get("validation", results.get("test"))

    with tqdm(total=len(points), unit="run", dynamic_ncols=True, file=sys.stdout) as bar:
        while True:
            optuna.storages.fail_stale_trials(study)
            known = trials(study, TrialState.COMPLETE, *UNFINISHED)
            for point in points:
                if name_of(point) not in known and name_of(point) not in failed:
                    study.enqueue_trial({}, user_attrs={"point": point})
            bar.n = len(trials(study, TrialState.COMPLETE))
            bar.refresh()
            if trials(study, TrialState.WAITING):
                study.optimize(objective, n_trials=1, catch=(InputError,))
            elif trials(study, TrialState.RUNNING):
                idle()
            else:
                return failed


def save(args, rows):
    """Write every run's settings and results into sweep.csv."""
    with (args.output / "sweep.csv").open("w", newline="") as file:
        flat = [{"run": row["run"], **row["point"], **row["results"]} for row in rows]
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)


def main(argv=None):
    """Run as from the command line; the main process returns a row for each finished run."""
    args, rest = parse(argv)
    accelerator = Accelerator()
    sweep = read_sweep(Path(args.sweep))
    points = points_of(args, sweep)
    for point in points:
        checked = settings.parse(settings.parser("", ""), flags_of(args, sweep, rest, point))
        loaders.split_batch(checked, accelerator.num_processes)
    if sweep["choose"]:
        splits = data.load(checked.dataset, checked.streaming, checked.validation_share)
        if "validation" not in splits:
            raise InputError(f"{checked.dataset!r} has no validation images to choose on: give --validation-share")
    script = importlib.import_module(args.script)

    def run(point=None):
        """Train a point, the main process's, on all processes; None if there is no more."""
        (point,) = broadcast_object_list([point])
        if not point:
            return point
        log = args.output / "logs" / f"{name_of(point)}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            return script.main(flags_of(args, sweep, rest, point))

    def idle():
        run({})  # or the other processes would time out
        time.sleep(1)

    if not accelerator.is_main_process:
        going = {}
        while going is not None:
            with contextlib.suppress(InputError):
                going = run()
        return None
    recipe = settings.parser("", "").parse_known_args(flags_of(args, sweep, rest, points[0]))[0].recipe
    shared = (settings.read_recipe(Path(recipe)) if recipe else {}) | sweep["settings"]
    study = open_study(args, shared | {"script": args.script, "flags": rest})
    failed = work(study, points, run, idle)
    run()
    complete = trials(study, TrialState.COMPLETE)
    rows = [
        {"run": str(args.output / "runs" / name), "point": point, "results": complete[name].user_attrs["results"]}
        for name, point in ((name_of(point), point) for point in points)
        if name in complete
    ]
    if rows:
        save(args, rows)
        report.show_sweep(rows, sweep["choose"])
        print(f"\nwritten: {args.output}/sweep.csv, runs/, logs/")
    if failed:
        raise InputError(f"{len(failed)} of {len(points)} runs failed, as said above; the same command retries them")
    return rows


if __name__ == "__main__":
    with settings.clear_errors():
        main()
