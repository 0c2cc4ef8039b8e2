"""Fixtures for all tests, and what the report begins with."""

import pytest
import torch

import msda

# So that an assertion in a helper that fails shows its values, as one in a test does.
pytest.register_assert_rewrite(
    "tests.helpers", "tests.cuda", "tests.detector", "tests.integrations", "tests.plot"
)


def pytest_report_header():
    about = msda.info()
    cuda = ";".join(about["cuda_architectures"]) or "none"
    return (
        f"msda {about['msda']}: {about['backend']} backend ({about['backend_reason']}), "
        f"CPU kernels: {about['cpu_capability']}, CUDA kernels: {cuda}"
    )


@pytest.fixture
def needs_cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if not msda.info()["cuda_architectures"]:
        pytest.skip("msda was built without CUDA kernels")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Where the tensors of a test are. Those of the operator have one more, in its conftest.py."""
    if request.param == "cuda":
        request.getfixturevalue("needs_cuda")
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms(True), under which new tensors also hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_allocations(deterministic):
    """Newly allocated tensors hold NaN, so that an element nobody wrote shows."""
