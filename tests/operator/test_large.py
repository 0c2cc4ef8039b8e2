"""Tensors of more than 2^31 elements: no offset into any of them is computed in 32 bits.

Big tensors are allocated and mostly left alone: where nobody writes, they hardly cost memory.
"""

import math

import pytest
import torch

import msda
from msda.testing import Inputs, available_memory, random_like_output
from tests.helpers.results import (
    assert_close,
    assert_gradients_close,
    compute_exactly,
    exact_gradients,
)

pytestmark = pytest.mark.not_on_executor("test_kernels.py has large arrays of its own")

GIGABYTE = 1e9
HEADS, HEAD_DIM = 66, 32  # 2112 channels: 2^20 keys or queries of them are more than 2^31 numbers


def need(gigabytes, device):
    free = available_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]
    if free < gigabytes * GIGABYTE:
        pytest.skip(f"needs {gigabytes} GB of memory, {free / GIGABYTE:.0f} GB are free")


def exact_numbers(size, low, high):
    """Random quarters in [low, high), never whole ones: pixel coordinates off the cell edges."""
    return torch.randint(low, high, size) + torch.randint(1, 4, size) / 4


@pytest.mark.parametrize(
    ("dtype", "gigabytes"), [(torch.bfloat16, 9), (torch.float32, 13)], ids=["bfloat16", "float32"]
)
def test_value_of_more_than_2_to_the_31_elements(device, dtype, gigabytes):
    need(gigabytes, device)
    # The last 8 rows of the first level and the second level lie beyond 2^31 elements. They are a
    # small problem of their own.
    height, width, rows = 1024, 1024, 8
    small_shapes, shapes = [(rows, width), (8, 128)], [(height, width), (8, 128)]
    num_small, num_keys = (sum(h * w for h, w in pair) for pair in (small_shapes, shapes))
    first = num_keys - num_small
    assert first * HEADS * HEAD_DIM > 2**31

    size = (1, 64, HEADS, 2, 2)
    x, y = exact_numbers(size, 0, 127), exact_numbers(size, 0, rows - 1)
    x[:, :, :, 0] = exact_numbers((1, 64, HEADS, 2), 0, width - 1)
    widths = torch.tensor([width, 128]).unsqueeze(-1)
    small = Inputs(
        torch.randn(1, num_small, HEADS, HEAD_DIM).to(device, dtype),
        small_shapes,
        torch.stack([(x + 0.5) / widths, (y + 0.5) / rows], -1).to(device),
        torch.rand(size).to(device),
    )
    y[:, :, :, 0] += height - rows
    heights = torch.tensor([height, 8]).unsqueeze(-1)
    large = Inputs(
        torch.empty(1, num_keys, HEADS, HEAD_DIM, dtype=dtype, device=device),
        shapes,
        torch.stack([(x + 0.5) / widths, (y + 0.5) / heights], -1).to(device),
        small.attention_weights.clone(),
    )
    large.value[:, first:] = small.value

    for tensor in large.tensors():
        tensor.requires_grad_()
    grad_output = random_like_output(small)
    output = msda.ms_deform_attn(large.value, shapes, None, *large.tensors()[1:])
    assert_close(output, compute_exactly(small))

    output.backward(grad_output)
    gradients = {
        "value": large.value.grad[:, first:],
        "sampling_locations": large.sampling_locations.grad,
        "attention_weights": large.attention_weights.grad,
    }
    expected = exact_gradients(small, grad_output)
    # The same pixels per location, of a map so much higher.
    expected["sampling_locations"][:, :, :, 0, :, 1] *= height // rows
    assert_gradients_close(small, gradients, expected)
    assert large.value.grad[:, :first].count_nonzero() == 0


def test_locations_of_more_than_2_to_the_31_elements(device):
    need(9, device)
    num_queries, num_points, last = 2**20 + 16, 1024, 16
    size = (1, num_queries, 1, 1, num_points)
    assert math.prod(size) * 2 > 2**31
    half = dict(dtype=torch.float16, device=device)
    large = Inputs(
        torch.randn(1, 20, 1, 1, device=device),
        [(4, 5)],
        torch.empty(*size, 2, **half),
        torch.empty(size, **half),
    )
    small = Inputs(
        large.value,
        large.spatial_shapes,
        torch.rand(1, last, *size[2:], 2).to(**half),
        torch.rand(1, last, *size[2:]).to(**half) / num_points,
    )
    large.sampling_locations[:, -last:] = small.sampling_locations
    large.attention_weights[:, -last:] = small.attention_weights

    output = msda.ms_deform_attn(large.value, large.spatial_shapes, None, *large.tensors()[1:])
    assert_close(output[:, -last:], compute_exactly(small))


def test_output_of_more_than_2_to_the_31_elements(device):
    need(7, device)
    num_queries, last = 2**20 + 16, 16
    size = (1, num_queries, HEADS, 1, 1)
    assert math.prod(size) * HEAD_DIM > 2**31
    large = Inputs(
        torch.randn(1, 20, HEADS, HEAD_DIM).to(device, torch.bfloat16),
        [(4, 5)],
        torch.full((*size, 2), 0.5, device=device),
        torch.ones(size, device=device),
    )
    small = Inputs(
        large.value,
        large.spatial_shapes,
        (exact_numbers((1, last, HEADS, 1, 1, 2), 0, 3) / 4).to(device),
        torch.rand(1, last, HEADS, 1, 1).to(device),
    )
    large.sampling_locations[:, -last:] = small.sampling_locations
    large.attention_weights[:, -last:] = small.attention_weights

    output = msda.ms_deform_attn(large.value, large.spatial_shapes, None, *large.tensors()[1:])
    assert_close(output[:, -last:], compute_exactly(small))
