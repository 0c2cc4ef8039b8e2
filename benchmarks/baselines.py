"""What users run today, to be measured against."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from msda.testing import FusedInputs, Inputs


def grid_sample_core(inputs: Inputs) -> Tensor:
    """The operator by one ``grid_sample`` per level: the fallback of every detection library.

    Unlike ``msda.reference`` it guards against nothing (NaN, far-away locations) and computes
    everything in the dtype of its inputs. (B, Q, M * D).
    """
    value, weights = inputs.value, inputs.attention_weights
    batch, _, num_heads, head_dim = value.shape
    num_queries = weights.shape[1]
    grids = 2 * inputs.sampling_locations.to(value.dtype) - 1  # (B, Q, M, L, P, 2)
    maps = value.split([height * width for height, width in inputs.spatial_shapes], dim=1)
    samples = []
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(-1, head_dim, height, width)
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples.append(F.grid_sample(image, grid, align_corners=False))
    weight = weights.to(value.dtype).transpose(1, 2).reshape(batch * num_heads, 1, num_queries, -1)
    output = (torch.cat(samples, -1) * weight).sum(-1)  # (B * M, D, Q)
    return output.view(batch, num_heads * head_dim, num_queries).transpose(1, 2).contiguous()


@functools.cache
def sizes_tensor(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """(width, height) of each level: (L, 2) float32. Made once: the copy to a GPU takes time."""
    return torch.tensor([(width, height) for height, width in shapes], device=device).float()


def prologue(inputs: FusedInputs) -> Inputs:
    """What modules do before an operator that is not fused: locations and softmax, by PyTorch."""
    offsets, logits = inputs.sampling_offsets, inputs.attention_logits
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
