"""From an image's file to its pixels."""

import io
import sys

import numpy as np
import torch
from PIL import ExifTags, Image
from timm.data import ImageNetInfo
from torchvision.transforms import v2

from common import folders
from common.errors import InputError

# What turns an image upright, by its Exif tag.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def is_turned(class_names: list[str]) -> bool:
    """Whether photographs of a training set are turned as their Exif tag says.

    They are, as 🤗 datasets and every viewer do, but for ImageNet's own, which timm and torchvision
    read as they are stored, so that figures compare: those in classes called by WordNet id, or like
    all 1000 on the Hub.
    """
    info = ImageNetInfo("imagenet-1k")
    if set(class_names) <= set(info.label_names()):
        return False
    words = {info.index_to_description(index) for index in range(1000)} | {"crane2", "maillot2"}
    return not (len(class_names) == 1000 and set(class_names) <= words)


def decode(image: dict | None, turn: bool = True, reduce=None) -> Image.Image:
    """An undecoded image of ``datasets``, in RGB; None is one that is missing.

    Its path may lie inside an archive or on the Hub, as streams have it ("zip://a.png::..."). As
    with timm and torchvision, of an animation it is the first frame, and transparency is dropped.

    Args:
        turn: turn it upright, if its Exif tag says how.
        reduce: says by how much smaller to decode a JPEG file, 1, 2, 4 or 8, from its width and
            height as stored, and a function that reads the Exif tag by which it will be turned.

    Raises:
        InputError: it cannot be read, or has no known range of values; the message has its file
            name.
    """
    path = image and image["path"]
    try:
        with Image.open(io.BytesIO(_encoded(image))) as opened:
            if reduce and opened.format in ("JPEG", "MPO"):
                factor = reduce(opened.size, lambda: _orientation(opened) if turn else 1)
                if factor > 1:
                    opened.draft(None, (opened.width // factor, opened.height // factor))
            opened.load()
            orientation = _orientation(opened) if turn else 1
            upright = _to_rgb(opened)
    except Exception as error:  # of whatever class, as PIL's plugins stumble over damaged files
        raise InputError(
            f"cannot read the image {path or '(without a file name)'}: replace or remove it "
            f"({error!r})"
        ) from error
    return upright.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else upright


def _orientation(opened):
    """The Exif tag; 1, upright, where the tags are damaged, as viewers have it."""
    if opened.format == "JPEG" and not {"exif", "xmp"} & opened.info.keys():
        return 1
    try:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # PIL's reader of tags has no class of its own
        return 1


def _encoded(image):
    """The bytes of an undecoded image; none if it is missing."""
    image = image or {"bytes": b"", "path": None}
    if image["bytes"] is not None or not image["path"]:
        return image["bytes"] or b""
    return folders.read_bytes(image["path"])


def decode_to_tensor(image: dict | None, unsaid, turn: bool = True) -> torch.Tensor:
    """What ``decode`` returns, as a tensor: uint8 (3, height, width).

    An upright JPEG in RGB or grey is read by torchcodec, which finds the same pixels as PIL. Any
    other image is read by PIL, since torchcodec always turns it as its Exif tag has it, converts
    CMYK in another way or does not read it. The first one is said; ``unsaid`` is a lock, shared by
    the loader's workers, that is held from then on.

    Raises:
        InputError: as ``decode`` does.
    """
    from torchcodec.decoders import decode_jpeg  # an optional package, which takes seconds to load

    try:
        encoded = _encoded(image)
        with Image.open(io.BytesIO(encoded)) as opened:
            orientation = _orientation(opened)
            kind = f"{opened.format}, {opened.mode}, Exif orientation {orientation}"
            if opened.format == "JPEG" and opened.mode in ("RGB", "L") and orientation == 1:
                return decode_jpeg(encoded)
    except Exception as error:  # of whatever class, as in decode(), which has the last word
        kind = repr(error)
    pixels = v2.functional.pil_to_tensor(decode(image, turn))
    if unsaid.acquire(block=False):
        path = image["path"] or "(without a file name)"
        print(
            f"read by PIL, not by torchcodec, as others like it will be: {path} ({kind})",
            file=sys.stderr,
        )
    return pixels


def _to_rgb(image):
    """PIL's own conversion cuts values off at 255."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # 0 to 65535
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits a pixel have no known range of values; save it with 8 or 16")
    return image if image.mode == "RGB" else image.convert("RGB")
