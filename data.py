"""Datasets by name, and the images and labels a model sees: the bundled digits, a local folder, or the Hub."""

import io
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import create_transform

SHIFTS = ("recoloured", "rotated", "sketch", "occluded", "noisy")
# Ten hues of like brightness, one for each digit: the spurious feature of the training images.
TINTS = np.array(
    [
        [230, 60, 60], [60, 190, 60], [80, 110, 240], [210, 190, 40], [200, 70, 210],
        [50, 190, 200], [240, 140, 40], [150, 150, 150], [120, 80, 200], [130, 170, 50],
    ]
)  # fmt: skip


class InputError(ValueError):
    """Something that the user can mend; the scripts print its message and no traceback."""


def load(name: str) -> datasets.DatasetDict:
    """Return every split of a dataset, each with the columns ``image`` (bytes or a path, undecoded) and ``label``.

    Args:
        name: "digits" (bundled with scikit-learn, never downloaded), a folder of images as ``SPLIT/CLASS/FILE``, or a
            dataset of the Hub such as "ILSVRC/imagenet-1k". Validation splits may be called as ``datasets`` knows
            them ("val", "valid", ...).

    Raises:
        InputError: it cannot be loaded, has no training or validation split, or classes without validation images.
    """
    if name == "digits":
        splits = digits()
    elif Path(name).expanduser().is_dir():
        splits = _load("imagefolder", name, data_dir=str(Path(name).expanduser()))
    else:
        splits = _load(name, name)
    splits = {split: _standard_columns(ds, name) for split, ds in splits.items()}
    # ImageNet's test split has no labels: -1 throughout.
    splits = datasets.DatasetDict({split: ds for split, ds in splits.items() if ds.unique("label") != [-1]})
    for split in ("train", "validation"):
        if split not in splits:
            raise InputError(
                f"{name!r} has no {split} split, only {', '.join(splits)}: put its images in {name}/{split}"
            )
    _check_classes(splits, name)
    return splits


def _load(builder, name, **options):
    try:
        return datasets.load_dataset(builder, **options)
    except datasets.exceptions.DatasetNotFoundError as error:
        if "gated" in str(error):
            page = f"https://huggingface.co/datasets/{name}"
            raise InputError(
                f"{name!r} is gated: accept its terms at {page}, then run `hf auth login` with a token of that account"
            ) from error
        raise InputError(
            f"there is no folder {name!r} and no such dataset on the Hub (or it is private, and you are not logged in: "
            f"`hf auth login`). Use 'digits', a folder with train/ and validation/, or OWNER/NAME"
        ) from error
    except ConnectionError as error:
        raise InputError(
            f"there is no folder {name!r} here, and the Hub cannot be reached to look there: {error}"
        ) from error
    except (datasets.exceptions.DatasetsError, RuntimeError, ValueError, OSError) as error:
        raise InputError(f"cannot load {name!r}: {str(error).strip() or type(error).__name__}") from error


def _standard_columns(ds, name):
    images = [column for column, feature in ds.features.items() if isinstance(feature, datasets.Image)]
    labels = [column for column, feature in ds.features.items() if isinstance(feature, datasets.ClassLabel)]
    if "label" in labels:
        labels = ["label"]
    if len(images) != 1 or len(labels) != 1:
        columns = ", ".join(f"{column} ({type(feature).__name__})" for column, feature in ds.features.items())
        raise InputError(f"{name!r} must have one image column and one class label column; its columns are {columns}")
    ds = ds.select_columns([images[0], labels[0]]).rename_columns({images[0]: "image", labels[0]: "label"})
    # Decoding is left to Images, which can then name an unreadable file.
    return ds.cast_column("image", datasets.Image(decode=False))


def _check_classes(splits, name):
    names = splits["train"].features["label"].names
    present = {split: set(splits[split].unique("label")) for split in ("train", "validation")}
    for split, other in (("validation", "train"), ("train", "validation")):
        missing = sorted(present[other] - present[split])
        if missing:
            shown = ", ".join(repr(names[i]) for i in missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise InputError(
                f"{name!r}: {len(missing)} of {len(names)} classes have images in {other} but none in {split} "
                f"({shown}): add images of them to {split}, or remove them from {other}"
            )


class Images:
    """A ``datasets`` transform: decode, convert to RGB and apply ``transform``; gives ``image`` and ``label``.

    Raises:
        InputError: an image cannot be read; the message has its file name.
    """

    def __init__(self, transform):
        self.transform = transform

    def __call__(self, batch):
        images = [self.transform(self._decode(image)) for image in batch["image"]]
        return {"image": images, "label": torch.tensor(batch["label"])}

    @staticmethod
    def _decode(image):
        try:
            with Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]) as opened:
                return opened.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:  # what PIL raises for broken files
            raise InputError(
                f"cannot read the image {image['path'] or '(without a file name)'}: replace or remove it"
            ) from error


def transforms(config: dict, *, scale, ratio, hflip: float):
    """timm's training and evaluation transforms for a model's data config (``timm.data.resolve_data_config``)."""
    shared = {key: config[key] for key in ("input_size", "interpolation", "mean", "std")}
    train = create_transform(**shared, is_training=True, scale=scale, ratio=ratio, hflip=hflip, color_jitter=None)
    evaluation = create_transform(**shared, crop_pct=config["crop_pct"], crop_mode=config["crop_mode"])
    return train, evaluation


def digits(seed: int = 0) -> datasets.DatasetDict:
    """scikit-learn's 1797 handwritten digits as 32 x 32 RGB: train 900, validation 200, test 697, five shifts of test.

    Each digit is tinted; the tint is that of its class half of the time and of another class otherwise. The shifts are
    recoloured (always another class's tint), rotated (up to 30 degrees and 2 pixels), sketch (an edge map), occluded (a
    grey square) and noisy. They are the same for the same seed.
    """
    from sklearn.datasets import load_digits

    rng = np.random.RandomState(seed)  # its stream is frozen across NumPy's versions
    raw = load_digits()
    order = rng.permutation(len(raw.target))
    grey = [Image.fromarray((raw.images[i] * 15.9375).astype(np.uint8)).resize((32, 32), Image.BICUBIC) for i in order]
    labels = raw.target[order]
    others = (labels + rng.randint(1, 10, len(labels))) % 10
    tints = np.where(rng.rand(len(labels)) < 0.5, labels, others)
    plain = [_tint(image, tint) for image, tint in zip(grey, tints)]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(i) for i in range(10)])}
    )

    def split(images, rows):
        return datasets.Dataset.from_dict({"image": images, "label": labels[rows]}, features=features)

    rows = slice(1100, None)
    shifted = {
        "recoloured": [_tint(image, other) for image, other in zip(grey[rows], others[rows])],
        "rotated": [_rotate(image, rng) for image in plain[rows]],
        "sketch": [_sketch(image) for image in grey[rows]],
        "occluded": [_occlude(image, rng) for image in plain[rows]],
        "noisy": [_add_noise(image, rng) for image in plain[rows]],
    }
    first = {"train": slice(900), "validation": slice(900, 1100), "test": rows}
    splits = {name: split(plain[rows], rows) for name, rows in first.items()}
    return datasets.DatasetDict(splits | {name: split(images, rows) for name, images in shifted.items()})


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
