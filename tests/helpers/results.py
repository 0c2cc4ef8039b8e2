"""Results of the operator and of its definition, and how they are compared."""

import torch

from msda.testing import (
    OPERATOR,
    REFERENCE,
    TOLERANCES,
    call,
    gradient_names,
    leaves,
    ours,
    reference,
    relative_error,
)
from tests.helpers.inputs import in_float64


def compute(inputs, **options):
    """The operator; where a test runs on the CUDA executor, its kernels."""
    return ours(inputs, **options)


def compute_exactly(inputs, **options):
    """The float64 reference, on the CPU."""
    return reference(in_float64(inputs), **options)


def compute_gradients(functions, inputs, grad_output, names, **options):
    """Gradients by the arguments called ``names``, no other one requiring any."""
    inputs = leaves(inputs, names)
    call(functions, inputs, **options).backward(grad_output)
    return {name: getattr(inputs, name).grad for name in names}


def all_gradients(inputs, grad_output, **options):
    return compute_gradients(OPERATOR, inputs, grad_output, gradient_names(inputs), **options)


def exact_gradients(inputs, grad_output, **options):
    exact_grad_output = grad_output.double().cpu()
    names = gradient_names(inputs)
    return compute_gradients(REFERENCE, in_float64(inputs), exact_grad_output, names, **options)


def assert_close(actual, expected, tolerance=None, scale=1):
    """Relative error below the tolerance of ``actual``'s dtype; ``scale`` needs a reason."""
    limit = scale * (TOLERANCES[actual.dtype] if tolerance is None else tolerance)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= limit


def gradient_tolerance(inputs, name):
    """The tolerance of the gradient's dtype; for logits also that of the output's."""
    # CUDA takes the softmax's gradient from the output, which was rounded to the dtype of value.
    dtypes = [getattr(inputs, name).dtype]
    if name == "attention_logits":
        dtypes.append(inputs.value.dtype)
    return max(TOLERANCES[dtype] for dtype in dtypes)


def assert_gradients_close(inputs, actual, expected, scale=1):
    for name, gradient in actual.items():
        assert gradient.isfinite().all(), f"grad_{name}"
        assert gradient.shape == expected[name].shape
        error, limit = relative_error(gradient, expected[name]), gradient_tolerance(inputs, name)
        assert error <= scale * limit, f"grad_{name}"


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
