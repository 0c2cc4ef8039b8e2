"""Annotation files: the one parser for training and evaluation.

A file is read whole and checked before the first step. What has one meaning is taken, whatever its
form; what is of no use is left out, counted and named (``Annotations.findings``); what somebody has
to decide ends the program with a :class:`DataError` that says what can be done.

- Ids are numbers or texts of any size; 7, 7.0 and "7" are the same. They are given back as they
  came.
- Numbers may be written as texts. True, false, null and lists are none.
- Sizes of images that are missing, null or no whole number above 0 are taken from the images.
- ``iscrowd`` is no crowd where it is missing, null, false, 0, "0", "false" or empty, and a crowd
  where it is true, "true" or another number. Anything else counts as no crowd.
- ``area`` is that of the box where it is missing or no number above 0 (and at most 1e10).
- ``bbox`` where it is missing, null or empty is that of the polygons of ``segmentation``; where
  those are missing too, or it is not four finite numbers, the object is dropped.
- Boxes are cut off at the edges of their image, for training; what has no extent then is dropped.
  For evaluation they stay as they are if they reach out by a pixel at most, as some of COCO's do.
- Boxes in 0..1, and corners in place of width and height, are recognised and refused: the option
  ``box_format`` says what they are.
- Annotations of images that are not listed are left out; those of categories that are not listed
  are refused.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from detector.config import BOX_FORMATS

Key = int | float | str  # an id in the form that ids are compared in
SizeOf = Callable[[str], tuple[int, int] | None]  # (width, height) by file name, None: unreadable

LARGEST_SIDE = 2**31 - 1  # of an image; 0 stands for a size that is unknown
LARGEST_AREA = 1e10  # COCO's evaluation counts no object above it
NUM_EXAMPLES = 3  # that are named of a kind of finding


class DataError(ValueError):
    """Data that cannot be used; the message names the file and the cause."""


class Findings:
    """What was odd, by kind: how often, and where first.

    A kind is written "{box reaches|boxes reach} outside", for one and for several.
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, kind: str, names: Iterable[Any], number: int | None = None) -> None:
        """Count ``names`` (or ``number``, of which they are the first), if there are any."""
        names = [str(name) for name in names]
        number = len(names) if number is None else number
        if number:
            count, first = self._found.get(kind, (0, []))
            first = list(dict.fromkeys([*first, *names[:NUM_EXAMPLES]]))[:NUM_EXAMPLES]
            self._found[kind] = (count + number, first)

    def entries(self) -> list[tuple[int, str, list[str]]]:
        """Number, kind and first names of each kind."""
        return [
            (count, re.sub(r"{(.*?)\|(.*?)}", rf"\{1 + (count > 1)}", kind), first)
            for kind, (count, first) in self._found.items()
        ]

    def lines(self) -> list[str]:
        """One line for each kind, such as "2 boxes reach outside of their images: 'a.png', ..."."""
        lines = []
        for count, kind, first in self.entries():
            more = ", ..." if count > len(first) else ""
            lines.append(f"{count} {kind}: {', '.join(map(repr, first))}{more}")
        return lines


@dataclass
class Annotations:
    """The content of an annotation file: I images, C categories, N objects sorted by image."""

    path: Path
    image_ids: list[Any]  # as they came
    image_keys: list[Key]
    file_names: list[str]
    sizes: np.ndarray  # (I, 2) int64 width and height; 0: neither in the file nor to be read
    sizes_are_given: np.ndarray  # (I,) bool, whether they are in the file
    category_ids: list[Any]  # as they came; sorted, numbers before texts
    category_keys: list[Key]
    category_names: list[str]
    has_objects: bool  # False: images to be predicted, of which nothing is known
    starts: np.ndarray | None = None  # (I + 1,) where each image's objects start; None: no objects
    categories: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # (N,) positions
    boxes: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # x0, y0, x1, y1, cut off
    given: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))  # x, y, width, height
    areas: np.ndarray = field(default_factory=lambda: np.zeros(0))
    crowds: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    findings: Findings = field(default_factory=Findings)

    def __post_init__(self) -> None:
        if self.starts is None:
            self.starts = np.zeros(len(self.image_ids) + 1, np.int64)

    @property
    def images_of_objects(self) -> np.ndarray:
        """Position of the image of each object, (N,)."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))

    def as_coco(self, images: Sequence[Any], categories: Sequence[Any]) -> dict[str, Any]:
        """What COCO's evaluation needs, with other ids for the images and the categories."""
        columns = (self.images_of_objects, self.categories, self.given, self.areas, self.crowds)
        annotations = [
            {
                "id": number,  # from 1: the evaluation takes a match with 0 for none
                "image_id": images[image],
                "category_id": categories[category],
                "bbox": box,
                "area": area,
                "iscrowd": int(crowd),
            }
            for number, (image, category, box, area, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), 1
            )
        ]
        return {
            "images": [{"id": image} for image in images],
            "categories": [
                {"id": number, "name": name}
                for number, name in zip(categories, self.category_names, strict=True)
            ],
            "annotations": annotations,
        }


def read_annotations(
    path: Path,
    *,
    box_format: str = "coco",
    size_of: SizeOf | None = None,
    need_objects: bool = True,
    known: Mapping[Any, str] | None = None,
) -> Annotations:
    """Read a COCO json file, packed by gzip or not, in any Unicode encoding.

    Args:
        path: of the file.
        box_format: what a bbox holds, one of :data:`detector.config.BOX_FORMATS`.
        size_of: called for images whose size the file does not tell; None: the images are not there
            to be read, sizes may stay unknown, and file names may be missing.
        need_objects: refuse a file without annotations; otherwise only its images are read.
        known: names of categories by id, which those of the file must be among; None: any.

    Raises:
        DataError: see the top of this file.
    """
    return _Parser(path, box_format, size_of, need_objects).parse(known)


def list_images(folder: Path, names: Sequence[str], size_of: SizeOf) -> Annotations:
    """Images without an annotation file: their ids are their names."""
    sizes = np.array([size_of(name) or (0, 0) for name in names]).reshape(-1, 2)
    return Annotations(
        path=folder,
        image_ids=[*names],
        image_keys=[*names],
        file_names=[*names],
        sizes=sizes,
        sizes_are_given=np.zeros(len(names), bool),
        category_ids=[],
        category_keys=[],
        category_names=[],
        has_objects=False,
    )


def key_of(identifier: Any) -> Key | None:
    """The form in which ids are compared; None if it is no id."""
    if type(identifier) is float:
        if not math.isfinite(identifier):
            return None
        return int(identifier) if identifier.is_integer() else identifier
    if type(identifier) is str:
        text = identifier.strip()
        return int(text) if re.fullmatch(r"0|-?[1-9][0-9]{0,4000}", text) else text
    return identifier if type(identifier) is int else None


def sort_key(key: Key) -> tuple[bool, Any]:
    """To sort ids by: numbers, then texts."""
    return isinstance(key, str), key


def whole_numbers(keys: Sequence[Key]) -> list[int]:
    """Different numbers of 64 bits for ids: themselves, or their positions."""
    if all(type(key) is int and -(2**63) <= key < 2**63 for key in keys):
        return list(keys)
    return list(range(len(keys)))


# ---- numbers in all their forms ------------------------------------------------------------------


def _number(value: Any) -> float:
    """A number, or a text that is one; NaN for anything else."""
    if type(value) in (int, float, str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    return math.nan


def _side(value: Any) -> int:
    """A side of an image in pixels, or 0."""
    number = _number(value)
    return int(number) if 1 <= number <= LARGEST_SIDE and number.is_integer() else 0


def _box(value: Any) -> list[float] | None:
    """Four numbers, some of them maybe NaN; None for anything else."""
    if not isinstance(value, list) or len(value) != 4:
        return None
    return [_number(side) for side in value]


def _extent(segmentation: Any) -> list[float] | None:
    """x0, y0, x1, y1 of polygons [[x, y, x, y, x, y, ...], ...]; None for anything else."""
    if not isinstance(segmentation, list) or not segmentation:
        return None
    polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
    if not all(isinstance(polygon, list) and len(polygon) >= 6 for polygon in polygons):
        return None
    x = [_number(value) for polygon in polygons for value in polygon[0::2]]
    y = [_number(value) for polygon in polygons for value in polygon[1::2]]
    return [min(x), min(y), max(x), max(y)] if all(map(math.isfinite, x + y)) else None


_NO_CROWD, _CROWD = ("", "false"), ("true",)


def _crowd(value: Any) -> bool | None:
    """Whether ``iscrowd`` says so; None if it says neither."""
    if value is None or isinstance(value, bool):
        return bool(value)
    number = _number(value)
    if not math.isnan(number):
        return number != 0
    text = value.strip().lower() if isinstance(value, str) else None
    return {**dict.fromkeys(_NO_CROWD, False), **dict.fromkeys(_CROWD, True)}.get(text)


# ---- the parser ----------------------------------------------------------------------------------


class _Parser:
    """An annotation file, every access to which says what is wrong with it."""

    def __init__(
        self, path: Path, box_format: str, size_of: SizeOf | None, need_objects: bool
    ) -> None:
        self.path, self.box_format, self.size_of = path, box_format, size_of
        self.need_objects, self.findings = need_objects, Findings()

    def parse(self, known: Mapping[Any, str] | None) -> Annotations:
        content = self._content()
        category_ids, category_keys, category_names = self._categories(content["categories"])
        if known is not None:
            self._check_meaning(dict(zip(category_keys, category_names, strict=True)), known)
        ids, keys, names, sizes, sizes_are_given = self._images(content["images"])
        result = Annotations(
            self.path,
            ids,
            keys,
            names,
            sizes,
            sizes_are_given,
            category_ids,
            category_keys,
            category_names,
            has_objects=bool(content["annotations"]),
            findings=self.findings,
        )
        if result.has_objects:
            self._objects(content["annotations"], result)
        return result

    def _fail(self, cause: str) -> NoReturn:
        raise DataError(f"{self.path}: {cause}")

    def _content(self) -> dict[str, list[Any]]:
        try:
            data = self.path.read_bytes()
            if data.startswith(b"\x1f\x8b"):
                data = gzip.decompress(data)
            content = json.loads(data)  # UTF-8, -16 or -32, with a byte order mark or without
        except (OSError, EOFError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path} cannot be read: {error}") from None
        if isinstance(content, list):
            self._fail(
                "file has no 'images': it is a list, as results are; annotations are an object "
                "with 'images', 'annotations' and 'categories'"
            )
        if not self.need_objects and isinstance(content, dict) and not content.get("annotations"):
            categories = content.get("categories") or []
            content = {"images": self._get(content, "images", "file"), "categories": categories}
            content["annotations"] = []
        for key in ("images", "annotations", "categories"):
            if not isinstance(self._get(content, key, "file"), list):
                self._fail(f"{key!r} must be a list")
            if not content[key] and (self.need_objects or key == "images"):
                self._fail(f"{key!r} is empty")
        return content

    def _get(self, record: Any, key: str, what: str) -> Any:
        if not isinstance(record, dict) or key not in record:
            self._fail(f"{what} has no {key!r}")
        return record[key]

    def _named(self, kind: str, records: list[Any], name: str) -> list[tuple[Any, Key, str, Any]]:
        """Id, its key, name and record of images or categories, without those listed twice."""
        known: dict[Key, str] = {}
        entries, repeated = [], []
        for i, record in enumerate(records):
            identifier = self._get(record, "id", f"{kind}[{i}]")
            key, text = key_of(identifier), self._get(record, name, f"{kind}[{i}]")
            if key is None:
                self._fail(f"an id in {kind!r} must be a number or a text, got {identifier!r}")
            if type(text) not in (str, int, float):
                self._fail(f"{name!r} of {kind}[{i}] must be a text, got {text!r}")
            text = str(text)
            if key not in known:
                known[key] = text
                entries.append((identifier, key, text, record))
            elif known[key] == text:
                repeated.append(text)
            else:
                self._fail(
                    f"ids in {kind!r} must differ from each other, got {identifier!r} for "
                    f"{known[key]!r} and {text!r}"
                )
        one, several, called = _WORDS[kind]
        self.findings.add(f"{{{one} is|{several} are}} listed twice, and {_COUNTS} once", repeated)
        again = _repeated(text for _, _, text, _ in entries)
        self.findings.add(
            f"{{{called} stands|{called}s stand}} for several {several} with different ids", again
        )
        return entries

    def _images(
        self, records: list[Any]
    ) -> tuple[list[Any], list[Key], list[str], np.ndarray, np.ndarray]:
        if self.size_of is None:
            records = [
                {"file_name": str(r.get("id")), **r} if isinstance(r, dict) else r for r in records
            ]
        entries = self._named("images", records, "file_name")
        ids, keys, names, records = (list(column) for column in zip(*entries, strict=True))
        sizes = np.array(
            [[_side(record.get("width")), _side(record.get("height"))] for record in records]
        )
        are_given = (sizes > 0).all(1)
        unknown = np.flatnonzero(~are_given)
        sizes[unknown] = 0
        for i in unknown if self.size_of else ():
            sizes[i] = self.size_of(names[i]) or (0, 0)
        self.findings.add(
            "{size of an image is|sizes of images are} missing or no whole number above 0, and "
            + ("taken from the images" if self.size_of else "unknown"),
            [names[i] for i in unknown[:NUM_EXAMPLES]],
            len(unknown),
        )
        return ids, keys, names, sizes, are_given

    def _categories(self, records: list[Any]) -> tuple[list[Any], list[Key], list[str]]:
        entries = self._named("categories", records, "name") if records else []
        entries.sort(key=lambda entry: sort_key(entry[1]))
        return [e[0] for e in entries], [e[1] for e in entries], [e[2] for e in entries]

    def _check_meaning(self, own: Mapping[Key, str], known: Mapping[Any, str]) -> None:
        names = {key_of(identifier): name for identifier, name in known.items()}
        for key, name in own.items():
            if names.get(key) != name:
                meaning = repr(names[key]) if key in names else "nothing"
                self._fail(f"category {key} is {name!r}, for the model it is {meaning}")

    # ---- objects ---------------------------------------------------------------------------------

    def _objects(self, records: list[Any], result: Annotations) -> None:
        """Fill in the objects of ``result``."""
        rows = self._rows(records, result)
        image, category, crowd, area, is_corners = (
            np.array(column)
            for column in (rows.images, rows.categories, rows.crowds, rows.areas, rows.is_corners)
        )
        image, category = image.astype(np.int64), category.astype(np.int64)
        boxes = np.array(rows.boxes, dtype=np.float64).reshape(-1, 4)
        is_corners = is_corners.astype(bool)
        sizes = result.sizes[image].astype(np.float64)  # (N, 2)

        def name(kind: str, chosen: np.ndarray) -> None:
            first = list(dict.fromkeys(image[chosen].tolist()))[:NUM_EXAMPLES]
            names = [result.file_names[i] for i in first]
            self.findings.add(kind, names, int(chosen.sum()))

        is_finite = np.isfinite(boxes).all(1)
        name(f"{_BOX} not four numbers [x, y, width, height], and {_DROPPED}", ~is_finite)
        kept = is_finite
        if self.box_format == "coco":
            own = is_finite & ~is_corners & (boxes[:, 2:] > 0).all(1)
            self._ask_about_shares(boxes[own], len(records))
            self._ask_about_corners(boxes[own], sizes[own])
            sub_pixel = own & _within(boxes, 0, 1) & (boxes[:, 2:] < 1).all(1)
            name(f"{_BOX} in 0..1, as shares of an image would be, and {_DROPPED}", sub_pixel)
            kept = kept & ~sub_pixel

        with np.errstate(all="ignore"):
            corners, given = _in_pixels(boxes, is_corners, sizes, self.box_format)
            limits = np.where(sizes > 0, sizes, np.inf)
            if self.box_format.startswith("relative-"):
                unknown = kept & ~(sizes > 0).all(1)
                name(f"{_BOX} in an image of unknown size, and {_DROPPED}", unknown)
                kept = kept & ~unknown
            cut = np.clip(corners, 0, np.tile(limits, 2))
            outside = kept & (np.abs(corners - cut) > 1).any(1)
            has_extent = (cut[:, 2:] > cut[:, :2]).all(1)
            given[outside] = np.concatenate([cut[:, :2], cut[:, 2:] - cut[:, :2]], 1)[outside]
            bad_area = ~((area > 0) & (area <= LARGEST_AREA))
            area[bad_area] = given[bad_area, 2:].prod(1)
        name(f"{_REACHES} outside of {{its image and is|their images and are}} clipped", outside)
        empty = kept & ~has_extent
        name(f"{{box has|boxes have}} no extent inside the image, and {_DROPPED}", empty)
        kept = kept & has_extent
        if not (kept & ~crowd).any():
            self._fail(
                "no annotation has a box with an extent inside its image"
                + "".join(f"; {line}" for line in self.findings.lines())
            )

        order = np.flatnonzero(kept)
        order = order[np.argsort(image[order], kind="stable")]
        counts = np.bincount(image[order], minlength=len(result.image_ids))
        result.starts = np.concatenate([[0], counts.cumsum()])
        result.categories, result.crowds = category[order], crowd[order]
        result.boxes, result.given, result.areas = cut[order], given[order], area[order]

    def _rows(self, records: list[Any], result: Annotations) -> _Rows:
        """What the annotations of images that are listed say, not judged yet."""
        position_of_image = {key: i for i, key in enumerate(result.image_keys)}
        position_of_category = {key: i for i, key in enumerate(result.category_keys)}
        rows, ids = _Rows(), []
        strangers: list[Any] = []
        unknown: list[tuple[int, Any]] = []
        odd_crowds, odd_areas, from_polygons = [], [], []
        for i, record in enumerate(records):
            what = f"annotations[{i}]"
            image_id, category_id = (
                self._get(record, key, what) for key in ("image_id", "category_id")
            )
            ids.append(record.get("id"))
            image = position_of_image.get(key_of(image_id))
            category = position_of_category.get(key_of(category_id))
            if image is None:
                strangers.append(image_id)
                continue
            if category is None:
                unknown.append((i, category_id))
                continue
            name = result.file_names[image]
            box, is_corners = record.get("bbox"), False
            if box in (None, [], "") and (extent := _extent(record.get("segmentation"))):
                box, is_corners = extent, True
                from_polygons.append(name)
            crowd, area = _crowd(record.get("iscrowd")), _number(record.get("area"))
            if crowd is None:
                odd_crowds.append(name)
            if record.get("area") is not None and not 0 < area <= LARGEST_AREA:
                odd_areas.append(name)
            rows.images.append(image)
            rows.categories.append(category)
            rows.boxes.append(_box(box) or [math.nan] * 4)
            rows.is_corners.append(is_corners)
            rows.crowds.append(bool(crowd))
            rows.areas.append(area)

        if unknown:
            i, category_id = unknown[0]
            more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
            self._fail(f"annotations[{i}] is of an unknown category, {category_id!r}{more}")
        if not rows.images:
            self._fail(
                f"no annotation is of an image that is listed: they are of {strangers[0]!r}, ..., "
                f"images have the ids {result.image_ids[0]!r}, ..."
            )
        add = self.findings.add
        add("{annotation is|annotations are} of images not listed, and left out", strangers)
        repeated = _repeated(key for key in map(key_of, ids) if key is not None)
        add("{id stands|ids stand} for several annotations, all of which count", repeated)
        add(f"{_BOX} missing, and taken from the polygons of the segmentation", from_polygons)
        add("{value|values} of iscrowd without a meaning: taken for no crowd", odd_crowds)
        add("{area is|areas are} no number above 0: that of the box is taken", odd_areas)
        return rows

    def _ask_about_shares(self, boxes: np.ndarray, total: int) -> None:
        number = int(_within(boxes, -0.01, 1.01).sum())
        if 2 * number >= len(boxes) > 0:
            self._fail(
                f"the boxes of {number} of {total} annotations hold nothing but numbers in 0..1; "
                f"COCO's are x, y, width, height in pixels. Give --box-format {_RELATIVE} if they "
                "are shares of the image's sides, or xywh if they are pixels all the same"
            )

    def _ask_about_corners(self, boxes: np.ndarray, sizes: np.ndarray) -> None:
        known = (sizes > 0).all(1)
        boxes, sizes = boxes[known], sizes[known] + 1
        start, end = boxes[:, :2], boxes[:, 2:]
        with np.errstate(over="ignore"):
            beyond = (start + end > sizes).any(1).sum()
        as_corners = ((end > start) & (end <= sizes)).all(1).sum()
        if len(boxes) and beyond >= 0.2 * len(boxes) and as_corners >= 0.9 * len(boxes):
            self._fail(
                f"{beyond} of {len(boxes)} boxes reach outside of their images if read as x, y, "
                f"width, height, as COCO's are, but {as_corners} fit if read as x0, y0, x1, y1. "
                "Give --box-format xyxy if that is what they are, or xywh to read them as COCO's"
            )


@dataclass
class _Rows:
    """Columns of a table of annotations."""

    images: list[int] = field(default_factory=list)  # positions
    categories: list[int] = field(default_factory=list)  # positions
    boxes: list[list[float]] = field(default_factory=list)
    is_corners: list[bool] = field(default_factory=list)  # of polygons, not by box_format
    crowds: list[bool] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)


# Of findings, which see: one, several, and what they are called by.
_WORDS = {
    "images": ("image", "images", "file name"),
    "categories": ("category", "categories", "name"),
}
_COUNTS, _DROPPED = "{counts|count}", "{is|are} dropped"
_BOX, _REACHES = "{box is|boxes are}", "{box reaches|boxes reach}"
_RELATIVE = ", ".join(name for name in BOX_FORMATS if name.startswith("relative-"))


def _repeated(values: Iterable[Any]) -> list[Any]:
    return [value for value, count in Counter(values).items() if count > 1]


def _within(boxes: np.ndarray, low: float, high: float) -> np.ndarray:
    """Which boxes (N, 4) hold nothing but numbers in that range, (N,)."""
    return ((boxes >= low) & (boxes <= high)).all(1)


def _in_pixels(
    boxes: np.ndarray, is_corners: np.ndarray, sizes: np.ndarray, box_format: str
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes (N, 4) in ``box_format`` as x0, y0, x1, y1 and as x, y, width, height, in pixels.

    Those of ``is_corners`` (N,) are x0, y0, x1, y1 already, in the same unit.
    """
    if box_format.startswith("relative-"):
        boxes = boxes * np.tile(sizes, 2)
    first, second = boxes[:, :2], boxes[:, 2:]
    form = box_format.removeprefix("relative-")
    if form == "xyxy":
        corners, given = boxes.copy(), np.concatenate([first, second - first], 1)
    elif form == "cxcywh":
        corners = np.concatenate([first - second / 2, first + second / 2], 1)
        given = np.concatenate([corners[:, :2], second], 1)
    else:
        corners, given = np.concatenate([first, first + second], 1), boxes.copy()
    corners[is_corners] = boxes[is_corners]
    given[is_corners] = np.concatenate([first, second - first], 1)[is_corners]
    return corners, given
