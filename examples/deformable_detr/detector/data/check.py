"""What is in a data set: text and pictures to look at before it is trained on."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from detector.config import DataConfig
from detector.data import CocoDetection, DataError, SplitMissing, build_dataset
from detector.data.annotations import Findings
from detector.drawing import draw_boxes

SPLITS = ("train", "val", "test")

# Of a sheet.
COLUMNS, ROWS = 4, 3
TILE = 420  # pixels of an image's longer side, which is drawn larger and then reduced
DRAWN = 640
CAPTION = 24
MOST_ODD = 6  # images that are odd, each otherwise; the others show the classes
THIN = 6  # ratio of the sides of images that are shown last

NUM_LISTED = 10  # classes without an object
FEW = 0.6  # share of the images that boxes use, so small that they may be of other images
ENOUGH_BOXES = 20  # to say so


def check_data(config: DataConfig, folder: Path, splits: Sequence[str] = SPLITS) -> int:
    """Print what the splits of a data set hold, and draw a sheet of samples of each.

    Args:
        config: says what data it is.
        folder: for the sheets, ``SPLIT.png``.
        splits: their names; those that are missing are said to be.

    Returns:
        0, or 1 if a split cannot be used or none is there.
    """
    checked, failed, names = 0, False, None
    # What it would report as it comes is printed in order.
    log = logging.getLogger("detector")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        for split in splits:
            try:
                dataset = build_dataset(
                    config, split, categories=names, need_objects=split == "train"
                )
            except SplitMissing as error:
                missing = str(error) if split == splits[-1] and not checked else "not there"
                print(f"{split}: {missing}\n")
                continue
            except (DataError, OSError) as error:
                print(f"{split}: error: {error}\n")
                failed = True
                continue
            if names is None and dataset.categories:
                names = dict(zip(dataset.category_ids, dataset.categories, strict=True))
            sizes = _read_all(dataset, split)
            print(describe(dataset, split, sizes))
            if any(size is not None for size in sizes):
                folder.mkdir(parents=True, exist_ok=True)
                path = folder / f"{split}.png"
                draw_sheet(dataset, choose(dataset, sizes)).save(path)
                print(f"  samples    {path}")
            print()
            checked += 1
    finally:
        log.setLevel(level)
    return int(failed or not checked)


Size = tuple[int, int]


def _read_all(dataset: CocoDetection, split: str) -> list[Size | None]:
    """(width, height) of every image, None where it cannot be read."""

    def size_of(index: int) -> Size | None:
        image = dataset.read(index)
        return None if image is None else image.size

    with ThreadPoolExecutor() as pool:  # Pillow decodes outside of Python's lock
        sizes = pool.map(size_of, range(len(dataset)))
        return list(tqdm(sizes, f"reading {split}", len(dataset), unit="image", disable=None))


# ---- text ----------------------------------------------------------------------------------------


def describe(dataset: CocoDetection, split: str, sizes: Sequence[Size | None]) -> str:
    """The text on a split whose images have been read."""
    content = dataset.annotations
    readable = np.array([size for size in sizes if size is not None]).reshape(-1, 2)
    lines = [f"{split}: {dataset.coco_json}"]

    def say(title: str, text: str) -> None:
        lines.append(f"  {title:9}  {text}")

    bad = len(sizes) - len(readable)
    say("images", f"{len(sizes)}" + (f", {bad} of which cannot be read" if bad else ""))
    if len(readable):
        low, high = readable.min(0), readable.max(0)
        middle = np.median(readable, 0).astype(int)
        say(
            "sizes",
            f"median {middle[0]} x {middle[1]}; width {low[0]} .. {high[0]}, "
            f"height {low[1]} .. {high[1]}",
        )
    if not content.has_objects:
        say("objects", "not known: there are no annotations")
    else:
        lines += _objects(dataset, say)
    lines += _remarks(dataset)
    return "\n".join(lines)


def _objects(dataset: CocoDetection, say: Callable[[str, str], None]) -> list[str]:
    """Counts of objects and a table of the classes."""
    content, kept = dataset.annotations, ~dataset.annotations.crowds
    counts = np.bincount(content.images_of_objects[kept], minlength=len(dataset))
    small, large = dataset.area_sides
    # 0, 1, 2: small, medium, large
    kinds = np.digitize(content.areas[kept], [small**2, large**2])
    crowds = int(content.crowds.sum())
    say(
        "objects",
        f"{kept.sum()}" + (f", and {crowds} crowds, which are not trained on" if crowds else ""),
    )
    say(
        "per image",
        f"{counts.min()} .. {counts.max()}, median {np.median(counts):g}; "
        f"{(counts == 0).sum()} images without any",
    )
    labels = np.array(dataset.labels_of_categories)[content.categories[kept]]
    table = np.zeros((dataset.num_classes, 3), int)
    np.add.at(table, (labels, kinds), 1)
    pairs = np.unique(np.stack([labels, content.images_of_objects[kept]]), axis=1)
    images = np.bincount(pairs[0], minlength=dataset.num_classes)

    own = set(dataset.labels_of_categories)
    rows = [
        (dataset.categories[label], str(dataset.category_ids[label]), table[label], images[label])
        for label in range(dataset.num_classes)
        if label in own
    ]
    rows.append(("all", "", table.sum(0), (counts > 0).sum()))
    widths = [
        max(len(title), *(len(row[i]) for row in rows)) for i, title in ((0, "class"), (1, "id"))
    ]
    names = [f"small (< {small})", "medium", f"large (>= {large})"]
    lines = [
        "",
        f"  {'class':{widths[0]}}  {'id':>{widths[1]}}  objects  images  " + "  ".join(names),
    ]
    for name, number, by_size, in_images in rows:
        parts = "  ".join(
            f"{count:{len(title)}}" for count, title in zip(by_size, names, strict=True)
        )
        start = f"  {name:{widths[0]}}  {number:>{widths[1]}}"
        lines.append(f"{start}  {by_size.sum():7}  {in_images:6}  {parts}")
    return lines


def _remarks(dataset: CocoDetection) -> list[str]:
    """What was dropped, clipped or odd, and what looks as if it were meant otherwise."""
    lines = []
    images = dataset.image_findings(unreadable=False)
    unreadable = Findings()
    for name in sorted(dataset.causes, key=dataset.annotations.file_names.index):
        # Not how many bytes of it are missing.
        unreadable.add(re.sub(r" \(.*\)$", "", dataset.causes[name]), [name])
    for title, findings in (
        ("odd, and what is made of it", (dataset.annotations.findings, images)),
        ("images that cannot be read, and why", (unreadable,)),
    ):
        entries = [entry for part in findings for entry in part.entries()]
        lines += ["", f"  {title}"] if entries else []
        for count, kind, names in entries:
            more = ", ..." if count > len(names) else ""
            lines += [f"  {count:7}  {kind}", f"           {_printable(names)}{more}"]
    questions = _questions(dataset)
    if questions:
        lines += ["", "  worth a thought", *(f"           {question}" for question in questions)]
    return [*lines, ""]


def _printable(names: Sequence[str]) -> str:
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _questions(dataset: CocoDetection) -> list[str]:
    questions, content = [], dataset.annotations
    seen = set(content.categories[~content.crowds].tolist())
    unseen = [name for i, name in enumerate(content.category_names) if i not in seen]
    if content.has_objects and unseen:
        questions.append(f"classes without an object: {_printable(unseen[:NUM_LISTED])}")
    sizes = content.sizes[content.images_of_objects]
    known = (sizes > 0).all(1)
    if known.sum() >= ENOUGH_BOXES:
        reach = (content.boxes[known, 2:] / sizes[known]).max(0)
        if (reach < FEW).all():
            questions.append(
                f"no box reaches beyond {reach[0]:.0%} of the width and {reach[1]:.0%} of the "
                "height of its image: are they of these images, in this size?"
            )
    return questions


# ---- pictures ------------------------------------------------------------------------------------


def choose(dataset: CocoDetection, sizes: Sequence[Size | None]) -> list[int]:
    """Images for a sheet: some that are odd, some for each class, then any; always the same."""
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    order = [i for i in order if sizes[i] is not None]
    order.sort(key=lambda i: max(sizes[i]) > THIN * min(sizes[i]))
    chosen: list[int] = []
    odd: set[str] = set()
    for i in order:
        new = set(dataset.oddities_of(i)) - odd
        if new and len(chosen) < MOST_ODD:
            chosen.append(i)
            odd |= new
    shown = {label for i in chosen for label in dataset.objects(i, sizes[i])[1].tolist()}
    for wants_new in (True, False):
        for i in order:
            labels = set(dataset.objects(i, sizes[i])[1].tolist())
            if (
                len(chosen) < COLUMNS * ROWS
                and i not in chosen
                and (labels - shown if wants_new else labels or not dataset.annotations.has_objects)
            ):
                chosen.append(i)
            shown |= labels if i in chosen else set()
    return chosen


def draw_sheet(dataset: CocoDetection, indices: Sequence[int]) -> Image.Image:
    """Images as training gets them, but for the augmentation, with their boxes and names."""
    rows = -(-len(indices) // COLUMNS)
    gap, height = 10, TILE + CAPTION
    sheet = Image.new("RGB", (COLUMNS * (TILE + gap) + gap, rows * (height + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for place, index in enumerate(indices):
        image = dataset.read(index)
        size = image.size
        scale = DRAWN / max(size)
        image = image.resize([max(1, round(side * scale)) for side in size])
        boxes, labels = dataset.objects(index, image.size)
        names = [dataset.categories[label] for label in labels.tolist()]
        picture = draw_boxes(image, boxes, labels.tolist(), names, font_share=1 / 26)
        picture.thumbnail((TILE, TILE))
        x, y = gap + place % COLUMNS * (TILE + gap), gap + place // COLUMNS * (height + gap)
        draw.rectangle((x, y + CAPTION, x + TILE - 1, y + height - 1), "gainsboro")
        sheet.paste(picture, (x + (TILE - picture.width) // 2, y + CAPTION))
        caption = f"{dataset.annotations.file_names[index]}   {size[0]} x {size[1]}"
        draw.text((x, y + 3), _shortened(caption, font), "black", font)
    return sheet


def _shortened(text: str, font: ImageFont.FreeTypeFont) -> str:
    """The end of a text that is too long for a tile."""
    start = 0
    while font.getlength(text[start:]) > TILE:
        start += 1
    return text[start:]
