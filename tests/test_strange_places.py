"""What is read depends on no folder's name, nor on the order in which the system lists files."""

import os
import zipfile
from pathlib import Path

import datasets
import pytest
from helpers import write_cifar100, write_folder
from oracle import write_tars
from PIL import Image

from common import data
from common.errors import InputError
from robustness import sets

FEATURES = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}


def write_parquet(root, *files):
    for number, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        pictures = [Image.new("RGB", (8, 8), (20 * number + i, 0, 0)) for i in range(4)]
        columns = {"image": pictures, "label": [0, 1, 0, 1]}
        ds = datasets.Dataset.from_dict(columns, features=datasets.Features(FEATURES))
        ds.to_parquet(root / file)


def write_zip(root):
    unpacked = write_folder(root / "unpacked", splits=("",), images=4)
    with zipfile.ZipFile(root / "images.zip", "w") as archive:
        for path in sorted(unpacked.rglob("*.png"), reverse=True):
            archive.write(path, f"{path.parent.name}/{path.name}")


pytestmark = pytest.mark.slow

TRAINED = {
    "classes in splits": lambda root: write_folder(root, images=4),
    "files in splits": lambda root: write_parquet(root, *(
        f"{split}/{i}.parquet" for split in ("train", "validation") for i in range(3)
    )),
    "files called like splits": lambda root: write_parquet(root, *(
        f"data/{split}-{i}.parquet" for split in ("train", "validation") for i in range(3)
    )),
    "CIFAR's": lambda root: write_cifar100(root),
}  # fmt: skip
EVALUATED = {
    "classes": lambda root: write_folder(root, splits=("",), images=4),
    "tars": lambda root: write_tars(root, [0, 1, 0, 1], [0, 1, 2, 3]),
    "an archive": write_zip,
    "files called like splits": lambda root: write_parquet(root, "data/test-0.parquet"),
}


def rows_of(ds):
    """What a split holds: labels, and what tells images from each other."""
    found = []
    for row in ds:
        image = row["image"]
        told = image["bytes"] if image["bytes"] else Path(image["path"].split("::")[0]).name
        found.append((row["label"], told))
    assert found
    return found


def trained(place, streaming=False):
    return {split: rows_of(ds) for split, ds in data.load(str(place), streaming).items()}


def evaluated(place):
    place = place / "images.zip" if (place / "images.zip").exists() else place
    return rows_of(sets.open_set(sets.Pass("own", ("own",)), str(place), allow_partial=True))


NAMES = ["a [1] b", "what [a-c]*?", "ä 100 % #1"]


def check_same(read, write, tmp_path, name):
    """What lies in a folder of that name is read as elsewhere, or it is to be renamed."""
    for folder in ("plain", name):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder)
    expected = read(tmp_path / "plain")
    try:
        found = read(tmp_path / name)
    except InputError as error:
        assert "takes *, ? and [ in the path of a folder for patterns: rename it" in str(error)
        assert "[" in name and write not in (TRAINED["classes in splits"], EVALUATED["classes"])
    else:
        assert found == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", TRAINED)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_may_have_any_name(tmp_path, layout, name, streaming):
    if streaming and layout == "CIFAR's":
        return  # it has no validation images, and a stream cannot be divided
    check_same(lambda place: trained(place, streaming), TRAINED[layout], tmp_path, name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", EVALUATED)
def test_a_set_may_lie_in_a_folder_of_any_name(tmp_path, layout, name):
    check_same(evaluated, EVALUATED[layout], tmp_path, name)


@pytest.fixture
def reversed_listing(monkeypatch):
    """The system lists folders in reverse."""

    class Listing:
        def __init__(self, place="."):
            with scandir(place) as scanned:
                self.entries = iter(sorted(scanned, key=lambda entry: entry.name)[::-1])

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        close = __exit__

        def __iter__(self):
            return self.entries

        def __next__(self):
            return next(self.entries)

    scandir, listdir = os.scandir, os.listdir

    def reverse(on):
        monkeypatch.setattr(os, "scandir", Listing if on else scandir)
        own = lambda *args: sorted(listdir(*args))[::-1]  # noqa: E731
        monkeypatch.setattr(os, "listdir", own if on else listdir)

    yield reverse
    reverse(False)


@pytest.mark.parametrize("read, layouts", [(trained, TRAINED), (evaluated, EVALUATED)])
def test_the_order_of_images_is_not_the_file_systems(tmp_path, reversed_listing, read, layouts):
    for layout, write in layouts.items():
        (tmp_path / layout).mkdir()
        write(tmp_path / layout)
        found = []
        for on in (True, False):
            reversed_listing(on)
            found.append(read(tmp_path / layout))
        assert found[0] == found[1], layout


def test_images_are_in_the_order_of_their_classes_and_names(tmp_path):
    """Whatever the order in which an archive or a metadata file has them."""
    for order in (False, True):
        with zipfile.ZipFile(tmp_path / f"{order}.zip", "w") as archive:
            folder = write_folder(tmp_path / f"of_{order}", splits=("",), images=4)
            for path in sorted(folder.rglob("*.png"), reverse=order):
                archive.write(path, f"{path.parent.name}/{path.name}")
    found = [
        rows_of(sets.open_set(sets.Pass("own", ("own",)), str(tmp_path / name), allow_partial=True))
        for name in ("False.zip", "True.zip", "of_True")
    ]
    assert found[0] == found[1] == found[2] == sorted(found[0])
    for split in ("train", "val"):
        (tmp_path / "listed" / split).mkdir(parents=True)
        lines = ["file_name,label"]
        for number, name in enumerate(["dog", "cat", "dog", "cat"]):
            Image.new("RGB", (8, 8)).save(tmp_path / "listed" / split / f"{number}.png")
            lines.append(f"{number}.png,{name}")
        (tmp_path / "listed" / split / "metadata.csv").write_text("\n".join(lines))
    expected = [(0, "1.png"), (0, "3.png"), (1, "0.png"), (1, "2.png")]
    assert trained(tmp_path / "listed") == {"train": expected, "validation": expected}
