"""Augmentation moves boxes as it moves pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from detector.config import DataConfig
from detector.data.transforms import Augmentation, resize
from tests.detector.data_sets import ORIGINAL


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
