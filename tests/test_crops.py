"""Crops of large JPEG files: timm's crop, from fewer decoded pixels."""

import argparse
import io
import random

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from timm.data import create_transform
from timm.data.transforms import RandomResizedCropAndInterpolation

from common import data, images, loaders
from common.crops import CropOfFile
from common.errors import InputError


def photograph(width, height, format="JPEG", mode="RGB", orientation=None):
    """An undecoded image: smooth, with a corner of each colour, so that its place can be told."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = 30 * np.sin(60 * x) * np.sin(45 * y)
    pixels = np.stack([200 * x + waves, 200 * y + waves, 100 + 0 * x], -1) + 30
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, format, exif=exif, **({"quality": 90} if format == "JPEG" else {}))
    return {"bytes": file.getvalue(), "path": "photograph.jpg"}


def crops(image, seed, scale=(0.05, 1.0), interpolation="bilinear", turn=True):
    """The crop of the file and timm's crop of the decoded image, and the next random number."""
    crop = RandomResizedCropAndInterpolation((64, 48), scale, interpolation=interpolation)
    results = []
    for make in (CropOfFile(crop, turn), lambda file: crop(images.decode(file, turn))):
        random.seed(seed)
        results.append((np.asarray(make(image)).astype(int), random.random()))
    return results


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_an_image_that_is_not_large_comes_out_bit_for_bit(interpolation):
    for width, height in ((190, 255), (191, 500), (60, 40), (4000, 255)):
        image = photograph(width, height)
        for seed in range(20):
            (own, after), (timms, afterwards) = crops(image, seed, interpolation=interpolation)
            assert np.array_equal(own, timms) and after == afterwards


def test_imagenets_photographs_come_out_bit_for_bit():
    transform = create_transform(224, is_training=True, color_jitter=None, normalize=False)
    crop = transform.transforms[0]
    for size in ((500, 375), (375, 500), (895, 895), (4000, 895)):
        image = photograph(*size)
        for seed in range(5):
            random.seed(seed)
            own = CropOfFile(crop, False)(image)
            random.seed(seed)
            assert np.array_equal(own, crop(images.decode(image, False)))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(2016, 1512), (1513, 2017), (900, 1001)])
def test_the_crop_of_a_large_photograph_is_the_same_place(size, interpolation):
    image = photograph(*size)
    reduced = 0
    for seed in range(20):
        (own, after), (timms, afterwards) = crops(image, seed, interpolation=interpolation)
        assert own.shape == timms.shape == (64, 48, 3) and after == afterwards
        reduced += not np.array_equal(own, timms)
        assert np.abs(own - timms).mean() < 1.0
        # A pixel of the output spans this much of the colours that tell the place.
        assert np.abs((own - timms).mean((0, 1))).max() < 0.5
    assert reduced > 5


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_large_photograph_is_turned_and_its_crop_is_that_of_the_upright_one(orientation):
    image = photograph(1999, 1501, orientation=orientation)
    reduced = 0
    for turn in (True, False):
        for seed in range(5):
            (own, after), (timms, afterwards) = crops(image, seed, turn=turn)
            assert after == afterwards and np.abs(own - timms).mean() < 1.5
            reduced += not np.array_equal(own, timms)
    assert reduced


@pytest.mark.parametrize("format, mode", [("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB")])
def test_other_kinds_of_images_are_read_as_ever(format, mode):
    image = photograph(1600, 1200, format, mode)
    for seed in range(5):
        (own, after), (timms, afterwards) = crops(image, seed)
        assert after == afterwards and np.abs(own - timms).mean() < 1.5
        assert format == "JPEG" or np.array_equal(own, timms)


def test_fewer_pixels_are_decoded_but_twice_the_outputs(monkeypatch):
    sizes, resize = [], Image.Image.resize

    def seen(self, size, resample=None, box=None, **options):
        if box is not None:
            sizes.append((self.size, box))
        return resize(self, size, resample, box, **options)

    monkeypatch.setattr(Image.Image, "resize", seen)
    image = photograph(2016, 1512)
    for share in (0.04, 0.2, 1.0):
        crops(image, 0, scale=(share, share))
    assert {width for (width, _), _ in sizes} == {2016 // 2, 2016 // 4, 2016 // 8}
    for _, (left, top, right, bottom) in sizes:
        assert right - left >= 2 * 48 and bottom - top >= 2 * 64


def test_what_cannot_be_read_is_named():
    crop = CropOfFile(RandomResizedCropAndInterpolation(8), True)
    large = photograph(1600, 1200)
    for image in (None, {"bytes": large["bytes"][:5000], "path": "photograph.jpg"}):
        with pytest.raises(InputError, match="cannot read the image"):
            crop(image)


def test_training_draws_the_same_crops_and_flips(tmp_path, accelerator):
    for i, size in enumerate([(300, 200), (2016, 1512), (1200, 1601), (250, 255)]):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"class{i % 2}" / f"{i}.jpg").write_bytes(photograph(*size)["bytes"])
    split = data.image_folder(str(tmp_path))
    config = {"input_size": (3, 64, 64), "interpolation": "bilinear", "crop_pct": 1.0}
    config["crop_mode"] = "center"
    transform, _ = loaders.transforms(config, scale=(0.05, 1.0), ratio=(0.75, 1.3), hflip=0.5)
    whole = loaders.Images(split, transform, seed=7)
    args = argparse.Namespace(batch_size=4, seed=7, decoder="pil", workers=0)
    _, batches = loaders.train_batches(args, accelerator, split, transform, 4)
    for epoch in range(4):
        sampler = loaders.EpochSampler(4, 4, 7)
        sampler.set_epoch(epoch)
        keys = list(sampler)
        (batch,) = batches(epoch, 0)
        for pixels, expected in zip(batch["image"], whole.__getitems__(keys)):
            difference = (pixels.int() - expected["image"].int()).abs().float().mean()
            assert difference < 1.5  # a flip or another place would be tens


@pytest.mark.parametrize("hflip", [0.0, 0.3, 1.0])
def test_small_images_are_bit_for_bit_those_of_timms_own_transforms(tmp_path, hflip):
    kinds = [("JPEG", "RGB", None), ("JPEG", "L", 6), ("PNG", "RGB", None), ("JPEG", "RGB", 3)]
    for i, (format, mode, orientation) in enumerate(kinds):
        (tmp_path / f"class{i % 2}").mkdir(exist_ok=True)
        file = photograph(42 + i, 32, format, mode, orientation)["bytes"]
        (tmp_path / f"class{i % 2}" / f"{i}.{format.lower()}").write_bytes(file)
    split = data.image_folder(str(tmp_path))
    config = {"input_size": (3, 32, 32), "interpolation": "bicubic", "crop_pct": 1.0}
    config["crop_mode"] = "center"
    transform, _ = loaders.transforms(config, scale=(0.05, 1.0), ratio=(0.75, 1.3), hflip=hflip)
    decode, rest = loaders._decoder(argparse.Namespace(decoder="pil"), split, transform)
    keys = [(epoch, index) for epoch in range(20) for index in range(4)]
    own = loaders.Images(split, rest, 7, decode).__getitems__(keys)
    for example, expected in zip(own, loaders.Images(split, transform, 7).__getitems__(keys)):
        assert example["image"].dtype is torch.uint8
        assert torch.equal(example["image"], expected["image"])


def test_a_jpeg_whose_orientation_is_in_its_xmp_alone_is_turned():
    file = io.BytesIO()
    Image.new("RGB", (30, 20)).save(file, "JPEG", xmp=b'<x tiff:Orientation="6"/>')
    assert images.decode({"bytes": file.getvalue(), "path": None}).size == (20, 30)
