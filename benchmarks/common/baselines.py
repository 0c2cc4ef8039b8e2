"""Ours, and what users run today, to be measured against it."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch

import msda
from msda.testing import AnyInputs, FusedInputs, Inputs, map_tensors


def ours(inputs: Inputs) -> Tensor:
    """The operator. (B, Q, M * D)."""
    value, locations, weights = inputs.tensors()
    return msda.ms_deform_attn(
        value, inputs.spatial_shapes, None, locations, weights, num_points=inputs.num_points
    )


def ours_fused(inputs: FusedInputs) -> Tensor:
    """The fused operator. (B, Q, M * D)."""
    value, *others = inputs.tensors()
    return msda.ms_deform_attn_fused(
        value, inputs.spatial_shapes, None, *others, num_points=inputs.num_points
    )


def grid_sample_core(inputs: Inputs) -> Tensor:
    """The operator by one ``grid_sample`` per level: the fallback of every detection library.

    Unlike ``msda.reference`` it guards against nothing (NaN, far-away locations) and computes
    everything in the dtype of its inputs; :func:`in_float32` for 16 bits on a CPU. (B, Q, M * D).
    """
    value, weights = inputs.value, inputs.attention_weights
    batch, _, num_heads, head_dim = value.shape
    num_queries = weights.shape[1]
    grids = 2 * inputs.sampling_locations.to(value.dtype) - 1
    counts = inputs.num_points
    by_level = grids.split(counts, 3) if counts else grids.unbind(3)  # L of (B, Q, M, P, 2)
    maps = value.split([height * width for height, width in inputs.spatial_shapes], dim=1)
    samples = []
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(-1, head_dim, height, width)
        grid = by_level[level].transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples.append(F.grid_sample(image, grid, align_corners=False))
    weight = weights.to(value.dtype).transpose(1, 2).reshape(batch * num_heads, 1, num_queries, -1)
    output = (torch.cat(samples, -1) * weight).sum(-1)  # (B * M, D, Q)
    return output.view(batch, num_heads * head_dim, num_queries).transpose(1, 2).contiguous()


def in_float32(core: Callable[[AnyInputs], Tensor]) -> Callable[[AnyInputs], Tensor]:
    """A function of 16-bit inputs that computes in float32.

    On a CPU, PyTorch's own 16-bit grid_sample reads outside its input (2.13: other numbers from
    call to call, NaN, a crash), so that this is what its users are left with.
    """

    def run(inputs: AnyInputs) -> Tensor:
        return core(map_tensors(inputs, lambda tensor: tensor.float())).to(inputs.value.dtype)

    return run


class GridSampleCore(nn.Module):
    """The baseline as a module of tensors alone: what compilers and exporters take."""

    def __init__(self, spatial_shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.spatial_shapes = spatial_shapes

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """(B, Q, M * D)."""
        return grid_sample_core(Inputs(value, self.spatial_shapes, locations, weights))


def compiled(function: Callable[..., Tensor], threads: int) -> Callable[..., Tensor]:
    """A function under torch.compile, for fixed sizes and so many threads."""
    # The number of threads becomes a part of the code, and this option one of its key in the cache.
    options = {"cpp.threads": threads}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def compiled_core(
    spatial_shapes: list[tuple[int, int]], threads: int
) -> Callable[[Inputs], Tensor]:
    """The core under torch.compile, for fixed sizes and so many threads."""
    # Backward is timed again and again on one graph, whose tensors it must therefore not overwrite.
    functorch.donated_buffer = False
    torch.compiler.reset()  # else each size and number of threads counts as a recompilation
    core = compiled(GridSampleCore(spatial_shapes), threads)
    return lambda inputs: core(*inputs.tensors())


@functools.cache
def sizes_tensor(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(width, height) of each level: (L, 2) float32. Made once: the copy to a GPU takes time."""
    return torch.tensor([(width, height) for height, width in shapes], device=device).float()


def prologue(inputs: FusedInputs) -> Inputs:
    """What modules do before an operator that is not fused: locations and softmax, by PyTorch."""
    offsets, logits = inputs.sampling_offsets, inputs.attention_logits
    assert inputs.num_points is None, "the prologue takes levels with equal numbers of points"
    reference = inputs.reference_points[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    if reference.shape[-1] == 2:
        sizes = sizes_tensor(tuple(inputs.spatial_shapes), offsets.device)
        locations = reference + offsets / sizes[:, None]
    else:
        num_points = offsets.shape[4]
        locations = reference[..., :2] + offsets / num_points * reference[..., 2:] * 0.5
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    return Inputs(inputs.value, inputs.spatial_shapes, locations, weights)


def after_prologue(core: Callable[[Inputs], Tensor]) -> Callable[[FusedInputs], Tensor]:
    """The fused function by an operator that is not."""
    return lambda inputs: core(prologue(inputs))
