"""Every flag of the scripts that evaluate, measure and compare reaches what it is about, and
nothing else; and results of other flags, finished before in the same folder, are not taken for
its own.

``test_every_setting.py`` does this for training. A new flag needs a row in its script's table.
"""

import argparse
import contextlib
import csv
import io
import itertools
import json
import shutil
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from flags import check_every_flag_has_a_row, flags_of
from helpers import fresh_process, tiny_net
from oracle import write_folders
from PIL import Image
from safetensors.torch import save_file
from test_every_setting import SETTINGS, same, write_hub_dataset
from timm.data import resolve_data_config
from timm.models import save_for_hf

import eval_robustness
import finetune_cifar
import measure_forgetting
import sweep
import train_imagenet
from common import data, loaders, settings
from common.errors import InputError
from common.methods import METHODS
from robustness import predictions, sets
from robustness.labels import WORDNET

pytestmark = pytest.mark.slow


class Row(NamedTuple):
    """A value that differs from the usual one, and the parts of what a script does that must
    differ with it.

    Those with a question mark may differ. ``base`` are other flags of both runs.
    """

    value: object
    parts: str
    base: dict = {}  # noqa: RUF012


NOTHING = ""  # these change no result; why is said beside them
LABELS = ["dog", "wild", "cat", "tame"]  # in another order than the data sets'


def small_model(seed, outputs):
    """A model whose predictions differ between images of noise."""
    torch.manual_seed(seed)
    model = tiny_net(num_classes=outputs).eval()
    with torch.no_grad():
        features = model.norm(model.conv(0.5 * torch.randn(200, 3, 16, 16))).relu().mean((-2, -1))
        model.fc.weight.div_(features.std(0))
        model.fc.bias.copy_(-model.fc.weight @ features.mean(0))
    return model


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Data sets, and trained models in folders and files, by what the tables call them."""
    root = tmp_path_factory.mktemp("places")
    for seed, name in enumerate(("data", "other_data")):
        write_hub_dataset(root / name, seed)
    for seed, name in enumerate(("trained", "other_trained")):
        names, model = {"label_names": LABELS}, small_model(seed, len(LABELS))
        save_for_hf(model, root / name, model_config=names, safe_serialization=True)
    save_for_hf(small_model(2, 1000), root / "of_imagenet", safe_serialization=True)
    one, other, average = (small_model(seed, 1000).state_dict() for seed in (3, 4, 5))
    torch.save({"state_dict": one, "state_dict_ema": average}, root / "weights.pth")
    save_file(other, root / "weights.safetensors")
    write_folders(root / "val", {WORDNET[i]: i for i in (7, 300, 800)})
    rng, numbers = np.random.default_rng(0), itertools.count(1)
    for path in sorted((root / "val").glob("*/*")):
        pixels = rng.integers(0, 255, (20, 26, 3), dtype=np.uint8)
        name = f"ILSVRC2012_val_{next(numbers):08d}.JPEG"
        Image.fromarray(pixels).save(path.rename(path.with_name(name)), "jpeg")
    return root


def argv(script, values, places):
    """Flags of a script, with <NAME> for the place of that name."""

    def text(value):
        for path in sorted(places.iterdir()):
            value = str(value).replace(f"<{path.name}>", str(path))
        return str(value)

    flags = []
    for action in flags_of(script):
        value = values.get(action.dest)
        if value is None:
            continue
        several = value if isinstance(value, list) else [value]
        switch = action.nargs == 0
        no = f"--no-{action.option_strings[0][2:]}" if value is False else ""
        flags += [no] if no else action.option_strings[:1]
        flags += [] if switch else map(text, several)
    return flags


def contents(folder, but=()):
    """What the files of a folder hold, by name; a picture is one or is not."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or any(part in name for part in but):
            continue
        if path.suffix == ".parquet":
            found[name] = pq.read_table(path).to_pydict()
        else:
            text = path.read_text() if path.suffix not in (".png", ".svg") else ""
            found[name] = json.loads(text) if path.suffix == ".json" else text
    return found


class Watched(NamedTuple):
    """What a script did."""

    parts: dict
    folder: Path


def watched(script, watch_class, values, places, folder):
    """Run a script on flags in a folder; an error is one of its parts."""
    parts = {name: [] for name in watch_class.BEARING}
    printed = io.StringIO()
    values = {"output": str(folder), **values}
    folder = Path(str(values["output"]).replace("<root>", str(folder)))
    values["output"] = str(folder)
    fresh_process()
    with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(printed):
        watch = watch_class(monkeypatch, parts)
        try:
            script.main(argv(script, values, places))
        except InputError as error:
            parts["refused"].append(str(error))
            return Watched(parts, folder)
    parts["printed"].append(printed.getvalue().replace(str(folder), "OUTPUT"))
    parts["files"].append(sorted(contents(folder)))
    parts["place"].append(folder.name)
    watch.end(folder)
    return Watched(parts, folder)


class Script(NamedTuple):
    """A script, what watches it, the usual flags, and its table."""

    module: object
    watch: type
    usual: dict
    rows: dict


def two_runs(script, key) -> list[dict]:
    """The flags of a row's two runs."""
    row = script.rows[key]
    base = {**script.usual, **row.base}
    return [base, {**base, key: row.value}]


def check_row(script, key, run_once):
    """Assert that what differs between two runs is what a row says, and what follows from it.

    Returns:
        The parts of the run with the usual value.
    """
    row, bearing = script.rows[key], script.watch.BEARING
    usual, other = (
        run_once(script.module, script.watch, flags).parts for flags in two_runs(script, key)
    )
    differ = {part for part in bearing if not same(usual[part], other[part])}
    expected = {part for part in row.parts.split() if part in bearing}
    possible = {part.removesuffix("?") for part in row.parts.split()}
    assert possible <= set(bearing)
    assert expected <= differ, f"{key} does not reach {expected - differ}"
    follow = expected | possible
    follow |= {part for cause in follow for part in bearing[cause]}
    assert differ <= follow, f"{key} changes {differ - follow} too"
    return usual


@pytest.fixture(scope="module")
def run_once(places, tmp_path_factory):
    """A function that gives what a script did on flags, each made once; its folder stays as is."""
    made = {}

    def run_with(script, watch_class, values):
        key = json.dumps([script.__name__, values], sort_keys=True, default=str)
        if key not in made:
            folder = tmp_path_factory.mktemp("run") / "out"
            made[key] = watched(script, watch_class, values, places, folder)
        return made[key]

    return run_with


def again(script, watch_class, values, places, earlier, folder):
    """Run a script on flags in a copy of an earlier run's folder."""
    shutil.copytree(earlier.folder, folder)
    return watched(script, watch_class, {**values, "output": str(folder)}, places, folder)


def in_either_order(script, key, run_once):
    """Of a row's two runs, whichever is the later: its flags, what the earlier one did, and what it
    does itself in a new folder. ``output`` is the folder itself, so there both are the same.
    """
    runs = two_runs(script, key) if key != "output" else two_runs(script, key)[:1] * 2
    for first, then in (runs, runs[::-1]):
        earlier, fresh = (run_once(script.module, script.watch, flags) for flags in (first, then))
        yield then, earlier, fresh


# ------------------------------------------------------------------------------------------------
# eval_robustness.py

RESULTS = ("results", "predictions", "requests", "files", "printed")


class Evaluation:
    """Records what eval_robustness.py does."""

    # What each part has a bearing on, if it changes.
    BEARING = {  # noqa: RUF012
        "refused": ("models", "images", "answers", "batches", "input", "layout", "logits",
                    "place", *RESULTS),
        "models": ("logits", *RESULTS),  # names and weights
        "images": ("logits", *RESULTS),  # in order, whatever the batches are
        "answers": RESULTS,
        "batches": (),  # their sizes
        "input": ("logits", *RESULTS),  # what the models are given, of images that are the same
        "layout": (),  # in memory, of that and of the weights
        "logits": RESULTS,
        "predictions": ("results", "printed"),  # on the disk
        "results": ("printed",),
        "requests": (),  # what finished passes are known by
        "files": (),
        "printed": (),
        "place": (),
    }  # fmt: skip

    def __init__(self, monkeypatch, parts):
        self.parts = parts
        # Small sets have workers too.
        monkeypatch.setattr(loaders, "IMAGES_PER_WORKER", 1)
        for name in ("open_models", "finite_logits", "add_batch"):
            own = getattr(eval_robustness, name)
            monkeypatch.setattr(eval_robustness, name, getattr(self, name)(own))

    def open_models(self, own):
        def seen(args):
            models = own(args)
            for name, (model, _) in models.items():
                self.parts["models"].append([name, torch.cat([*map(flat, model.parameters())])])
            return models

        return seen

    def finite_logits(self, own):
        def seen(accelerator, model, to_input, batch):
            self.parts["images"].append(batch["image"])
            self.parts["batches"].append(len(batch["image"]))
            ramp = torch.arange(3 * 8 * 8).view(1, 3, 8, 8).to(torch.uint8)
            shown = to_input(ramp)
            self.parts["input"] = [shown]
            self.parts["layout"] = [shown.stride(), model.conv.weight.stride()]
            logits = own(accelerator, model, to_input, batch)
            self.parts["logits"].append(logits)
            return logits

        return seen

    def add_batch(self, own):
        def seen(columns, wrong, which, batch, logits, names):
            self.parts["answers"].append([list(which.serves), *batch["label"]])
            return own(columns, wrong, which, batch, logits, names)

        return seen

    def end(self, folder):
        saved = json.loads((folder / "results.json").read_text())
        self.parts["requests"].append(saved.pop("passes"))
        del saved["versions"]
        self.parts["results"] += [saved, (folder / "per_class.csv").read_text()]
        for path in sorted(folder.rglob("*.parquet")):
            self.parts["predictions"].append([path.name, pq.read_table(path).to_pydict()])
        for name in ("images", "logits"):  # whatever the batches are
            if len({value.shape[1:] for value in self.parts[name]}) == 1:
                self.parts[name] = torch.cat(self.parts[name])
        served = [serves for serves, *_ in self.parts["answers"]]
        labels = list(itertools.chain.from_iterable(rest for _, *rest in self.parts["answers"]))
        self.parts["answers"] = [served[:1], labels]


def flat(tensor):
    return tensor.detach().reshape(-1)


HUB = {"dataset_config": "one", "image_key": "image", "label_key": "label"}
EVALUATED = {"model": ["<trained>"], "data": ["own=<data>"], "workers": 0, "batch_size": 4, **HUB}
OF_IMAGENET = {
    "model": ["<of_imagenet>"], "data": ["imagenet=<val>"], "benchmarks": ["imagenet"],
    "allow_partial": True, **dict.fromkeys(HUB),
}  # fmt: skip
FILE = OF_IMAGENET | {"model": ["tiny_net"], "checkpoint": ["<weights.pth>"]}
EVALUATION_ROWS = {
    "model": Row(["<other_trained>"], "models"),
    "checkpoint": Row(["<weights.safetensors>"], "models", FILE),
    "use_ema": Row(True, "models", FILE),
    "benchmarks": Row(["imagenet", "real"], "answers", OF_IMAGENET),
    "data": Row(["own=<other_data>"], "images"),
    "val_split": Row("spare", "images answers batches", {"dataset_config": "more"}),
    "image_key": Row("mask", "images"),
    "label_key": Row("kind", "answers"),
    "dataset_config": Row("two", "images"),
    "allow_partial": Row(True, "refused", OF_IMAGENET | {"allow_partial": None}),
    "corrupt": Row(True, "images answers batches results files"),
    "img_size": Row(12, "images"),
    "crop_pct": Row(0.5, "images"),
    "interpolation": Row("nearest", "images"),
    "batch_size": Row(3, "batches"),
    "workers": Row(1, "requests"),  # of a stream, whose images' keys depend on them
    "channels_last": Row(True, "layout"),  # the same numbers in another order
    "output": Row("<root>-elsewhere", "place"),
    "csv": Row(True, "files"),
    "markdown": Row(True, "printed"),
}  # fmt: skip


EVALUATING = Script(eval_robustness, Evaluation, EVALUATED, EVALUATION_ROWS)


def test_every_flag_of_evaluation_has_a_row():
    check_every_flag_has_a_row(eval_robustness, EVALUATION_ROWS, __file__)


@pytest.mark.parametrize("key", EVALUATION_ROWS)
def test_a_flag_of_evaluation_changes_what_it_is_about(key, run_once):
    check_row(EVALUATING, key, run_once)


@pytest.mark.parametrize("key", EVALUATION_ROWS)
def test_what_was_evaluated_with_another_flag_is_not_taken_for_it(key, run_once, places, tmp_path):
    """A folder of results is as if it were new, whichever of the two runs came first."""
    for number, (then, earlier, fresh) in enumerate(in_either_order(EVALUATING, key, run_once)):
        if earlier.parts["refused"] or fresh.parts["refused"]:
            continue
        folder = tmp_path / str(number)
        late = again(eval_robustness, Evaluation, then, places, earlier, folder)
        assert not late.parts["refused"]
        left, expected = contents(folder), contents(fresh.folder)
        mine = {Path(name).parts[1] for name in expected if name.startswith("predictions")}
        for name in list(left):  # what other models predicted stays for a later command
            if name.startswith("predictions") and Path(name).parts[1] not in mine:
                del left[name]
        assert left.keys() == expected.keys()
        assert same(left, expected)  # but for rounding, in other batches


def other_records(record: dict) -> list[dict]:
    """A record with each entry changed, and each missing; and with one more."""
    others = [{**record, "another": 1}]
    for key, value in record.items():
        others.append({**record, key: [value, "other"]})
        if value is not None:  # which also stands for no entry
            others.append({k: v for k, v in record.items() if k != key})
        for inner in value if isinstance(value, dict) else ():
            others.append({**record, key: {**value, inner: "other"}})
    return others


def test_a_finished_pass_is_known_by_each_key_of_its_request(run_once, places, tmp_path):
    """Another value, a key that only the old one has, and one that only the new one has."""
    earlier, folder = run_once(eval_robustness, Evaluation, EVALUATED), tmp_path / "out"
    late = again(eval_robustness, Evaluation, EVALUATED, places, earlier, folder)
    assert not len(late.parts["images"]), "it was finished before"
    (file,) = folder.glob("predictions/*/own.json")
    record, which = json.loads(file.read_text()), sets.Pass("own", ("own",))

    def found(request):
        return predictions.finished(file.parent, which, request)[0]

    assert found(record["request"])
    for other in other_records(record["request"]):
        assert found(other) is None, f"taken for {other}"
    for other in other_records(record["request"]):
        file.write_text(json.dumps({**record, "request": other}))
        assert found(record["request"]) is None, f"{other} is taken for its own"


# ------------------------------------------------------------------------------------------------
# measure_forgetting.py

OF_PERTURBATIONS = ("forgetting", "relevant_change", "sam_gap")
SHARPNESS = ("average_sharpness", "worst_sharpness")
CURVATURE = ("lambda_max", "trace")
SPREADS = tuple(f"{name}_se" for name in (*OF_PERTURBATIONS, *SHARPNESS, *CURVATURE))
OF_MODELS = (*CURVATURE, *SHARPNESS, "measured_accuracy", "measured_loss", "feature_rank",
             "information")  # fmt: skip
MEASURED = (*OF_MODELS, *OF_PERTURBATIONS, *SPREADS)
REPORTS = ("correlations", "printed", "records")
TABLE = ("rows", *MEASURED, *REPORTS)


class Measuring:
    """Records what measure_forgetting.py does."""

    # What each part has a bearing on, if it changes.
    BEARING = {  # noqa: RUF012
        "refused": ("runs", "images", "batches", "layout", "weights", "files", "place", *TABLE),
        "runs": ("weights", "files", *TABLE),  # their folders, once for each epoch
        "images": ("weights", *TABLE),  # as the models are given them, and their labels
        "batches": (),  # their sizes
        "layout": (),  # in memory, of images and weights
        "weights": (*OF_PERTURBATIONS, *SPREADS, *REPORTS),  # perturbed ones too
        # Of the table: which run, epoch, perturbation, rho and m; then the columns' names.
        "rows": (*MEASURED, *REPORTS),
        **dict.fromkeys(MEASURED, (*SPREADS, *REPORTS)),
        "correlations": ("printed",),
        "records": (),  # what finished measurements are known by, and what else they hold
        "files": (),
        "printed": (),
        "place": (),
    }

    def __init__(self, monkeypatch, parts):
        self.parts = parts
        monkeypatch.setattr(loaders, "IMAGES_PER_WORKER", 1)
        for name in ("measure", "logits_of"):
            own = getattr(measure_forgetting, name)
            monkeypatch.setattr(measure_forgetting, name, getattr(self, name)(own))
        # Second derivatives take most of the time; a loss depends on the same.
        monkeypatch.setattr(measure_forgetting.flatness, "curvature", mean_loss)

    def measure(self, own):
        def seen(args, run, epoch, model, batches, *rest):
            self.parts["runs"].append(str(run["folder"]))
            if not self.parts["images"]:
                shown = list(batches(0, args.examples))
                self.parts["images"] += [torch.cat(values) for values in zip(*shown)]
                self.parts["batches"].append([len(labels) for _, labels in shown])
                self.parts["layout"] += [shown[0][0].stride(), model.conv.weight.stride()]
            return own(args, run, epoch, model, batches, *rest)

        return seen

    def logits_of(self, own):
        def seen(model, *rest):
            self.parts["weights"].append(torch.cat([*map(flat, model.parameters())]))
            return own(model, *rest)

        return seen

    def end(self, folder):
        with (folder / "measurements.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        self.parts["rows"].append(list(table[0]))
        for row in table:
            for column in self.BEARING.keys() & row.keys():
                self.parts[column].append(float(row[column] or -1))
            keys = ("run", "setting", "seed", "epoch", "perturbation", "rho", "m")
            self.parts["rows"].append([row[key] for key in keys])
        saved = json.loads((folder / "correlations.json").read_text())
        self.parts["correlations"].append(saved["correlations"])
        for path in sorted(folder.glob("measurements/*.json")):
            self.parts["records"].append(json.loads(path.read_text()))


@torch.no_grad()
def mean_loss(model, criterion, batches, size, seed):
    losses = [len(y) * criterion(model(x), y).item() for x, y in batches(0, size)]
    loss = sum(losses) / size
    return dict.fromkeys(("lambda_max", "lambda_max_se", "trace", "trace_se"), loss)


@pytest.fixture(scope="module")
def trained_runs(places):
    """Two runs, of another seed and method, with the models of two epochs."""
    usual = {"dataset": "<data>", "dataset_config": "one", "image_key": "image", "workers": 0}
    usual |= {"label_key": "label", "model": "tiny_net", "epochs": 2, "batch_size": 8, "m": 4}
    usual |= {"lr": 0.3, "save_interval": 1}
    own = {"one": {"method": "sam", "rho": 0.3}, "two": {"method": "obf", "rho": 0.2, "seed": 1}}
    for name, changes in own.items():
        fresh_process()
        output = {"output": str(places / f"run_{name}")}
        train_imagenet.main(argv(train_imagenet, {**usual, **changes, **output}, places))


MEASURE = {
    "runs": ["<run_one>"], "perturbations": ["sam", "obf", "random"], "micro_batches": 2,
    "thresholds": [0.3, 0.5, 0.7], "examples": 16, "batch_size": 8, "workers": 0, "m": 4,
    "link": "sigmoid",
}  # fmt: skip
# Fewer images than there are.
SOME = {"examples": 10}
MEASURING_ROWS = {
    "runs": Row(["<run_two>"], "runs rows lambda_max information"),
    "epochs": Row([2], "runs rows"),
    "perturbations": Row(["own", "sam"], "rows weights"),
    "rho": Row(0.1, "rows weights"),
    "m": Row(2, "rows weights"),
    "gamma": Row(0.2, "weights", {"lam": 0.1, "perturbations": ["obf"]}),
    "lam": Row(0.1, "weights", {"perturbations": ["obf"]}),
    "micro_batches": Row(1, "weights"),
    "thresholds": Row([0.4, 0.6], "information forgetting relevant_change"),
    "link": Row("softmax", "information forgetting relevant_change"),
    "miller_madow": Row(True, "information forgetting relevant_change?", {"rho": 2.0}),
    "adjust_thresholds": Row(False, "forgetting relevant_change"),
    "split": Row("validation", "images batches"),
    "examples": Row(10, "images batches"),
    "hessian_examples": Row(8, "lambda_max trace"),
    "average_rho": Row(0.3, "average_sharpness"),
    "worst_rho": Row(0.01, "worst_sharpness?"),  # of two classes there is none
    "batch_size": Row(4, "batches"),
    "workers": Row(1, NOTHING),  # the images are the same, in the same order
    "channels_last": Row(
        True, "layout weights? average_sharpness?"
    ),  # noise is drawn in memory's order
    "seed": Row(1, "images", SOME),
    "output": Row("<root>-elsewhere", "place"),
}


MEASURES = Script(measure_forgetting, Measuring, MEASURE, MEASURING_ROWS)


def test_every_flag_of_measuring_has_a_row():
    check_every_flag_has_a_row(measure_forgetting, MEASURING_ROWS, __file__)


@pytest.mark.usefixtures("trained_runs")
@pytest.mark.parametrize("key", MEASURING_ROWS)
def test_a_flag_of_measuring_changes_what_it_is_about(key, run_once):
    check_row(MEASURES, key, run_once)


@pytest.mark.usefixtures("trained_runs")
@pytest.mark.parametrize("key", [key for key in MEASURING_ROWS if key != "output"])
def test_what_was_measured_with_another_flag_is_not_taken_for_it(key, run_once, places, tmp_path):
    """A folder of results is as if it were new, whichever of the two runs came first."""
    for number, (then, earlier, fresh) in enumerate(in_either_order(MEASURES, key, run_once)):
        late = again(measure_forgetting, Measuring, then, places, earlier, tmp_path / str(number))
        for part in TABLE:
            kept = [late.parts[part], fresh.parts[part]]
            if part == "records":  # those of other runs and epochs are kept
                models = [record["request"]["model"] for record in kept[1]]
                kept[0] = [r for r in kept[0] if r["request"]["model"] in models]
            if part == "printed":
                kept = [text[0].split("written:")[-1] for text in kept]
            assert same(*kept), part
        names = [contents(run.folder, but=["measurements/"]).keys() for run in (late, fresh)]
        assert names[0] == names[1]


@pytest.mark.usefixtures("trained_runs")
def test_a_finished_measurement_is_known_by_each_key_of_its_request(run_once, tmp_path):
    """Another value, a key that only the old one has, and one that only the new one has."""
    earlier = run_once(measure_forgetting, Measuring, MEASURE)
    record, file = earlier.parts["records"][0], tmp_path / "record.json"
    file.write_text(json.dumps(record))
    assert measure_forgetting.is_measured(file, record["request"])
    for other in other_records(record["request"]):
        assert not measure_forgetting.is_measured(file, other), f"taken for {other}"
        file.write_text(json.dumps({**record, "request": other}))
        assert not measure_forgetting.is_measured(file, record["request"]), other
        file.write_text(json.dumps(record))


OTHER_CONFIG = {
    "input_size": (3, 12, 12), "interpolation": "nearest", "crop_pct": 0.5, "crop_mode": "border",
    "mean": (0.1, 0.1, 0.1), "std": (0.5, 0.5, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("key", [*resolve_data_config(model=tiny_net()), "no key"])
def test_models_of_another_preprocessing_share_no_images_that_were_read(key, places, accelerator):
    hub = data.Names(dataset_config="one", image_key="image", label_key="label")
    split = data.load(str(places / "data"), names=hub)["train"]
    args = argparse.Namespace(workers=0, batch_size=16, channels_last=None)
    models = [tiny_net(), tiny_net()]
    if key != "no key":
        models[1].pretrained_cfg = models[1].pretrained_cfg | {key: OTHER_CONFIG[key]}

    def seen(model, cache):
        batches = measure_forgetting.open_batches(args, accelerator, split, model, cache)
        return next(iter(batches(0, 16)))[0]

    cache = {}
    first = seen(models[0], cache)
    assert same(seen(models[1], cache), seen(models[1], {}))
    assert same(seen(models[1], cache), first) == (key == "no key")


# ------------------------------------------------------------------------------------------------
# sweep.py


class Sweeping:
    """Records what sweep.py does; training is a run's settings, and results that depend on them."""

    # What each part has a bearing on, if it changes.
    BEARING = {  # noqa: RUF012
        "refused": ("scripts", "points", "trained", "table", "files", "printed", "place"),
        "scripts": ("trained", "table", "printed"),
        "points": ("trained", "table", "files", "printed"),  # what each has of its own
        "trained": ("table", "files", "printed"),  # the settings of each run
        "table": ("printed",),
        "files": (),
        "printed": (),
        "place": (),
    }

    def __init__(self, monkeypatch, parts):
        self.parts = parts
        for script in (train_imagenet, finetune_cifar):
            monkeypatch.setattr(script, "main", self.main(script))
        own = sweep.check_points
        monkeypatch.setattr(sweep, "check_points", self.check_points(own))

    def main(self, script):
        def end_run(flags):
            args = settings.parse(script.parser(), flags)
            _, _, args.m = loaders.split_batch(args, 1)
            run, kept = Path(args.output), settings.resolved(args)
            run.mkdir(parents=True)
            (run / "settings.yaml").write_text(yaml.safe_dump(kept))
            del kept["output"]
            self.parts["scripts"] = [script.__name__]
            self.parts["trained"].append(kept)
            top1 = zlib.crc32(repr(kept).encode()) / 2**32
            results = {"last": {"validation": top1, "test": 1 - top1}}
            (run / "results.json").write_text(json.dumps(results))
            line = {"epoch": 1, "loss": top1, "train": top1, "validation": top1, "lr": 0.1}
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")

        return end_run

    def check_points(self, own):
        def seen(found, script, commands, processes):
            self.parts["points"].append(list(commands))
            return own(found, script, commands, processes)

        return seen

    def end(self, folder):
        for path in folder.glob("sweep.csv"):
            self.parts["table"].append(path.read_text().replace(str(folder), "OUTPUT"))


SWEPT = {"sweep": "<sweep.yaml>"}
SWEEP_ROWS = {
    "sweep": Row("<other_sweep.yaml>", "trained"),
    "script": Row("finetune_cifar", "scripts"),
    "recipe": Row("<recipe.yaml>", "trained"),
    "trials": Row(2, "points"),
    "trial_seed": Row(1, "points", {"trials": 3}),
    "list": Row(True, "trained scripts"),
    "output": Row("<root>-elsewhere", "place"),
}
POINTS = {"method": ["sam", "obf"], "lr": [0.1, 0.2, 0.3], "seed": [0, 1]}
SHARED = {"dataset": "digits", "model": "tiny_net", "epochs": 2, "batch_size": 8, "rho": 0.1}


@pytest.fixture(scope="module")
def sweeps(places):
    """Two sweeps that differ in a setting of all runs."""
    for name, clip in (("sweep", 1.0), ("other_sweep", 2.0)):
        content = {"settings": SHARED | {"clip_grad": clip}, "grids": [POINTS]}
        (places / f"{name}.yaml").write_text(yaml.safe_dump(content))
    (places / "recipe.yaml").write_text(yaml.safe_dump({"reprob": 0.25}))


SWEEPS = Script(sweep, Sweeping, SWEPT, SWEEP_ROWS)


def test_every_flag_of_sweeps_has_a_row():
    check_every_flag_has_a_row(sweep, SWEEP_ROWS, __file__)


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("key", SWEEP_ROWS)
def test_a_flag_of_sweeps_changes_what_it_is_about(key, run_once):
    usual = check_row(SWEEPS, key, run_once)
    assert len(usual["trained"]) == (12 if "trials" not in SWEEP_ROWS[key].base else 2)


@pytest.mark.usefixtures("sweeps")
@pytest.mark.parametrize("key", [key for key in SWEEP_ROWS if key != "output"])
def test_points_of_another_flag_are_not_taken_for_a_sweeps_own(key, run_once, places, tmp_path):
    """The table is that of a new folder, or the folder is refused, whichever came first."""
    for number, (then, earlier, fresh) in enumerate(in_either_order(SWEEPS, key, run_once)):
        late = again(sweep, Sweeping, then, places, earlier, tmp_path / str(number))
        if late.parts["refused"]:
            assert key in ("sweep", "script", "recipe")  # the others only choose points
            assert contents(late.folder) == contents(earlier.folder)
            continue
        assert late.parts["points"] == fresh.parts["points"]
        # One that lists leaves the table as it is.
        expected = earlier if then.get("list") else fresh
        runs_in = (str(earlier.folder), "OUTPUT")
        assert [text.replace(*runs_in) for text in late.parts["table"]] == expected.parts["table"]


def test_a_sweeps_folder_is_known_by_each_of_its_settings():
    """Another value, a key that only the folder has, and one that only the sweep has."""
    kept = settings.resolved(settings.parse(train_imagenet.parser(), []))
    sweep.check_same("here", kept, dict(kept))
    free = {"momentum"}
    for other in other_records(kept):
        (key,) = {k for k in {**kept, **other} if kept.get(k) != other.get(k)}
        for earlier, now in ((kept, other), (other, kept)):
            if key in (*free, *settings.FREE_ON_RESUME):
                sweep.check_same("here", earlier, now, free)
                continue
            with pytest.raises(InputError, match=f"here was trained with {key} "):
                sweep.check_same("here", earlier, now, free)


def a_sweep(folder, changes, axis):
    """The file of a sweep over two values of ``axis``, with these settings for all points."""
    shared = {key: value for key, value in changes.items() if value is not None}
    content = {"settings": shared, "grids": [{axis: [1, 2] if axis == "seed" else [0.3, 0.4]}]}
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return {"sweep": str(folder / "sweep.yaml")}


@pytest.mark.parametrize("key", [action.dest for action in flags_of(train_imagenet)])
def test_each_setting_reaches_the_points_of_a_sweep_and_is_its_folders(key, places, tmp_path):
    """Of a sweep with one setting changed, an earlier one's folder is refused, unless the setting
    changes no result; so is a point that was trained with it.
    """
    if key in (*settings.NOT_SETTINGS, "output", "push_to_hub", "decoder"):
        return  # each run has its own, or none; torchcodec, the other decoder, need not be there
    row, axis = SETTINGS[key], "lr" if key == "seed" else "seed"
    base = {**SHARED, "m": 4, "streaming": key == "train_num_samples", **row.base}
    both = [base, {**base, **row.beside, key: row.value}]
    flags = [a_sweep(tmp_path / f"of_{i}", changes, axis) for i, changes in enumerate(both)]
    fresh = [
        watched(sweep, Sweeping, f, places, tmp_path / f"own_{i}") for i, f in enumerate(flags)
    ]
    for run, changes in zip(fresh, both):
        expected = settings.parse(
            train_imagenet.parser(), settings.as_flags(train_imagenet.parser(), changes, "a test")
        )
        assert len(run.parts["trained"]) == 2
        assert all(kept[key] == settings.resolved(expected)[key] for kept in run.parts["trained"])
    assert fresh[0].parts["trained"] != fresh[1].parts["trained"]
    for first, then in ((0, 1), (1, 0)):
        late = again(sweep, Sweeping, flags[then], places, fresh[first], tmp_path / f"late_{first}")
        assert not late.parts["trained"]
        refused = "".join(late.parts["refused"])
        assert ("was trained with" in refused) == (key not in settings.FREE_ON_RESUME)
        # Also before any point is finished; there a method's and averages' own may differ.
        shutil.rmtree(late.folder / "runs")
        values = {**flags[then], "list": True, "output": str(late.folder)}
        refused = "".join(watched(sweep, Sweeping, values, places, late.folder).parts["refused"])
        methods = itertools.chain.from_iterable(own for _, own in METHODS.values())
        free = {"m", *methods, *settings.EMA, *settings.FREE_ON_RESUME}
        assert ("was trained with" in refused) == (key not in free)
