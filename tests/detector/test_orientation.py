"""Images of the detector whose EXIF turns them, or whose size the json contradicts."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from detector.data.coco import SCALED, TURNED, TURNED_BACK, UNDECIDED
from detector.data.images import (
    BROKEN_EXIF,
    ImageRules,
    inverse_turn,
    read_image,
    read_size,
    turn_boxes,
)
from detector.data.loading import make_loader
from tests.detector.image_files import BOX, IGNORE, RULES, dataset_of, object_and_red, red_box
from tests.detector.messy_data import stored, with_orientation

# ---- EXIF ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright_or_left_as_stored(
    tmp_path, photo, orientation, suffix
):
    path = tmp_path / f"a.{suffix}"
    with_orientation(path, photo, orientation)
    as_stored = stored(photo, orientation)
    for rules, expected in ((RULES, photo), (IGNORE, as_stored)):
        read = read_image(path, rules)
        assert read.image.size == expected.size == read_size(path, rules)
        assert read.orientation == orientation
        error = np.asarray(read.image).astype(int) - np.asarray(expected)
        assert abs(error).mean() < 5  # turned wrongly, it is above 20
    assert read.other_size == photo.size
    boxes = torch.tensor([[*map(float, red_box(as_stored))]])
    assert turn_boxes(boxes, orientation, as_stored.size).tolist() == [list(BOX)]
    back = turn_boxes(torch.tensor([[*map(float, BOX)]]), inverse_turn(orientation), photo.size)
    assert back.tolist() == boxes.tolist()


@pytest.mark.parametrize("is_square", [False, True])
@pytest.mark.parametrize("told", [True, False], ids=["size in the json", "no size"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_boxes_drawn_on_upright_images_stay_on_their_object(
    tmp_path, photo, orientation, told, is_square
):
    photo = photo.crop((0, 0, 48, 48)) if is_square else photo
    with_orientation(tmp_path / "a.tif", photo, orientation)
    dataset = dataset_of(tmp_path, [("a.tif", photo.size if told else None, BOX)])
    box, red = object_and_red(dataset)
    np.testing.assert_allclose(box, red, atol=0.01)
    np.testing.assert_allclose(red, BOX)
    sizes_tell = told and orientation >= 5 and not is_square
    undecided = orientation > 1 and not sizes_tell
    assert dataset.oddities_of(0) == ([UNDECIDED] if undecided else [])


@pytest.mark.parametrize("exif", ["apply", "ignore"])
@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_drawn_on_images_as_stored_stay_on_their_object(tmp_path, photo, orientation, exif):
    with_orientation(tmp_path / "a.tif", photo, orientation)
    as_stored = stored(photo, orientation)
    images = [("a.tif", as_stored.size, red_box(as_stored))]
    if exif == "apply" and orientation < 5:
        return  # nothing tells: --exif ignore is for those
    dataset = dataset_of(tmp_path, json_of_ints(images), ImageRules(exif=exif), training=False)
    box, red = object_and_red(dataset)
    np.testing.assert_allclose(box, red, atol=0.01)
    np.testing.assert_allclose(red, BOX if exif == "apply" else red_box(as_stored))
    assert dataset.oddities_of(0) == ([TURNED] if exif == "apply" else [])
    # Detections go back to where the boxes were drawn.
    height, width = dataset[0][1]["orig_size"].tolist()
    assert (width, height) == (photo.size if exif == "apply" else as_stored.size)
    back = dataset.as_annotated(0, torch.tensor([box]))
    np.testing.assert_allclose(back[0], red_box(as_stored), atol=0.01)


def json_of_ints(images):
    return [(name, size, [int(side) for side in box]) for name, size, box in images]


def test_where_exif_is_ignored_sizes_can_say_that_boxes_are_of_the_upright_image(tmp_path, photo):
    with_orientation(tmp_path / "a.tif", photo, 6)
    dataset = dataset_of(tmp_path, [("a.tif", photo.size, BOX)], IGNORE)
    box, red = object_and_red(dataset)
    np.testing.assert_allclose(box, red, atol=0.01)
    np.testing.assert_allclose(red, red_box(stored(photo, 6)))
    assert dataset.oddities_of(0) == [TURNED_BACK]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_contradiction_is_said_once_and_counted(tmp_path, photo, request, workers):
    # A file, because worker processes have their own copies of what is in memory.
    logger, handler = logging.getLogger("detector"), logging.FileHandler(tmp_path / "log")
    logger.addHandler(handler)
    request.addfinalizer(lambda: logger.removeHandler(handler))
    as_stored = stored(photo, 6)
    images = []
    for i in range(8):
        with_orientation(tmp_path / f"{i}.jpg", photo, 6)
        images += json_of_ints([(f"{i}.jpg", as_stored.size, red_box(as_stored))])
    dataset = dataset_of(tmp_path, images)
    for _ in range(2):
        list(make_loader(dataset, 2, num_workers=workers))
    (message,) = (tmp_path / "log").read_text().splitlines()
    assert TURNED in message and ".jpg" in message
    (line,) = dataset.image_findings().lines()
    assert line.startswith(f"8 images {TURNED}: '0.jpg', '1.jpg', '2.jpg', ...")


def test_exif_that_cannot_be_read_leaves_an_image_upright(tmp_path, photo):
    photo.save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff broken")
    read = read_image(tmp_path / "a.jpg", RULES)
    assert read.image.size == photo.size and read.orientation == 1
    exif = Image.Exif()
    exif[0x0112] = 77
    photo.save(tmp_path / "a.jpg", exif=exif)
    assert read_image(tmp_path / "a.jpg", RULES).orientation == 1


def test_broken_exif_is_counted(tmp_path, photo, monkeypatch):
    def fail(self):
        raise SyntaxError("not a TIFF file")

    photo.save(tmp_path / "a.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", fail)
    assert read_image(tmp_path / "a.png", RULES).oddities == (BROKEN_EXIF,)


# ---- sizes that contradict -----------------------------------------------------------------------


def test_boxes_are_scaled_where_the_image_was_resized(tmp_path, photo):
    photo.resize((32, 24)).save(tmp_path / "a.png")
    photo.resize((128, 96)).save(tmp_path / "b.png")
    dataset = dataset_of(tmp_path, [("a.png", (64, 48), BOX), ("b.png", (64, 48), BOX)])
    for index in range(2):
        box, red = object_and_red(dataset, index)
        np.testing.assert_allclose(box, red, atol=1)
        assert dataset.oddities_of(index) == [SCALED]
        # Detections are given in the pixels that the annotations speak of.
        assert dataset[index][1]["orig_size"].tolist() == [48, 64]


def test_boxes_are_scaled_and_turned_at_once(tmp_path, photo):
    large = photo.resize((128, 96), Image.Resampling.NEAREST)
    with_orientation(tmp_path / "a.tif", large, 8)
    as_stored = stored(photo, 8)
    dataset = dataset_of(tmp_path, json_of_ints([("a.tif", as_stored.size, red_box(as_stored))]))
    box, red = object_and_red(dataset)
    np.testing.assert_allclose(box, red, atol=0.1)
    assert set(dataset.oddities_of(0)) == {SCALED, TURNED}


@pytest.mark.parametrize("size", [(64, 40), (1, 1), (48, 64), (63, 20)])
def test_an_image_of_another_shape_is_left_out(tmp_path, photo, size, caplog):
    photo.save(tmp_path / "a.png")
    photo.save(tmp_path / "b.png")
    images = [("a.png", size, (0, 0, 1, 1)), ("b.png", (64, 48), BOX)]
    dataset = dataset_of(tmp_path, images, box_format="xywh")
    assert int(dataset[0][1]["image_id"]) == 1
    assert dataset.causes.keys() == {"a.png"}
    assert f"its size is (64, 48), in _annotations.coco.json it is {size}" in caplog.text
