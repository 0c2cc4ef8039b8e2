"""Data of the detector: both layouts, batches and their order, and bad input."""

import pytest
import torch
from PIL import Image

from detector.data import CocoDetection, DataError, build_dataset, build_datasets
from detector.data.loading import BatchSampler, collate, make_loader, start_epoch
from detector.data.transforms import MEAN, STD, Augmentation
from tests.detector.data_sets import (
    AS_IS,
    HEIGHT,
    WIDTH,
    assert_same_items,
    change_json,
    config_of,
    dataset_of,
    items_of,
    write_coco_layout,
    write_images,
    write_other_layout,
)


@pytest.fixture
def folder(tmp_path):
    write_other_layout(tmp_path)
    return tmp_path


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [write_coco_layout, write_other_layout])
def test_both_layouts_are_read(tmp_path, write):
    write(tmp_path)
    for dataset in build_datasets(config_of(tmp_path)):
        assert dataset.categories == ["three", "seven"]
        assert dataset.category_ids == [3, 7]
        assert dataset.num_classes == 2
        assert dataset.area_sides == (32, 96)
        assert [target["labels"].tolist() for _, target in dataset] == [[1], [0], [1], [0]]
        assert [int(target["image_id"]) for _, target in dataset] == [30, 31, 32, 33]


def test_an_item_is_as_promised(folder):
    image, target = dataset_of(folder)[2]
    assert image.shape == (3, HEIGHT, WIDTH) and image.dtype == torch.float32
    white = (1 - MEAN) / STD
    torch.testing.assert_close(image[:, 6:26, 16:26], white.expand(3, 20, 10))
    torch.testing.assert_close(image[:, 40:], (-MEAN / STD).expand(3, 8, WIDTH))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in target.items()} == {
        "labels": (torch.int64, (1,)),
        "boxes": (torch.float32, (1, 4)),
        "image_id": (torch.int64, ()),
        "orig_size": (torch.int64, (2,)),
        "size": (torch.int64, (2,)),
    }
    expected = torch.tensor([[21 / WIDTH, 16 / HEIGHT, 10 / WIDTH, 20 / HEIGHT]])
    torch.testing.assert_close(target["boxes"], expected)
    assert target["orig_size"].tolist() == target["size"].tolist() == [HEIGHT, WIDTH]


def test_labels_can_be_the_ids_of_the_file(folder):
    dataset = build_dataset(config_of(folder, label_ids="category"), "train")
    assert dataset.num_classes == 8
    assert dataset.categories[3] == "three" and dataset.categories[4] == "N/A"
    assert [target["labels"].tolist() for _, target in dataset] == [[7], [3], [7], [3]]


def test_crowds_and_boxes_without_extent_are_dropped(folder):
    def change(content):
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"] = [5, 5, 0, 10]
        content["annotations"][2]["bbox"] = [5, 5, 10, -1]

    change_json(folder, change)
    targets = [target for _, target in dataset_of(folder)]
    assert [len(target["labels"]) for target in targets] == [0, 0, 0, 1]
    assert targets[0]["boxes"].shape == (0, 4)


def test_boxes_are_clipped_and_those_far_outside_counted(folder, caplog):
    def change(content):
        content["annotations"][0]["bbox"] = [-4, -3, 10, 100]
        content["annotations"][1]["bbox"] = [WIDTH + 5, 2, 10, 10]
        content["annotations"][2]["bbox"] = [WIDTH - 9.5, 2, 10, 10]

    change_json(folder, change)
    dataset = dataset_of(folder)
    (warning,) = caplog.messages
    assert "2 boxes reach outside" in warning and "'0.png'" in warning
    assert str(dataset.coco_json) in warning
    boxes = [target["boxes"] for _, target in dataset]
    expected = torch.tensor([[3 / WIDTH, 0.5, 6 / WIDTH, 1.0]])
    torch.testing.assert_close(boxes[0], expected)
    assert len(boxes[1]) == 0
    torch.testing.assert_close(boxes[2][0, 0] + boxes[2][0, 2] / 2, torch.tensor(1.0))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_pictures_of_any_mode_become_rgb(folder, mode):
    path = folder / "train/0.png"
    if mode == "CMYK":
        Image.open(path).convert(mode).save(folder / "train/0.jpg")
        change_json(folder, lambda content: content["images"][0].update(file_name="0.jpg"))
    else:
        Image.open(path).convert("L" if mode == "I;16" else mode).convert(mode).save(path)
    dataset = dataset_of(folder)
    assert dataset[0][0].shape == (3, HEIGHT, WIDTH)
    assert dataset.num_bad_images == 0


def test_a_picture_is_turned_if_its_boxes_are(folder):
    path = folder / "train/0.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    lying = Image.open(folder / "train/0.png").transpose(Image.Transpose.ROTATE_90)
    lying.save(path, exif=exif, quality=100)
    change_json(folder, lambda content: content["images"][0].update(file_name="0.jpg"))
    dataset = dataset_of(folder)
    upright, expected = dataset[0][0], (1 - MEAN) / STD
    torch.testing.assert_close(upright[:, 10:20, 2:8], expected.expand(3, 10, 6), atol=0.1, rtol=0)


def test_images_kept_in_memory_are_the_same(folder):
    kept = dataset_of(folder, in_memory=True)
    for path in (folder / "train").glob("*.png"):
        path.unlink()
    write_images(folder / "again")
    again = CocoDetection(folder / "again", kept.coco_json, AS_IS, training=True)
    assert_same_items(list(kept), list(again))


# ---- augmentation --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_items_depend_on_seed_epoch_and_index_alone(folder, workers):
    augmentation = Augmentation((40, 48, 56, 64), 1333, crop=False, horizontal_flip=0.5)

    def items(seed, epochs, workers):
        dataset = dataset_of(folder, augmentation, seed=seed)
        loader = make_loader(dataset, 2, num_workers=workers, seed=seed)
        for epoch in epochs:  # persistent workers see each of them
            start_epoch(loader, epoch)
            found = items_of(loader)
        return found

    expected = items(5, [3], 0)
    assert_same_items(items(5, [0, 1, 3], workers), expected)
    for other in (items(5, [4], workers), items(6, [3], workers)):
        with pytest.raises(AssertionError):
            assert_same_items(other, expected)


def test_the_same_image_is_augmented_otherwise_in_other_epochs_and_with_other_seeds(folder):
    augmentation = Augmentation(range(40, 60), 1333, crop=False, horizontal_flip=0.0)

    def sizes(seed, epoch):
        dataset = dataset_of(folder, augmentation, seed=seed)
        dataset.set_epoch(epoch)
        return [target["size"].tolist() for _, target in dataset]

    assert sizes(1, 2) == sizes(1, 2)
    by_seed_and_epoch = [sizes(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert all(by_seed_and_epoch.count(each) == 1 for each in by_seed_and_epoch)
    assert len(set(map(tuple, sizes(1, 2)))) > 1

    loader = make_loader(dataset_of(folder, augmentation, seed=1), 4)
    start_epoch(loader, 2)
    found = {int(target["image_id"]): target["size"].tolist() for _, target in items_of(loader)}
    assert [found[30 + i] for i in range(4)] == sizes(1, 2)


# ---- batches -------------------------------------------------------------------------------------


def test_images_are_padded_to_the_largest():
    images = [torch.rand(3, 4, 9) + 1, torch.rand(3, 6, 5) + 1]
    batch = collate([(image, {"labels": torch.tensor([i])}) for i, image in enumerate(images)])
    assert batch.images.shape == (2, 3, 6, 9)
    for i, image in enumerate(images):
        _, height, width = image.shape
        torch.testing.assert_close(batch.images[i, :, :height, :width], image)
        assert not batch.padding_mask[i, :height, :width].any()
        assert batch.padding_mask[i].sum() == 6 * 9 - height * width
    assert (batch.images[batch.padding_mask.unsqueeze(1).expand(-1, 3, -1, -1)] == 0).all()
    assert batch.to("cpu").targets[1]["labels"].tolist() == [1]


def test_an_epoch_can_be_entered_anywhere():
    sampler = BatchSampler(23, 3, shuffle=True, seed=1)
    sampler.set_epoch(4)
    whole = list(sampler)
    assert len(whole) == len(sampler) == 7
    assert len({i for batch in whole for i in batch}) == 21
    for first in range(8):
        sampler.set_epoch(4, first)
        assert list(sampler) == whole[first:]
    sampler.set_epoch(5)
    assert list(sampler) != whole
    other = BatchSampler(23, 3, shuffle=True, seed=2)
    other.set_epoch(4)
    assert list(other) != whole


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_total_batches_of_one(processes):
    def batches(batch_size, **options):
        sampler = BatchSampler(50, batch_size, shuffle=True, seed=1, **options)
        sampler.set_epoch(2)
        return list(sampler)

    shares = [batches(4, rank=rank, world_size=processes) for rank in range(processes)]
    one = batches(4 * processes)
    assert len(one) == len(shares[0])
    for total_batch, *parts in zip(one, *shares, strict=True):
        assert [len(part) for part in parts] == [4] * processes
        assert sorted(i for part in parts for i in part) == sorted(total_batch)


@pytest.mark.parametrize("num_images", [1, 5, 24, 31])
@pytest.mark.parametrize("processes", [1, 2, 7])
def test_evaluation_sees_every_image_in_as_many_batches_everywhere(num_images, processes):
    shares = [
        list(BatchSampler(num_images, 4, shuffle=False, rank=rank, world_size=processes))
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(batch for share in shares for batch in share)
    seen = [i for share in shares for batch in share for i in batch]
    assert set(seen) == set(range(num_images))
    assert len(seen) < num_images + processes


def test_too_few_images_for_a_batch_are_refused(folder):
    with pytest.raises(ValueError, match="at most the number of training images, got 6 and 4"):
        make_loader(dataset_of(folder), 3, world_size=2)


def test_loading_leaves_the_random_numbers_of_training_alone(folder):
    before = torch.get_rng_state()
    list(make_loader(dataset_of(folder), 2, num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


# ---- bad input -----------------------------------------------------------------------------------


def drop(*path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def put(value, *path):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (drop("images"), "file has no 'images'"),
        (put([], "images"), "'images' is empty"),
        (put([], "annotations"), "'annotations' is empty"),
        (put([], "categories"), "'categories' is empty"),
        (put({}, "annotations"), "'annotations' must be a list"),
        (put(5, "annotations", 2), r"annotations\[2\] has no 'image_id'"),
        (put(99, "annotations", 1, "category_id"), r"annotations\[1\].*unknown category, 99"),
        (drop("images", 0, "file_name"), r"images\[0\] has no 'file_name'"),
        (put(31, "images", 0, "id"), "ids in 'images' must differ"),
        (
            put(None, "categories", 0, "id"),
            "an id in 'categories' must be a number or a text.*None",
        ),
        (drop("categories", 0, "name"), r"categories\[0\] has no 'name'"),
    ],
)
def test_a_wrong_annotation_file_is_named_with_the_cause(folder, change, cause):
    change_json(folder, change)
    with pytest.raises(DataError, match=rf"train/_annotations\.coco\.json: .*{cause}"):
        dataset_of(folder)


def test_a_file_whose_boxes_are_all_unusable_is_refused(folder):
    def change(content):
        for annotation in content["annotations"]:
            annotation["bbox"][2] = 0

    change_json(folder, change)
    with pytest.raises(DataError, match="no annotation has a box with an extent"):
        dataset_of(folder)


@pytest.mark.parametrize("text", ["", '{"images": [', "[1, 2]", "\x00\xff"])
def test_a_file_that_is_no_annotation_file_is_named(folder, text):
    (folder / "train/_annotations.coco.json").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"_annotations\.coco\.json(: | cannot be read: )"):
        dataset_of(folder)


def test_a_missing_folder_or_file_is_named(folder, tmp_path_factory):
    nowhere = tmp_path_factory.mktemp("other")
    with pytest.raises(DataError, match=r"data_path must be a folder, got '.*/nothing'"):
        build_datasets(config_of(nowhere / "nothing"))
    with pytest.raises(DataError, match=r"data_path must be given for the dataset coco, got ''"):
        build_datasets(config_of(""))
    with pytest.raises(DataError, match=r"data_path must hold one of annotations/.*'.*other0'"):
        build_datasets(config_of(nowhere))
    (folder / "valid/_annotations.coco.json").unlink()
    with pytest.raises(DataError, match=r"instances_val\*\.json and valid/_annotations"):
        build_datasets(config_of(folder))
    (nowhere / "annotations").mkdir()
    (nowhere / "annotations/instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"instances_train2017\.json: its folder .* does not exist"):
        build_datasets(config_of(nowhere))


def test_two_annotation_files_for_one_split_are_refused(tmp_path):
    write_coco_layout(tmp_path)
    source = tmp_path / "annotations/instances_train2017.json"
    (tmp_path / "annotations/instances_train2014.json").write_text(source.read_text())
    with pytest.raises(DataError, match=r"must hold one of .* with 2 and 0"):
        build_datasets(config_of(tmp_path))


@pytest.mark.parametrize(
    ("value", "path", "cause"),
    [
        ("eight", ("categories", 0, "name"), "category 7 is 'eight', for the model it is 'seven'"),
        (8, ("categories", 0, "id"), "category 8 is 'seven', for the model it is nothing"),
    ],
)
def test_validation_with_other_categories_is_refused(folder, value, path, cause):
    change_json(folder, put(value, *path), "valid")
    with pytest.raises(DataError, match=rf"valid/.*json: {cause}"):
        build_datasets(config_of(folder))


def spoil(path, how):
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "text":
        path.write_text("this is not a picture")
    else:
        Image.open(path).resize((20, 30)).save(path)


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "text", "other_size"])
@pytest.mark.parametrize("in_memory", [False, True])
def test_training_takes_the_next_image_for_one_that_cannot_be_read(folder, how, in_memory, caplog):
    expected = dataset_of(folder)[2]
    spoil(folder / "train/1.png", how)
    dataset = dataset_of(folder, in_memory=in_memory)
    for _ in range(2):
        assert_same_items([dataset[1]], [expected])
    assert dataset.num_bad_images == 1
    (warning,) = caplog.messages
    assert str(folder / "train/1.png") in warning
    if how == "other_size":
        assert "(20, 30)" in warning and "(64, 48)" in warning


def test_workers_count_bad_images_together(folder, capfd):
    for name in ("0.png", "3.png"):
        spoil(folder / "train" / name, "truncated")
    dataset = dataset_of(folder)
    loader = make_loader(dataset, 1, num_workers=2)
    for epoch in range(3):
        start_epoch(loader, epoch)
        assert len(items_of(loader)) == 4
    assert dataset.num_bad_images == 2
    assert dataset.bad_images.tolist() == [True, False, False, True]


def test_training_ends_when_no_image_can_be_read(folder, caplog):
    for path in (folder / "train").glob("*.png"):
        path.unlink()
    dataset = dataset_of(folder)
    with pytest.raises(DataError, match=r"train: 10 images in a row cannot be read, from '2\.png'"):
        dataset[2]


def test_evaluation_gets_a_blank_for_an_image_that_cannot_be_read(folder, caplog):
    spoil(folder / "valid/1.png", "truncated")
    dataset = dataset_of(folder, training=False)
    image, target = dataset[1]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert int(target["image_id"]) == 31
    assert dataset.num_bad_images == 1 and len(caplog.messages) == 1
