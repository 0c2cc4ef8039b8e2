"""What users run on a CPU today, to be measured against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from msda.testing import Inputs


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
