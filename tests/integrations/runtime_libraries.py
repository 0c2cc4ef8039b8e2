"""The operator for other runtimes, as ``make test`` builds it from csrc/runtimes, or a skip."""

import pytest

from tests.helpers.executor import BUILD

FOLDER = BUILD / "csrc" / "runtimes"


def library(name, needs):
    """The path of a library."""
    found = sorted(FOLDER.glob(f"lib{name}.*"))
    if not found:
        pytest.skip(f"lib{name} was not built: make test builds it where there is {needs}")
    return str(found[0])


def openvino_library():
    return library("msda_openvino", "the package openvino")


def onnxruntime_library():
    return library(
        "msda_onnxruntime", "MSDA_ONNXRUNTIME_INCLUDE, the folder of ONNX Runtime's headers"
    )
