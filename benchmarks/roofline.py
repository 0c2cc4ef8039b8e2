"""The least time that a call can take on a GPU: what no kernel can be faster than.

DRAM floor: every row of ``value`` that is sampled, and every other input, is read once; every
output is written once. L1 floor of a forward call: each corner of each sample that lies inside its
map is D numbers out of the L1 cache, at 128 bytes per cycle and multiprocessor. The backward pass
has no L1 floor: how often it must read a row depends on its algorithm.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from msda.testing import FusedInputs, Inputs

L1_BYTES_PER_CYCLE = 128


@dataclass(frozen=True)
class Ceilings:
    """The rates of one GPU, and where each was taken from."""

    dram_bytes_per_second: float  # bytes read plus bytes written
    multiprocessors: int
    clock_hz: float
    dram_source: str = ""
    clock_source: str = ""

    @property
    def l1_bytes_per_second(self) -> float:
        """Of all multiprocessors together."""
        return self.multiprocessors * self.clock_hz * L1_BYTES_PER_CYCLE


@dataclass(frozen=True)
class Reads:
    """What a call reads of ``value``: rows are the D numbers of one pixel and head."""

    touched_rows: int  # different ones
    corners: int  # one per sample and corner inside its map


def count_reads(inputs: Inputs) -> Reads:
    """Count the rows that bilinear sampling reads, on the device of ``inputs``."""
    batch, num_keys, num_heads, _ = inputs.value.shape
    device = inputs.value.device
    touched = torch.zeros(batch, num_keys, num_heads, dtype=torch.bool, device=device)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.arange(num_heads, device=device).view(1, 1, -1, 1)
    corners, start = 0, 0
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        location = inputs.sampling_locations[:, :, :, level].double()  # (B, Q, M, P, 2)
        x = location[..., 0] * width - 0.5
        y = location[..., 1] * height - 0.5
        for dx in (0, 1):
            for dy in (0, 1):
                column, row = x.floor() + dx, y.floor() + dy
                inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
                inside &= (x > -1) & (x < width) & (y > -1) & (y < height)
                key = start + torch.where(inside, row * width + column, 0).long()
                index = ((image * num_keys + key) * num_heads + head)[inside]
                touched.view(-1)[index] = True
                corners += int(inside.sum())
        start += height * width
    return Reads(int(touched.sum()), corners)


def forward_bytes(inputs: Inputs | FusedInputs, reads: Reads) -> int:
    """The fewest bytes that a forward call moves through DRAM."""
    value, *others = inputs.tensors()
    batch, _, num_heads, head_dim = value.shape
    row = head_dim * value.element_size()
    output = batch * others[-1].shape[1] * num_heads * row
    return reads.touched_rows * row + sum(map(_bytes, others)) + output


def backward_bytes(inputs: Inputs | FusedInputs, reads: Reads) -> int:
    """The fewest bytes that a backward call moves through DRAM.

    It reads what forward reads and grad_output, and writes all of grad_value and the gradients of
    the last two inputs.
    """
    value, *others = inputs.tensors()
    return forward_bytes(inputs, reads) + _bytes(value) + sum(map(_bytes, others[-2:]))


def _bytes(tensor: torch.Tensor) -> int:
    return math.prod(tensor.shape) * tensor.element_size()


def floors(
    inputs: Inputs | FusedInputs, reads: Reads, ceilings: Ceilings, *, backward: bool
) -> dict[str, float]:
    """Bytes, and milliseconds of each floor and of the higher one."""
    moved = (backward_bytes if backward else forward_bytes)(inputs, reads)
    loaded = 0 if backward else reads.corners * inputs.value.shape[3] * inputs.value.element_size()
    dram_ms = moved / ceilings.dram_bytes_per_second * 1e3
    l1_ms = loaded / ceilings.l1_bytes_per_second * 1e3
    return {
        "dram_bytes": moved,
        "l1_bytes": loaded,
        "dram_ms": dram_ms,
        "l1_ms": l1_ms,
        "floor_ms": max(dram_ms, l1_ms),
    }
