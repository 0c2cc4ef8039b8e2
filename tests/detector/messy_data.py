"""A data set with everything that people's data has, each kind many times over.

python -m tests.detector.messy_data FOLDER 300
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red thing": (220, 40, 40), "green thing": (40, 200, 60), "blue thing": (60, 80, 230)}
ORIENTATION = 0x0112
# What a viewer undoes, by orientation.
STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def paint(width, height, chance, grey=False):
    """A picture with filled rectangles, and (box, class) of each."""
    pixels = np.linspace(90, 160, width, dtype=np.uint8)[None, :, None].repeat(height, 0)
    picture = Image.fromarray(pixels.repeat(3, 2))
    draw, objects = ImageDraw.Draw(picture), []
    for _ in range(chance.randint(1, 3)):
        w, h = (max(1, chance.randint(side // 6, side // 2)) for side in (width, height))
        x, y = chance.randint(0, width - w), chance.randint(0, height - h)
        name = chance.choice(list(COLOURS))
        draw.rectangle((x, y, x + w - 1, y + h - 1), COLOURS[name])
        objects.append(([x, y, w, h], name))
    return picture, objects


def deep(picture, white):
    """Grey in 0 .. white."""
    return np.asarray(picture.convert("L")).astype(np.float64) / 255 * white


def stored(picture, orientation):
    return picture.transpose(STORED[orientation]) if orientation in STORED else picture


def with_orientation(path, picture, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored(picture, orientation).save(path, exif=exif)


def transparent(picture):
    picture.putalpha(Image.linear_gradient("L").resize(picture.size).point(lambda v: 128 + v // 2))
    return picture


def animated(path, picture, **options):
    picture.save(path, save_all=True, append_images=[picture.rotate(180)] * 2, **options)


def cut(path, picture):
    picture.save(path)
    path.write_bytes(path.read_bytes()[:-100])


# Kinds that can be read: suffix, how to write it, and what the json says otherwise.
KINDS = {
    "plain": (".png", lambda path, p: p.save(path)),
    "jpeg": (".jpg", lambda path, p: p.save(path, quality=95)),
    "grey": (".png", lambda path, p: p.convert("L").save(path)),
    "bits": (".png", lambda path, p: p.convert("1").save(path)),
    "palette": (".gif", lambda path, p: p.convert("P").save(path)),
    "cmyk": (".jpg", lambda path, p: p.convert("CMYK").save(path, quality=95)),
    "lab": (".tif", lambda path, p: p.convert("LAB").save(path)),
    "alpha": (".png", lambda path, p: transparent(p).save(path)),
    "hidden": (".png", lambda path, p: (p.putalpha(0), p.save(path))),
    "deep_png": (".png", lambda path, p: _save(path, deep(p, 65535), np.uint16)),
    "deep_tiff": (".tif", lambda path, p: _save(path, deep(p, 65535), np.dtype(">u2"))),
    "int32": (".tif", lambda path, p: _save(path, deep(p, 65535), np.int32)),
    "float": (".tif", lambda path, p: _save(path, deep(p, 1), np.float32)),
    "twelve_bits": (".png", lambda path, p: _save(path, deep(p, 4095), np.uint16)),
    "animated": (".gif", lambda path, p: animated(path, p.convert("P"))),
    "pages": (".tif", lambda path, p: animated(path, p)),
    "wrong_suffix": (".jpg", lambda path, p: p.save(path, "PNG")),
    **{
        f"orientation_{n}": (".jpg", lambda path, p, n=n: with_orientation(path, p, n))
        for n in range(2, 9)
    },
    "orientation_tiff": (".tif", lambda path, p: with_orientation(path, p, 6)),
}
UNREADABLE = {
    "cut": (".png", cut),
    "empty": (".png", lambda path, p: path.write_bytes(b"")),
    "text": (".jpg", lambda path, p: path.write_text("<html>404</html>")),
    "missing": (".png", lambda path, p: None),
    "float_wide": (".tif", lambda path, p: _save(path, deep(p, 255), np.float32)),
    "not_finite": (".tif", lambda path, p: _save(path, deep(p, np.nan), np.float32)),
}
# What the json says of an image and its size, beside the truth.
SIZES = {
    "told": lambda w, h: {"width": w, "height": h},
    "missing": lambda w, h: {},
    "null": lambda w, h: {"width": None, "height": None},
    "zero": lambda w, h: {"width": 0, "height": h},
    "floats": lambda w, h: {"width": float(w), "height": float(h)},
    "texts": lambda w, h: {"width": str(w), "height": f"{h}.0"},
}
SHAPES = [(96, 72), (72, 96), (64, 64), (32, 32), (160, 120), (1, 300), (300, 1), (17, 9)]


def _save(path, values, dtype):
    Image.fromarray(values.astype(dtype)).save(path)


def messy_annotation(record, chance):
    """The same in another form, or None in its place."""
    x, y, w, h = record["bbox"]
    forms = [
        {},
        {"iscrowd": None, "area": None},
        {"iscrowd": "0", "area": str(w * h)},
        {"iscrowd": False, "area": [w * h], "segmentation": None},
        {"iscrowd": 0.0, "area": "?", "bbox": [str(side) for side in (x, y, w, h)]},
        {"bbox": None, "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]},
        {"bbox": [x, y, w + 500, h], "mean": "clipped"},
        {"bbox": [float("nan"), y, w, h], "mean": "dropped"},
        {"bbox": [x, y, 0, h], "mean": "dropped"},
        {"bbox": [x + 1e9, y, w, h], "mean": "dropped"},
        {"bbox": [x, y, -w, h], "mean": "dropped"},
        {"bbox": "none", "mean": "dropped"},
        {"bbox": [x, y, True, h], "mean": "dropped"},
        {"iscrowd": 1},
    ]
    form = chance.choice(forms[:6] * 4 + forms)
    form.pop("mean", None)
    return record | form


def write_split(folder, num_images, seed, unreadable=True):
    """Write images and their annotation file."""
    folder.mkdir(parents=True, exist_ok=True)
    chance = random.Random(seed)
    ids = {name: number for number, name in zip(("7", 2.0, "c"), COLOURS, strict=True)}
    images, annotations = [], []
    kinds = list(KINDS.items()) + (list(UNREADABLE.items()) if unreadable else [])
    for i in range(num_images):
        kind, (suffix, write) = kinds[i % len(kinds)]
        width, height = chance.choice(SHAPES)
        picture, objects = paint(width, height, chance)
        name = f"{kind}-{i:04d}{suffix}"
        if chance.random() < 0.1:
            (folder / "öther folder").mkdir(exist_ok=True)
            name = f"öther folder\\{name}" if chance.random() < 0.5 else f"öther folder/{name}"
        write(folder / name.replace("\\", "/"), picture)
        image_id = [i, f"image {i}", float(i), 2**64 + i][i // 3 % 4]
        size = chance.choice(["told"] * 4 + list(SIZES))
        images.append({"id": image_id, "file_name": name} | SIZES[size](width, height))
        for box, category in objects:
            record = {"id": len(annotations) % 1000, "image_id": image_id, "bbox": box}
            record |= {"category_id": ids[category], "iscrowd": 0, "area": box[2] * box[3]}
            annotations.append(messy_annotation(record, chance))
    images.append(dict(images[0]))
    annotations += [annotations[0] | {"image_id": "stranger"}] * 5
    content = {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name} for name, number in ids.items()]
        + [{"id": 0, "name": "things"}],
    }
    text = json.dumps(content, ensure_ascii=False)
    (folder / "_annotations.coco.json").write_bytes(text.encode("utf-16"))


def write(folder, num_images):
    """Splits train, valid and test, the last with images alone."""
    write_split(folder / "train", num_images, seed=0)
    write_split(folder / "valid", num_images // 3, seed=1)
    write_split(folder / "test", num_images // 6, seed=2)
    (folder / "test/_annotations.coco.json").unlink()


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]))
