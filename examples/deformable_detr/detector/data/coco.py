"""Images and boxes of a folder in COCO's layout, and what is done about files that are wrong.

What is wrong in an annotation file is found at the start, see :mod:`detector.data.annotations`. How
images are read, and which cannot be, is the matter of :mod:`detector.data.images`.

An image that cannot be read is found hours later, so it ends nothing. It is reported once and
counted (``num_bad_images``). Training takes the next image in its place. Evaluation counts it as
one in which nothing was found: the precision can only be too low.

Boxes stay on their objects where the size of an image in the annotations is not that of the file:

- a size that fits the picture only without its EXIF orientation (or, where that is ignored, with
  it) says what the boxes were drawn on, and they are turned with the picture;
- a size of the same shape says that the picture was resized, and they are scaled;
- with any other size the image counts as one that cannot be read.

Detections are turned and scaled back to what the annotations speak of.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from detector import distributed
from detector.boxes import to_centres
from detector.data.annotations import (
    DataError,
    Findings,
    key_of,
    list_images,
    read_annotations,
    sort_key,
    whole_numbers,
)
from detector.data.images import (
    ODDITIES,
    ImageRules,
    Photo,
    UnreadableImage,
    inverse_turn,
    is_image_name,
    read_image,
    read_size,
    turn_boxes,
)
from detector.data.transforms import Augmentation, normalise

logger = logging.getLogger(__name__)

# Of images in a row; then it is looked whether it is the files or the disk.
MOST_REPLACEMENTS = 10
NUM_PROBED = 20  # images all over the set, by which a bad disk is told from bad files
NUM_NAMED = 20  # images that cannot be read that are reported as they come
BLANK_SIDE = 1024  # pixels at most, of what stands in for such an image in evaluation
LARGEST_LABEL = 9999  # that a category's id can be

# Names of folders by split; any other split has its own name.
SPLITS = {"val": ("valid", "val", "validation")}

TURNED = "turned by EXIF, with the size from before in the json: boxes are turned, too (see --exif)"
TURNED_BACK = "with the size from after EXIF turned them in the json: boxes are turned back"
UNDECIDED = "turned by EXIF, whose size does not tell if boxes are, too: taken so (see --exif)"
SCALED = "with another size of the same shape in the json: boxes are scaled"
_KINDS = (*ODDITIES, TURNED, TURNED_BACK, UNDECIDED, SCALED)


class SplitMissing(DataError):
    """A split of which there is no trace in the folder."""


def find_split(
    folder: str | Path, split: str, *, images_alone: bool = False
) -> tuple[Path, Path | None]:
    """Folder of images and annotation file of a split: train, val, or any other name.

    Either ``train2017/`` (or ``images/train2017/``) with ``annotations/instances_train2017.json``,
    any name that starts so, or ``train/_annotations.coco.json`` beside its images. val is also
    called valid or validation. A file may be packed: ``.json.gz``.

    Args:
        folder: that holds all this.
        split: its name.
        images_alone: take ``image_info_*.json``, or a folder without any such file, as well: there
            is no annotation file then.

    Raises:
        DataError: there is none of these (SplitMissing, where there is nothing of the name at
            all), or several.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"data_path must be a folder, got {str(folder)!r}")
    names = SPLITS.get(split, (split,))
    found: list[Path] = []
    for prefix in ("instances_", "image_info_") if images_alone else ("instances_",):
        found = found or _json_files(folder / "annotations", prefix + split)
    files = [folder / name / f"_annotations.coco{end}" for name in names for end in _ENDINGS]
    beside = [path for path in files if path.is_file()]
    folders = _image_folders(folder, split)
    if images_alone and len(folders) == 1 and not found and not beside:
        return folders[0], None
    if len(found) + len(beside) != 1:
        kind = DataError if found or beside or folders else SplitMissing
        raise kind(
            f"data_path must hold one of annotations/instances_{split}*.json and "
            f"{names[0]}/_annotations.coco.json, got {str(folder)!r} with {len(found)} and "
            f"{len(beside)}"
        )
    if beside:
        return beside[0].parent, beside[0]
    name = _stem(found[0]).removeprefix("instances_").removeprefix("image_info_")
    # COCO's test-dev is a part of its test images.
    for known in (name, name.replace("-dev", "")):
        for images in (folder / known, folder / "images" / known):
            if images.is_dir():
                return images, found[0]
    raise DataError(f"{found[0]}: its folder of images {str(folder / name)!r} does not exist")


_ENDINGS = (".json", ".json.gz")


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json")


def _json_files(folder: Path, start: str) -> list[Path]:
    """The file called so, or else those whose names start so."""
    files = sorted(path for path in folder.glob(f"*{_ENDINGS[0]}*") if path.is_file())
    files = [path for path in files if path.name.endswith(_ENDINGS)]
    exact = [path for path in files if _stem(path) == start]
    return exact or [path for path in files if path.name.startswith(start)]


def _image_folders(folder: Path, split: str) -> list[Path]:
    """The folder called so, or else those whose names start so."""
    folders = sorted(
        path for path in (*folder.iterdir(), *folder.glob("images/*")) if path.is_dir()
    )
    exact = [path for path in folders if path.name == split]
    return exact or [path for path in folders if path.name.startswith(split)]


class CocoDetection(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Normalised images (3, H, W) float32, and targets with boxes in 0..1.

    A target holds ``labels`` (N,) int64; ``boxes`` (N, 4) float32 centre x, centre y, width and
    height, divided by the image's width and height; ``image_id`` () int64, see ``image_ids``;
    ``orig_size`` and ``size`` (2,) int64, (H, W) of the image in the annotations, turned as the
    image is, and of the image returned. Augmentation depends on (seed, epoch, index) alone,
    whichever process does it.

    Args:
        images: folder that the file names in ``annotations`` are relative to.
        annotations: COCO json file; None: all images of the folder, of which nothing is known.
        augmentation: applied to each image.
        training: what happens to an image that cannot be read, see above.
        label_ids: "contiguous": label i is the i-th smallest category id of the file;
            "category": labels are the ids, as in the original's checkpoints.
        categories: names by id to number the labels by, of the set that the model is trained on;
            the file's must be among them. None: the file's own.
        seed: of the augmentation.
        in_memory: read all images now and keep them.
        area_sides: sides of the squares that part small, medium and large objects, in pixels.
        rules: of reading images.
        box_format: of the annotations, see :func:`detector.data.annotations.read_annotations`.
        need_objects: whether a file without annotations is refused.

    Attributes:
        annotations: what the file says.
        image_ids: (I,) int64 the ids of the file, or where one is no whole number of 64 bits, their
            positions; ``annotations.image_ids`` holds them as they came.
        categories: names by label.
        category_ids: ids by label, as they came.
        named_labels: the labels that stand for a category.
        bad_images: (I,) bool which could not be read so far.
        causes: why, by name, of those that this process has tried.
    """

    def __init__(
        self,
        images: Path,
        annotations: Path | None,
        augmentation: Augmentation,
        *,
        training: bool,
        label_ids: str = "contiguous",
        categories: Mapping[Any, str] | None = None,
        seed: int = 0,
        in_memory: bool = False,
        area_sides: tuple[int, int] = (32, 96),
        rules: ImageRules | None = None,
        box_format: str = "coco",
        need_objects: bool = True,
    ) -> None:
        self.coco_json, self.area_sides = annotations or images, area_sides
        self.training, self._seed = training, seed
        self._images, self._augmentation = images, augmentation
        self._rules = rules or ImageRules()
        self._errors_of_sizes: dict[str, str] = {}
        self.causes: dict[str, str] = {}
        self.annotations = content = (
            list_images(images, _image_names(images), self._size_of)
            if annotations is None
            else read_annotations(
                annotations,
                box_format=box_format,
                size_of=self._size_of,
                need_objects=need_objects,
                known=categories,
            )
        )
        lines = content.findings.lines()
        if lines and distributed.rank() == 0:
            logger.warning(
                "%s: %s", content.path, "\n  ".join(["", *lines] if lines[1:] else lines)
            )

        self._name_labels(label_ids, categories)
        self._names, self._sizes = content.file_names, torch.from_numpy(content.sizes)
        self.image_ids = torch.tensor(whole_numbers(content.image_keys))
        self._position_of = {number: i for i, number in enumerate(self.image_ids.tolist())}
        self._starts, self._labels, self._boxes = self._objects()

        # In shared memory, since worker processes read the one and write the others.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self.bad_images = torch.zeros(len(self), dtype=torch.bool).share_memory_()
        self._turns = torch.ones(len(self), dtype=torch.uint8).share_memory_()
        # Of each kind: which images are so, and one more than the first of them that was seen.
        self._odd_images = torch.zeros(len(_KINDS), len(self), dtype=torch.bool).share_memory_()
        self._first_odd = torch.zeros(len(_KINDS), dtype=torch.int64).share_memory_()
        self._told: set[str] = set()
        for i in (self._sizes == 0).any(1).nonzero()[:, 0].tolist():
            self._leave_out(i, self._errors_of_sizes.get(self._names[i], "its size is unknown"))
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

    def position_of(self, image_id: int) -> int:
        """The index of an image by the ``image_id`` of its target."""
        return self._position_of[image_id]

    def id_of(self, image_id: int) -> Any:
        """Its id in the annotations, as it came."""
        return self.annotations.image_ids[self._position_of[image_id]]

    def as_annotated(self, index: int, boxes: Tensor) -> Tensor:
        """Boxes (N, 4) x0, y0, x1, y1 in ``orig_size`` to the pixels that the annotations mean."""
        turn = int(self._turns[index])
        return turn_boxes(boxes, inverse_turn(turn), self._turned_size(index))

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be 0 .. {len(self) - 1}, got {index}")
        chosen, image = self._readable(index)
        boxes, labels = self.objects(chosen, image.size)
        random = np.random.default_rng((self._seed, int(self._epoch), index))
        image, boxes, labels = self._augmentation(image, boxes, labels, random)
        target = {
            "labels": labels,
            "boxes": to_centres(boxes) / torch.tensor(image.size).repeat(2),
            "image_id": self.image_ids[chosen].clone(),
            "orig_size": torch.tensor(self._turned_size(chosen)[::-1]),
            "size": torch.tensor([image.height, image.width]),
        }
        return normalise(image), target

    def objects(self, index: int, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Boxes (N, 4) x0, y0, x1, y1 and labels (N,) of an image, once it has been read.

        Args:
            index: of the image.
            size: (width, height) of it, in whose pixels the boxes shall be.
        """
        rows = slice(*self._starts[index : index + 2].tolist())
        annotated = tuple(self._sizes[index].tolist())
        # Copies, lest a worker process sends all that the views are of.
        boxes = turn_boxes(self._boxes[rows], int(self._turns[index]), annotated)
        # The annotations may speak of a smaller or larger copy.
        scale = torch.tensor(size) / torch.tensor(self._turned_size(index))
        return boxes * scale.repeat(2), self._labels[rows].clone()

    def read(self, index: int) -> Image.Image | None:
        """The image, or None if it cannot be read, which is reported once."""
        return self._read(index) if self._kept is None else self._kept[index]

    # ---- what was found --------------------------------------------------------------------------

    def oddities_of(self, index: int) -> list[str]:
        """What is odd about an image, once it has been read."""
        return [
            kind for kind, is_odd in zip(_KINDS, self._odd_images[:, index], strict=True) if is_odd
        ]

    def image_findings(self, *, unreadable: bool = True) -> Findings:
        """What was odd about the images so far, with or without those that could not be read."""
        findings = Findings()
        if unreadable:
            findings.add("{image|images} that cannot be read", self._names_of(self.bad_images))
        for kind, which in zip(_KINDS, self._odd_images, strict=True):
            findings.add(f"{{image|images}} {kind}", self._names_of(which))
        return findings

    def merge_findings(self) -> None:
        """Take over what the other processes found; all of them must call it together."""
        for found in (self.bad_images, self._odd_images):
            for others in distributed.gather(found.clone()):
                found |= others

    def tell(self) -> None:
        """Report what is odd about images, each kind once; workers leave that to this process."""
        for kind, number in zip(_KINDS, self._first_odd.tolist(), strict=True):
            if number and kind not in self._told and distributed.rank() == 0:
                path = self._images / self._names[number - 1]
                logger.warning("%s: %s; further ones are only counted", path, kind)
                self._told.add(kind)

    def _names_of(self, which: Tensor) -> list[str]:
        return [self._names[i] for i in which.nonzero()[:, 0].tolist()]

    def _note(self, index: int, kinds: Sequence[str]) -> None:
        for kind in kinds:
            row = _KINDS.index(kind)
            self._odd_images[row, index] = True
            if self._first_odd[row] == 0:
                self._first_odd[row] = index + 1
        if kinds and get_worker_info() is None:
            self.tell()

    def _leave_out(self, index: int, cause: str) -> None:
        self.bad_images[index] = True
        self.causes[self._names[index]] = cause
        number = self.num_bad_images
        if number <= NUM_NAMED:
            path = self._images / self._names[index]
            logger.warning("%s cannot be read and is left out: %s", path, cause)
        elif number == NUM_NAMED + 1:
            logger.warning("%s: further images that cannot be read are only counted", self._images)

    # ---- labels and objects ----------------------------------------------------------------------

    def _name_labels(self, label_ids: str, categories: Mapping[Any, str] | None) -> None:
        """Number the categories."""
        content = self.annotations
        if categories is None:
            categories = dict(zip(content.category_ids, content.category_names, strict=True))
        by_key = {key_of(identifier): (identifier, name) for identifier, name in categories.items()}
        keys = sorted(by_key, key=sort_key)
        if label_ids == "category":
            for key in keys:
                if type(key) is not int or not 0 <= key <= LARGEST_LABEL:
                    raise DataError(
                        f"{content.path}: ids of categories must be whole numbers of 0 .. "
                        f"{LARGEST_LABEL} to be labels (label_ids), got {by_key[key][0]!r}"
                    )
            keys = list(range(max(keys, default=-1) + 1))
        self._label_of = {key: label for label, key in enumerate(keys)}
        entries = [by_key.get(key, (key, "N/A")) for key in keys]
        self.category_ids = [identifier for identifier, _ in entries]
        self.categories = [name for _, name in entries]
        self.num_classes = len(keys)
        # Of labels that are ids, some may be of no category.
        self.named_labels = [label for label, key in enumerate(keys) if key in by_key]

    @property
    def labels_of_categories(self) -> list[int]:
        """The label of each category of ``annotations``."""
        return [self._label_of[key] for key in self.annotations.category_keys]

    def _objects(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where each image's objects start (I + 1,), their labels (N,) and boxes (N, 4)."""
        content = self.annotations
        kept = ~content.crowds
        counts = np.bincount(content.images_of_objects[kept], minlength=len(self))
        starts = torch.from_numpy(np.concatenate([[0], counts.cumsum()]))
        labels = torch.tensor(self.labels_of_categories, dtype=torch.int64)
        boxes = torch.from_numpy(content.boxes[kept]).float()
        return starts, labels[torch.from_numpy(content.categories[kept])], boxes

    # ---- images ----------------------------------------------------------------------------------

    def _readable(self, index: int) -> tuple[int, Image.Image]:
        """The image asked for, or what stands in for it: see the top of the file."""
        for tried in range(max(len(self), MOST_REPLACEMENTS)):
            chosen = (index + tried) % len(self)
            image = self.read(chosen)
            if image is not None:
                return chosen, image
            if not self.training:
                size = self._turned_size(index)
                return index, Image.new("RGB", [min(side, BLANK_SIDE) for side in size])
            if tried + 1 == MOST_REPLACEMENTS and not self._some_can_be_read():
                break
        raise DataError(
            f"{self._images}: {MOST_REPLACEMENTS} images in a row cannot be read, "
            f"from {self._names[index]!r} on, nor any other that was tried"
        )

    def _some_can_be_read(self) -> bool:
        step = max(1, len(self) // NUM_PROBED)
        return any(self.read(i) is not None for i in range(0, len(self), step))

    def _read(self, index: int) -> Image.Image | None:
        if self.bad_images[index]:
            return None
        try:
            photo = read_image(self._path(self._names[index]), self._rules)
            turn, kinds = self._fit(photo, index)
        except UnreadableImage as error:
            self._leave_out(index, str(error))
            return None
        self._turns[index] = turn
        self._note(index, [*photo.oddities, *kinds])
        return photo.image

    def _fit(self, photo: Photo, index: int) -> tuple[int, list[str]]:
        """How to turn boxes in the annotations' pixels to those of the image, and what is odd."""
        size, own, other = tuple(self._sizes[index].tolist()), photo.image.size, photo.other_size
        is_turned = photo.turn != 1
        fits, fits_other = (_same_shape(size, actual) for actual in (own, other))
        if not (fits or fits_other):
            raise UnreadableImage(f"its size is {own}, in {self.coco_json.name} it is {size}")
        kinds = [] if size in (own, other) else [SCALED]
        if not fits:
            return photo.turn, [*kinds, TURNED if self._rules.exif == "apply" else TURNED_BACK]
        tells = not fits_other and bool(self.annotations.sizes_are_given[index])
        if is_turned and not tells and self.annotations.has_objects and self._rules.exif == "apply":
            kinds.append(UNDECIDED)
        return 1, kinds

    def _turned_size(self, index: int) -> tuple[int, int]:
        """(width, height) in the annotations, turned as the image is; of a blank if unknown."""
        width, height = (side or BLANK_SIDE for side in self._sizes[index].tolist())
        return (height, width) if self._turns[index] >= 5 else (width, height)

    def _path(self, name: str) -> Path:
        path = self._images / name
        if "\\" in name and not path.exists():  # as Windows writes them
            path = self._images / name.replace("\\", "/")
        return path

    def _size_of(self, name: str) -> tuple[int, int] | None:
        try:
            return read_size(self._path(name), self._rules)
        except UnreadableImage as error:
            self._errors_of_sizes[name] = str(error)
            return None


def _image_names(folder: Path) -> list[str]:
    """Images below a folder by their suffix, relative to it."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if is_image_name(path)]
    if not names:
        raise DataError(f"{folder} must hold images, got a folder without one")
    return sorted(names)


def _same_shape(size: tuple[int, int], actual: tuple[int, int]) -> bool:
    """Whether one is the other resized, sides being rounded to whole pixels."""
    (width, height), (actual_width, actual_height) = size, actual
    error = abs(width * actual_height - height * actual_width)
    return error <= min(max(actual), 0.05 * width * actual_height)
