"""Detect objects in images: draw them, and write all detections to one JSON file.

    python predict.py photo.jpg --checkpoint out/digits/best.pt
    python predict.py frames/ --checkpoint r50_deformable_detr-checkpoint.pth --show-points

Exit status 1 if an image could not be read; the others are done all the same.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import signal
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import detector.threads  # noqa: F401, before torch, which reads what it sets

# isort: split

import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from detector.checkpoints import load_model
from detector.data.transforms import normalise, resize
from detector.drawing import (
    arrange,
    best_queries,
    detect,
    draw_attention,
    draw_detection_points,
    draw_detections,
    name_of,
)
from detector.model import DeformableDETR
from detector.precision import AUTOCAST, autocast
from msda.plot import SamplingRecord


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict as the command line says; return the exit status."""
    options = parse_arguments(arguments)
    try:
        paths = find_images(options.input)
        model, checkpoint = load_model(options.checkpoint)
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.show_points:
            importlib.import_module("matplotlib")  # before the work, not after it
        if (options.show_points or options.attention_map) and model.config.attention == "dense":
            raise ValueError(
                "show_points and attention_map must come with deformable attention, got "
                f"{options.checkpoint}, which is dense"
            )
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)  # the last two: of a device that is not there
        return 1
    if options.short_side is None:
        options.short_side = checkpoint.config.data.short_sides[-1]
    if options.max_side is None:
        options.max_side = checkpoint.config.data.max_side
    try:
        with autocast(next(model.parameters()).device, options.amp):
            failures = predict(model, checkpoint.categories, paths, options)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if failures:
        print(f"{failures} of {len(paths)} images could not be read", file=sys.stderr)
    return int(failures > 0)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("input", type=Path, help="an image, or a folder of images or video frames")
    option(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="PATH",
        help="of train.py, the original's .pth, or of transformers",
    )
    option(
        "--output",
        type=Path,
        default=Path("out/predictions"),
        metavar="FOLDER",
        help="of the pictures and predictions.json; default: %(default)s",
    )
    option(
        "--threshold",
        type=float,
        default=0.5,
        metavar="SCORE",
        help="least score of a detection, 0 to 1; default: %(default)s",
    )
    last_layer = dict(type=int, nargs="?", const=4, default=0, metavar="N")
    option(
        "--show-points",
        help="draw where the last decoder layer samples for the N best queries; N alone: 4",
        **last_layer,
    )
    option("--attention-map", help="draw how much it attends to each pixel, likewise", **last_layer)
    option(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="to resize images to, 0: not; default: that of the checkpoint's evaluation, or 800",
    )
    option(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="the longer side, at most; default: that of the checkpoint's evaluation, or 1333",
    )
    option("--device", default="", help="default: cuda where there is one")
    option("--amp", choices=AUTOCAST, default="off", help="mixed precision; default: %(default)s")
    options = parser.parse_args(arguments)
    if not 0 <= options.threshold <= 1:
        parser.error(f"--threshold must be from 0 to 1, got {options.threshold:g}")
    for name, low in (("show_points", 0), ("attention_map", 0), ("short_side", 0), ("max_side", 1)):
        number = getattr(options, name)
        if number is not None and number < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}, got {number}")
    return options


def find_images(path: Path) -> list[Path]:
    """The image itself, or those of a folder, frame 2 before frame 10.

    Raises:
        ValueError: there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"input must be an image or a folder, got {str(path)!r}")
    formats = Image.registered_extensions()
    images = [file for file in path.iterdir() if formats.get(file.suffix.lower()) in Image.OPEN]
    if not images:
        raise ValueError(f"input must hold images, got {str(path)!r} without one")

    def numbers_apart(file: Path) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]

    return sorted(images, key=numbers_apart)


def predict(
    model: DeformableDETR,
    categories: Sequence[str] | None,
    paths: Sequence[Path],
    options: argparse.Namespace,
) -> int:
    """Predict and draw images, and write ``predictions.json``; return how many were unreadable."""
    stems = Counter(path.stem for path in paths)
    device = next(model.parameters()).device
    result: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "threshold": options.threshold,
        "images": [],
        "unreadable": [],
    }
    try:
        for path in tqdm(paths, "predicting", unit="image"):
            try:
                with Image.open(path) as file:
                    image = ImageOps.exif_transpose(file).convert("RGB")
            except Exception as error:  # PIL's decoders raise whatever they stumble over
                tqdm.write(f"{path} cannot be read and is left out: {error}", file=sys.stderr)
                result["unreadable"].append({"file": path.name, "cause": str(error)})
                continue
            small, _ = resize(image, torch.zeros(0, 4), options.short_side, options.max_side)
            detected, record = detect(
                model,
                normalise(small).to(device),
                torch.tensor([image.height, image.width]),
                points=options.show_points > 0 or options.attention_map > 0,
            )
            result["images"].append(
                {
                    "file": path.name,
                    "width": image.width,
                    "height": image.height,
                    "detections": as_records(detected, options.threshold, categories),
                }
            )
            # Two files may differ in their suffix only.
            name = path.stem if stems[path.stem] == 1 else path.name
            save_pictures(image, detected, record, categories, name, options)
    finally:  # also of what was done before Ctrl-C
        (options.output / "predictions.json").write_text(json.dumps(result, indent=1) + "\n")
    return len(result["unreadable"])


def as_records(
    detected: dict[str, Tensor], threshold: float, categories: Sequence[str] | None
) -> list[dict[str, Any]]:
    """Detections of at least ``threshold`` for JSON, boxes as [x0, y0, x1, y1] in pixels."""
    columns = (detected[name].tolist() for name in ("scores", "labels", "boxes", "queries"))
    return [
        {
            "label": label,
            "name": name_of(label, categories),
            "score": round(score, 5),
            "box": [round(side, 2) for side in box],
            "query": query,
        }
        for score, label, box, query in zip(*columns, strict=True)
        if score >= threshold
    ]


def save_pictures(
    image: Image.Image,
    detected: dict[str, Tensor],
    record: SamplingRecord | None,
    categories: Sequence[str] | None,
    name: str,
    options: argparse.Namespace,
) -> None:
    """Write ``name.boxes.png`` and, if asked for, ``name.points.png``, ``name.attention.png``."""

    def path(kind: str) -> Path:
        return options.output / f"{name}.{kind}.png"

    kept = (detected["scores"] >= options.threshold).nonzero()[:, 0].tolist()
    draw_detections(image, detected, kept, categories).save(path("boxes"))
    if options.show_points:
        best = best_queries(detected, options.show_points)
        figure = draw_detection_points(image, record, detected, best, categories)
        figure.savefig(path("points"), dpi=120)
    if options.attention_map:
        panels = []
        for i in best_queries(detected, options.attention_map):
            heat = draw_attention(image, record, int(detected["queries"][i]))
            panels.append(draw_detections(heat, detected, [i], categories, font_share=1 / 28))
        arrange(panels).save(path("attention"))


if __name__ == "__main__":
    sys.exit(main())
