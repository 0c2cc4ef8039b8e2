"""Fixtures for the tests of the detector."""

from dataclasses import replace

import pytest

from detector.backbone import RESNET_BLOCKS
from detector.data.shapes import EASY, make_shapes


@pytest.fixture(scope="session")
def shapes(tmp_path_factory):
    """Folder of 32 training and 8 validation images for the detector."""
    preset = replace(EASY, num_train=32, num_val=8)
    return str(make_shapes(preset, str(tmp_path_factory.mktemp("shapes"))))


@pytest.fixture
def shallow_resnet(monkeypatch):
    """A ResNet-50 of one block per stage, to be quick."""
    monkeypatch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))
