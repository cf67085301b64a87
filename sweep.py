"""Train every point of a grid, or points drawn at random, with any number of workers on one storage; compare them."""

import contextlib
import csv
import datetime
import importlib
import itertools
import json
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import optuna
import sqlalchemy
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from optuna.trial import TrialState
from tqdm.auto import tqdm

from common import data, loaders, report, settings
from common.settings import InputError

ATTEMPTS, TIMEOUT = 3, 20  # to open the storage; seconds that SQLite waits for its lock
HEARTBEAT, GRACE = 10, 60  # seconds; a worker that is silent for longer has died
DEATHS = 3  # of workers, without a word, at the same point; then it counts as failed
AGREE = 600  # seconds in which all processes of a worker must come to the end of a run
DRIVERS = {"psycopg": "'psycopg[binary]'", "psycopg2": "psycopg2-binary", "MySQLdb": "mysqlclient"}
MAX_NAME = 240  # bytes; ".txt" makes it a log's
KINDS = {"recipe": str, "settings": dict, "choose": list, "grids": list}  # the keys of a sweep
UNFINISHED = (TrialState.RUNNING, TrialState.WAITING)
STORAGE_ERRORS = (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError)


class Failed(InputError):
    """A run ended with an error, on all processes of its worker, which goes on with the next one."""


class Storage(optuna.storages.RDBStorage):
    """Optuna's storage; a heartbeat that does not reach the server is made up for by the next one.

    A trial that has had one says "begun": without any, Optuna never takes it for dead.
    """

    def record_heartbeat(self, trial_id):
        with contextlib.suppress(*STORAGE_ERRORS):
            super().record_heartbeat(trial_id)
            self.set_trial_user_attr(trial_id, "begun", True)


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


def check_flags(sweep, rest):
    """Check that the command line, which overrides the sweep, sets nothing that a grid varies."""
    p, axes = settings.parser("", ""), {str(key): None for grid in sweep["grids"] for key in grid}
    p.set_defaults(**axes)
    given = vars(p.parse_known_args(rest)[0])
    if given["dry_run"]:
        raise InputError("--dry-run trains nothing, so a sweep would have no results: use it on a run of --script")
    for key in axes:
        if given[key] is not None:
            raise InputError(f"{key} is {given[key]} on the command line, and the sweep varies it: drop one")


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
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # a failed run is said here, its traceback is in its log
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    sqlite = url.startswith("sqlite")
    engine = {"connect_args": {"timeout": TIMEOUT}} if sqlite else {"pool_pre_ping": True}
    options = {"study_name": args.output.name, "direction": "maximize", "load_if_exists": True}
    for attempt in range(1, ATTEMPTS + 1):
        try:
            storage = Storage(url, engine, heartbeat_interval=HEARTBEAT, grace_period=GRACE)
            if sqlite:  # which has no SELECT ... FOR UPDATE: two workers would take the same run
                sqlalchemy.event.listen(storage.engine, "begin", lambda c: c.exec_driver_sql("BEGIN IMMEDIATE"))
            else:
                sqlalchemy.event.listen(storage.engine, "do_connect", connect)
            study = optuna.create_study(storage=storage, **options)
            earlier = study.user_attrs.get("shared", shared)
            study.set_user_attr("shared", earlier)
            break
        except ImportError as error:
            missing = error.__cause__.name
            remedy = f"pip install {DRIVERS.get(missing, missing)}"
            raise InputError(f"the storage {shown(url)} needs the package {missing}: {remedy}") from error
        except (RuntimeError, *STORAGE_ERRORS) as error:
            if attempt == ATTEMPTS:
                raise InputError(
                    f"cannot use the storage {shown(url)}: {one_line(error)}. Start its server, or end the program "
                    f"that locks it; or if another version of Optuna wrote it, choose another --storage. Finished runs "
                    f"are kept"
                ) from error
            time.sleep(1)  # another worker may be creating it
    for key in sorted(set(earlier) & set(shared)):
        if earlier[key] != shared[key]:
            differs = f"{key} {earlier[key]!r}, and this one has {shared[key]!r}"
            raise InputError(f"{shown(url)} holds a sweep with {differs}: choose another --output")
    return study


def connect(dialect, record, args, options):
    """Connect to a server, which may be restarting; SQLAlchemy calls it for every new connection."""
    for _ in range(GRACE):
        with contextlib.suppress(dialect.loaded_dbapi.OperationalError):
            return dialect.connect(*args, **options)
        time.sleep(1)
    return dialect.connect(*args, **options)


def shown(url: str) -> str:
    """A storage's URL without its password."""
    with contextlib.suppress(sqlalchemy.exc.ArgumentError):
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    return url


def one_line(error: BaseException) -> str:
    """What an error says, or its cause where Optuna's own words hide that."""
    if isinstance(error, InputError):  # a data loading process puts its traceback before the message
        return " ".join(str(error).split("settings.InputError: ")[-1].split())
    if isinstance(error, optuna.exceptions.StorageInternalError):
        error = error.__cause__ or error
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


def trials(study, *states):
    """The sweep's own trials by the names of their points; of a point's, the first."""
    found = {}
    for trial in study.get_trials(deepcopy=False, states=states):
        if "point" in trial.user_attrs:
            found.setdefault(name_of(trial.user_attrs["point"]), trial)
    return found


def failures(study, earlier: set) -> tuple[dict, Counter]:
    """Why points failed, by name, other than in the trials ``earlier``; and how often each has failed in all.

    A point fails with an error, or because all workers that took it died.
    """
    reasons, deaths, times, points = {}, Counter(), Counter(), {}
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        if "point" not in trial.user_attrs:
            continue
        name = name_of(trial.user_attrs["point"])
        points[name] = trial.user_attrs["point"]
        times[name] += 1
        if "error" in trial.user_attrs:
            deaths[name] = 0
            if trial.number not in earlier:
                reasons[name] = trial.user_attrs["error"]
        elif "stopped" not in trial.user_attrs:
            deaths[name] += 1
    for name in [name for name, number in deaths.items() if number >= DEATHS]:
        reasons[name] = f"{DEATHS} workers died at it without a word; is there enough memory?"
        attributes = {"point": points[name], "error": reasons[name]}
        study.add_trial(optuna.trial.create_trial(state=TrialState.FAIL, user_attrs=attributes))
    return reasons, times


def fail_dead(study, seen: dict):
    """Fail the trials of dead workers, those too without a heartbeat yet, which Optuna would leave running for ever.

    ``seen`` holds when this worker first saw those.
    """
    optuna.storages.fail_stale_trials(study)
    now = time.monotonic()
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if "begun" not in trial.user_attrs and now - seen.setdefault(trial.number, now) > GRACE:
            study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)


def work(study, points, run, idle):
    """Call ``run`` for every point that is left, until none is: those too whose worker has died, after a minute.

    Returns:
        Why points failed, here or in another worker, by name; a restart tries them once more.
    """
    earlier = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))}
    seen = {}

    def objective(trial):
        point = trial.user_attrs.get("point")
        first = trials(study, TrialState.COMPLETE, *UNFINISHED).get(name_of(point)) if point else None
        if first is None or first.number < trial.number:  # another worker took the last one, or queued it too
            raise optuna.TrialPruned
        try:
            results = run(point)
        except InputError as error:
            trial.set_user_attr("error", one_line(error))
            tqdm.write(f"failed: {name_of(point)}: {one_line(error)}")
            raise
        except (SystemExit, KeyboardInterrupt) as end:  # by SIGTERM or Ctrl-C
            trial.set_user_attr("stopped", True)
            study.tell(trial, state=TrialState.FAIL)
            tqdm.write(f"stopped in {name_of(point)}; the same command goes on")
            raise SystemExit(getattr(end, "code", 130)) from None
        trial.set_user_attr("results", results)
        return results.get("validation", results.get("test"))

    with tqdm(total=len(points), unit="run", dynamic_ncols=True, file=sys.stdout) as bar:
        while True:
            fail_dead(study, seen)
            known = trials(study, TrialState.COMPLETE, *UNFINISHED)
            failed, times = failures(study, earlier)  # after known: what fails in between is in both, not in neither
            left = {name_of(point): point for point in points if name_of(point) not in known}
            names = [name for name in left if name not in failed]
            states = [trial.state for trial in known.values()]
            bar.n = states.count(TrialState.COMPLETE)
            bar.refresh()
            if names:  # one at a time: reading a long queue takes longer than a short run
                first = min(names, key=times.__getitem__)  # what failed before comes last: it may end this worker too
                study.enqueue_trial({}, user_attrs={"point": left[first]})
            if names or TrialState.WAITING in states:
                try:
                    study.optimize(objective, n_trials=1, catch=(Failed,))
                except AssertionError as error:  # Optuna's own, over a storage that was lost as it took the result
                    raise error.__context__ if isinstance(error.__context__, STORAGE_ERRORS) else error from None
            elif TrialState.RUNNING in states:
                idle()
            else:
                return {name: failed[name] for name in left}


def train(script, flags, log: Path):
    """Run a script, what it prints going to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return script.main(flags)
        except Exception:
            traceback.print_exc()
            raise


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
        raise InputError(f"{reason}; after which this worker cannot go on: start it anew") from error
    if any(reasons):
        raise Failed(next(filter(None, reasons)))


def tabulate(args, choose, points, complete):
    """Write every finished run's settings and results into sweep.csv, print their means, and return a row for each."""
    rows = [
        {"run": str(args.output / "runs" / name), "point": point, "results": complete[name].user_attrs["results"]}
        for name, point in ((name_of(point), point) for point in points)
        if name in complete
    ]
    if not rows:
        return rows
    flat = [{"run": row["run"], **row["point"], **row["results"]} for row in rows]
    with (args.output / "sweep.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)))
        writer.writeheader()
        writer.writerows(flat)
    report.show_sweep(rows, choose)
    curves = {}  # of the runs whose folders are on this machine
    for row in rows:
        setting = report.pairs({key: value for key, value in row["point"].items() if key != "seed"}) or "all seeds"
        if metrics := report.read_metrics(Path(row["run"])):
            curves.setdefault(setting, []).extend(metrics)
    if curves:
        report.draw_curves(curves, args.output / "curves.png")
    pictures = "curves.png, curves.svg, " if curves else ""
    print(f"\nwritten: {args.output}/sweep.csv, {pictures}runs/, logs/")
    return rows


def main(argv=None):
    """Run as from the command line; the main process returns a row for each finished run."""
    args, rest = parse(argv)
    accelerator = Accelerator()
    sweep = read_sweep(Path(args.sweep))
    points = points_of(args, sweep)
    check_flags(sweep, rest)
    for point in points:
        checked = settings.parse(settings.parser("", ""), flags_of(args, sweep, rest, point))
        loaders.split_batch(checked, accelerator.num_processes)
    if sweep["choose"]:
        splits = data.load(checked.dataset, checked.streaming, checked.validation_share, checked.train_share)
        if "validation" not in splits:
            raise InputError(f"{checked.dataset!r} has no validation images to choose on: give --validation-share")
    script = importlib.import_module(args.script)

    # Apart from the processes' usual group, in which one that failed would meet the others in the middle of an update.
    limit, several = datetime.timedelta(seconds=AGREE), accelerator.num_processes > 1
    group = torch.distributed.new_group(backend="gloo", timeout=limit) if several else None

    def run(point=None):
        """Train a point, the main process's, on all processes; None if there is no more."""
        (point,) = broadcast_object_list([point])
        if not point:
            return point
        reason = results = None
        try:
            log = args.output / "logs" / f"{name_of(point)}.txt"
            results = train(script, flags_of(args, sweep, rest, point), log)
        except Exception as error:  # each library has its own, for a lack of memory too
            if settings.lost_process(error):
                raise
            reason = one_line(error)
        if reason:
            clear_device_cache(garbage_collection=True)  # what it held, above all if it ran out of memory
        agree(reason, accelerator, group)
        return results

    def idle():
        run({})  # or the other processes would time out
        time.sleep(1)

    if not accelerator.is_main_process:
        going = {}
        while going is not None:
            with contextlib.suppress(Failed):
                going = run()
        return None
    recipe = settings.parser("", "").parse_known_args(flags_of(args, sweep, rest, points[0]))[0].recipe
    shared = (settings.read_recipe(Path(recipe)) if recipe else {}) | sweep["settings"]
    study = open_study(args, shared | {"script": args.script, "flags": rest})
    try:
        try:
            failed = work(study, points, run, idle)
        finally:
            rows = tabulate(args, sweep["choose"], points, trials(study, TrialState.COMPLETE))
    except STORAGE_ERRORS as error:
        raise InputError(f"lost the storage: {one_line(error)}. Once it is back, the same command goes on") from error
    run()
    if failed:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failed.items())
        print(f"\nfailed, with tracebacks in {args.output}/logs/:\n{reasons}")
        raise InputError(
            f"{len(failed)} of {len(points)} runs failed, as said above; the same command retries them once more"
        )
    return rows


if __name__ == "__main__":
    with settings.clear_errors():
        main()
