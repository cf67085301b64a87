"""The robustness sets in their real layouts, and the measures against other implementations."""

import itertools
import json
import math
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import zipfile
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import timm
import torch
from accelerate.state import AcceleratorState, PartialState
from oracle import Oracle, jpeg, write_folders, write_tars
from safetensors.torch import save_file
from scipy.stats import norm
from sklearn.metrics import top_k_accuracy_score
from timm.data import ImageNetInfo, RealLabelsImagenet, create_transform
from timm.models import save_for_hf

import eval_robustness
from common import checkpoints, images, loaders
from common.digits import SHIFTS, digits
from common.errors import InputError, lost_worker
from robustness import published, sets, statistics
from robustness.labels import SUBSETS, class_index, real_labels, right_answers
from robustness.sets import Pass

WORDNET = ImageNetInfo("imagenet-1k").label_names()
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def oracle(monkeypatch):
    """Model names stand for oracles: "right", or "wrong about 3 7"."""
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    open_model = checkpoints.open_model

    def open_oracle(name, **kwargs):
        if name == "right" or name.startswith("wrong about"):
            return Oracle(
                map(int, name.removeprefix("wrong about").split()) if name != "right" else ()
            )
        return open_model(name, **kwargs)

    monkeypatch.setattr(checkpoints, "open_model", open_oracle)


def evaluate(tmp_path, benchmarks, *places, models=("right",), flags=()):
    flags = ["--workers", "0", "--batch-size", "32", "--output", str(tmp_path / "out"), *flags]
    if places:
        flags += ["--data", *places]
    return eval_robustness.main(["--model", *models, "--benchmarks", *benchmarks, *flags])


# --------------------------------------------------------------------------------------------------
# Label mapping: the oracle is right about every image, and the naive rule would not be


def naive_accuracy(folder, indices):
    """Taking a class folder's position in the sorted list for the model's output."""
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return np.mean([indices[name] == position for position, name in enumerate(names)])


def test_v2_folders_are_numbers_not_text(tmp_path):
    classes = {str(i): i for i in range(1000)}
    folder = write_folders(tmp_path / "imagenetv2-matched-frequency-format-val", classes)
    assert evaluate(tmp_path, ["v2"], f"v2={folder}")["right"]["v2"]["top1"] == 1.0
    assert naive_accuracy(folder, classes) < 0.1


def test_r_folders_are_200_wordnet_ids_among_1000(tmp_path):
    classes = {WORDNET[index]: index for index in SUBSETS["r"]}
    folder = write_folders(tmp_path / "imagenet-r", classes)
    (folder / "README.txt").write_text("about")
    results = evaluate(tmp_path, ["r"], f"r={folder}")["right"]
    assert results["r-200"]["top1"] == results["r-1000"]["top1"] == 1.0
    assert results["r-200"]["examples"] == 200
    assert naive_accuracy(folder, classes) < 0.1


def test_r_tars_hold_positions_in_its_own_200_classes(tmp_path):
    labels = random.Random(0).sample(range(200), 200)
    folder = write_tars(
        tmp_path / "wds_imagenet-r", labels, [SUBSETS["r"][label] for label in labels]
    )
    results = evaluate(tmp_path, ["r"], f"r={folder}")["right"]
    assert results["r-200"]["top1"] == results["r-1000"]["top1"] == 1.0
    assert np.mean([SUBSETS["r"][label] == label for label in labels]) < 0.1  # the naive rule


def test_sketch_with_missing_classes_is_mapped_by_name(tmp_path):
    classes = {WORDNET[index]: index for index in range(500, 1000, 7)}
    folder = write_folders(tmp_path / "sketch", classes)
    with pytest.raises(
        InputError, match=r"sketch: .* has 72 of 1000 classes: complete it, .* --allow-partial"
    ):
        evaluate(tmp_path, ["sketch"], f"sketch={folder}")
    result = evaluate(tmp_path, ["sketch"], f"sketch={folder}", flags=["--allow-partial"])
    assert result["right"]["sketch"]["top1"] == 1.0
    assert naive_accuracy(folder, classes) == 0


def test_sketch_tars_hold_numbers(tmp_path):
    labels = random.Random(0).sample(range(1000), 50)
    folder = write_tars(tmp_path / "wds_imagenet_sketch", labels, labels)
    assert evaluate(tmp_path, ["sketch"], f"sketch={folder}")["right"]["sketch"]["top1"] == 1.0
    one = folder / "test" / "0.tar"
    assert evaluate(tmp_path, ["sketch"], f"sketch={one}")["right"]["sketch"]["examples"] == 25


def validation_images(number=80, seed=0):
    """Numbers of validation images in no order, with a class that Real has right."""
    labels, rng = real_labels(), random.Random(seed)
    numbers = rng.sample(range(1, 50_001), number)
    return {n: rng.choice(labels[n]) if labels[n] else rng.randrange(1000) for n in numbers}


def test_real_goes_by_file_number_in_the_archives_layout(tmp_path):
    seen, labels = validation_images(), real_labels()
    for n, index in seen.items():
        folder = tmp_path / "val" / WORDNET[index]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"ILSVRC2012_val_{n:08d}.JPEG").write_bytes(jpeg(index))
    flags = ["--allow-partial"]
    results = evaluate(tmp_path, ["imagenet", "real"], f"imagenet={tmp_path / 'val'}", flags=flags)[
        "right"
    ]
    assert results["imagenet"]["top1"] == results["real"]["top1"] == 1.0
    assert results["imagenet"]["examples"] == 80
    assert results["real"]["examples"] == sum(bool(labels[n]) for n in seen) < 80
    naive = [
        index in labels[row + 1] for row, (n, index) in enumerate(seen.items()) if labels[n]
    ]  # by row
    assert np.mean(naive) < 0.1


@pytest.mark.parametrize("named", [True, False])
def test_real_goes_by_file_number_in_a_flat_folder(tmp_path, named):
    seen = validation_images(seed=1)
    (tmp_path / "flat").mkdir()
    for n, index in seen.items():
        suffix = f"_{WORDNET[index]}" if named else ""
        (tmp_path / "flat" / f"ILSVRC2012_val_{n:08d}{suffix}.JPEG").write_bytes(jpeg(index))
    place = f"imagenet={tmp_path / 'flat'}"
    assert evaluate(tmp_path, ["real"], place)["right"]["real"]["top1"] == 1.0
    if named:
        assert evaluate(tmp_path, ["imagenet"], place)["right"]["imagenet"]["top1"] == 1.0
    else:
        with pytest.raises(InputError, match="an image has no label"):
            evaluate(tmp_path, ["imagenet"], place)


def write_hub_imagenet(root, seen):
    """As the Hub's ILSVRC/imagenet-1k: words for classes, WordNet ids in file names."""
    info = ImageNetInfo("imagenet-1k")
    names = [info.index_to_description(i) for i in range(1000)]
    names[517] = "crane2"  # there must not be two
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    )
    paths = [f"ILSVRC2012_val_{n:08d}_{WORDNET[index]}.JPEG" for n, index in seen.items()]
    images = [{"bytes": jpeg(index), "path": path} for index, path in zip(seen.values(), paths)]
    (root / "data").mkdir(parents=True)
    for split, labels in (("validation", list(seen.values())), ("test", [-1] * len(seen))):
        ds = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        ds.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


def test_real_and_imagenet_of_the_hubs_layout_in_one_pass(tmp_path, monkeypatch):
    seen = validation_images(seed=2) | {17: 134, 18: 517}
    folder, calls, forward = write_hub_imagenet(tmp_path / "imagenet-1k", seen), [], Oracle.forward
    monkeypatch.setattr(Oracle, "forward", lambda self, x: calls.append(len(x)) or forward(self, x))
    results = evaluate(tmp_path, ["imagenet", "real"], f"imagenet={folder}")["right"]
    assert results["imagenet"]["top1"] == 1.0
    assert (
        results["imagenet"]["examples"] == len(seen) == sum(calls) - 1
    )  # a black image was tried before
    assert 0.97 <= results["real"]["top1"] <= 1.0  # 17 and 18 may be wrong here


@pytest.mark.parametrize(
    "name, benchmark, index",
    [
        ("n01440764", "v2", 0),
        ("10", "v2", 10),
        ("0", "r", 1),  # ImageNet-R begins with the goldfish
        ("tench, Tinca tinca", "imagenet", 0),
        ("crane", "imagenet", 134),
        ("crane2", "imagenet", 517),
    ],
)
def test_class_names(name, benchmark, index):
    assert class_index(name, benchmark) == index


@pytest.mark.parametrize(
    "name, benchmark", [("n00000000", "v2"), ("1000", "v2"), ("200", "r"), ("cat", "sketch")]
)
def test_class_name_that_maps_to_nothing_is_named(name, benchmark):
    with pytest.raises(InputError, match=f"{benchmark}: the class '{name}' is no WordNet id"):
        class_index(name, benchmark)


# --------------------------------------------------------------------------------------------------
# Measures


def random_logits(size=300, classes=1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (size,), generator=generator)
    logits = torch.randn(size, classes, generator=generator)
    logits[torch.arange(size), labels] += 2
    return logits, labels


def one_hot(labels, classes=1000):
    return torch.nn.functional.one_hot(labels, classes).bool()


def test_accuracies_and_likelihood_agree_with_scikit_learn_and_torch():
    logits, labels = random_logits()
    result = statistics.classification(statistics.score(logits, one_hot(labels)))
    for k in (1, 5):
        expected = top_k_accuracy_score(labels.numpy(), logits.numpy(), k=k, labels=range(1000))
        assert result[f"top{k}"] == pytest.approx(expected)
    assert result["nll"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5
    )


def test_wilson_interval_equals_its_formula():
    columns = {
        "top1": np.arange(200) < 180,
        "top5": np.ones(200, bool),
        "nll": np.ones(200),
        "confidence": np.ones(200),
    }
    result, z = statistics.classification(columns), norm.ppf(0.975)
    centre = (0.9 + z**2 / 400) / (1 + z**2 / 200)
    half = z / (1 + z**2 / 200) * math.sqrt(0.9 * 0.1 / 200 + z**2 / (4 * 200**2))
    assert (result["top1_low"], result["top1_high"]) == pytest.approx(
        (centre - half, centre + half), rel=1e-9
    )


def test_the_interval_of_the_likelihood_is_the_normal_one():
    logits, labels = random_logits(300)
    scores = statistics.score(logits, one_hot(labels))
    result, nll = statistics.classification(scores), scores["nll"].numpy()
    half = 1.96 * nll.std() / math.sqrt(300)
    assert (result["nll_low"], result["nll_high"]) == pytest.approx(
        (nll.mean() - half, nll.mean() + half), rel=1e-5
    )


def test_the_likelihood_is_that_of_all_right_answers_together():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    p = logits.softmax(-1)[0]
    nll = statistics.score(logits, torch.tensor([[True, False, True]]))["nll"]
    assert nll.item() == pytest.approx(-math.log(p[0] + p[2]))


def test_confidence_is_that_of_the_prediction_be_it_right_or_wrong():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    for right in range(3):
        confidence = statistics.score(logits, one_hot(torch.tensor([right]), 3))["confidence"]
        assert confidence.item() == pytest.approx(logits.softmax(-1).max().item())


def test_scores_stay_with_their_images_keys_and_in_their_order():
    """Image "2" has no right answer; two processes have read two batches."""
    parts = [{}, {}]
    logits = torch.eye(3)[[0, 1, 0, 1]]  # predictions
    eval_robustness.add_scores(parts[0], logits, None, [[0], [], [1, 2], [1]], ["5", "2", "7", "0"])
    eval_robustness.add_scores(parts[1], logits[:2], None, [[2], [1, 2]], ["6", "1"])
    merged = eval_robustness.merge(parts)
    assert merged["key"].tolist() == ["0", "1", "5", "6", "7"]
    assert merged["prediction"].tolist() == [1, 1, 0, 0, 0]
    assert merged["top1"].tolist() == [True, True, True, False, False]


def test_constant_logits_are_no_better_than_chance():
    labels = torch.arange(1000)
    assert (
        statistics.classification(statistics.score(torch.zeros(1000, 1000), one_hot(labels)))[
            "top1"
        ]
        == 1e-3
    )


def test_real_agrees_with_timm():
    real, (logits, _) = real_labels(), random_logits(500, seed=1)
    numbers = random.Random(0).sample(range(1, 50_001), 500)
    for row, n in enumerate(numbers):  # make half of them right
        if real[n] and row % 2:
            logits[row, real[n][-1]] += 9
    names = [f"ILSVRC2012_val_{n:08d}.JPEG" for n in numbers]
    theirs = RealLabelsImagenet(names + [""] * (50_000 - 500))
    theirs.add_result(logits)
    columns = {}
    eval_robustness.add_scores(columns, logits, None, [real[n] for n in numbers], names)
    ours = statistics.classification(columns)
    assert 100 * ours["top1"] == pytest.approx(theirs.get_accuracy(1))
    assert 100 * ours["top5"] == pytest.approx(theirs.get_accuracy(5))


def test_r_protocol_of_200_classes_agrees_with_masking():
    logits, _ = random_logits(400, seed=2)
    labels = [random.Random(i).choice(SUBSETS["r"]) for i in range(400)]
    batch = {"label": labels, "path": [None] * 400}
    columns = {}
    for protocol, outputs, answers in right_answers("r", batch):
        eval_robustness.add_scores(
            columns.setdefault(protocol, {}), logits, outputs, answers, list(map(str, range(400)))
        )
    masked = logits.clone()
    masked[:, [i for i in range(1000) if i not in SUBSETS["r"]]] = -torch.inf
    assert columns["r-200"]["top1"] == (masked.argmax(-1) == torch.tensor(labels)).tolist()
    assert columns["r-1000"]["top1"] == (logits.argmax(-1) == torch.tensor(labels)).tolist()


# --------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    "size, processes, workers", list(itertools.product((1, 7, 64, 65), (1, 2), (0, 2)))
)
def test_every_image_is_read_once_whatever_the_split(tmp_path, size, processes, workers):
    ds = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg(i), "path": None} for i in range(size)], "label": range(size)}
    )
    for either in (ds, ds.to_iterable_dataset(num_shards=min(size, 4))):
        labels, keys, sent = [], [], 0
        for process in range(processes):
            transform = create_transform(16, normalize=False)
            pictures = sets.Pictures(
                "v2", either, transform, 8, process=process, processes=processes
            )
            for batch in torch.utils.data.DataLoader(
                pictures, batch_size=None, num_workers=workers, collate_fn=dict
            ):
                labels, keys = labels + batch.get("label", []), keys + batch["key"]
                sent += batch.get("sent", 0)
        assert sent == size
        assert sorted(labels) == list(range(size))
        assert len(set(keys)) == size


@pytest.mark.slow
def test_two_processes_count_as_one(tmp_path):
    for size in (1, 7, 64, 65):
        folder = write_folders(tmp_path / f"v2-{size}", {str(i): i for i in range(size)})
        (folder / "0" / "0_0.jpeg").write_bytes(jpeg(0))
    results = []
    for processes in (1, 2):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = [
            str(ROOT / "tests" / "oracle.py"),
            str(tmp_path),
            str(tmp_path / f"out{processes}"),
        ]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, *(launch if processes > 1 else []), *script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        saved = [
            json.loads(file.read_text())
            for file in sorted(tmp_path.glob(f"out{processes}/*/results.json"))
        ]
        results.append([(result["results"], result["differences_to_first"]) for result in saved])
    assert results[0] == results[1]
    sizes = [models["right"]["v2"]["examples"] for models, _ in results[0]]
    assert sorted(sizes) == [1, 7, 64, 65]


def test_killed_run_goes_on_after_the_last_finished_benchmark(tmp_path, monkeypatch, capsys):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    r = write_folders(tmp_path / "r", {WORDNET[index]: index for index in SUBSETS["r"]})
    places, models = (f"v2={folder}", f"r={r}"), ("right", "wrong about 3 6")
    predict, begun = eval_robustness.predict, []

    def predict_until_killed(accelerator, model, config, which, *rest):
        begun.append(str(which))
        if len(begun) == 4:
            raise KeyboardInterrupt
        return predict(accelerator, model, config, which, *rest)

    monkeypatch.setattr(eval_robustness, "predict", predict_until_killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, ["v2", "r"], *places, models=models)
    results = evaluate(tmp_path, ["v2", "r"], *places, models=models)
    assert begun == ["v2", "r", "v2", "r", "r"]
    assert results["wrong about 3 6"]["v2"]["top1"] == 0.998
    assert "right on v2: finished before" in capsys.readouterr().out
    write_folders(tmp_path / "r" / "more", {WORDNET[1]: 1})  # other images: not finished
    evaluate(tmp_path, ["v2", "r"], *places, models=models)
    assert begun[5:] == ["r", "r"]


@pytest.mark.pictures
def test_results_table_picture_and_predictions(tmp_path, capsys):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    models = ("right", "wrong about 3 6 9")
    evaluate(tmp_path, ["v2"], f"v2={folder}", models=models, flags=["--markdown"])
    printed = capsys.readouterr().out
    assert "| wrong about 3 6 9 | v2        | 1000   | 99.70   |" in printed
    assert "| wrong about 3 6 9 | v2        | -0.30        | -0.88 to +0.08" in printed
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["results"]["wrong about 3 6 9"]["v2"]["top1"] == 0.997
    assert {"torch", "timm", "datasets"} == set(saved["versions"])
    assert saved["passes"]["right on v2"]["preprocessing"]["input_size"] == [3, 16, 16]
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    table = datasets.Dataset.from_parquet(
        str(tmp_path / "out" / "predictions" / "wrong_about_3_6_9" / "v2.parquet")
    )
    assert sum(not right for right in table["top1"]) == 3


def test_effective_robustness_is_that_of_both_sets_in_table_record_and_picture(tmp_path, capsys):
    v2 = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    val = write_folders(tmp_path / "val", {name: i for i, name in enumerate(WORDNET)})
    places, wrong = (f"v2={v2}", f"imagenet={val}"), "wrong about " + " ".join(map(str, range(60)))
    evaluate(tmp_path, ["imagenet", "v2"], *places, models=("right", wrong))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["effective_robustness"]
    slope, intercept = published.line("v2")
    expected = 1 / (1 + math.exp(-(slope * math.log(0.94 / 0.06) + intercept)))
    assert found[wrong]["v2"]["above"] == pytest.approx(0.94 - expected)
    assert found["right"]["v2"]["above"] == 0
    printed = capsys.readouterr().out
    assert (
        f"{100 * (0.94 - expected):+.2f}" in printed
        and "right on v2: the line is extrapolated" in printed
    )
    assert "right on v2: unusual" not in printed
    pictures = [tmp_path / "out" / f"effective_robustness.{ending}" for ending in ("png", "svg")]
    assert all(picture.exists() for picture in pictures)
    evaluate(tmp_path, ["v2"], places[0])
    assert (
        "no effective robustness on v2: it needs imagenet among --benchmarks"
        in capsys.readouterr().out
    )
    assert not any(picture.exists() for picture in pictures)  # of another result than results.json
    evaluate(tmp_path, ["imagenet", "v2"], *places, flags=["--allow-partial"])
    assert (
        "no effective robustness with --allow-partial: timm's accuracies are"
        in capsys.readouterr().out
    )
    assert json.loads((tmp_path / "out" / "results.json").read_text())["effective_robustness"] == {}


# --------------------------------------------------------------------------------------------------
# Bad input


def test_unreadable_images_are_left_out_and_counted(tmp_path, capsys):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)}, images=2)
    bad = folder / "7" / "7_0.jpeg"
    bad.write_bytes(bad.read_bytes()[:100])
    result = evaluate(tmp_path, ["v2"], f"v2={folder}")["right"]["v2"]
    assert (result["top1"], result["examples"]) == (1.0, 1999)
    assert f"left out 1 images that cannot be read: ['{bad}']" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "results.json").read_text())["passes"]["right on v2"][
        "unreadable"
    ] == [str(bad)]


def test_too_many_unreadable_images_are_an_error(tmp_path):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    for i in range(3):
        (folder / str(i) / f"{i}_0.jpeg").write_bytes(b"not an image")
    words = r"v2: 3 of 1000 images cannot be read, too many: mend or replace .*0_0\.jpeg"
    for _ in range(2):  # nor is it finished at the second try
        with pytest.raises(InputError, match=words):
            evaluate(tmp_path, ["v2"], f"v2={folder}")


def test_unreadable_images_are_counted_once_however_many_protocols_and_corruptions_there_are(
    tmp_path, capsys, monkeypatch
):
    """Three of ten are too many for 0.2: of the images, not of what is said about them."""
    names = [WORDNET[index] for index in SUBSETS["r"][:10]]
    folder = write_folders(tmp_path / "r", dict(zip(names, SUBSETS["r"])))
    for name in names[:3]:
        (folder / name / f"{name}_0.jpeg").write_bytes(b"not an image")
    flags = ["--allow-partial", "--corrupt"]
    monkeypatch.setattr(eval_robustness, "MAX_UNREADABLE", 0.2)
    with pytest.raises(InputError, match="r: 3 of 10 images cannot be read, too many"):
        evaluate(tmp_path, ["r"], f"r={folder}", flags=flags)
    monkeypatch.setattr(eval_robustness, "MAX_UNREADABLE", 0.3)
    capsys.readouterr()
    found = evaluate(tmp_path, ["r"], f"r={folder}", flags=flags)["right"]
    assert found["r-200"]["examples"] == found["r-1000"]["examples"] == 7
    assert "left out 3 images that cannot be read" in capsys.readouterr().out


def test_file_name_that_real_cannot_key(tmp_path):
    folder = write_folders(tmp_path / "val", {WORDNET[0]: 0})
    with pytest.raises(
        InputError,
        match=r"real: '.*n01440764_0\.jpeg' is not named like ILSVRC2012_val_00000001\.JPEG",
    ):
        evaluate(tmp_path, ["real"], f"imagenet={folder}", flags=["--allow-partial"])


def test_unknown_class_folder_ends_before_any_model_runs(tmp_path, monkeypatch):
    folder = write_folders(tmp_path / "sketch", {"n01440764": 0, "n99999999": 1})
    monkeypatch.setattr(eval_robustness, "predict", None)
    with pytest.raises(InputError, match="sketch: the class 'n99999999'"):
        evaluate(tmp_path, ["sketch"], f"sketch={folder}", flags=["--allow-partial"])


@pytest.mark.parametrize(
    "benchmarks, places, words",
    [
        (
            ["v2"],
            ("v/3=/nowhere",),
            "--data v/3=/nowhere: give NAME=PLACE, the name in letters, digits, - and _",
        ),
        (["v2"], ("v3=",), "--data v3=: give NAME=PLACE"),
        (
            ["r"],
            ("r-200=/nowhere",),
            "r-200 is a set or a row of its own here: choose another name",
        ),
        (["digits"], ("test=/nowhere",), "test is a set or a row of its own here"),
        (["digits", "sketch"], (), "the digits have a row sketch too"),
        (["v2"], ("real=/nowhere",), "real is a set or a row of its own here: choose another name"),
        (["v2"], ("v2=/nowhere/0.tar",), r"there is no file /nowhere/0\.tar"),
    ],
)
def test_what_cannot_be_evaluated(tmp_path, benchmarks, places, words):
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, benchmarks, *places)


@pytest.mark.parametrize("label", [-1, None])
def test_image_without_a_label_is_not_taken_for_one_of_the_last_class(tmp_path, label):
    names = [f"{i}" for i in range(1000)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"image": [{"bytes": jpeg(0), "path": "0.jpeg"}], "label": [label]}
    ds = datasets.Dataset.from_dict(columns, features=features)
    ds.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(
        InputError,
        match=r"the label of 0.jpeg is -1: choose a labelled split|an image has no label",
    ):
        evaluate(tmp_path, ["v2"], f"v2={tmp_path}")


def test_empty_folder_and_columns_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no images and no tar files"):
        evaluate(tmp_path, ["v2"], f"v2={tmp_path / 'empty'}")
    (tmp_path / "text").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(
        tmp_path / "text" / "test-00000-of-00001.parquet"
    )
    with pytest.raises(InputError, match=r"its columns are text \(Value\)"):
        evaluate(tmp_path, ["v2"], f"v2={tmp_path / 'text'}")


@pytest.mark.parametrize(
    "error, words",
    [
        (datasets.exceptions.DatasetNotFoundError("'a' is a gated dataset"), "accept its terms"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found v2.py"),
            "no longer supported",
        ),
        (ConnectionError("no route"), "cannot be reached"),
    ],
)
def test_hub_errors_come_before_any_model_runs(tmp_path, monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(eval_robustness, "predict", None)
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, ["v2"])


def test_an_image_that_claims_to_be_huge_is_left_out_like_any_other_that_cannot_be_read(
    tmp_path, capsys
):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)}, images=2)
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + header
        + struct.pack(">I", zlib.crc32(header))
    )
    bomb += struct.pack(">I", 100) + b"IDAT" + bytes(100)
    (folder / "7" / "7_0.jpeg").write_bytes(bomb)
    assert evaluate(tmp_path, ["v2"], f"v2={folder}")["right"]["v2"]["examples"] == 1999
    assert "left out 1 images that cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--model", "right", "--benchmarks", "v2", "r", "v2"], "--benchmarks names v2 twice"),
        (
            ["--model", "right", "--benchmarks", "v2", "--data", "v2=a", "v2=b"],
            "--data names v2 twice",
        ),
        (
            ["--model", "right", "right", "--benchmarks", "v2"],
            "--model right and right are the same model",
        ),
    ],
)
def test_what_would_count_twice_or_has_no_effect(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        eval_robustness.main([*flags, "--output", str(tmp_path / "out")])


def save_model(folder, names=None, architecture="test_resnet", seed=0, **options):
    """A model of 1000 classes, or of those called ``names``, in timm's layout, and its folder."""
    torch.manual_seed(seed)
    size = {"num_classes": len(names or range(1000))}
    model = timm.create_model(architecture, **size, **options)
    config = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    options = {"model_config": {"label_names": names}, "safe_serialization": True}
    save_for_hf(model, folder, data_config=config, **options)
    return model.eval(), folder


@pytest.mark.parametrize("names", [None, WORDNET])
def test_outputs_without_names_are_said_to_be_taken_for_imagenets(tmp_path, capsys, names):
    _, place = save_model(tmp_path / "best", names)
    args = eval_robustness.parse(["--model", str(place), "--benchmarks", "v2"])
    eval_robustness.open_models(args)
    assert (
        "best has no label_names: its outputs are taken for ImageNet's" in capsys.readouterr().out
    ) == (not names)


def test_a_model_by_two_spellings_is_one_model(tmp_path, monkeypatch):
    _, folder = save_model(tmp_path / "best")
    (tmp_path / "link").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for other in ("best/", "./best", f"local-dir:{folder}", "link"):
        with pytest.raises(InputError, match=f"--model {folder} and {other} are the same model"):
            evaluate(tmp_path, ["v2"], models=(str(folder), other))


def test_a_pretrained_model_with_and_without_its_tag_is_one_model(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: timm.create_model(name))
    with pytest.raises(InputError, match="are the same model"):
        evaluate(tmp_path, ["v2"], models=("test_resnet", "test_resnet.r160_in1k"))


def test_models_that_would_share_a_folder_of_predictions(tmp_path):
    models = ("wrong about 3", "wrong about  3")
    with pytest.raises(InputError, match=r"would share .*predictions/wrong_about_3: rename one"):
        evaluate(tmp_path, ["v2"], models=models)


# --------------------------------------------------------------------------------------------------
# A folder of results that is used again


@pytest.fixture
def predictions(monkeypatch):
    """The passes that were made, and not found finished."""
    made, predict = [], eval_robustness.predict

    def record(accelerator, model, config, which, *rest):
        made.append(str(which))
        return predict(accelerator, model, config, which, *rest)

    monkeypatch.setattr(eval_robustness, "predict", record)
    return made


@pytest.mark.slow
def test_a_model_that_changed_in_place_is_evaluated_anew(tmp_path, predictions, capsys):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(0, 1000, 10)})
    flags = ["--allow-partial"]
    for name in (str(tmp_path / "best"), f"local-dir:{tmp_path / 'best'}"):
        for seed in (0, 1):
            save_model(tmp_path / "best", seed=seed)
            evaluate(tmp_path, ["v2"], f"v2={folder}", models=(name,), flags=flags)
        assert (
            f"{name} on v2: anew, as these have changed since: weights\n" in capsys.readouterr().out
        )
        evaluate(tmp_path, ["v2"], f"v2={folder}", models=(name,), flags=flags)
        assert f"{name} on v2: finished before" in capsys.readouterr().out
    assert predictions == ["v2"] * 4
    config = json.loads((tmp_path / "best" / "config.json").read_text())
    config["model_args"] = {"act_layer": "gelu"}  # the weights stay
    (tmp_path / "best" / "config.json").write_text(json.dumps(config))
    evaluate(tmp_path, ["v2"], f"v2={folder}", models=(name,), flags=flags)
    assert predictions == ["v2"] * 5
    (tmp_path / "best" / "config.json").write_text(
        json.dumps(config | {"label_names": WORDNET[::-1]})
    )
    evaluate(tmp_path, ["v2"], f"v2={folder}", models=(name,), flags=flags)
    assert predictions == ["v2"] * 6


def test_images_that_changed_in_place_are_evaluated_anew(tmp_path, predictions, capsys):
    folder = write_folders(tmp_path / "v2", {"3": 3, "4": 4})
    for label in (3, 5):
        (image,) = (folder / "3").iterdir()
        image.write_bytes(jpeg(label))
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])
    assert "right on v2: anew, as these have changed since: revision\n" in capsys.readouterr().out
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert predictions == ["v2", "v2"] and saved["results"]["right"]["v2"]["top1"] == 0.5


def test_a_pass_of_which_less_was_measured_is_made_anew_and_says_so(tmp_path, capsys):
    v2 = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    found = evaluate(tmp_path, ["v2"], f"v2={v2}")
    (file,) = (tmp_path / "out" / "predictions").glob("*/v2.parquet")
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["scaled"]), file)
    capsys.readouterr()
    assert evaluate(tmp_path, ["v2"], f"v2={v2}") == found
    printed = capsys.readouterr().out
    assert "right on v2: anew, as these have changed since: what is measured\n" in printed
    assert pq.read_table(file).equals(table)


def test_models_are_compared_on_the_images_that_both_have_seen():
    first = {"key": np.array(["a", "b", "d"]), "top1": np.array([True, False, True])}
    other = {"key": np.array(["b", "c", "d"]), "top1": np.array([True, True, False])}
    one, two = eval_robustness.matched(first, other)
    assert (one.tolist(), two.tolist()) == ([False, True], [True, False])


def test_the_mean_over_corruptions_is_of_the_images_read_in_each_and_without_the_clean_ones():
    seen = {"": [1, 1, 1], "noise": [1, 0, 1], "blur": [0, 0, 0]}
    tables = {}
    for kind, right in seen.items():
        table = {"key": np.array(["a", "b", "c"]), "top1": np.array(right, bool)}
        tables[sets.Protocol("v2", kind, "1" if kind else "")] = table
    more = {"key": np.array(["b", "c"]), "top1": np.array([True, True])}
    tables[sets.Protocol("v2", "blur", "2")] = more
    found = eval_robustness.by_image(tables)["v2"]
    assert found["key"].tolist() == ["b", "c"]
    assert found["top1"].tolist() == pytest.approx([1 / 3, 2 / 3])


def test_precision_and_versions_belong_to_what_is_finished(
    tmp_path, predictions, monkeypatch, capsys
):
    folder = write_folders(tmp_path / "v2", {"3": 3})
    for change in (
        lambda: monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16"),
        lambda: monkeypatch.setattr(timm, "__version__", "0"),
        lambda: monkeypatch.setattr(torch, "__version__", "0"),
    ):
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])
        change()
        AcceleratorState._reset_state(True)
    evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])
    assert predictions == ["v2"] * 4
    printed = capsys.readouterr().out
    assert "changed since: precision" in printed and "changed since: versions" in printed


def test_workers_belong_to_what_is_finished_of_a_stream_alone(tmp_path, predictions):
    """A streamed image is known by the worker that reads it; a stored one by its name."""
    places = {
        "streamed": write_tars(tmp_path / "tars", [3, 4, 5, 6], [3, 4, 5, 6]),
        "stored": write_folders(tmp_path / "folders", {"3": 3}),
    }
    for place in places.values():
        for workers in ("0", "0", "2"):
            flags = ["--allow-partial", "--workers", workers]
            evaluate(tmp_path, ["v2"], f"v2={place}", flags=flags)
    assert predictions == ["v2"] * (2 + 1)


def test_results_of_another_command_are_not_replaced_without_a_word(tmp_path, capsys):
    places = [f"{name}={write_folders(tmp_path / name, {WORDNET[1]: 1})}" for name in ("v2", "r")]
    flags = ["--allow-partial"]
    evaluate(tmp_path, ["v2"], places[0], flags=flags)
    evaluate(tmp_path, ["v2"], places[0], flags=flags)
    assert "will no longer have" not in capsys.readouterr().out
    evaluate(tmp_path, ["r"], places[1], models=("wrong about 3",), flags=flags)
    assert (
        "results.json and accuracy.png will no longer have right on v2: to keep"
        in capsys.readouterr().out
    )
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(saved["passes"]) == {"wrong about 3 on r"} and set(saved["results"]) == {
        "wrong about 3"
    }
    evaluate(tmp_path, ["v2", "r"], *places, models=("right", "wrong about 3"), flags=flags)
    printed = capsys.readouterr().out
    assert "will no longer have" not in printed
    assert (
        "right on v2: finished before" in printed
        and "wrong about 3 on r: finished before" in printed
    )


def test_a_pass_killed_while_it_replaces_another_leaves_neither(tmp_path, monkeypatch):
    one, two = (
        write_folders(tmp_path / name, {"3": index}) for name, index in (("one", 3), ("two", 4))
    )
    assert (
        evaluate(tmp_path, ["v2"], f"v2={one}", flags=["--allow-partial"])["right"]["v2"]["top1"]
        == 1
    )
    write_table = pq.write_table

    def killed(*args):
        write_table(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(pq, "write_table", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(tmp_path, ["v2"], f"v2={two}", flags=["--allow-partial"])
    monkeypatch.setattr(pq, "write_table", write_table)
    assert (
        evaluate(tmp_path, ["v2"], f"v2={one}", flags=["--allow-partial"])["right"]["v2"]["top1"]
        == 1
    )


def test_a_sets_revision_is_asked_for_once(tmp_path, monkeypatch):
    places = [f"{name}={write_folders(tmp_path / name, {WORDNET[1]: 1})}" for name in ("v2", "r")]
    asked, revision = [], sets.revision
    monkeypatch.setattr(
        sets, "revision", lambda which, *rest: asked.append(str(which)) or revision(which, *rest)
    )
    evaluate(
        tmp_path, ["v2", "r"], *places, models=("right", "wrong about 3"), flags=["--allow-partial"]
    )
    assert asked == ["v2", "r"]


def test_a_hub_that_does_not_answer_is_no_traceback(monkeypatch):
    def fail(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr(sets.huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(
        InputError,
        match=r"cannot ask the Hub for the commit of clip-benchmark/wds_imagenetv2: no route",
    ):
        sets.revision(Pass("v2", ("v2",)), None, None)


# --------------------------------------------------------------------------------------------------
# Models that do not fit


@pytest.mark.parametrize(
    "bad, words",
    [
        ("all", "right: its logits are not finite, even for a black image"),
        ("some", r"right on v2: the logits of .*/7/7_0\.jpeg are not finite: leave"),
    ],
)
def test_logits_that_are_not_finite_are_named(tmp_path, monkeypatch, bad, words):
    folder, forward = write_folders(tmp_path / "v2", {str(i): i for i in (3, 7)}), Oracle.forward

    def broken(self, x):
        logits = forward(self, x)
        return logits.masked_fill((logits.argmax(-1, keepdim=True) == 7) | (bad == "all"), math.nan)

    monkeypatch.setattr(Oracle, "forward", broken)
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])


def test_another_size_reaches_a_model_of_fixed_size(tmp_path):
    _, place = save_model(
        tmp_path / "vit", architecture="vit_tiny_patch16_224", depth=1, img_size=32
    )
    folder = write_folders(tmp_path / "v2", {"3": 3})
    flags = ["--allow-partial", "--img-size", "64"]
    evaluate(tmp_path, ["v2"], f"v2={folder}", models=(str(place),), flags=flags)
    args = eval_robustness.parse(["--model", str(place), "--benchmarks", "v2", "--img-size", "64"])
    ((model, config),) = eval_robustness.open_models(args).values()
    assert config["input_size"] == (3, 64, 64)
    timms = timm.create_model(f"local-dir:{place}", pretrained=True, img_size=64).eval()
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(x), timms(x))


def test_a_size_that_a_model_does_not_take(tmp_path):
    _, place = save_model(
        tmp_path / "vit", architecture="vit_tiny_patch16_224", depth=1, img_size=32
    )
    with pytest.raises(
        InputError, match=r"cannot load the model .*vit|does not take images of \(3, 3, 3\)"
    ):
        evaluate(tmp_path, ["v2"], models=(str(place),), flags=["--img-size", "3"])


@pytest.mark.parametrize("place", ["file/out", "file", "/proc/out"])
def test_an_output_that_cannot_be_written(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(checkpoints, "open_model", lambda *_: pytest.fail("opened a model first"))
    with pytest.raises(
        InputError, match=f"cannot write to --output {tmp_path / place} .*: choose another"
    ):
        evaluate(tmp_path, ["v2"], flags=["--output", str(tmp_path / place)])


# --------------------------------------------------------------------------------------------------
# A model's own order of outputs


class Named(Oracle):
    """An oracle whose outputs are in another order, as ``label_names`` says."""

    def __init__(self, names, order):
        super().__init__()
        self.pretrained_cfg = self.pretrained_cfg | {"label_names": names}
        self.order = order

    def forward(self, x):
        return super().forward(x)[:, self.order]


ORDERS = {
    "numbers as text": (sorted(map(str, range(1000))), sorted(range(1000), key=str)),
    "backwards, WordNet ids": (WORDNET[::-1], list(range(999, -1, -1))),
    "by output": ({str(i): WORDNET[i] for i in range(999, -1, -1)}, list(range(1000))),
}


@pytest.mark.parametrize("order", ORDERS)
def test_outputs_in_another_order_are_mapped_by_the_models_label_names(
    tmp_path, monkeypatch, order
):
    monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: Named(*ORDERS[order]))
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(0, 1000, 9)})
    r = write_folders(tmp_path / "r", {WORDNET[index]: index for index in SUBSETS["r"][::9]})
    (tmp_path / "val").mkdir()
    for number, index in validation_images(20).items():
        (tmp_path / "val" / f"ILSVRC2012_val_{number:08d}_{WORDNET[index]}.JPEG").write_bytes(
            jpeg(index)
        )
    places = [f"v2={folder}", f"r={r}", f"imagenet={tmp_path / 'val'}"]
    found = evaluate(tmp_path, ["v2", "r", "imagenet", "real"], *places, flags=["--allow-partial"])[
        "right"
    ]
    assert {protocol: one["top1"] for protocol, one in found.items()} == dict.fromkeys(
        ("v2", "r-200", "r-1000", "imagenet", "real"), 1.0
    )


@pytest.mark.parametrize(
    "names, words",
    [
        (
            ["house", *map(str, range(1, 1000))],
            r"right cannot be evaluated on v2: 1000 of 1000 classes \('n01440764', .*\) "
            r"mean none of the 1000 outputs "
            r"\('house', '1', .*\): choose another set",
        ),
        (
            ["0", "n01440764", *map(str, range(2, 1000))],
            "label names '0' and 'n01440764' mean the same",
        ),
        (
            dict(enumerate(map(str, range(999)))),
            "right has 1000 outputs and 999 label_names: name them all",
        ),
    ],
)
def test_label_names_that_are_not_imagenets_are_refused(tmp_path, monkeypatch, names, words):
    monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: Named(names, range(1000)))
    with pytest.raises(InputError, match=words):
        evaluate(tmp_path, ["v2"], f"v2={tmp_path}")


# --------------------------------------------------------------------------------------------------
# Folders that are not quite those of the archive


def test_linked_class_folders_are_followed(tmp_path):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(998)})
    write_folders(tmp_path / "elsewhere", {"998": 998, "more": 999})
    for name, target in (("998", "998"), ("999", "more")):
        (folder / name).symlink_to(tmp_path / "elsewhere" / target)
    result = evaluate(tmp_path, ["v2"], f"v2={folder}")["right"]["v2"]
    assert (result["examples"], result["top1"]) == (1000, 1.0)
    before = sets.revision(Pass("v2", ("v2",)), None, str(folder))
    (tmp_path / "elsewhere" / "more" / "new.jpeg").write_bytes(jpeg(999))
    assert sets.revision(Pass("v2", ("v2",)), None, str(folder)) != before


def test_a_link_in_a_circle_is_named(tmp_path):
    folder = write_folders(tmp_path / "v2", {"0": 0})
    (folder / "0" / "up").symlink_to(folder)
    with pytest.raises(
        InputError, match=r"the link .*0/up leads back to a folder that holds it: remove it"
    ):
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])


def test_empty_class_folders_are_named(tmp_path, capsys):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(1000)})
    for name in ("7", "8"):
        (folder / name / f"{name}_0.jpeg").unlink()
    (folder / "8" / "notes.txt").write_text("none")
    shutil.rmtree(folder / "9")
    (folder / "9").symlink_to(tmp_path / "gone")
    words = f"v2: 3 class folders hold no images: {folder}/7, {folder}/8, {folder}/9"
    with pytest.raises(InputError, match=f"{words}: complete it, or evaluate .*--allow-partial"):
        evaluate(tmp_path, ["v2"], f"v2={folder}")
    assert (
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])["right"]["v2"][
            "examples"
        ]
        == 997
    )
    assert f"warning: {words}" in capsys.readouterr().out


@pytest.mark.parametrize("flat", [True, False])
def test_a_class_that_is_none_of_imagenet_rs_200_ends_before_the_first_image(
    tmp_path, monkeypatch, flat
):
    monkeypatch.setattr(eval_robustness, "predict", None)
    r = write_folders(tmp_path / "r", {WORDNET[index]: index for index in SUBSETS["r"]})
    (r / WORDNET[0]).mkdir()
    (r / WORDNET[0] / "a.jpeg").write_bytes(jpeg(0))
    if flat:
        r = tmp_path / "flat"
        r.mkdir()
        (r / f"ILSVRC2012_val_00000001_{WORDNET[0]}.JPEG").write_bytes(jpeg(0))
    with pytest.raises(
        InputError, match="r: the class 'n01440764' is none of ImageNet-R's 200: remove it"
    ):
        evaluate(tmp_path, ["r"], f"r={r}")


def test_what_no_image_may_lack_is_looked_up_before_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(eval_robustness, "predict", None)
    folder = write_folders(tmp_path / "val", {WORDNET[0]: 0})
    with pytest.raises(InputError, match="is not named like ILSVRC2012_val_00000001"):
        evaluate(tmp_path, ["real"], f"imagenet={folder}", flags=["--allow-partial"])
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "ILSVRC2012_val_00000001.JPEG").write_bytes(jpeg(0))
    for benchmark in ("imagenet", "r"):
        place = f"{benchmark}={tmp_path / 'flat'}"
        with pytest.raises(InputError, match="an image has no label"):
            evaluate(tmp_path, [benchmark], place)


@pytest.mark.parametrize("inside", [False, True])
def test_zip_archives_are_read_by_class(tmp_path, inside):
    seen = validation_images(30)
    archive = tmp_path / "val" / "images.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w") as opened:
        for number, index in seen.items():
            opened.writestr(f"val/{WORDNET[index]}/ILSVRC2012_val_{number:08d}.JPEG", jpeg(index))
    place = f"imagenet={archive.parent if inside else archive}"
    found = evaluate(tmp_path, ["imagenet", "real"], place, flags=["--allow-partial"])["right"]
    assert (found["imagenet"]["examples"], found["imagenet"]["top1"], found["real"]["top1"]) == (
        30,
        1.0,
        1.0,
    )
    archive.write_bytes(archive.read_bytes()[:100])
    with pytest.raises(InputError, match=r"cannot read the archive .*images\.zip"):
        evaluate(tmp_path, ["imagenet"], place, flags=["--allow-partial"])


def test_images_of_the_hub_without_bytes_are_opened_where_they_are(tmp_path, monkeypatch):
    archive = tmp_path / "images.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        opened.writestr("val/n01440764/a.jpeg", jpeg(0))
    image = {"bytes": None, "path": f"zip://val/n01440764/a.jpeg::{archive}"}
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=WORDNET)}
    )
    ds = datasets.Dataset.from_dict(
        {"image": [image], "label": [0]}, features=features
    ).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"validation": ds})
    monkeypatch.setattr(sets, "revision", lambda *_: "")
    found = evaluate(tmp_path, ["imagenet"])["right"]["imagenet"]
    assert (found["examples"], found["top1"]) == (1, 1.0)


# --------------------------------------------------------------------------------------------------
# What reaches a model


def test_each_shift_of_the_digits_is_read_as_itself():
    passes, everything = sets.passes(["digits"], {}), digits()
    assert [str(which) for which in passes] == [f"digits:{split}" for split in ("test", *SHIFTS)]
    seen = set()
    for which in passes:
        ds, (split,) = sets.open_set(which, None, False), which.serves
        pixels = np.stack([images.decode(image) for image in ds[:9]["image"]])
        assert (
            pixels == np.stack([np.asarray(image) for image in everything[split][:9]["image"]])
        ).all()
        seen.add(pixels.tobytes())
    assert len(seen) == len(passes)


@pytest.mark.parametrize("flags", [[], ["--img-size", "48"]])
def test_models_evaluate_as_they_are_not_as_they_train(tmp_path, flags):
    _, folder = save_model(
        tmp_path / "best", architecture="vit_tiny_patch16_224", depth=1, img_size=32
    )
    args = eval_robustness.parse(["--model", str(folder), "--benchmarks", "v2", *flags])
    ((model, _),) = eval_robustness.open_models(args).values()
    assert not any(module.training for module in model.modules())


def test_size_crop_and_interpolation_of_the_command_line_reach_the_images(tmp_path, monkeypatch):
    folder, given = write_folders(tmp_path / "v2", {"3": 3}), []
    monkeypatch.setattr(
        loaders,
        "create_transform",
        lambda **options: given.append(options) or create_transform(**options),
    )
    flags = ["--img-size", "24", "--crop-pct", "0.7", "--interpolation", "lanczos"]
    flags += ["--allow-partial"]
    evaluate(tmp_path, ["v2"], f"v2={folder}", flags=flags)
    options = given[-1]
    assert options["input_size"] == (3, 24, 24)
    assert (options["crop_pct"], options["interpolation"]) == (0.7, "lanczos")


# --------------------------------------------------------------------------------------------------
# Images that do not arrive


@pytest.fixture
def with_workers(monkeypatch):
    """Sets are read by worker processes, however small they are."""
    monkeypatch.setattr(loaders, "IMAGES_PER_WORKER", 1)
    return ["--workers", "2", "--batch-size", "8", "--allow-partial"]


def nothing_is_finished(tmp_path):
    return not list((tmp_path / "out").rglob("*.json"))


@pytest.mark.parametrize("lost", [0, 2, -1])
def test_a_pass_that_lost_images_is_an_error_and_saves_nothing(tmp_path, monkeypatch, lost):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(40)})
    whole = eval_robustness.picture_loader

    def leaky(*args):
        batches = list(whole(*args))
        del batches[lost]
        return batches

    monkeypatch.setattr(eval_robustness, "picture_loader", leaky)
    with pytest.raises(
        InputError, match=r"v2: \d+ of 40 images came to be evaluated, .* lower --workers"
    ):
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--batch-size", "8", "--allow-partial"])
    assert nothing_is_finished(tmp_path)


def test_a_stream_that_lost_images_is_an_error_too(tmp_path, monkeypatch):
    """A set that is streamed does not say its size; its workers say what they have sent."""
    place = write_tars(tmp_path / "v2", list(range(40)), list(range(40)))
    whole = eval_robustness.picture_loader
    monkeypatch.setattr(eval_robustness, "picture_loader", lambda *args: list(whole(*args))[1:])
    with pytest.raises(
        InputError, match="images came to be evaluated, and nothing of this pass was saved"
    ):
        evaluate(tmp_path, ["v2"], f"v2={place}", flags=["--batch-size", "8", "--allow-partial"])
    assert nothing_is_finished(tmp_path)


class Killed:
    """A transform that kills its worker."""

    def __call__(self, image):
        os.kill(os.getpid(), 9)


class Stuck:
    """A transform that never ends."""

    def __call__(self, image):
        time.sleep(1000)


class Full:
    """A transform after which there is no shared memory."""

    def __call__(self, image):
        def fail(*_, **__):
            path = "</torch_1_2_3>: No space left on device (28)"
            raise RuntimeError(f"unable to allocate shared memory(shm) for file {path}")

        torch.UntypedStorage._new_shared = fail
        return torch.zeros(3, 16, 16, dtype=torch.uint8)


@pytest.mark.parametrize(
    "transform, words",
    [
        (Killed, "a loader worker was killed, .*: lower --workers"),
        pytest.param(  # the next test waits for its workers
            Stuck,
            r"no batch came from the loader workers .*3 seconds.*: .* try --workers 0",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            Full,
            r"the shared memory \(/dev/shm\) .* is full: lower --workers .*--shm-size",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_worker_that_dies_hangs_or_lacks_memory_is_one_line(
    tmp_path, monkeypatch, with_workers, transform, words
):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(40)})
    monkeypatch.setattr(loaders, "TIMEOUT", 3)
    real = loaders.evaluation_transform
    transforms = iter([real, lambda *_: transform()])  # the first tries the model
    monkeypatch.setattr(loaders, "evaluation_transform", lambda *args: next(transforms)(*args))
    with pytest.raises(RuntimeError) as caught:
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=with_workers)
    assert re.match(words, lost_worker(caught.value))  # which clear_errors prints
    assert nothing_is_finished(tmp_path)


@pytest.mark.slow
def test_workers_put_batches_into_shared_memory_themselves(tmp_path, with_workers):
    """Else a thread of theirs does, whose failure loses the batch without a word."""
    ds = sets.open_set(Pass("v2", ("v2",)), str(write_folders(tmp_path / "v2", {"3": 3})), True)
    pictures = sets.Pictures("v2", ds, create_transform(16, normalize=False), 8)
    seen = []

    def collate(batch):
        collated = eval_robustness.collate(batch)
        if collated["image"] is not None:
            collated["key"] = [str(collated["image"].is_shared())]
        return collated

    options = {"batch_size": None, "num_workers": 1, "collate_fn": collate}
    for batch in torch.utils.data.DataLoader(pictures, **options):
        seen += batch["key"]
    assert seen == ["True"]


# --------------------------------------------------------------------------------------------------
# Results need the disk alone


def test_results_need_no_git_and_are_there_when_pictures_fail(tmp_path, monkeypatch):
    folder = write_folders(tmp_path / "v2", {"3": 3})
    monkeypatch.setenv("PATH", "")

    def fail(*_):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(eval_robustness.report, "draw", fail)
    with pytest.raises(RuntimeError, match="no fonts"):
        evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert saved["results"]["right"]["v2"]["top1"] == 1.0


@pytest.mark.slow
def test_no_home_that_can_be_written_is_needed(tmp_path):
    write_folders(tmp_path / "v2-1", {"3": 3})
    command = [
        sys.executable,
        str(ROOT / "tests" / "oracle.py"),
        str(tmp_path),
        str(tmp_path / "out"),
    ]
    nowhere = {"HF_HOME": "/proc/nowhere", "HOME": "/proc/nowhere"}
    environment = {**os.environ, **nowhere, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "v2-1" / "results.json").exists()


def test_what_is_printed_into_a_file_has_no_redrawn_bar(tmp_path, capfd):
    folder = write_folders(tmp_path / "v2", {str(i): i for i in range(40)})
    evaluate(tmp_path, ["v2"], f"v2={folder}", flags=["--allow-partial"])
    printed = capfd.readouterr()
    assert "\r" not in printed.out + printed.err
    assert len(printed.err.splitlines()) <= 1


# --------------------------------------------------------------------------------------------------
# The size for tests


@pytest.fixture
def tested_larger(monkeypatch):
    """An oracle that was trained on 16 pixels, and is to be tested on 24."""
    oracle = Oracle()
    oracle.pretrained_cfg |= {"test_input_size": (3, 24, 24), "test_crop_pct": 0.9}
    monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: oracle)


@pytest.mark.parametrize(
    "flags, size, crop",
    [
        ([], 24, 0.9),
        (["--img-size", "16"], 16, 0.9),
        (["--img-size", "16", "--crop-pct", "1"], 16, 1),
    ],
)
def test_a_model_is_judged_at_its_size_for_tests_unless_told_otherwise(
    tested_larger, capsys, flags, size, crop
):
    args = eval_robustness.parse(["--model", "right", "--benchmarks", "v2", *flags])
    ((_, config),) = eval_robustness.open_models(args).values()
    assert (config["input_size"], config["crop_pct"]) == ((3, size, size), crop)
    line = "right: evaluated at --img-size 24 --crop-pct 0.9, timm's for tests (as trained: "
    assert (line + "--img-size 16 --crop-pct 1)" in capsys.readouterr().out) is not bool(flags)


def test_a_folder_is_judged_at_the_size_at_which_it_was_trained(tmp_path, capsys):
    """timm's resnet50 has another one for its own tests, which stays in the config."""
    _, folder = save_model(tmp_path / "last")
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"] |= {"test_input_size": [3, 48, 48], "test_crop_pct": 0.9}
    (folder / "config.json").write_text(json.dumps(config))
    args = eval_robustness.parse(["--model", str(folder), "--benchmarks", "v2"])
    ((_, config),) = eval_robustness.open_models(args).values()
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    line = "evaluated at --img-size 32 --crop-pct 1, as trained (timm's for tests: --img-size 48 "
    assert line + "--crop-pct 0.9)" in capsys.readouterr().out


@pytest.mark.parametrize("flags, size", [([], 160), (["--img-size", "96"], 96)])
def test_a_file_is_judged_at_the_size_at_which_it_was_trained_or_at_another_on_request(
    tmp_path, monkeypatch, flags, size
):
    """A ViT is made for one size: its position embeddings are adapted to another."""
    model = timm.create_model("test_vit")
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    create = timm.create_model

    def create_tested_larger(*args, **kwargs):
        opened = create(*args, **kwargs)
        opened.pretrained_cfg |= {"test_input_size": (3, 192, 192)}
        return opened

    monkeypatch.setattr(timm, "create_model", create_tested_larger)
    argv = ["--model", "test_vit", "--checkpoint", str(tmp_path / "vit.safetensors")]
    args = eval_robustness.parse([*argv, "--benchmarks", "v2", *flags])
    ((opened, config),) = eval_robustness.open_models(args).values()
    assert config["input_size"] == (3, size, size)
    assert opened.patch_embed.img_size == (size, size)
