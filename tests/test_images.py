"""Exif's orientation: photographs are turned as datasets and viewers do, ImageNet's are not."""

import io
import multiprocessing

import datasets
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from common import images, loaders
from common.digits import digits
from robustness import sets

WORDNET = ImageNetInfo("imagenet-1k").label_names()


def photograph(orientation=None, size=(40, 24), mode="RGB"):
    """A JPEG that is darker towards the left and redder towards the top, as it is stored."""
    x, y = np.meshgrid(np.linspace(0, 250, size[0]), np.linspace(0, 250, size[1]))
    pixels = np.stack([y, x, np.full_like(x, 60)], -1).astype(np.uint8)
    exif = Image.Exif()
    if orientation is not None:
        exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "jpeg", quality=95, exif=exif)
    return {"bytes": file.getvalue(), "path": "a.jpg"}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_as_datasets_turns_it(orientation):
    encoded = photograph(orientation)
    theirs = datasets.Image().decode_example(encoded)
    assert np.array_equal(images.decode(encoded), theirs)
    stored = np.asarray(images.decode(encoded, turn=False))
    assert np.array_equal(stored, np.asarray(Image.open(io.BytesIO(encoded["bytes"]))))
    assert np.array_equal(stored, np.asarray(theirs)) == (orientation == 1)


@pytest.mark.parametrize("orientation", [None, 0, 9, 99])
def test_a_tag_that_says_nothing_leaves_an_image_as_it_is(orientation):
    encoded = photograph(orientation)
    assert np.array_equal(images.decode(encoded), images.decode(encoded, turn=False))


def test_damaged_tags_cost_no_image():
    whole = photograph(6)["bytes"]
    place = whole.index(b"Exif\0\0") + 6
    damaged = whole[:place] + b"XX" + whole[place + 2 :]
    assert images.decode({"bytes": damaged, "path": "a.jpg"}).size == (40, 24)


@pytest.mark.parametrize("turn", [True, False])
@pytest.mark.parametrize("orientation", [1, 3, 6, 9])
def test_torchcodec_reads_photographs_as_turned_as_pil_does(orientation, turn):
    pytest.importorskip("torchcodec")
    encoded = photograph(orientation)
    unsaid = multiprocessing.get_context("spawn").Lock()
    pixels = images.decode_to_tensor(encoded, unsaid, turn)
    expected = v2.functional.pil_to_tensor(images.decode(encoded, turn))
    assert torch.equal(pixels, expected)


def split_of(names):
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    )
    return datasets.Dataset.from_dict({"image": [photograph(6)], "label": [0]}, features=features)


HUB = [ImageNetInfo("imagenet-1k").index_to_description(i) for i in range(1000)]
HUB[517], HUB[639] = "crane2", "maillot2"


@pytest.mark.parametrize(
    "names, turned",
    [
        (["cat", "dog"], True),
        (["banana", "orange"], True),
        (WORDNET, False),
        (WORDNET[5:9], False),
        (HUB, False),
    ],
    ids=["own", "words", "ImageNet", "part of it", "Hub"],
)
def test_training_turns_all_photographs_but_imagenets(names, turned):
    split, shape = split_of(names), (3, 40, 24) if turned else (3, 24, 40)
    plain = v2.functional.pil_to_tensor
    assert loaders.Images(split, plain).__getitems__([0])[0]["image"].shape == shape
    stream = loaders.Stream(split.to_iterable_dataset(), plain, 1)
    assert next(iter(stream))["image"].shape == (1, *shape)


@pytest.mark.parametrize("name, turned", [("mine", True), ("imagenet", False), ("v2", False)])
def test_an_evaluation_turns_photographs_of_ones_own_alone(name, turned):
    first, _ = sets.Pictures(
        name, split_of(["n01440764", "n01443537"]), v2.functional.pil_to_tensor, 1
    )
    assert first["image"][0].shape == ((3, 40, 24) if turned else (3, 24, 40))


def test_the_digits_have_no_tag_to_turn_them():
    split = digits()["test"].cast_column("image", datasets.Image(decode=False))
    for image in split[:3]["image"]:
        assert np.array_equal(images.decode(image), images.decode(image, turn=False))


def test_a_model_of_one_channel_is_refused_before_the_first_image():
    config = {
        "input_size": (1, 8, 8),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "center",
    }
    with pytest.raises(ValueError, match="takes images of 1 channels, and those here have 3"):
        loaders.transforms(config, scale=(1, 1), ratio=(1, 1), hflip=0)
