"""scikit-learn's handwritten digits as images with a spurious colour, and five shifts of them."""

import functools

import datasets
import numpy as np
from PIL import Image, ImageFilter

SHIFTS = ("recoloured", "rotated", "sketch", "occluded", "noisy")
# Ten hues of like brightness, one for each digit: the spurious feature of the training images.
TINTS = np.array(
    [
        [230, 60, 60], [60, 190, 60], [80, 110, 240], [210, 190, 40], [200, 70, 210],
        [50, 190, 200], [240, 140, 40], [150, 150, 150], [120, 80, 200], [130, 170, 50],
    ]
)  # fmt: skip


@functools.cache
def digits(seed: int = 0) -> datasets.DatasetDict:
    """scikit-learn's 1797 handwritten digits as 32 x 32 RGB.

    They are train (900 images), validation (200), test (697) and five shifts of test. Each digit is
    tinted; the tint is that of its class half of the time and of another class otherwise. The
    shifts are recoloured (always another class's tint), rotated (up to 30 degrees and 2 pixels),
    sketch (an edge map), occluded (a grey square) and noisy. They are the same for the same seed.
    """
    # Here, since it takes a second that only the digits are worth.
    from sklearn.datasets import load_digits

    rng = np.random.RandomState(seed)  # its stream is frozen across NumPy's versions
    raw = load_digits()
    order = rng.permutation(len(raw.target))
    small = [Image.fromarray((raw.images[i] * 15.9375).astype(np.uint8)) for i in order]
    grey = [image.resize((32, 32), Image.BICUBIC) for image in small]
    labels = raw.target[order]
    others = (labels + rng.randint(1, 10, len(labels))) % 10
    tints = np.where(rng.rand(len(labels)) < 0.5, labels, others)
    plain = [_tint(image, tint) for image, tint in zip(grey, tints)]
    label = datasets.ClassLabel(names=[str(i) for i in range(10)])
    features = datasets.Features({"image": datasets.Image(), "label": label})

    def split(images, rows):
        columns = {"image": images, "label": labels[rows]}
        return datasets.Dataset.from_dict(columns, features=features)

    rows = slice(1100, None)
    shifted = {
        "recoloured": [_tint(image, tint) for image, tint in zip(grey[rows], others[rows])],
        "rotated": [_rotate(image, rng) for image in plain[rows]],
        "sketch": [_sketch(image) for image in grey[rows]],
        "occluded": [_occlude(image, rng) for image in plain[rows]],
        "noisy": [_add_noise(image, rng) for image in plain[rows]],
    }
    first = {"train": slice(900), "validation": slice(900, 1100), "test": rows}
    splits = {name: split(plain[rows], rows) for name, rows in first.items()}
    splits |= {name: split(images, rows) for name, images in shifted.items()}
    return datasets.DatasetDict(splits)


def _tint(grey, tint):
    return Image.fromarray((np.asarray(grey)[..., None] / 255 * TINTS[tint]).astype(np.uint8))


def _rotate(image, rng):
    angle, (dx, dy) = rng.uniform(-30, 30), rng.randint(-2, 3, 2)
    return image.rotate(angle, Image.BILINEAR, translate=(int(dx), int(dy)))


def _sketch(grey):
    shape = grey.point(lambda value: 255 * (value > 96))  # its outline is one sharp line
    return shape.filter(ImageFilter.FIND_EDGES).convert("RGB")


def _occlude(image, rng):
    pixels, (x, y) = np.array(image), rng.randint(4, 19, 2)
    pixels[y : y + 10, x : x + 10] = 128
    return Image.fromarray(pixels)


def _add_noise(image, rng):
    noisy = np.asarray(image) + rng.normal(0, 50, (32, 32, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
