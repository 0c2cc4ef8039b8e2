"""Real handwritten digits, pasted at many scales on crops of real photographs: ten classes.

Both come with scikit-learn. Training and validation share no digit and no part of a photograph.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from detector.data.generated import Picture, Preset, blend, draw_side, generate, place

CATEGORIES = tuple("0123456789")

# A small detector learns 2000 images by heart: AP50 .80 on them, .56 on those for validation.
DIGITS = Preset("digits", image_side=96, objects=(1, 4), object_sides=(16, 44), num_train=5000)

# The first digits, and the left of each photograph, are for training.
SHARE_OF_DIGITS, SHARE_OF_PHOTOGRAPH = 0.8, 0.7
CROP_SIDES = (96, 190)  # pixels of the photograph
ENLARGED = 6  # a digit of 8x8 pixels is turned and cut out at 48x48
MOST_TURN = 12  # degrees
INK = (0.2, 0.75)  # an enlarged digit is transparent below the first, opaque above the second


@dataclass
class DigitRenderer:
    """Draws the images of one split."""

    preset: Preset
    photographs: list[np.ndarray]  # (H, W, 3) uint8
    digits: np.ndarray  # (N, 8, 8) uint8
    labels: np.ndarray  # (N,)

    @classmethod
    def of(cls, preset: Preset, split: str) -> DigitRenderer:
        """With what belongs to the split, "train" or "valid"."""
        digits = load_digits()
        photographs = load_sample_images().images  # china.jpg, flower.jpg
        end = round(SHARE_OF_DIGITS * len(digits.images))
        columns = round(SHARE_OF_PHOTOGRAPH * photographs[0].shape[1])
        chosen, region = (
            (slice(end), slice(columns))
            if split == "train"
            else (slice(end, None), slice(columns, None))
        )
        images = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return cls(
            preset, [photo[:, region] for photo in photographs], images, digits.target[chosen]
        )

    def __call__(self, random: np.random.Generator) -> Picture:
        """One image."""
        pixels = self._background(random)
        boxes: list[list[int]] = []
        labels: list[int] = []
        for _ in range(random.integers(*self.preset.objects, endpoint=True)):
            chosen = random.integers(len(self.digits))
            alpha = cut_out(self.digits[chosen], draw_side(self.preset, random), random)
            box = place(alpha.shape[1], alpha.shape[0], self.preset.image_side, boxes, random)
            if box is not None:
                blend(pixels, box, alpha, random)
                boxes.append(box)
                labels.append(int(self.labels[chosen]))
        return pixels.round().clip(0, 255).astype(np.uint8), boxes, labels

    def _background(self, random: np.random.Generator) -> np.ndarray:
        """A square of a photograph, resized, its brightness and colours changed: float32."""
        photo = self.photographs[random.integers(len(self.photographs))]
        side = random.integers(*CROP_SIDES, endpoint=True)
        top, left = random.integers(0, np.array(photo.shape[:2]) - side + 1)
        crop = Image.fromarray(photo[top : top + side, left : left + side])
        pixels = np.asarray(
            crop.resize([self.preset.image_side] * 2, Image.Resampling.BICUBIC), dtype=np.float32
        )
        pixels = pixels[:, :: random.choice((-1, 1)), random.permutation(3)]
        return pixels * random.uniform(0.6, 1.0) + random.uniform(0, 60)


def cut_out(digit: np.ndarray, side: int, random: np.random.Generator) -> np.ndarray:
    """Opacity (h, w) of a digit (8, 8), slightly turned; its longer side is ``side``."""
    image = Image.fromarray(np.pad(digit, 1))
    image = image.resize([side * ENLARGED for side in image.size], Image.Resampling.BICUBIC)
    image = image.rotate(random.uniform(-MOST_TURN, MOST_TURN), Image.Resampling.BILINEAR)
    low, high = INK
    ink = ((np.asarray(image, dtype=np.float32) / 255 - low) / (high - low)).clip(0, 1)
    rows, columns = (np.flatnonzero((ink > 0.5).any(axis)) for axis in (1, 0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]

    # Narrower or wider by up to a quarter, then scaled to the side asked for.
    height, width = ink.shape[0], ink.shape[1] * random.uniform(0.8, 1.25)
    scale = side / max(height, width)
    size = max(3, round(width * scale)), max(3, round(height * scale))
    image = Image.fromarray((ink * 255).astype(np.uint8)).resize(size, Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32) / 255


def make_digits(preset: Preset, cache_dir: str = "") -> Path:
    """Folder with the images, see :func:`generate`."""
    return generate(preset, CATEGORIES, lambda split: DigitRenderer.of(preset, split), cache_dir)
