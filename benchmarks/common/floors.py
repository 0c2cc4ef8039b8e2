"""The least time that a call can take: what no kernel can be faster than.

On a GPU. DRAM floor: every row of ``value`` that is sampled, and every other input, is read once;
every output is written once. L1 floor of a forward call: each corner of each sample that lies
inside its map is D numbers out of the L1 cache, at 128 bytes per cycle and multiprocessor. The
backward pass has no L1 floor: how often it must read a row depends on its algorithm.

On a CPU. Copy floor: the same bytes at the rate at which all threads together copy memory. Load
floor: the loads and stores that the kernels' inner loop cannot do without, in vectors of 64 bytes,
at the rate at which a core loads from its first-level cache.
"""

from __future__ import annotations

import functools
import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

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
    counts, points = inputs.num_points, inputs.sampling_locations
    by_level = points.split(counts, 3) if counts else points.unbind(3)  # L of (B, Q, M, P, 2)
    touched = torch.zeros(batch, num_keys, num_heads, dtype=torch.bool, device=device)
    image = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    head = torch.arange(num_heads, device=device).view(1, 1, -1, 1)
    corners, start = 0, 0
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        location = by_level[level].double()
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


# ---- on a CPU ------------------------------------------------------------------------------------

VECTOR_BYTES = 64
COPIED_BYTES = 2**28  # far more than caches hold


@functools.cache
def load_rate() -> float | None:
    """64-byte loads per second of one core; None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "load_rate")
        source = Path(__file__).resolve().parent / "load_rate.cpp"
        command = [compiler, "-O3", "-march=native", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


@functools.cache
def copy_rate(threads: int) -> float:
    """Bytes read plus bytes written per second where so many threads copy memory: the best of 9."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    source = torch.ones(COPIED_BYTES // 4)
    target = torch.zeros_like(source)
    times = []
    for _ in range(9):
        start = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return 2 * COPIED_BYTES / min(times)


def slots_per_sample(inputs: Inputs | FusedInputs, *, backward: bool) -> int:
    """64-byte loads and stores of one sample.

    For each of its four corners: the pixel, and a slot each for its weight and its offset. Backward
    also reads and writes the pixel of the gradient, which is summed in float32 at least.
    """
    head_dim, size = inputs.value.shape[3], inputs.value.element_size()
    pixel = -(-head_dim * size // VECTOR_BYTES)
    gradient = -(-head_dim * max(size, 4) // VECTOR_BYTES)
    return 4 * (pixel + 2 + (2 * gradient if backward else 0))


def cpu_floors(
    inputs: Inputs | FusedInputs, reads: Reads, threads: int, *, backward: bool
) -> dict[str, float]:
    """Bytes, and milliseconds of each floor and of the higher one."""
    moved = (backward_bytes if backward else forward_bytes)(inputs, reads)
    copy_ms = moved / copy_rate(threads) * 1e3
    floors = {"bytes": moved, "copy_ms": copy_ms, "floor_ms": copy_ms}
    rate = load_rate()
    if rate:
        samples = inputs.tensors()[-1].numel()
        slots = slots_per_sample(inputs, backward=backward)
        floors["load_ms"] = samples * slots / (rate * threads) * 1e3
        floors["floor_ms"] = max(copy_ms, floors["load_ms"])
    return floors
