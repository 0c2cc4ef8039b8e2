"""The gradients are those of the float64 reference, together and each alone."""

import itertools
import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from msda.testing import (
    OPERATOR,
    TOLERANCES,
    FusedInputs,
    Inputs,
    gradient_names,
    grid_sample_core,
    leaves,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    random_like_output,
    relative_error,
)
from tests.helpers.cases import (
    SHAPES,
    SIZES,
    any_sizes,
    awkward_sizes,
    every_dtype,
    every_form,
    sixteen_bits,
)
from tests.helpers.inputs import off_edges
from tests.helpers.results import (
    all_gradients,
    assert_gradients_close,
    assert_same_bits,
    compute,
    compute_exactly,
    compute_gradients,
    exact_gradients,
    gradient_tolerance,
)
from tests.operator.operator_calls import call_backward

# In the place of the operator, all in the dtype of value.
GRID_SAMPLE = {
    Inputs: lambda value, shapes, _, *points, num_points: grid_sample_core(
        Inputs(value, shapes, *points, num_points)
    )
}


def subsets(names):
    for size in range(1, len(names)):
        yield from itertools.combinations(names, size)


# ---- against the reference -----------------------------------------------------------------------


@every_dtype
@every_form
@awkward_sizes
def test_gradients_match_reference(device, make, sizes, dtype):
    inputs = off_edges(make(**sizes, dtype=dtype, device=device))
    grad_output = random_like_output(inputs)
    actual = all_gradients(inputs, grad_output)
    for name, gradient in actual.items():
        assert gradient.dtype == getattr(inputs, name).dtype
        assert gradient.device == inputs.value.device
    assert_gradients_close(inputs, actual, exact_gradients(inputs, grad_output))


# So few queries that the CPU's kernels read pixels where they are, and so many that they copy them;
# threads for each head, and so many that channels and rows are spread over them in two passes.
@pytest.mark.not_on_executor("calls torch's operator; test_kernels.py has its own")
@pytest.mark.parametrize("num_queries", [13, 100], ids=["sparse", "dense"])
@pytest.mark.parametrize("threads", [1, 16], ids=["one_pass", "two_passes"])
@every_dtype
@every_form
def test_every_subset_of_gradients_has_the_bits_of_all_together(
    device, make, dtype, threads, num_queries, poisoned_allocations, set_threads
):
    set_threads(threads)
    sizes = SIZES | {"num_queries": num_queries, "head_dim": 16}
    inputs = make(SHAPES, **sizes, dtype=dtype, device=device)
    grad_output = random_like_output(inputs)
    names = gradient_names(inputs)
    together = call_backward(inputs, grad_output, names)
    for wanted in [(), *subsets(names)]:
        some = call_backward(inputs, grad_output, wanted)
        for name in names:
            if name in wanted:
                assert_same_bits(some[name], together[name])
            else:
                assert some[name].shape == (0,)


@every_dtype
@awkward_sizes
def test_gradients_of_nearest_match_reference(device, sizes, dtype):
    inputs = off_edges(make_inputs(**sizes, dtype=dtype, device=device))
    grad_output = random_like_output(inputs)
    actual = all_gradients(inputs, grad_output, interpolation="nearest")
    assert actual["sampling_locations"].eq(0).all()
    expected = exact_gradients(inputs, grad_output, interpolation="nearest")
    expected["sampling_locations"] = torch.zeros_like(actual["sampling_locations"])
    assert_gradients_close(inputs, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("point_dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@every_form
def test_gradients_have_the_dtype_of_their_input(device, make, dtype, point_dtype):
    inputs = off_edges(make(SHAPES, **SIZES, dtype=dtype, point_dtype=point_dtype, device=device))
    grad_output = random_like_output(inputs)
    actual = all_gradients(inputs, grad_output)
    expected = exact_gradients(inputs, grad_output)
    for name, gradient in actual.items():
        assert gradient.dtype == getattr(inputs, name).dtype
        # Sums are of the precision of value, though the gradient may be wider.
        limit = max(
            TOLERANCES[gradient.dtype], TOLERANCES[torch.promote_types(dtype, torch.float32)]
        )
        if name == "attention_logits":
            limit = max(limit, TOLERANCES[dtype])
        assert relative_error(gradient, expected[name]) <= limit, name


@pytest.mark.not_on_executor("too large: it would take minutes")
def test_gradients_of_the_encoder_of_the_paper_match_reference(device, encoder):
    inputs, grad_output, _, expected = encoder
    inputs = map_tensors(inputs, lambda tensor: tensor.to(device))
    assert_gradients_close(inputs, all_gradients(inputs, grad_output.to(device)), expected)


@pytest.mark.not_on_executor("hundreds of calls: it would take minutes")
@settings(derandomize=True, deadline=None, max_examples=80)
@given(any_sizes())
def test_gradients_match_reference_at_any_sizes(sizes):
    inputs = off_edges(make_inputs(**sizes))
    grad_output = random_like_output(inputs)
    actual = all_gradients(inputs, grad_output)
    assert_gradients_close(inputs, actual, exact_gradients(inputs, grad_output))


@pytest.mark.not_on_executor("hundreds of calls: it would take minutes")
@settings(derandomize=True, deadline=None, max_examples=80)
@given(any_sizes(), st.sampled_from([2, 4]), st.booleans(), st.booleans())
def test_fused_gradients_match_reference_at_any_sizes(sizes, reference_size, shared, padding):
    inputs = make_fused_inputs(
        **sizes, reference_size=reference_size, shared_reference=shared, padding=padding
    )
    inputs = off_edges(inputs)
    grad_output = random_like_output(inputs)
    actual = all_gradients(inputs, grad_output)
    expected = exact_gradients(inputs, grad_output)
    # CUDA takes the softmax's <grad_output, output> of each head from a rounded output: an error
    # that may be larger than the gradient, which is zero for a single sample.
    heads = (-1, (inputs.value.shape[2], inputs.value.shape[3]))
    products = (
        tensor.double().unflatten(*heads).norm(dim=-1)
        for tensor in (grad_output, compute_exactly(inputs))
    )
    rounded = torch.stack(list(products)).prod(dim=0).norm()
    logits, exact = actual.pop("attention_logits"), expected["attention_logits"]
    # Twice the tolerance: of so few numbers, one rounding may count for more than in the mean.
    limit = 2 * gradient_tolerance(inputs, "attention_logits") * (exact.norm() + rounded)
    assert (logits.double() - exact).norm() <= limit
    assert_gradients_close(inputs, actual, expected, scale=2)


# ---- finite differences --------------------------------------------------------------------------


_SMALL = dict(batch=2, num_queries=3, num_heads=2, head_dim=3, dtype=torch.float64)


@pytest.mark.not_on_executor("thousands of calls: it would take minutes")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (make_inputs, dict(num_points=2)),
        (make_inputs, dict(num_points=[2, 0, 3])),
        (make_fused_inputs, dict(num_points=2, padding=True)),
        (make_fused_inputs, dict(num_points=[2, 0, 3], shared_reference=True)),
        (make_fused_inputs, dict(num_points=2, reference_size=4)),
        (make_fused_inputs, dict(num_points=[1, 2, 1], reference_size=4, shared_reference=True)),
    ],
    ids=["plain", "plain_ragged", "points", "shared_point_ragged", "boxes", "shared_box_ragged"],
)
def test_gradients_match_finite_differences_together_and_alone(device, make, options):
    inputs = off_edges(make([(4, 5), (1, 1), (3, 2)], **_SMALL, **options, device=device), 0.05)
    for names in [*subsets(gradient_names(inputs)), gradient_names(inputs)]:
        if 1 < len(names) < len(gradient_names(inputs)):
            continue

        def function(*tensors, names=names):
            return compute(replace(inputs, **dict(zip(names, tensors, strict=True))))

        some = leaves(inputs, names)
        tensors = tuple(getattr(some, name) for name in names)
        assert torch.autograd.gradcheck(function, tensors, nondet_tol=1e-12)


# ---- precision -----------------------------------------------------------------------------------


@sixteen_bits
def test_error_of_gradients_in_16_bits_is_at_most_twice_that_of_plain_pytorch(device, dtype):
    inputs = make_inputs(SHAPES, **SIZES, dtype=dtype, point_dtype=dtype, device=device)
    inputs = off_edges(inputs, margin=0.1)
    grad_output = random_like_output(inputs)
    expected = exact_gradients(inputs, grad_output)
    plain = compute_gradients(GRID_SAMPLE, inputs, grad_output, gradient_names(inputs))
    for name, gradient in all_gradients(inputs, grad_output).items():
        limit = 2 * relative_error(plain[name], expected[name])
        assert relative_error(gradient, expected[name]) <= limit, name


@pytest.mark.not_on_executor("CUDA rounds the output before")
@every_dtype
def test_logits_of_single_samples_have_no_gradient_on_the_cpu(dtype):
    # The softmax is 1 whatever the logit; no rounding of the output comes in between.
    inputs = make_fused_inputs([(6, 9)], **SIZES | {"num_points": 1}, dtype=dtype)
    assert all_gradients(inputs, random_like_output(inputs))["attention_logits"].eq(0).all()


@sixteen_bits
def test_many_queries_at_one_pixel_do_not_saturate_grad_value_in_16_bits(device, dtype):
    # 4096 ones: summed in bfloat16 they stop at 256, in float16 at 2048.
    inputs = Inputs(
        torch.ones(1, 1, 1, 8, dtype=dtype, device=device),
        [(1, 1)],
        torch.full((1, 4096, 1, 1, 1, 2), 0.5, device=device),
        torch.ones(1, 4096, 1, 1, 1, device=device),
    )
    gradients = all_gradients(inputs, torch.ones_like(random_like_output(inputs)))
    assert gradients["value"].eq(4096).all()


@sixteen_bits
def test_many_heads_and_points_of_16_bits_do_not_saturate_grad_reference_points(device, dtype):
    # Each of the 8 * 512 samples gives 1/512 of the derivative; bfloat16 stops at 256 such parts.
    inputs = FusedInputs(
        torch.arange(4.0, device=device).to(dtype).view(1, 4, 1, 1).expand(1, 4, 8, 1),
        [(1, 4)],
        torch.full((1, 1, 1, 2), 0.5, device=device),
        torch.zeros(1, 1, 8, 1, 512, 2, dtype=dtype, device=device),
        torch.zeros(1, 1, 8, 1, 512, dtype=dtype, device=device),
    )
    gradients = all_gradients(inputs, torch.ones_like(random_like_output(inputs)))
    # 8 heads, a slope of 1 per pixel, 4 pixels; y lies on the centre of the only row, whose
    # neighbour to the south is zero: minus the value there, 1.5.
    assert gradients["reference_points"].flatten().tolist() == [8 * 4, -8 * 1.5]


# ---- samples that do not count, pixels that are not read -----------------------------------------


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3.0, -2.0]


@every_dtype
@pytest.mark.parametrize("axes", [[0], [1], [0, 1]], ids=["x", "y", "both"])
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_samples_outside_or_not_finite_have_exactly_zero_gradients(device, bad, axes, dtype):
    inputs = make_inputs(SHAPES, **SIZES, dtype=dtype, device=device)
    grad_output = random_like_output(inputs)
    without = inputs.attention_weights.clone()
    without[:, ::2, :, :, 1] = 0
    expected = all_gradients(replace(inputs, attention_weights=without), grad_output)
    expected["attention_weights"][:, ::2, :, :, 1] = 0
    expected["sampling_locations"][:, ::2, :, :, 1] = 0
    inputs.sampling_locations[:, ::2, :, :, 1, axes] = bad
    for name, gradient in all_gradients(inputs, grad_output).items():
        assert_same_bits(gradient + 0, expected[name] + 0)  # + 0: no matter which zero


def test_infinite_grad_output_does_not_reach_samples_that_do_not_count(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    inputs.sampling_locations[:, :, :, :, 1, 0] = math.nan
    grad_output = torch.full_like(random_like_output(inputs), math.inf)
    gradients = all_gradients(inputs, grad_output)
    assert gradients["sampling_locations"][:, :, :, :, 1].eq(0).all()
    assert gradients["attention_weights"][:, :, :, :, 1].eq(0).all()


@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_offsets_far_away_or_not_finite_give_and_get_no_gradient(device, bad, reference_size):
    inputs = make_fused_inputs(SHAPES, **SIZES, reference_size=reference_size, device=device)
    inputs = off_edges(inputs)
    grad_output = random_like_output(inputs)
    far_away = inputs.sampling_offsets.clone()
    far_away[:, ::2, :, :, 1, 0] = 1e6
    expected = exact_gradients(replace(inputs, sampling_offsets=far_away), grad_output)
    inputs.sampling_offsets[:, ::2, :, :, 1, 0] = bad * 1000
    actual = all_gradients(inputs, grad_output)
    assert actual["sampling_offsets"][:, ::2, :, :, 1].eq(0).all()
    assert_gradients_close(inputs, actual, expected)


@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("axis", [0, 1, 2, 3], ids=["x", "y", "w", "h"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_reference_points_that_are_not_finite_give_and_get_no_gradient(
    device, bad, axis, reference_size
):
    if axis >= reference_size:
        pytest.skip("points have no size")
    inputs = make_fused_inputs(SHAPES, **SIZES, reference_size=reference_size, device=device)
    inputs.reference_points[:, ::2, 1, axis] = bad
    actual = all_gradients(inputs, random_like_output(inputs))
    for name, gradient in actual.items():
        assert gradient.isfinite().all(), name
    assert actual["reference_points"][:, ::2, 1].eq(0).all()
    assert actual["sampling_offsets"][:, ::2, :, 1].eq(0).all()
    assert actual["reference_points"][:, 1::2].ne(0).any()


@every_dtype
@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [
        (1.0, 0.4, slice(None), 0),
        (0.0, 0.4, slice(None), -1),
        (0.4, 0.0, slice(2, None), slice(None)),
        (0.4, 1.0, slice(0, -2), slice(None)),
    ],
    ids=["east", "west", "north", "south"],
)
def test_pixels_across_the_border_neither_leak_nor_get_a_gradient(device, x, y, row, column, dtype):
    inputs = make_inputs([(6, 7)], **SIZES, dtype=dtype, device=device)
    inputs.sampling_locations.copy_(torch.tensor([x, y]))
    grad_output = random_like_output(inputs)
    expected = exact_gradients(inputs, grad_output)
    inputs.value.unflatten(1, (6, 7))[:, row, column] = math.inf
    actual = all_gradients(inputs, grad_output)
    assert actual["value"].unflatten(1, (6, 7))[:, row, column].eq(0).all()
    assert_gradients_close(inputs, actual, expected)


def test_padded_pixels_neither_leak_nor_get_a_gradient(device):
    inputs = off_edges(make_fused_inputs(SHAPES, **SIZES, padding=True, device=device))
    grad_output = random_like_output(inputs)
    expected = all_gradients(inputs, grad_output)
    inputs.value[inputs.padding_mask] = math.nan
    actual = all_gradients(inputs, grad_output)
    assert actual["value"][inputs.padding_mask].eq(0).all()
    for name, gradient in actual.items():
        assert_same_bits(gradient, expected[name])


def test_derivative_at_the_border_is_that_of_zero_padding(device):
    # Half a pixel outside, the value falls to zero: not the derivative of a clamped border, none
    # from x = -1 on.
    value = torch.tensor([2.0, 6.0], device=device).view(1, 2, 1, 1)
    x = torch.tensor([-0.25, 0.0, 0.5, 1.0, 1.25], device=device)
    locations = torch.stack([x, torch.full_like(x, 0.25)], -1).view(1, 5, 1, 1, 1, 2)
    weights = torch.ones(1, 5, 1, 1, 1, device=device)
    inputs = Inputs(value, [(1, 2)], locations, weights)
    gradients = all_gradients(inputs, torch.ones(1, 5, 1, device=device))
    by_x = gradients["sampling_locations"].flatten()[::2]
    three_quarters = 0.75  # how much of the only row a sample at y = 0.25 sees
    expected = torch.tensor([0.0, 2 * 2, 2 * 4, 2 * -6, 0.0], device=device) * three_quarters
    assert_same_bits(by_x + 0, expected)


# ---- layouts, empty inputs, what is asked for ----------------------------------------------------


@pytest.mark.not_on_executor("no kernel is called for what is empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("size", ["batch", "num_queries", "num_points", "num_heads", "head_dim"])
@every_form
def test_empty_inputs_have_zero_gradients_of_the_right_shape(
    device, make, size, dtype, poisoned_allocations
):
    inputs = make(SHAPES, **SIZES | {size: 0}, dtype=dtype, device=device)
    gradients = all_gradients(inputs, random_like_output(inputs))
    for name, gradient in gradients.items():
        assert gradient.shape == getattr(inputs, name).shape
        assert gradient.eq(0).all(), name


@every_dtype
@every_form
def test_every_element_of_every_gradient_is_written(device, make, dtype, poisoned_allocations):
    for num_points in (3, [2, 0, 1]):
        sizes = SIZES | {"num_points": num_points}
        inputs = make(SHAPES, **sizes, dtype=dtype, device=device)
        for names in [*subsets(gradient_names(inputs)), gradient_names(inputs)]:
            grad_output = random_like_output(inputs)
            for name, gradient in compute_gradients(OPERATOR, inputs, grad_output, names).items():
                assert gradient.isfinite().all(), name


@pytest.mark.not_on_executor("counts calls of torch's operator")
@every_form
def test_gradients_are_computed_only_where_asked_for(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    asked = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            if "_backward" in str(function):
                asked.append([flag for flag in arguments if isinstance(flag, bool)])
            return function(*arguments, **options or {})

    for name in gradient_names(inputs):
        output = compute(leaves(inputs, [name]))
        with Recorder():
            output.sum().backward()
        wanted = [other == name for other in gradient_names(inputs)]
        assert asked.pop()[-len(wanted) :] == wanted


def test_inputs_without_gradients_need_no_graph(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    assert not compute(inputs).requires_grad
    with torch.no_grad():
        assert not compute(leaves(inputs, ["value"])).requires_grad


def test_gradients_are_summed_over_calls(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    grad_output = random_like_output(inputs)
    once = all_gradients(inputs, grad_output)
    twice = leaves(inputs)
    (compute(twice) + compute(twice)).backward(grad_output)
    for name in gradient_names(inputs):
        torch.testing.assert_close(getattr(twice, name).grad, 2 * once[name])


# ---- threads -------------------------------------------------------------------------------------


@every_form
def test_deterministic_algorithms_give_the_same_bits_every_time(device, make, poisoned_allocations):
    inputs = make(SHAPES, **SIZES | {"num_queries": 500}, device=device)
    grad_output = random_like_output(inputs)
    expected = all_gradients(inputs, grad_output)
    for _ in range(3):
        for name, gradient in all_gradients(inputs, grad_output).items():
            assert_same_bits(gradient, expected[name])
