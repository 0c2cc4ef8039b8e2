"""Fixtures for the tests of machine code."""

import shutil

import pytest

from tests.cuda.machine_code import kernel
from tests.cuda.small_kernels import KINDS


@pytest.fixture
def small_kernels(monkeypatch):
    """Let the gate take the small kernels for its own."""
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    monkeypatch.setitem(kernel.TEMPLATES, "round_kernel", ("type", "width", "lanes", KINDS))
    monkeypatch.setattr(kernel, "HOT_HEAD_DIM", 8)
