"""Fixtures for the tests of the operator."""

import pytest

from msda.testing import (
    PAPER_SHAPES,
    REFERENCE,
    call,
    gradient_names,
    leaves,
    make_grad_output,
    make_inputs,
)
from tests.helpers.inputs import in_float64


@pytest.fixture(scope="session")
def encoder():
    """The encoder of the paper: inputs, grad_output, and float64 output and gradients."""
    # As they come, cell edges included: fractions are exact enough to fall into the right cell.
    inputs = make_inputs(PAPER_SHAPES, locations="local")
    grad_output = make_grad_output(inputs)
    exact = leaves(in_float64(inputs))
    output = call(REFERENCE, exact)
    output.backward(grad_output.double())
    gradients = {name: getattr(exact, name).grad for name in gradient_names(inputs)}
    return inputs, grad_output, output.detach(), gradients
