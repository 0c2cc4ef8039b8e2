"""Boxes of annotation files: what is clipped or dropped, and other formats."""

import math
import random

import numpy as np
import pytest

from detector.config import BOX_FORMATS
from detector.data import DataError
from tests.detector.annotation_files import HEIGHT, POLYGON, WIDTH, finding, read, set_all

# ---- boxes ---------------------------------------------------------------------------------------


def test_numbers_of_boxes_may_be_texts(tmp_path):
    annotations = read(tmp_path, set_all("annotations", bbox=["1", 2, "12.5", "2e1"]))
    assert annotations.boxes.tolist() == [[1, 2, 13.5, 22]] * 4


@pytest.mark.parametrize(
    "box",
    [
        None,
        "missing",
        [],
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, 3, None],
        [1, 2, 3, True],
        [1, 2, 3, [4]],
        [1, 2, math.nan, 4],
        [1, 2, math.inf, 4],
        [1, 2, "wide", 4],
        [1, 2, 10**400, 4],
        {"x": 1, "y": 2, "width": 3, "height": 4},
        "1 2 3 4",
        7,
    ],
    ids=str,
)
def test_what_is_no_box_is_dropped_and_counted(tmp_path, box):
    def change(content):
        content["annotations"][1]["bbox"] = box
        if box == "missing":
            del content["annotations"][1]["bbox"]

    annotations = read(tmp_path, change)
    assert annotations.images_of_objects.tolist() == [0, 2, 3]
    line = "1 box is not four numbers [x, y, width, height], and is dropped: '1.png'"
    assert finding(annotations) == line


@pytest.mark.parametrize(
    "box",
    [[5, 5, 0, 9], [5, 5, 9, -2], [5, 5, 0, 0], [70, 5, 9, 9], [-20, 5, 9, 9], [9e99, 0, 9, 9]],
)
def test_boxes_without_extent_in_their_image_are_dropped_and_counted(tmp_path, box):
    def change(content):
        content["annotations"][1]["bbox"] = box

    annotations = read(tmp_path, change)
    assert annotations.images_of_objects.tolist() == [0, 2, 3]
    *_, line = annotations.findings.lines()
    assert line == "1 box has no extent inside the image, and is dropped: '1.png'"


@pytest.mark.parametrize("box", [[-1e30, -1e30, 2e30, 2e30], [-9, -9, 1000, 1000]])
def test_huge_boxes_are_clipped_for_training_and_evaluation(tmp_path, box):
    def change(content):
        content["annotations"][1]["bbox"] = box

    annotations = read(tmp_path, change)
    assert annotations.boxes[1].tolist() == annotations.given[1].tolist() == [0, 0, WIDTH, HEIGHT]
    assert annotations.areas[1] == WIDTH * HEIGHT
    assert finding(annotations) == "1 box reaches outside of its image and is clipped: '1.png'"


def test_boxes_that_reach_out_by_a_pixel_are_evaluated_as_they_are(tmp_path):
    def change(content):
        content["annotations"][1]["bbox"] = [60, 40.5, 4.25, 8.5]

    annotations = read(tmp_path, change)
    assert annotations.boxes[1].tolist() == [60, 40.5, WIDTH, HEIGHT]
    assert annotations.given[1].tolist() == [60, 40.5, 4.25, 8.5]
    assert annotations.findings.lines() == []


@pytest.mark.parametrize("segmentation", [[POLYGON], POLYGON, [POLYGON[:6], [12, 7, 13, 7, 13, 8]]])
@pytest.mark.parametrize("box", [None, [], "missing"])
def test_missing_boxes_are_those_of_the_polygons(tmp_path, segmentation, box):
    def change(content):
        content["annotations"][1].update(bbox=box, segmentation=segmentation)
        if box == "missing":
            del content["annotations"][1]["bbox"]

    annotations = read(tmp_path, change)
    assert annotations.boxes[1].tolist() == [10, 5, 30.5, 25]
    assert annotations.given[1].tolist() == [10, 5, 20.5, 20]
    line = "1 box is missing, and taken from the polygons of the segmentation: '1.png'"
    assert finding(annotations) == line


@pytest.mark.parametrize(
    "segmentation",
    [None, [], "polygon", [[]], [[1, 2]], {"counts": "abc"}, [["a"] * 6], [None], True],
)
def test_segmentations_of_any_kind_do_no_harm(tmp_path, segmentation):
    def change(content):
        for record in content["annotations"]:
            record["segmentation"] = segmentation
        content["annotations"][1]["bbox"] = None

    annotations = read(tmp_path, change)
    assert annotations.images_of_objects.tolist() == [0, 2, 3]


def test_an_annotation_file_whose_boxes_are_all_of_no_use_says_why(tmp_path):
    with pytest.raises(
        DataError, match=r"no annotation has a box with an extent.*; 4 boxes are not "
    ):
        read(tmp_path, set_all("annotations", bbox=[1, 2, 3]))


# ---- boxes that are meant otherwise --------------------------------------------------------------


def in_format(box, form, width=WIDTH, height=HEIGHT):
    """[x, y, width, height] in pixels, in another form."""
    x, y, w, h = box
    numbers = {
        "xywh": [x, y, w, h],
        "xyxy": [x, y, x + w, y + h],
        "cxcywh": [x + w / 2, y + h / 2, w, h],
    }[form.removeprefix("relative-")]
    if form.startswith("relative-"):
        numbers = [n / side for n, side in zip(numbers, (width, height) * 2, strict=True)]
    return numbers


def reformatted(form):
    def change(content):
        for record in content["annotations"]:
            record["bbox"] = in_format(record["bbox"], form)

    return change


@pytest.mark.parametrize("form", BOX_FORMATS[1:])
def test_boxes_are_what_the_option_says(tmp_path, form):
    expected = read(tmp_path)
    annotations = read(tmp_path, reformatted(form), box_format=form)
    np.testing.assert_allclose(annotations.boxes, expected.boxes, atol=1e-9)
    np.testing.assert_allclose(annotations.given, expected.given, atol=1e-9)
    np.testing.assert_allclose(annotations.areas, expected.areas, atol=1e-9)


@pytest.mark.parametrize("form", [form for form in BOX_FORMATS if form.startswith("relative")])
def test_boxes_in_0_to_1_are_asked_about(tmp_path, form):
    with pytest.raises(DataError) as error:
        read(tmp_path, reformatted(form))
    (line,) = str(error.value).splitlines()
    assert "boxes of 4 of 4 annotations hold nothing but numbers in 0..1" in line
    assert "Give --box-format relative-xywh, relative-xyxy, relative-cxcywh if" in line


def test_junk_does_not_hide_boxes_in_0_to_1(tmp_path):
    def change(content):
        reformatted("relative-xywh")(content)
        content["annotations"] += [
            dict(content["annotations"][0], bbox=box)
            for box in ([0, 0, 0, 0], [0, 0, 0, 0], [math.nan] * 4, [1, 2, 30, 40], None, [1.5] * 4)
        ]

    with pytest.raises(DataError, match=r"boxes of 4 of 10 annotations hold nothing but numbers"):
        read(tmp_path, change)


def test_a_few_boxes_in_0_to_1_are_dropped_not_trained_on(tmp_path):
    def change(content):
        content["annotations"][1]["bbox"] = [0.2, 0.3, 0.5, 0.5]

    annotations = read(tmp_path, change)
    assert annotations.images_of_objects.tolist() == [0, 2, 3]
    line = "1 box is in 0..1, as shares of an image would be, and is dropped: '1.png'"
    assert finding(annotations) == line
    assert len(read(tmp_path, change, box_format="xywh").boxes) == 4


def random_boxes(number, seed=0):
    chance = random.Random(seed)
    boxes = []
    for _ in range(number):
        w, h = chance.uniform(2, WIDTH), chance.uniform(2, HEIGHT)
        boxes.append([chance.uniform(0, WIDTH - w), chance.uniform(0, HEIGHT - h), w, h])
    return boxes


def with_boxes(boxes):
    def change(content):
        content["annotations"] = [
            {"image_id": i % 4, "category_id": 1, "bbox": box} for i, box in enumerate(boxes)
        ]

    return change


@pytest.mark.parametrize("number", [5, 500])
def test_corners_in_place_of_width_and_height_are_asked_about(tmp_path, number):
    boxes = [in_format(box, "xyxy") for box in random_boxes(number)]
    boxes += [[1, 2, 3], [0, 0, 0, 0], None]
    with pytest.raises(DataError, match=r"reach outside of their images if read as x, y, width"):
        read(tmp_path, with_boxes(boxes))
    assert len(read(tmp_path, with_boxes(boxes), box_format="xyxy").boxes) == number
    assert read(tmp_path, with_boxes(boxes), box_format="xywh").findings.lines()


@pytest.mark.parametrize("seed", range(20))
def test_boxes_as_coco_has_them_are_not_asked_about(tmp_path, seed):
    chance = random.Random(seed)
    boxes = random_boxes(200, seed)
    for box in boxes[:60]:  # some reach outside
        box[0] += chance.uniform(-30, 30)
        box[1] += chance.uniform(-30, 30)
    assert len(read(tmp_path, with_boxes(boxes)).boxes) > 150
    whole = [[0, 0, WIDTH, HEIGHT], [1, 1, WIDTH, HEIGHT], [1, 1, WIDTH - 1, HEIGHT - 1]]
    assert len(read(tmp_path, with_boxes(whole * 5)).boxes) == 15


def test_shares_of_images_of_unknown_size_are_dropped(tmp_path):
    def change(content):
        reformatted("relative-xywh")(content)
        del content["images"][1]["width"]

    annotations = read(tmp_path, change, box_format="relative-xywh")
    assert annotations.images_of_objects.tolist() == [0, 2, 3]
    assert "1 box is in an image of unknown size, and is dropped: '1.png'" in (
        annotations.findings.lines()
    )
