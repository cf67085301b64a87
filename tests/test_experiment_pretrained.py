"""experiments/pretrained: which images a run trains on and is judged by."""

import io

import datasets
import numpy as np
from PIL import Image

from common import data
from experiments.pretrained import images


def numbered(count, start=0):
    """An image for each number, as PNG; the number is its colour."""
    rows = []
    for number in range(start, start + count):
        file = io.BytesIO()
        Image.new("RGB", (4, 4), (number // 256, number % 256, 0)).save(file, "png")
        rows.append({"bytes": file.getvalue(), "path": None})
    return rows


def pixels(split):
    return {row["bytes"] for row in split["image"]}


def test_seeds_have_their_own_images_and_none_is_judged_by_what_was_trained_on(
    tmp_path, monkeypatch
):
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"img": datasets.Image(decode=False), "label": label})
    for split, rows in (("train", numbered(60)), ("test", numbered(6, 1000))):
        labels = [number % 2 for number in range(len(rows))]
        made = datasets.Dataset.from_dict({"img": rows, "label": labels}, features)
        made.to_parquet(tmp_path / "cifar" / f"{split}.parquet")
    monkeypatch.setattr(images, "SIZES", (4, 20))
    monkeypatch.setattr(images, "HELD_OUT", 10)
    output = tmp_path / "images"
    images.main(["--dataset", str(tmp_path / "cifar"), "--output", str(output)])

    test = data.load(str(tmp_path / "cifar"))["test"]
    held_out, trained = set(), {}
    for size in (4, 20):
        tuning = data.load(str(output / "tune" / str(size)))
        held_out = pixels(tuning["validation"])
        assert set(tuning) == {"train", "validation"} and len(held_out) == 10
        seeds = [data.load(str(output / str(size) / str(seed))) for seed in images.SEEDS]
        for splits in (tuning, *seeds):
            assert np.bincount(splits["train"]["label"]).tolist() == [size // 2] * 2
            assert len(pixels(splits["train"])) == size
            assert not pixels(splits["train"]) & (held_out | pixels(test))
        assert all(pixels(splits["test"]) == pixels(test) for splits in seeds)
        trained[size] = [frozenset(pixels(splits["train"])) for splits in (tuning, *seeds)]
        assert len(set(trained[size])) == 6
    assert np.bincount(tuning["validation"]["label"]).tolist() == [5, 5]
