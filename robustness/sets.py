"""The robustness sets: where each is found, and its images, each once."""

import dataclasses
import glob
import itertools
import math
from pathlib import Path

import datasets
import huggingface_hub
import torch
from accelerate.state import PartialState
from datasets.distributed import split_dataset_by_node

from common import data, folders, images, loaders
from common.digits import SHIFTS
from common.errors import InputError
from common.folders import some
from robustness import corruptions
from robustness.labels import (
    CLASSES,
    SUBSETS,
    WORDNET,
    class_index,
    outputs,
    quoted,
    wordnet_id,
)  # fmt: skip

HUB = {
    "imagenet": "ILSVRC/imagenet-1k",
    "v2": "clip-benchmark/wds_imagenetv2",
    "r": "clip-benchmark/wds_imagenet-r",
    "sketch": "clip-benchmark/wds_imagenet_sketch",
    "a": "clip-benchmark/wds_imagenet-a",
    "c": None,  # a folder CORRUPTION/SEVERITY/CLASS/FILE
}
ON_IMAGENET = ("real", "r-clean", "a-clean")  # other benchmarks on the images of "imagenet"


@dataclasses.dataclass(frozen=True)
class Pass:
    """Images that are read once, and the benchmarks that they serve."""

    name: str  # of the images: a key of HUB, "digits", or a set of the user's own
    serves: tuple[str, ...]  # ImageNet's validation images serve several
    split: str = ""  # of the digits
    corruption: str = ""  # of ImageNet-C
    severity: str = ""

    def __str__(self):
        return ":".join(filter(None, (self.name, self.split, self.corruption, self.severity)))

    def place(self, places: dict[str, str]) -> str | None:
        """Where the images lie, if that is in ``places``; ImageNet-C's have a folder a pass."""
        if self.corruption:
            return str(Path(places["c"], self.corruption, self.severity))
        return places.get(self.name)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """A row of the results: whose right answers count, on images as they are or corrupted."""

    name: str
    corruption: str = ""
    severity: str = ""

    def __str__(self):
        return f"{self.name}.{self.corruption}-{self.severity}" if self.corruption else self.name


def passes(benchmarks: list[str], places: dict[str, str]) -> list[Pass]:
    """What to read for the benchmarks, each set of images once.

    ``places`` are where sets lie; those of ImageNet-C are what its folder holds.

    Raises:
        InputError: the folder of ImageNet-C is not in its archive's layout.
    """
    plan, serves = [], {}
    for benchmark in benchmarks:
        serves.setdefault(images_of(benchmark), []).append(benchmark)
    for name, served in serves.items():
        if name == "digits":
            plan += [Pass(name, (split,), split) for split in ("test", *SHIFTS)]
        elif name == "c":
            severities = sorted(Path(places["c"]).expanduser().glob("*/[1-5]/"))
            if not severities:
                raise InputError(
                    f"c: {places['c']} holds no folders CORRUPTION/SEVERITY/CLASS, as "
                    f"gaussian_noise/1"
                )
            plan += [Pass(name, ("c",), "", *folder.parts[-2:]) for folder in severities]
        else:
            plan.append(Pass(name, tuple(served)))
    return plan


def images_of(benchmark: str) -> str:
    """The images that a benchmark is about, as ``HUB`` calls them, or itself."""
    return "imagenet" if benchmark in ON_IMAGENET else benchmark


def taken_names(benchmarks: list[str]) -> set[str]:
    """What a set of the user's own cannot be called beside ``benchmarks``."""
    rows = {*ON_IMAGENET, "digits", *(f"{name}-{n}" for name in SUBSETS for n in (200, 1000))}
    return rows | ({"test", *SHIFTS} if "digits" in benchmarks else set())


def classes_of(name: str, ds, label_names: list[str]) -> list[str]:
    """The names of the classes that the labels of ``Pictures`` number.

    Args:
        name: of a ``Pass``.
        ds: the set; only one that is neither ImageNet's nor the digits' is looked at.
        label_names: a model's. Labels of a set that does not name its classes may be among them, as
            text or numbers, or else be as many numbers from 0.
    """
    if name in CLASSES:
        return WORDNET if name != "digits" else [str(i) for i in range(10)]
    label = ds.features["label"]
    if isinstance(label, datasets.ClassLabel):
        return label.names
    if _is_text(label) or _numbered(label_names):
        return label_names
    return [str(i) for i in range(len(label_names))]


def _is_text(feature):
    return feature.dtype in ("string", "large_string")


def _numbered(names):
    return bool(names) and all(name.isdecimal() for name in names)


def mapping(name: str, ds, label_names: list[str], model: str) -> str:
    """What the reader should check of how a set's classes were taken; "" if nothing is unusual.

    Classes that are spelt as the model's outputs are not.
    """
    classes = classes_of(name, ds, label_names)
    taken = [(label, label_names[i]) for label, i in zip(classes, outputs(classes, label_names))]
    renamed = [f"{label} is {output}" for label, output in taken if label != output]
    parts = ["; ".join(renamed[:3] + ["..."] * (len(renamed) > 3))] if renamed else []
    if others := len(label_names) - len(classes):
        parts.append(f"{others} outputs have no images here, and are wrong wherever predicted")
    return f"{name} for {model}: {'; '.join(parts)}" if parts else ""


def output_order(name: str, ds, label_names: list[str]) -> list[int] | None:
    """The model's outputs as a pass counts them: those that the classes mean, then all others.

    None where that is the order they are in.

    Raises:
        InputError: as ``outputs`` does.
    """
    if name == "digits" and len(label_names) != 10:  # ImageNet's 1000 have such numbers too
        raise InputError(
            f"the 10 digits are not the {len(label_names)} outputs ({quoted(label_names)})"
        )
    order = outputs(classes_of(name, ds, label_names), label_names)
    order += sorted(set(range(len(label_names))) - set(order))
    return None if order == list(range(len(order))) else order


class Pictures(torch.utils.data.IterableDataset):
    """A set's images, each once over all processes and loader workers, in batches to collate.

    A batch holds ``image`` (uint8), ``label`` (among ``classes_of`` the set, -1 where unknown),
    ``key`` (names the image alike for every model) and ``path``; ``unreadable`` lists the names of
    images that could not be read. With ``corrupt``, the same images follow in every corruption and
    severity, which ``corruption`` and ``severity`` name. Each worker's last batch is empty but for
    ``sent``: how many images were in the others, readable or not.

    Args:
        name: of a ``Pass``.
        label_names: the model's; labels without classes of their own are as for ``classes_of``.
        root: the folder of the set's files, if these name the images: in ImageNet-C a picture has
            the same name in each corruption, whichever files there are besides.
    """

    def __init__(
        self, name, ds, transform, batch_size: int, *,
        label_names=(), process: int = 0, processes: int = 1, corrupt=False, root="",
    ):  # fmt: skip
        self.name, self.ds, self.transform, self.batch_size = name, ds, transform, batch_size
        self.process, self.processes, self.corrupt = process, processes, corrupt
        self.label_names, self.root, self.places = label_names, root, {}
        names = getattr(ds.features["label"], "names", None)
        self.to_index = names and list(range(len(names)))
        if names and name in HUB:
            self.to_index = [class_index(label, name) for label in names]

    def _rows(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        share, shares = self.process * workers + worker, self.processes * workers
        if isinstance(self.ds, datasets.Dataset):
            for start in range(share * self.batch_size, len(self.ds), shares * self.batch_size):
                keys = range(start, min(start + self.batch_size, len(self.ds)))
                rows = self.ds[keys.start : keys.stop]
                if self.root:
                    keys = [image["path"].replace(self.root, "") for image in rows["image"]]
                yield rows, list(map(str, keys))
            return
        whole = self.ds.num_shards >= shares
        ds = self.ds.shard(shares, share) if whole else None
        ds = ds or split_dataset_by_node(self.ds, share, shares)
        counter = itertools.count()
        for rows in loaders.reading(ds.iter(self.batch_size)):
            yield rows, [f"{share} of {shares}: {next(counter)}" for _ in rows["label"]]

    def __iter__(self):
        sent = 0
        for rows, keys in self._rows():
            for batch in self._batches(rows, keys):
                sent += len(batch["key"]) + len(batch["unreadable"])
                yield batch
        yield {"image": [], "key": [], "unreadable": [], "sent": sent}

    def _batches(self, rows, keys):
        batch = {"image": [], "label": [], "key": [], "path": [], "unreadable": []}
        seeds = []
        turn = self.name not in HUB  # timm reads ImageNet's as they are stored
        for image, label, key in zip(rows["image"], rows["label"], keys):
            try:
                decoded = images.decode(image, turn)
                picture = self.transform(decoded)
            except InputError:
                batch["unreadable"].append((image and image["path"]) or f"image {key}")
                continue
            batch["image"].append(picture)
            batch["label"].append(self.label(label, image["path"]))
            batch["key"].append(key)
            batch["path"].append(image["path"])
            if self.corrupt:
                seeds.append(corruptions.seed_of(decoded))
        yield batch | {"corruption": "", "severity": ""}
        if not self.corrupt:
            return
        for kind, severity in itertools.product(corruptions.CORRUPTIONS, corruptions.SEVERITIES):
            corrupted = [
                corruptions.corrupt(picture, kind, severity, seed)
                for picture, seed in zip(batch["image"], seeds)
            ]
            changes = {"image": corrupted, "corruption": kind, "severity": str(severity)}
            yield batch | changes | {"unreadable": []}

    def label(self, label, path: str | None) -> int:
        """The place among ``classes_of`` the set of an image's label; -1 where it has none.

        Raises:
            InputError: the label is none of the set's.
        """
        if label is None:  # a flat folder; the Hub's archive has the class in the file name
            wordnet = wordnet_id(path)
            return class_index(wordnet, self.name) if wordnet and self.name in HUB else -1
        if self.to_index is None:
            return self._plain_label(label, path)
        return self.to_index[self._known(label, len(self.to_index), path)]

    def _plain_label(self, label, path):
        if label not in self.places:
            if self.name in HUB:
                self.places[label] = class_index(str(label), self.name)
            elif isinstance(label, str) or _numbered(self.label_names):
                try:
                    self.places[label] = outputs([str(label)], list(self.label_names))[0]
                except InputError as error:
                    raise InputError(f"{self.name}: {error}") from error
            else:
                self.places[label] = self._known(label, math.inf, path)
        return self.places[label]

    def _known(self, label, count, path):
        if not 0 <= label < count:  # -1 stands for none, as in test splits
            raise InputError(
                f"{self.name}: the label of {path or 'an image'} is {label}: choose a labelled "
                f"split"
            )
        return label


def open_set(
    which: Pass, place: str | None, allow_partial: bool, names: data.Names = data.NO_NAMES
):
    """A set's images, undecoded, as columns ``image`` and ``label``; streamed unless local files.

    Args:
        place: a folder in the archive's layout, or a zip archive of one; a folder or file of
            WebDataset tars; or a dataset of the Hub, None for its usual one, or a folder with a
            copy of it.
        allow_partial: only warn of missing classes.
        names: of the split, columns and configuration of a set of the Hub.

    Raises:
        InputError: it cannot be found, read or understood, or classes are missing.
    """
    if which.split:
        return data.standard_columns(data.load("digits")[which.split], "digits")
    name, place = which.name, place or HUB[which.name]
    path = Path(place).expanduser()
    place = str(path) if path.exists() else place
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("**/*.tar"))
    local = path.is_dir() and not _holds_parquet(path)
    if (tars and path.exists()) or path.suffix in (".tar", ".zip") or local:
        names.refuse(place, "a folder or archive")
    if tars and path.exists():
        files = {"test": [glob.escape(str(tar)) for tar in tars]}
        ds = data.hub("webdataset", place, data_files=files, streaming=True)["test"]
    elif path.suffix in (".tar", ".zip") and not path.exists():
        raise InputError(f"there is no file {place}")
    elif path.suffix == ".zip" or local:
        return _open_folder(path, name, allow_partial)
    else:
        ds = _open_hub(name, place, names)
    ds = data.standard_columns(ds, place, names)
    _check_all_classes(name, ds, place, allow_partial)
    return ds


def _holds_parquet(folder):
    return any(file.name not in folders.METADATA for file in folder.rglob("*.parquet"))


def _open_hub(name, place, names):
    splits = data.hub(place, place, config=names.dataset_config, streaming=True)
    if names.val_split is not None:
        data.known_split(splits, place, "--val-split", names.val_split)
        return splits[names.val_split]
    split = next((split for split in ("validation", "test") if split in splits), None)
    if split is None:
        raise InputError(f"{place!r} has no validation or test split, only {', '.join(splits)}")
    if {"validation", "test"} <= set(splits):
        PartialState().print(f"{name}: the split validation of {place}, not test")
    return splits[split]


def _check_all_classes(name, ds, place, allow_partial):
    names = getattr(ds.features["label"], "names", None)
    if names and name in HUB and len({class_index(n, name) for n in names}) < CLASSES[name]:
        _lacks(f"{name}: {place} has {len(names)} of {CLASSES[name]} classes", allow_partial)


def _lacks(message, allow_partial):
    if not allow_partial:
        raise InputError(f"{message}: complete it, or evaluate what is there with --allow-partial")
    PartialState().print(f"warning: {message}")


def _open_folder(path, name, allow_partial):
    tree = folders.walk(path)
    if not tree.images:
        raise InputError(f"{path} holds no images and no tar files or zip archives")
    if tree.empty:
        shown = some(sorted(tree.empty), most=5)
        _lacks(f"{name}: {len(tree.empty)} class folders hold no images: {shown}", allow_partial)
    labels = _labels(tree, name)
    if line := tree.left_out(labels):
        PartialState().print(line)
    ds = folders.dataset(labels, sorted(set(labels.values()) - {None}))
    _check_all_classes(name, ds, str(path), allow_partial)
    return ds


def _labels(tree, name):
    """The class of each image; by the WordNet id in its own name where all lie in one folder."""
    flat = not tree.metadata and len(tree.loose()) == len(tree.images)
    numbered = all(folders.file_name(path).startswith("ILSVRC2012_val_") for path in tree.images)
    if flat and numbered and name in HUB:
        return dict.fromkeys(tree.images)  # ImageNet-Real needs no more
    if flat and all(map(wordnet_id, tree.images)):
        return {path: wordnet_id(path) for path in tree.images}
    try:
        return tree.labels(anywhere=name in HUB)
    except InputError as error:
        hint = "; if all images lie in one folder, WordNet ids in their names will do: "
        raise InputError(
            f"{name}: {error}{f'{hint}n01440764_tench.JPEG' if tree.loose() else ''}"
        ) from error


def revision(which: Pass, ds, place: str | None) -> str:
    """Names the images that a pass reads, so that results of others are not taken for theirs.

    That is a commit for a dataset of the Hub, and a hash of the files' names, sizes and times for
    local ones.

    Raises:
        InputError: the Hub cannot be asked.
    """
    if which.split:
        return ds._fingerprint
    place = place or HUB[which.name]
    path = Path(place).expanduser()
    if not path.exists():
        try:
            return huggingface_hub.HfApi().dataset_info(place).sha
        except Exception as error:  # httpx's errors and the Hub's own have no common base
            raise InputError(f"cannot ask the Hub for the commit of {place}: {error}") from error
    return folders.revision(folders.walk(path).files() if path.is_dir() else [path])
