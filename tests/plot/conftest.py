"""Fixtures for the tests of pictures and pages."""

import pytest
import torch


@pytest.fixture
def page(tmp_path):
    return tmp_path / "where.html"


@pytest.fixture
def image():
    return torch.rand(3, 40, 60)  # 60 wide
