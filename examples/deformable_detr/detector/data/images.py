"""Reading an image: the one way for training, evaluation and prediction.

Whatever Pillow opens becomes RGB with 8 bits, by rules that do not depend on what is to be seen:

- Greys of more than 8 bits are scaled linearly, 0 to black and white to 255. White is 65535 for
  integers (less where a TIFF says that it holds 9 to 15 bits) and 1 for floating point, or
  ``ImageRules.white_level``. Without it a picture with values beyond is refused; with it they are
  clipped. Of colours of 16 bits Pillow keeps the upper 8.
- What is transparent is laid on white. Where all is, the alpha channel hides the picture for no
  reason, and is ignored.
- Pictures are turned upright as their EXIF orientation says, as viewers do; or all stay as stored.
- Of several pictures in a file (animations, pages, an MPO's previews) the first is taken.
- Colour profiles are ignored.

What cannot be read by these rules is an :class:`UnreadableImage`, which says why.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from detector.config import DataConfig

# What was odd about "images ..." that could be read, for whoever looks at the data.
FRAMES = "with several pictures in the file: the first is taken"
DARK = "of more than 8 bits, nearly black: --white-level says which value is white (12 bits: 4095)"
DARK_COLOURS = "of 16 bits a colour, nearly black: where white is not 65535, convert them first"
HIDDEN = "transparent all over: the alpha channel is ignored"
BROKEN_EXIF = "with EXIF data that cannot be read: taken as upright"
ODDITIES = (FRAMES, DARK, DARK_COLOURS, HIDDEN, BROKEN_EXIF)

# How Pillow turns a picture upright, by its EXIF orientation; 6 and 8 undo each other.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_WHITE_IS_ZERO = 0  # a value of TIFF's tag PhotometricInterpretation
_PHOTOMETRIC, _BITS_PER_SAMPLE = 262, 258  # tags of TIFF


class UnreadableImage(OSError):
    """An image that is left out; the message says why."""


@dataclass(frozen=True)
class ImageRules:
    """What is left to the user, see the top of the file; fields are those of ``DataConfig``."""

    exif: str = "apply"
    white_level: float = 0.0
    max_pixels: int = 0

    @classmethod
    def of(cls, config: DataConfig) -> ImageRules:
        """Those of a configuration."""
        return cls(config.exif, config.white_level, config.max_pixels)


@dataclass(frozen=True)
class Photo:
    """An image as it was read."""

    image: Image.Image  # RGB
    orientation: int  # 1 .. 8, as EXIF counts; of the file, whether or not it was applied
    turn: int  # to this picture from the one that the other value of ``exif`` gives, likewise
    oddities: tuple[str, ...]  # of ODDITIES

    @property
    def other_size(self) -> tuple[int, int]:
        """(width, height) of the picture that the other value of ``exif`` gives."""
        width, height = self.image.size
        return (height, width) if self.turn >= 5 else (width, height)


def read_image(path: Path, rules: ImageRules) -> Photo:
    """Read an image by the rules at the top of this file.

    Raises:
        UnreadableImage: for whatever reason.
    """
    with _opened(path, rules) as file:
        is_deep = ";16" in str(getattr(file, "tile", ""))  # which decoding empties
        oddities = [FRAMES] if getattr(file, "is_animated", False) else []
        orientation, is_broken = _orientation_of(file)
        oddities += [BROKEN_EXIF] if is_broken else []
        file.load()
        # Of TIFF files Pillow turns the pixels itself, and takes note of it in the tags.
        is_upright = _orientation_of(file)[0] != orientation
        image, more = _as_rgb(file, is_deep, rules.white_level)
    turn = orientation if rules.exif == "apply" else inverse_turn(orientation)
    if orientation != 1 and is_upright != (rules.exif == "apply"):
        image = image.transpose(_TURNS[turn])
    return Photo(image, orientation, turn, (*oddities, *more))


def read_size(path: Path, rules: ImageRules) -> tuple[int, int]:
    """(width, height) of what :func:`read_image` gives, without decoding it where that is possible.

    Raises:
        UnreadableImage: the file cannot be opened.
    """
    with _opened(path, rules) as file:
        if _orientation_of(file)[0] < 5:
            return file.size
    return read_image(path, rules).image.size


def is_image_name(path: Path) -> bool:
    """Whether a file is called as images are that Pillow reads."""
    return Image.registered_extensions().get(path.suffix.lower()) in Image.OPEN


def inverse_turn(orientation: int) -> int:
    """The orientation whose turn undoes that of ``orientation``."""
    return {6: 8, 8: 6}.get(orientation, orientation)


def turn_boxes(boxes: Tensor, orientation: int, size: tuple[int, int]) -> Tensor:
    """Turn boxes with their picture, as Pillow turns one upright.

    Args:
        boxes: (N, 4) x0, y0, x1, y1 in pixels.
        orientation: as EXIF counts, 1: not at all.
        size: (width, height) of the picture before it is turned.
    """
    x0, y0, x1, y1 = boxes.unbind(-1)
    width, height = size
    # The sides that become left, top, right and bottom.
    turned = {
        1: (x0, y0, x1, y1),
        2: (width - x1, y0, width - x0, y1),
        3: (width - x1, height - y1, width - x0, height - y0),
        4: (x0, height - y1, x1, height - y0),
        5: (y0, x0, y1, x1),
        6: (height - y1, x0, height - y0, x1),
        7: (height - y1, width - x1, height - y0, width - x0),
        8: (y0, width - x1, y1, width - x0),
    }
    return torch.stack(turned[orientation], -1)


# ---- opening -------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Path, rules: ImageRules) -> Iterator[Image.Image]:
    """The file within the limit of pixels; whatever goes wrong within becomes UnreadableImage."""
    try:
        with _without_limit() as pillow_limit, Image.open(path) as file:
            # Between its limit and twice that Pillow only warns.
            limit = rules.max_pixels or 2 * (pillow_limit or 0)
            pixels = file.width * file.height
            if limit and pixels > limit:
                raise UnreadableImage(
                    f"it has {pixels} pixels, above the limit of {limit}; if it is no attempt to "
                    "fill the memory, --max-pixels can raise that"
                )
            yield file
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
        raise UnreadableImage(_cause(path, error)) from error


def _cause(path: Path, error: Exception) -> str:
    if not path.exists():
        return "it does not exist"
    if path.is_file() and path.stat().st_size == 0:
        return "it is empty"
    if isinstance(error, UnidentifiedImageError):
        return "its content is in no image format that Pillow knows"
    return str(error) or type(error).__name__


_limit_lock = threading.Lock()
_limits: list[int | None] = []  # Pillow's, once for each thread that reads


@contextmanager
def _without_limit() -> Iterator[int | None]:
    """Take Pillow's limit of pixels off while any thread reads; ours is checked in its place."""
    with _limit_lock:
        _limits.append(_limits[0] if _limits else Image.MAX_IMAGE_PIXELS)
        Image.MAX_IMAGE_PIXELS = None
    try:
        yield _limits[0]
    finally:
        with _limit_lock:
            limit = _limits.pop()
            if not _limits:
                Image.MAX_IMAGE_PIXELS = limit


def _orientation_of(file: Image.Image) -> tuple[int, bool]:
    """What EXIF says, 1 if it says nothing of use; and whether it could not be read."""
    try:
        orientation = file.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # as decoders do
        return 1, True
    return (orientation if orientation in _TURNS else 1), False


# ---- converting ----------------------------------------------------------------------------------


def _as_rgb(file: Image.Image, is_deep: bool, white_level: float) -> tuple[Image.Image, list[str]]:
    """A loaded picture of any mode as RGB, and what was odd about it."""
    if file.mode.startswith("I") or file.mode == "F":
        return _scaled(file, white_level)
    if is_deep:
        file.info.pop("transparency", None)  # a colour of 16 bits, which none of 8 equals
    with_alpha = file.convert("LA") if file.mode == "La" else file
    rgb = with_alpha.convert("RGB")  # whatever is transparent
    is_dark = is_deep and 0 < max(high for _, high in rgb.getextrema()) < 16
    oddities = [DARK_COLOURS] if is_dark else []
    if not file.has_transparency_data:
        return rgb, oddities
    alpha = with_alpha.convert("RGBA").getchannel("A")
    if alpha.getextrema()[1] == 0:
        return rgb, [*oddities, HIDDEN]
    ground = Image.new("RGB", file.size, "white")
    ground.paste(rgb, mask=alpha)
    return ground, oddities


def _scaled(file: Image.Image, white_level: float) -> tuple[Image.Image, list[str]]:
    """Grey of more than 8 bits, see the top of the file."""
    values, tags = np.asarray(file), getattr(file, "tag_v2", {})
    full = 1.0
    if values.dtype.kind != "f":
        bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
        full = 2.0**bits - 1 if 8 < bits < 16 else 65535.0
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts those of 8 bits only
        values = full - values
    low, high = float(values.min()), float(values.max())
    if not np.isfinite([low, high]).all():
        raise UnreadableImage("its values must be finite, got NaN or infinity")
    white = white_level or full
    if not white_level and not 0 <= low <= high <= white:
        raise UnreadableImage(
            f"its values must lie in 0 .. {white:g}, got {low:g} .. {high:g}; --white-level can "
            "say which value is white"
        )
    levels = np.multiply(values, 255 / white, dtype=np.float32)
    image = Image.fromarray(np.rint(levels, out=levels).clip(0, 255).astype(np.uint8))
    return image.convert("RGB"), [DARK] if 0 < high <= white / 16 else []
