"""Data sets by their name in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.config import DataConfig
from detector.data import shapes
from detector.data.annotations import DataError
from detector.data.coco import CocoDetection, SplitMissing, find_split
from detector.data.images import ImageRules
from detector.data.transforms import Augmentation

__all__ = ["CocoDetection", "DataError", "SplitMissing", "build_dataset", "build_datasets"]


def build_datasets(
    config: DataConfig, *, seed: int = 0
) -> tuple[CocoDetection, CocoDetection | None]:
    """Training and validation set, with the same labels; ``seed`` is of the augmentation.

    The latter is None where the folder has nothing of that name.
    """
    train = build_dataset(config, "train", seed=seed)
    names = dict(zip(train.category_ids, train.categories, strict=True))
    try:
        return train, build_dataset(config, "val", categories=names)
    except SplitMissing:
        return train, None


def build_dataset(
    config: DataConfig,
    split: str,
    *,
    categories: Mapping[Any, str] | None = None,
    seed: int = 0,
    training: bool | None = None,
    need_objects: bool = True,
) -> CocoDetection:
    """One split, train, val or any other; see :class:`CocoDetection` for the other arguments.

    It is for training if it is called train, unless ``training`` says otherwise. Without
    ``need_objects`` it may be images alone, see :func:`detector.data.coco.find_split`.
    """
    generated = config.dataset != "coco"
    training = split == "train" if training is None else training
    if config.dataset == "digits" and training and config.horizontal_flip > 0:
        raise ValueError(
            f"horizontal_flip must be 0 for digits: no 3 in a mirror, got {config.horizontal_flip}"
        )
    images, annotations = find_split(_folder(config), split, images_alone=not need_objects)
    return CocoDetection(
        images,
        annotations,
        Augmentation.of(config, training),
        training=training,
        label_ids=config.label_ids,
        categories=categories,
        seed=seed,
        in_memory=generated,
        # In images so small, what COCO calls small would be everything.
        area_sides=(12, 24) if generated else (32, 96),
        rules=ImageRules.of(config),
        box_format=config.box_format,
        need_objects=need_objects,
    )


def _folder(config: DataConfig) -> Path:
    if config.dataset == "coco":
        if not config.data_path:
            raise DataError("data_path must be given for the dataset coco, got ''")
        return Path(config.data_path)
    if config.dataset in shapes.PRESETS:
        return shapes.make_shapes(shapes.PRESETS[config.dataset], config.cache_dir)
    from detector.data import digits  # needs scikit-learn

    return digits.make_digits(digits.DIGITS, config.cache_dir)
