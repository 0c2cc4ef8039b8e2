"""Which classes a run has that starts from the weights of another one."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from detector.checkpoint_formats import Checkpoint
from detector.config import Config
from detector.data import CocoDetection, DataError
from detector.data.coco import find_split
from detector.weight_files import shortened

logger = logging.getLogger(__name__)


def with_labels_of(weights: Checkpoint, path: str, config: Config) -> Config:
    """Let labels be the data's category ids, as in the weights, where exactly that fits them.

    In the original's weights for COCO a class head has 91 columns, one for each id from 0 to 90,
    for 80 categories. Numbering those from 0 to 79 would throw what it has learnt away.
    """
    ids = _category_ids(config)
    wanted = weights.config.model.num_classes
    if weights.config.data.label_ids != "category" or not ids or len(ids) == wanted:
        return config
    if max(ids) + 1 != wanted:
        return config
    logger.warning("labels are category ids, as in %s: --label-ids category", path)
    return config.replace(label_ids="category")


def _category_ids(config: Config) -> set[int]:
    """Of the training data; none where they are no numbers, or where reading it fails."""
    if config.data.dataset != "coco" or not config.data.data_path:
        return set()
    try:
        _, annotations = find_split(Path(config.data.data_path), "train")
        content = json.loads(annotations.read_bytes())
        return {int(category["id"]) for category in content["categories"]}
    except (DataError, OSError, ValueError, TypeError, KeyError):
        return set()  # what is wrong is said when the data is read


def check_weights(weights: Checkpoint, path: str, config: Config, train_set: CocoDetection) -> None:
    """Refuse weights whose class heads do not fit the classes of the data.

    Raises:
        ValueError: they do not; says what to type.
    """
    known, wanted = weights.config.model.num_classes, train_set.num_classes
    are_ids = weights.config.data.label_ids == "category"
    both_are_ids = are_ids and config.data.label_ids == "category"
    if wanted == known or (both_are_ids and wanted < known):
        names = weights.categories
        if names and not both_are_ids and names != list(train_set.categories):
            logger.warning(
                "the classes of %s have other names (%s): what it knows of them is taken for those "
                "of the data, in this order; --reset-classes forgets it",
                path,
                shortened(names),
            )
        return
    advice = "to learn those of the data by new class heads: --reset-classes"
    if are_ids and max(_category_ids(config), default=known) < known:
        advice += (
            "; to keep what it knows, where the category ids of the data mean what they did in its "
            "training, as COCO's do: --label-ids category"
        )
    raise ValueError(f"{path} knows {known} classes, the data has {wanted}; {advice}")


def check_classes(checkpoint: Mapping[str, Any], path: str, train_set: CocoDetection) -> None:
    """Refuse to go on with a run on other classes.

    Raises:
        ValueError: they are others; says what to type.
    """
    known, given = checkpoint["category_ids"], train_set.category_ids
    if list(map(str, known)) != list(map(str, given)):
        raise ValueError(
            f"a run must be resumed on its classes, the ids {shortened(known)} in {path}, got "
            f"{shortened(given)}; to start anew on others: --weights {path} --reset-classes"
        )
