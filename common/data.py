"""What a dataset's name means: the bundled digits, a local folder, or the Hub."""

import contextlib
import dataclasses
import difflib
import glob
import logging
import os
import sys
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate.state import PartialState
from datasets.data_files import EmptyDatasetError
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from common import folders
from common.digits import digits
from common.errors import InputError
from common.folders import LABELS, SPLIT_FOLDERS, some

# Of a dataset's own files, which datasets reads; a folder with one is no folder of images.
DATA_SUFFIXES = (".parquet", ".arrow", ".tar", ".gz", ".tgz")


@dataclasses.dataclass(frozen=True)
class Names:
    """What a dataset of the Hub calls its parts, where that is not to be guessed."""

    train_split: str | None = None
    val_split: str | None = None
    image_key: str | None = None
    label_key: str | None = None
    dataset_config: str | None = None

    @classmethod
    def of(cls, args) -> "Names":
        """Those of a script's or a run's settings; of runs before there were such, none."""
        keys = [field.name for field in dataclasses.fields(cls)]
        return cls(*(getattr(args, key, None) for key in keys))

    def given(self) -> dict[str, str]:
        """Those that are, by setting."""
        return {key: name for key, name in dataclasses.asdict(self).items() if name is not None}

    def refuse(self, name: str, kind: str) -> None:
        """Raise ``InputError`` if there are any, as a dataset of that kind has none to choose."""
        for key, value in self.given().items():
            flag = f"--{key.replace('_', '-')} {value}"
            raise InputError(f"{flag} is for datasets of the Hub, and {name} is {kind}: drop it")


NO_NAMES = Names()


def load(
    name: str,
    streaming: bool = False,
    validation_share: float | None = None,
    train_share: float | None = None,
    names: Names = NO_NAMES,
) -> datasets.DatasetDict:
    """Return every labelled split of a dataset, with the columns ``image`` and ``label``.

    An image is bytes or a path, undecoded. Every class has images in train.

    Args:
        name: "digits" (bundled with scikit-learn, never downloaded), a folder with images as
            ``SPLIT/CLASS/FILE``, or ``SPLIT/FILE`` with the classes in ``SPLIT/metadata.csv``, or
            with a copy of a Hub dataset, or a dataset of the Hub such as "ILSVRC/imagenet-1k".
            Splits may be called as ``datasets`` knows them ("val", "valid", ...), in any case.
            With ``validation_share``, the folder may also hold the training images alone.
        streaming: read the splits train and validation as they are needed; nothing is stored.
        validation_share: of the training images, in (0, 1), the same in every class, to become the
            split validation. A dataset's own validation split becomes test then; if it has both,
            that is an error.
        train_share: of the training images that are left, in (0, 1), the same in every class, to
            keep.
        names: of a Hub dataset's splits, columns and configuration.

    Raises:
        InputError: it cannot be loaded, lacks a split or a column, or has classes or labels that
            do not fit.
    """
    splits = _read(name, streaming, validation_share, names)
    if streaming:  # what else there is cannot be told from an unlabelled split without reading it
        splits = {split: splits[split] for split in ("train", "validation") if split in splits}
    else:  # ImageNet's test split has no labels: -1 throughout
        splits = {split: ds for split, ds in splits.items() if _has_labels(ds)}
    held_out = ("validation",) if streaming else ("validation", "test")
    for wanted in (("train",), held_out) if validation_share is None else (("train",),):
        if not set(wanted) & set(splits):
            share = "" if streaming or wanted == ("train",) else ", or hold out training images "
            share += "with validation_share" if share else ""
            raise InputError(
                f"{name!r} has no {' or '.join(wanted)} split, only "
                f"{', '.join(splits) or 'unlabelled ones'}: put its images in "
                f"{name}/{wanted[0]}{share}"
            )
    splits = _with_class_names(splits, name, streaming)
    if validation_share is not None:
        splits = _hold_out(splits, name, validation_share, streaming)
    if train_share is not None:
        setting = f"train_share {train_share}"
        kept, left_out = _divide(splits["train"], name, setting, 1 - train_share, streaming)
        _say(
            f"{name}: {len(kept):,} training images, without {len(left_out):,} "
            f"(--train-share {train_share})"
        )
        splits["train"] = kept
    if streaming:
        return datasets.IterableDatasetDict(splits)
    _check_classes(splits, name)
    return datasets.DatasetDict(splits)


def noisy_labels(split: datasets.Dataset, share: float, seed: int) -> np.ndarray:
    """The labels of all images, where a share of them, drawn, has another class.

    Each of the other classes is as likely: symmetric noise. The split itself stays as it is.
    """
    labels, classes = _labels(split).to_numpy().copy(), split.features["label"].num_classes
    generator = np.random.default_rng([seed, len(labels), classes])
    chosen = generator.permutation(len(labels))[: round(share * len(labels))]
    labels[chosen] = (labels[chosen] + generator.integers(1, classes, len(chosen))) % classes
    return labels


def _read(name, streaming, validation_share, names):
    folder = Path(name).expanduser()
    if name == "digits":
        names.refuse(name, "the bundled digits")
        splits = digits()
        if streaming:
            splits = {split: ds.to_iterable_dataset(num_shards=8) for split, ds in splits.items()}
    elif trees := _trees(folder):
        names.refuse(name, "a folder of images")
        splits = _image_folders(trees, folder, validation_share)
        if streaming:  # shards of many classes each
            for split, ds in splits.items():
                mixed = ds.shuffle(seed=0, keep_in_memory=True)
                splits[split] = mixed.to_iterable_dataset(min(len(ds), 64))
    else:
        place = str(folder) if folder.is_dir() else name
        files = _split_files(folder) if folder.is_dir() else None
        options = {"streaming": streaming, "data_files": files or None}
        splits = hub(place, name, config=names.dataset_config, **options)
        splits = _standard_splits(splits, name, names)
    return {split: standard_columns(ds, name, names) for split, ds in splits.items()}


def _standard_splits(splits, name, names):
    """The splits with the named ones called train and validation."""
    wanted = {"train": names.train_split, "validation": names.val_split}
    wanted = {usual: split for usual, split in wanted.items() if split is not None}
    for usual, split in wanted.items():
        known_split(splits, name, f"--{'train' if usual == 'train' else 'val'}-split", split)
    if len(set(wanted.values())) < len(wanted):
        raise InputError(f"{name!r}: --train-split and --val-split are both {names.val_split!r}")
    others = {s: ds for s, ds in splits.items() if s not in wanted.values()}
    if left_out := [split for split in others if split in wanted]:
        _say(f"{name}: not read, as another split takes the place: {some(left_out)}")
    kept = {usual: splits[split] for usual, split in wanted.items()}
    return kept | {split: ds for split, ds in others.items() if split not in wanted}


def known_split(splits, name: str, flag: str, split: str) -> None:
    """Check that a dataset has a split.

    Raises:
        InputError: it has not, with those that it has.
    """
    if split not in splits:
        raise InputError(f"{name!r} has no split {split!r} ({flag}), only {', '.join(splits)}")


def image_folder(folder: str | Path) -> datasets.Dataset:
    """The images in ``folder``, as CLASS/FILE: columns ``image`` (a path, undecoded) and ``label``.

    Labels follow the sorted names of the classes; images are sorted by class and file name. Links
    are followed. Only names are read, and nothing is written. What is left out is one line on
    stderr.

    Raises:
        InputError: as ``folders.walk`` and ``Tree.labels``, or a folder holds no images.
    """
    labels = _labels_by_path(folders.walk(Path(folder)))
    return folders.dataset(labels, sorted(set(labels.values())))


def _trees(folder):
    """What the folders of images by split hold; none if it is no folder of images."""
    if not folder.is_dir():
        return {}
    roots = _split_roots(folder)
    trees = {split: folders.walk(root) for split, root in roots.items()}
    if not roots:
        trees = {"train": folders.walk(folder)}
    files = [path for tree in trees.values() for path in tree.others]
    if any(path.endswith(DATA_SUFFIXES) for path in files):
        return {}
    return trees if any(tree.images for tree in trees.values()) else {}


def _split_roots(folder):
    """The folders that are called like a split, by split."""
    roots = {}
    for entry in folders.entries(folder):
        for split, names in SPLIT_FOLDERS.items():
            if entry.name.casefold() in names and entry.is_dir():
                roots.setdefault(split, []).append(Path(entry.path))
    for split, paths in roots.items():
        if len(paths) > 1:
            order = SPLIT_FOLDERS[split].index
            names = sorted((path.name for path in paths), key=lambda name: order(name.casefold()))
            names = " and ".join(names)
            raise InputError(f"{folder}: {names} would both be the split {split}: keep one of them")
    return {split: roots[split][0] for split in SPLIT_FOLDERS if split in roots}


def _image_folders(trees, folder, validation_share):
    """The labelled splits of a folder of images, with the classes of train."""
    for tree in trees.values():
        _refuse_archives(tree)
    alone = trees.get("train") and trees["train"].root == folder
    if alone and validation_share is None:
        _refuse_classes_alone(folder, trees["train"])
    if not alone:
        roots = {tree.root.name for tree in trees.values()}
        _say_unread(folder, roots)
    labels = {}
    for split, tree in trees.items():
        if split == "test" and len(tree.loose()) == len(tree.images) and not tree.metadata:
            _say(f"{tree.root}: not read, as it has no images in class folders")
        else:
            labels[split] = _labels_by_path(tree)
    first = labels.get("train") or next(iter(labels.values()))
    classes = sorted(set(first.values()))
    labels = _of_classes(labels, classes, str(folder))
    if len(classes) < 2:
        raise InputError(
            f"{folder} has images of one class only, {classes[0]!r}: training needs two or more"
        )
    return {split: folders.dataset(by_path, classes) for split, by_path in labels.items()}


def _labels_by_path(tree):
    """The class of each image of a folder; what is left out is said."""
    labels = tree.labels()
    if tree.empty:
        raise InputError(
            f"{len(tree.empty)} folders or links below {tree.root} hold no images "
            f"({some(tree.empty)}): add images to them, or remove them"
        )
    if line := tree.left_out(labels):
        _say(line)
    return labels


def _refuse_archives(tree):
    inside = [path for path in tree.images if path.startswith("zip://")]
    if inside:  # to find an image in a large archive takes longer than to decode it
        raise InputError(
            f"{inside[0]}: class folders inside an archive are not understood: unpack it"
        )


def _of_classes(labels, classes, name):
    """The labels by split, without a test split of other classes, as torchvision's test/unknown.

    Raises:
        InputError: a split has classes that train has not.
    """
    kept = {}
    for split, by_path in labels.items():
        others = sorted(set(by_path.values()) - set(classes))
        if not others:
            kept[split] = by_path
        elif split == "test" and len(others) == len(set(by_path.values())):
            _say(f"{name}: test is not read, as it has none of train's classes: {some(others)}")
        else:
            raise _missing(name, others, len({*classes, *others}), split, "train")
    return kept


def _missing(name, classes, of, there, here):
    shown = some(list(map(repr, classes)), most=5)
    return InputError(
        f"{name!r}: {len(classes)} of {of} classes have images in {there} but none in {here} "
        f"({shown}): add images of them to {here}, or remove them from {there}"
    )


def _refuse_classes_alone(folder, tree):
    around = folder.absolute().parent
    siblings = {entry.name for entry in folders.entries(around) if entry.is_dir()} - {folder.name}
    if folders.is_split_name(folder.name) and any(map(folders.is_split_name, siblings)):
        raise InputError(f"{folder} is one split of a dataset: did you mean {folder.parent}?")
    tree.labels()  # its own errors come first
    raise InputError(
        f"{folder} has class folders, but no train and validation around them: hold out some of "
        f"its images with validation_share, or move the class folders into {folder}/train and "
        f"{folder}/validation"
    )


def _say_unread(folder, read):
    names = [entry.name for entry in folders.entries(folder) if entry.is_dir()]
    others = [name for name in names if name not in read and not name.startswith(".")]
    if others:
        _say(f"{folder}: not read, as they are called like no split: {some(others)}")


def _say(line):
    if PartialState().is_main_process:
        print(line, file=sys.stderr)


def _labels(ds):
    """All labels, with no copy of the images.

    ``unique`` would write a split with an index mapping anew; a slice reads row by row.
    """
    labels = ds.data.column("label")
    return labels if ds._indices is None else labels.take(ds._indices.column(0))


def _has_labels(ds):
    return set(_labels(ds).unique().to_pylist()) - {-1, None, ""} != set()


def _split_files(folder):
    """The files of each SPLIT/; ``datasets``' own search takes a class called "train" for one."""
    place = glob.escape(str(folder.absolute()))  # a relative one would be relative to itself
    roots = _split_roots(folder)
    return {split: [f"{place}/{glob.escape(root.name)}/**"] for split, root in roots.items()}


def _with_class_names(splits, name, streaming):
    """The splits with labels that number class names, also where they were strings or numbers."""
    if isinstance(splits["train"].features["label"], datasets.ClassLabel):
        return splits
    if streaming:
        raise InputError(
            f"{name!r} does not name its classes, which a stream of it does not tell: drop "
            f"--streaming, or make label a ClassLabel"
        )
    values = {split: _labels(ds).unique().to_pylist() for split, ds in splits.items()}
    values = {split: [v for v in held if v not in (None, -1)] for split, held in values.items()}
    classes = sorted(values["train"])  # numbers by size, strings by letter
    by_value = {split: dict(zip(held, held)) for split, held in values.items()}
    kept = _of_classes(by_value, classes, name)
    feature = datasets.ClassLabel(names=[folders.class_name(str(value)) for value in classes])
    return {split: _number(splits[split], classes, feature) for split in kept}


def _number(ds, classes, feature):
    labels = ds.data.column("label")
    numbers = pc.index_in(labels, pa.array(classes, labels.type))
    return ds.remove_columns("label").add_column("label", numbers.to_pylist(), feature=feature)


def _hold_out(splits, name, share, streaming):
    if {"validation", "test"} <= set(splits):
        raise InputError(
            f"{name!r}: validation_share {share} does not apply, as there are validation and test "
            f"already: drop it"
        )
    setting = f"validation_share {share}"
    train, validation = _divide(splits["train"], name, setting, share, streaming)
    test = [ds for split, ds in splits.items() if split in ("validation", "test")]
    return {"train": train, "validation": validation, **({"test": test[0]} if test else {})}


def _divide(ds, name, setting, share, streaming):
    """Two parts, the second a share of every class."""
    from sklearn.model_selection import train_test_split  # here, since it takes a second

    if streaming:
        raise InputError(
            f"{name!r}: {setting} does not apply, as a stream cannot be divided: drop it"
        )
    labels = _labels(ds).to_numpy()  # datasets' own train_test_split takes minutes for a million
    numbers, counts = np.unique(labels, return_counts=True)
    if single := [ds.features["label"].int2str(int(n)) for n in numbers[counts == 1] if n >= 0]:
        raise InputError(
            f"{name!r}: cannot divide the training images by {setting}, as there is one image "
            f"alone of {some(list(map(repr, single)))}: add images of it, or remove it"
        )
    try:
        options = {"test_size": share, "stratify": labels, "random_state": 0}
        parts = train_test_split(np.arange(len(labels)), **options)
    except ValueError as error:
        raise InputError(
            f"{name!r}: cannot divide the training images by {setting}: {error}"
        ) from error
    return [ds.select(np.sort(part), keep_in_memory=True) for part in parts]


def hub(path: str, name: str, config: str | None = None, **options):
    """``datasets.load_dataset(path, config, **options)``, called ``name`` in errors.

    Raises:
        InputError: it is not there or cannot be loaded, with what to do.
    """
    place = Path(name).expanduser()
    if not place.exists():
        _refuse_missing_folder(name, place)
    elif not options.get("data_files") and glob.has_magic(str(place.absolute())):
        raise InputError(
            f"{name}: 🤗 datasets takes *, ? and [ in the path of a folder for patterns: rename it"
        )
    try:
        with _quiet(place.exists()):
            return datasets.load_dataset(path, **options | ({"name": config} if config else {}))
    except (EmptyDatasetError, datasets.exceptions.DataFilesNotFoundError) as error:
        raise InputError(
            f"{name} holds no images: put them in {name}/train/CLASS/FILE and "
            f"{name}/validation/CLASS/FILE"
        ) from error
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            raise InputError(
                f"{name!r} is gated: accept its terms at https://huggingface.co/datasets/{name}, "
                f"then run `hf auth login` with a token of that account"
            ) from error
        raise InputError(
            f"there is no folder {name!r} and no such dataset on the Hub (or it is private, and "
            f"you are not logged in: `hf auth login`). Use 'digits', a folder with train/ and "
            f"validation/, or OWNER/NAME"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"there is no folder {name!r} here, and the Hub cannot be reached to look there: "
            f"{error}"
        ) from error
    except Exception as error:  # the readers of tar, zip, JSON, ... each raise their own
        raise InputError(f"cannot load {name!r}: {explained(error)}{_about_cache()}") from error


def _refuse_missing_folder(name, place):
    """Refuse at once what cannot be on the Hub, or is nearly called like a folder here."""
    beside = os.listdir(place.parent) if "/" in name and place.parent.is_dir() else []
    nearest = difflib.get_close_matches(place.name, beside, 1)
    if nearest:
        raise InputError(f"there is no folder {name}: did you mean {place.parent / nearest[0]}?")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"there is no folder {name}, and it is no name of a dataset") from error


def _about_cache():
    """What to do where datasets cannot write its cache, as in a container without a home."""
    cache = datasets.config.HF_DATASETS_CACHE
    try:
        os.makedirs(cache, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        return (
            f". The cache of datasets, {cache}, cannot be written ({error.strerror}): set HF_HOME "
            f"to a folder that can"
        )
    return ""


def explained(error: Exception) -> str:
    """What an error of ``datasets`` says, and what to do where it does not say it."""
    cause = error.__cause__ or error  # a DatasetGenerationError itself says nothing
    text = str(cause).strip() or type(cause).__name__
    if "Invalid string class label" in text:  # datasets 5 takes an archive's folder for the class
        text += "; class folders inside an archive are not understood: unpack it"
    return text


@contextlib.contextmanager
def _quiet(local):
    """No bars for reading files that are here, and no word about a missing dataset card."""
    cards = logging.getLogger("huggingface_hub.repocard")
    level, shown = cards.level, not datasets.are_progress_bars_disabled()
    cards.setLevel(logging.ERROR)
    if local:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        cards.setLevel(level)
        if local and shown:
            datasets.enable_progress_bars()


def standard_columns(ds, name: str, names: Names = NO_NAMES):
    """The image column, undecoded, as ``image``, and the label column as ``label``.

    Labels are numbers of class names, or strings or numbers without names.

    Raises:
        InputError: there is not one image column, or no label column, or none of the given name.
    """
    features = ds.features or {}
    images = [column for column, kind in features.items() if isinstance(kind, datasets.Image)]
    label = _label_column(features)
    if names.image_key is not None:
        images = [_given(names.image_key, images, features, name, "--image-key")]
    if names.label_key is not None:
        kinds = datasets.ClassLabel
        usable = [c for c, kind in features.items() if isinstance(kind, kinds) or _is_plain(kind)]
        label = _given(names.label_key, usable, features, name, "--label-key")
    if len(images) != 1 or label is None:
        kinds = [f"{column} ({type(kind).__name__})" for column, kind in features.items()]
        raise InputError(
            f"{name!r} must have one image column, and one of class labels or called "
            f"{', '.join(LABELS)}; its columns are {', '.join(kinds) or 'unknown'}: choose by "
            f"--image-key and --label-key (a folder of images needs them as CLASS/FILE, and a tar "
            f"of class folders is to be unpacked)"
        )
    ds = ds.select_columns([images[0], label])
    for column, usual in ((images[0], "image"), (label, "label")):
        ds = ds if column == usual else ds.rename_column(column, usual)
    # Decoding is left to loaders.decode, which can then name an unreadable file.
    return ds.cast_column("image", datasets.Image(decode=False))


def _given(column, usable, features, name, flag):
    if column not in usable:
        why = "cannot be used" if column in features else "is not there"
        raise InputError(f"{name!r}: {flag} {column} {why}: choose one of {', '.join(usable)}")
    return column


def _label_column(features):
    """A usual name with class labels, the only class labels, or a usual name; None without."""
    named = [column for column in LABELS if column in features]
    classes = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    plain = [column for column in named if _is_plain(features[column])]
    preferred = [column for column in named if column in classes]
    candidates = preferred or (classes if len(classes) == 1 else []) or plain
    return candidates[0] if candidates else None


def _is_plain(feature):
    """Whether a column holds strings or whole numbers."""
    kind = getattr(feature, "dtype", None)
    return isinstance(feature, datasets.Value) and kind.startswith(("string", "large_str", "int"))


def _check_classes(splits, name):
    names = splits["train"].features["label"].names
    present = {split: set(_labels(ds).unique().to_pylist()) for split, ds in splits.items()}
    for split, labels in present.items():
        wrong = [label for label in labels if label is None or not 0 <= label < len(names)]
        if wrong:
            raise InputError(
                f"{name!r}: {split} has the label {wrong[0]}; labels must lie in "
                f"0..{len(names) - 1}, one for each of its {len(names)} class names"
            )
    held_out = "validation" if "validation" in splits else "test"
    others = [split for split in splits if split != "train"]
    for split, other in [("train", split) for split in others] + [(held_out, "train")]:
        if missing := sorted(present[other] - present[split]):
            classes = [names[number] for number in missing]
            raise _missing(name, classes, len(names), other, split)
