"""Annotation files of the detector in all the forms that people have, and folders of splits."""

import gzip
import json
import math

import numpy as np
import pytest
import torch

from detector.config import DataConfig
from detector.data import DataError, SplitMissing, build_dataset, build_datasets
from detector.data.annotations import key_of, read_annotations, sort_key, whole_numbers
from detector.data.coco import find_split
from detector.evaluation import average_precision, ground_truth
from tests.detector.annotation_files import (
    CONTENT,
    HEIGHT,
    POLYGON,
    WIDTH,
    changed,
    finding,
    read,
    set_all,
    train_set,
    write_split,
)


@pytest.fixture
def folder(tmp_path):
    write_split(tmp_path / "train")
    return tmp_path


# ---- ids -----------------------------------------------------------------------------------------


def renamed(images, categories, annotations=None):
    """The content with other ids; those of annotations may be in other forms."""
    annotations = annotations or (lambda identifier: identifier)

    def change(content):
        for record in content["annotations"]:
            record["image_id"] = annotations(images[record["image_id"]])
            record["category_id"] = annotations(categories[record["category_id"] - 1])
        for kind, ids in (("images", images), ("categories", categories)):
            for record, identifier in zip(content[kind], ids, strict=True):
                record["id"] = identifier

    return change


IDS = {
    "texts": (["b", "a", "0007", "ä/1.png"], ["x", "y"]),
    "whole floats": ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0]),
    "beyond 64 bits": ([2**63, 2**64, 2**70, -(2**70)], [2**65, 2**66]),
    "mixed": ([1, "a", 2.5, 2**64], ["7", 3]),
    "negative": ([-1, -2, 0, 5], [-3, 0]),
}


@pytest.mark.parametrize("kind", IDS)
def test_ids_of_any_kind_are_given_back_as_they_came(folder, kind):
    images, categories = IDS[kind]
    dataset = train_set(folder, renamed(images, categories))
    assert dataset.annotations.image_ids == images
    assert [type(i) for i in dataset.annotations.image_ids] == [type(i) for i in images]
    assert sorted(map(repr, dataset.category_ids)) == sorted(map(repr, categories))
    for index, (_, target) in enumerate(dataset):
        assert dataset.id_of(int(target["image_id"])) == images[index]
        label = int(target["labels"])
        assert dataset.categories[label] == ("one", "two")[index % 2]
        assert dataset.category_ids[label] == categories[index % 2]


@pytest.mark.parametrize("form", [str, float, lambda i: f" {i} "], ids=["text", "float", "spaces"])
def test_the_same_id_in_another_form_is_the_same(folder, form):
    dataset = train_set(folder, renamed([7, 8, 9, 30], [4, 2], form))
    assert [len(target["labels"]) for _, target in dataset] == [1, 1, 1, 1]
    assert dataset.image_ids.tolist() == [7, 8, 9, 30]
    assert dataset.category_ids == [2, 4]


def test_keys_of_ids():
    assert key_of("7") == key_of(7) == key_of(7.0) == 7
    assert key_of("007") == "007" and key_of("7.0") == "7.0"
    assert key_of(2**70) == 2**70 == key_of(str(2**70))
    for nothing in (None, True, [1], {}, math.nan, math.inf):
        assert key_of(nothing) is None
    assert sorted(["b", 10, 9, "a", 2.5], key=sort_key) == [2.5, 9, 10, "a", "b"]
    assert whole_numbers([5, 2**63 - 1]) == [5, 2**63 - 1]
    assert whole_numbers([5, 2**63]) == whole_numbers([5, "a"]) == whole_numbers([5, 1.5]) == [0, 1]


@pytest.mark.parametrize("identifier", [None, True, [1], {"a": 1}])
@pytest.mark.parametrize("kind", ["images", "categories"])
def test_what_is_no_id_is_named(tmp_path, kind, identifier):
    def change(content):
        content[kind][1]["id"] = identifier

    with pytest.raises(DataError, match=rf"an id in '{kind}' must be a number or a text, got "):
        read(tmp_path, change)


def test_labels_can_be_ids_only_where_those_are_small_numbers(folder):
    config = DataConfig(data_path=str(folder), label_ids="category")
    for categories in (["a", "b"], [1, -1], [1, 10**6], [1, 1.5]):
        content = changed(renamed(range(4), categories))
        (folder / "train/_annotations.coco.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"whole numbers of 0 \.\. 9999 to be labels"):
            build_dataset(config, "train")
    content = changed(renamed(range(4), ["3", 1.0]))
    (folder / "train/_annotations.coco.json").write_text(json.dumps(content))
    dataset = build_dataset(config, "train")
    assert dataset.categories == ["N/A", "two", "N/A", "one"]


# ---- what is listed twice, or not at all ---------------------------------------------------------


def test_annotations_of_images_that_are_not_listed_are_left_out_and_counted(tmp_path):
    def change(content):
        content["annotations"][1]["image_id"] = "stranger"
        content["annotations"][2]["image_id"] = None

    annotations = read(tmp_path, change)
    assert annotations.images_of_objects.tolist() == [0, 3]
    line = "2 annotations are of images not listed, and left out: 'stranger', 'None'"
    assert finding(annotations) == line


def test_annotations_of_other_images_altogether_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"no annotation is of an image that is listed: .*'x-0'"):
        read(
            tmp_path,
            lambda c: [a.update(image_id=f"x-{i}") for i, a in enumerate(c["annotations"])],
        )


def test_annotations_of_categories_that_are_not_listed_are_refused_by_number(tmp_path):
    def change(content):
        for i in (1, 3):
            content["annotations"][i]["category_id"] = 99

    with pytest.raises(DataError, match=r"annotations\[1\] .* unknown category, 99 \(and 1 more\)"):
        read(tmp_path, change)


def test_what_is_listed_twice_counts_once(tmp_path):
    def change(content):
        content["images"].append(dict(content["images"][2]))
        content["categories"].append(dict(content["categories"][0], id=1.0))

    annotations = read(tmp_path, change)
    assert annotations.image_ids == [0, 1, 2, 3] and annotations.category_ids == [1, 2]
    assert len(annotations.boxes) == 4
    assert annotations.findings.lines() == [
        "1 category is listed twice, and counts once: 'one'",
        "1 image is listed twice, and counts once: '2.png'",
    ]


def test_one_id_for_two_images_is_refused_by_name(tmp_path):
    with pytest.raises(
        DataError, match=r"'images' must differ .*, got '3' for '3\.png' and 'x\.png'"
    ):
        read(tmp_path, lambda c: c["images"].append({"id": "3", "file_name": "x.png"}))


def test_names_that_stand_for_several_things_are_named(tmp_path):
    def change(content):
        content["images"][1]["file_name"] = "0.png"
        content["categories"][1]["name"] = "one"
        content["annotations"][1]["id"] = content["annotations"][2]["id"] = 10

    assert read(tmp_path, change).findings.lines() == [
        "1 name stands for several categories with different ids: 'one'",
        "1 file name stands for several images with different ids: '0.png'",
        "1 id stands for several annotations, all of which count: '10'",
    ]


def test_ids_of_annotations_are_of_no_use(tmp_path):
    def change(content):
        del content["annotations"][0]["id"]
        content["annotations"][1]["id"] = None
        content["annotations"][2]["id"] = 2**80

    annotations = read(tmp_path, change)
    assert len(annotations.boxes) == 4 and annotations.findings.lines() == []


def test_categories_without_an_object_keep_their_label(folder):
    content = [{"id": 0, "name": "none"}, *CONTENT["categories"], {"id": 9, "name": "unused"}]
    dataset = train_set(folder, lambda c: c.update(categories=content))
    assert dataset.categories == ["none", "one", "two", "unused"]
    assert [target["labels"].tolist() for _, target in dataset] == [[1], [2], [1], [2]]


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [
        {},
        {"width": None, "height": None},
        {"width": 0, "height": 0},
        {"width": 64},
        {"width": -64, "height": 48},
        {"width": 64.5, "height": 48},
        {"width": "wide", "height": 48},
        {"width": True, "height": 48},
        {"width": [64], "height": 48},
        {"width": 1e300, "height": 48},
        {"width": math.nan, "height": 48},
    ],
    ids=str,
)
def test_sizes_that_the_json_does_not_tell_are_those_of_the_images(folder, size):
    def change(content):
        content["images"][1] = {"id": 1, "file_name": "1.png"} | size

    dataset = train_set(folder, change)
    assert dataset[1][1]["orig_size"].tolist() == [HEIGHT, WIDTH]
    line = finding(dataset.annotations)
    assert line.startswith("1 size of an image is missing or no whole number above 0, and taken ")
    assert line.endswith("from the images: '1.png'")


@pytest.mark.parametrize("size", [(64.0, 48.0), ("64", "48"), ("64.0", 48)])
def test_sizes_in_other_forms_are_taken(folder, size):
    width, height = size
    dataset = train_set(folder, set_all("images", width=width, height=height))
    assert dataset[1][1]["orig_size"].tolist() == [HEIGHT, WIDTH]
    assert dataset.annotations.findings.lines() == []


# ---- iscrowd and area ----------------------------------------------------------------------------


@pytest.mark.parametrize("value", [None, 0, 0.0, False, "0", "", "false", " False ", "0.0"])
def test_what_is_no_crowd(folder, value):
    dataset = train_set(folder, set_all("annotations", iscrowd=value))
    assert [len(target["labels"]) for _, target in dataset] == [1] * 4
    assert dataset.annotations.findings.lines() == []


@pytest.mark.parametrize("value", [1, 1.0, True, "1", "true", 2])
def test_what_is_a_crowd(folder, value):
    def change(content):
        content["annotations"][1]["iscrowd"] = value

    dataset = train_set(folder, change)
    assert [len(target["labels"]) for _, target in dataset] == [1, 0, 1, 1]
    truth = ground_truth(dataset.coco_json)
    assert [record["iscrowd"] for record in truth["annotations"]] == [0, 1, 0, 0]


@pytest.mark.parametrize("value", ["maybe", [0], [1], {"a": 1}, math.nan])
def test_flags_without_a_meaning_are_counted_and_are_no_crowds(tmp_path, value):
    annotations = read(tmp_path, set_all("annotations", iscrowd=value))
    assert not annotations.crowds.any() and len(annotations.boxes) == 4
    assert finding(annotations).startswith("4 values of iscrowd without a meaning: taken for no ")


@pytest.mark.parametrize(
    ("value", "area", "is_odd"),
    [
        (None, 200, False),
        ("missing", 200, False),
        (150, 150, False),
        ("150.5", 150.5, False),
        ("large", 200, True),
        ([150], 200, True),
        (True, 200, True),
        (0, 200, True),
        (-5, 200, True),
        (math.nan, 200, True),
        (1e300, 200, True),
    ],
)
def test_areas_that_are_none_are_those_of_the_boxes(tmp_path, value, area, is_odd):
    fields = {} if value == "missing" else {"area": value}
    annotations = read(tmp_path, set_all("annotations", **fields))
    assert annotations.areas.tolist() == [area] * 4
    assert bool(annotations.findings.lines()) == is_odd


@pytest.mark.parametrize("area", [None, "200", [1], "x"])
def test_precision_by_size_has_a_value_whatever_the_areas_are(tmp_path, area):
    content = changed(set_all("annotations", area=area, iscrowd=None))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    rows = {
        a["image_id"]: np.array([[*a["bbox"], 0.9, a["category_id"]]])
        for a in content["annotations"]
    }
    results = average_precision(ground_truth(path), rows, (10, 20))
    assert results["AP"] == results["AP_medium"] == pytest.approx(1)
    assert results["AP_small"] is None and results["AP_large"] is None


# ---- the file itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("packed", [False, True])
def test_any_unicode_encoding_is_read_packed_or_not(tmp_path, encoding, packed):
    content = changed(lambda c: c["categories"][0].update(name="größe"))
    data = json.dumps(content, ensure_ascii=False).encode(encoding)
    path = tmp_path / "a.json"
    path.write_bytes(gzip.compress(data) if packed else data)
    assert read_annotations(path).category_names == ["größe", "two"]


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (b"", "cannot be read: "),
        (b'{"images": [', "cannot be read: "),
        ("größe".encode("latin-1"), "cannot be read: "),
        (b"\x1f\x8b broken", "cannot be read: "),
        (gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read: "),
        (b"[" * 100_000, "cannot be read: "),
        (b'[{"image_id": 1, "score": 0.5}]', "file has no 'images': it is a list, as results are"),
        (b"7", "file has no 'images'"),
        (b"null", "file has no 'images'"),
        (b'{"images": {}}', "'images' must be a list"),
        (b'{"images": [{"id": 1}]}', "file has no 'annotations'"),
        (b'{"images": [1], "annotations": [2]}', "file has no 'categories'"),
        (b'{"images": [1], "annotations": null}', "'annotations' must be a list"),
    ],
)
def test_what_is_no_annotation_file_is_said_in_one_sentence(tmp_path, data, cause):
    path = tmp_path / "a.json"
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        read_annotations(path)
    assert str(path) in str(error.value) and cause in str(error.value)
    assert "\n" not in str(error.value)


def test_names_as_windows_writes_them_are_found(folder):
    (folder / "train/some").mkdir()
    (folder / "train/1.png").rename(folder / "train/some/1.png")
    dataset = train_set(folder, lambda c: c["images"][1].update(file_name="some\\1.png"))
    dataset[1]
    assert dataset.num_bad_images == 0


def test_findings_come_as_one_message(folder, caplog):
    def change(content):
        content["annotations"][0]["bbox"] = None
        content["annotations"][1]["bbox"] = [-9, 0, 20, 20]
        content["annotations"][2]["image_id"] = 99

    train_set(folder, change)
    (message,) = caplog.messages
    path, *lines = message.splitlines()
    assert path.endswith("_annotations.coco.json: ") and len(lines) == 3


def test_coco_s_own_form_has_no_findings_and_is_taken_as_it_is(tmp_path):
    content = changed(set_all("annotations", iscrowd=0, area=123.5, segmentation=[POLYGON]))
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content))
    truth = ground_truth(path)
    assert [i["id"] for i in truth["images"]] == [0, 1, 2, 3]
    assert truth["categories"] == content["categories"]
    for number, (actual, given) in enumerate(
        zip(truth["annotations"], content["annotations"], strict=True), 1
    ):
        expected = {
            key: given[key] for key in ("image_id", "category_id", "bbox", "iscrowd", "area")
        }
        assert actual == expected | {"id": number}
    assert read_annotations(path).findings.lines() == []


# ---- splits --------------------------------------------------------------------------------------


def config_of(folder):
    return DataConfig(data_path=str(folder), short_sides=(0,), crop=False, horizontal_flip=0)


def test_train_alone_is_enough(folder):
    train, val = build_datasets(config_of(folder))
    assert len(train) == 4 and val is None


@pytest.mark.parametrize("name", ["valid", "val", "validation"])
def test_validation_has_several_names(folder, name):
    write_split(folder / name)
    _, val = build_datasets(config_of(folder))
    assert len(val) == 4


@pytest.mark.parametrize("name", ["valid", "val2017", "images/val"])
def test_validation_images_without_annotations_are_not_passed_over(folder, name):
    write_split(folder / name, content=None)
    with pytest.raises(DataError, match=r"must hold one of .* with 0 and 0"):
        build_datasets(config_of(folder))


def test_any_split_is_found_in_both_layouts(folder):
    write_split(folder / "test")
    assert find_split(folder, "test") == (folder / "test", folder / "test/_annotations.coco.json")
    (folder / "annotations").mkdir()
    for split, images in (("holdout", "images/holdout2020"), ("extra", "extra_2020")):
        path = folder / f"annotations/instances_{images.removeprefix('images/')}.json"
        path.write_text("{}")
        (folder / images).mkdir(parents=True)
        assert find_split(folder, split) == (folder / images, path)
    with pytest.raises(SplitMissing, match=r"instances_night\*\.json and night/_annotations"):
        find_split(folder, "night")
    assert build_dataset(config_of(folder), "test").coco_json == folder / (
        "test/_annotations.coco.json"
    )


def test_a_split_called_exactly_so_goes_before_those_that_start_so(tmp_path):
    (tmp_path / "annotations").mkdir()
    for name in ("test", "test_old"):
        (tmp_path / name).mkdir()
        (tmp_path / f"annotations/instances_{name}.json").write_text("{}")
    assert find_split(tmp_path, "test")[0] == tmp_path / "test"


def test_packed_files_are_found(tmp_path):
    for folder, path in (
        ("train", "train/_annotations.coco.json.gz"),
        ("val2017", "annotations/instances_val2017.json.gz"),
    ):
        (tmp_path / folder).mkdir()
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(gzip.compress(b"{}"))
        assert find_split(tmp_path, folder[:5].rstrip("2")) == (tmp_path / folder, tmp_path / path)


def test_images_without_annotations_can_be_predicted(folder):
    write_split(folder / "test", content=None)
    (folder / "test/below").mkdir()
    (folder / "test/3.png").rename(folder / "test/below/3.png")
    (folder / "test/notes.txt").write_text("no image")
    with pytest.raises(DataError, match="with 0 and 0"):
        build_dataset(config_of(folder), "test")
    names = {1: "one", 2: "two"}
    dataset = build_dataset(config_of(folder), "test", categories=names, need_objects=False)
    assert dataset.annotations.image_ids == ["0.png", "1.png", "2.png", "below/3.png"]
    assert not dataset.annotations.has_objects
    assert dataset.categories == ["one", "two"]
    image, target = dataset[3]
    assert image.shape == (3, HEIGHT, WIDTH) and target["boxes"].shape == (0, 4)
    assert target["orig_size"].tolist() == [HEIGHT, WIDTH]


@pytest.mark.parametrize("annotations", [{}, {"annotations": []}, {"annotations": None}])
@pytest.mark.parametrize("categories", [True, False])
def test_lists_of_images_can_be_predicted(folder, annotations, categories):
    content = {"images": CONTENT["images"]} | annotations
    content |= {"categories": CONTENT["categories"]} if categories else {}
    write_split(folder / "test", content)
    with pytest.raises(DataError, match="annotations"):
        build_dataset(config_of(folder), "test")
    dataset = build_dataset(config_of(folder), "test", need_objects=False)
    assert dataset.image_ids.tolist() == [0, 1, 2, 3]
    assert dataset.categories == (["one", "two"] if categories else [])
    assert len(dataset[0][1]["labels"]) == 0


def test_coco_s_test_images_are_found(tmp_path):
    (tmp_path / "test2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for name in ("test2017", "test-dev2017"):
        path = tmp_path / f"annotations/image_info_{name}.json"
        path.write_text("{}")
        expected = (tmp_path / "test2017", path)
        assert find_split(tmp_path, name, images_alone=True) == expected
        with pytest.raises(DataError):
            find_split(tmp_path, name)


def test_a_folder_without_images_is_refused(folder):
    (folder / "test").mkdir()
    with pytest.raises(DataError, match="test must hold images, got a folder without one"):
        build_dataset(config_of(folder), "test", need_objects=False)


def test_categories_are_compared_whatever_form_their_ids_have(folder):
    write_split(folder / "valid", changed(renamed(range(4), ["1", 2.0])))
    _, val = build_datasets(config_of(folder))
    assert val.category_ids == [1, 2]  # as the model was trained on them
    assert torch.equal(val[1][1]["labels"], torch.tensor([1]))
