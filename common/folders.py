"""Labelled images in folders and zip archives: which files count, and which class each shows."""

import dataclasses
import hashlib
import io
import os
import unicodedata
import zipfile
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from datasets.utils.file_utils import xopen

from common.errors import InputError

SPLIT_FOLDERS = {  # in any case
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_NAMES = frozenset(sum(SPLIT_FOLDERS.values(), ()))
LABELS = ("label", "labels", "fine_label", "cls")  # columns; CIFAR-100 has coarse labels too
SUFFIXES = frozenset(ImageFolder.EXTENSIONS)  # of images
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# What systems and editors leave behind, which nobody counts among their files.
LITTER = frozenset(("__MACOSX", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db", "desktop.ini"))


@dataclasses.dataclass(frozen=True)
class Tree:
    """The files below a folder, or in a zip archive."""

    root: Path
    images: list[str]  # paths, by folder and name; zip://NAME::ARCHIVE in an archive
    metadata: list[str]  # paths of files that may name the images' classes
    others: list[str]  # paths of files that are hidden, or not named like an image
    empty: list[str]  # folders with neither an image nor a further folder, and broken links

    def loose(self) -> list[str]:
        """The images that lie in no folder below the root."""
        return [path for path in self.images if folder_of(path) in (str(self.root), "")]

    def files(self) -> list[Path]:
        """The files on the disk: images and others, and the archives that they are in."""
        paths = [*self.images, *self.metadata, *self.others]
        return [Path(path) for path in sorted(set(map(on_disk, paths)))]

    def labels(self, anywhere: bool = False) -> dict[str, str]:
        """The class of each image by its path: that of a metadata file, or its folder's name.

        Args:
            anywhere: class folders may lie in several folders.

        Raises:
            InputError: an image has no class, or its folder cannot be told to be a class.
        """
        if not self.images:
            raise InputError(f"{self.root} holds no images")
        if labels := _metadata_labels(self):
            return labels
        if loose := self.loose():
            raise InputError(
                f"{loose[0]} lies in no class folder: put it into {self.root}/CLASS, or name its "
                f"class in {self.root}/metadata.csv, with the columns file_name and label"
            )
        folders = {path: folder_of(path) for path in self.images}
        parents = sorted({folder.rpartition("/")[0] for folder in set(folders.values())})
        if len(parents) > 1 and not anywhere:
            raise InputError(
                f"class folders lie in {parents[0]} and in {parents[1]}: name one of them, or move "
                f"all class folders into one"
            )
        names = {folder: class_name(folder.rpartition("/")[2]) for folder in set(folders.values())}
        if all(map(is_split_name, names.values())):
            raise InputError(
                f"{self.root} has no class folders, as {some(sorted(names.values()))} are called "
                f"like splits: put the images of each into folders called like their classes"
            )
        return {path: names[folder] for path, folder in folders.items()}

    def left_out(self, labels: dict[str, str]) -> str | None:
        """A line that says which files are not among the ``labels``; None if there are none."""
        unlisted = [path for path in self.images if path not in labels]
        if not self.others and not unlisted:
            return None
        reasons = ["hidden or not named like an image"] * bool(self.others)
        reasons += ["not in the metadata"] * bool(unlisted)
        shown = some(sorted(map(file_name, [*self.others, *unlisted])))
        number = len(self.others) + len(unlisted)
        return f"{self.root}: left out {number} files, {' or '.join(reasons)}: {shown}"


def walk(root: Path) -> Tree:
    """The files of a folder, through links and in zip archives, or those of one archive.

    Raises:
        InputError: something cannot be read, or a link leads back to a folder that holds it.
    """
    tree = Tree(root, [], [], [], [])
    if root.suffix.lower() == ".zip" and root.is_file():
        _walk_archive(root, tree)
    else:
        _walk_folder(root, tree)
    return tree


def _walk_folder(folder, tree):
    subfolders, images_before = [], len(tree.images)
    for entry in entries(folder):
        if entry.is_dir():
            subfolders.append(Path(entry.path))
        elif entry.is_symlink() and not os.path.exists(entry.path):
            tree.empty.append(entry.path)
        elif entry.name.lower().endswith(".zip"):
            _walk_archive(Path(entry.path), tree)
        else:
            _add_file(entry.path, entry.name, tree)
    visible = [path for path in subfolders if not path.name.startswith(".")]
    if not visible and len(tree.images) == images_before and folder != tree.root:
        tree.empty.append(str(folder))
    for path in visible:
        if path.is_symlink() and folder.resolve().is_relative_to(path.resolve()):
            raise InputError(f"the link {path} leads back to a folder that holds it: remove it")
        _walk_folder(path, tree)


def _walk_archive(archive, tree):
    try:
        with zipfile.ZipFile(archive) as opened:
            names = sorted(info.filename for info in opened.infolist() if not info.is_dir())
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the archive {archive}: {error}") from error
    for name in names:
        *folders, file = name.split("/")
        if not any(folder in LITTER or folder.startswith(".") for folder in folders):
            _add_file(f"zip://{name}::{archive}", file, tree)


def _add_file(path, name, tree):
    if name in METADATA:
        tree.metadata.append(path)
    elif is_litter(name):
        pass
    elif not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES:
        tree.images.append(path)
    else:
        tree.others.append(path)


def entries(folder: str | Path) -> list[os.DirEntry]:
    """What a folder holds, by name, without litter.

    Raises:
        InputError: it cannot be listed.
    """
    try:
        with os.scandir(folder) as scanned:
            kept = [entry for entry in scanned if not is_litter(entry.name)]
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from error
    return sorted(kept, key=lambda entry: entry.name)


def is_litter(name: str) -> bool:
    """Whether a file or folder is of ``LITTER``, or a Mac's copy of another file's attributes."""
    return name in LITTER or name.startswith("._")


def is_split_name(name: str) -> bool:
    """Whether a folder is called like a split."""
    return name.casefold() in SPLIT_NAMES


def class_name(name: str) -> str:
    """A class' name in Unicode's composed form: Macs store é as two characters, others as one."""
    return unicodedata.normalize("NFC", name)


def folder_of(path: str) -> str:
    """The folder that an image lies in, inside of its archive if it is in one ("" at the top)."""
    return _inside(path).rpartition("/")[0]


def file_name(path: str) -> str:
    """The name of an image's file, which may be in an archive."""
    return _inside(path).rpartition("/")[2]


def _inside(path):
    """The part of a path inside its archive, or the whole."""
    return path.split("::")[0].removeprefix("zip:/") if "://" in path else path


def on_disk(path: str) -> str:
    """The file of a path: its archive, if it is in one."""
    return path.partition("::")[2] if path.startswith("zip://") else path


def read_bytes(path: str) -> bytes:
    """The content of a file, which may be in an archive or on the Hub."""
    with xopen(path, "rb") if "://" in path else open(path, "rb") as file:
        return file.read()


def revision(files) -> str:
    """A hash of files' names, sizes and times."""
    stats = [(str(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def some(names: list[str], most: int = 3) -> str:
    """Names for a message: the first few."""
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def _metadata_labels(tree):
    """The class of each image that a metadata file with labels lists, as 🤗 datasets reads it."""
    labels = {}
    for path in tree.metadata:
        table = _read_table(path)
        column = next((name for name in LABELS if name in table), None)
        if column is None or "file_name" not in table:
            continue  # captions, say
        for name, label in zip(table["file_name"], table[column]):
            labels[path.replace(file_name(path), name, 1)] = class_name(str(label))
    if missing := sorted(set(labels) - set(tree.images)):
        raise InputError(
            f"the metadata of {tree.root} lists {len(missing)} files that are no images there "
            f"({some(missing)}): add them, or remove their lines"
        )
    return labels


def _read_table(path):
    content = io.BytesIO(read_bytes(path))
    try:
        if path.endswith(".parquet"):
            return pd.read_parquet(content)
        if path.endswith(".jsonl"):
            return pd.read_json(content, lines=True, dtype=False)
        return pd.read_csv(content, dtype=str, keep_default_na=False)
    except Exception as error:  # each of pandas' readers has its own
        raise InputError(f"cannot read {path}: {error}") from error


def dataset(labels: dict[str, str | None], classes: list[str]) -> datasets.Dataset:
    """Columns ``image`` (a path, undecoded) and ``label`` of images whose class is known by path.

    Raises:
        InputError: a name is not in UTF-8.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    paths = sorted(labels, key=lambda path: numbers.get(labels[path], -1))  # stable
    try:
        names = pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise InputError(f"the name {error.object!r} is not in UTF-8: rename it") from error
    nothing = pa.nulls(len(paths), pa.binary())
    images = pa.StructArray.from_arrays([nothing, names], ["bytes", "path"])
    column = pa.array([numbers.get(labels[path]) for path in paths], pa.int64())
    label = datasets.ClassLabel(names=classes) if classes else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(decode=False), "label": label})
    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(pa.table({"image": images, "label": column}), info=info)
