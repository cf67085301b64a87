"""What the labels of robustness sets mean: classes of ImageNet, and outputs of a model, by name."""

import functools
import json
import pkgutil
import re

import timm.data
from timm.data import ImageNetInfo

from common.errors import InputError
from common.folders import class_name, file_name, some

# How many classes each set has.
CLASSES = {
    "imagenet": 1000, "v2": 1000, "r": 200, "sketch": 1000, "a": 200, "c": 1000, "digits": 10,
}  # fmt: skip

_INFO = ImageNetInfo("imagenet-1k")
WORDNET = _INFO.label_names()  # the ids of ImageNet's 1000 classes, in their order
_IDS = frozenset(WORDNET)


def _plain(name):
    """Names that differ in case, zeros before a number, or what parts their words, are one."""
    if _is_number(name):
        return str(int(name))
    return " ".join(re.split(r"[\s_-]+", class_name(name).strip().casefold()))


def _is_number(name):
    return re.fullmatch("[0-9]+", name) is not None


# "tench, Tinca tinca", as the Hub names classes; "crane" is two of them, there "crane" and "crane2"
_WORDS = {}
_SYNONYMS = {}  # the classes that "tench" may mean
for _index in range(1000):
    _name = _INFO.index_to_description(_index)
    _WORDS[f"{_name}2" if _name in _WORDS else _name] = _index
    for _word in {_plain(word) for word in (WORDNET[_index], _name, *_name.split(","))}:
        _SYNONYMS.setdefault(_word, []).append(_index)


def _timm_info(file):
    return pkgutil.get_data(timm.data.__name__, f"_info/{file}").decode()


def _timm_indices(file):
    return [int(line) for line in _timm_info(file).split()]


# The 200 classes of ImageNet-R and of ImageNet-A, of ImageNet's 1000, in their own labels' order.
SUBSETS = {name: _timm_indices(f"imagenet_{name}_indices.txt") for name in ("r", "a")}


@functools.cache
def real_labels() -> list[list[int]]:
    """ImageNet-Real's right answers, class indices, by number of the validation image.

    Numbers begin at 1; index 0 is empty.
    """
    return [[], *json.loads(_timm_info("imagenet_real_labels.json"))]


@functools.lru_cache(10_000)
def imagenet_index(name: str) -> int | None:
    """The class of ImageNet, 0..999, that a name means; None if it means none, or several.

    Args:
        name: a WordNet id ("n01440764", "n01440764-tench"), a number ("10"), or words: the Hub's
            ("tench, Tinca tinca"), or a part of them, in any case and with any of space, _ and -
            between words.
    """
    if _is_number(name):
        return int(name) if int(name) < 1000 else None
    if name in _WORDS:
        return _WORDS[name]
    wordnet = re.match(r"n[0-9]{8}(?![0-9])", name)
    meant = _SYNONYMS.get(_plain(wordnet[0] if wordnet else name), ())
    return meant[0] if len(meant) == 1 else None


def class_index(name: str, benchmark: str) -> int:
    """The class of ImageNet (0..999) that a class of one of its sets means, never by position.

    Args:
        name: as for ``imagenet_index``; a number is for "r" and "a" one of their own 200.

    Raises:
        InputError: it means no class, or none of the 200 of "r" or "a".
    """
    subset = SUBSETS.get(benchmark)
    if subset and _is_number(name):
        index = subset[int(name)] if int(name) < 200 else None
    else:
        index = imagenet_index(name)
    if index is None:
        raise InputError(
            f"{benchmark}: the class {name!r} is no WordNet id of ImageNet's, not the name of one "
            f"class alone and not a number below {CLASSES[benchmark]}"
        )
    if subset and index not in subset:
        raise InputError(
            f"{benchmark}: the class {name!r} is none of ImageNet-{benchmark.upper()}'s 200: "
            f"remove it"
        )
    return index


def outputs(classes: list[str], label_names: list[str]) -> list[int]:
    """The model's output that each of a set's classes means, by name and never by position.

    Where all label names are of ImageNet, WordNet ids, words and, for all 1000, numbers mean the
    same. Elsewhere names have to agree, but for case, zeros before a number and what parts their
    words.

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

    output_by_meaning = _by_meaning(label_names, meaning, "label names")
    if wrong := [name for name in classes if meaning(name) not in output_by_meaning]:
        raise InputError(
            f"{len(wrong)} of {len(classes)} classes ({quoted(wrong)}) mean none of the "
            f"{len(label_names)} outputs ({quoted(label_names)})"
        )
    return [output_by_meaning[meant] for meant in _by_meaning(classes, meaning, "classes")]


def _by_meaning(names, meaning, what):
    numbers = {}
    for i, name in enumerate(names):
        first = numbers.setdefault(meaning(name), i)
        if first != i and meaning(name) is not None:
            raise InputError(f"the {what} {names[first]!r} and {name!r} mean the same")
    return numbers


def quoted(names: list[str]) -> str:
    """Names for a message: the first five."""
    return some(list(map(repr, names)), most=5)


def validation_number(path: str | None) -> int:
    """The number of an ImageNet validation image by its file name, as on the Hub or in the archive.

    Raises:
        InputError: the name is another.
    """
    match = re.fullmatch(r"ILSVRC2012_val_(\d{8})(_n\d{8})?\.JPEG", file_name(path or ""))
    if not match or not 1 <= int(match[1]) <= 50_000:
        raise InputError(
            f"real: {path!r} is not named like ILSVRC2012_val_00000001.JPEG, so its labels are "
            f"not known"
        )
    return int(match[1])


def wordnet_id(path: str | None) -> str | None:
    """The WordNet id in a file's name.

    As of n01440764_tench.JPEG and ILSVRC2012_val_00000293_n01440764.JPEG.
    """
    match = re.search(r"(?<![A-Za-z0-9])n[0-9]{8}(?![0-9])", file_name(path or ""))
    return match and match[0]


def label_names(model) -> list[str]:
    """The names of a model's outputs, from its ``config.json``.

    They are ImageNet's, where 1000 have none, as of timm's own.
    """
    usual = WORDNET if model.num_classes == 1000 else []
    names = model.pretrained_cfg.get("label_names") or usual
    if isinstance(names, dict):  # by output, as timm allows
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    return [str(name) for name in names]


def readable(name: str) -> str:
    """A label name, a WordNet id of ImageNet's with its words: "n01440764 tench, Tinca tinca"."""
    return f"{name} {_INFO.index_to_description(WORDNET.index(name))}" if name in _IDS else name


def right_answers(benchmark, batch):
    """The right answers to a benchmark's images, by each of its protocols.

    Yields:
        The protocol's name, logits' columns (None: all) and each image's right answers among them.

    Raises:
        InputError: an image has no label.
    """
    if benchmark == "real":
        real = real_labels()
        yield "real", None, [real[validation_number(path)] for path in batch["path"]]
        return
    if -1 in batch["label"]:
        raise InputError(
            f"{benchmark}: an image has no label: its file name must end like _n01440764.JPEG, or "
            f"its folder be a class"
        )
    every = [[label] for label in batch["label"]]
    subset = SUBSETS.get(benchmark.removesuffix("-clean"))
    if subset is None:
        yield benchmark, None, every
        return
    places = {index: place for place, index in enumerate(subset)}
    among = [[places[label]] if label in places else [] for label in batch["label"]]
    if benchmark.endswith("-clean"):  # ImageNet's own images of these classes
        yield benchmark, subset, among
    else:
        yield f"{benchmark}-200", subset, among
        yield f"{benchmark}-1000", None, every
