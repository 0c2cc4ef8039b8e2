"""NaN, Inf and numbers far away reach what they reach in the reference, and nothing else.

The rule is at the head of msda/reference.py. What the operator does with bad locations, and with
bad pixels that lie where nobody reads, is in test_forward.py and test_backward.py too, by itself.
"""

import functools
import math
from dataclasses import replace

import pytest
import torch

from msda.testing import (
    OPERATOR,
    REFERENCE,
    TOLERANCES,
    FusedInputs,
    Inputs,
    call,
    gradient_names,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    random_like_output,
    relative_error,
)
from tests.helpers.cases import every_dtype
from tests.helpers.inputs import off_edges
from tests.helpers.results import assert_same_bits, compute, compute_gradients, gradient_tolerance

SHAPES = [(4, 5), (3, 2)]
SIZES = dict(batch=2, num_heads=2, head_dim=6)
BAD_NUMBERS = [math.nan, math.inf, -math.inf]


def _form(make, num_queries, options=None, **sizes):
    return functools.partial(make, SHAPES, **SIZES, **sizes, num_queries=num_queries), options or {}


# So many queries that the CPU's kernels copy the pixels of a head, and so few that they do not.
DENSE, SPARSE = 27, 5
FORMS = {
    "plain": _form(make_inputs, SPARSE, num_points=2),
    "ragged": _form(make_inputs, DENSE, num_points=[3, 1]),
    "nearest": _form(make_inputs, SPARSE, {"interpolation": "nearest"}, num_points=2),
    "points": _form(make_fused_inputs, SPARSE, num_points=2),
    "boxes": _form(make_fused_inputs, DENSE, num_points=[1, 3], reference_size=4),
    "points_padding": _form(make_fused_inputs, DENSE, num_points=[3, 1], padding=True),
    "boxes_padding": _form(
        make_fused_inputs,
        SPARSE,
        num_points=2,
        reference_size=4,
        shared_reference=True,
        padding=True,
    ),
}
every_form = pytest.mark.parametrize(("make", "options"), FORMS.values(), ids=FORMS.keys())


def make_every_kind_of_query(make, options, dtype, device):
    """Five kinds of queries in turn; with padding, image 1 is nothing but padding."""
    inputs = make(dtype=dtype)
    is_fused = isinstance(inputs, FusedInputs)
    points, weights = (tensor.flatten(3) for tensor in inputs.tensors()[-2:])
    # No sample counts.
    points[:, 0::5] = math.nan if "interpolation" in options else 60
    # Some do not.
    points[:, 1::5, :, ::3] = math.nan
    # Some weigh nothing.
    weights[:, 2::5, :, 1:] = -math.inf if is_fused else 0
    # Near a corner of the map: some corners lie outside.
    near = inputs.reference_points[:, 3::5, :, :2] if is_fused else points[:, 3::5]
    near.fill_(0.01)
    if is_fused and inputs.padding_mask is not None:
        inputs.padding_mask[1] = True
    return off_edges(map_tensors(inputs, lambda tensor: tensor.to(device)))


def places(tensor):
    """An element for each kind of query, or of five pixels, of image 0 and 1."""
    num_rows = tensor.shape[1]
    for image in (0, 1):
        for row in range(image, num_rows, 1 if num_rows <= 5 else num_rows // 5 + 1):
            rest = tensor.stride(1)
            yield image * tensor.stride(0) + row * rest + (5 * row + image) % rest


def compute_all(functions, inputs, grad_output, options):
    results = compute_gradients(functions, inputs, grad_output, gradient_names(inputs), **options)
    results["output"] = call(functions, inputs, **options)
    return results


def assert_same_special_numbers(inputs, actual, expected, bad):
    for name, tensor in actual.items():
        exact = torch.zeros_like(tensor) if expected[name] is None else expected[name]
        tensor, exact = tensor.cpu(), exact.cpu()
        finite = exact.isfinite()
        assert torch.equal(tensor.isfinite(), finite), name
        if math.isnan(bad):  # of Inf, the order of the sums may make NaN or Inf
            assert torch.equal(tensor.isnan(), exact.isnan()), name
        limit = TOLERANCES[tensor.dtype]
        if name == "attention_logits":  # the small difference of large numbers that may cancel
            limit = gradient_tolerance(inputs, name)
        else:
            assert torch.equal(tensor[finite] == 0, exact[finite] == 0), name
        # So few numbers that one rounding may count for more than it does in the mean.
        assert relative_error(tensor[finite], exact[finite]) <= 8 * limit, name


@every_dtype
@every_form
def test_one_bad_number_reaches_what_it_reaches_in_the_reference(
    device, make, options, dtype, set_threads
):
    base = make_every_kind_of_query(make, options, dtype, device)
    base_grad_output = random_like_output(base)
    for name in [*gradient_names(base), "grad_output"]:
        tensor = base_grad_output if name == "grad_output" else getattr(base, name)
        for n, place in enumerate(places(tensor)):
            bad = BAD_NUMBERS[n % 3]
            set_threads(8 if n % 2 else 1)  # more than heads: the CPU's backward makes two passes
            changed = tensor.clone()
            changed.view(-1)[place] = bad
            is_input = name != "grad_output"
            inputs = replace(base, **{name: changed}) if is_input else base
            grad_output = base_grad_output if is_input else changed
            actual = compute_all(OPERATOR, inputs, grad_output, options)
            expected = compute_all(REFERENCE, inputs, grad_output, options)
            assert_same_special_numbers(inputs, actual, expected, bad)


@every_form
def test_results_too_large_for_float16_are_infinite_as_in_the_reference(device, make, options):
    inputs = off_edges(make(dtype=torch.float16, num_queries=DENSE, device=device))
    largest = torch.finfo(torch.float16).max
    inputs.value.clamp_(-3, 3).mul_(largest / 3)
    if isinstance(inputs, Inputs):
        inputs.attention_weights.mul_(20)
    grad_output = torch.full_like(random_like_output(inputs), largest)
    actual = compute_all(OPERATOR, inputs, grad_output, options)
    expected = compute_all(REFERENCE, inputs, grad_output, options)
    assert not expected["value"].isfinite().all()
    if isinstance(inputs, Inputs):
        assert not expected["output"].isfinite().all()
    assert_same_special_numbers(inputs, actual, expected, math.inf)


# ---- numbers far away ----------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
def test_offsets_that_cancel_the_distance_of_a_reference_point_do_not_extrapolate(
    device, reference_size, dtype
):
    # From 2^24 pixels on float32 lies two pixels and more apart.
    random = torch.Generator().manual_seed(0)
    shapes, queries = [(7, 9), (3, 4)], 400
    size = torch.tensor([[9.0, 7.0], [4.0, 3.0]])
    inputs = make_fused_inputs(
        shapes,
        batch=1,
        num_queries=queries,
        num_heads=2,
        head_dim=3,
        num_points=4,
        dtype=dtype,
        reference_size=reference_size,
    )
    distance = 2.0 ** torch.randint(20, 31, (1, queries, 1, 1), generator=random)
    distance = distance * (1 - 2 * torch.randint(0, 2, (1, queries, 2, 2), generator=random))
    distance = distance + 9 * torch.rand(distance.shape, generator=random)
    inputs.reference_points[..., :2] = distance / size
    step = torch.ones(1, queries, 2, 2)
    if reference_size == 4:
        step = 2.0 ** torch.randint(-3, 4, step.shape, generator=random)
        inputs.reference_points[..., 2:] = 8 * step / size
    origin = (inputs.reference_points[..., :2].double() * size - 0.5)[:, :, None, :, None]
    target = torch.rand(inputs.sampling_offsets.shape, generator=random) * (size[:, None] + 2) - 1
    inputs.sampling_offsets.copy_((target - origin) / step[:, :, None, :, None].double())
    inputs = map_tensors(inputs, lambda tensor: tensor.to(device))
    inputs.value.fill_(1)

    results = compute_all(OPERATOR, inputs, random_like_output(inputs), {})
    assert results["output"].gt(0).float().mean() > 0.1
    assert results["output"].ge(0).all()
    assert results["output"].le(1 + 4 * torch.finfo(dtype).eps).all()
    for name, tensor in results.items():
        assert tensor.isfinite().all(), name


def test_maps_too_wide_for_a_float32_of_half_pixels_do_not_extrapolate(device):
    width = 2**24
    inputs = make_inputs(
        [(1, width)], num_queries=500, num_heads=1, head_dim=1, dtype=torch.float16, device=device
    )
    inputs.value.fill_(1)
    output = compute(inputs)
    assert output.ge(0).all()
    assert output.le(1).all()
    assert output.gt(0).any()


# ---- truth ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("byte", [2, 128, 255])
def test_padding_masks_are_true_where_a_byte_is_not_zero(device, byte):
    make = FORMS["points_padding"][0]
    inputs = off_edges(make(device=device))
    grad_output = random_like_output(inputs)
    expected = compute_all(OPERATOR, inputs, grad_output, {})
    bytes_of_mask = inputs.padding_mask.to(torch.uint8) * byte
    inputs = replace(inputs, padding_mask=bytes_of_mask.view(torch.bool))
    assert inputs.padding_mask.view(torch.uint8).max() == byte
    for name, tensor in compute_all(OPERATOR, inputs, grad_output, {}).items():
        if device == "cpu" or name != "value":  # summed in no fixed order on CUDA
            assert_same_bits(tensor, expected[name])
