"""timm's random crop, flip and conversion to a tensor, for less time.

A JPEG file can be decoded at a half, a quarter or an eighth of its size, in a fraction of the time:
no more pixels are decoded than a crop needs. And of small images torchvision's own steps, between
PIL's, take a fifth of the time.
"""

import functools
import random

import torch
from PIL import Image
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from torchvision.transforms import PILToTensor, RandomHorizontalFlip

from common import images

FACTORS = (8, 4, 2, 1)  # by which a JPEG file can be decoded smaller
ENOUGH = 2  # decoded pixels, at least, for each pixel of the output, in each direction


class CropOfFile:
    """timm's random crop of an undecoded image; it draws what timm's draws from the whole image.

    An image whose crop has less than 4 times the output's pixels in one direction comes out bit for
    bit as from timm's crop. The crop of a larger JPEG file is resized from a smaller decoded image.
    """

    def __init__(self, crop: RandomResizedCropAndInterpolation, turn: bool):
        self.crop, self.turn = crop, turn
        self.resampling = Image.Resampling[crop.interpolation.name]

    def __call__(self, image: dict | None) -> Image.Image:
        """Decode, crop and resize an undecoded image of ``datasets``.

        Raises:
            InputError: it cannot be read.
        """
        drawn = {}

        def reduce(stored_size, read_orientation):
            if max(stored_size) < 2 * ENOUGH * min(self.crop.size):
                return 1  # the whole image is small
            orientation = read_orientation()
            width, height = stored_size[::-1] if orientation in (5, 6, 7, 8) else stored_size
            state = random.getstate()
            whole = torch.empty(height, width, device="meta")
            top, left, h, w = self.crop.get_params(whole, self.crop.scale, self.crop.ratio)
            factor = self.factor(w, h)
            if factor == 1:
                random.setstate(state)  # timm's crop is to draw
            else:
                drawn["x"] = left, left + w, width, orientation in (2, 3, 6, 7)
                drawn["y"] = top, top + h, height, orientation in (3, 4, 7, 8)
            return factor

        decoded = images.decode(image, self.turn, reduce)
        if not drawn:
            top, left, h, w = self.crop.get_params(decoded, self.crop.scale, self.crop.ratio)
            part = decoded.crop((left, top, left + w, top + h))
            return part.resize(self.crop.size[::-1], self.resampling)
        left, right = smaller(*drawn["x"], decoded.width)
        top, bottom = smaller(*drawn["y"], decoded.height)
        return decoded.resize(self.crop.size[::-1], self.resampling, (left, top, right, bottom))

    def factor(self, width: int, height: int) -> int:
        """By how much smaller a part of an image may be decoded that is to become the output."""
        out_height, out_width = self.crop.size
        most = min(height // (ENOUGH * out_height), width // (ENOUGH * out_width))
        return next(factor for factor in FACTORS if factor <= max(most, 1))


def smaller(begin, end, side, reverse, decoded_side):
    """Where a part of a side, ``begin`` to ``end``, lies in a smaller decoded image.

    Its last pixel may be only partly of the image; ``reverse`` says that turning made it the first.
    """
    factor = round(side / decoded_side)
    padding = decoded_side - side / factor if reverse else 0
    return begin / factor + padding, min(end / factor + padding, decoded_side)


def lighter(step):
    """The same as one of timm's training transforms after the crop, and with the same draws."""
    if type(step) is RandomHorizontalFlip:
        return functools.partial(flip, probability=torch.tensor(step.p).item())
    return to_pixels if type(step) in (MaybePILToTensor, PILToTensor) else step


def flip(image, probability: float):
    """Flip a PIL image left to right with a probability, or leave it as it is."""
    flips = torch.rand(1).item() < probability
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else image


def to_pixels(image) -> torch.Tensor:
    """A PIL image in RGB as uint8 (3, height, width); what is a tensor already stays as it is."""
    if isinstance(image, torch.Tensor):
        return image
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)
