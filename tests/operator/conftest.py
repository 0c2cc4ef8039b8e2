"""Where the tests of the operator run, and what they share.

A test that takes the fixture ``device`` runs on the CPU, on a GPU where there is one, and on the
CUDA executor: with the CUDA kernels, run on the CPU, in the place of the compiled operator. It must
call the operator by ``compute`` or ``OPERATOR``. A test, or a file, that cannot run there says why:
``pytest.mark.not_on_executor("reason")``.
"""

import itertools
import zlib

import pytest

from msda.testing import (
    OPERATOR,
    PAPER_SHAPES,
    REFERENCE,
    call,
    gradient_names,
    leaves,
    make_inputs,
    random_like_output,
)
from tests.helpers import executor
from tests.helpers.inputs import in_float64


def pytest_generate_tests(metafunc):
    takes_device = "device" in metafunc.fixturenames
    excuse = metafunc.definition.get_closest_marker("not_on_executor")
    if excuse is not None:
        (reason,) = excuse.args
        assert reason, "not_on_executor must have a reason, got none"
        devices = ["cpu", "cuda"]
    else:
        name = metafunc.function.__name__
        assert takes_device, f"{name} must take device, or say why by not_on_executor, got neither"
        devices = ["cpu", "cuda", pytest.param("executor", marks=pytest.mark.executor)]
    if takes_device:
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request):
    """Where the tensors of a test are; on the executor, the CPU."""
    if request.param == "executor":
        request.getfixturevalue("kernels_in_place_of_the_operator")
        return "cpu"
    if request.param == "cuda":
        request.getfixturevalue("needs_cuda")
    return request.param


@pytest.fixture
def kernels_in_place_of_the_operator(monkeypatch, request):
    """The CUDA kernels, on a GPU and in an order of threads that depend on the test's name."""
    executor.load()
    for inputs, function in executor.OPERATOR.items():
        monkeypatch.setitem(OPERATOR, inputs, function)
    gpus = list(itertools.product(executor.ORDERS, executor.CAPABILITIES))
    order, capability = gpus[zlib.crc32(request.node.name.encode()) % len(gpus)]
    gpu = dict(order=order, compute_capability=capability)
    monkeypatch.setattr(executor.Operator, "gpu", gpu)
    monkeypatch.setattr(executor.Operator, "calls", 0)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    result = yield
    if pyfuncitem.get_closest_marker("executor"):
        assert executor.Operator.calls, "a test on the executor must call the kernels, got no call"
    return result


@pytest.fixture(scope="session")
def encoder():
    """The encoder of the paper: inputs, grad_output, and float64 output and gradients."""
    # As they come, cell edges included: fractions are exact enough to fall into the right cell.
    inputs = make_inputs(PAPER_SHAPES, locations="local")
    grad_output = random_like_output(inputs)
    exact = leaves(in_float64(inputs))
    output = call(REFERENCE, exact)
    output.backward(grad_output.double())
    gradients = {name: getattr(exact, name).grad for name in gradient_names(inputs)}
    return inputs, grad_output, output.detach(), gradients
