"""What a dataset's name means: the bundled digits, a local folder, or the Hub."""

import glob
from pathlib import Path

import datasets

from common.digits import digits
from common.settings import InputError

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def load(name: str, streaming: bool = False, validation_share: float | None = None) -> datasets.DatasetDict:
    """Return every labelled split of a dataset, with the columns ``image`` (bytes or a path, undecoded) and ``label``.

    Args:
        name: "digits" (bundled with scikit-learn, never downloaded), a folder with images as ``SPLIT/CLASS/FILE`` or
            with a copy of a Hub dataset, or a dataset of the Hub such as "ILSVRC/imagenet-1k". Validation splits may
            be called as ``datasets`` knows them ("val", "valid", ...).
        streaming: read the splits train and validation as they are needed; nothing is stored.
        validation_share: of the training images, in (0, 1), the same in every class, to become the split validation.
            A dataset's own validation split becomes test then; if it has both, that is an error.

    Raises:
        InputError: it cannot be loaded, lacks a split or a column, or has classes or labels that do not fit.
    """
    if name == "digits":
        splits = digits()
        if streaming:
            splits = {split: ds.to_iterable_dataset(num_shards=8) for split, ds in splits.items()}
    else:
        folder = Path(name).expanduser()
        files = _split_folders(folder)
        splits = hub(str(folder) if folder.is_dir() else name, name, streaming=streaming, data_files=files or None)
    splits = {split: _standard_columns(ds, name) for split, ds in splits.items()}
    if streaming:  # what else there is cannot be told from an unlabelled split without reading it
        splits = {split: ds for split, ds in splits.items() if split in ("train", "validation")}
    else:  # ImageNet's test split has no labels: -1 throughout
        splits = {split: ds for split, ds in splits.items() if ds.unique("label") != [-1]}
    for wanted in (("train",), ("validation",) if streaming else ("validation", "test")):
        if not set(wanted) & set(splits):
            raise InputError(
                f"{name!r} has no {' or '.join(wanted)} split, only {', '.join(splits) or 'unlabelled ones'}: put its "
                f"images in {name}/{wanted[0]}"
            )
    if validation_share is not None:
        splits = _hold_out(splits, name, validation_share, streaming)
    if not streaming:
        _check_classes(splits, name)
    return datasets.DatasetDict(splits) if not streaming else datasets.IterableDatasetDict(splits)


def _split_folders(folder):
    """The files of each SPLIT/ there is; ``datasets``' own search takes a class called "train" or "test" for one."""
    found = {split: [name for name in names if (folder / name).is_dir()] for split, names in SPLIT_FOLDERS.items()}
    escaped = glob.escape(str(folder.absolute()))  # a relative one would be taken relative to itself
    return {split: [f"{escaped}/{name}/**" for name in names] for split, names in found.items() if names}


def _hold_out(splits, name, share, streaming):
    if streaming or {"validation", "test"} <= set(splits):
        reason = "a stream cannot be divided" if streaming else "there are validation and test already"
        raise InputError(f"{name!r}: validation_share {share} does not apply, as {reason}: drop it")
    try:
        parts = splits["train"].train_test_split(test_size=share, stratify_by_column="label", seed=0)
    except ValueError as error:
        raise InputError(f"{name!r}: cannot hold out validation_share {share}: {error}") from error
    (test,) = (ds for split, ds in splits.items() if split in ("validation", "test"))
    return {"train": parts["train"], "validation": parts["test"], "test": test}


def hub(path: str, name: str, **options):
    """``datasets.load_dataset(path, **options)``, called ``name`` in errors.

    Raises:
        InputError: it cannot be loaded, with what to do.
    """
    try:
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
        cause = error.__cause__ or error  # a DatasetGenerationError itself says nothing
        raise InputError(f"cannot load {name!r}: {str(cause).strip() or type(cause).__name__}") from error


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
    present = {split: set(ds.unique("label")) for split, ds in splits.items()}
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
