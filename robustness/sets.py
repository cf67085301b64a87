"""The robustness sets: where each is found, and which output of a model its labels mean."""

import functools
import hashlib
import itertools
import json
import os
import pkgutil
import re
import zipfile
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
from robustness import corruptions

HUB = {
    "imagenet": "ILSVRC/imagenet-1k",
    "v2": "clip-benchmark/wds_imagenetv2",
    "r": "clip-benchmark/wds_imagenet-r",
    "sketch": "clip-benchmark/wds_imagenet_sketch",
    "a": "clip-benchmark/wds_imagenet-a",
    "c": None,  # a folder CORRUPTION/SEVERITY/CLASS/FILE
}
CLASSES = {"imagenet": 1000, "v2": 1000, "r": 200, "sketch": 1000, "a": 200, "c": 1000, "digits": 10}
MAX_UNREADABLE = 1e-3  # of a set's images

_INFO = ImageNetInfo("imagenet-1k")
WORDNET = _INFO.label_names()  # the ids of ImageNet's 1000 classes, in their order


def _plain(name):
    """Names that differ in case, in zeros before a number, or in what parts their words are one."""
    return str(int(name)) if _is_number(name) else " ".join(re.split(r"[\s_-]+", name.strip().casefold()))


def _is_number(name):
    return re.fullmatch("[0-9]+", name) is not None


_WORDS = {}  # "tench, Tinca tinca", as the Hub names classes; "crane" is two of them, there "crane" and "crane2"
_SYNONYMS = {}  # the classes that "tench" may mean
for _index in range(1000):
    _name = _INFO.index_to_description(_index)
    _WORDS[f"{_name}2" if _name in _WORDS else _name] = _index
    for _word in {_plain(word) for word in (WORDNET[_index], _name, *_name.split(","))}:
        _SYNONYMS.setdefault(_word, []).append(_index)


def _timm_info(file):
    return pkgutil.get_data(timm.data.__name__, f"_info/{file}").decode()


# The 200 classes of ImageNet-R and of ImageNet-A, of ImageNet's 1000, in the order of their own labels.
SUBSETS = {name: [int(line) for line in _timm_info(f"imagenet_{name}_indices.txt").split()] for name in ("r", "a")}


@functools.cache
def real_labels() -> list[list[int]]:
    """ImageNet-Real's right answers, class indices, by number of the validation image, from 1 (index 0 is empty)."""
    return [[], *json.loads(_timm_info("imagenet_real_labels.json"))]


def imagenet_index(name: str) -> int | None:
    """The class of ImageNet, 0..999, that a name means; None where it means none, or more than one.

    Args:
        name: a WordNet id ("n01440764", "n01440764-tench"), a number ("10"), or words: the Hub's ("tench, Tinca
            tinca"), or a part of them, in any case and with any of space, _ and - between words.
    """
    if _is_number(name):
        return int(name) if int(name) < 1000 else None
    if name in _WORDS:
        return _WORDS[name]
    found = re.match(r"n[0-9]{8}(?![0-9])", name)
    meant = _SYNONYMS.get(_plain(found[0] if found else name), ())
    return meant[0] if len(meant) == 1 else None


def class_index(name: str, benchmark: str) -> int:
    """The class of ImageNet (0..999) that a class of one of its sets means, by name, never by position.

    Args:
        name: as for ``imagenet_index``; a number is for "r" and "a" one of their own 200.

    Raises:
        InputError: it means no class, or none of the 200 of "r" or "a".
    """
    own = SUBSETS.get(benchmark)
    if own and _is_number(name):
        index = own[int(name)] if int(name) < 200 else None
    else:
        index = imagenet_index(name)
    if index is None:
        raise InputError(
            f"{benchmark}: the class {name!r} is no WordNet id of ImageNet's, not the name of one class alone and not "
            f"a number below {CLASSES[benchmark]}"
        )
    if own and index not in own:
        raise InputError(f"{benchmark}: the class {name!r} is none of ImageNet-{benchmark.upper()}'s 200: remove it")
    return index


def outputs(classes: list[str], label_names: list[str]) -> list[int]:
    """The model's output that each of a set's classes means, by name and never by position.

    Where all label names are of ImageNet, WordNet ids, words and, for all 1000, numbers mean the same. Elsewhere names
    have to agree, but for case, zeros before a number and what parts their words.

    Raises:
        InputError: two label names or two classes mean the same, or a class means no output.
    """
    meaning = _plain
    if None not in map(imagenet_index, label_names):
        if len(label_names) == 1000:
            meaning = imagenet_index
        elif not any(map(_is_number, label_names)):  # they would be ImageNet's numbers, or others

            def meaning(name):
                return None if _is_number(name) else imagenet_index(name)

    own = _by_meaning(label_names, meaning, "label names")
    wrong = [name for name in classes if meaning(name) not in own]
    if wrong:
        raise InputError(
            f"{len(wrong)} of {len(classes)} classes ({some(wrong)}) mean none of the {len(label_names)} outputs "
            f"({some(label_names)})"
        )
    return [own[meaning] for meaning in _by_meaning(classes, meaning, "classes")]


def _by_meaning(names, meaning, what):
    found = {}
    for i, name in enumerate(names):
        other = found.setdefault(meaning(name), i)
        if other != i and meaning(name) is not None:
            raise InputError(f"the {what} {names[other]!r} and {name!r} mean the same")
    return found


def some(names: list[str]) -> str:
    """Names for a message: the first five."""
    return ", ".join(map(repr, names[:5])) + (", ..." if len(names) > 5 else "")


def classes_of(benchmark: str, ds, label_names: list[str]) -> list[str]:
    """The names of the classes that the labels of ``Pictures`` number.

    Args:
        benchmark: as for ``open_set``.
        ds: the set; only one that is neither ImageNet's nor the digits' is looked at.
        label_names: a model's; as many as they are numbers may be labels of a set that does not name its classes.
    """
    if benchmark in CLASSES:
        return WORDNET if benchmark != "digits" else [str(i) for i in range(10)]
    return getattr(ds.features["label"], "names", None) or [str(i) for i in range(len(label_names))]


def mapping(benchmark: str, ds, label_names: list[str], model: str) -> str:
    """A line that says how the classes of a set that fits were taken, for the reader to check."""
    classes = classes_of(benchmark, ds, label_names)
    pairs = [f"{name} is output {o}, {label_names[o]}" for name, o in zip(classes, outputs(classes, label_names))]
    others = len(label_names) - len(classes)
    missing = f"; the {others} other outputs have no images here, and are wrong wherever predicted" if others else ""
    return f"{benchmark} for {model}: " + "; ".join(pairs[:3]) + ("; ..." if len(pairs) > 3 else "") + missing


def order_of(benchmark: str, ds, label_names: list[str]) -> list[int] | None:
    """The model's outputs as a pass counts them: those that the set's classes mean, then all others.

    None where that is the order they are in.

    Raises:
        InputError: as ``outputs`` does.
    """
    if benchmark == "digits" and len(label_names) != 10:  # ImageNet's 1000 have such numbers too
        raise InputError(f"the 10 digits are not the {len(label_names)} outputs ({some(label_names)})")
    order = outputs(classes_of(benchmark, ds, label_names), label_names)
    order += sorted(set(range(len(label_names))) - set(order))
    return None if order == list(range(len(order))) else order


def validation_number(path: str | None) -> int:
    """The number of an ImageNet validation image by its file name, as on the Hub or in the archive.

    Raises:
        InputError: the name is another.
    """
    found = re.fullmatch(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.JPEG", _file_name(path))
    if not found or not 1 <= int(found[1]) <= 50_000:
        raise InputError(f"real: {path!r} is not named like ILSVRC2012_val_00000001.JPEG, so its labels are not known")
    return int(found[1])


def _file_name(path):
    """Of an image, which may lie in an archive: zip://CLASS/FILE::ARCHIVE."""
    return Path(path.split("::")[0] if "://" in (path or "") else path or "").name


def _wordnet_id(path):
    """The WordNet id in a file's name, as of n01440764_tench.JPEG and ILSVRC2012_val_00000293_n01440764.JPEG."""
    found = re.search(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])", _file_name(path))
    return found and found[0]


class Pictures(torch.utils.data.IterableDataset):
    """A set's images, each once over all processes and loader workers, in batches ready to collate.

    A batch holds ``image`` (uint8), ``label`` (among ``classes_of`` the set, -1 where unknown), ``key`` (names the
    image alike for every model) and ``path``; ``unreadable`` lists the names of images that could not be read. With
    ``corrupt``, the same images follow in every corruption and severity, which ``corruption`` names; it is None before.
    """

    def __init__(self, benchmark, ds, transform, batch_size: int, process: int = 0, processes: int = 1, corrupt=False):
        self.benchmark, self.ds, self.transform, self.batch_size = benchmark, ds, transform, batch_size
        self.process, self.processes, self.corrupt = process, processes, corrupt
        names = getattr(ds.features["label"], "names", None)
        self.to_index = names and list(range(len(names)))
        if names and benchmark in HUB:
            self.to_index = [class_index(name, benchmark) for name in names]

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
            batch = {"image": [], "label": [], "key": [], "path": [], "unreadable": [], "corruption": None}
            seeds = []
            for image, label, key in zip(rows["image"], rows["label"], keys):
                try:
                    decoded = loaders.decode(image)
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
            yield batch
            if not self.corrupt:
                continue
            for name, severity in itertools.product(corruptions.CORRUPTIONS, corruptions.SEVERITIES):
                images = [corruptions.corrupt(x, name, severity, seed) for x, seed in zip(batch["image"], seeds)]
                yield batch | {"image": images, "unreadable": [], "corruption": f"{name}-{severity}"}

    def label(self, label, path: str | None) -> int:
        """The place among ``classes_of`` the set of an image with the set's ``label``; -1 where it has none.

        Raises:
            InputError: the label is none of the set's.
        """
        if label is None:  # a flat folder; the Hub's archive has the class in the file name
            wordnet = _wordnet_id(path)
            return class_index(wordnet, self.benchmark) if wordnet and self.benchmark in HUB else -1
        if self.to_index is None:
            return class_index(str(label), self.benchmark) if self.benchmark in HUB else label
        if not 0 <= label < len(self.to_index):  # -1 stands for none, as in test splits
            raise InputError(f"{self.benchmark}: the label of {path or 'an image'} is {label}: choose a labelled split")
        return self.to_index[label]


def open_set(benchmark: str, where: str | None, allow_partial: bool):
    """A set's images, undecoded, as columns ``image`` and ``label``, streamed unless they are local files.

    Args:
        benchmark: "imagenet" (which serves "real" too), "v2", "r", "sketch", "a", "c:CORRUPTION:SEVERITY",
            "digits:SPLIT", or any name.
        where: a folder in the archive's layout, or a zip archive of one; a folder or file of WebDataset tars; or a
            dataset of the Hub, None for its usual one, or a folder with a copy of it.
        allow_partial: only warn of missing classes.

    Raises:
        InputError: it cannot be found, read or understood, or classes are missing.
    """
    if benchmark.startswith("digits:"):
        ds = data.load("digits")[benchmark.removeprefix("digits:")]
        return ds.cast_column("image", datasets.Image(decode=False))
    benchmark = benchmark.partition(":")[0]
    where = where or HUB[benchmark]
    path = Path(where).expanduser()
    tars = [path] if path.suffix == ".tar" else sorted(path.glob("**/*.tar"))
    if tars and path.exists():
        ds = data.hub("webdataset", where, data_files={"test": [str(tar) for tar in tars]}, streaming=True)["test"]
    elif (path.is_dir() and not any(path.rglob("*.parquet"))) or (path.is_file() and path.suffix == ".zip"):
        ds = _open_folder(path, benchmark, allow_partial)
    elif path.suffix in (".tar", ".zip"):
        raise InputError(f"there is no file {where}")
    else:
        splits = data.hub(where, where, streaming=True)
        ds = next((splits[split] for split in ("validation", "test") if split in splits), None)
        if ds is None:
            raise InputError(f"{where!r} has no validation or test split, only {', '.join(splits)}")
        if {"validation", "test"} <= set(splits):
            print(f"{benchmark}: the split validation of {where}, not test")
    ds = _standard_columns(ds, where)
    names = getattr(ds.features["label"], "names", None)
    if names and benchmark in HUB and len({class_index(name, benchmark) for name in names}) < CLASSES[benchmark]:
        _lacks(f"{benchmark}: {where} has {len(names)} of {CLASSES[benchmark]} classes", allow_partial)
    return ds


def _lacks(message, allow_partial):
    if not allow_partial:
        raise InputError(f"{message}: complete it, or evaluate what is there with --allow-partial")
    print(f"warning: {message}")


def _walk(path):
    """The files below a folder, through links too; and its innermost folders, with links to nothing.

    Raises:
        InputError: a folder cannot be read, or a link leads back to one that holds it.
    """
    files, leaves = [], []

    def fail(error):
        raise InputError(f"cannot read {error.filename}: {error.strerror}") from error

    for place, folders, names in os.walk(path, followlinks=True, onerror=fail):
        for folder in (Path(place, name) for name in folders):
            if folder.is_symlink() and Path(place).resolve().is_relative_to(folder.resolve()):
                raise InputError(f"the link {folder} leads back to a folder that holds it: remove it")
        inside = [Path(place, name) for name in names]
        files += inside
        leaves += [file for file in inside if not file.exists()] + ([] if folders else [Path(place)])
    return sorted(files), sorted(leaves)


def _members(archive):
    """The files of a zip archive, as paths that ``loaders.decode`` opens."""
    try:
        with zipfile.ZipFile(archive) as opened:
            return [f"zip://{info.filename}::{archive}" for info in opened.infolist() if not info.is_dir()]
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read the archive {archive}: {error}") from error


def _open_folder(path, benchmark, allow_partial):
    found, leaves = _walk(path) if path.is_dir() else ([path], [])
    archives = [file for file in found if file.suffix == ".zip"]
    found = [str(file) for file in found] + [member for archive in archives for member in _members(archive)]
    files = [file for file in found if _file_name(file).lower().endswith((".jpg", ".jpeg", ".png", ".webp"))]
    if not files:
        raise InputError(f"{path} holds no images and no tar files or zip archives")
    holding = {*files, *(str(Path(file).parent) for file in [*files, *archives])}
    empty = [str(leaf) for leaf in leaves if str(leaf) not in holding and not leaf.name.startswith(".")]
    if empty:
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        _lacks(f"{benchmark}: {len(empty)} class folders hold no images: {shown}", allow_partial)
    columns = {"image": [{"bytes": None, "path": file} for file in files]}
    classes = _classes(path, benchmark, files)
    if None in classes:
        feature = datasets.Value("int64")
        columns["label"] = [None] * len(files)
    else:
        feature = datasets.ClassLabel(names=sorted(set(classes)))
        columns["label"] = classes
    features = datasets.Features({"image": datasets.Image(decode=False), "label": feature})
    return datasets.Dataset.from_dict(columns, features=features)


def _classes(path, benchmark, files):
    """The class of each file: its folder's name, or the WordNet id in its own; None throughout if it has to do without.

    Raises:
        InputError: images lie outside of class folders, or those of a set of no known layout in several folders.
    """
    inner = [file.split("::")[0].removeprefix("zip:/") if file.startswith("zip://") else file for file in files]
    parents = [Path(file).parent for file in inner]
    flat = [parent in (path, Path("/")) for parent in parents]
    if not any(flat):
        around = sorted({parent.parent for parent in parents})
        if benchmark not in HUB and len(around) > 1:
            raise InputError(f"{benchmark}: class folders lie in {around[0]} and in {around[1]}: name one of them")
        return [parent.name for parent in parents]
    if benchmark in HUB and all(flat) and all(_file_name(file).startswith("ILSVRC2012_val_") for file in files):
        return [None] * len(files)  # ImageNet-Real needs no more
    wrong = [file for file in files if not _wordnet_id(file)] if all(flat) else [files[flat.index(True)]]
    if wrong:
        raise InputError(
            f"{benchmark}: {wrong[0]} lies in no class folder: put it into {path}/CLASS (if all images lie in one "
            f"folder, WordNet ids in their names will do: n01440764_tench.JPEG)"
        )
    return [_wordnet_id(file) for file in files]


def _standard_columns(ds, where):
    features = ds.features or {}
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    labels = [name for name in ("label", "cls", "fine_label") if name in features]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{name} ({type(feature).__name__})" for name, feature in features.items()) or "unknown"
        raise InputError(
            f"{where!r} must have one image column, and one called label, cls or fine_label; its columns are {columns} "
            f"(class folders inside a tar are not understood: unpack it)"
        )
    ds = ds.select_columns([images[0], labels[0]])
    for name, usual in ((images[0], "image"), (labels[0], "label")):
        ds = ds if name == usual else ds.rename_column(name, usual)
    return ds.cast_column("image", datasets.Image(decode=False))


def passes(benchmarks: list[str], places: dict[str, str]) -> dict[str, list[str]]:
    """What to read once, and the benchmarks that it serves: a pass over ImageNet's validation images serves several.

    ``places`` are where sets lie; those of ImageNet-C are what its folder holds.

    Raises:
        InputError: the folder of ImageNet-C is not in its archive's layout.
    """
    plan = {}
    for benchmark in benchmarks:
        if benchmark == "digits":
            plan |= {f"digits:{split}": [split] for split in ("test", *SHIFTS)}
        elif benchmark == "c":
            folders = sorted(Path(places["c"]).expanduser().glob("*/[1-5]/"))
            if not folders:
                raise InputError(f"c: {places['c']} holds no folders CORRUPTION/SEVERITY/CLASS, as gaussian_noise/1")
            for corruption, severity in (folder.parts[-2:] for folder in folders):
                plan[f"c:{corruption}:{severity}"] = [f"c.{corruption}-{severity}"]
        else:
            plan.setdefault(pass_of(benchmark), []).append(benchmark)
    return plan


def pass_of(benchmark: str) -> str:
    """The images that a benchmark is read from, as ``HUB`` calls them, or itself."""
    return "imagenet" if benchmark in ("real", "r-clean", "a-clean") else benchmark


def place_of(name: str, places: dict[str, str]) -> str | None:
    """Where a pass' images lie, if that is in ``places``: those of ImageNet-C in folders of their own."""
    benchmark, _, part = name.partition(":")
    return str(Path(places["c"], *part.split(":"))) if benchmark == "c" else places.get(benchmark)


def taken_names(benchmarks: list[str]) -> set[str]:
    """What a set of the user's own cannot be called beside ``benchmarks``: it would be taken for another."""
    rows = {"real", "r-clean", "a-clean", "digits", *(f"{name}-{n}" for name in SUBSETS for n in (200, 1000))}
    return rows | ({"test", *SHIFTS} if "digits" in benchmarks else set())


def revision(benchmark: str, ds, where: str | None) -> str:
    """Names the images that a pass reads, so that results of others are not taken for theirs.

    That is a commit for a dataset of the Hub, and a hash of the files' names, sizes and times for local ones.

    Raises:
        InputError: the Hub cannot be asked.
    """
    if benchmark.startswith("digits:"):
        return ds._fingerprint
    path = Path(where or HUB[benchmark]).expanduser()
    if not path.exists():
        try:
            return huggingface_hub.HfApi().dataset_info(where or HUB[benchmark]).sha
        except Exception as error:  # httpx's errors and the Hub's own have no common base
            raise InputError(f"cannot ask the Hub for the commit of {where or HUB[benchmark]}: {error}") from error
    files = _walk(path)[0] if path.is_dir() else [path]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
    return hashlib.sha256(repr(stats).encode()).hexdigest()
