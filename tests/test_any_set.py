"""Any set for any model: classes meet outputs by name, whatever the order and the naming; what does not fit is said."""

import itertools
import json
import random

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from oracle import COLOUR, jpeg, write_tars
from timm.data import ImageNetInfo

import eval_robustness
from common import checkpoints, robustness
from common.settings import InputError

INFO = ImageNetInfo("imagenet-1k")
WORDNET = INFO.label_names()
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Reader(torch.nn.Module):
    """Sees which class an image shows, of as many as it has outputs; the output for it is ``order[class]``."""

    def __init__(self, label_names, order):
        super().__init__()
        self.num_classes, self.order = len(order), torch.tensor(order)
        self.pretrained_cfg = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear", **COLOUR}
        self.pretrained_cfg["label_names"] = label_names
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
        decimals = (((x * std + mean) * 255).mean((-2, -1)) / 25).floor().clamp(0, 9).long()
        shown = (decimals * torch.tensor([1, 10, 100])).sum(-1) % self.num_classes
        return 10 * torch.nn.functional.one_hot(self.order[shown], self.num_classes).float() * self.weight


def shuffled(names, seed=0):
    """The names in another order, and the place of each."""
    order = random.Random(seed).sample(range(len(names)), len(names))  # order[i]: the output of class i
    places = [None] * len(names)
    for i, place in enumerate(order):
        places[place] = names[i]
    return places, order


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Evaluate one reader by the flags given, and return its measures."""

    def run(label_names, order, *flags):
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: Reader(label_names, order))
        common = ["--model", "reader", "--workers", "0", "--batch-size", "8", "--output", str(tmp_path / "out")]
        return eval_robustness.main([*common, *map(str, flags)])["reader"]

    return run


def write(root, names, classes=None):
    """A folder CLASS/FILE, the class of index i called ``names[i]``."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "a.jpeg").write_bytes(jpeg(i if classes is None else classes[i]))
    return root


# ----------------------------------------------------------------------------------------------------------------------
# Names

NAMINGS = {
    "words": CIFAR,
    "capitals": [name.upper() for name in CIFAR],
    "spaces": [f"my {name}" for name in CIFAR],
    "underscores": [f"My_{name}" for name in CIFAR],
    "hyphens": [f"my-{name.title()}" for name in CIFAR],
    "numbers": [str(i) for i in range(10)],
    "numbers with zeros": [f"{i:03d}" for i in range(10)],
}


@pytest.mark.parametrize(
    "folders, outputs",
    [
        *itertools.product(("words", "capitals"), repeat=2),
        *itertools.product(("spaces", "underscores", "hyphens"), repeat=2),
        *itertools.product(("numbers", "numbers with zeros"), repeat=2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_folder_meets_a_models_own_label_names_in_any_order_and_spelling(tmp_path, evaluate, folders, outputs, seed):
    label_names, order = shuffled(NAMINGS[outputs], seed)
    folder = write(tmp_path / "images", NAMINGS[folders])
    found = evaluate(label_names, order, "--data", f"mine={folder}")
    assert (found["mine"]["top1"], found["mine"]["examples"]) == (1.0, 10)
    assert np.mean([i == place for i, place in enumerate(order)]) < 0.5  # by position it would be wrong


@pytest.mark.parametrize(
    "names",
    [
        {0: "n01440764", 2: "n01484850", 134: "n02012849", 517: "n03126707", 999: "n15075141"},
        {0: "0", 2: "2", 134: "134", 517: "0517", 999: "999"},
        {0: "tench, Tinca tinca", 2: "great_white_shark", 134: "crane", 517: "crane2", 999: "Toilet Tissue"},
        {0: "n01440764-tench", 2: "white shark", 134: "n02012849_crane", 517: "517", 999: "bathroom-tissue"},
    ],
    ids=lambda names: names[0],
)
@pytest.mark.parametrize("own", [None, "ids", "words", "numbers"])
def test_a_folder_meets_imagenets_1000_by_id_number_and_words(tmp_path, evaluate, names, own):
    words = [INFO.index_to_description(i) for i in range(1000)]
    words[517] = "crane2"
    by = {None: WORDNET, "ids": WORDNET, "words": words, "numbers": [str(i) for i in range(1000)]}
    label_names, order = shuffled(by[own]) if own else (None, range(1000))
    folder = write(tmp_path / "images", names.values(), list(names))
    assert evaluate(label_names, list(order), "--data", f"mine={folder}")["mine"]["top1"] == 1.0


def test_some_of_imagenets_classes_as_outputs_meet_words_and_ids_but_no_numbers():
    own = ["n01484850", "n01440764", "n01443537"]
    assert robustness.outputs(["tench", "Great White Shark"], own) == [1, 0]
    assert robustness.outputs(["n01443537"], ["great white shark", "tench", "goldfish"]) == [2]
    with pytest.raises(InputError, match=r"1 of 1 classes \('0'\) mean none of the 3 outputs \('n01484850', "):
        robustness.outputs(["0"], own)


@pytest.mark.parametrize(
    "classes, label_names, words",
    [
        (["cat", "unicorn"], CIFAR, r"1 of 2 classes \('unicorn'\) mean none of the 10 outputs \('airplane', "),
        (["3", "5"], CIFAR, r"2 of 2 classes \('3', '5'\) mean none"),  # a number is no position
        (["n02084071"], CIFAR, "mean none of the 10 outputs"),
        (["tench", "Cardigan"], WORDNET, r"\('Cardigan'\) mean none"),  # a dog, and what one wears
        (["cat", "CAT"], CIFAR, "the classes 'cat' and 'CAT' mean the same"),
        (["tench", "n01440764"], WORDNET, "the classes 'tench' and 'n01440764' mean the same"),
        (["a b"], ["a b", "a_b"], "the label names 'a b' and 'a_b' mean the same"),
        (["0"], [str(i) for i in range(999)], None),
        (["1000"], WORDNET, r"\('1000'\) mean none of the 1000 outputs"),
    ],
)
def test_names_that_do_not_map_are_refused_with_both_sides(classes, label_names, words):
    if words is None:
        assert robustness.outputs(classes, label_names) == [0]
    else:
        with pytest.raises(InputError, match=words):
            robustness.outputs(classes, label_names)


def test_what_does_not_map_ends_before_the_first_image(tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr(eval_robustness, "predict", None)
    folder = write(tmp_path / "images", ["cat", "unicorn"])
    words = (
        r"reader cannot be evaluated on mine: 1 of 2 classes \('unicorn'\) mean none .* \('airplane', .*: rename its"
    )
    with pytest.raises(InputError, match=f"{words.replace(': rename its', '')}.*: choose another set, or rename its"):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")


def test_all_outputs_compete_and_those_without_images_are_said(tmp_path, evaluate, capsys):
    folder = write(tmp_path / "images", ["dog", "cat"], [5, 7])  # the second shows a horse
    found = evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")
    assert found["mine"]["top1"] == 0.5
    printed = capsys.readouterr().out
    assert "mine for reader: cat is output 3, cat; dog is output 5, dog; the 8 other outputs have no images" in printed


# ----------------------------------------------------------------------------------------------------------------------
# Without a benchmark


@pytest.mark.parametrize(
    "label_names, outputs, words",
    [
        (CIFAR, 10, r"no --benchmarks would fit, and --data NAME=PLACE, .* outputs of reader: 'airplane', 'automob"),
        ([str(i) for i in range(10)], 10, "--benchmarks digits would fit, and"),
        (None, 1000, "--benchmarks imagenet real v2 r sketch.* would fit"),
    ],
)
def test_without_a_benchmark_those_that_fit_are_listed(evaluate, monkeypatch, label_names, outputs, words):
    monkeypatch.setattr(eval_robustness, "predict", None)
    with pytest.raises(InputError, match=f"nothing to evaluate on: {words}"):
        evaluate(label_names, list(range(outputs)))


def test_a_cifar_model_on_the_digits_is_refused(evaluate):
    with pytest.raises(InputError, match=r"10 of 10 classes \('0', '1', .*\) mean none of the 10 outputs \('airplane'"):
        evaluate(CIFAR, list(range(10)), "--benchmarks", "digits")


def test_a_model_without_label_names_is_refused(evaluate):
    with pytest.raises(InputError, match="reader has 10 outputs and 0 label_names: name them all"):
        evaluate(None, list(range(10)), "--benchmarks", "digits")


# ----------------------------------------------------------------------------------------------------------------------
# Places


def hub_layout(root, names, labels, column="label"):
    """As of the Hub's uoft-cs/cifar10: Parquet with ``img`` and a class label, test beside train."""
    features = datasets.Features({"img": datasets.Image(), column: datasets.ClassLabel(names=names)})
    columns = {"img": [{"bytes": jpeg(label), "path": None} for label in labels], column: labels}
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict(columns if split == "test" else {c: v[:1] for c, v in columns.items()})
        rows.cast(features).to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("column", ["label", "fine_label"])
def test_the_hubs_layout_of_cifar_is_read_from_its_test_split(tmp_path, evaluate, column):
    label_names, order = shuffled(CIFAR)
    labels = random.Random(1).choices(range(10), k=30)
    place = hub_layout(tmp_path / "cifar10", CIFAR, labels, column)
    found = evaluate(label_names, order, "--data", f"cifar10={place}")["cifar10"]
    assert (found["top1"], found["examples"]) == (1.0, 30)


def test_numbers_without_names_in_tars_are_for_outputs_called_by_numbers(tmp_path, evaluate):
    labels = random.Random(1).choices(range(10), k=30)
    place = write_tars(tmp_path / "tars", labels, labels)
    label_names, order = shuffled([str(i) for i in range(10)])
    assert evaluate(label_names, order, "--data", f"mine={place}")["mine"]["top1"] == 1.0
    with pytest.raises(InputError, match=r"\('0', '1', .*\) mean none of the 10 outputs"):
        evaluate(CIFAR, order, "--data", f"mine={place}")
    beyond = write_tars(tmp_path / "beyond", [3, 10], [3, 4])
    with pytest.raises(InputError, match="mine: the label 10 is none of the 10 outputs"):
        evaluate(label_names, order, "--data", f"mine={beyond}")


@pytest.mark.parametrize("name", ["ILSVRC2012_val_00000293_{}.JPEG", "{}_tench.JPEG", "{}_10026.jpeg"])
def test_a_flat_folder_goes_by_the_wordnet_ids_in_its_names(tmp_path, evaluate, name):
    (tmp_path / "flat").mkdir()
    for index in (999, 0, 517):
        (tmp_path / "flat" / name.format(WORDNET[index])).write_bytes(jpeg(index))
    found = evaluate(None, list(range(1000)), "--data", f"mine={tmp_path / 'flat'}", "--allow-partial")["mine"]
    assert (found["top1"], found["examples"]) == (1.0, 3)


@pytest.mark.parametrize("stray", [False, True])
def test_images_outside_of_class_folders_are_named(tmp_path, evaluate, stray):
    folder = write(tmp_path / "images", CIFAR[:2] if stray else [])
    folder.mkdir(exist_ok=True)
    (folder / "b.jpeg").write_bytes(jpeg(0))
    with pytest.raises(InputError, match=r"mine: .*images/b\.jpeg lies in no class folder: put it into .*images/CLASS"):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")


def test_splits_of_a_folder_are_not_mixed(tmp_path, evaluate):
    for split in ("train", "val"):
        write(tmp_path / "images" / split, CIFAR)
    with pytest.raises(InputError, match=r"mine: class folders lie in .*/train and in .*/val: name one of them"):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={tmp_path / 'images'}")
    found = evaluate(CIFAR, list(range(10)), "--data", f"mine={tmp_path / 'images' / 'val'}")
    assert found["mine"]["examples"] == 10


def test_data_alone_makes_a_benchmark_of_a_known_set_too(tmp_path, evaluate):
    folder = write(tmp_path / "v2", [str(i) for i in range(1000)])
    assert evaluate(None, list(range(1000)), "--data", f"v2={folder}")["v2"]["top1"] == 1.0
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(saved["passes"]) == ["reader on v2"]
