"""Folders and archives as they are found: one reading of them for training and for evaluation."""

import shutil
import unicodedata
import zipfile

import datasets
import numpy as np
import pytest
from PIL import Image
from test_data import png, write_folder

from common import data
from common.errors import InputError
from robustness import sets


def labels_for_training(place, split="train"):
    """The class of each image by its file's name."""
    ds = data.load(str(place))[split]
    names = ds.features["label"].names
    return {row["image"]["path"].rpartition("/")[2]: names[row["label"]] for row in ds}


def labels_for_evaluation(place):
    ds = sets.open_set(sets.Pass("mine", ("mine",)), str(place), False)
    names = ds.features["label"].names
    files = [row["image"]["path"].split("::")[0].rpartition("/")[2] for row in ds]
    return dict(zip(files, (names[label] for label in ds["label"])))


# --------------------------------------------------------------------------------------------------
# Classes


def with_metadata(root, kind, **names):
    """Images of the splits train and val in no class folders, with a file that says their class."""
    write_folder(root)
    for split in ("train", "val"):
        lines = []
        for path in sorted((root / split).glob("*/*.png")):
            lines.append((path.name, names.get(path.parent.name, path.parent.name)))
            path.rename(root / split / path.name)
        for name in ("cat", "dog"):
            (root / split / name).rmdir()
        table = datasets.Dataset.from_dict(dict(zip(("file_name", "label"), zip(*lines))))
        save = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[kind]
        save(str(root / split / f"metadata.{kind}"))
    return root


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_classes_are_those_of_a_metadata_file_as_datasets_reads_it(tmp_path, kind):
    root = with_metadata(tmp_path / "images", kind)
    theirs = datasets.load_dataset(str(root))["train"].cast_column(
        "image", datasets.Image(decode=False)
    )
    expected = {row["image"]["path"].rpartition("/")[2]: row["label"] for row in theirs}
    assert labels_for_training(root) == labels_for_evaluation(root / "train") == expected
    assert set(expected.values()) == {"cat", "dog"}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("classes", [("007", "12"), ("NA", "null"), ("1e3", "True")], ids=str)
def test_a_class_in_a_metadata_file_is_the_text_that_stands_there(tmp_path, kind, classes):
    """Not a number, which would lose a leading zero, nor pandas' word for nothing."""
    root = with_metadata(tmp_path / "images", kind, cat=classes[0], dog=classes[1])
    assert set(labels_for_training(root).values()) == set(classes)
    assert set(labels_for_evaluation(root / "train").values()) == set(classes)


def test_images_that_no_metadata_lists_are_said_and_lines_without_a_file_refused(tmp_path, capfd):
    root = with_metadata(tmp_path / "images", "csv")
    capfd.readouterr()
    Image.new("RGB", (4, 4)).save(root / "train" / "more.png")
    assert len(labels_for_training(root)) == 6
    words = f"{root}/train: left out 1 files, not in the metadata: more.png"
    assert capfd.readouterr().err.splitlines() == [words]
    assert len(labels_for_evaluation(root / "train")) == 6
    assert capfd.readouterr().out.splitlines() == [words]
    (root / "train" / "train_cat_0.png").unlink()
    for read in (labels_for_training, labels_for_evaluation):
        with pytest.raises(
            InputError, match=r"lists 1 files that are no images there .*cat_0\.png"
        ):
            read(root / "train" if read is labels_for_evaluation else root)


def test_images_in_splits_without_classes_are_told_where_to_put_them(tmp_path):
    """As of dogs-vs-cats: train/cat.0.jpg. They are not of the classes train and val."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        for name in ("cat.0.jpg", "dog.0.jpg"):
            Image.new("RGB", (8, 8)).save(tmp_path / split / name)
    words = "cat.0.jpg lies in no class folder: put it into .*train/CLASS, or .*metadata.csv"
    for share in (None, 0.5):
        with pytest.raises(InputError, match=words):
            data.load(str(tmp_path), validation_share=share)
    with pytest.raises(InputError, match="train, val are called like splits: put the images"):
        labels_for_evaluation(tmp_path)


@pytest.mark.parametrize("names", [("Train", "Validation"), ("TRAINING", "Val")])
def test_splits_may_be_called_in_capitals(tmp_path, names):
    root = write_folder(tmp_path, splits=names)
    loaded = data.load(str(root))
    assert {split: len(ds) for split, ds in loaded.items()} == {"train": 6, "validation": 6}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    write_folder(tmp_path, splits=("train",))
    with pytest.raises(InputError, match="would both be the split train"):
        data.load(str(root))


def test_a_class_called_like_a_split_among_others_needs_a_split_around_it(tmp_path):
    root = write_folder(tmp_path, splits=("",), classes=("bus", "train", "car"))
    with pytest.raises(
        InputError, match=f"lies in no class folder: put it into {root}/train/CLASS"
    ):
        data.load(str(root), validation_share=0.5)


def test_a_class_name_is_the_same_however_unicode_composes_it(tmp_path):
    composed, split = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert composed != split
    write_folder(tmp_path, splits=("train",), classes=(composed, "tea"))
    write_folder(tmp_path, splits=("val",), classes=(split, "tea"))
    loaded = data.load(str(tmp_path))
    assert loaded["validation"].features["label"].names == [composed, "tea"]
    assert set(labels_for_evaluation(tmp_path / "val").values()) == {composed, "tea"}


# --------------------------------------------------------------------------------------------------
# A class that train lacks


def test_a_test_split_of_other_classes_is_no_output(tmp_path, capfd):
    """torchvision's ImageFolder needs a class folder, for which test/unknown is usual."""
    root = write_folder(tmp_path)
    write_folder(root, splits=("test",), classes=("unknown",))
    loaded = data.load(str(root))
    assert set(loaded) == {"train", "validation"}
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    assert "test is not read, as it has none of train's classes: unknown" in capfd.readouterr().err


@pytest.mark.parametrize("split, name", [("test", "test"), ("val", "validation")])
def test_a_class_that_a_split_has_beside_trains_is_refused(tmp_path, split, name):
    root = write_folder(tmp_path, splits=("train", "val", "test"))
    write_folder(root, splits=(split,), classes=("owl",))
    words = rf"1 of 3 classes have images in {name} but none in train \('owl'\)"
    for streaming in (False, True):
        with pytest.raises(InputError, match=words):
            data.load(str(root), streaming)


def write_parquet(root, labels_by_split, feature):
    """A copy of a dataset of the Hub, with as many images as labels."""
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    for split, labels in labels_by_split.items():
        images = [{"bytes": png(i), "path": None} for i in range(len(labels))]
        ds = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        ds.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def test_a_label_that_only_test_has_is_refused(tmp_path):
    feature = datasets.ClassLabel(names=["cat", "dog", "owl"])
    labels = {"train": [0, 1], "validation": [0, 1], "test": [0, 1, 2]}
    with pytest.raises(InputError, match=r"images in test but none in train \('owl'\)"):
        data.load(str(write_parquet(tmp_path, labels, feature)))


# --------------------------------------------------------------------------------------------------
# Labels that are no numbers of names


def test_string_labels_are_the_names_of_classes(tmp_path):
    labels = {"train": ["dog", "cat", "dog"], "validation": ["cat", "dog"], "test": ["", ""]}
    root = write_parquet(tmp_path, labels, datasets.Value("string"))
    loaded = data.load(str(root))
    assert set(loaded) == {"train", "validation"}  # test has no labels
    assert loaded["train"].features["label"].names == ["cat", "dog"]
    assert loaded["train"]["label"] == [1, 0, 1] and loaded["validation"]["label"] == [0, 1]
    with pytest.raises(InputError, match=r"does not name its classes.* drop --streaming"):
        data.load(str(root), streaming=True)


def test_numbers_without_names_are_sorted_as_numbers(tmp_path):
    labels = {"train": [10, 2, 1], "validation": [1, 2, 10]}
    loaded = data.load(str(write_parquet(tmp_path, labels, datasets.Value("int64"))))
    assert loaded["train"].features["label"].names == ["1", "2", "10"]
    assert loaded["train"]["label"] == [2, 1, 0]


# --------------------------------------------------------------------------------------------------
# Files


FORMATS = ("jpg", "jfif", "tif", "bmp", "gif", "webp", "png")


def test_the_same_formats_are_read_for_training_and_evaluation(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, suffix in enumerate(FORMATS):
                kind = {"jpg": "JPEG", "jfif": "JPEG", "tif": "TIFF"}.get(suffix, suffix)
                Image.new("RGB", (8, 8), (i, 0, 0)).save(
                    tmp_path / split / name / f"{i}.{suffix}", kind
                )
    assert len(data.load(str(tmp_path))["train"]) == 2 * len(FORMATS)
    ds = sets.open_set(sets.Pass("mine", ("mine",)), str(tmp_path / "val"), False)
    (*batches, end) = sets.Pictures("mine", ds, np.asarray, 64)
    assert sum(len(batch["key"]) for batch in batches) == end["sent"] == 2 * len(FORMATS)


def test_what_systems_leave_behind_is_passed_over_without_a_word(tmp_path, capfd):
    root = write_folder(tmp_path / "photos", splits=("train", "val"))
    expected = labels_for_training(root, "validation")
    for split in ("train", "val"):
        (root / split / ".ipynb_checkpoints").mkdir()
        shutil.copy(
            root / split / "cat" / f"{split}_cat_0.png", root / split / ".ipynb_checkpoints"
        )
        for litter in ("._train_cat_0.png", "Thumbs.db", ".DS_Store"):
            (root / split / "cat" / litter).write_bytes(b"attributes")
    (root / "__MACOSX" / "train" / "cat").mkdir(parents=True)
    (root / "__MACOSX" / "train" / "cat" / "._a.png").write_bytes(b"attributes")
    assert labels_for_training(root, "validation") == expected
    assert labels_for_evaluation(root / "val") == expected
    archive = shutil.make_archive(tmp_path / "val", "zip", root / "val")
    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("__MACOSX/cat/._val_cat_0.png", b"attributes")
        opened.writestr("cat/._val_cat_0.png", b"attributes")
    assert labels_for_evaluation(archive) == expected
    assert capfd.readouterr() == ("", "")


def test_files_that_an_evaluation_leaves_out_are_one_line(tmp_path, capfd):
    root = write_folder(tmp_path, splits=("",))
    for name in ("cat/notes.txt", "cat/.hidden.png"):
        (root / name).touch()
    labels_for_evaluation(root)
    words = "left out 2 files, hidden or not named like an image: .hidden.png, notes.txt"
    assert capfd.readouterr().out == f"{root}: {words}\n"


def test_a_class_with_one_image_cannot_be_divided_and_is_named(tmp_path):
    root = write_folder(tmp_path, splits=("train",), images=4)
    (root / "train" / "lynx").mkdir()
    Image.new("RGB", (4, 4)).save(root / "train" / "lynx" / "a.png")
    with pytest.raises(
        InputError, match=r"validation_share 0\.25, as there is one image alone of 'lynx'"
    ):
        data.load(str(root), validation_share=0.25)


def test_a_cache_that_cannot_be_written_is_named_with_what_to_set(tmp_path, monkeypatch):
    labels = {"train": [0, 1], "validation": [0, 1]}
    root = write_parquet(tmp_path, labels, datasets.ClassLabel(names=["a", "b"]))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere")
    with pytest.raises(InputError, match=r"/proc/nowhere, cannot be written .*: set HF_HOME to"):
        data.load(str(root))


def test_a_copy_of_a_dataset_without_a_card_is_read_without_a_word(tmp_path, caplog):
    labels = {"train": [0, 1], "validation": [0, 1]}
    root = write_parquet(tmp_path, labels, datasets.ClassLabel(names=["a", "b"]))
    (root / "README.md").write_text("no metadata here\n")
    data.load(str(root))
    sets.open_set(sets.Pass("mine", ("mine",)), str(root), False)
    assert "metadata block" not in caplog.text
