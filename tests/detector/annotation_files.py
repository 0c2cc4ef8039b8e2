"""Annotation files with something changed, and what is read of them."""

import copy
import json

from PIL import Image

from detector.config import DataConfig
from detector.data import build_dataset
from detector.data.annotations import read_annotations

WIDTH, HEIGHT = 64, 48
CONTENT = {
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(4)
    ],
    "annotations": [
        {"id": 10 + i, "image_id": i, "category_id": 1 + i % 2, "bbox": [8 * i + 2, 6, 10, 20]}
        for i in range(4)
    ],
    "categories": [{"id": 1, "name": "one"}, {"id": 2, "name": "two"}],
}


def write_split(folder, content=CONTENT, images=True):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(4) if images else ():
        Image.new("RGB", (WIDTH, HEIGHT), (40 * i, 0, 0)).save(folder / f"{i}.png")
    if content is not None:
        (folder / "_annotations.coco.json").write_text(json.dumps(content))


def changed(change):
    content = copy.deepcopy(CONTENT)
    change(content)
    return content


def read(tmp_path, change=lambda content: None, **options):
    """The parsed file, without the images."""
    path = tmp_path / "a.json"
    path.write_text(json.dumps(changed(change)))
    return read_annotations(path, **options)


def train_set(folder, change=lambda content: None, **options):
    (folder / "train/_annotations.coco.json").write_text(json.dumps(changed(change)))
    config = DataConfig(data_path=str(folder), short_sides=(0,), crop=False, horizontal_flip=0)
    return build_dataset(config, "train", **options)


def set_all(kind, **fields):
    def change(content):
        for record in content[kind]:
            record.update(copy.deepcopy(fields))

    return change


def finding(annotations):
    """The one finding there is."""
    (line,) = annotations.findings.lines()
    return line


# ---- boxes ---------------------------------------------------------------------------------------


POLYGON = [10, 5, 30.5, 6, 20, 25]
