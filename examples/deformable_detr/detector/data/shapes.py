"""Rendered shapes on coloured, noisy ground: six classes, as many images as wanted."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from detector.data.generated import Picture, Preset, blend, draw_side, generate, place

CATEGORIES = ("disc", "square", "triangle", "cross", "ring", "diamond")

EASY = Preset("shapes-easy", image_side=96, objects=(1, 4), object_sides=(12, 48))
HARD = Preset("shapes-hard", image_side=128, objects=(4, 12), object_sides=(6, 40))
GPU_HARD = Preset(
    "shapes-gpu-hard",
    image_side=256,
    objects=(10, 30),
    object_sides=(8, 80),
    num_train=10000,
    num_val=500,
)

PRESETS = {preset.name: preset for preset in (EASY, HARD, GPU_HARD)}

SUPERSAMPLING = 4  # masks are drawn so many times larger, for smooth edges


def make_shapes(preset: Preset, cache_dir: str = "") -> Path:
    """Folder with the images, see :func:`generate`."""
    return generate(preset, CATEGORIES, lambda split: partial(render, preset), cache_dir)


def render(preset: Preset, random: np.random.Generator) -> Picture:
    """One image: a gradient with noise, and shapes of random sizes and colours."""
    side = preset.image_side
    pixels = ramp(side, random) + 8 * random.standard_normal((side, side, 1), dtype=np.float32)

    boxes: list[list[int]] = []
    labels: list[int] = []
    for _ in range(random.integers(*preset.objects, endpoint=True)):
        extent, label = draw_side(preset, random), int(random.integers(len(CATEGORIES)))
        box = place(extent, extent, side, boxes, random)
        if box is not None:
            blend(pixels, box, mask(CATEGORIES[label], extent), random)
            boxes.append(box)
            labels.append(label)
    return pixels.round().clip(0, 255).astype(np.uint8), boxes, labels


def ramp(side: int, random: np.random.Generator) -> np.ndarray:
    """(side, side, 3) float32: from one colour to another in any direction."""
    along = np.linspace(-0.5, 0.5, side, dtype=np.float32)
    angle = random.uniform(0, 2 * np.pi)
    share = 0.5 + np.cos(angle) * along + np.sin(angle) * along[:, None]  # (side, side)
    start, end = random.uniform(30, 225, (2, 3)).astype(np.float32)
    return start + (end - start) * share[..., None]


def mask(shape: str, extent: int) -> np.ndarray:
    """Share of each pixel (extent, extent) that the shape covers; it touches all four sides."""
    end = extent * SUPERSAMPLING - 1
    image = Image.new("L", (end + 1, end + 1))
    draw = ImageDraw.Draw(image)
    if shape == "disc":
        draw.ellipse((0, 0, end, end), fill=255)
    elif shape == "square":
        draw.rectangle((0, 0, end, end), fill=255)
    elif shape == "triangle":
        draw.polygon([(end / 2, 0), (end, end), (0, end)], fill=255)
    elif shape == "cross":
        draw.rectangle((0, end * 0.35, end, end * 0.65), fill=255)
        draw.rectangle((end * 0.35, 0, end * 0.65, end), fill=255)
    elif shape == "ring":
        draw.ellipse((0, 0, end, end), outline=255, width=round(end * 0.22))
    else:
        draw.polygon([(end / 2, 0), (end, end / 2), (end / 2, end), (0, end / 2)], fill=255)
    return np.asarray(image.reduce(SUPERSAMPLING), dtype=np.float32) / 255
