"""Detect objects in images: draw them, and write all detections to one JSON file.

    python predict.py photo.jpg --checkpoint out/digits/best.pt
    python predict.py frames/ --checkpoint r50_deformable_detr-checkpoint.pth --show-points
    python predict.py photo.jpg --checkpoint out/digits/best.pt --explore where.html

Exit status 1 if an image could not be read or predicted; the others are done all the same.
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
from dataclasses import replace
from pathlib import Path
from typing import Any

import detector.threads  # noqa: F401, before torch, which reads what it sets

# isort: split

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from detector.boxes import to_centres
from detector.checkpoint_formats import Checkpoint, load_model
from detector.config import add_data_options
from detector.data.annotations import Findings, key_of, read_annotations
from detector.data.images import ImageRules, UnreadableImage, is_image_name, read_image
from detector.data.transforms import normalise, resize
from detector.drawing import (
    arrange,
    best_queries,
    describe,
    detect,
    draw_attention,
    draw_detection_points,
    draw_detections,
    name_of,
)
from detector.model import DeformableDETR
from detector.precision import AUTOCAST, autocast
from msda.plot import SamplingRecord, explore

OVERRULED = ("exif", "white_level", "max_pixels")
# What an image can end in once it is read, mostly by taking more memory than there is.
MODEL_ERRORS = (ValueError, ArithmeticError, RuntimeError, MemoryError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict as the command line says; return the exit status."""
    options = parse_arguments(arguments)
    try:
        paths = find_images(options.input)
        if options.explore and len(paths) != 1:
            raise ValueError(f"--explore must come with one image, got {len(paths)}")
        model, checkpoint = load_model(options.checkpoint)
        if checkpoint.categories is None and options.names:
            known = read_annotations(options.names, need_objects=False)
            names = dict(zip(known.category_keys, known.category_names, strict=True))
            checkpoint.categories = [
                names.get(key_of(number), f"class {number}") for number in checkpoint.category_ids
            ]
        model.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if options.show_points:
            importlib.import_module("matplotlib")  # before the work, not after it
        shows_points = options.show_points or options.attention_map or options.explore
        if shows_points and model.config.attention == "dense":
            raise ValueError(
                "show_points, attention_map and explore must come with deformable attention, got "
                f"{options.checkpoint}, which is dense"
            )
        given = {name: value for name, value in vars(options).items() if name in OVERRULED}
        data = replace(checkpoint.config.data, **given)
        options.output.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError, RuntimeError, AssertionError) as error:
        print(f"error: {error}", file=sys.stderr)  # the last two: of a device that is not there
        return 1
    if options.max_side is None and options.short_side != 0:
        options.max_side = data.max_side
    if options.short_side is None:
        options.short_side = data.short_sides[-1]
    try:
        with autocast(next(model.parameters()).device, options.amp):
            failures = predict(model, checkpoint, paths, options, ImageRules.of(data))
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    for what, number in failures.items():
        print(f"{number} of {len(paths)} images could not be {what}", file=sys.stderr)
    return int(bool(failures))


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
        "--explore",
        type=Path,
        metavar="FILE",
        help="write an HTML page to see where every layer, head and query of one image samples",
    )
    option(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="to resize images to; 0: not, or only down to a --max-side that is given; "
        "default: that of the checkpoint's evaluation, or 800",
    )
    option(
        "--max-side",
        type=int,
        metavar="PIXELS",
        help="the longer side, at most; default: that of the checkpoint's evaluation, or 1333",
    )
    option("--device", default="", help="default: cuda where there is one")
    option(
        "--names",
        type=Path,
        metavar="FILE",
        help="annotations to take the names of the classes from, where the checkpoint holds none",
    )
    add_data_options(parser, OVERRULED, of_checkpoint=True)
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
    files = [file for file in sorted(path.iterdir()) if file.is_file()]
    images = [file for file in files if is_image_name(file)]
    if not images:
        raise ValueError(f"input must hold images, got {str(path)!r} without one")
    findings = Findings()
    findings.add(
        "{file is|files are} not called as images are, and left out",
        [file.name for file in files if file not in set(images)],
    )
    for line in findings.lines():
        print(line, file=sys.stderr)

    def numbers_apart(file: Path) -> list[str | int]:
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)]

    return sorted(images, key=numbers_apart)


def predict(
    model: DeformableDETR,
    checkpoint: Checkpoint,
    paths: Sequence[Path],
    options: argparse.Namespace,
    rules: ImageRules,
) -> Counter[str]:
    """Predict and draw images, and write ``predictions.json``.

    Returns:
        How many could not be "read", "predicted" or "drawn", where there were such.
    """
    stems = Counter(path.stem for path in paths)
    device = next(model.parameters()).device
    result: dict[str, Any] = {
        "checkpoint": str(options.checkpoint),
        "threshold": options.threshold,
        "images": [],
        "unreadable": [],
        "failed": [],
    }
    failures: Counter[str] = Counter()
    findings = Findings()

    def fail(kind: str, path: Path, what: str, error: Exception) -> None:
        cause = str(error).partition("\n")[0] or type(error).__name__
        tqdm.write(f"{path} cannot be {what} and is left out: {cause}", file=sys.stderr)
        result[kind].append({"file": path.name, "cause": cause})
        failures[what] += 1

    try:
        for path in tqdm(paths, "predicting", unit="image"):
            try:
                photo = read_image(path, rules)
                for oddity in photo.oddities:
                    findings.add(f"{{image|images}} {oddity}", [path.name])
                image = photo.image
                small, _ = resize(image, torch.zeros(0, 4), options.short_side, options.max_side)
                pixels = normalise(small).to(device)
                detected, record = detect(
                    model,
                    pixels,
                    torch.tensor([image.height, image.width]),
                    points=options.show_points > 0 or options.attention_map > 0,
                )
            except UnreadableImage as error:
                fail("unreadable", path, "read", error)
                continue
            except MODEL_ERRORS as error:
                fail("failed", path, "predicted", error)
                continue
            result["images"].append(
                {
                    "file": path.name,
                    "width": image.width,
                    "height": image.height,
                    "detections": as_records(detected, options.threshold, checkpoint),
                }
            )
            # Two files may differ in their suffix only.
            name = path.stem if stems[path.stem] == 1 else path.name
            try:
                save_pictures(image, detected, record, checkpoint.categories, name, options)
                if options.explore:
                    write_page(model, image, pixels, detected, checkpoint.categories, path, options)
            except MODEL_ERRORS as error:  # and not OSError: the disk is full for all of them
                fail("failed", path, "drawn", error)
    finally:  # also of what was done before Ctrl-C
        (options.output / "predictions.json").write_text(json.dumps(result, indent=1) + "\n")
    for line in findings.lines():
        print(line, file=sys.stderr)
    return failures


def as_records(
    detected: dict[str, Tensor], threshold: float, checkpoint: Checkpoint
) -> list[dict[str, Any]]:
    """Detections of at least ``threshold`` for JSON, boxes as [x0, y0, x1, y1] in pixels."""
    ids = checkpoint.category_ids
    columns = (detected[name].tolist() for name in ("scores", "labels", "boxes", "queries"))
    return [
        {
            "label": label,
            "category_id": ids[label] if label < len(ids) else None,
            "name": name_of(label, checkpoint.categories),
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


def write_page(
    model: DeformableDETR,
    image: Image.Image,
    pixels: Tensor,
    detected: dict[str, Tensor],
    categories: Sequence[str] | None,
    path: Path,
    options: argparse.Namespace,
) -> None:
    """Write the page of ``--explore``, with the detections, or else the best, as boxes."""
    kept = (detected["scores"] >= options.threshold).nonzero()[:, 0].tolist() or [0]
    explore(
        model,
        image,
        options.explore,
        inputs=pixels[None],
        boxes=to_centres(detected["boxes"][kept]) / torch.tensor(image.size * 2),
        box_queries=detected["queries"][kept].tolist(),
        box_labels=describe(detected, kept, categories),
        title=f"Where the detector looks in {path.name}",
    )


if __name__ == "__main__":
    sys.exit(main())
