"""Datasets by name, and the images and labels a model sees: the bundled digits, a local folder, or the Hub."""

import glob
import io
import itertools
import random
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Normalize

from digits import digits

SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")  # of PIL and timm


class InputError(ValueError):
    """Something that the user can mend; the scripts print its message and no traceback."""


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
    escaped = glob.escape(str(folder))
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


class Images(torch.utils.data.Dataset):
    """A split as ``{"image": transformed image, "label": class index}``, by index or by (epoch, index).

    Random transforms depend on seed, epoch and index alone: not on processes, workers or an interrupted run. Raises
    ``InputError`` with the file name if an image cannot be read.
    """

    def __init__(self, split: datasets.Dataset, transform, seed: int = 0):
        self.split, self.transform, self.seed = split, transform, seed

    def __len__(self):
        return len(self.split)

    def __getitems__(self, keys):
        keys = [key if isinstance(key, tuple) else (0, key) for key in keys]
        rows = self.split[[index for _, index in keys]]
        return _examples(rows["image"], rows["label"], keys, self.transform, self.seed)


class EpochSampler(torch.utils.data.Sampler):
    """Shuffled keys (epoch, index) of ``Images``, as many as make whole batches; ``set_epoch`` changes the order."""

    def __init__(self, size: int, batch_size: int, seed: int):
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def __len__(self):
        return self.size // self.batch_size * self.batch_size

    def __iter__(self):
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.size)[: len(self)]
        return iter([(self.epoch, index) for index in order.tolist()])

    def set_epoch(self, epoch):
        self.epoch = epoch


class Stream(torch.utils.data.IterableDataset):
    """Batches of a streamed split: each loader worker of each process reads shards of its own.

    For training it is endless and shuffled (order of shards, and a buffer of 1000 examples), and starts at ``epoch``
    after the ``first`` batches of this process, in the order of an uninterrupted run.
    """

    def __init__(self, split, transform, batch_size, *, training=False, seed=0, process=0, processes=1):
        self.split, self.transform, self.batch_size, self.training = split, transform, batch_size, training
        self.seed, self.process, self.processes = seed, process, processes
        self.num_classes = split.features["label"].num_classes
        self.epoch = self.first = 0

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        worker = (worker + self.first) % workers  # a loader takes its first batch from worker 0
        share, shares = self.process * workers + worker, self.processes * workers
        split = self.split
        split = (
            split.shard(shares, share) if split.num_shards >= shares else split_dataset_by_node(split, share, shares)
        )
        done = len(range(worker, self.first, workers))
        for number, rows in itertools.islice(enumerate(self._batches(split, share)), done, None):
            wrong = [label for label in rows["label"] if label is None or not 0 <= label < self.num_classes]
            if wrong:
                raise InputError(f"the stream has the label {wrong[0]}; labels must lie in 0..{self.num_classes - 1}")
            keys = [(self.epoch, share, number * self.batch_size + i) for i in range(len(rows["label"]))]
            examples = _examples(rows["image"], rows["label"], keys, self.transform, self.seed)
            yield torch.utils.data.default_collate(examples)

    def _batches(self, split, share):
        if not self.training:
            yield from reading(split.iter(self.batch_size))
            return
        split = split.shuffle(self.seed, buffer_size=1000)
        for lap in itertools.count():
            split.set_epoch(self.epoch + 1000 * lap)
            empty = True
            for rows in reading(split.iter(self.batch_size, drop_last_batch=True)):
                empty = False
                yield rows
            if empty:
                raise InputError(f"share {share} of the stream has fewer than {self.batch_size} images: lower workers")


def reading(batches):
    """The same batches of a stream; what its reader raises, of whatever kind, becomes an ``InputError``."""
    try:
        yield from batches
    except Exception as error:
        raise InputError(f"cannot read on from the stream: {error!r}; training goes on with --resume auto") from error


def _examples(images, labels, keys, transform, seed):
    """Decode and transform; random numbers are drawn from streams named by ``seed`` and each key."""
    examples, state = [], random.getstate()
    with torch.random.fork_rng(devices=[]):
        for image, label, key in zip(images, labels, keys):
            random.seed(f"{seed} {key}")
            torch.default_generator.manual_seed(random.getrandbits(63))
            examples.append({"image": transform(decode(image)), "label": label})
    random.setstate(state)
    return examples


def decode(image: dict | None) -> Image.Image:
    """An undecoded image of ``datasets``, in RGB; None is one that is missing.

    Raises:
        InputError: it cannot be read; the message has its file name.
    """
    image = image or {"bytes": b"", "path": None}
    try:
        here = image["bytes"] is not None or image["path"] is None
        with Image.open(io.BytesIO(image["bytes"] or b"") if here else image["path"]) as opened:
            opened.load()
            return opened if opened.mode == "RGB" else opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
        raise InputError(
            f"cannot read the image {image['path'] or '(without a file name)'}: replace or remove it"
        ) from error


def transforms(config: dict, *, scale, ratio, hflip: float):
    """timm's training and evaluation transforms for a model's data config (``timm.data.resolve_data_config``).

    Images come out as uint8 (3, height, width), for ``to_input`` to normalise on the device.
    """
    shared = {"input_size": config["input_size"], "interpolation": config["interpolation"], "normalize": False}
    train = create_transform(**shared, is_training=True, scale=scale, ratio=ratio, hflip=hflip, color_jitter=None)
    evaluation = create_transform(**shared, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    return train, evaluation


def to_input(config: dict, dtype: torch.dtype):
    """A function from uint8 images (batch, 3, height, width), on any device, to the model's normalised input."""
    mean, std = ([255 * value for value in config[key]] for key in ("mean", "std"))
    normalize = Normalize(mean, std, inplace=True)
    return lambda images: normalize(images.to(dtype))
