"""Random crops of large photographs, without decoding more pixels than the crop needs.

A JPEG file can be decoded at a half, a quarter or an eighth of its size, in a fraction of the time.
"""

import random

import torch
from PIL import Image
from timm.data.transforms import RandomResizedCropAndInterpolation

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

    def __call__(self, image: dict | None) -> Image.Image:
        """Decode, crop and resize an undecoded image of ``datasets``.

        Raises:
            InputError: it cannot be read.
        """
        drawn = {}

        def reduce(stored_size, read_orientation):
            if self.factor(*stored_size) == self.factor(*stored_size[::-1]) == 1:
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
            return self.crop(decoded)
        left, right = smaller(*drawn["x"], decoded.width)
        top, bottom = smaller(*drawn["y"], decoded.height)
        resampling = Image.Resampling[self.crop.interpolation.name]
        return decoded.resize(self.crop.size[::-1], resampling, (left, top, right, bottom))

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
