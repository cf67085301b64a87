"""Random recipes, sweeps, settings, columns and file names: they work, or end in one ``InputError``, nothing else."""

import contextlib
import io

import datasets
import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, PartialState
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_data import write_folder

import sweep
import train_imagenet
from common import data, loaders
from common import settings as project_settings
from common.errors import InputError
from robustness import sets

SAME_FOLDER = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
fuzz = {"deadline": None, "derandomize": True, "suppress_health_check": SAME_FOLDER, "report_multiple_bugs": False}
KEYS = [action.dest for action in project_settings.parser("", "")._actions if action.dest != "help"]

numbers = st.one_of(st.integers(), st.floats(), st.sampled_from([0, -1, 1, 0.5, 1e30]))
words = st.one_of(st.text(max_size=8), st.sampled_from(["obf", "auto", "1e-3", "--lr", "a/b", "x" * 300]))
scalars = st.one_of(st.none(), st.booleans(), numbers, words, st.dates(), st.binary(max_size=4))
values = st.one_of(scalars, st.lists(scalars, max_size=3), st.dictionaries(words, scalars, max_size=2))


@pytest.fixture(autouse=True)
def _quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def parse(flags):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):  # --print-config ends it
        return project_settings.parse(project_settings.parser("", ""), [*flags, "--output", "/nowhere/run"])


@settings(max_examples=100, **fuzz)
@given(st.dictionaries(st.one_of(st.sampled_from(KEYS), words, numbers), values, max_size=3))
@example({"model_kwargs": "depth"})
def test_recipes(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        parse(["--recipe", str(path)])


@settings(max_examples=200, **fuzz)
@given(st.one_of(st.binary(max_size=40), st.text("{}[]:,-&*!|>'\"%@`#? \n\tlrbase0159.", max_size=40).map(str.encode)))
def test_files_that_may_be_no_recipe(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with contextlib.suppress(InputError):
        parse(["--recipe", str(path)])


ranges = st.fixed_dictionaries({"low": scalars, "high": scalars}, optional={"log": scalars})
axes = st.one_of(values, ranges, st.lists(st.sampled_from([0.1, 0.2, 1]), min_size=1, max_size=3))
grids = st.dictionaries(
    st.one_of(st.sampled_from(["lr", "rho", "seed", "m", "model", "scale"]), words), axes, max_size=3
)
sweeps = st.fixed_dictionaries(
    {"grids": st.one_of(values, st.lists(st.one_of(values, grids), max_size=2))},
    optional={"settings": st.one_of(values, grids), "choose": values, "recipe": values, "base": values},
)


@settings(max_examples=200, **fuzz)
@given(sweeps, st.booleans())
@example({"grids": [{"lr": {"low": 1, "high": 0}}]}, True)
@example({"grids": [{"lr": [0.1]}], "settings": True}, False)
@example({"grids": [{"lr": [0.1]}], "recipe": 5}, False)
@example({"grids": [{"model": ["x" * 300]}]}, False)
def test_sweeps(tmp_path, content, draw):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8", errors="surrogatepass")
    with contextlib.suppress(InputError):
        args, rest = sweep.parse([str(path), "--output", "/nowhere/sweep", *(["--trials", "2"] if draw else [])])
        read = sweep.read_sweep(path)
        for point in sweep.points_of(args, read):
            assert "/" not in sweep.name_of(point)
            parse(sweep.flags_of(args, read, rest, point)[:-4])


odd = st.sampled_from([0, -1, 1, 2, 3, 0.5, 1.5, -0.5, 1e-9, 1e9, 1e30, float("inf"), float("-inf"), float("nan")])
counts = st.sampled_from([0, -1, 1, 2, 3, 4, 8, 33])
changes = st.one_of(
    *(st.tuples(st.just(key), odd) for key in sorted(set(project_settings.RANGES) - {"img_size", "workers", "epochs"})),
    *(st.tuples(st.just(key), counts) for key in ("img_size", "m", "batch_size", "warmup_epochs", "checkpoint_hist")),
    st.tuples(st.sampled_from(["scale", "ratio"]), st.lists(odd, min_size=2, max_size=2)),
    st.tuples(st.just("workers"), st.sampled_from([-1, 1.5])),
    st.tuples(st.just("interpolation"), st.sampled_from(["nope", "random", "", "lanczos", "BICUBIC"])),
    st.tuples(st.just("opt"), st.sampled_from(["adamw", "nope", "lookahead_adam", "adadelta", "fusedadam", ""])),
    st.tuples(st.just("method"), st.sampled_from(list(project_settings.METHODS))),
    st.tuples(st.just("model"), st.sampled_from(["test_vit", "nope", "", "local-dir:/nowhere", "resnet18.a1_in1k"])),
    st.tuples(
        st.just("model_kwargs"),
        st.dictionaries(
            st.sampled_from(["drop_rate", "global_pool", "num_classes", "in_chans", "nope", "features_only"]),
            st.one_of(odd, st.booleans(), st.sampled_from(["avg", "max", ""])), max_size=2,
        ),
    ),
    st.tuples(
        st.just("opt_kwargs"),
        st.dictionaries(st.sampled_from(["nesterov", "eps", "betas", "nope", "lr", "foreach", "rho"]), odd, max_size=2),
    ),
    st.tuples(st.sampled_from(["streaming", "gsam_normalize"]), st.booleans()),
)  # fmt: skip
SMALL = {"model": "test_resnet", "img_size": 32, "epochs": 1, "batch_size": 4, "m": 2, "workers": 0, "opt": "sgd"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("images"), images=4)


@pytest.mark.slow
@settings(max_examples=120, **fuzz)
@given(st.lists(changes, min_size=1, max_size=3))
@example([("crop_pct", 1e-9)])
@example([("m", 1), ("batch_size", 1)])  # batch norm cannot
@example([("seed", -1)])
@example([("min_lr", -1)])
@example([("ratio", [0.5, -0.5])])
def test_settings_of_runs(tmp_path, images, pairs):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SMALL, "dataset": str(images), **dict(pairs)}))
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    with contextlib.suppress(InputError):
        train_imagenet.main(["--recipe", str(path), "--output", str(tmp_path / "run"), "--dry-run"])


def encoded(kind):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 9, 3), dtype=np.uint8)).save(file, kind)
    return file.getvalue()


PNG, JPEG = encoded("png"), encoded("jpeg")
TRANSFORM, _ = loaders.transforms(
    {"input_size": (3, 8, 8), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"},
    scale=(0.5, 1), ratio=(0.7, 1.3), hflip=0.5,
)  # fmt: skip
GOOD = {"bytes": PNG, "path": "a.png"}
BAD = [
    {"bytes": b"broken", "path": "x.png"},
    {"bytes": b"", "path": None},
    None,
]
undecoded = st.sampled_from([GOOD, {"bytes": JPEG, "path": None}, *BAD])
COLUMNS = {
    "image": (datasets.Image(), undecoded),
    "label": (datasets.ClassLabel(names=["cat", "dog"]), st.sampled_from([0, 1, -1, None])),
    "number": (datasets.Value("int64"), st.integers(-3, 5)),
    "text": (datasets.Value("string"), st.sampled_from(["cat", "", None])),
    "images": (datasets.List(datasets.Image()), st.lists(undecoded, max_size=1)),
    "struct": ({"a": datasets.Value("int64")}, st.just({"a": 1})),
}
names = st.sampled_from(["image", "img", "label", "fine_label", "cls", "__key__", "x y", ""])
splits = st.sampled_from(
    [("train", "validation"), ("train", "test", "validation"), ("train", "test"), ("test", "extra")]
)


@st.composite
def tables(draw):
    """Columns by name, and rows by split: random, or good but for a random cell and a further column."""
    chosen = draw(splits)
    if draw(st.integers(0, 3)):
        kinds = {"image": "image", "label": "label", "x": draw(st.sampled_from(["number", "text", "images", "struct"]))}
        rows = {
            split: [{"image": GOOD, "label": i % 2, "x": draw(COLUMNS[kinds["x"]][1])} for i in range(4)]
            for split in chosen
        }
        column = draw(st.sampled_from(["image", "label"]))
        rows[draw(st.sampled_from(chosen))][draw(st.integers(0, 3))][column] = draw(COLUMNS[column][1])
        return kinds, rows
    kinds = draw(st.dictionaries(names, st.sampled_from(list(COLUMNS)), max_size=3))
    rows = st.fixed_dictionaries({name: COLUMNS[kind][1] for name, kind in kinds.items()})
    return kinds, {split: draw(st.lists(rows, max_size=6)) for split in chosen}


def read_all(loaded):
    """Every image and label of every split, as training reads them."""
    for split in loaded.values():
        if isinstance(split, datasets.IterableDataset):
            for batch in loaders.Stream(split, TRANSFORM, 2):
                assert all(0 <= label < 2 for label in batch["label"])
        else:
            for example in loaders.Images(split, TRANSFORM).__getitems__(range(len(split))):
                assert example["image"].dtype == torch.uint8 and 0 <= example["label"] < 2


@pytest.mark.slow
@settings(max_examples=200, **fuzz)
@given(tables(), st.booleans(), st.sampled_from([None, None, 0.5]))
def test_dataset_columns(tmp_path_factory, table, streaming, share):
    kinds, rows_of = table
    folder = tmp_path_factory.mktemp("columns")
    features = datasets.Features({name: COLUMNS[kind][0] for name, kind in kinds.items()})
    for split, rows in rows_of.items():
        columns = {name: [row[name] for row in rows] for name in kinds}
        ds = datasets.Dataset.from_dict(columns, features=features)
        ds.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    with contextlib.suppress(InputError):
        read_all(data.load(str(folder), streaming, None if streaming else share))


parts = st.one_of(
    st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=6),
    st.sampled_from(
        ["cat", "n01440764", "10", "a[1]", "*", "%20", "#x", "a::b", "train", "test", "~", "$HOME", "\n", "🐶"]
    ),
)
endings = st.sampled_from([".png"] * 6 + [".JPEG", ".txt", ".csv", ".json", ".parquet", ".tar", ".zip", ""])
contents = st.sampled_from([PNG] * 6 + [JPEG, b"", b"broken", b"\0" * 10])
files = st.dictionaries(st.tuples(parts, endings).map("".join), contents, min_size=1, max_size=2)
folders = st.dictionaries(parts, files, min_size=2, max_size=2)


@pytest.mark.slow
@settings(max_examples=120, **fuzz)
@given(parts, folders, st.sampled_from(["val", "test", "extra"]), st.booleans())
def test_file_names(tmp_path_factory, top, classes, other, streaming):
    folder = tmp_path_factory.mktemp("files") / top
    written = {}
    with contextlib.suppress(OSError):  # a name that is too long
        for split in ("train", other):
            for label, contents in classes.items():
                for name, content in contents.items():
                    path = folder / split / label / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    written.setdefault("validation" if split == "val" else split, set()).add((str(path), label))
    with contextlib.suppress(InputError):
        loaded = data.load(str(folder), streaming)
        for split, ds in loaded.items() if not streaming else ():
            labels = ds.features["label"].names
            assert {(row["image"]["path"], labels[row["label"]]) for row in ds} <= written[split]
        read_all(loaded)
    for benchmark in ("imagenet", "r"):
        with contextlib.suppress(InputError):
            ds = sets.open_set(sets.Pass(benchmark, (benchmark,)), str(folder), True)
            for batch in sets.Pictures(benchmark, ds, TRANSFORM, 2):
                assert all(0 <= label < 1000 for label in batch.get("label", ()))
