"""Every flag of the training scripts reaches what it is about, and nothing else.

Whole runs of a model that costs next to nothing are watched from outside. Each flag is changed
alone. A new flag needs a row in ``SETTINGS`` or ``RUN_FLAGS``.
"""

import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import accelerate
import datasets
import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate.tracking import GeneralTracker, on_main_process
from accelerate.utils import LoggerType
from flags import check_every_flag_has_a_row, flags_of
from helpers import fresh_process, metrics, tiny_net, train, write_folder
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import finetune_cifar
import train_imagenet
from common import checkpoints, loop, report, run, settings
from common.errors import InputError

pytestmark = pytest.mark.slow

# ------------------------------------------------------------------------------------------------
# What a run does

# What each part of a run has a bearing on, if it changes.
TRAINING = ("losses", "epsilon", "weights", "averages", "records", "files", "tracked", "uploaded")
BEARING = {
    "images": TRAINING,  # of the training batches, in order
    "labels": TRAINING,
    "batches": TRAINING,  # sizes of loader and micro-batches, and how many make an update
    "held_out": TRAINING[4:],  # images and labels of the evaluations, by split
    "input": TRAINING,  # what the model is given, of images that are the same
    "layout": (),  # in memory, of that and of the weights
    "compiled": (),  # by which backend
    "first_weights": TRAINING,
    "losses": TRAINING,  # of the first update's micro-batches
    "epsilon": TRAINING,  # their perturbations
    "rates": TRAINING[2:],  # lr, rho and momentum of each group and update
    "weights": TRAINING[3:],  # of every epoch's end
    "averages": TRAINING[4:],  # of the weights
    "config": (),  # config.json of the models
    "records": ("tracked", "uploaded"),  # metrics.jsonl and results.json, without the time
    "files": (),  # names of what a run leaves
    "tracked": (),  # what a tracker gets
    "uploaded": (),  # the card
}  # fmt: skip
# A change of these that leaves the weights as they are has not reached the training.
CAUSES = {"images", "labels", "batches", "input", "first_weights", "losses", "epsilon", "rates"}


class Watch:
    """Records what a run in this process does."""

    def __init__(self, monkeypatch):
        self.parts = {name: [] for name in BEARING}
        for module, name in ((loop, "update"), (loop, "forward_backward"), (run, "evaluate_top1")):
            own = getattr(module, name)
            monkeypatch.setattr(module, name, getattr(self, name)(own))
        monkeypatch.setattr(run, "save_checkpoint", self.save_checkpoint(run.save_checkpoint))
        monkeypatch.setattr(report, "draw_curves", lambda *_: None)
        monkeypatch.setattr(torch, "compile", self.compile)
        self.watch_elsewhere(monkeypatch)

    def watch_elsewhere(self, monkeypatch):
        """Trackers and the Hub, which are not there."""
        watch = self

        class Tracker(GeneralTracker):
            """Writes into a folder of the run's, as TensorBoard's does."""

            name, requires_logging_directory, tracker = "tensorboard", True, None

            @on_main_process
            def __init__(self, run_name, logging_dir, **_):
                super().__init__()
                (Path(logging_dir) / run_name).mkdir(parents=True, exist_ok=True)
                (Path(logging_dir) / run_name / "events").touch()

            def store_init_configuration(self, values):
                pass

            def log(self, values, step=None, **_):
                watch.add(tracked=[step, values])

        def upload(self, *, folder_path, **_):
            watch.add(uploaded=(Path(folder_path) / "README.md").read_text())

        def create(*_, **__):
            return huggingface_hub.RepoUrl("https://huggingface.co/me/model")

        classes = accelerate.tracking.LOGGER_TYPE_TO_CLASS
        monkeypatch.setitem(classes, "tensorboard", Tracker)
        monkeypatch.setattr(accelerate.tracking, "_available_trackers", [LoggerType.TENSORBOARD])
        monkeypatch.setattr(huggingface_hub, "get_token", lambda: "token")
        monkeypatch.setattr(huggingface_hub, "create_repo", create)
        api = {"create_repo": create, "file_exists": lambda *_, **__: False}
        for name, function in {**api, "upload_folder": upload}.items():
            monkeypatch.setattr(huggingface_hub.HfApi, name, function)

    def compile(self, model, backend="inductor", **_):
        """torch.compile takes longer than all else; a test of the loop compiles."""
        self.add(compiled=backend)
        return model

    def add(self, **values):
        for name, value in values.items():
            self.parts[name].append(value)

    def update(self, own):
        def watched(job, batches, perturb=True):
            if not self.parts["rates"]:
                self.begin(job)
            keys = ("lr", "rho", "momentum")
            rates = [[group.get(key) for key in keys] for group in job.optimizer.param_groups]
            self.add(rates=rates)
            return own(job, batches, perturb)

        return watched

    def begin(self, job):
        weights, criterion = flat(job.model), job.criterion
        self.add(first_weights=weights, config=json.loads(job.timm_config))

        def watched(logits, labels):
            loss = criterion(logits, labels)
            if len(self.parts["rates"]) == 1 and not self.ascending(job):
                self.add(losses=loss.detach(), epsilon=flat(job.model) - weights)
            return loss

        job.criterion = watched

    def ascending(self, job):
        inner = getattr(job.optimizer, "optimizer", job.optimizer)
        return getattr(inner, "ascending", False)

    def forward_backward(self, own):
        def watched(job, batch, objective, sync):
            self.add(images=batch["image"], labels=batch["label"])
            sizes = (len(batch["image"]), job.batches.m, job.batches.accumulation)
            self.add(batches=[*sizes, job.batches.updates, bool(sync)])
            return own(job, batch, objective, sync)

        return watched

    def evaluate_top1(self, own):
        def watched(job, loader, *model):
            batches = list(loader)
            split = next(k for k, v in job.batches.evaluation.items() if v is loader)
            seen = [split, *(torch.cat([b[key] for b in batches]) for key in ("image", "label"))]
            ramp = torch.arange(3 * 8 * 8).view(1, 3, 8, 8).to(torch.uint8)
            shown = job.batches.to_input(ramp)
            layout = [shown.stride(), job.model.conv.weight.stride()]
            self.add(held_out=seen, input=shown, layout=layout)
            return own(job, loader, *model)

        return watched

    def save_checkpoint(self, own):
        def watched(job, progress):
            if progress.epoch_updates == job.batches.updates:
                self.add(weights=flat(job.model))
                self.add(averages=flat(job.ema.module) if job.ema else None)
            return own(job, progress)

        return watched

    def end(self, output):
        lines = (output / "metrics.jsonl").read_text().splitlines()
        for line in map(json.loads, lines):
            del line["seconds"]
            self.add(records=line)
        self.add(records=json.loads((output / "results.json").read_text()))
        files = sorted(str(path.relative_to(output)) for path in output.rglob("*"))
        self.add(files=[name for name in files if name != ".run.lock"])
        for name in ("images", "labels"):  # whatever the batches are
            self.parts[name] = torch.cat(self.parts[name]) if self.parts[name] else []
        # However often they are evaluated.
        for name in ("held_out", "input", "layout"):
            kept = []
            for value in self.parts[name]:
                if not any(same(value, other) for other in kept):
                    kept.append(value)
            self.parts[name] = kept
        return self.parts


def flat(model):
    """All weights and buffers in one vector."""
    return torch.cat([v.detach().reshape(-1).double() for v in model.state_dict().values()])


def same(one, other):
    """Whether two parts are the same, but for rounding."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.allclose(one.double(), other.double(), rtol=1e-5, atol=1e-6, equal_nan=True)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, float) and isinstance(other, float):
        return one == pytest.approx(other, rel=1e-5, abs=1e-7)
    return one == other


# ------------------------------------------------------------------------------------------------
# The runs


def write_hub_dataset(root, seed):
    """Three configurations of a dataset, with two columns of images and two of labels."""
    rng = np.random.default_rng(seed)
    (root / "data").mkdir(parents=True)
    header = ["---", "configs:"]
    kinds = {key: datasets.Image() for key in ("image", "mask")}
    kinds["label"] = datasets.ClassLabel(names=["cat", "dog"])
    kinds["kind"] = datasets.ClassLabel(names=["tame", "wild"])
    few = {"train": 16, "validation": 6}
    for config, sizes in {"one": few, "two": few, "more": few | {"spare": 16}}.items():
        header += [f"- config_name: {config}", "  data_files:"]
        for split, size in sizes.items():
            pixels = rng.integers(0, 255, (2, size, 20, 26, 3), dtype=np.uint8)
            columns = {"image": list(map(Image.fromarray, pixels[0]))}
            columns |= {"mask": list(map(Image.fromarray, pixels[1]))}
            columns |= {"label": [i % 2 for i in range(size)]}
            columns |= {"kind": [i // 2 % 2 for i in range(size)]}
            ds = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
            ds.to_parquet(root / "data" / f"{config}-{split}.parquet")
            header += [f"  - split: {split}", f"    path: data/{config}-{split}.parquet"]
    (root / "README.md").write_text("\n".join([*header, "---", ""]))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Two data sets, and trained models in two folders and a file, by what the tables call them."""
    root = tmp_path_factory.mktemp("places")
    found = {}
    for seed, name in enumerate(("data", "other_data")):
        write_hub_dataset(root / name, seed)
        found[name] = root / name
    weights = []
    for seed, name in enumerate(("trained", "other_trained", "averaged")):
        torch.manual_seed(seed)
        model = tiny_net(num_classes=3)
        model(torch.randn(8, 3, 16, 16))  # moves batch norm's statistics
        save_for_hf(model, root / name, safe_serialization=True)
        found[name] = root / name
        weights.append(model.state_dict())
    save_file(weights[1], root / "weights.safetensors")
    torch.save({"state_dict": weights[0], "state_dict_ema": weights[2]}, root / "weights.pth")
    found |= {"weights": root / "weights.safetensors", "both_weights": root / "weights.pth"}
    return {f"<{name}>": str(place) for name, place in found.items()}


BASE = {
    "dataset": "<data>", "dataset_config": "one", "image_key": "image", "label_key": "label",
    "model": "tiny_net", "epochs": 2, "batch_size": 8, "m": 4, "workers": 0, "lr": 0.3,
    "rho": 0.3, "scale": [0.5, 1.0], "checkpoint_hist": 9,
}  # fmt: skip
# Both scripts, and images that are stored or streamed.
STORED, STREAM = "train_imagenet", "finetune_cifar on a stream"
WORLDS = {
    STORED: (train_imagenet, {}),
    STREAM: (finetune_cifar, {"model": "<trained>", "streaming": True, "train_num_samples": 16}),
}


def watched_run(world, changes, places, output, *flags):
    """The parts of a run with these settings."""
    script, own = WORLDS[world]
    given = {key: places.get(str(v), v) for key, v in {**BASE, **own, **changes}.items()}
    argv = [*settings.as_flags(script.parser(), given, "a test"), "--output", str(output), *flags]
    fresh_process()
    with pytest.MonkeyPatch.context() as monkeypatch:
        watch = Watch(monkeypatch)
        script.main(argv)
        return watch.end(output)


class Row(NamedTuple):
    """A value that differs from the usual one, and the parts of a run that must differ with it.

    Those with a question mark may differ. ``base`` are other settings of both runs, and ``beside``
    of the one with the value alone. ``refused`` is what the error says in the worlds that do not
    take the setting.
    """

    value: object
    parts: str
    base: dict = {}  # noqa: RUF012
    worlds: tuple = tuple(WORLDS)
    refused: str = ""
    beside: dict = {}  # noqa: RUF012


FILE = {"model": "tiny_net", "checkpoint": "<both_weights>"}
EMA = {"model_ema": True, "model_ema_decay": 0.5}
NOTHING = ""  # these change no result; why is said beside them
IMAGES = {
    "dataset": Row("<other_data>", "images held_out"),
    "dataset_config": Row("two", "images held_out"),
    "image_key": Row("mask", "images held_out"),
    "label_key": Row("kind", "labels held_out config"),
    # Else that is a split to evaluate.
    "train_split": Row("spare", "images held_out?", {"dataset_config": "more"}),
    "val_split": Row("spare", "held_out", {"dataset_config": "more"}),
    "img_size": Row(12, "images held_out config"),
    "crop_pct": Row(0.5, "held_out config"),
    "interpolation": Row("nearest", "images held_out config"),
    "scale": Row([0.1, 0.2], "images"),
    "ratio": Row([0.4, 0.5], "images"),
    "hflip": Row(1.0, "images"),
    "vflip": Row(1.0, "images"),
    "aa": Row("rand-m9-mstd0.5", "images"),
    "color_jitter": Row(0.9, "images"),
    "reprob": Row(1.0, "images"),
    "mixup": Row(1.0, "images labels"),
    "cutmix": Row(1.0, "images labels"),
    "label_noise": Row(0.5, "labels", {}, (STORED,), "label_noise does not go with streaming"),
    "validation_share": Row(
        0.5, "images labels? batches rates held_out", {}, (STORED,), "a stream cannot be divided"
    ),
    "train_share": Row(
        0.5, "images labels batches rates", {}, (STORED,), "a stream cannot be divided"
    ),
    "train_num_samples": Row(
        8, "images labels batches rates", {}, (STREAM,), "has no effect without streaming"
    ),
    "seed": Row(1, "images labels first_weights"),
    "batch_size": Row(16, "batches rates images? labels?"),  # a stream's are drawn by batch
    "device_batch_size": Row(4, "batches images? labels?", {"m": None}),
    "streaming": Row(True, "images labels?", {}, (STORED,), "", {"train_num_samples": 16}),
    "decoder": Row("torchcodec", "images"),  # another resize
    "workers": Row(1, NOTHING),  # the order and what is drawn are the same
}  # fmt: skip
MODEL = {
    "model": Row("<other_trained>", "first_weights", worlds=(STREAM,)),
    "model_kwargs": Row({"width": 6}, "first_weights config", worlds=(STORED,)),
    "checkpoint": Row("<weights>", "first_weights", FILE, (STREAM,)),
    "use_ema": Row(True, "first_weights", FILE, (STREAM,)),
    "channels_last": Row(True, "layout"),  # the same numbers in another order
    "torchcompile": Row("eager", "compiled"),  # the same numbers
    "head_bias": Row(-1.0, "first_weights"),
    "loss": Row("bce", "losses"),
    "smoothing": Row(0.3, "losses"),
}  # fmt: skip
OPTIMIZATION = {
    "opt": Row("adamw", "rates"),
    "opt_kwargs": Row({"nesterov": False}, "weights"),
    "lr": Row(0.2, "rates"),
    "min_lr": Row(0.1, "rates"),
    "warmup_lr": Row(0.1, "rates", {"warmup_epochs": 1}),
    "sched": Row("constant", "rates"),
    "epochs": Row(3, "images labels batches rates"),
    "warmup_epochs": Row(1, "rates"),
    "momentum": Row(0.1, "rates"),
    "weight_decay": Row(0.2, "rates weights"),
    "layer_decay": Row(0.3, "rates"),
    "freeze": Row(1, "epsilon weights"),
    "clip_grad": Row(0.01, "weights"),
    "model_ema": Row(True, "averages"),
    "model_ema_decay": Row(0.1, "averages", EMA),
    "model_ema_warmup": Row(True, "averages", EMA),
    "shrink_perturb": Row(0.5, "weights"),
}  # fmt: skip
PERTURBATION = {
    "method": Row("sam", "epsilon"),
    "m": Row(2, "batches"),
    "perturb_fraction": Row(0.5, "epsilon"),
    "perturb_interval": Row(2, "weights"),
    "rho": Row(0.5, "rates epsilon"),
    "rho_min": Row(0.1, "rates"),
    "gamma": Row(0.2, "epsilon", {"lam": 0.1}),
    "lam": Row(0.1, "epsilon"),
    "link": Row("softmax", "epsilon", {"head_bias": -2.0}),
    "adaptive": Row("before", "epsilon", {"method": "asam"}),
    "gsam_alpha": Row(2.0, "weights", {"method": "gsam"}),
    "gsam_normalize": Row(True, "weights", {"method": "gsam"}),
}  # fmt: skip
OUTPUT = {
    "checkpoint_interval": Row(1, "files"),
    "checkpoint_hist": Row(1, "files"),
    "val_interval": Row(2, "records"),
    "save_interval": Row(1, "files"),
    "log_with": Row("tensorboard", "tracked files"),
    "push_to_hub": Row("me/model", "uploaded"),
}  # fmt: skip

SETTINGS = IMAGES | MODEL | OPTIMIZATION | PERTURBATION | OUTPUT
CASES = [(key, world) for key in IMAGES | MODEL | OUTPUT for world in WORLDS]
# Both scripts leave these to the same function, and that knows of no images.
CASES += [(key, STREAM) for key in OPTIMIZATION] + [(key, STORED) for key in PERTURBATION]
# They are about one execution, and tested below.
RUN_FLAGS = ("recipe", "print_config", "dry_run", "output", "overwrite", "resume")


@pytest.mark.parametrize("script", [train_imagenet, finetune_cifar])
def test_every_flag_has_a_row(script):
    check_every_flag_has_a_row(script, {*SETTINGS, *RUN_FLAGS}, __file__)


@pytest.fixture(scope="module")
def run_once(places, tmp_path_factory):
    """A function that gives the parts of a run with some settings, each made once, and its folder,
    to be left as it is.
    """
    made = {}

    def run_with(world, changes):
        key = json.dumps([world, changes], sort_keys=True)
        if key not in made:
            output = tmp_path_factory.mktemp("made") / "run"
            made[key] = watched_run(world, changes, places, output), output
        return made[key]

    return run_with


@pytest.mark.parametrize("key, world", CASES)
def test_a_setting_changes_what_it_is_about_and_nothing_else(
    key, world, places, run_once, tmp_path
):
    row, (script, _) = SETTINGS[key], WORLDS[world]
    if key not in [action.dest for action in flags_of(script)]:
        return
    if key == "decoder":
        pytest.importorskip("torchcodec")
    changes = {**row.base, **row.beside, key: row.value}
    if world not in row.worlds:
        if row.refused:
            with pytest.raises(InputError, match=row.refused):
                watched_run(world, changes, places, tmp_path / "run")
        return
    (usual, _), (other, output) = run_once(world, row.base), run_once(world, changes)
    written = yaml.safe_load((output / "settings.yaml").read_text())
    assert written[key] == places.get(str(row.value), row.value)
    opened = timm.create_model(f"local-dir:{output / 'last'}", pretrained=True)
    assert same(flat(opened), other["weights"][-1])
    differ = {part for part in BEARING if not same(usual[part], other[part])}
    expected = {part for part in row.parts.split() if part in BEARING}
    possible = {part.removesuffix("?") for part in row.parts.split()}
    if expected & CAUSES:
        expected.add("weights")
    assert expected <= differ, f"{key} does not reach {expected - differ}"
    follow = {part for cause in expected | possible for part in BEARING[cause]}
    follow |= expected | possible
    assert differ <= follow, f"{key} changes {differ - follow} too"


GIVEN = {
    "trained": {},
    "weights": {"model": "tiny_net", "checkpoint": "<weights>"},
    "averaged": {"model": "tiny_net", "checkpoint": "<both_weights>", "use_ema": True},
}


@pytest.mark.parametrize("source", GIVEN)
def test_fine_tuning_begins_with_the_weights_and_statistics_that_it_was_given(
    source, places, run_once
):
    """But for the classifier; a trial of the model leaves no trace."""
    (first, *_) = run_once(STREAM, GIVEN[source])[0]["first_weights"]
    folder = {"weights": "other_trained"}.get(source, source)
    given = load_file(Path(places[f"<{folder}>"]) / "model.safetensors")
    names = [name for name in tiny_net().state_dict() if not name.startswith("fc.")]
    expected = torch.cat([given[name].reshape(-1).double() for name in names])
    assert same(first[: len(expected)], expected)


def test_training_from_scratch_begins_with_the_weights_of_its_seed(run_once):
    (first, *_) = run_once(STORED, {"seed": 3})[0]["first_weights"]
    torch.manual_seed(3)
    assert same(first, flat(tiny_net(num_classes=2)))


def contents(folder):
    """A folder's files, without the time that was taken; those of torch are only named."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.jsonl":
            found[name] = metrics(folder)
        elif path.name == "progress.json":
            found[name] = json.loads(path.read_text())
            del found[name]["progress"]["seconds"], found[name]["files"]
        elif path.is_file() and path.suffix not in (".bin", ".pkl", ".lock"):
            found[name] = path.read_bytes()
        else:
            found[name] = None
    return found


def test_fine_tuning_is_training_but_for_the_model_it_starts_from(tmp_path, monkeypatch):
    """With the same model to start from, both scripts leave the same files."""
    monkeypatch.setattr(finetune_cifar, "create_model", train_imagenet.create_model)
    flags = {"dataset": write_folder(tmp_path / "images", images=8), "model": "tiny_net"}
    flags |= {"method": "obf", "rho": 0.5, "model_ema": True, "model_ema_decay": 0.5, "lr": 0.2}
    flags |= {"epochs": 4, "val_interval": 2, "save_interval": 3, "img_size": 16, "seed": 10}
    left = []
    for script in (train_imagenet, finetune_cifar):
        results = train(script, tmp_path, **flags)
        files = contents(tmp_path / "run")
        for name in [name for name in files if name.endswith("progress.json")]:
            for key in ("checkpoint", "use_ema"):  # of fine-tuning alone
                files[name]["settings"].pop(key, None)
        own = files.pop("settings.yaml")
        assert script is train_imagenet or b"checkpoint: null" in own
        left.append((results, files))
        shutil.rmtree(tmp_path / "run")
    (one, first), (two, second) = left
    assert one == two and first.keys() == second.keys() > {"metrics.jsonl", "results.json"}
    for name in first:
        assert first[name] == second[name], name
    lines = first["metrics.jsonl"]
    assert {line["validation_ema"] for line in lines} > {None}  # validated, in some epochs


@pytest.mark.parametrize("key, world", CASES)
def test_a_run_goes_on_with_its_own_settings_only(key, world, places, run_once, tmp_path):
    """Those that change no result are free; another of the rest is named, and nothing is done."""
    row, (script, _) = SETTINGS[key], WORLDS[world]
    known = [action.dest for action in flags_of(script)]
    if key not in known or world not in row.worlds or key == "decoder":
        return  # torchcodec, the other decoder, need not be there
    parts = {part.removesuffix("?") for part in row.parts.split()}
    free = parts <= {"layout", "compiled", "files", "tracked", "uploaded"}
    settings_of_runs = [row.base, {**row.base, **row.beside, key: row.value}]
    for number, changes in enumerate((settings_of_runs, settings_of_runs[::-1])):
        (_, earlier), (_, fresh) = (run_once(world, change) for change in changes)
        folder = tmp_path / str(number)
        shutil.copytree(earlier, folder)
        if not free:
            before = contents(folder)
            with pytest.raises(InputError, match="is of a run with") as refusal:
                watched_run(world, changes[1], places, folder, "--resume", "auto")
            named = re.search(r"with (\w+)", str(refusal.value))[1]
            one, other = (
                yaml.safe_load((f / "settings.yaml").read_text()) for f in (folder, fresh)
            )
            assert one[key] != other[key] and one[named] != other[named]
            assert contents(folder) == before
            continue
        kept = sorted((folder / "checkpoints").iterdir())
        for late in kept[-1:] if len(kept) > 1 else ():
            shutil.rmtree(late)
        watched_run(world, changes[1], places, folder, "--resume", "auto")
        assert same(metrics(folder), metrics(fresh))
        weights = [load_file(run / "last" / "model.safetensors") for run in (folder, fresh)]
        assert same(*weights)


def test_a_checkpoint_is_known_by_each_of_its_settings(run_once, tmp_path):
    """Another value, a key that only the checkpoint has, and one that only the run has."""
    _, folder = run_once(STORED, {})
    path = tmp_path / "checkpoint"
    shutil.copytree(checkpoints.find("auto", folder / "checkpoints"), path)
    record = json.loads((path / "progress.json").read_text())
    kept = record["settings"]
    assert checkpoints.read(path, kept) == record["progress"]
    others = [{**kept, "another": 1}, {**kept, "label_names": ["cat", "wolf"]}]
    for key in kept.keys() - {"label_names"}:
        others.append({**kept, key: [kept[key], "other"]})
        if kept[key] is not None:  # which also stands for no entry
            others.append({name: value for name, value in kept.items() if name != key})
    for other in others:
        with pytest.raises(InputError, match="is of a run with"):
            checkpoints.read(path, other)
        (path / "progress.json").write_text(json.dumps({**record, "settings": other}))
        with pytest.raises(InputError, match="is of a run with"):
            checkpoints.read(path, kept)
        (path / "progress.json").write_text(json.dumps(record))


@pytest.mark.parametrize("world", WORLDS)
def test_a_folder_that_is_overwritten_is_a_fresh_runs(world, places, run_once, tmp_path):
    """File by file, whatever the earlier run wrote."""
    more = {"save_interval": 1, "checkpoint_interval": 1, "epochs": 3, "log_with": "tensorboard"}
    (_, earlier), (_, fresh) = run_once(world, {**more, **EMA}), run_once(world, {})
    shutil.copytree(earlier, tmp_path / "run")
    assert contents(earlier).keys() > contents(fresh).keys()
    watched_run(world, {}, places, tmp_path / "run", "--overwrite")
    found, expected = contents(tmp_path / "run"), contents(fresh)
    assert found.keys() == expected.keys()
    for name in found.keys() - {"settings.yaml"}:  # which has the folder's name
        assert found[name] == expected[name], name


def test_a_run_that_dies_at_once_leaves_nothing_of_the_one_that_it_overwrites(
    tmp_path, monkeypatch
):
    """Else the earlier one's results would be taken for its own."""

    def die(*_):
        raise ZeroDivisionError

    flags = {"dataset": str(write_folder(tmp_path / "images")), "model": "tiny_net", "img_size": 16}
    flags |= {"save_interval": 1, "checkpoint_interval": 1, "model_ema": True, "epochs": 2}
    train(train_imagenet, tmp_path, **flags)
    monkeypatch.setattr(loop, "update", die)
    left, run = [], tmp_path / "run"
    for earlier in (True, False):
        if not earlier:
            shutil.rmtree(run)
        with pytest.raises(ZeroDivisionError):
            train(train_imagenet, tmp_path, "--overwrite", **flags)
        left.append({str(path.relative_to(run)) for path in run.rglob("*")})
    assert left[0] == left[1] > {"settings.yaml"}


@pytest.mark.parametrize("world", WORLDS)
def test_flags_about_one_execution(world, places, run_once, tmp_path, capsys):
    """The same run by a recipe; what replaces or continues it; what does not run at all."""
    script, own = WORLDS[world]
    usual, _ = run_once(world, {})
    given = {key: places.get(str(value), value) for key, value in {**BASE, **own}.items()}
    recipe, output = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(yaml.safe_dump(given))
    flags = ["--recipe", str(recipe), "--output", str(output)]

    def again(*others):
        fresh_process()
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch = Watch(monkeypatch)
            script.main([*flags, *others])
            return watch

    assert same(again().end(output), usual)
    with pytest.raises(InputError, match="exists: continue that run"):
        again()
    assert not again("--resume", "auto").parts["rates"], "all epochs are trained"
    assert same(again("--overwrite").end(output), usual)
    before = sorted(tmp_path.rglob("*"))
    flags[-1] = str(tmp_path / "another")
    assert len(again("--dry-run").parts["rates"]) == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        again("--print-config")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert given.items() <= printed.items() and printed["output"] == flags[-1]
    assert sorted(tmp_path.rglob("*")) == before
