"""Any set for any model: classes meet outputs by name; what does not fit is said."""

import itertools
import json
import random
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from oracle import COLOUR, jpeg, write_tars
from timm.data import ImageNetInfo

import eval_robustness
from common import checkpoints
from common.errors import InputError
from robustness import corruptions, published, sets
from robustness.labels import SUBSETS, outputs

INFO = ImageNetInfo("imagenet-1k")
WORDNET = INFO.label_names()
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class Reader(torch.nn.Module):
    """Sees which class an image shows; the output for it is ``order[class]``."""

    def __init__(self, label_names, order):
        super().__init__()
        self.num_classes, self.order = len(order), torch.tensor(order)
        size = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear"}
        self.pretrained_cfg = size | COLOUR | {"label_names": label_names}
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
        decimals = (((x * std + mean) * 255).mean((-2, -1)) / 25).floor().clamp(0, 9).long()
        shown = (decimals * torch.tensor([1, 10, 100])).sum(-1) % self.num_classes
        best = 10 * torch.nn.functional.one_hot(self.order[shown], self.num_classes).float()
        return best * self.weight - 1e-3 * torch.arange(
            self.num_classes
        )  # of the others, the first


def shuffled(names, seed=0):
    """The names in another order, and the place of each."""
    order = random.Random(seed).sample(
        range(len(names)), len(names)
    )  # order[i]: the output of class i
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
        common = ["--model", "reader", "--workers", "0", "--batch-size", "8"]
        common += ["--output", str(tmp_path / "out")]
        return eval_robustness.main([*common, *map(str, flags)])["reader"]

    return run


def write(root, names, classes=None):
    """A folder CLASS/FILE, the class of index i called ``names[i]``."""
    for i, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / "a.jpeg").write_bytes(jpeg(i if classes is None else classes[i]))
    return root


# --------------------------------------------------------------------------------------------------
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
def test_a_folder_meets_a_models_own_names_in_any_order_and_spelling(
    tmp_path, evaluate, folders, outputs, seed
):
    label_names, order = shuffled(NAMINGS[outputs], seed)
    folder = write(tmp_path / "images", NAMINGS[folders])
    found = evaluate(label_names, order, "--data", f"mine={folder}")
    assert (found["mine"]["top1"], found["mine"]["examples"]) == (1.0, 10)
    assert (
        np.mean([i == place for i, place in enumerate(order)]) < 0.5
    )  # by position it would be wrong


@pytest.mark.parametrize(
    "names",
    [
        {0: "n01440764", 2: "n01484850", 134: "n02012849", 517: "n03126707", 999: "n15075141"},
        {0: "0", 2: "2", 134: "134", 517: "0517", 999: "999"},
        {
            0: "tench, Tinca tinca",
            2: "great_white_shark",
            134: "crane",
            517: "crane2",
            999: "Toilet Tissue",
        },
        {
            0: "n01440764-tench",
            2: "white shark",
            134: "n02012849_crane",
            517: "517",
            999: "bathroom-tissue",
        },
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
    assert outputs(["tench", "Great White Shark"], own) == [1, 0]
    assert outputs(["n01443537"], ["great white shark", "tench", "goldfish"]) == [2]
    with pytest.raises(
        InputError, match=r"1 of 1 classes \('0'\) mean none of the 3 outputs \('n01484850', "
    ):
        outputs(["0"], own)


@pytest.mark.parametrize(
    "classes, label_names, words",
    [
        (
            ["cat", "unicorn"],
            CIFAR,
            r"1 of 2 classes \('unicorn'\) mean none of the 10 outputs \('airplane', ",
        ),
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
        assert outputs(classes, label_names) == [0]
    else:
        with pytest.raises(InputError, match=words):
            outputs(classes, label_names)


def test_what_does_not_map_ends_before_the_first_image(tmp_path, evaluate, monkeypatch):
    monkeypatch.setattr(eval_robustness, "predict", None)
    folder = write(tmp_path / "images", ["cat", "unicorn"])
    words = r"reader cannot be evaluated on mine: 1 of 2 classes \('unicorn'\) mean none .* "
    words += r"\('airplane', .*: choose another set, or rename its"
    with pytest.raises(InputError, match=words):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")


def test_all_outputs_compete_and_those_without_images_are_said(tmp_path, evaluate, capsys):
    folder = write(tmp_path / "images", ["dog", "cat"], [5, 7])  # the second shows a horse
    found = evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")
    assert found["mine"]["top1"] == 0.5
    printed = capsys.readouterr().out
    assert "mine for reader: 8 outputs have no images here, and are wrong wherever" in printed


@pytest.mark.parametrize(
    "classes, words",
    [
        (["ant", "bee"], ""),
        (["Ant", "bee"], "mine for m: Ant is ant"),
        (["bee"], "mine for m: 1 outputs have no images here, and are wrong wherever predicted"),
    ],
)
def test_only_what_is_unusual_of_how_classes_were_taken_is_said(classes, words):
    features = datasets.Features({"label": datasets.ClassLabel(names=classes)})
    ds = datasets.Dataset.from_dict({"label": [0]}, features=features)
    assert sets.mapping("mine", ds, ["ant", "bee"], "m") == words


# --------------------------------------------------------------------------------------------------
# Without a benchmark


@pytest.mark.parametrize(
    "label_names, outputs, words",
    [
        (CIFAR, 10, r"no --benchmarks would fit, and --data .* outputs of reader: 'airplane', "),
        ([str(i) for i in range(10)], 10, "--benchmarks digits would fit, and"),
        (None, 1000, "--benchmarks imagenet real a-clean r-clean v2 r a sketch would fit"),
    ],
)
def test_without_a_benchmark_those_that_fit_are_listed(
    evaluate, monkeypatch, label_names, outputs, words
):
    monkeypatch.setattr(eval_robustness, "predict", None)
    with pytest.raises(InputError, match=f"nothing to evaluate on: {words}"):
        evaluate(label_names, list(range(outputs)))


@pytest.mark.slow
def test_the_digits_sketch_is_not_imagenets(evaluate, capsys):
    evaluate([str(i) for i in range(10)], list(range(10)), "--benchmarks", "digits")
    printed = capsys.readouterr().out
    assert " sketch " in printed and "effective robustness" not in printed


def test_a_cifar_model_on_the_digits_is_refused(evaluate):
    with pytest.raises(
        InputError,
        match=r"10 of 10 classes \('0', '1', .*\) mean none of the 10 outputs \('airplane'",
    ):
        evaluate(CIFAR, list(range(10)), "--benchmarks", "digits")


def test_a_model_without_label_names_is_refused(evaluate):
    with pytest.raises(InputError, match="reader has 10 outputs and 0 label_names: name them all"):
        evaluate(None, list(range(10)), "--benchmarks", "digits")


# --------------------------------------------------------------------------------------------------
# Places


def hub_layout(root, names, labels, column="label"):
    """As of the Hub's uoft-cs/cifar10: Parquet with ``img`` and a label, test beside train."""
    features = datasets.Features(
        {"img": datasets.Image(), column: datasets.ClassLabel(names=names)}
    )
    columns = {"img": [{"bytes": jpeg(label), "path": None} for label in labels], column: labels}
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict(
            columns if split == "test" else {c: v[:1] for c, v in columns.items()}
        )
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
    with pytest.raises(InputError, match=r"mine: .*\('10'\) mean none of the 10 outputs"):
        evaluate(label_names, order, "--data", f"mine={beyond}")


@pytest.mark.parametrize(
    "name", ["ILSVRC2012_val_00000293_{}.JPEG", "{}_tench.JPEG", "{}_10026.jpeg"]
)
def test_a_flat_folder_goes_by_the_wordnet_ids_in_its_names(tmp_path, evaluate, name):
    (tmp_path / "flat").mkdir()
    for index in (999, 0, 517):
        (tmp_path / "flat" / name.format(WORDNET[index])).write_bytes(jpeg(index))
    found = evaluate(
        None, list(range(1000)), "--data", f"mine={tmp_path / 'flat'}", "--allow-partial"
    )["mine"]
    assert (found["top1"], found["examples"]) == (1.0, 3)


@pytest.mark.parametrize("stray", [False, True])
def test_images_outside_of_class_folders_are_named(tmp_path, evaluate, stray):
    folder = write(tmp_path / "images", CIFAR[:2] if stray else [])
    folder.mkdir(exist_ok=True)
    (folder / "b.jpeg").write_bytes(jpeg(0))
    with pytest.raises(
        InputError,
        match=r"mine: .*images/b\.jpeg lies in no class folder: put it into .*images/CLASS",
    ):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")


def test_class_folders_may_be_anywhere_and_in_a_zip_archive(tmp_path, evaluate):
    label_names, order = shuffled(CIFAR)
    folder = write(tmp_path / "a::b" / "images", CIFAR)
    archive = shutil.make_archive(tmp_path / "images", "zip", folder.parent)
    for place in (folder, archive):
        assert evaluate(label_names, order, "--data", f"mine={place}")["mine"]["top1"] == 1.0


def test_splits_of_a_folder_are_not_mixed(tmp_path, evaluate):
    for split in ("train", "val"):
        write(tmp_path / "images" / split, CIFAR)
    with pytest.raises(
        InputError, match=r"mine: class folders lie in .*/train and in .*/val: name one of them"
    ):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={tmp_path / 'images'}")
    found = evaluate(CIFAR, list(range(10)), "--data", f"mine={tmp_path / 'images' / 'val'}")
    assert found["mine"]["examples"] == 10


def test_data_alone_makes_a_benchmark_of_a_known_set_too(tmp_path, evaluate):
    folder = write(tmp_path / "v2", [str(i) for i in range(1000)])
    assert evaluate(None, list(range(1000)), "--data", f"v2={folder}")["v2"]["top1"] == 1.0
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(saved["passes"]) == ["reader on v2"]


# --------------------------------------------------------------------------------------------------
# ImageNet-A, the clean accuracies of A and R, and ImageNet-C

A, R = SUBSETS["a"], SUBSETS["r"]


def test_a_is_judged_among_its_own_200_classes_and_among_all(tmp_path, evaluate):
    assert len(set(A)) == 200 and A != R
    shown = {WORDNET[index]: index for index in A}
    wrong = next(i for i in range(1000) if i not in A)
    shown[WORDNET[A[0]]] = (
        wrong  # the best output is none of A's; of A's own it is the first, which is right
    )
    folder = write(tmp_path / "imagenet-a", shown, list(shown.values()))
    found = evaluate(None, list(range(1000)), "--data", f"a={folder}")
    assert (found["a-200"]["top1"], found["a-1000"]["top1"]) == (1.0, 0.995)
    assert found["a-200"]["examples"] == found["a-1000"]["examples"] == 200


def test_as_tars_hold_positions_in_its_own_200_classes(tmp_path, evaluate):
    labels = random.Random(0).sample(range(200), 50)
    place = write_tars(tmp_path / "a", labels, [A[label] for label in labels])
    found = evaluate(None, list(range(1000)), "--data", f"a={place}")
    assert found["a-200"]["top1"] == found["a-1000"]["top1"] == 1.0


def test_clean_accuracies_are_those_of_imagenets_own_images_of_the_200_classes(tmp_path, evaluate):
    classes = [*A[:30], *R[:30], *(i for i in range(1000) if i not in A and i not in R)]
    classes = list(dict.fromkeys(classes))[:60]
    (tmp_path / "val").mkdir()
    for number, index in enumerate(classes, 1):
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}_{WORDNET[index]}.JPEG").write_bytes(
            jpeg(index)
        )
    place = f"imagenet={tmp_path / 'val'}"
    found = evaluate(
        None, list(range(1000)), "--benchmarks", "imagenet", "a-clean", "r-clean", "--data", place
    )
    assert found["imagenet"]["examples"] == len(classes)
    for name, own in (("a-clean", A), ("r-clean", R)):
        assert found[name]["examples"] == sum(i in own for i in classes)
        assert found[name]["top1"] == 1.0
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert list(saved["passes"]) == ["reader on imagenet"]  # one pass
    for path in (tmp_path / "val").iterdir():
        if any(WORDNET[i] in path.name for i in A):
            path.unlink()
    with pytest.raises(
        InputError, match="imagenet: no image has a right answer in a-clean: leave it out"
    ):
        evaluate(None, list(range(1000)), "--benchmarks", "a-clean", "--data", place)


def write_imagenet_c(root, kinds):
    """ImageNet-C's layout, of ten classes; as many as its severity says show another one."""
    for corruption, severity in itertools.product(kinds, range(1, 6)):
        shown = [i + (i < severity) for i in range(10)]
        write(root / corruption / str(severity), WORDNET[:10], shown)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("missing", [None, "fog"])
def test_imagenet_c_gives_errors_by_corruption_and_severity_and_mce(
    tmp_path, evaluate, capsys, missing
):
    kinds = [name for name in corruptions.ALEXNET if name != missing]
    root = write_imagenet_c(tmp_path / "c", [*kinds, "spatter"])
    evaluate(None, list(range(1000)), "--data", f"c={root}", "--allow-partial")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["corrupted"]["reader"]["c"]
    assert found["corruptions"]["snow"] == {str(s): pytest.approx(1 - s / 10) for s in range(1, 6)}
    assert found["mean"] == pytest.approx(0.7)
    printed = capsys.readouterr().out
    assert "mean error 30.00 %" in printed
    if missing:
        assert found["mce"] is None and "mCE not known" in printed
    else:  # every error is 0.3
        assert found["mce"] == pytest.approx(
            np.mean([0.3 / error for error in corruptions.ALEXNET.values()])
        )
    with pytest.raises(InputError, match="--corrupt does not go with --data c="):
        evaluate(None, list(range(1000)), "--data", f"c={root}", "--corrupt")
    with pytest.raises(InputError, match=r"c: .*snow holds no folders CORRUPTION/SEVERITY/CLASS"):
        evaluate(None, list(range(1000)), "--data", f"c={root / 'snow'}")


def test_an_image_that_imagenet_c_lacks_in_one_corruption_is_left_out_of_their_mean(
    tmp_path, evaluate
):
    """The first image is seen in fog and not in snow; others are not taken for it."""
    write(tmp_path / "c" / "fog" / "1", WORDNET[:4], [0, 1, 5, 5])
    write(tmp_path / "c" / "snow" / "1", WORDNET[1:4], [1, 5, 5])
    evaluate(None, list(range(1000)), "--data", f"c={tmp_path / 'c'}", "--allow-partial")
    found = json.loads((tmp_path / "out" / "results.json").read_text())["corrupted"]["reader"]["c"]
    assert found["corruptions"] == {"fog": {"1": 0.5}, "snow": {"1": pytest.approx(1 / 3)}}
    assert found["mean"] == pytest.approx(1 / 3)
    record = json.loads(next((tmp_path / "out" / "predictions").glob("*/c*.json")).read_text())
    assert record["request"]["images"] == "by file"


# --------------------------------------------------------------------------------------------------
# Beside timm's published results


@pytest.fixture
def resnet50(monkeypatch, evaluate):
    """Evaluate a reader that goes by the name of timm's ``resnet50.a1_in1k``, as if at its size."""

    def init(self, *args, init=Reader.__init__):
        init(self, *args)
        self.pretrained_cfg |= {"architecture": "resnet50", "tag": "a1_in1k"}

    monkeypatch.setattr(Reader, "__init__", init)
    return lambda *flags: evaluate(None, list(range(1000)), *flags)


def test_timms_top1_stands_beside_ours_at_the_same_size_and_crop(tmp_path, resnet50, capsys):
    folder = write(tmp_path / "v2", [str(i) for i in range(1000)])
    sizes = ["--img-size", "224", "--crop-pct", "0.95", "--interpolation", "bicubic"]
    resnet50("--data", f"v2={folder}", *sizes, "--batch-size", "50")
    printed = capsys.readouterr().out
    assert "reader  v2         100.000  68.470    +31.530" in printed


@pytest.mark.parametrize("place", ["weights.pth", "local-dir:model", "model"])
def test_timms_top1_does_not_stand_beside_a_model_of_ones_own(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("weights.pth").touch()
    model = torch.nn.Module()
    model.pretrained_cfg = {"architecture": "resnet50", "tag": "a1_in1k"}
    config = {"input_size": (3, 224, 224), "crop_pct": 0.95, "interpolation": "bicubic"}
    for name in ("resnet50", place):
        found = published.beside_ours({name: (model, config)}, {name: {"v2": {"top1": 0.5}}})
        assert list(found) == (["resnet50"] if name == "resnet50" else [])


def test_elsewhere_the_sizes_and_crops_of_timms_table_are_named(tmp_path, resnet50, capsys):
    folder = write(tmp_path / "v2", ["3", "4"])
    resnet50("--data", f"v2={folder}", "--allow-partial")
    printed = capsys.readouterr().out
    assert (
        "evaluate with --img-size 224 --crop-pct 0.950 --interpolation bicubic or --img-size 288"
        in printed
    )
    assert "timm's %" not in printed


def test_csv_has_timms_columns(tmp_path, evaluate):
    folder = write(tmp_path / "v2", ["3", "4", "5"], [3, 4, 6])
    evaluate(None, list(range(1000)), "--data", f"v2={folder}", "--allow-partial", "--csv")
    lines = (tmp_path / "out" / "results-v2.csv").read_text().splitlines()
    assert lines == [
        "model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation",
        "reader,16,66.667,33.333,66.667,33.333,0.00,1.000,bilinear",
    ]


def test_csv_has_the_best_model_first(tmp_path):
    config = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear"}
    top1 = {"a": 0.095, "b": 1.0, "c": 0.85, "d": 0.2}
    models = {name: (torch.nn.Linear(1, 1), config) for name in top1}
    results = {name: {"own": {"top1": value}} for name, value in top1.items()}
    eval_robustness.write_csv(tmp_path, models, results)
    lines = (tmp_path / "results-own.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["b", "c", "d", "a"]


# --------------------------------------------------------------------------------------------------
# Labels without class names, and models that see no colour


def plain_layout(root, labels, shown, column="label"):
    """A copy of a dataset of the Hub, whose labels are no class labels."""
    columns = {"image": [{"bytes": jpeg(i), "path": None} for i in shown], column: labels}
    ds = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    ds.to_parquet(root / "data" / "validation-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("column", ["label", "labels"])
@pytest.mark.parametrize("names", [CIFAR, [str(i) for i in range(10)]], ids=["words", "numbers"])
def test_string_labels_are_looked_up_among_the_outputs(tmp_path, evaluate, names, column):
    label_names, order = shuffled(names)
    labels = random.Random(1).choices(range(10), k=30)
    place = plain_layout(tmp_path / "set", [names[i].upper() for i in labels], labels, column)
    assert evaluate(label_names, order, "--data", f"mine={place}")["mine"]["top1"] == 1.0
    other = plain_layout(tmp_path / "other", ["unicorn"], [0], column)
    with pytest.raises(InputError, match=r"\('unicorn'\) mean none of the 10 outputs"):
        evaluate(label_names, order, "--data", f"mine={other}")


def test_a_set_called_like_a_row_of_the_digits_is_not_taken_for_it(tmp_path, evaluate, capsys):
    names, same = [str(i) for i in range(10)], list(range(10))
    first = evaluate(names, same, "--benchmarks", "digits")
    own = evaluate(names, same, "--data", f"test={write(tmp_path / 'own', names)}")
    assert own["test"]["examples"] == 10 and first["test"]["examples"] > 10
    capsys.readouterr()
    assert evaluate(names, same, "--benchmarks", "digits") == first
    printed = capsys.readouterr().out.splitlines()
    assert {"reader on digits:test", "reader on digits:noisy: finished before"} <= set(printed)


def test_number_labels_are_the_outputs_of_that_name(tmp_path, evaluate):
    """As training calls such classes; a number that is none of them is an error."""
    place = plain_layout(tmp_path / "set", [2, 5, 2, 3], [0, 1, 0, 2])
    found = evaluate(["5", "3", "2"], [2, 0, 1], "--data", f"mine={place}")
    assert found["mine"]["top1"] == 1.0
    for label, names in ((4, ["5", "3", "2"]), (-2, WORDNET), (1000, WORDNET)):
        other = plain_layout(tmp_path / str(label), [label], [0])
        with pytest.raises(InputError, match=rf"mine: .*{label}|\('{label}'\) mean none"):
            evaluate(names, list(range(len(names))), "--data", f"mine={other}")


def test_a_copy_in_the_home_folder_is_found(tmp_path, evaluate, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    plain_layout(tmp_path / "copy", ["cat"], [3])
    assert evaluate(CIFAR, list(range(10)), "--data", "mine=~/copy")["mine"]["top1"] == 1.0


def test_a_model_of_one_channel_is_refused_before_the_first_image(tmp_path, evaluate, monkeypatch):
    def init(self, *args, init=Reader.__init__):
        init(self, *args)
        self.pretrained_cfg |= {"input_size": (1, 16, 16)}

    monkeypatch.setattr(Reader, "__init__", init)
    monkeypatch.setattr(eval_robustness, "predict", None)
    folder = write(tmp_path / "images", CIFAR)
    with pytest.raises(
        InputError, match="reader takes images of 1 channels, and those here have 3"
    ):
        evaluate(CIFAR, list(range(10)), "--data", f"mine={folder}")


def test_a_class_that_changed_in_a_metadata_file_is_evaluated_anew(tmp_path, evaluate):
    folder, top1 = tmp_path / "images", []
    folder.mkdir()
    for name in ("a", "b"):
        (folder / f"{name}.jpeg").write_bytes(jpeg(3))
    for label in (3, 4):
        lines = f"file_name,label\na.jpeg,{CIFAR[3]}\nb.jpeg,{CIFAR[label]}\n"
        (folder / "metadata.csv").write_text(lines)
        top1.append(evaluate(CIFAR, range(10), "--data", f"mine={folder}")["mine"]["top1"])
    assert top1 == [1.0, 0.5]
