"""Images and boxes of a folder in COCO's layout, and what is done about files that are wrong.

What is wrong in an annotation file ends the program with a :class:`DataError`: it is read at the
start, and somebody has to decide what was meant. Boxes without extent and crowds are dropped, and
parts of boxes outside the image cut off, as in the original.

An image that cannot be read is found hours later, so it ends nothing. It is reported once and
counted (``num_bad_images``). Training takes the next image in its place. Evaluation counts it as
one in which nothing was found: the precision can only be too low.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from detector.boxes import to_centres
from detector.data.transforms import Augmentation, clip, normalise

logger = logging.getLogger(__name__)

# Of images in a row; then it is not a bad file but a bad disk.
MOST_REPLACEMENTS = 10

# Names of the splits in COCO's layout and in the other one.
SPLITS = {"train": ("train", "train"), "val": ("val", "valid")}


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the cause."""


def find_split(folder: str | Path, split: str) -> tuple[Path, Path]:
    """Folder of images and annotation file of ``split``, train or val.

    Either ``train2017/`` with ``annotations/instances_train2017.json`` (any name that starts so) or
    ``train/_annotations.coco.json`` beside its images (and ``valid/`` for val).
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"data_path must be a folder, got {str(folder)!r}")
    coco, other = SPLITS[split]
    found = sorted(folder.glob(f"annotations/instances_{coco}*.json"))
    beside = folder / other / "_annotations.coco.json"
    if len(found) + beside.is_file() != 1:
        raise DataError(
            f"data_path must hold one of annotations/instances_{coco}*.json and "
            f"{other}/{beside.name}, got {str(folder)!r} with {len(found)} and {beside.is_file():d}"
        )
    if not found:
        return beside.parent, beside
    images = folder / found[0].stem.removeprefix("instances_")
    if not images.is_dir():
        raise DataError(f"{found[0]}: its folder of images {str(images)!r} does not exist")
    return images, found[0]


class CocoDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Normalised images (3, H, W) float32, and targets with boxes in 0..1.

    A target holds ``labels`` (N,) int64; ``boxes`` (N, 4) float32 centre x, centre y, width and
    height, divided by the image's width and height; ``image_id`` () int64; ``orig_size`` and
    ``size`` (2,) int64, (H, W) of the file and of the image returned. Augmentation depends on
    (seed, epoch, index) alone, whichever process does it.

    Args:
        images: folder that the file names in ``annotations`` are relative to.
        annotations: COCO json file; each image needs width and height.
        augmentation: applied to each image.
        training: what happens to an image that cannot be read, see above.
        label_ids: "contiguous": label i is the i-th smallest category id of the file;
            "category": labels are the ids, as in the original's checkpoints.
        categories: names by id to number the labels by, of the set that the model is trained on;
            the file's must be among them. None: the file's own.
        seed: of the augmentation.
        in_memory: read all images now and keep them.
        area_sides: sides of the squares that part small, medium and large objects, in pixels.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path,
        augmentation: Augmentation,
        *,
        training: bool,
        label_ids: str = "contiguous",
        categories: Mapping[int, str] | None = None,
        seed: int = 0,
        in_memory: bool = False,
        area_sides: tuple[int, int] = (32, 96),
    ) -> None:
        self.coco_json, self.area_sides = annotations, area_sides
        self.training, self._seed = training, seed
        self._images, self._augmentation = images, augmentation
        content = _Content(annotations)

        own = content.categories()
        names = own if categories is None else dict(categories)
        content.check_meaning(own, names)
        self.category_ids = sorted(names)
        if label_ids == "category":
            self.category_ids = list(range(max(names) + 1))
        self.categories = [names.get(number, "N/A") for number in self.category_ids]
        self.num_classes = len(self.category_ids)

        self.image_ids, self._names, self._sizes = content.images()
        labels = {number: self.category_ids.index(number) for number in own}
        self._starts, self._labels, self._boxes = content.objects(
            self.image_ids, self._sizes, labels
        )

        # In shared memory, since worker processes read the one and write the other.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_images = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._kept: list[Image.Image | None] | None = None
        if in_memory:
            with ThreadPoolExecutor() as pool:  # PIL decodes outside of Python's lock
                self._kept = list(pool.map(self._read, range(len(self))))

    @property
    def num_bad_images(self) -> int:
        """How many images could not be read so far."""
        return int(self.bad_images.sum())

    def set_epoch(self, epoch: int) -> None:
        """Augment otherwise from now on, in worker processes as well."""
        self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 .. {len(self) - 1}, got {index}")
        chosen, image = self._readable(index)
        objects = slice(*self._starts[chosen : chosen + 2].tolist())
        random = np.random.default_rng((self._seed, int(self._epoch), index))
        image, boxes, labels = self._augmentation(
            image, self._boxes[objects], self._labels[objects], random
        )
        target = {
            # Copies, lest a worker process sends all that the view is of.
            "labels": labels.clone(),
            "boxes": to_centres(boxes) / torch.tensor(image.size).repeat(2),
            "image_id": self.image_ids[chosen].clone(),
            "orig_size": self._sizes[chosen].flip(0),
            "size": torch.tensor([image.height, image.width]),
        }
        return normalise(image), target

    def _readable(self, index: int) -> tuple[int, Image.Image]:
        """The image asked for, or what stands in for it: see the top of the file."""
        for chosen in range(index, index + MOST_REPLACEMENTS):
            chosen %= len(self)
            image = self._read(chosen) if self._kept is None else self._kept[chosen]
            if image is not None:
                return chosen, image
            if not self.training:
                return index, Image.new("RGB", tuple(self._sizes[index].tolist()))
        raise DataError(
            f"{self._images}: {MOST_REPLACEMENTS} images in a row cannot be read, "
            f"from {self._names[index]!r} on"
        )

    def _read(self, index: int) -> Image.Image | None:
        """The image as RGB, or None if that fails, which is reported once."""
        if self.bad_images[index]:
            return None
        path, size = self._images / self._names[index], tuple(self._sizes[index].tolist())
        try:
            with Image.open(path) as file:
                # Boxes fit the pixels as stored or, if sizes say so, as a viewer turns them.
                image = file if file.size == size else ImageOps.exif_transpose(file)
                if image.size != size:
                    raise OSError(f"its size is {file.size}, in {self.coco_json.name} {size}")
                return image.convert("RGB")
        except Exception as error:  # PIL's decoders raise whatever they stumble over
            self.bad_images[index] = True
            logger.warning("%s cannot be read and is left out: %s", path, error)
            return None


class _Content:
    """An annotation file, every access to which says what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.content = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read: {error}") from None
        for key in ("images", "annotations", "categories"):
            if not isinstance(self._get(self.content, key, "file"), list):
                raise self._error(f"{key!r} must be a list")
            if not self.content[key]:
                raise self._error(f"{key!r} is empty")

    def _error(self, cause: str) -> DataError:
        return DataError(f"{self.path}: {cause}")

    def _get(self, record: Any, key: str, what: str) -> Any:
        if not isinstance(record, dict) or key not in record:
            raise self._error(f"{what} has no {key!r}")
        return record[key]

    def _ids(self, kind: str) -> list[int]:
        ids = [self._get(r, "id", f"{kind}[{i}]") for i, r in enumerate(self.content[kind])]
        for number in ids:
            if type(number) is not int or number < 0:
                raise self._error(f"an id in {kind!r} must be a whole number, got {number!r}")
        if len(set(ids)) < len(ids):
            raise self._error(f"ids in {kind!r} must differ from each other")
        return ids

    def categories(self) -> dict[int, str]:
        """Names by id."""
        records = self.content["categories"]
        names = [str(self._get(r, "name", f"categories[{i}]")) for i, r in enumerate(records)]
        return dict(zip(self._ids("categories"), names, strict=True))

    def check_meaning(self, own: Mapping[int, str], known: Mapping[int, str]) -> None:
        """Categories of the file must be called as in the model."""
        for number, name in own.items():
            if known.get(number) != name:
                meaning = repr(known[number]) if number in known else "nothing"
                raise self._error(f"category {number} is {name!r}, for the model it is {meaning}")

    def images(self) -> tuple[Tensor, list[str], Tensor]:
        """Ids (I,), file names, and sizes (I, 2), (W, H)."""
        records, sizes = self.content["images"], []
        names = [str(self._get(r, "file_name", f"images[{i}]")) for i, r in enumerate(records)]
        for name, record in zip(names, records, strict=True):
            sizes.append([self._get(record, key, f"image {name!r}") for key in ("width", "height")])
            if not all(type(side) is int and side > 0 for side in sizes[-1]):
                raise self._error(f"image {name!r} must have a size in pixels, got {sizes[-1]}")
        return torch.tensor(self._ids("images")), names, torch.tensor(sizes)

    def objects(
        self, image_ids: Tensor, sizes: Tensor, labels_of: Mapping[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (N,) and boxes (N, 4) sorted by image, and where each image's start, (I + 1,)."""
        position_of = {number: i for i, number in enumerate(image_ids.tolist())}
        positions, labels, boxes = [], [], []
        for i, record in enumerate(self.content["annotations"]):
            what = f"annotations[{i}]"
            image, category, box = (
                self._get(record, key, what) for key in ("image_id", "category_id", "bbox")
            )
            if image not in position_of:
                raise self._error(f"{what} is of an unknown image, {image!r}")
            if category not in labels_of:
                raise self._error(f"{what} is of an unknown category, {category!r}")
            if not _is_box(box):
                raise self._error(f"{what} must have a bbox [x, y, width, height], got {box!r}")
            if not record.get("iscrowd"):
                positions.append(position_of[image])
                labels.append(labels_of[category])
                boxes.append(box)

        image, order = torch.tensor(positions, dtype=torch.int64).sort(stable=True)
        label = torch.tensor(labels, dtype=torch.int64)[order]
        given = torch.tensor(boxes, dtype=torch.float64).view(-1, 4)[order]  # x, y, width, height
        given[:, 2:] += given[:, :2]
        clipped = clip(given, *sizes[image].unbind(-1))
        # COCO's own boxes reach out by fractions of a pixel.
        outside = ((given - clipped).abs() > 1).any(-1)
        usable = (clipped[:, 2:] > clipped[:, :2]).all(-1)
        if outside.any():
            logger.warning(
                "%s: %d boxes reach outside of their images and are clipped, the first in %r",
                self.path,
                int(outside.sum()),
                self.content["images"][int(image[outside][0])]["file_name"],
            )
        if not usable.any():
            raise self._error("no annotation has a box with an extent inside its image")
        counts = torch.bincount(image[usable], minlength=len(sizes))
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return starts, label[usable], clipped[usable].float()


def _is_box(box: Any) -> bool:
    return (
        isinstance(box, Sequence)
        and len(box) == 4
        and all(type(side) in (int, float) and math.isfinite(side) for side in box)
    )
