"""Measure a detector's average precision on validation images, as COCO defines it.

    python evaluate.py out/digits/best.pt
    python evaluate.py r50_deformable_detr-checkpoint.pth --data-path /data/coco --json ap.json
    python evaluate.py out/digits/best.pt --data-path /data/mine --split test --results results.json
    torchrun --nproc-per-node 8 evaluate.py ...

The data is that of the checkpoint's training unless an option says otherwise. A split without
annotations gives results, but no precision.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import detector.threads  # noqa: F401, before torch, which reads what it sets

# isort: split

from tqdm.contrib.logging import logging_redirect_tqdm

from detector import distributed
from detector.checkpoint_formats import load_model
from detector.config import DataConfig, add_data_options
from detector.data import CocoDetection, build_dataset
from detector.data.loading import make_loader
from detector.evaluation import evaluate, table
from detector.model import DeformableDETR
from detector.precision import AUTOCAST, autocast, warn_if_slow

OVERRULED = ("exif", "white_level", "max_pixels", "box_format")


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate as the command line says; return the exit status."""
    options = parse_arguments(arguments)
    logging.basicConfig(format="%(message)s")
    with distributed.joined(options.device) as device, logging_redirect_tqdm():
        try:
            for name in ("json", "results"):
                file = getattr(options, name)
                if file and not file.parent.is_dir():
                    raise ValueError(f"{name} must be in a folder that exists, got {file}")
            model, dataset = prepare(options)
        except (ValueError, OSError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        loader = make_loader(
            dataset,
            options.batch_size,
            num_workers=options.num_workers,
            rank=distributed.rank(),
            world_size=distributed.count(),
            pin_memory=device.type == "cuda",
        )
        warn_if_slow(device, options.amp)
        with autocast(device, options.amp):
            results = evaluate(
                model.to(device), loader, dataset, device, options.areas, 100, options.results
            )
        if distributed.rank() == 0:
            print(table(results))
            for line in dataset.image_findings(unreadable=False).lines():
                print(line)
            if options.results:
                print(f"detections: {options.results}")
            if options.json:
                origin = {"checkpoint": str(options.checkpoint), "data": str(dataset.coco_json)}
                options.json.write_text(json.dumps(origin | results, indent=2) + "\n")
    return 0


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    option = parser.add_argument
    option("checkpoint", type=Path, help="of train.py, the original's .pth, or of transformers")
    option("--dataset", help="coco, digits, shapes-easy, shapes-hard or shapes-gpu-hard")
    option("--data-path", metavar="FOLDER", help="in COCO's layout; implies --dataset coco")
    option("--cache-dir", metavar="FOLDER", help="where generated data is kept")
    option("--split", default="val", help="train, val, test, ...; default: %(default)s")
    option(
        "--short-side",
        type=int,
        metavar="PIXELS",
        help="to resize images to; 0: only those beyond the longer side's limit",
    )
    option("--max-side", type=int, metavar="PIXELS", help="the longer side, at most")
    option(
        "--areas",
        type=int,
        nargs=2,
        metavar="PIXELS",
        help="sides of squares that part small, medium and large objects; "
        "default: 32 96 (generated data: 12 24)",
    )
    option("--batch-size", type=int, default=4, metavar="N", help="default: %(default)s")
    option("--num-workers", type=int, default=2, metavar="N", help="default: %(default)s")
    option("--device", default="", help="default: cuda where there is one")
    option("--amp", choices=AUTOCAST, default="off", help="mixed precision; default: %(default)s")
    option("--json", type=Path, metavar="FILE", help="write the precision to it")
    option(
        "--results",
        type=Path,
        metavar="FILE",
        help="write the detections to it, as COCO's servers take them, with the ids of the data",
    )
    add_data_options(parser, OVERRULED, of_checkpoint=True)
    options = parser.parse_args(arguments)
    if options.areas and not 0 < options.areas[0] < options.areas[1]:
        parser.error(f"--areas must be two growing lengths, got {options.areas}")
    if options.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {options.batch_size}")
    return options


def prepare(options: argparse.Namespace) -> tuple[DeformableDETR, CocoDetection]:
    """The model of the checkpoint, and the data to evaluate it on."""
    model, checkpoint = load_model(options.checkpoint)
    # Files that are not ours hold no names: their labels are COCO's category ids.
    known = checkpoint.categories is not None and options.checkpoint.is_file()
    names = zip(checkpoint.category_ids, checkpoint.categories, strict=True) if known else None
    categories = dict(names) if names else None
    data = _changed(checkpoint.config.data, options)
    build = partial(build_dataset, data, options.split, training=False, need_objects=False)
    dataset = build(categories=categories)
    if not dataset.categories:  # images alone, and a checkpoint without names
        names = {number: f"class {number}" for number in checkpoint.category_ids}
        dataset = build(categories=names)
    if not dataset.annotations.has_objects and not options.results:
        raise ValueError(
            f"results must be given (--results FILE) for {dataset.coco_json}, which has no "
            "annotations to compare with"
        )
    if dataset.num_classes > model.config.num_classes:
        raise ValueError(
            f"{options.checkpoint} must know the {dataset.num_classes} classes of "
            f"{dataset.coco_json}, got {model.config.num_classes}; to train it on them first: "
            f"train.py --weights {options.checkpoint} --reset-classes --data-path FOLDER"
        )
    return model, dataset


def _changed(data: DataConfig, options: argparse.Namespace) -> DataConfig:
    """The settings of the checkpoint, but for what is given on the command line."""
    changes: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("dataset", "data_path", "cache_dir", "max_side", *OVERRULED)
        if getattr(options, name, None) is not None
    }
    if options.data_path is not None:
        changes.setdefault("dataset", "coco")
    if options.short_side is not None:
        changes["short_sides"] = (options.short_side,)
    return dataclasses.replace(data, **changes)


if __name__ == "__main__":
    sys.exit(main())
