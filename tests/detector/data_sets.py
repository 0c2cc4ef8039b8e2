"""A small data set in both layouts, with something changed, and its items."""

import json

import numpy as np
import torch
from PIL import Image

from detector.config import DataConfig
from detector.data import CocoDetection
from detector.data.transforms import Augmentation

AS_IS = Augmentation((0,), 1333, crop=False, horizontal_flip=0.0)
ORIGINAL = Augmentation(tuple(range(480, 801, 32)), 1333, crop=True, horizontal_flip=0.5)
WIDTH, HEIGHT = 64, 48

# One box per image, on an object that is painted in that colour; ids are neither 0, 1, ... nor
# sorted.
CONTENT = {
    "images": [
        {"id": 30 + i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(4)
    ],
    "annotations": [
        {"id": i, "image_id": 30 + i, "category_id": (7, 3)[i % 2], "bbox": [8 * i, 6, 10, 20]}
        for i in range(4)
    ],
    "categories": [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}],
}


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(CONTENT["images"])):
        pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
        pixels[6:26, 8 * i : 8 * i + 10] = 255
        Image.fromarray(pixels).save(folder / f"{i}.png")


def write_coco_layout(folder, content=CONTENT):
    (folder / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        write_images(folder / split)
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(content))


def write_other_layout(folder, content=CONTENT):
    for split in ("train", "valid"):
        write_images(folder / split)
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def config_of(folder, **changes):
    options = dict(data_path=str(folder), short_sides=(0,), crop=False, horizontal_flip=0.0)
    return DataConfig(**options | changes)


def dataset_of(folder, augmentation=AS_IS, training=True, **options):
    images = folder / ("train" if training else "valid")
    json_file = images / "_annotations.coco.json"
    return CocoDetection(images, json_file, augmentation, training=training, **options)


def change_json(folder, change, split="train"):
    path = folder / split / "_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_same_items(a, b):
    assert len(a) == len(b)
    for (image_a, target_a), (image_b, target_b) in zip(a, b, strict=True):
        torch.testing.assert_close(image_a, image_b, rtol=0, atol=0)
        torch.testing.assert_close(target_a, target_b, rtol=0, atol=0)


def items_of(loader):
    """All items, without their padding."""
    items = []
    for batch in loader:
        for image, target in zip(batch.images, batch.targets, strict=True):
            height, width = target["size"].tolist()
            items.append((image[:, :height, :width], target))
    return items
