"""Fixtures for the tests of the detector."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from detector.backbone import RESNET_BLOCKS
from detector.data.shapes import EASY, make_shapes
from tests.detector.foreign_files import weights_of
from tests.detector.image_files import BOX, GREY
from tests.detector.small_models import resnet_config


@pytest.fixture
def one_thread(set_threads):
    set_threads(1)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder of 32 training and 8 validation images for the detector."""
    preset = replace(EASY, num_train=32, num_val=8)
    return str(make_shapes(preset, str(tmp_path_factory.mktemp("shapes"))))


@pytest.fixture
def shallow_resnet(monkeypatch):
    """A ResNet-50 of one block per stage, to be quick."""
    monkeypatch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))


@pytest.fixture(scope="module")
def weights():
    """Of a ResNet-50 with a small transformer."""
    return weights_of(resnet_config(num_heads=8))


@pytest.fixture
def photo():
    """64 x 48 and like no picture turned or mirrored: grey, with a red box off the centre."""
    pixels = np.stack([GREY, GREY, GREY], -1)
    x0, y0, x1, y1 = BOX
    pixels[y0:y1, x0:x1] = (250, 10, 10)
    return Image.fromarray(pixels)
