"""Results keep their bits, whatever the layout of memory and the number of threads."""

import math
from dataclasses import replace

import pytest
import torch

import msda
from msda.testing import (
    gradient_names,
    leaves,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    random_like_output,
)
from tests.helpers.cases import SHAPES, SIZES, every_dtype, every_form
from tests.helpers.inputs import off_by_one_byte
from tests.helpers.results import all_gradients, assert_same_bits, compute
from tests.operator.operator_calls import call_backward

pytestmark = pytest.mark.not_on_executor("arrays are copied there, and threads are no matter")

# ---- the output ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        lambda shapes: [list(shape) for shape in shapes],
        lambda shapes: tuple(shapes),
        lambda shapes: [torch.Size(shape) for shape in shapes],
        lambda shapes: torch.tensor(shapes),
        lambda shapes: torch.tensor(shapes, dtype=torch.int32),
        lambda shapes: torch.tensor(shapes).t().contiguous().t(),
    ],
    ids=["lists", "tuples", "sizes", "int64", "int32", "transposed"],
)
@every_form
def test_every_form_of_spatial_shapes_gives_the_same_bits(make, form):
    inputs = make(SHAPES, **SIZES)
    expected = compute(inputs)
    assert_same_bits(compute(replace(inputs, spatial_shapes=form(SHAPES))), expected)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_level_start_index_changes_nothing(device, dtype):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    start_index = torch.tensor([0, 54, 69], dtype=dtype, device=device)
    value, *points = inputs.tensors()
    output = msda.ms_deform_attn(value, SHAPES, start_index, *points)
    assert_same_bits(output, compute(inputs))


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def offset_by_one_element(tensor):
    buffer = tensor.new_empty(tensor.numel() + 1)
    buffer[1:] = tensor.flatten()
    return buffer[1:].view(tensor.shape)


def slice_of_a_larger_one(tensor):
    larger = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), math.nan)
    larger[..., 2:-1] = tensor
    return larger[..., 2:-1]


def every_other_one(tensor):
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


@every_dtype
@every_form
@pytest.mark.parametrize(
    "layout",
    [
        transposed,
        offset_by_one_element,
        slice_of_a_larger_one,
        every_other_one,
        off_by_one_byte,
    ],
)
def test_memory_layout_changes_nothing(device, make, layout, dtype):
    inputs = make(SHAPES, **SIZES, dtype=dtype, device=device)
    changed = map_tensors(inputs, layout)
    if getattr(inputs, "padding_mask", None) is not None:
        changed = replace(changed, padding_mask=transposed(inputs.padding_mask))
    assert_same_bits(compute(changed), compute(inputs))


@every_form
def test_expanded_inputs_match_their_copies(device, make):
    inputs = make(SHAPES, **SIZES | {"batch": 1}, device=device)
    expanded = map_tensors(inputs, lambda tensor: tensor.expand(3, *tensor.shape[1:]))
    if getattr(inputs, "padding_mask", None) is not None:
        expanded = replace(expanded, padding_mask=inputs.padding_mask.expand(3, -1))
    assert_same_bits(compute(expanded), compute(inputs).expand(3, -1, -1))


def test_inputs_are_left_as_they_were(device):
    inputs = make_fused_inputs(SHAPES, **SIZES, padding=True, device=device)
    before = map_tensors(inputs, torch.clone)
    compute(inputs)
    for tensor, copy in zip(inputs.tensors(), before.tensors(), strict=True):
        assert_same_bits(tensor, copy)


# ---- the gradients -------------------------------------------------------------------------------


@every_dtype
@every_form
def test_grad_output_need_not_be_contiguous(device, make, dtype):
    inputs = make(SHAPES, **SIZES, dtype=dtype, device=device)
    grad_output = random_like_output(inputs)
    transposed = grad_output.transpose(0, 2).contiguous().transpose(0, 2)
    assert not transposed.is_contiguous()
    expected = all_gradients(inputs, grad_output)
    for name, gradient in all_gradients(inputs, transposed).items():
        assert_same_bits(gradient, expected[name])


@every_dtype
@every_form
def test_no_tensor_need_be_aligned_to_its_elements(device, make, dtype):
    inputs = make(SHAPES, **SIZES, dtype=dtype, device=device)
    grad_output = random_like_output(inputs)
    names = gradient_names(inputs)
    expected = call_backward(inputs, grad_output, names)
    shifted = map_tensors(inputs, off_by_one_byte)
    actual = call_backward(shifted, off_by_one_byte(grad_output), names)
    for name in names:
        assert_same_bits(actual[name], expected[name])


@every_form
def test_grad_output_may_be_expanded(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    expanded = torch.full((), 0.75, device=device).expand_as(random_like_output(inputs))
    expected = all_gradients(inputs, expanded.contiguous())
    for name, gradient in all_gradients(inputs, expanded).items():
        assert_same_bits(gradient, expected[name])


@every_form
def test_inputs_need_not_be_contiguous(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    grad_output = random_like_output(inputs)
    expected = all_gradients(inputs, grad_output)
    names = gradient_names(inputs)
    strided = [
        getattr(inputs, name).transpose(0, -1).contiguous().transpose(0, -1).requires_grad_()
        for name in names
    ]
    compute(replace(inputs, **dict(zip(names, strided, strict=True)))).backward(grad_output)
    for name, tensor in zip(names, strided, strict=True):
        assert_same_bits(tensor.grad, expected[name])


@every_form
def test_gradients_of_expanded_inputs_are_summed(device, make):
    inputs = make(SHAPES, **SIZES | {"batch": 1}, device=device)
    grad_output = random_like_output(inputs)
    expected = all_gradients(inputs, grad_output)
    given = leaves(inputs)
    expanded = map_tensors(given, lambda tensor: tensor.expand(4, *tensor.shape[1:]))
    if getattr(inputs, "padding_mask", None) is not None:
        expanded = replace(expanded, padding_mask=inputs.padding_mask.expand(4, -1))
    compute(expanded).backward(grad_output.expand(4, -1, -1))
    for name in gradient_names(inputs):
        torch.testing.assert_close(getattr(given, name).grad, 4 * expected[name])


# ---- the number of threads -----------------------------------------------------------------------


@every_dtype
@every_form
def test_output_has_the_same_bits_for_any_number_of_threads(make, dtype, set_threads):
    # 2^20 samples times channels: enough work for eight threads.
    inputs = make(
        [(16, 16), (8, 8), (4, 4), (2, 2)],
        batch=2,
        num_queries=1021,
        num_heads=4,
        head_dim=16,
        num_points=2,
        dtype=dtype,
    )
    set_threads(1)
    expected = compute(inputs)
    for threads in (2, 3, 8):
        set_threads(threads)
        assert_same_bits(compute(inputs), expected)


@every_dtype
@every_form
@pytest.mark.parametrize(("batch", "heads"), [(1, 1), (1, 2), (2, 1), (2, 4)], ids=str)
def test_gradients_have_the_same_bits_for_any_number_of_threads(
    make, batch, heads, dtype, set_threads
):
    # 2^20 samples times channels: enough work for eight threads, which make two passes where there
    # are fewer heads than threads.
    inputs = make(
        [(16, 16), (8, 8), (4, 4), (2, 2)],
        batch=batch,
        num_queries=8200 // (batch * heads),
        num_heads=heads,
        head_dim=16,
        num_points=[1, 3, 2, 2],
        dtype=dtype,
    )
    grad_output = random_like_output(inputs)
    set_threads(1)
    expected = all_gradients(inputs, grad_output)
    for threads in (2, 3, 8):
        set_threads(threads)
        for name, gradient in all_gradients(inputs, grad_output).items():
            assert_same_bits(gradient, expected[name])
