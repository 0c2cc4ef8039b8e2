"""Results against float64, the limits they are held to, and the baselines."""

import pytest
import torch

from benchmarks.common import accuracy, baselines
from msda.testing import (
    grid_sample_core,
    make_fused_inputs,
    make_inputs,
    reference,
    relative_error,
)

SMALL = [(5, 7), (3, 4)]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Tiny problems: threads would only wait for each other."""
    set_threads(1)


@pytest.mark.parametrize("make", [make_inputs, make_fused_inputs])
def test_exact_results_do_not_depend_on_the_chunks(make):
    inputs = make(SMALL, batch=2, num_queries=11, num_heads=2, head_dim=3)
    grad_output = torch.randn(2, 11, 6)
    whole = accuracy.exact_results(inputs, grad_output)
    parts = accuracy.exact_results(inputs, grad_output, budget=1)
    assert accuracy.queries_at_once(inputs, 1) == 1
    assert whole.keys() == {"output", *accuracy.GRADIENTS[type(inputs)]}
    for name in whole:
        assert whole[name].dtype == torch.float64
        torch.testing.assert_close(parts[name], whole[name])
        assert whole[name].count_nonzero() > 0


def test_the_baselines_compute_the_operator():
    inputs = make_fused_inputs(SMALL, batch=2, num_queries=5, reference_size=4)
    expected = reference(inputs)
    actual = baselines.after_prologue(grid_sample_core)(inputs)
    assert relative_error(actual, expected) < 1e-5
    points = make_fused_inputs(SMALL, batch=2, num_queries=5)
    plain = baselines.prologue(points)
    assert relative_error(reference(plain), reference(points)) < 1e-5


def test_a_complaint_names_the_result_and_both_numbers():
    errors = {"output": 1e-7, "value": 3e-3}
    text = "grad_value must differ by at most 1.0e-04, got 3.0e-03"
    assert accuracy.complaint(errors, accuracy.peer_limits(torch.float32)) == text
    assert accuracy.complaint({"output": 0.0}, accuracy.our_limits(torch.float16)) is None
    nan = {"output": float("nan")}
    assert "got nan" in accuracy.complaint(nan, accuracy.peer_limits(torch.bfloat16))


@pytest.mark.parametrize("dtype", accuracy.PEER_LIMITS)
def test_zeros_and_strangers_numbers_are_refused_in_every_dtype(dtype):
    expected = {"output": torch.randn(1000)}
    for wrong in (torch.zeros(1000), torch.randn(1000)):
        errors = accuracy.errors_of({"output": wrong}, expected)
        assert accuracy.complaint(errors, accuracy.peer_limits(dtype)) is not None


def test_a_result_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"^output must have shape \(2, 3\), got \(6,\)$"):
        accuracy.errors_of({"output": torch.ones(6)}, {"output": torch.ones(2, 3)})


def test_baseline_takes_levels_with_different_numbers_of_points():
    inputs = make_inputs([(9, 7), (5, 4)], num_queries=11, num_points=[3, 5], dtype=torch.float64)
    assert relative_error(grid_sample_core(inputs), reference(inputs)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_baseline_computes_16_bits_in_float32(dtype):
    inputs = make_inputs([(9, 7), (5, 4)], num_queries=11, dtype=dtype)
    output = baselines.in_float32(grid_sample_core)(inputs)
    assert output.dtype == dtype
    assert relative_error(output, reference(inputs)) < torch.finfo(dtype).eps
