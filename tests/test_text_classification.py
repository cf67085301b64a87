"""examples/text_classification.py on a tiny model and sentences of its own."""

import csv
import json
import random
import re
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", reason="needs transformers: pip install -r examples/requirements.txt"
)
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import text_classification  # noqa: E402

WORDS = {"animal": ["cat", "dog", "cow"], "tool": ["saw", "nail", "drill"]}
FILLERS = ["the", "a", "one", "red", "big"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny BERT, and a tokenizer of the words above."""
    folder = tmp_path_factory.mktemp("model")
    words = ["[PAD]", "[UNK]", *FILLERS, *WORDS["animal"], *WORDS["tool"]]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    widths = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=len(words), **widths, intermediate_size=16)
    transformers.BertModel(config).save_pretrained(folder)
    return str(folder)


def write(folder, labels=("animal", "tool"), columns=("text", "label"), splits=("train", "test")):
    folder.mkdir(exist_ok=True)
    draw = random.Random(0)
    for split in splits:
        with (folder / f"{split}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            for _ in range(120):
                kind = draw.choice(["animal", "tool"])
                words = [*draw.choices(FILLERS, k=draw.randint(1, 4)), draw.choice(WORDS[kind])]
                writer.writerow([" ".join(words), labels[kind == "tool"]])
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("labels", [("animal", "tool"), (0, 1), (5, 9)])
def test_table(tmp_path, model, labels, capsys):
    data = write(tmp_path / "data", labels)
    arguments = "--method base obf --rho 0.1 --seeds 0 1 --epochs 6 --lr 1e-2 --batch-size 8"
    output = tmp_path / "models"
    command = ["--model", model, "--dataset", data, *arguments.split(), "--output", str(output)]
    text_classification.main(command)
    lines = capsys.readouterr().out.splitlines()[-3:]
    assert re.fullmatch(r"method +rho +seeds +test +seconds", lines[0])
    for line, (method, rho) in zip(lines[1:], (("base", "0"), ("obf", "0.1"))):
        found = re.fullmatch(rf"{method} +{rho} +2 +([\d.]+) ± [\d.]+ +\d+", line)
        assert float(found[1]) > 90
    config = json.loads((output / "obf-1" / "config.json").read_text())
    assert list(config["id2label"].values()) == [str(label) for label in labels]
    classify = transformers.pipeline("text-classification", str(output / "obf-1"), device="cpu")
    assert classify("the red cow")[0]["label"] == str(labels[0])


def test_seeds_and_methods_differ_and_repeat(tmp_path, model):
    splits, names = text_classification.load(write(tmp_path / "data"))

    def nll(**options):
        options = {"method": "base", "rho": 0.0, "epochs": 1, "lr": 1e-2, **options}
        return text_classification.fine_tune(model, splits, names, **options)["test"]["nll"]

    first = nll()
    assert nll() == first
    others = [nll(seed=1), nll(method="sam", rho=0.1), nll(method="obf", rho=0.1)]
    others += [nll(method="obf", rho=0.1, gamma=0.0), nll(method="asam", rho=0.1)]
    assert len({first, *others}) == 6


def test_every_flag_reaches_fine_tuning(tmp_path, monkeypatch):
    seen = []

    def fine_tune(model, splits, names, **options):
        seen.append({"model": model, **options})
        return {"test": {"accuracy": 0.5}, "seconds": 1.0}

    monkeypatch.setattr(text_classification, "fine_tune", fine_tune)
    command = ["--dataset", write(tmp_path / "data"), "--model", "mine", "--method", "obf", "sam"]
    options = {"rho": 0.2, "gamma": 0.3, "epochs": 2, "lr": 3e-3, "batch_size": 7}
    options |= {"max_length": 9, "output": tmp_path / "out"}
    for key, value in options.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    known = vars(text_classification.parse(command))
    assert known.keys() - options.keys() == {"model", "dataset", "method", "seeds"}
    text_classification.main([*command, "--seeds", "4", "6"])
    expected = [
        {"model": "mine", **options, "method": method, "seed": seed, "output": output}
        for method in ("obf", "sam")
        for seed in (4, 6)
        for output in [tmp_path / "out" / f"{method}-{seed}"]
    ]
    assert seen == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--method sam --gamma 0.5", "--gamma is of --method obf"),
        ("--method base --rho 0.5", "--rho has no effect on --method base"),
        ("--method sam --rho 0", "--rho 0.0 must be above 0"),
        ("--method sam --rho nan", "--rho nan must be above 0"),
        ("--method obf --gamma 2", "--gamma 2.0 must be from 0 to 1"),
        ("--epochs 0", "--epochs 0 must be at least 1"),
        ("--batch-size 0", "--batch-size 0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(flags, message, capsys):
    with pytest.raises(SystemExit):
        text_classification.parse(["--dataset", "x", *flags.split()])
    assert message in capsys.readouterr().err


def test_data_that_does_not_fit(tmp_path):
    named = write(tmp_path / "named", columns=("sentence", "label"))
    with pytest.raises(SystemExit, match="sentence, label; rename two to text and label"):
        text_classification.load(named)
    with pytest.raises(SystemExit, match="has the splits train: it needs train, and one to judge"):
        text_classification.load(write(tmp_path / "alone", splits=("train",)))
    with pytest.raises(SystemExit, match=r"train\.csv is a file: give its folder"):
        text_classification.load(str(tmp_path / "alone" / "train.csv"))
    other = tmp_path / "other"
    write(other, splits=("train",))
    write(other, labels=("animal", "machine"), splits=("test",))
    with pytest.raises(SystemExit, match="test: train has no label 'machine'; remove such rows"):
        text_classification.load(str(other))


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    "row, message",
    [
        (("the cat", -1), "the label of a row is -1, which is none; remove such rows"),
        (("the cat", ""), "the label of a row is empty; remove such rows"),
        (("", 1), "the text of a row is empty; remove such rows"),
    ],
)
def test_a_row_without_a_label_or_text_is_no_class_of_its_own(tmp_path, split, row, message):
    place = write(tmp_path / "data", labels=(0, 1))
    with (tmp_path / "data" / f"{split}.csv").open("a", newline="") as file:
        csv.writer(file).writerow(row)
    with pytest.raises(SystemExit, match=f"{split}: {message}"):
        text_classification.load(place)


@pytest.mark.parametrize("none", [-1, ""])
def test_a_split_without_labels_is_not_judged_and_that_is_said(tmp_path, none, capsys):
    place = write(tmp_path / "data", labels=(0, 1), splits=("train", "validation"))
    write(tmp_path / "data", labels=(none, none), splits=("test",))
    splits, names = text_classification.load(place)
    assert set(splits) == {"train", "validation"} and names == ["0", "1"]
    assert "test: not judged, since its rows have no labels" in capsys.readouterr().out
