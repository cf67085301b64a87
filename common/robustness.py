"""The robustness sets: where each is found, and which output of a model its labels mean."""

import functools
import hashlib
import itertools
import json
import pkgutil
import re
from pathlib import Path

import datasets
import huggingface_hub
import timm.data
import torch
from datasets.distributed import split_dataset_by_node
from timm.data import ImageNetInfo

from common import data, loaders
from common.digits import SHIFTS
from common.settings import InputError

HUB = {
    "imagenet": "ILSVRC/imagenet-1k",
    "v2": "clip-benchmark/wds_imagenetv2",
    "r": "clip-benchmark/wds_imagenet-r",
    "sketch": "clip-benchmark/wds_imagenet_sketch",
}
CLASSES = {"imagenet": 1000, "v2": 1000, "r": 200, "sketch": 1000, "digits": 10}
MAX_UNREADABLE = 1e-3  # of a set's images

_INFO = ImageNetInfo("imagenet-1k")
_WORDNET = {name: index for index, name in enumerate(_INFO.label_names())}
_WORDS = {}  # "tench, Tinca tinca", as the Hub names classes; "crane" is two of them, there "crane" and "crane2"
for _index in range(1000):
    _name = _INFO.index_to_description(_index)
    _WORDS[f"{_name}2" if _name in _WORDS else _name] = _index


def _timm_info(file):
    return pkgutil.get_data(timm.data.__name__, f"_info/{file}").decode()


R_INDICES = [int(line) for line in _timm_info("imagenet_r_indices.txt").split()]  # ImageNet-R's 200 of the 1000 classes


@functools.cache
def real_labels() -> list[list[int]]:
    """ImageNet-Real's right answers, class indices, by number of the validation image, from 1 (index 0 is empty)."""
    return [[], *json.loads(_timm_info("imagenet_real_labels.json"))]


def class_index(name: str, benchmark: str) -> int:
    """The model output (0..999) that a class of ``benchmark`` means, by its name and never by its position.

    Args:
        name: a WordNet id ("n01440764"), a number ("10"; for "r" one of its own 200), or the Hub's words for it.

    Raises:
        InputError: it is none of these.
    """
    if name in _WORDNET:
        return _WORDNET[name]
    if re.fullmatch(r"\d+", name) and int(name) < CLASSES[benchmark]:
        return R_INDICES[int(name)] if benchmark == "r" else int(name)
    if name in _WORDS:
        return _WORDS[name]
    numbers = f"a number below {CLASSES[benchmark]}"
    raise InputError(f"{benchmark}: the class {name!r} is no WordNet id of ImageNet's, no class name and not {numbers}")


def validation_number(path: str | None) -> int:
    """The number of an ImageNet validation image by its file name, as on the Hub or in the archive.

    Raises:
        InputError: the name is another.
    """
    found = re.fullmatch(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.JPEG", Path(path or "").name)
    if not found or not 1 <= int(found[1]) <= 50_000:
        raise InputError(f"real: {path!r} is not named like ILSVRC2012_val_00000001.JPEG, so its labels are not known")
    return int(found[1])


class Pictures(torch.utils.data.IterableDataset):
    """A set's images, each once over all processes and loader workers, in batches ready to collate.

    A batch holds ``image`` (uint8), ``label`` (class index of the model, -1 where unknown), ``key`` (names the image
    alike for every model) and ``path``; ``unreadable`` lists the names of images that could not be read.
    """

    def __init__(self, benchmark: str, ds, transform, batch_size: int, process: int = 0, processes: int = 1):
        self.benchmark, self.ds, self.transform, self.batch_size = benchmark, ds, transform, batch_size
        self.process, self.processes = process, processes
        names = getattr(ds.features["label"], "names", None)
        self.to_index = names and [self._index(name) for name in names]

    def _index(self, name):
        return int(name) if self.benchmark == "digits" else class_index(str(name), self.benchmark)

    def _rows(self):
        info = torch.utils.data.get_worker_info()
        workers, worker = (info.num_workers, info.id) if info else (1, 0)
        share, shares = self.process * workers + worker, self.processes * workers
        if isinstance(self.ds, datasets.Dataset):
            for start in range(share * self.batch_size, len(self.ds), shares * self.batch_size):
                keys = range(start, min(start + self.batch_size, len(self.ds)))
                yield self.ds[keys.start : keys.stop], [str(key) for key in keys]
            return
        whole = self.ds.num_shards >= shares
        ds = self.ds.shard(shares, share) if whole else split_dataset_by_node(self.ds, share, shares)
        counter = itertools.count()
        for rows in loaders.reading(ds.iter(self.batch_size)):
            yield rows, [f"{share} of {shares}: {next(counter)}" for _ in rows["label"]]

    def __iter__(self):
        for rows, keys in self._rows():
            batch = {"image": [], "label": [], "key": [], "path": [], "unreadable": []}
            for image, label, key in zip(rows["image"], rows["label"], keys):
                try:
                    picture = self.transform(loaders.decode(image))
                except InputError:
                    batch["unreadable"].append((image and image["path"]) or f"image {key}")
                    continue
                batch["image"].append(picture)
                batch["label"].append(self._label(label, image["path"]))
                batch["key"].append(key)
                batch["path"].append(image["path"])
            yield batch

    def _label(self, label, path):
        if label is None:  # a flat folder; the Hub's archive has the class in the file name
            found = re.search(r"_(n\d{8})\.", Path(path or "").name)
            return class_index(found[1], self.benchmark) if found else -1
        if self.to_index is None:
            return self._index(label)
        if not 0 <= label < len(self.to_index):  # -1 stands for none, as in test splits
            raise InputError(f"{self.benchmark}: the label of {path or 'an image'} is {label}: choose a labelled split")
        return self.to_index[label]


def open_set(benchmark: str, where: str | None, allow_partial: bool):
    """A set's images, undecoded, as columns ``image`` and ``label``, streamed unless they are local files.

    Args:
        benchmark: "imagenet" (which serves "real" too), "v2", "r", "sketch", or "digits:SPLIT".
        where: a folder in the archive's layout, a folder or file of WebDataset tars, or a dataset of the Hub; None is
            the Hub's usual one.
        allow_partial: only warn of missing classes.

    Raises:
        InputError: it cannot be found, read or understood, or classes are missing.
    """
    if benchmark.startswith("digits:"):
        ds = data.load("digits")[benchmark.removeprefix("digits:")]
        return ds.cast_column("image", datasets.Image(decode=False))
    where = where or HUB[benchmark]
    path = Path(where).expanduser()
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("**/*.tar"))
    if tars and path.exists():
        ds = data.hub("webdataset", where, data_files={"test": [str(tar) for tar in tars]}, streaming=True)["test"]
    elif path.is_dir() and not any(path.rglob("*.parquet")):
        ds = _open_folder(path)
    elif where.endswith(".tar"):
        raise InputError(f"there is no file {where}")
    else:
        splits = data.hub(where, where, streaming=True)
        ds = next((splits[split] for split in ("validation", "test") if split in splits), None)
        if ds is None:
            raise InputError(f"{where!r} has no validation or test split, only {', '.join(splits)}")
    ds = _standard_columns(ds, where)
    names = getattr(ds.features["label"], "names", None)
    if names and len({class_index(name, benchmark) for name in names}) < CLASSES[benchmark]:
        message = f"{benchmark}: {where} has {len(names)} of {CLASSES[benchmark]} classes"
        if not allow_partial:
            raise InputError(f"{message}: complete it, or evaluate what is there with --allow-partial")
        print(f"warning: {message}")
    return ds


def _open_folder(path):
    files = sorted(str(file) for file in path.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise InputError(f"{path} holds no images and no tar files")
    classes = sorted({Path(file).parent.name for file in files})
    flat = all(re.match("ILSVRC2012_val_", Path(file).name) and Path(file).parent == path for file in files)
    columns = {"image": [{"bytes": None, "path": file} for file in files]}
    if flat:
        feature = datasets.Value("int64")
        columns["label"] = [None] * len(files)
    else:
        feature = datasets.ClassLabel(names=classes)
        columns["label"] = [Path(file).parent.name for file in files]
    features = datasets.Features({"image": datasets.Image(decode=False), "label": feature})
    return datasets.Dataset.from_dict(columns, features=features)


def _standard_columns(ds, where):
    features = ds.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name in ("label", "cls") if name in features]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()) or "unknown"
        raise InputError(
            f"{where!r} must have one image column, and one called label or cls; its columns are {columns}"
        )
    ds = ds.select_columns([images[0], labels[0]])
    for name, usual in ((images[0], "image"), (labels[0], "label")):
        ds = ds if name == usual else ds.rename_column(name, usual)
    return ds.cast_column("image", datasets.Image(decode=False))


def passes(benchmarks: list[str]) -> dict[str, list[str]]:
    """What to read once, and the benchmarks that it serves: a pass over ImageNet's validation images serves two."""
    plan = {}
    for benchmark in benchmarks:
        if benchmark == "digits":
            plan |= {f"digits:{split}": [split] for split in ("test", *SHIFTS)}
        else:
            plan.setdefault("imagenet" if benchmark == "real" else benchmark, []).append(benchmark)
    return plan


def revision(benchmark: str, ds, where: str | None) -> str:
    """Names the images that a pass reads, so that results of others are not taken for theirs.

    That is a commit for a dataset of the Hub, and a hash of the files' names, sizes and times for local ones.
    """
    if benchmark.startswith("digits:"):
        return ds._fingerprint
    path = Path(where or HUB[benchmark]).expanduser()
    if not path.exists():
        return huggingface_hub.HfApi().dataset_info(where or HUB[benchmark]).sha
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
