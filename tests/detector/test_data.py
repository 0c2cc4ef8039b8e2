"""Data of the detector: both layouts, augmentation, what is generated, order, and bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from detector.config import DataConfig
from detector.data import (
    CocoDetection,
    DataError,
    build_dataset,
    build_datasets,
    digits,
    generated,
    shapes,
)
from detector.data.loading import BatchSampler, collate, make_loader, start_epoch
from detector.data.transforms import MEAN, STD, Augmentation, resize

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


@pytest.fixture
def folder(tmp_path):
    write_other_layout(tmp_path)
    return tmp_path


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


@pytest.fixture(scope="module")
def painted():
    """A picture with two coloured rectangles, and their boxes."""
    pixels = np.full((300, 420, 3), 40, dtype=np.uint8)
    pixels[50:170, 30:130] = (255, 0, 0)
    pixels[120:260, 280:400] = (0, 255, 0)
    boxes = torch.tensor([[30.0, 50, 130, 170], [280, 120, 400, 260]])
    return Image.fromarray(pixels), boxes


def test_augmented_boxes_stay_on_their_objects(painted):
    seen = set()
    for seed in range(40):
        labels = torch.tensor([0, 1])
        image, boxes, labels = ORIGINAL(*painted, labels, np.random.default_rng(seed))
        pixels = np.asarray(image)
        assert len(boxes) == len(labels)
        seen.add((pixels.shape, len(labels)))
        for channel in (0, 1):
            rows, columns = np.nonzero(pixels[..., channel] > 150)
            if channel not in labels:
                assert len(rows) < 0.01 * pixels[..., 0].size
                continue
            box = boxes[labels == channel][0].tolist()
            around = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
            np.testing.assert_allclose(box, around, atol=1.5)
    assert len(seen) > 15
    assert {count for _, count in seen} >= {1, 2}


def test_a_flip_mirrors_picture_and_boxes(painted):
    flipping = Augmentation((0,), 1333, crop=False, horizontal_flip=1.0)
    image, boxes, _ = flipping(*painted, torch.tensor([0, 1]), np.random.default_rng(0))
    assert boxes.tolist() == [[290, 50, 390, 170], [20, 120, 140, 260]]
    np.testing.assert_array_equal(np.asarray(image), np.asarray(painted[0])[:, ::-1])


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((640, 480), 800, (1066, 800)),
        ((480, 640), 800, (800, 1066)),
        ((1000, 400), 800, (1332, 533)),  # the longer side would be 2000
        ((300, 300), 480, (480, 480)),
        ((5000, 1), 800, (1333, 1)),  # no side can be 0
        ((1, 5000), 800, (1, 1333)),
        ((123, 45), 0, (123, 45)),
        ((2000, 1000), 0, (1332, 666)),
    ],
)
def test_sizes_are_the_original_ones(size, short_side, expected):
    boxes = torch.tensor([[0.0, 0, *size]])
    image, boxes = resize(Image.new("RGB", size), boxes, short_side, 1333)
    assert image.size == expected
    torch.testing.assert_close(boxes, torch.tensor([[0.0, 0, *expected]]))


def test_training_draws_among_short_sides_and_evaluation_takes_the_last(painted):
    config = DataConfig(crop=False)
    sides = set()
    for seed in range(150):
        training = Augmentation.of(config, training=True)
        image, *_ = training(*painted, torch.tensor([0, 1]), np.random.default_rng(seed))
        sides.add(min(image.size))
    assert sides == set(range(480, 801, 32))
    evaluation = Augmentation.of(DataConfig(), training=False)
    for seed in range(5):
        image, boxes, _ = evaluation(*painted, torch.tensor([0, 1]), np.random.default_rng(seed))
        assert image.size == (1120, 800)
        assert boxes[0, 0] == 80  # not mirrored


def test_a_crop_has_sides_of_384_to_600(monkeypatch, painted):
    cropping = Augmentation((0,), 1333, crop=True, horizontal_flip=0.0)
    sizes = set()
    for seed in range(60):
        image, *_ = cropping(*painted, torch.tensor([0, 1]), np.random.default_rng(seed))
        sizes.add(image.size)
    assert painted[0].size in sizes
    sides = {side for size in sizes - {painted[0].size} for side in size}
    assert 384 <= min(sides) < 420 and 560 < max(sides) <= 600


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


# ---- generated data ------------------------------------------------------------------------------

FEW_DIGITS = replace(digits.DIGITS, num_train=6, num_val=3)
FEW_SHAPES = replace(shapes.EASY, num_train=6, num_val=3)
make_either = pytest.mark.parametrize(
    "make",
    [
        lambda cache: digits.make_digits(FEW_DIGITS, str(cache)),
        lambda cache: shapes.make_shapes(FEW_SHAPES, str(cache)),
    ],
    ids=["digits", "shapes"],
)


def bytes_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@make_either
def test_generated_data_is_the_same_each_time(make, tmp_path):
    first, second = make(tmp_path / "a"), make(tmp_path / "b")
    assert first.name == second.name
    assert len(bytes_of(first)) == 6 + 3 + 2
    assert bytes_of(first) == bytes_of(second)
    pictures = [content for name, content in bytes_of(first).items() if name.endswith("png")]
    assert len(set(pictures)) == 9  # nor do training and validation share one


@make_either
def test_generated_data_is_kept(make, tmp_path, monkeypatch):
    folder = make(tmp_path)
    monkeypatch.setattr(generated, "_write", None)
    assert make(tmp_path) == folder


@make_either
def test_a_part_of_generated_data_never_passes_for_all(make, tmp_path, monkeypatch):
    def interrupted(written, *_, **options):
        yield next(iter(written))
        raise KeyboardInterrupt

    monkeypatch.setattr(generated, "tqdm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert len(bytes_of(make(tmp_path))) == 6 + 3 + 2


@make_either
def test_whoever_is_second_to_generate_takes_what_is_there(make, tmp_path, monkeypatch):
    first = make(tmp_path / "first")
    rename = generated._rename

    def overtaken(source, target):
        first.rename(target)
        rename(source, target)

    monkeypatch.setattr(generated, "_rename", overtaken)
    folder = make(tmp_path / "second")
    assert not first.exists()
    assert [path.name for path in (tmp_path / "second").iterdir()] == [folder.name]
    assert len(bytes_of(folder)) == 6 + 3 + 2


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/shapes-easy-v1-.* cannot be written: .*File exists"):
        shapes.make_shapes(FEW_SHAPES, str(tmp_path / "file"))


def test_another_preset_has_another_folder(tmp_path):
    other = replace(FEW_SHAPES, num_val=2)
    assert shapes.make_shapes(FEW_SHAPES, str(tmp_path)) != shapes.make_shapes(other, str(tmp_path))


def test_training_and_validation_share_no_digit_and_no_part_of_a_photograph():
    train, valid = (digits.DigitRenderer.of(digits.DIGITS, split) for split in ("train", "valid"))
    everything = digits.load_digits()
    assert len(train.digits) + len(valid.digits) == len(everything.images)
    assert len(valid.digits) > 300
    every = {digit.tobytes() for digit in train.digits}
    assert not any(digit.tobytes() in every for digit in valid.digits)
    assert set(train.labels) == set(valid.labels) == set(range(10))
    for left, right, photo in zip(
        train.photographs, valid.photographs, digits.load_sample_images().images, strict=True
    ):
        np.testing.assert_array_equal(np.concatenate([left, right], 1), photo)
        assert min(left.shape[:2] + right.shape[:2]) >= digits.CROP_SIDES[1]


def test_a_digit_fills_its_box():
    renderer = digits.DigitRenderer.of(digits.DIGITS, "train")
    for seed in range(50):
        random = np.random.default_rng(seed)
        alpha = digits.cut_out(renderer.digits[seed], 16 + seed % 29, random)
        assert max(alpha.shape) == 16 + seed % 29
        for border in (alpha[0], alpha[-1], alpha[:, 0], alpha[:, -1]):
            assert border.max() > 0.2
        assert 0.15 < alpha.mean() < 0.95


@pytest.mark.parametrize("shape", shapes.CATEGORIES)
@pytest.mark.parametrize("extent", [6, 13, 48])
def test_a_shape_fills_its_box(shape, extent):
    mask = shapes.mask(shape, extent)
    assert mask.shape == (extent, extent)
    for border in (mask[0], mask[-1], mask[:, 0], mask[:, -1]):
        assert border.max() > 0.1
    np.testing.assert_allclose(mask, mask[:, ::-1], atol=1.01 / shapes.SUPERSAMPLING)


@pytest.mark.parametrize(
    "preset", [digits.DIGITS, shapes.EASY, shapes.HARD, shapes.GPU_HARD], ids=lambda p: p.name
)
def test_objects_are_inside_and_hardly_overlap(preset):
    render = (
        digits.DigitRenderer.of(preset, "valid")
        if preset is digits.DIGITS
        else lambda random: shapes.render(preset, random)
    )
    seen, counts = set(), []
    for seed in range(15):
        pixels, boxes, labels = render(np.random.default_rng(seed))
        side = preset.image_side
        assert pixels.shape == (side, side, 3) and pixels.dtype == np.uint8
        assert len(boxes) == len(labels)
        seen |= set(labels)
        counts.append(len(labels))
        for i, (x, y, width, height) in enumerate(boxes):
            assert min(x, y) >= 0 and max(x + width, y + height) <= side
            assert preset.object_sides[0] <= max(width, height) <= preset.object_sides[1]
            for other_x, other_y, other_width, other_height in boxes[:i]:
                across = min(x + width, other_x + other_width) - max(x, other_x)
                down = min(y + height, other_y + other_height) - max(y, other_y)
                smaller = min(width * height, other_width * other_height)
                assert max(across, 0) * max(down, 0) <= 0.15 * smaller
    assert len(seen) > 5
    assert min(counts) >= 1 and max(counts) <= preset.objects[1]
    assert np.mean(counts) > 0.7 * np.mean(preset.objects)


def test_colours_stand_out_from_what_is_under_them():
    renderer = digits.DigitRenderer.of(digits.DIGITS, "train")
    weights = np.array([0.299, 0.587, 0.114])
    colours = []
    for seed in range(60):
        random = np.random.default_rng(seed)
        under = renderer._background(random)[10:40, 20:40]
        colours.append(generated.contrasting_colour(under, random))
        luminance, own = under @ weights, colours[-1] @ weights
        share_darker, share_lighter = (luminance < own - 25).mean(), (luminance > own + 25).mean()
        assert max(share_darker, share_lighter) > 0.85
    assert np.std(colours, axis=0).min() > 50


def test_generated_sets_are_built_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "DIGITS", FEW_DIGITS)
    monkeypatch.setitem(shapes.PRESETS, "shapes-hard", replace(shapes.HARD, num_train=3, num_val=2))
    for name, sizes, side in (("digits", (6, 3), 96), ("shapes-hard", (3, 2), 128)):
        sets = build_datasets(config_of("", dataset=name, cache_dir=str(tmp_path)))
        assert tuple(len(dataset) for dataset in sets) == sizes
        for dataset in sets:
            assert dataset.area_sides == (12, 24)
            assert dataset[0][0].shape == (3, side, side)
            assert dataset.categories == list(
                digits.CATEGORIES if name == "digits" else shapes.CATEGORIES
            )


def test_digits_are_not_mirrored(tmp_path):
    config = config_of("", dataset="digits", cache_dir=str(tmp_path), horizontal_flip=0.5)
    with pytest.raises(ValueError, match=r"horizontal_flip must be 0 for digits.*got 0\.5"):
        build_datasets(config)


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
