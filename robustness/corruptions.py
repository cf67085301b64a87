"""Corruptions of any images: torchvision's transforms, in three severities, seeded by image."""

import math
import zlib

import torch
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional


def _noise(image, sigma):
    return functional.gaussian_noise(image, 0.0, sigma)


def _blur(image, share):
    sigma = share * min(image.shape[-2:])
    size = 2 * math.ceil(3 * sigma) + 1
    # One after the other: a square kernel takes torchvision ten times as long.
    for kernel in ([size, 1], [1, size]):
        image = functional.gaussian_blur(image, kernel, [sigma, sigma])
    return image


def _pixelate(image, factor):
    height, width = image.shape[-2:]
    size = [round(height / factor), round(width / factor)]
    small = functional.resize(image, size, antialias=True)
    return functional.resize(small, [height, width], InterpolationMode.NEAREST)


def _rotate(image, degrees):
    sign = 1 if torch.rand(()) < 0.5 else -1
    return functional.rotate(image, sign * degrees, InterpolationMode.BILINEAR)


def _occlude(image, share):
    (height, width), side = image.shape[-2:], round(share * min(image.shape[-2:]))
    top, left = (int(torch.rand(()) * (size - side + 1)) for size in (height, width))
    grey = torch.full((3, 1, 1), 128, dtype=image.dtype)
    return functional.erase(image, top, left, side, side, grey)


# By name: what it does, with the strength of each severity.
CORRUPTIONS = {
    "noise": (_noise, (0.05, 0.1, 0.2)),  # Gaussian; standard deviation, of the range of values
    "blur": (_blur, (0.01, 0.02, 0.03)),  # Gaussian; standard deviation, of the side
    "pixelate": (_pixelate, (2, 3, 4)),  # side of a pixel, in those before
    "jpeg": (functional.jpeg, (25, 10, 5)),  # quality, of 100
    "contrast": (functional.adjust_contrast, (0.5, 0.3, 0.1)),  # what is left of it
    "brightness": (functional.adjust_brightness, (1.5, 2.0, 3.0)),  # factor of all values
    "saturation": (functional.adjust_saturation, (0.5, 0.2, 0.0)),  # what is left of it
    "rotate": (_rotate, (10, 20, 30)),  # degrees, to either side
    "occlude": (_occlude, (0.25, 0.4, 0.55)),  # a grey square somewhere; its side, of the image's
}
SEVERITIES = (1, 2, 3)
STRENGTHS = {name: list(strengths) for name, (_, strengths) in CORRUPTIONS.items()}


def seed_of(image: Image.Image) -> int:
    """The seed of an image: a checksum of its pixels before a model's preprocessing."""
    return zlib.crc32(image.tobytes())


def corrupt(image: torch.Tensor, corruption: str, severity: int, seed: int) -> torch.Tensor:
    """A corrupted copy of an image as a model takes it, after its resize and crop.

    ImageNet-C's are made so too.

    Args:
        image: uint8 (3, height, width).
        corruption: one of ``CORRUPTIONS``.
        severity: one of ``SEVERITIES``.
        seed: the image's, ``seed_of``: what is drawn depends on it, the corruption and the severity
            alone.
    """
    function, strengths = CORRUPTIONS[corruption]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(zlib.crc32(f"{corruption} {severity}".encode(), seed))
        return function(image, strengths[severity - 1])


# Top-1 error of AlexNet by corruption of ImageNet-C, mean of the five severities (Hendrycks and
# Dietterich 2019).
ALEXNET = {
    "gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640,
    "defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948,
    "zoom_blur": 0.798360, "snow": 0.866816, "frost": 0.826572, "fog": 0.819324,
    "brightness": 0.564592, "contrast": 0.853204, "elastic_transform": 0.646056,
    "pixelate": 0.717840, "jpeg_compression": 0.606500,
}  # fmt: skip


def mce(top1: dict[str, dict[str, float]]) -> float | None:
    """The mean corruption error: a model's error over AlexNet's, mean of ImageNet-C's 15.

    ``top1`` is in [0, 1], by corruption and severity; the result is None if one of the 15 lacks one
    of the five severities.
    """
    if any(len(top1.get(name, ())) != 5 for name in ALEXNET):
        return None
    ratios = [(1 - sum(top1[name].values()) / 5) / error for name, error in ALEXNET.items()]
    return sum(ratios) / len(ratios)
