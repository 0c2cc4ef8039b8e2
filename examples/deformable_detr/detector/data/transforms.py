"""The original's augmentation: PIL images with their boxes, randomness from the item's generator.

Boxes are (N, 4) x0, y0, x1, y1 in pixels of the image they come with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from detector.config import DataConfig

# Of ImageNet, red, green and blue: what pretrained backbones were trained with.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# Pixels: short sides before cropping, and the range of the sides of a crop.
SHORT_SIDES_BEFORE_CROP = (400, 500, 600)
CROP_SIDES = (384, 600)
# Pixels of the longer side before cropping: an image one pixel high would fill the memory.
MAX_SIDE_BEFORE_CROP = 16384


@dataclass(frozen=True)
class Augmentation:
    """Mirror, then resize; half of the images are first resized otherwise and cropped.

    Args:
        short_sides: one is drawn for each image; 0: the image keeps its size, up to max_side.
        max_side: limit of the longer side when resizing.
        crop: whether half of the images are cropped.
        horizontal_flip: probability of mirroring left and right.
    """

    short_sides: Sequence[int]
    max_side: int
    crop: bool
    horizontal_flip: float

    @classmethod
    def of(cls, config: DataConfig, training: bool) -> Augmentation:
        """What training does; evaluation only resizes, always to the last of the short sides."""
        short_sides = config.short_sides or (0,)
        if training:
            return cls(short_sides, config.max_side, config.crop, config.horizontal_flip)
        return cls(short_sides[-1:], config.max_side, crop=False, horizontal_flip=0.0)

    def __call__(
        self, image: Image.Image, boxes: Tensor, labels: Tensor, random: np.random.Generator
    ) -> tuple[Image.Image, Tensor, Tensor]:
        """Image, boxes (N, 4) and labels (N,); a crop may leave fewer of the latter two."""
        if random.random() < self.horizontal_flip:
            image, boxes = flip(image, boxes)
        if self.crop and random.random() < 0.5:
            short_side = int(random.choice(SHORT_SIDES_BEFORE_CROP))
            image, boxes = resize(image, boxes, short_side, MAX_SIDE_BEFORE_CROP)
            image, boxes, kept = random_crop(image, boxes, random)
            labels = labels[kept]
        image, boxes = resize(image, boxes, int(random.choice(self.short_sides)), self.max_side)
        return image, boxes, labels


def flip(image: Image.Image, boxes: Tensor) -> tuple[Image.Image, Tensor]:
    """Mirror left and right."""
    x0, y0, x1, y1 = boxes.unbind(-1)
    return ImageOps.mirror(image), torch.stack([image.width - x1, y0, image.width - x0, y1], -1)


def resize(
    image: Image.Image, boxes: Tensor, short_side: int, max_side: int | None = None
) -> tuple[Image.Image, Tensor]:
    """Scale until the shorter side is ``short_side`` or the longer one ``max_side``.

    0: only down to ``max_side``. No side becomes 0, so that the shape of thin images changes.
    """
    short, long = sorted(image.size)
    if short_side == 0:
        if max_side is None or long <= max_side:
            return image, boxes
        short_side = short
    if max_side is not None and short_side * long > max_side * short:
        short_side = max(1, round(max_side * short / long))
    width, height = (short_side * side // short for side in image.size)
    if max_side is not None:
        width, height = min(width, max_side), min(height, max_side)
    scale = torch.tensor([width / image.width, height / image.height]).repeat(2)
    return image.resize((width, height), Image.Resampling.BILINEAR), boxes * scale


def random_crop(
    image: Image.Image, boxes: Tensor, random: np.random.Generator
) -> tuple[Image.Image, Tensor, Tensor]:
    """Cut out a rectangle with sides in ``CROP_SIDES``; also returns which boxes are left, (N,)."""
    low, high = CROP_SIDES
    width, height = (
        int(random.integers(min(low, side), min(high, side), endpoint=True)) for side in image.size
    )
    left = int(random.integers(0, image.width - width, endpoint=True))
    top = int(random.integers(0, image.height - height, endpoint=True))
    boxes = clip(boxes - torch.tensor([left, top, left, top]), width, height)
    kept = (boxes[:, 2:] > boxes[:, :2]).all(-1)
    return image.crop((left, top, left + width, top + height)), boxes[kept], kept


def clip(boxes: Tensor, width: int | Tensor, height: int | Tensor) -> Tensor:
    """Cut off what lies outside an image of that size, or each box's image: (N,)."""
    x0, y0, x1, y1 = boxes.clamp(min=0).unbind(-1)
    return torch.stack(
        [x0.clamp(max=width), y0.clamp(max=height), x1.clamp(max=width), y1.clamp(max=height)], -1
    )


def normalise(image: Image.Image) -> Tensor:
    """(3, H, W) float32: zero mean and unit variance over ImageNet."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W)
    return pixels.float().div_(255).sub_(MEAN).div_(STD).contiguous()


def denormalise(image: Tensor) -> Image.Image:
    """The inverse of :func:`normalise`, for looking at what the model sees."""
    pixels = image.cpu().mul(STD).add(MEAN).mul(255).round().clamp(0, 255)
    return Image.fromarray(pixels.byte().permute(1, 2, 0).contiguous().numpy())
