"""What the generated data sets share: sizes, placing objects, writing them once."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from detector.data.annotations import DataError

VERSION = 1  # counts what changes the images made from a preset
MOST_OVERLAP = 0.15  # of two boxes, as a share of the smaller one
LEAST_CONTRAST = 60  # of an object and what is under it: luminance, 0..255
TRIES = 30  # to find a free place for an object; then there is one object less

# Pixels (H, W, 3) uint8; boxes x, y, width, height; labels.
Picture = tuple[np.ndarray, list[list[int]], list[int]]
Render = Callable[[np.random.Generator], Picture]


@dataclass(frozen=True)
class Preset:
    """How many images, of what size, with how many objects of what size."""

    name: str
    image_side: int  # pixels
    objects: tuple[int, int]  # fewest and most in an image
    object_sides: tuple[int, int]  # pixels, the longer side; every ratio is as likely
    num_train: int = 2000
    num_val: int = 200
    seed: int = 0


def generate(
    preset: Preset, categories: Sequence[str], renderer: Callable[[str], Render], cache_dir: str
) -> Path:
    """Folder with the images of ``preset``, made when it is asked for first.

    Args:
        preset: an image is a function of the preset and its own number alone.
        categories: names by label; ids in the json file are the labels.
        renderer: makes what draws the images of "train" or "valid".
        cache_dir: where the folder is kept; empty: the user's cache directory.
    """
    # Whoever changes the preset finds another folder.
    form = hashlib.sha256(json.dumps(dataclasses.asdict(preset)).encode()).hexdigest()[:8]
    root = Path(cache_dir or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "msda"))
    folder = root.expanduser() / f"{preset.name}-v{VERSION}-{form}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{preset.name}-") as temporary:
            whole = Path(temporary, "whole")
            for split in ("train", "valid"):
                _write(whole / split, preset, split, categories, renderer(split))
            _rename(whole, folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error}") from error
    return folder


def _rename(source: Path, target: Path) -> None:
    """In one step, so that a part of the images never passes for all."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # otherwise another process was faster
            raise


def _write(
    folder: Path, preset: Preset, split: str, categories: Sequence[str], render: Render
) -> None:
    size, seed = {
        "train": (preset.num_train, (preset.seed, 0)),
        "valid": (preset.num_val, (preset.seed, 1)),
    }[split]
    folder.mkdir(parents=True)
    images, annotations = [], []
    # Whole processes: rendering is too much Python for threads. Ctrl-C is left to the parent.
    with multiprocessing.Pool(
        min(os.cpu_count() or 1, 1 + size // 100), signal.signal, (signal.SIGINT, signal.SIG_IGN)
    ) as pool:
        write_image = partial(_write_image, folder, seed, render)
        written = pool.imap(write_image, range(size), chunksize=50)
        bar = tqdm(written, f"{preset.name}, {split}", size, disable=None)
        for number, (name, boxes, labels) in enumerate(bar):
            side = preset.image_side
            images.append({"id": number, "file_name": name, "width": side, "height": side})
            for box, label in zip(boxes, labels, strict=True):
                annotation = {"image_id": number, "category_id": label, "bbox": box, "iscrowd": 0}
                annotations.append(
                    {"id": len(annotations) + 1, **annotation, "area": box[2] * box[3]}
                )
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories)],
    }
    (folder / "_annotations.coco.json").write_text(json.dumps(content))


def _write_image(
    folder: Path, seed: tuple[int, int], render: Render, number: int
) -> tuple[str, list[list[int]], list[int]]:
    """Name, boxes and labels of an image, a function of ``seed`` and ``number``."""
    pixels, boxes, labels = render(np.random.default_rng((*seed, number)))
    name = f"{number:06d}.png"
    # Little larger than at the highest level, in a fifth of the time.
    Image.fromarray(pixels).save(folder / name, compress_level=1)
    return name, boxes, labels


# ---- for renderers -------------------------------------------------------------------------------


def draw_side(preset: Preset, random: np.random.Generator) -> int:
    """The longer side of an object."""
    low, high = np.log(preset.object_sides)
    return round(np.exp(random.uniform(low, high)))


def place(
    width: int, height: int, side: int, boxes: Sequence[Sequence[int]], random: np.random.Generator
) -> list[int] | None:
    """A box x, y, width, height in a square image that hardly overlaps ``boxes``, if found."""
    taken = np.reshape(np.array(boxes, dtype=np.int64), (-1, 4))
    for _ in range(TRIES):
        x, y = random.integers(0, (side - width + 1, side - height + 1))
        start = np.maximum(taken[:, :2], (x, y))
        end = np.minimum(taken[:, :2] + taken[:, 2:], (x + width, y + height))
        overlap = (end - start).clip(0).prod(1)
        if (overlap <= MOST_OVERLAP * np.minimum(taken[:, 2:].prod(1), width * height)).all():
            return [int(x), int(y), width, height]
    return None


def contrasting_colour(background: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A random colour (3,) that is lighter or darker than most of the pixels (h, w, 3)."""
    weights = np.array([0.299, 0.587, 0.114])
    candidates, luminance = random.uniform(0, 255, (64, 3)), background @ weights
    contrast = abs(candidates @ weights - luminance.mean()) - luminance.std()
    return candidates[contrast.clip(max=LEAST_CONTRAST).argmax()]  # the first that has enough


def blend(
    pixels: np.ndarray, box: Sequence[int], alpha: np.ndarray, random: np.random.Generator
) -> None:
    """Paint on pixels (H, W, 3), in place, where alpha (h, w) in 0..1 says so."""
    x, y, width, height = box
    under = pixels[y : y + height, x : x + width]
    under += alpha[..., None] * (contrasting_colour(under, random) - under)
