"""A picture that is like no other turned or mirrored, and data sets of such."""

import json

import numpy as np
import torch

from detector.data import CocoDetection
from detector.data.images import ImageRules, read_image
from detector.data.transforms import Augmentation, denormalise

AS_IS = Augmentation((0,), 10000, crop=False, horizontal_flip=0.0)
RULES, IGNORE = ImageRules(), ImageRules(exif="ignore")
GREY = (
    np.linspace(20, 235, 64).astype(np.uint8)[None].repeat(48, 0)
)  # (48, 64), to the right lighter
BOX = (8, 6, 24, 26)  # x0, y0, x1, y1 of what is red


def pixels_of(path, rules=RULES):
    image = read_image(path, rules).image
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def red_box(picture):
    """x0, y0, x1, y1 around what is red."""
    pixels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero(pixels[..., 0] - pixels[..., 1] > 100)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def dataset_of(folder, images, rules=RULES, training=True, **options):
    """Of images (name, json size or None, box) with one object each."""
    records = [
        {"id": i, "file_name": name}
        | ({} if size is None else dict(zip(("width", "height"), size, strict=True)))
        for i, (name, size, _) in enumerate(images)
    ]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        for i, (*_, (x0, y0, x1, y1)) in enumerate(images)
    ]
    content = {"images": records, "annotations": annotations}
    content["categories"] = [{"id": 1, "name": "red"}]
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps(content))
    return CocoDetection(folder, path, AS_IS, training=training, rules=rules, **options)


def object_and_red(dataset, index=0):
    """The box of the item, in pixels, and that around what is red in its picture."""
    image, target = dataset[index]
    picture = denormalise(image)
    cx, cy, w, h = (target["boxes"][0] * torch.tensor(picture.size).repeat(2)).tolist()
    return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], red_box(picture)
