"""Data that the detector's examples generate: the same on every machine, and right."""

from dataclasses import replace

import numpy as np
import pytest

from detector.data import DataError, build_datasets, digits, generated, shapes
from tests.detector.data_sets import config_of

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
