"""What a dataset's name means: the bundled digits, a local folder, or the Hub."""

import contextlib
import glob
import os
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from accelerate.state import PartialState
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

from common.digits import digits
from common.settings import InputError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SUFFIXES = frozenset(ImageFolder.EXTENSIONS)  # of images


def load(
    name: str, streaming: bool = False, validation_share: float | None = None, train_share: float | None = None
) -> datasets.DatasetDict:
    """Return every labelled split of a dataset, with the columns ``image`` (bytes or a path, undecoded) and ``label``.

    Args:
        name: "digits" (bundled with scikit-learn, never downloaded), a folder with images as ``SPLIT/CLASS/FILE`` or
            with a copy of a Hub dataset, or a dataset of the Hub such as "ILSVRC/imagenet-1k". Validation splits may
            be called as ``datasets`` knows them ("val", "valid", ...). With ``validation_share``, a folder with images
            as ``CLASS/FILE`` will do: they are the training images.
        streaming: read the splits train and validation as they are needed; nothing is stored.
        validation_share: of the training images, in (0, 1), the same in every class, to become the split validation.
            A dataset's own validation split becomes test then; if it has both, that is an error.
        train_share: of the training images that are left, in (0, 1), the same in every class, to keep.

    Raises:
        InputError: it cannot be loaded, lacks a split or a column, or has classes or labels that do not fit.
    """
    folder = Path(name).expanduser()
    if name == "digits":
        splits = digits()
        if streaming:
            splits = {split: ds.to_iterable_dataset(num_shards=8) for split, ds in splits.items()}
    elif roots := _class_roots(folder):
        splits = _image_folders(roots, folder, validation_share)
        if streaming:  # shards of many classes each
            mixed = {split: ds.shuffle(seed=0, keep_in_memory=True) for split, ds in splits.items()}
            splits = {split: ds.to_iterable_dataset(min(len(ds), 64)) for split, ds in mixed.items()}
    else:
        files = _split_folders(folder)
        splits = hub(str(folder) if folder.is_dir() else name, name, streaming=streaming, data_files=files or None)
    splits = {split: _standard_columns(ds, name) for split, ds in splits.items()}
    if streaming:  # what else there is cannot be told from an unlabelled split without reading it
        splits = {split: ds for split, ds in splits.items() if split in ("train", "validation")}
    else:  # ImageNet's test split has no labels: -1 throughout
        splits = {split: ds for split, ds in splits.items() if _labels(ds).unique().to_pylist() != [-1]}
    held_out = ("validation",) if streaming else ("validation", "test")
    for wanted in (("train",), held_out) if validation_share is None else (("train",),):
        if not set(wanted) & set(splits):
            share = "" if streaming or wanted == ("train",) else ", or hold out training images with validation_share"
            raise InputError(
                f"{name!r} has no {' or '.join(wanted)} split, only {', '.join(splits) or 'unlabelled ones'}: put its "
                f"images in {name}/{wanted[0]}{share}"
            )
    if validation_share is not None:
        splits = _hold_out(splits, name, validation_share, streaming)
    if train_share is not None:
        kept, left_out = _divide(splits["train"], name, f"train_share {train_share}", 1 - train_share, streaming)
        _say(f"{name}: {len(kept):,} training images, without {len(left_out):,} (--train-share {train_share})")
        splits["train"] = kept
    if not streaming:
        _check_classes(splits, name)
    return datasets.DatasetDict(splits) if not streaming else datasets.IterableDatasetDict(splits)


def image_folder(folder: str | os.PathLike) -> datasets.Dataset:
    """The images in ``folder``, as CLASS/FILE: columns ``image`` (a path, undecoded) and ``label``.

    Labels follow the sorted names of the class folders; images are sorted by class and file name. Links are followed.
    Only names are read, and nothing is written. What is left out (files that are hidden, or not named like an image) is
    one line on stderr.

    Raises:
        InputError: there are no class folders, one has no images or further folders, or something cannot be listed.
    """
    files = _class_files(folder)
    return _from_files(files, sorted(files))


def _class_roots(folder):
    """The folders of CLASS/FILE by split; none if it holds no such images."""
    found = {
        split: [folder / name for name in names if (folder / name).is_dir()] for split, names in SPLIT_FOLDERS.items()
    }
    if any(_has_images(path) for paths in found.values() for root in paths for path in _folders(root)):
        return {split: paths for split, paths in found.items() if paths}
    inside = _folders(folder) if folder.is_dir() else []
    whole = any(map(_has_images, inside)) and all(_has_images(path) or not _entries(path) for path in inside)
    return {"train": [folder]} if whole else {}


def _image_folders(roots, folder, validation_share):
    """The labelled splits of a folder of images, with the same classes."""
    for split, paths in roots.items():
        if len(paths) > 1:
            names = " and ".join(path.name for path in paths)
            raise InputError(f"{folder}: {names} would both be the split {split}: keep one of them")
    if roots == {"train": [folder]}:
        if validation_share is None:
            _refuse_classes_alone(folder)
    elif others := [path.name for path in _folders(folder) if [path] not in roots.values()]:
        _say(f"{folder}: not read, as they are called like no split: {_some(others)}")
    files = {}
    for split, (root,) in roots.items():
        if split == "test" and not any(map(_has_images, _folders(root))):
            _say(f"{root}: not read, as it has no images in class folders")
        else:
            files[split] = _class_files(root)
    classes = sorted(set().union(*files.values()))
    if len(classes) < 2:
        raise InputError(f"{folder} has images of one class only, {classes[0]!r}: training needs two or more")
    return {split: _from_files(found, classes) for split, found in files.items()}


def _refuse_classes_alone(folder):
    names = sum(SPLIT_FOLDERS.values(), ())
    siblings = {path.name for path in _folders(folder.absolute().parent)} & set(names) - {folder.name}
    if folder.name in names and siblings:
        raise InputError(f"{folder} is one split of a dataset: did you mean {folder.parent}?")
    raise InputError(
        f"{folder} has class folders, but no train and validation around them: hold out some of its images with "
        f"validation_share, or move the class folders into {folder}/train and {folder}/validation"
    )


def _class_files(folder):
    """The image files of each class folder, sorted."""
    files, others = {}, []
    for entry in sorted(_entries(folder), key=lambda entry: entry.name):
        if entry.is_dir():
            if not entry.name.startswith("."):
                files[entry.name] = _image_files(entry.path, others)
        elif entry.is_symlink() and not os.path.exists(entry.path):
            raise InputError(f"{entry.path} is a broken link: mend or remove it")
        else:
            others.append(entry.name)
    if not files:
        raise InputError(f"{folder} has no class folders: put its images into {folder}/CLASS")
    if others:
        _say(f"{folder}: left out {len(others)} files, hidden or not named like an image: {_some(sorted(others))}")
    return files


def _image_files(folder, others):
    names = []
    for entry in _entries(folder):
        if not entry.is_dir():
            (names if _is_image(entry.name) else others).append(entry.name)
        elif not entry.name.startswith("."):
            raise InputError(f"the class folder {folder} has a folder of its own, {entry.name}: move its images up")
    if not names:
        raise InputError(f"the class folder {folder} has no images: add some, or remove it")
    return [f"{folder}/{name}" for name in sorted(names)]


def _from_files(files, classes):
    paths = [path for name in classes for path in files.get(name, ())]
    labels = np.repeat(np.arange(len(classes)), [len(files.get(name, ())) for name in classes])
    try:
        names = pa.array(paths, pa.string())
    except UnicodeEncodeError as error:
        raise InputError(f"the name {error.object!r} is not in UTF-8: rename it") from error
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), names], names=["bytes", "path"])
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=classes)}
    info = datasets.DatasetInfo(features=datasets.Features(features))
    return datasets.Dataset(pa.table({"image": images, "label": labels}), info=info)


def _entries(folder):
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise InputError(f"cannot list {folder}: {error.strerror}") from error


def _folders(folder):
    return sorted(Path(entry.path) for entry in _entries(folder) if entry.is_dir() and not entry.name.startswith("."))


def _is_image(name):
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in SUFFIXES


def _has_images(folder):
    return any(_is_image(entry.name) for entry in _entries(folder))


def _some(names):
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _say(line):
    if PartialState().is_main_process:
        print(line, file=sys.stderr)


def _labels(ds):
    """All labels. ``unique`` writes a split with an index mapping anew, images included; a slice reads row by row."""
    labels = ds.data.column("label")
    return labels if ds._indices is None else labels.take(ds._indices.column(0))


def _split_folders(folder):
    """The files of each SPLIT/ there is; ``datasets``' own search takes a class called "train" or "test" for one."""
    found = {split: [name for name in names if (folder / name).is_dir()] for split, names in SPLIT_FOLDERS.items()}
    escaped = glob.escape(str(folder.absolute()))  # a relative one would be taken relative to itself
    return {split: [f"{escaped}/{name}/**" for name in names] for split, names in found.items() if names}


def _hold_out(splits, name, share, streaming):
    if {"validation", "test"} <= set(splits):
        reason = "there are validation and test already"
        raise InputError(f"{name!r}: validation_share {share} does not apply, as {reason}: drop it")
    train, validation = _divide(splits["train"], name, f"validation_share {share}", share, streaming)
    test = [ds for split, ds in splits.items() if split in ("validation", "test")]
    return {"train": train, "validation": validation, **({"test": test[0]} if test else {})}


def _divide(ds, name, setting, share, streaming):
    """Two parts, the second a share of every class."""
    from sklearn.model_selection import train_test_split  # here, since it takes a second

    if streaming:
        raise InputError(f"{name!r}: {setting} does not apply, as a stream cannot be divided: drop it")
    labels = _labels(ds).to_numpy()  # datasets' own train_test_split takes minutes for a million of them
    try:
        parts = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=0)
    except ValueError as error:
        raise InputError(f"{name!r}: cannot divide the training images by {setting}: {error}") from error
    return [ds.select(np.sort(part), keep_in_memory=True) for part in parts]


def hub(path: str, name: str, **options):
    """``datasets.load_dataset(path, **options)``, called ``name`` in errors.

    Raises:
        InputError: it cannot be loaded, with what to do.
    """
    try:
        with _quiet() if Path(name).expanduser().exists() else contextlib.nullcontext():
            return datasets.load_dataset(path, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{name}"
            raise InputError(
                f"{name!r} is gated: accept its terms at {page}, then run `hf auth login` with a token of that account"
            ) from error
        raise InputError(
            f"there is no folder {name!r} and no such dataset on the Hub (or it is private, and you are not logged in: "
            f"`hf auth login`). Use 'digits', a folder with train/ and validation/, or OWNER/NAME"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"there is no folder {name!r} here, and the Hub cannot be reached to look there: {error}"
        ) from error
    except Exception as error:  # the readers of tar, zip, JSON, ... that datasets picks each raise their own
        raise InputError(f"cannot load {name!r}: {explained(error)}") from error


def explained(error: Exception) -> str:
    """What an error of ``datasets`` says, and what to do where it does not say it."""
    cause = error.__cause__ or error  # a DatasetGenerationError itself says nothing
    text = str(cause).strip() or type(cause).__name__
    if "Invalid string class label" in text:  # an archive's own folder, which datasets 5 takes for the class
        text += "; class folders inside an archive are not understood: unpack it"
    return text


@contextlib.contextmanager
def _quiet():
    """No bars for reading files that are here."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _standard_columns(ds, name):
    features = ds.features or {}
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    for usual in ("label", "fine_label"):  # CIFAR-100 has coarse labels too
        if usual in labels:
            labels = [usual]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in features.items())
        raise InputError(
            f"{name!r} must have one image column and one class label column; its columns are {columns or 'unknown'} "
            f"(a folder of images needs them as SPLIT/CLASS/FILE, in two classes or more)"
        )
    ds = ds.select_columns([images[0], labels[0]])
    for column, usual in ((images[0], "image"), (labels[0], "label")):
        ds = ds if column == usual else ds.rename_column(column, usual)
    # Decoding is left to Images, which can then name an unreadable file.
    return ds.cast_column("image", datasets.Image(decode=False))


def _check_classes(splits, name):
    names = splits["train"].features["label"].names
    present = {split: set(_labels(ds).unique().to_pylist()) for split, ds in splits.items()}
    for split, labels in present.items():
        wrong = [label for label in labels if label is None or not 0 <= label < len(names)]
        if wrong:
            raise InputError(
                f"{name!r}: {split} has the label {wrong[0]}; labels must lie in 0..{len(names) - 1}, one for each of "
                f"its {len(names)} class names"
            )
    held_out = "validation" if "validation" in splits else "test"
    for split, other in ((held_out, "train"), ("train", held_out)):
        missing = sorted(present[other] - present[split])
        if missing:
            shown = ", ".join(repr(names[i]) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InputError(
                f"{name!r}: {len(missing)} of {len(names)} classes have images in {other} but none in {split} "
                f"({shown}): add images of them to {split}, or remove them from {other}"
            )
