"""What a model gets wrong: files and names stay with their images, and what is counted is right."""

import csv

import datasets
import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from helpers import fresh_process
from oracle import COLOUR, jpeg
from sklearn.metrics import confusion_matrix

import eval_robustness
from common import checkpoints, report
from robustness import labels, mistakes, sets
from robustness.sets import Protocol

NAMES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]


class Guesser(torch.nn.Module):
    """Takes an image for the class that its brightness shows; the brighter, the surer."""

    def __init__(self):
        super().__init__()
        self.num_classes = len(NAMES)
        size = {"input_size": (3, 16, 16), "crop_pct": 1.0, "interpolation": "bilinear"}
        self.pretrained_cfg = size | COLOUR | {"label_names": NAMES}
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x):
        mean, std = (torch.tensor(COLOUR[key]).view(3, 1, 1) for key in ("mean", "std"))
        shown = (((x * std + mean) * 255).mean((-2, -1))[:, 0] / 25).floor().clamp(0, 6).long()
        return self.weight * (1 + shown)[:, None] * torch.eye(len(NAMES))[shown]


def write(folder, shown):
    """Images FOLDER/CLASS/NAME.jpeg, by class and name the class that the image shows."""
    for (name, file), number in shown.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / f"{file}.jpeg").write_bytes(jpeg(number))
    return folder


def evaluate(monkeypatch, output, *flags, **places):
    fresh_process()
    monkeypatch.setattr(checkpoints, "open_model", lambda name, **_: Guesser())
    data = [f"{name}={place}" for name, place in places.items()]
    usual = ["--model", "guesser", "--workers", "0", "--batch-size", "2", "--output", str(output)]
    return eval_robustness.main([*usual, *flags, "--data", *data])["guesser"]


SHOWN = {("bee", "b"): 1, ("bee", "a"): 5, ("fox", "x"): 5, ("fox", "y"): 1, ("cat", "z"): 2}


@pytest.mark.pictures
def test_predictions_carry_file_true_and_predicted_class_and_confidence(tmp_path, monkeypatch):
    evaluate(monkeypatch, tmp_path / "out", mine=write(tmp_path / "mine", SHOWN))
    folder = tmp_path / "out" / "predictions" / "guesser"
    rows = pq.read_table(folder / "mine.parquet").to_pylist()
    found = {row["file"]: (row["true"], row["predicted"]) for row in rows}
    assert found == {
        f"{name}/{file}.jpeg": (name, NAMES[number]) for (name, file), number in SHOWN.items()
    }
    for row in rows:
        logits = torch.zeros(7)
        logits[NAMES.index(row["predicted"])] = 1 + NAMES.index(row["predicted"])
        assert row["confidence"] == pytest.approx(logits.softmax(0).max().item())
    lines = list(csv.DictReader((tmp_path / "out" / "per_class.csv").open()))
    shown = {(r["class"], r["images"], r["top1"], r["taken for"], r["times"]) for r in lines}
    assert shown == {
        ("bee", "2", "50.00", "fox", "1"), ("fox", "2", "50.00", "bee", "1"),
        ("cat", "1", "100.00", "", "0"),
    }  # fmt: skip
    for picture in ("mistakes-mine.png", "confusion-mine.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")


def test_a_second_run_reads_what_is_finished_and_pictures_follow_it(tmp_path, monkeypatch, capsys):
    place = write(tmp_path / "mine", SHOWN)
    first = evaluate(monkeypatch, tmp_path / "out", mine=place)
    table = (tmp_path / "out" / "per_class.csv").read_text()
    assert evaluate(monkeypatch, tmp_path / "out", mine=place) == first
    assert "finished before" in capsys.readouterr().out
    assert (tmp_path / "out" / "per_class.csv").read_text() == table
    write(tmp_path / "mine", {key: NAMES.index(key[0]) for key in SHOWN})
    folder = tmp_path / "out" / "predictions" / "guesser"
    for file in folder.glob("*-mine.png"):
        file.write_text("of the images as they were")
    (folder / "confusion-mine.png").write_text("of the images as they were")
    assert evaluate(monkeypatch, tmp_path / "out", mine=place)["mine"]["top1"] == 1
    assert not (folder / "mistakes-mine.png").exists()
    assert not any(file.read_bytes() == b"of the images as they were" for file in folder.iterdir())


def test_the_surest_mistakes_are_those_of_all_processes(monkeypatch):
    mine, other = Protocol("mine"), Protocol("other")
    draw = np.random.default_rng(0).permutation(6 * mistakes.MOST) / 100
    all_of = [[(value, (str(value), "a", "b"), None) for value in own] for own in np.split(draw, 3)]
    processes = [{mine: mistakes.surest(own)} for own in all_of]
    processes[1][other] = all_of[0][:1]  # a protocol that one process alone has
    monkeypatch.setattr(eval_robustness, "gather_object", lambda own: [*own, *processes[1:]])
    own = mistakes.Mistakes()
    own.by_protocol.update(processes[0])
    found = eval_robustness.merge_mistakes(own)
    assert (
        found[mine] == mistakes.surest([*all_of[0], *all_of[1], *all_of[2]])
        and found[other] == all_of[0][:1]
    )
    assert [len(set(map(str, found[mine])) & set(map(str, part))) for part in all_of].count(0) == 0


def test_no_table_or_picture_of_another_result_stays(tmp_path, monkeypatch):
    """Those of predictions stay: they are of the sets and not of one command."""

    def left(output):
        return {p.name for p in output.iterdir() if p.is_file()}

    place, other = (write(tmp_path / name, SHOWN) for name in ("mine", "other"))
    evaluate(monkeypatch, tmp_path / "out", "--csv", "--corrupt", mine=place, other=other)
    (tmp_path / "out" / "effective_robustness.png").touch()
    own = {"results-kept.csv", "accuracy.txt", "corrupted-mine.csv"}  # whoever put them there
    for name in own:
        (tmp_path / "out" / name).touch()
    (tmp_path / "out" / "corrupted-run").mkdir()
    before = left(tmp_path / "out") - own
    evaluate(monkeypatch, tmp_path / "out", mine=place)
    evaluate(monkeypatch, tmp_path / "fresh", mine=place)
    assert left(tmp_path / "out") == left(tmp_path / "fresh") | own
    assert (tmp_path / "out" / "corrupted-run").is_dir()
    assert {name.split(".")[0] for name in before - left(tmp_path / "fresh")} == {
        "results-mine", "results-other", "effective_robustness", "corrupted-mine", "corrupted-other"
    }  # fmt: skip


def test_images_without_a_file_name_are_called_by_their_number(monkeypatch):
    ds = datasets.Dataset.from_dict(
        {"image": [{"bytes": jpeg(5), "path": None}], "label": [1]},
        features=datasets.Features(
            {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)}
        ),
    )
    which, args = sets.Pass("mine", ("mine",)), eval_robustness.parse(["--model", "guesser"])
    args.workers = 0
    fresh_process()
    config = Guesser().pretrained_cfg | {"crop_mode": "center"}
    accelerator = eval_robustness.Accelerator(cpu=True)
    tables, wrong, _ = eval_robustness.predict(accelerator, Guesser(), config, which, ds, args)
    assert tables[Protocol("mine")]["file"].tolist() == [None]
    ((_, text, image),) = wrong[Protocol("mine")]
    assert text == ("image 0", "bee", "fox") and image.shape == (16, 16, 3)


@pytest.mark.parametrize("outside", [False, True])
def test_confusions_are_those_of_scikit_learn(outside):
    rng = np.random.default_rng(0)
    label, prediction = rng.choice([1, 4, 5], 200), rng.choice([1, 4, 5, 3 if outside else 4], 200)
    classes, counts = mistakes.confusions({"label": label, "prediction": prediction})
    expected = confusion_matrix(label, prediction, labels=[1, 4, 5])
    assert classes.tolist() == [1, 4, 5] and (counts[:, :3] == expected).all()
    assert counts[:, 3].tolist() == [((label == c) & (prediction == 3)).sum() for c in classes]
    for name, images, top1, other, times in mistakes.per_class(
        {"label": label, "prediction": prediction}, NAMES
    ):
        row = np.bincount(prediction[label == NAMES.index(name)], minlength=7)
        assert images == row.sum() and float(top1) == pytest.approx(
            100 * row[NAMES.index(name)] / images, abs=0.005
        )
        row[NAMES.index(name)] = -1
        assert times == row.max() and row[NAMES.index(other)] == times


def test_the_surest_mistakes_are_kept_whatever_the_batches():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(100).round(2), rng.random(100) < 0.3
    wrong, columns = mistakes.Mistakes(), {}
    images = torch.arange(100, dtype=torch.uint8).view(100, 1, 1, 1).expand(100, 3, 2, 2)
    for start in range(0, 100, 7):
        part = range(start, min(start + 7, 100))
        columns.setdefault("confidence", []).extend(confidence[part].tolist())
        columns.setdefault("top1", []).extend(right[part].tolist())
        for name in ("file", "true", "predicted", "key"):
            columns.setdefault(name, []).extend(f"{i:02d}" for i in part)
        batch = torch.full((2 * len(part), 3, 2, 2), 255, dtype=torch.uint8)
        batch[1::2] = images[part.start : part.stop]  # the others have no right answer
        wrong.add("p", batch, list(range(1, 2 * len(part), 2)), columns)
    order = sorted((i for i in range(100) if not right[i]), key=lambda i: (-confidence[i], i))
    assert [image[0, 0, 0] for *_, image in wrong.by_protocol["p"]] == order[: mistakes.MOST]


def test_a_picture_names_whatever_the_files_and_classes_are_called(tmp_path, monkeypatch, recwarn):
    figures, save = [], report.save
    monkeypatch.setattr(
        report, "save", lambda f, *rest, **o: (figures.append(f), save(f, *rest, **o))
    )
    monkeypatch.setattr(plt, "close", lambda figure: None)
    image, long = np.zeros((8, 8, 3), np.uint8), "n01440764 " + "long " * 30 + ", tinca"
    file = f"cost $1$ to $2_{'x' * 200}.jpg"
    mistakes.draw_mistakes([(0.987, (file, long, "犬"), image)] * 20, "$a_", tmp_path / "m.png")
    texts = figures[0].axes[0].get_title().split("\n")
    assert texts[0] == "cost $1$ to ...xxxxxxxx.jpg" and texts[2] == "taken for 犬, 98.7 %"
    assert texts[1] == "is long long long long l..."
    table = {"label": np.arange(40) % 40, "prediction": np.zeros(40, int), "top1": np.zeros(40)}
    assert mistakes.draw_confusions(table, [long] * 40, "$a_", tmp_path / "c.png")
    assert (tmp_path / "m.png").stat().st_size < 2e6 and not recwarn.list


@pytest.mark.parametrize("classes, drawn", [(1, False), (2, True), (40, True), (41, False)])
def test_confusions_of_many_classes_are_no_picture(tmp_path, classes, drawn):
    table = {"label": np.arange(classes), "prediction": np.arange(classes)}
    names = list(map(str, range(classes)))
    assert mistakes.draw_confusions(table, names, "", tmp_path / "c.png") == drawn
    assert (tmp_path / "c.png").exists() == drawn


def test_imagenets_classes_are_read_as_words():
    assert labels.readable("n01440764") == "n01440764 tench, Tinca tinca"
    assert mistakes.short("n01440764 tench, Tinca tinca") == "tench"
    assert labels.readable("ant") == mistakes.short("ant") == "ant"


def test_sets_with_several_right_answers_have_no_line_for_each_class():
    several = {"label": np.array([1, -1]), "prediction": np.array([1, 1])}
    one = {"label": np.array([1, 2]), "prediction": np.array([1, 1])}
    tables = {
        "m": {Protocol("real"): several, Protocol("v2"): one, Protocol("v2", "blur", "1"): one}
    }
    assert [str(protocol) for _, protocol, _ in mistakes.one_answer_each(tables)] == ["v2"]
