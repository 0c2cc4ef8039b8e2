"""Data sets by their name in the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from detector.config import DataConfig
from detector.data import shapes
from detector.data.coco import CocoDetection, DataError, find_split
from detector.data.transforms import Augmentation

__all__ = ["CocoDetection", "DataError", "build_dataset", "build_datasets"]


def build_datasets(config: DataConfig, *, seed: int = 0) -> tuple[CocoDetection, CocoDetection]:
    """Training and validation set, with the same labels; ``seed`` is of the augmentation."""
    train = build_dataset(config, "train", seed=seed)
    names = dict(zip(train.category_ids, train.categories, strict=True))
    return train, build_dataset(config, "val", categories=names)


def build_dataset(
    config: DataConfig,
    split: str,
    *,
    categories: Mapping[int, str] | None = None,
    seed: int = 0,
) -> CocoDetection:
    """One split, train or val; see :class:`CocoDetection` for the other arguments."""
    generated = config.dataset != "coco"
    training = split == "train"
    if config.dataset == "digits" and training and config.horizontal_flip > 0:
        raise ValueError(
            f"horizontal_flip must be 0 for digits: no 3 in a mirror, got {config.horizontal_flip}"
        )
    return CocoDetection(
        *find_split(_folder(config), split),
        Augmentation.of(config, training),
        training=training,
        label_ids=config.label_ids,
        categories=categories,
        seed=seed,
        in_memory=generated,
        # In images so small, what COCO calls small would be everything.
        area_sides=(12, 24) if generated else (32, 96),
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
