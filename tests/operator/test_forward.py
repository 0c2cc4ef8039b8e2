"""The output is that of the float64 reference, whatever the sizes and dtypes."""

import math
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from msda.testing import (
    TOLERANCES,
    FusedInputs,
    Inputs,
    grid_sample_core,
    make_fused_inputs,
    make_inputs,
    map_tensors,
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
from tests.helpers.results import assert_close, assert_same_bits, compute, compute_exactly

# ---- against the reference -----------------------------------------------------------------------


@every_dtype
@every_form
@awkward_sizes
def test_output_matches_reference(device, make, sizes, dtype):
    inputs = make(**sizes, dtype=dtype, device=device)
    output = compute(inputs)
    assert output.dtype == dtype
    assert output.device == inputs.value.device
    assert_close(output, compute_exactly(inputs))


@every_dtype
@awkward_sizes
def test_nearest_matches_reference(device, sizes, dtype):
    inputs = off_edges(make_inputs(**sizes, dtype=dtype, device=device))
    assert_close(
        compute(inputs, interpolation="nearest"), compute_exactly(inputs, interpolation="nearest")
    )


def test_nearest_clamps_each_axis_by_its_own_size_on_maps_that_are_not_square(device):
    value = torch.arange(12.0, device=device).view(1, 12, 1, 1)
    locations = torch.tensor([[9.0, 0.0], [0.0, 9.0], [9.0, 9.0], [-9.0, -9.0]], device=device)
    for height, width in [(2, 6), (6, 2)]:
        inputs = Inputs(
            value, [(height, width)], locations.view(1, 4, 1, 1, 1, 2), torch.ones(1, 4, 1, 1, 1)
        )
        inputs = map_tensors(inputs, lambda tensor: tensor.to(device))
        output = compute(inputs, interpolation="nearest")
        assert output.flatten().tolist() == [width - 1, (height - 1) * width, 11, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("point_dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
@every_form
def test_points_and_weights_of_any_dtype_are_accepted(device, make, dtype, point_dtype):
    inputs = make(SHAPES, **SIZES, dtype=dtype, point_dtype=point_dtype, device=device)
    output = compute(inputs)
    assert output.dtype == dtype
    assert_close(output, compute_exactly(inputs))


def test_points_and_weights_may_differ_in_dtype(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    inputs = replace(inputs, attention_weights=inputs.attention_weights.bfloat16())
    assert_close(compute(inputs), compute_exactly(inputs))


@pytest.mark.not_on_executor("too large: it would take minutes")
def test_encoder_of_the_paper_matches_reference(device, encoder):
    inputs, _, expected, _ = encoder
    output = compute(map_tensors(inputs, lambda tensor: tensor.to(device)))
    # A coordinate of up to 167 pixels rounded to float32 would alone cost 3e-6. The kernels compute
    # the fraction of a pixel without that rounding.
    assert_close(output, expected, tolerance=5e-7)


@pytest.mark.not_on_executor("no kernel is called for what is empty")
@pytest.mark.parametrize("empty", [dict(batch=0), dict(num_queries=0), dict(num_points=0)])
@every_form
def test_empty_inputs_give_empty_or_zero_outputs(device, make, empty):
    sizes = SIZES | empty
    output = compute(make(SHAPES, **sizes, device=device))
    assert output.shape == (sizes["batch"], sizes["num_queries"], 60)
    assert output.eq(0).all()


@pytest.mark.not_on_executor("hundreds of calls: it would take minutes")
@settings(derandomize=True, deadline=None, max_examples=100)
@given(any_sizes())
def test_output_matches_reference_at_any_sizes(sizes):
    inputs = make_inputs(**sizes)
    assert_close(compute(inputs), compute_exactly(inputs))
    inputs = off_edges(inputs)
    assert_close(
        compute(inputs, interpolation="nearest"), compute_exactly(inputs, interpolation="nearest")
    )


@pytest.mark.not_on_executor("hundreds of calls: it would take minutes")
@settings(derandomize=True, deadline=None, max_examples=100)
@given(any_sizes(), st.sampled_from([2, 4]), st.booleans(), st.booleans())
def test_fused_output_matches_reference_at_any_sizes(sizes, reference_size, shared, padding):
    inputs = make_fused_inputs(
        **sizes, reference_size=reference_size, shared_reference=shared, padding=padding
    )
    assert_close(compute(inputs), compute_exactly(inputs))


# ---- precision -----------------------------------------------------------------------------------


@sixteen_bits
def test_error_in_16_bits_is_at_most_twice_that_of_plain_pytorch(device, dtype):
    inputs = make_inputs(SHAPES, **SIZES, dtype=dtype, point_dtype=dtype, device=device)
    expected = compute_exactly(inputs)
    ours = relative_error(compute(inputs), expected)
    assert ours <= 2 * relative_error(grid_sample_core(inputs), expected)


def test_16_bit_values_keep_the_precision_of_float32_locations(device):
    # Coordinates in the dtype of value would move samples by up to 0.6 pixels on this map.
    inputs = make_inputs([(8, 160)], **SIZES, device=device)
    expected = compute_exactly(inputs)
    values = replace(inputs, value=inputs.value.bfloat16())
    coarse = replace(values, sampling_locations=inputs.sampling_locations.bfloat16())
    assert relative_error(compute(values), expected) < 4e-3
    assert relative_error(compute(coarse), expected) > 0.1


@sixteen_bits
def test_many_samples_of_one_pixel_do_not_saturate_in_16_bits(device, dtype):
    # 4096 ones: summed in bfloat16 they stop at 256, in float16 at 2048.
    inputs = Inputs(
        torch.ones(1, 1, 1, 8, dtype=dtype, device=device),
        [(1, 1)],
        torch.full((1, 2, 1, 1, 4096, 2), 0.5, device=device),
        torch.ones(1, 2, 1, 1, 4096, device=device),
    )
    assert compute(inputs).eq(4096).all()


def pixel_times_weight(value, weights):
    """Output for maps of one pixel: the product of a value and a weight, rounded once."""
    inputs = Inputs(
        value.view(1, 1, -1, 1).expand(1, 1, len(weights), 1),
        [(1, 1)],
        torch.full((1, 1, len(weights), 1, 1, 2), 0.5, device=value.device),
        weights.view(1, 1, -1, 1, 1),
    )
    return compute(inputs).flatten()


def all_16_bit_patterns(dtype, device):
    return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)


@pytest.mark.not_on_executor("too many queries; test_kernels.py has its own, by channels")
@sixteen_bits
def test_every_16_bit_number_passes_unchanged(device, dtype):
    numbers = all_16_bit_patterns(dtype, device)
    ones = torch.ones(len(numbers), device=device)
    assert_same_bits(pixel_times_weight(numbers, ones), numbers)


@pytest.mark.not_on_executor("too many queries; test_kernels.py has its own, by channels")
@sixteen_bits
def test_results_are_rounded_to_the_nearest_even_16_bit_number(device, dtype):
    numbers = all_16_bit_patterns(dtype, device)
    numbers = numbers[numbers.isfinite()]
    next_numbers = torch.nextafter(numbers, torch.full_like(numbers, math.inf))
    halfway = numbers.float() / 2 + next_numbers.float() / 2
    random = torch.randint(-(2**31), 2**31, (20_000,)).to(torch.int32).view(torch.float32)
    special = torch.tensor([0.0, -0.0, 65504.0, 65519.99, 65520.0, 65536.0, 3.39e38, 3.4e38])
    weights = [halfway, halfway * (1 + 2**-20), random.to(device), special.to(device)]
    weights = torch.cat([*weights, -weights[-1]])
    weights = weights[weights.isfinite()]
    one = torch.ones(len(weights), dtype=dtype, device=device)
    assert_same_bits(pixel_times_weight(one, weights), weights.to(dtype))


@pytest.mark.parametrize("spread", [1.0, 30.0, 300.0, 3e4])
def test_softmax_of_logits_far_apart(device, spread):
    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    inputs = replace(inputs, attention_logits=inputs.attention_logits * spread)
    assert_close(compute(inputs), compute_exactly(inputs))


def test_softmax_is_precise_to_a_few_ulp_for_any_distance_of_logits(device):
    # Two maps of one pixel, 0 and 1: the output is the second sample's weight.
    distance = torch.linspace(0, 86, 4001, device=device)
    logits = torch.stack([torch.zeros_like(distance), -distance], -1)
    inputs = FusedInputs(
        torch.tensor([0.0, 1.0], device=device).view(1, 2, 1, 1),
        [(1, 1), (1, 1)],
        torch.full((1, 4001, 1, 2), 0.5, device=device),
        torch.zeros(1, 4001, 1, 2, 1, 2, device=device),
        logits.view(1, 4001, 1, 2, 1),
    )
    output, expected = compute(inputs).double().cpu(), compute_exactly(inputs)
    assert ((output - expected).abs() / expected).max() < 4 * 2**-23


def test_softmax_does_not_overflow_for_large_logits(device):
    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    shifted = replace(
        inputs, attention_logits=(inputs.attention_logits * 64).round() / 64 + 2.0**17
    )
    expected = replace(shifted, attention_logits=shifted.attention_logits - 2.0**17)
    assert_same_bits(compute(shifted), compute(expected))


def test_logits_of_minus_infinity_switch_samples_off(device):
    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    inputs.attention_logits[:, :, :, 1] = -math.inf
    assert_close(compute(inputs), compute_exactly(inputs))


@pytest.mark.parametrize(
    "bits", [0x7FC00000, -1, 0x7F800001], ids=["usual", "all_ones", "signalling"]
)
def test_nan_logits_make_the_output_nan(device, bits):
    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    logits = inputs.attention_logits.view(torch.int32)
    logits[0, 3, 1, 2, 1] = bits
    output = compute(inputs).unflatten(-1, (3, 20))
    assert output[0, 3, 1].isnan().all()
    assert output.isnan().sum() == 20


# ---- what is not read ----------------------------------------------------------------------------


def border_locations(height, width):
    """Samples all around a map: on its border, less than a pixel outside, and just inside."""
    across = [-0.45, 0.0, 0.2, 0.5, 0.8, 1.0, 0.45]
    x = [0.5 / width + (width - 1) / width * t for t in (0.0, 0.5, 1.0)] + [
        a / width for a in across
    ]
    y = [0.5 / height + (height - 1) / height * t for t in (0.0, 0.5, 1.0)]
    y += [a / height for a in across]
    x += [1 - a / width for a in across]
    y += [1 - a / height for a in across]
    return torch.cartesian_prod(torch.tensor(x), torch.tensor(y))


@every_dtype
@pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("shape", [(4, 5), (1, 1), (1, 6), (7, 1)], ids=str)
def test_pixels_of_other_levels_and_images_and_heads_do_not_leak(device, shape, poison, dtype):
    locations = border_locations(*shape)
    inputs = make_inputs(
        [(3, 3), shape, (3, 3)],
        batch=3,
        num_queries=len(locations),
        num_heads=3,
        head_dim=5,
        num_points=[0, 1, 0],
        dtype=dtype,
        device=device,
    )
    inputs.sampling_locations.copy_(locations[None, :, None, None])
    expected = compute_exactly(inputs).unflatten(-1, (3, 5))[1, :, 1]
    value = torch.full_like(inputs.value, poison)
    level = slice(9, 9 + shape[0] * shape[1])
    value[1, level, 1] = inputs.value[1, level, 1]
    output = compute(replace(inputs, value=value)).unflatten(-1, (3, 5))[1, :, 1]
    assert_close(output, expected)


@every_dtype
@pytest.mark.parametrize(
    ("x", "y", "row", "column"),
    [
        (1.0, 0.4, slice(None), 0),  # east of the map lies, in memory, the next row's first pixel
        (0.0, 0.4, slice(None), -1),  # west of it the last pixel of the row before
        (0.4, 0.0, slice(2, None), slice(None)),
        (0.4, 1.0, slice(0, -2), slice(None)),
    ],
    ids=["east", "west", "north", "south"],
)
def test_pixels_across_the_border_do_not_leak(device, x, y, row, column, dtype):
    inputs = make_inputs([(6, 7)], **SIZES, dtype=dtype, device=device)
    inputs.sampling_locations.copy_(torch.tensor([x, y]))
    expected = compute_exactly(inputs)
    inputs.value.unflatten(1, (6, 7))[:, row, column] = math.inf
    assert_close(compute(inputs), expected)


@every_dtype
def test_only_the_four_corners_are_read(device, dtype):
    inputs = make_inputs([(6, 7)], **SIZES, dtype=dtype, device=device)
    inputs.sampling_locations.copy_(torch.tensor([(3.3 + 0.5) / 7, (2.6 + 0.5) / 6]))
    expected = compute_exactly(inputs)
    value = torch.full_like(inputs.value, math.nan).unflatten(1, (6, 7))
    value[:, 2:4, 3:5] = inputs.value.unflatten(1, (6, 7))[:, 2:4, 3:5]
    assert_close(compute(replace(inputs, value=value.flatten(1, 2))), expected)


def test_padded_pixels_are_not_read(device):
    inputs = make_fused_inputs(SHAPES, **SIZES, padding=True, device=device)
    expected = compute(inputs)
    inputs.value[inputs.padding_mask] = math.nan
    assert_same_bits(compute(inputs), expected)


BAD_NUMBERS = [math.nan, math.inf, -math.inf, 1e30, -1e30, 3.0, -2.0]


@every_dtype
@pytest.mark.parametrize("axes", [[0], [1], [0, 1]], ids=["x", "y", "both"])
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
def test_samples_outside_or_not_finite_contribute_exactly_zero(device, bad, axes, dtype):
    inputs = make_inputs(SHAPES, **SIZES, dtype=dtype, device=device)
    without = inputs.attention_weights.clone()
    without[:, ::2, :, :, 1] = 0
    expected = compute(replace(inputs, attention_weights=without))
    inputs.sampling_locations[:, ::2, :, :, 1, axes] = bad
    assert_same_bits(compute(inputs), expected)


@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("bad", BAD_NUMBERS, ids=str)
@pytest.mark.parametrize("name", ["sampling_offsets", "reference_points"])
def test_fused_samples_outside_or_not_finite_contribute_exactly_zero(
    device, name, bad, reference_size
):
    inputs = make_fused_inputs(SHAPES, **SIZES, reference_size=reference_size, device=device)
    bad = bad * 100 if name == "sampling_offsets" else bad
    if name == "sampling_offsets":
        inputs.sampling_offsets[:, ::2, :, :, 1, 0] = bad
    else:
        inputs.reference_points[:, ::2, 1, 1] = bad
    output = compute(inputs)
    assert output.isfinite().all()
    assert_close(output, compute_exactly(inputs))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_nearest_samples_that_are_not_finite_contribute_exactly_zero(device, bad):
    inputs = off_edges(make_inputs(SHAPES, **SIZES, device=device))
    inputs.sampling_locations[:, ::2, :, :, 1, 0] = bad
    without = inputs.attention_weights.clone()
    without[:, ::2, :, :, 1] = 0
    expected = compute(replace(inputs, attention_weights=without), interpolation="nearest")
    assert_same_bits(compute(inputs, interpolation="nearest"), expected)


def test_nearest_samples_far_outside_read_the_edge(device):
    inputs = off_edges(make_inputs(SHAPES, **SIZES, device=device))
    inputs.sampling_locations[:, ::2, :, :, 1, 0] = 1e30
    inputs.sampling_locations[:, 1::2, :, :, 1, 1] = -1e30
    assert_close(
        compute(inputs, interpolation="nearest"), compute_exactly(inputs, interpolation="nearest")
    )


@every_dtype
def test_samples_exactly_on_borders_and_pixel_centres_match_reference(device, dtype):
    grid = torch.cartesian_prod(torch.arange(-8.0, 41) / 32, torch.arange(-8.0, 41) / 32)
    inputs = make_inputs(
        [(4, 8), (1, 1), (2, 16)],
        num_queries=len(grid),
        num_heads=2,
        head_dim=9,
        num_points=1,
        dtype=dtype,
        device=device,
    )
    inputs.sampling_locations.copy_(grid[None, :, None, None, None])
    assert_close(compute(inputs), compute_exactly(inputs))


# ---- forms of the same input ---------------------------------------------------------------------


def test_num_points_all_the_same_gives_the_bits_of_the_even_form(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    flat = replace(
        inputs,
        sampling_locations=inputs.sampling_locations.flatten(3, 4),
        attention_weights=inputs.attention_weights.flatten(3),
        num_points=[3, 3, 3],
    )
    assert_same_bits(compute(flat), compute(inputs))
