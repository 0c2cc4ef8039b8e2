"""What users run where they have no compiled operator: the grid_sample core, in several forms."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch

from msda.testing import AnyInputs, FusedInputs, Inputs, grid_sample_core, map_tensors


def in_float32(core: Callable[[AnyInputs], Tensor]) -> Callable[[AnyInputs], Tensor]:
    """A function of 16-bit inputs that computes in float32.

    On a CPU, PyTorch's own 16-bit grid_sample reads outside its input (2.13: other numbers from
    call to call, NaN, a crash), so that this is what its users are left with.
    """

    def run(inputs: AnyInputs) -> Tensor:
        return core(map_tensors(inputs, lambda tensor: tensor.float())).to(inputs.value.dtype)

    return run


class GridSampleCore(nn.Module):
    """The core as a module of tensors alone: what compilers and exporters take."""

    def __init__(self, spatial_shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.spatial_shapes = spatial_shapes

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """(B, Q, M * D)."""
        return grid_sample_core(Inputs(value, self.spatial_shapes, locations, weights))


def compiled_core(
    spatial_shapes: list[tuple[int, int]], threads: int
) -> Callable[[Inputs], Tensor]:
    """The core under torch.compile, for fixed sizes and so many threads."""
    # Backward is timed again and again on one graph, whose tensors it must therefore not overwrite.
    functorch.donated_buffer = False
    torch.compiler.reset()  # else each size and number of threads counts as a recompilation
    # The number of threads becomes a part of the code, and this option one of its key in the cache.
    options = {"cpp.threads": threads}
    core = torch.compile(
        GridSampleCore(spatial_shapes), fullgraph=True, dynamic=False, options=options
    )
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
