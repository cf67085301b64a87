"""Datasets by name: the bundled digits, folders, and what a user reads when data is bad."""

import argparse
import io
import itertools
import os
import random
import runpy
import shutil
import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate import Accelerator
from helpers import write_cifar100, write_folder
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import create_transform

import train_imagenet
from common import data, images, loaders
from common import digits as digits_module
from common.errors import InputError
from robustness import sets


@pytest.fixture(scope="module")
def digits():
    return digits_module.digits()


def pixels(ds):
    ds = ds.cast_column("image", datasets.Image(decode=False))
    pictures = loaders.Images(ds, lambda image: torch.from_numpy(np.array(image)))
    return torch.stack([example["image"] for example in pictures.__getitems__(range(len(ds)))])


def test_digits_have_the_splits_sizes_and_types_of_the_design(digits):
    sizes = {
        "train": 900,
        "validation": 200,
        "test": 697,
        **dict.fromkeys(digits_module.SHIFTS, 697),
    }
    assert {name: len(split) for name, split in digits.items()} == sizes
    assert digits_module.SHIFTS == ("recoloured", "rotated", "sketch", "occluded", "noisy")
    for split in digits.values():
        assert split.features["label"].names == [str(i) for i in range(10)]
        assert pixels(split).shape == (len(split), 32, 32, 3)


def test_digits_use_every_image_of_scikit_learn_once(digits):
    """A tint scales a grey image: divided by its brightest channel, the shape is left."""
    rows = (
        torch.cat([pixels(digits[split]) for split in ("train", "validation", "test")])
        .float()
        .amax(-1)
    )
    shapes = (rows / rows.amax((1, 2), keepdim=True)).flatten(1)
    raw = load_digits()
    resized = [
        np.asarray(Image.fromarray((i * 15.9375).astype(np.uint8)).resize((32, 32), Image.BICUBIC))
        for i in raw.images
    ]
    originals = torch.tensor(np.array(resized)).float().flatten(1)
    originals = originals / originals.amax(1, keepdim=True)
    labels = np.concatenate([digits[split]["label"] for split in ("train", "validation", "test")])
    nearest = torch.cdist(shapes, originals).argmin(1).numpy()
    assert len(np.unique(nearest)) == len(np.unique(originals.numpy(), axis=0)) == 1797
    assert (raw.target[nearest] == labels).all()


def tints(images):
    """Which tint each image has: that nearest in hue to its brightest pixel."""
    flat = images.flatten(1, 2).float()
    brightest = flat[torch.arange(len(flat)), flat.sum(-1).argmax(1)]
    known = torch.tensor(digits_module.TINTS).float()
    cosine = torch.nn.functional.cosine_similarity(brightest[:, None], known[None], dim=-1)
    assert cosine.amax(1).min() > 0.999
    return cosine.argmax(1).numpy()


def test_tint_agrees_with_the_class_half_of_the_time_and_never_when_recoloured(digits):
    for split in ("train", "test"):
        labels = np.array(digits[split]["label"])
        agreement = (tints(pixels(digits[split])) == labels).mean()
        assert abs(agreement - 0.5) < 3 * 0.5 / len(labels) ** 0.5
    assert (tints(pixels(digits["recoloured"])) != np.array(digits["recoloured"]["label"])).all()


def test_shifts_change_every_image_and_keep_its_label(digits):
    plain = pixels(digits["test"]).float()
    for shift in digits_module.SHIFTS:
        assert digits[shift]["label"] == digits["test"]["label"]
        changed = (pixels(digits[shift]).float() - plain).flatten(1).abs().amax(1) > 20
        # A tint that was another class's already stays in "recoloured"; a turn may be small.
        assert changed.float().mean() > (0.4 if shift == "recoloured" else 0.95)
    occluded = (pixels(digits["occluded"]) == 128).all(-1).flatten(1).sum(1)
    assert (occluded >= 100).all()


def test_squares_lie_everywhere_and_rotations_mix_colours(digits):
    places = set()
    for image in pixels(digits["occluded"]):
        rows, columns = (image == 128).all(-1).nonzero().T
        if len(rows) == 100:  # no grey pixel beside the square
            assert rows.max() - rows.min() == columns.max() - columns.min() == 9
            places |= {("top", rows.min().item()), ("left", columns.min().item())}
    assert places == {(side, place) for side in ("top", "left") for place in range(4, 19)}
    plain, rotated = (pixels(digits[split]) for split in ("test", "rotated"))
    mixed = []  # the nearest pixel alone would give no colour that was not there
    for before, after in zip(plain, rotated):
        colours = [
            {tuple(colour) for colour in image.reshape(-1, 3).tolist()} for image in (before, after)
        ]
        mixed.append(len(colours[1] - colours[0]) > 20)
    assert np.mean(mixed) > 0.8


def test_digits_are_deterministic_by_seed(digits):
    made_anew = digits_module.digits.__wrapped__
    again, other = made_anew(), made_anew(seed=1)
    for split in digits:
        first, same, differing = (
            splits[split].cast_column("image", datasets.Image(decode=False))["image"][:]
            for splits in (digits, again, other)
        )
        assert first == same and first != differing


def test_folder_loads_with_class_names_and_decodes_to_rgb(tmp_path):
    root = write_folder(tmp_path)
    Image.new("L", (20, 20), 7).save(root / "train" / "cat" / "grey.png")
    Image.new("RGBA", (20, 20), (1, 2, 3, 4)).save(root / "train" / "cat" / "alpha.png")
    splits = data.load(str(root))
    assert list(splits) == ["train", "validation"]
    assert splits["train"].features["label"].names == ["cat", "dog"]
    examples = loaders.Images(splits["train"], create_transform(8, normalize=False)).__getitems__(
        range(8)
    )
    assert torch.stack([example["image"] for example in examples]).shape == (8, 3, 8, 8)
    assert all(example["image"].dtype == torch.uint8 for example in examples)
    assert sorted(example["label"] for example in examples) == [0] * 5 + [1] * 3


def test_folder_named_relative_to_the_working_directory_loads(tmp_path, monkeypatch):
    write_folder(tmp_path / "my" / "images")
    monkeypatch.chdir(tmp_path)
    assert {name: len(ds) for name, ds in data.load("my/images").items()} == {
        "train": 6,
        "validation": 6,
    }


def test_folder_with_a_class_called_like_a_split_keeps_its_splits_apart(tmp_path):
    """CIFAR-100 has a class "train"; datasets' own search would train on the test images of it."""
    root = write_folder(tmp_path / "a[1] *", ("train", "val", "test"), ("cat", "train", "test"))
    loaded = data.load(str(root))
    assert set(loaded) == {"train", "validation", "test"}
    for split, folder in (("train", "train"), ("validation", "val"), ("test", "test")):
        names = loaded[split].features["label"].names
        found = {(row["image"]["path"], names[row["label"]]) for row in loaded[split]}
        assert found == {(str(path), path.parent.name) for path in (root / folder).glob("*/*.png")}


def test_hub_columns_are_found_by_type_and_unlabelled_splits_left_out(monkeypatch):
    def ds(labels):
        features = {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["a", "b"]),
            "id": datasets.Value("int64"),
        }
        columns = {"img": [Image.new("RGB", (4, 4))] * 2, "fine_label": labels, "id": [5, 6]}
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    hub = datasets.DatasetDict(train=ds([0, 1]), validation=ds([1, 0]), test=ds([-1, -1]))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: hub)
    splits = data.load("somebody/something")
    assert {name: split.column_names for name, split in splits.items()} == {
        "train": ["image", "label"],
        "validation": ["image", "label"],
    }
    assert splits["validation"]["label"] == [1, 0]


def test_local_copy_of_cifar_loads_with_fine_labels_and_test_held_out(tmp_path):
    splits = data.load(str(write_cifar100(tmp_path)))
    assert {name: len(ds) for name, ds in splits.items()} == {"train": 12, "test": 6}
    assert splits["train"].column_names == ["image", "label"]
    assert splits["train"].features["label"].num_classes == 100
    assert splits["train"]["label"][:4] == [0, 1, 2, 0]


def test_random_transforms_depend_on_seed_epoch_and_index_alone(digits):
    split = digits["train"].cast_column("image", datasets.Image(decode=False))
    transform = create_transform(
        16, is_training=True, scale=(0.1, 1), normalize=False, color_jitter=None
    )

    def look(seed, keys):
        return [
            example["image"]
            for example in loaders.Images(split, transform, seed).__getitems__(keys)
        ]

    state, torch_state = random.getstate(), torch.get_rng_state()
    first = look(0, [(3, 5), (3, 6), (3, 7)])
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    random.random(), torch.rand(1)
    torch.testing.assert_close(look(0, [(3, 7), (3, 5)]), [first[2], first[0]], rtol=0, atol=0)
    for other in (look(0, [(4, 5)]), look(1, [(3, 5)])):
        assert not torch.equal(other[0], first[0])


def test_sampler_gives_each_epoch_its_own_order_in_whole_batches():
    sampler = loaders.EpochSampler(10, batch_size=4, seed=0)
    first = list(sampler)
    assert len(sampler) == len(first) == len(set(first)) == 8
    assert first == list(sampler) != list(loaders.EpochSampler(10, batch_size=4, seed=1))
    sampler.set_epoch(1)
    second = list(sampler)
    assert {epoch for epoch, _ in second} == {1} and [i for _, i in first] != [i for _, i in second]


# --------------------------------------------------------------------------------------------------
# Streams


def stream(examples=60, shards=6, **options):
    """Numbered images, whose transform gives the number."""
    images = [{"bytes": png(i), "path": None} for i in range(examples)]
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=3)}
    )
    ds = datasets.Dataset.from_dict(
        {"image": images, "label": [i % 3 for i in range(examples)]}, features=features
    )
    transform = options.pop("transform", lambda image: torch.tensor(image.getpixel((0, 0))[0]))
    return loaders.Stream(ds.to_iterable_dataset(num_shards=shards), transform, 5, **options)


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (value, 0, 0)).save(file, "png")
    return file.getvalue()


def take(ds, workers, batches=None):
    loader = torch.utils.data.DataLoader(ds, batch_size=None, num_workers=workers)
    return [batch["image"].tolist() for batch in itertools.islice(loader, batches)]


@pytest.mark.parametrize("workers, shards", [(0, 3), (0, 5), (2, 4), (1, 1)])
def test_processes_and_workers_share_a_stream_without_overlap(workers, shards):
    """Also where the shards do not divide evenly, and in each epoch in another way."""
    orders = []
    for epoch in range(3):
        seen = []
        for process in range(2):
            ds = stream(training=True, process=process, processes=2, shards=shards)
            ds.epoch, lap = epoch, 60 // 2 // 5
            batches = take(ds, workers, lap)
            assert batches == take(ds, workers, lap)  # the same again
            seen += itertools.chain.from_iterable(batches)
        assert sorted(seen) == list(range(60))
        assert seen != sorted(seen)
        orders.append(seen)
    assert orders[0] != orders[1]
    assert (
        shards == 1 or len({frozenset(order[:30]) for order in orders}) > 1
    )  # a process has others every time


def test_no_seed_epoch_process_batch_or_place_shares_its_draws_with_another():
    """Seed 0's epoch 1 is not seed 1's epoch 0, say."""
    draw = {"transform": lambda image: torch.rand(2, dtype=torch.float64)}
    drawn = []
    for seed, epoch, process in itertools.product(range(3), range(3), range(2)):
        ds = stream(training=True, seed=seed, process=process, processes=2, **draw)
        ds.epoch = epoch
        for batch in itertools.islice(ds, 4):
            drawn += [tuple(draws.tolist()) for draws in batch["image"]]
    assert len(set(drawn)) == len(drawn) == 18 * 4 * 5
    split, drawn = datasets.Dataset.from_dict({"image": [0, 0], "label": [0, 0]}), []
    for seed, epoch in itertools.product(range(3), range(3)):
        options = {"decode": lambda image: image}
        examples = loaders.Images(split, draw["transform"], seed, **options)
        for example in examples.__getitems__([(epoch, 0), (epoch, 1)]):
            drawn.append(tuple(example["image"].tolist()))
    assert len(set(drawn)) == len(drawn) == 18


def test_no_seed_and_epoch_share_their_order_with_another():
    orders = []
    for seed, epoch in itertools.product(range(3), range(3)):
        sampler = loaders.EpochSampler(60, 5, seed)
        sampler.set_epoch(epoch)
        orders.append(tuple(index for _, index in sampler))
        ds = stream(training=True, seed=seed)
        ds.epoch = epoch
        orders.append(tuple(itertools.chain.from_iterable(take(ds, 0, 12))))
    assert len(set(orders)) == len(orders) == 18


def test_every_image_of_a_stream_is_seen_alike_often_over_the_epochs():
    """ImageNet's 294 shards and 16 x 8 readers: what each reader takes of the shards' order."""
    shards, shares, size, epochs = 294, 128, 640, 8
    numbers, counts = np.arange(size) % shares, np.zeros((shards, size), int)
    for epoch in range(epochs):
        order = np.random.default_rng([0, epoch]).permutation(shards)
        for share in range(shares):
            portions = loaders.portions(share, shares, shards)
            assert sum(high - low for _, low, high in portions) == shards  # of shards x shares
            for place, low, high in portions:
                counts[order[place]] += (low <= numbers) & (numbers < high)
    assert (counts == epochs).all()


def test_the_number_of_workers_does_not_change_a_stream():
    noisy = {"transform": lambda image: torch.tensor([image.getpixel((0, 0))[0], torch.rand(())])}
    whole = take(stream(training=True, **noisy), 0, 20)
    for workers in (1, 2, 4):
        assert take(stream(training=True, **noisy), workers, 20) == whole
    with pytest.raises(ValueError, match="3 workers cannot share 4 readers"):
        take(stream(training=True), 3, 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_stream_goes_on_after_any_batch_as_if_never_interrupted(workers):
    noisy = {
        "transform": lambda image: torch.tensor(
            [image.getpixel((0, 0))[0], random.random(), torch.rand(())]
        )
    }
    whole = take(stream(training=True, **noisy), workers, 20)
    for first in (1, 2, 5, 13):
        rest = stream(training=True, **noisy)
        rest.first = first
        assert take(rest, workers, 20 - first) == whole[first:]
    other = stream(training=True, **noisy)
    other.epoch = 1
    assert take(other, workers, 20) != whole


def test_stream_for_evaluation_ends_after_every_example_in_order():
    assert list(itertools.chain.from_iterable(take(stream(examples=13), 0))) == list(range(13))


def test_streamed_dataset_keeps_the_splits_that_are_used(digits):
    splits = data.load("digits", streaming=True)
    assert list(splits) == ["train", "validation"]
    assert len(list(splits["validation"])) == 200


def test_shards_of_a_streamed_folder_hold_images_of_many_classes(tmp_path):
    """Else a stream's buffer, which is filled from few shards, would hold few classes."""
    root = write_folder(tmp_path, images=64)
    train = data.load(str(root), streaming=True)["train"]
    shards = [[row["label"] for row in train.shard(64, i)] for i in range(64)]
    assert sorted(itertools.chain(*shards)) == [0] * 64 + [1] * 64
    assert sum(len(set(labels)) == 2 for labels in shards) > 16  # of two images each


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "folder, split, other", [("val", "validation", "train"), ("train", "train", "validation")]
)
def test_class_missing_from_a_split_is_named(tmp_path, folder, split, other):
    root = write_folder(tmp_path)
    shutil.rmtree(root / folder / "dog")
    with pytest.raises(
        InputError, match=rf"1 of 2 classes have images in {other} but none in {split} \('dog'\)"
    ):
        data.load(str(root))


def test_folder_without_validation_says_what_to_add(tmp_path):
    root = write_folder(tmp_path, splits=("train",))
    with pytest.raises(InputError, match="no validation or test split, only train"):
        data.load(str(root))


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match=f"^{tmp_path} holds no images: put them in .*/train/"):
        data.load(str(tmp_path))


@pytest.mark.parametrize(
    "name, words",
    [
        ("{0}/photoz", "there is no folder .*/photoz: did you mean .*/photos?"),
        (
            "{0}/elsewhere/photos",
            "there is no folder .*/elsewhere/photos, and it is no name of a dataset",
        ),
        ("./pictures", "there is no folder ./pictures, and it is no name of a dataset"),
        ("mine/photoz", "did you mean mine/photos?"),
    ],
)
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, name, words):
    (tmp_path / "photos").mkdir()
    (tmp_path / "mine" / "photos").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", None)
    with pytest.raises(InputError, match=words.replace("?", r"\?")):
        data.load(name.format(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not an image", None])
def test_unreadable_image_is_named(tmp_path, content):
    root = write_folder(tmp_path)
    bad = root / "train" / "cat" / "bad.png"
    whole = (root / "train" / "cat" / "train_cat_0.png").read_bytes()
    bad.write_bytes(whole[: len(whole) // 2] if content is None else content)
    ds = data.load(str(root))["train"]
    with pytest.raises(InputError, match=str(bad)):
        loaders.Images(ds, create_transform(8)).__getitems__(range(len(ds)))


@pytest.mark.parametrize(
    "error, words",
    [
        (
            datasets.exceptions.DatasetNotFoundError(
                "Dataset 'a/b' is a gated dataset on the Hub."
            ),
            "accept its terms",
        ),
        (
            datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist"),
            "no such dataset on the Hub",
        ),
        (ConnectionError("Couldn't reach the Hub"), "cannot be reached"),
        (
            RuntimeError("Dataset scripts are no longer supported, but found b.py"),
            "no longer supported",
        ),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch, error, words):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=words) as caught:
        data.load("a/b")
    assert "'a/b'" in str(caught.value)


@pytest.mark.parametrize("label", [-1, 2, None])
def test_label_out_of_range_is_named(monkeypatch, label):
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    table = pa.table(
        {"image": [{"bytes": png(i), "path": None} for i in range(3)], "label": [0, 1, label]}
    )
    ds = datasets.Dataset(table.cast(features.arrow_schema)).cast(features)
    hub = datasets.DatasetDict(train=ds, validation=ds)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: hub)
    stream = loaders.Stream(ds.to_iterable_dataset(), lambda image: torch.zeros(1), batch_size=3)
    with pytest.raises(
        InputError, match=rf"the stream has the label {label}; labels must lie in 0..1"
    ):
        list(stream)
    with pytest.raises(InputError, match=rf"train has the label {label}; labels must lie in 0..1"):
        data.load("a/b")


def test_columns_that_do_not_fit_are_listed(monkeypatch):
    text = datasets.DatasetDict(train=datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: text)
    with pytest.raises(InputError, match=r"text \(Value\), label \(Value\)"):
        data.load("a/b")


@pytest.mark.parametrize("held_out", ["validation", "test"])
def test_a_share_of_the_training_images_becomes_validation_and_the_held_out_split_test(
    tmp_path, held_out
):
    write_folder(tmp_path, splits=("train", held_out), images=8)
    whole, divided = data.load(str(tmp_path)), data.load(str(tmp_path), validation_share=0.25)
    assert {split: len(ds) for split, ds in divided.items()} == {
        "train": 12,
        "validation": 4,
        "test": 16,
    }
    assert sorted(divided["validation"]["label"]) == [0, 0, 1, 1]
    paths = {split: {image["path"] for image in ds["image"]} for split, ds in divided.items()}
    assert paths["train"] | paths["validation"] == {
        image["path"] for image in whole["train"]["image"]
    }
    assert paths["test"] == {image["path"] for image in whole[held_out]["image"]}
    again = data.load(str(tmp_path), validation_share=0.25)
    assert again["validation"]["image"] == divided["validation"]["image"]


def test_a_share_of_the_training_images_that_are_not_held_out_is_trained_on(tmp_path, capsys):
    write_folder(tmp_path, splits=("train", "val"), images=16)
    whole = data.load(str(tmp_path), validation_share=0.25)
    part = data.load(str(tmp_path), validation_share=0.25, train_share=0.25)
    assert part["train"]["label"].count(0) == part["train"]["label"].count(1) == 3
    images = {split: [image["path"] for image in whole[split]["image"]] for split in whole}
    kept = {split: [image["path"] for image in part[split]["image"]] for split in part}
    assert set(kept["train"]) < set(images["train"])
    assert kept["validation"] == images["validation"] and kept["test"] == images["test"]
    assert "6 training images, without 18 (--train-share 0.25)" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"train_share 0\.25 does not apply, as a stream cannot be divided"
    ):
        data.load(str(tmp_path), streaming=True, train_share=0.25)


def test_a_share_that_cannot_be_held_out_is_refused(tmp_path):
    write_folder(tmp_path, splits=("train", "val"), images=3)
    with pytest.raises(InputError, match=r"cannot divide .* by validation_share 0\.01"):
        data.load(str(tmp_path), validation_share=0.01)
    with pytest.raises(InputError, match="a stream cannot be divided"):
        data.load(str(tmp_path), streaming=True, validation_share=0.5)
    with pytest.raises(InputError, match="there are validation and test already"):
        data.load("digits", validation_share=0.5)


# --------------------------------------------------------------------------------------------------
# Folders of images


def test_linked_class_folders_and_files_are_read_as_what_they_lead_to(tmp_path):
    write_folder(tmp_path / "there", ("train", "val"), ("ant", "bee", "cow"))
    for split in ("train", "val"):
        (tmp_path / "here" / split / "ant").mkdir(parents=True)
        for name in ("bee", "cow"):
            (tmp_path / "here" / split / name).symlink_to(tmp_path / "there" / split / name)
        for file in (tmp_path / "there" / split / "ant").iterdir():
            (tmp_path / "here" / split / "ant" / file.name).symlink_to(file)
    for streaming in (False, True):
        splits = data.load(str(tmp_path / "here"), streaming)
        for split in splits.values():
            assert split.features["label"].names == ["ant", "bee", "cow"]
            assert sorted(row["label"] for row in split) == [0] * 3 + [1] * 3 + [2] * 3
    linked = data.image_folder(tmp_path / "here" / "train")
    assert pixels(linked).equal(pixels(data.image_folder(tmp_path / "there" / "train")))


def test_broken_links_empty_classes_and_folders_in_a_class_are_named(tmp_path):
    root = write_folder(tmp_path)
    cases = {
        "owl": lambda path: path.symlink_to(tmp_path / "nowhere"),
        "yak": lambda path: path.mkdir(),
        "zoo": lambda path: (path / "inner").mkdir(parents=True),
    }
    for name, make in cases.items():
        make(root / "train" / name)
        with pytest.raises(
            InputError, match=rf"hold no images \({root}/train/{name}.*: add images"
        ):
            data.load(str(root))
        (root / "train" / name / "inner").rmdir() if name == "zoo" else None
        (root / "train" / name).unlink() if name == "owl" else (root / "train" / name).rmdir()
    with pytest.raises(InputError, match=f"{root}/val/cat/val_cat_0.png lies in no class folder"):
        data.image_folder(root / "val" / "cat")
    with pytest.raises(InputError, match=r"cannot list .*nowhere: No such file"):
        data.image_folder(tmp_path / "nowhere")


def test_files_that_are_left_out_are_one_line(tmp_path, capfd):
    root = write_folder(tmp_path)
    data.load(str(root))
    assert capfd.readouterr() == ("", "")
    for name in (
        "train/cat/notes.txt",
        "train/cat/.hidden.png",
        "train/dog/a.PNG.part",
        "train/README",
    ):
        (root / name).touch()
    (root / "holdout").mkdir()
    shutil.copy(root / "train" / "cat" / "train_cat_0.png", root / "train" / "cat" / "UPPER.PNG")
    assert {split: len(ds) for split, ds in data.load(str(root)).items()} == {
        "train": 7,
        "validation": 6,
    }
    assert capfd.readouterr().err.splitlines() == [
        f"{root}: not read, as they are called like no split: holdout",
        f"{root}/train: left out 4 files, hidden or not named like an image: "
        f".hidden.png, README, a.PNG.part, ...",
    ]


def test_names_of_classes_and_files_are_not_taken_for_splits(tmp_path):
    """``datasets`` finds a train split of one image in these."""
    for name in ("n02917067_bullet_train", "n1_test"):
        for split in ("train", "val"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{name}_{i}.JPEG")
    loaded = data.load(str(tmp_path))
    assert {split: len(ds) for split, ds in loaded.items()} == {"train": 4, "validation": 4}
    assert loaded["train"].features["label"].names == ["n02917067_bullet_train", "n1_test"]
    script = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "loader.py"))
    args = argparse.Namespace(folder=tmp_path / "train", batch_size=2, workers=0)
    epoch = script["ours"](args, Accelerator(), "pil")(0)
    assert sum(len(images) for images in epoch) == 4


def test_a_folder_is_listed_without_writing_and_in_linear_time(tmp_path, capfd):
    def load(images):
        root = tmp_path / str(images)
        for split in ("train", "val"):
            for name in ("a", "b"):
                (root / split / name).mkdir(parents=True)
                for i in range(images // 4):
                    (root / split / name / f"{i}.jpg").touch()
        before = cached()
        start = time.monotonic()
        loaded = data.load(str(root), validation_share=0.5)
        seconds = time.monotonic() - start
        assert sum(map(len, loaded.values())) == images and cached() == before
        return seconds

    load(40)
    assert load(8000) < 5  # 0.1 s on an idle core; datasets' own reader takes 2
    assert capfd.readouterr() == ("", "")  # no bars


def cached():
    return sorted(Path(os.environ["HF_HOME"]).rglob("*"))


def test_a_copy_of_a_hub_dataset_is_read_without_bars_and_its_images_are_not_written_again(
    tmp_path, capfd
):
    folder = write_cifar100(tmp_path, train=300, test=30) / "cifar100"
    for file in list(folder.iterdir()):
        ds = datasets.Dataset.from_parquet(str(file))
        ds = ds.map(lambda row: {"img": {"bytes": png(0) + bytes(10_000), "path": None}})
        ds.to_parquet(file)
    capfd.readouterr()
    data.load(str(folder))  # copies it into the cache, once
    before = {path: path.stat().st_size for path in cached() if path.is_file()}
    splits = data.load(str(folder), validation_share=0.1)
    assert {split: len(ds) for split, ds in splits.items()} == {
        "train": 270,
        "validation": 30,
        "test": 30,
    }
    written = sum(path.stat().st_size - before.get(path, 0) for path in cached() if path.is_file())
    assert written < 100_000  # of 3 MB
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()


@pytest.mark.parametrize("layout", ["train", ""])
def test_a_share_is_held_out_of_a_folder_without_other_splits(tmp_path, layout):
    root = write_folder(tmp_path, splits=(layout,), images=8)
    divided = data.load(str(root), validation_share=0.25)
    assert {split: len(ds) for split, ds in divided.items()} == {"train": 12, "validation": 4}
    assert sorted(divided["validation"]["label"]) == [0, 0, 1, 1]
    found = {image["path"] for ds in divided.values() for image in ds["image"]}
    assert found == {str(path) for path in (root / layout).glob("*/*.png")}
    with pytest.raises(InputError, match=r"hold out .*validation_share"):
        data.load(str(root))


def test_pointing_at_a_split_asks_for_the_folder_around_it(tmp_path, monkeypatch):
    root = write_folder(tmp_path)
    with pytest.raises(
        InputError, match=rf"train is one split of a dataset: did you mean {root}\?"
    ):
        data.load(str(root / "train"))
    monkeypatch.chdir(root)
    with pytest.raises(InputError, match="did you mean"):
        data.load("val")


def test_flat_test_images_have_no_labels_and_are_left_out_in_one_line(tmp_path, capfd):
    """As in the archive of ImageNet-1k."""
    root = write_folder(tmp_path)
    (root / "test").mkdir()
    Image.new("RGB", (4, 4)).save(root / "test" / "ILSVRC2012_test_00000001.JPEG")
    assert set(data.load(str(root))) == {"train", "validation"}
    assert (
        capfd.readouterr().err == f"{root}/test: not read, as it has no images in class folders\n"
    )
    shutil.move(root / "test", root / "eval")
    write_folder(root, splits=("test",))
    with pytest.raises(InputError, match="test and eval would both be the split test"):
        data.load(str(root))


SMALL = ["--model", "test_resnet", "--img-size", "32", "--epochs", "1", "--batch-size", "4"]
SMALL += ["--m", "2", "--workers", "0"]


def test_a_run_without_other_splits_reports_validation_alone(tmp_path):
    """It chooses its best epoch there; a dry run writes nothing, in the caches neither."""
    root, before = write_folder(tmp_path / "images", splits=("",), images=8), cached()
    flags = ["--dataset", str(root), "--validation-share", "0.25"]
    flags += ["--output", str(tmp_path / "run"), *SMALL]
    train_imagenet.main([*flags, "--dry-run"])
    assert not (tmp_path / "run").exists() and cached() == before
    assert set(train_imagenet.main(flags)) == {"validation"}
    assert (tmp_path / "run" / "best" / "model.safetensors").exists()


def test_images_of_a_stream_may_lie_in_an_archive(tmp_path):
    """``datasets`` streams those of the Hub as a path, "zip://..." or "hf://...", without bytes."""
    root = write_folder(tmp_path / "images")
    archive = shutil.make_archive(tmp_path / "archive", "zip", root)
    whole = data.load(str(root))["train"]
    inside = [
        f"zip://{Path(image['path']).relative_to(root)}::{archive}" for image in whole["image"]
    ]
    columns = {"image": [{"bytes": None, "path": path} for path in inside], "label": whole["label"]}
    ds = datasets.Dataset.from_dict(columns, features=whole.features).to_iterable_dataset(
        num_shards=2
    )
    (batch,) = loaders.Stream(ds, lambda image: torch.from_numpy(np.array(image)), len(whole))
    assert (
        torch.equal(batch["image"], pixels(whole)) and batch["label"].tolist() == whole["label"][:]
    )
    with pytest.raises(
        InputError, match=r"cannot read the image zip://none\.png::.*replace or remove it"
    ):
        images.decode({"bytes": None, "path": f"zip://none.png::{archive}"})


# --------------------------------------------------------------------------------------------------
# Images of every kind


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return {"bytes": file.getvalue(), "path": f"a.{kind}"}


@pytest.mark.parametrize("kind", ["png", "tiff", "ppm"])
def test_16_bits_a_pixel_become_8_without_being_cut_off(kind):
    values = np.array([[0, 128, 129, 257, 30000, 65535]], dtype=np.uint16)
    rgb = np.asarray(images.decode(file_of(Image.fromarray(values), kind)))
    assert (rgb == (values / 257).round()[..., None]).all()
    big_endian = Image.frombytes("I;16B", (6, 1), values.astype(">u2").tobytes())
    if kind == "tiff":
        assert (np.asarray(images.decode(file_of(big_endian, kind))) == rgb).all()


@pytest.mark.parametrize("mode, dtype", [("I", np.int32), ("F", np.float32)])
def test_pixels_without_a_known_range_of_values_are_refused(mode, dtype):
    with pytest.raises(
        InputError, match=r"a\.tiff: replace or remove it .*32 bits a pixel have no known range"
    ):
        images.decode(file_of(Image.fromarray(np.array([[0, 1]], dtype)), "tiff"))


def test_every_other_mode_gives_the_colour_that_was_saved():
    red, palette = Image.new("RGB", (4, 4), (200, 0, 0)), Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    files = {
        (200, 0, 0): [
            file_of(red.convert("RGBA"), "png"), file_of(palette, "png", transparency=1),
            file_of(palette, "png", transparency=bytes([0, 9])),
            file_of(palette, "gif", transparency=1),
            file_of(red.convert("CMYK"), "tiff"), file_of(red.convert("YCbCr"), "tiff"),
            file_of(red, "webp", lossless=True),
        ],
        (90, 90, 90): [
            file_of(Image.new("LA", (4, 4), (90, 0)), "png"),
            file_of(Image.new("L", (4, 4), 90), "jpeg"),
            file_of(Image.new("L", (4, 4), 90), "png", transparency=90),
        ],
        (255, 255, 255): [file_of(Image.new("1", (4, 4), 1), "png")],
    }  # fmt: skip
    for colour, encoded in files.items():
        for image in encoded:
            decoded = images.decode(image)
            assert decoded.mode == "RGB"
            assert np.abs(np.asarray(decoded).astype(int) - colour).max() <= 2
    cmyk = np.asarray(images.decode(file_of(red.convert("CMYK"), "jpeg", quality=100)))
    assert np.abs(cmyk.astype(int) - (200, 0, 0)).max() <= 3


def damaged(kind):
    """Files for which PIL raises neither OSError nor ValueError."""
    if kind == "dds":
        file = bytearray(file_of(Image.new("RGBA", (4, 4)), "dds", pixel_format="DXT5")["bytes"])
        file[84:88] = b"ZZZZ"  # the name of its compression
    else:
        file = bytearray(file_of(Image.new("L", (4, 4)), "bmp")["bytes"])
        file[18:26] = (30_000).to_bytes(4, "little") * 2  # the size that it claims to have
    return bytes(file)


@pytest.mark.parametrize(
    "kind, error", [("bmp", "DecompressionBombError"), ("dds", "NotImplementedError")]
)
def test_whatever_pil_raises_names_the_image(tmp_path, kind, error):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(damaged(kind))
    for image in ({"bytes": damaged(kind), "path": path.name}, {"bytes": None, "path": str(path)}):
        with pytest.raises(InputError, match=rf"cannot read the image .*a\.{kind}: .*{error}"):
            images.decode(image)
    ds = datasets.Dataset.from_dict(
        {"image": [{"bytes": damaged(kind), "path": None}], "label": [0]}
    )
    batch, _ = sets.Pictures("digits", ds, create_transform(8), 1)
    assert batch["unreadable"] == ["image 0"] and not batch["key"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # PIL's, of images that are large or truncated
@pytest.mark.parametrize("kind", ["tiff", "bmp", "dds", "jpeg2000", "webp", "gif", "png"])
def test_a_damaged_file_is_read_or_named(kind):
    rng = np.random.default_rng(0)
    whole = file_of(Image.fromarray(rng.integers(0, 255, (8, 9, 3), dtype=np.uint8)), kind)["bytes"]
    refused = 0
    for _ in range(1500):
        file = bytearray(whole[: rng.integers(1, len(whole)) if rng.random() < 0.2 else None])
        for place in rng.integers(0, min(len(file), 200), rng.integers(1, 4)):
            file[place] = rng.integers(256)
        try:
            assert images.decode({"bytes": bytes(file), "path": None}).mode == "RGB"
        except InputError:
            refused += 1
    assert refused > 100


def test_a_fault_of_a_transform_is_not_taken_for_one_of_the_image():
    def transform(image):
        raise TypeError("a fault of the program")

    with pytest.raises(TypeError, match="a fault of the program"):
        next(iter(stream(transform=transform)))


@pytest.mark.parametrize("streaming", [False, True])
def test_class_folders_inside_an_archive_are_to_be_unpacked(tmp_path, streaming):
    """datasets 5 takes the folder that the archive lies in for the class of all its images."""
    write_folder(tmp_path / "images")
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for split, name in (("train", "train"), ("val", "validation")):
        shutil.make_archive(
            str(tmp_path / "copy" / "data" / name), "zip", tmp_path / "images" / split
        )
    with pytest.raises(
        InputError, match=r"class folders inside an archive are not understood: unpack it"
    ):
        splits = data.load(str(tmp_path / "copy"), streaming=streaming)
        next(iter(loaders.Stream(splits["train"], None, 2)))
