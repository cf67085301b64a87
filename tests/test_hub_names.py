"""Splits, columns and configurations of a dataset of the Hub that are not called as usual."""

import datasets
import pytest
import timm
import torch
from helpers import fresh_process, train, write_folder
from test_data import png
from timm.models import save_for_hf

import eval_robustness
import train_imagenet
from common import data, loaders, settings
from common.data import Names
from common.errors import InputError


def picture(i):
    return {"bytes": png(i), "path": None}


COLUMNS = {
    "photo": [picture(i) for i in range(4)],
    "mask": [picture(9)] * 4,
    "animal": ["dog", "cat", "owl", "cat"],
    "weight": [1.5] * 4,
    "age": [3, 1, 2, 3],
}
FEATURES = datasets.Features(
    {
        "photo": datasets.Image(), "mask": datasets.Image(), "animal": datasets.Value("string"),
        "weight": datasets.Value("float32"), "age": datasets.Value("int64"),
    }
)  # fmt: skip


@pytest.fixture
def unusual(tmp_path):
    """Splits called seen, unseen and later; two columns of images, and labels as strings."""
    root = tmp_path / "unusual"
    (root / "data").mkdir(parents=True)
    ds = datasets.Dataset.from_dict(COLUMNS, features=FEATURES)
    header = ["---", "configs:", "- config_name: small", "  data_files:"]
    for split in ("seen", "unseen", "later"):
        ds.to_parquet(root / "data" / f"{split}.parquet")
        header += [f"  - split: {split}", f"    path: data/{split}.parquet"]
    header += ["- config_name: tiny", "  data_files:", "  - split: seen"]
    header += ["    path: data/seen.parquet", "---", ""]
    (root / "README.md").write_text("\n".join(header))
    return str(root)


USUAL = {"train_split": "seen", "val_split": "unseen", "image_key": "photo", "label_key": "animal"}


def test_named_parts_are_read_and_strings_are_classes_by_letter(unusual):
    splits = data.load(unusual, names=Names(**USUAL, dataset_config="small"))
    assert set(splits) == {"train", "validation", "later"}
    for ds in splits.values():
        assert ds.column_names == ["image", "label"]
        assert ds.features["label"].names == ["cat", "dog", "owl"]
        assert ds["label"] == [1, 0, 2, 0]
    assert splits["train"][1]["image"]["bytes"] == png(1)


def test_numbers_are_classes_by_size(unusual):
    names = Names(**USUAL | {"label_key": "age"}, dataset_config="small")
    assert data.load(unusual, names=names)["train"].features["label"].names == ["1", "2", "3"]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"train_split": "sean"}, r"no split 'sean' \(--train-split\), only seen, unseen, later"),
        ({"val_split": "val"}, r"no split 'val' \(--val-split\), only seen, unseen, later"),
        ({"val_split": "seen"}, "--train-split and --val-split are both 'seen'"),
        ({"image_key": "foto"}, "--image-key foto is not there: choose one of photo, mask"),
        ({"image_key": "age"}, "--image-key age cannot be used: choose one of photo, mask"),
        (
            {"image_key": None},
            "must have one image column.*: choose by --image-key and --label-key",
        ),
        ({"label_key": "mask"}, "--label-key mask cannot be used: choose one of animal, age"),
        ({"label_key": "weight"}, "--label-key weight cannot be used"),
        ({"dataset_config": "large"}, "cannot load .*large"),
    ],
)
def test_parts_that_are_not_there_are_errors_with_those_that_are(unusual, changes, words):
    with pytest.raises(InputError, match=words):
        data.load(unusual, names=Names(**{**USUAL, "dataset_config": "small", **changes}))


def test_a_split_whose_place_is_taken_is_said(tmp_path, capfd):
    root = tmp_path / "hub"
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    for split, order in (("train", [0, 1]), ("validation", [0, 1]), ("test", [1, 0])):
        columns = {"image": [picture(0), picture(1)], "label": order}
        ds = datasets.Dataset.from_dict(columns, features=features)
        ds.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    splits = data.load(str(root), names=Names(val_split="test"))
    assert set(splits) == {"train", "validation"} and splits["validation"]["label"] == [1, 0]
    assert "not read, as another split takes the place: validation" in capfd.readouterr().err


@pytest.mark.parametrize("key", list(USUAL))
def test_folders_and_digits_have_no_parts_to_name(tmp_path, key):
    folder = str(write_folder(tmp_path / "images"))
    for name, kind in ((folder, "a folder of images"), ("digits", "the bundled digits")):
        flag = f"--{key.replace('_', '-')} x"
        with pytest.raises(InputError, match=f"{flag} is for datasets of the Hub, .* is {kind}"):
            data.load(name, names=Names(**{key: "x"}))


def test_training_and_evaluation_read_the_same_parts(tmp_path, unusual):
    changes = {**USUAL, "dataset_config": "small", "method": "base", "m": 4}
    trained = train(train_imagenet, tmp_path, dataset=unusual, **changes)
    assert set(trained) == {"validation", "later"}
    fresh_process()
    flags = ["--model", str(tmp_path / "run" / "last"), "--data", f"mine={unusual}"]
    flags += ["--val-split", "unseen", "--image-key", "photo", "--label-key", "animal"]
    flags += ["--dataset-config", "small", "--workers", "0", "--output", str(tmp_path / "out")]
    results = eval_robustness.main(flags)[str(tmp_path / "run" / "last")]
    assert results["mine"]["top1"] == trained["validation"] and results["mine"]["examples"] == 4


def test_another_split_is_evaluated_anew(tmp_path, unusual, capsys):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3)
    names = {"label_names": ["cat", "dog", "owl"]}
    save_for_hf(model, tmp_path / "model", model_config=names, safe_serialization=True)
    flags = ["--model", str(tmp_path / "model"), "--data", f"mine={unusual}", "--workers", "0"]
    flags += ["--image-key", "photo", "--label-key", "animal", "--dataset-config", "small"]
    flags += ["--img-size", "32", "--output", str(tmp_path / "out")]
    for split, said in (("unseen", False), ("unseen", True), ("later", False)):
        fresh_process()
        eval_robustness.main([*flags, "--val-split", split])
        assert ("finished before" in capsys.readouterr().out) == said


def test_names_without_a_set_of_ones_own_are_an_error(tmp_path, unusual):
    with pytest.raises(InputError, match="--val-split is about the sets of --data"):
        eval_robustness.parse("--model a --benchmarks digits --val-split x".split())
    folder = write_folder(tmp_path / "images", splits=("",))
    with pytest.raises(InputError, match="--label-key x is for datasets of the Hub"):
        fresh_process()
        model = timm.create_model("test_resnet", num_classes=2)
        names = {"label_names": ["cat", "dog"]}
        save_for_hf(model, tmp_path / "model", model_config=names, safe_serialization=True)
        flags = ["--model", str(tmp_path / "model"), "--data", f"mine={folder}", "--label-key", "x"]
        eval_robustness.main([*flags, "--output", str(tmp_path / "out")])


def test_a_streamed_split_has_its_own_length_not_that_of_another(tmp_path, accelerator):
    sizes = {"train": 2, "extra": 6, "validation": 4}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    header = ["---", "dataset_info:", "  splits:"]
    for split, size in sizes.items():
        columns = {"image": [picture(i) for i in range(size)], "label": [0, 1] * (size // 2)}
        ds = datasets.Dataset.from_dict(columns, features=features)
        ds.to_parquet(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet")
        header += [f"  - name: {split}", f"    num_examples: {size}", "    num_bytes: 9"]
    (tmp_path / "hub" / "README.md").write_text("\n".join([*header, "---", ""]))
    for chosen in ("train", "extra"):
        flags = ["--dataset", str(tmp_path / "hub"), "--train-split", chosen, "--streaming"]
        args = settings.parse(settings.parser("", ""), [*flags, "--output", str(tmp_path / "run")])
        split = data.load(args.dataset, True, names=Names.of(args))["train"]
        crop = timm.data.create_transform(32, is_training=True)
        size, _ = loaders.train_batches(args, accelerator, split, crop, 2)
        assert size == sizes[chosen]
