"""The definition of multi-scale deformable attention, in plain PyTorch.

Every kernel of this package agrees with these two functions; they are also what runs where the
compiled library is missing. With pixel coordinates x = loc_x * W - 1/2 and y = loc_y * H - 1/2
(cell centres), corners nw, ne, sw, se around (x, y), fractions fx, fy measured from nw, and
corners outside the map equal to zero:

    sample = (1-fy) * [(1-fx) * nw + fx * ne] + fy * [(1-fx) * sw + fx * se]
    output = sum over levels and points of attention_weight * sample

A sample counts if -1 < x < W and -1 < y < H; one that does not (NaN and infinite locations never
do) contributes exactly zero to the output and to every gradient. Coordinates, softmax and sums are
float32, or float64 where ``value`` is float64; results have the dtype of ``value``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Sequence[Sequence[int]] | Tensor


def ms_deform_attn_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
) -> Tensor:
    """Compute :func:`msda.ms_deform_attn` in plain PyTorch; same arguments, same result.

    ``level_start_index`` follows from ``spatial_shapes`` and is not read. Shapes given as a tensor
    on another device are read back to the host here, unlike in the compiled operator.
    """
    shapes = _as_pairs(spatial_shapes)
    points = _points_per_level(shapes, sampling_locations, num_points)
    acc_dtype = torch.promote_types(value.dtype, torch.float32)
    batch, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]

    # One axis K for the samples of all levels.
    locations = sampling_locations.to(acc_dtype).flatten(3, -2)  # (B, Q, M, K, 2)
    weights = attention_weights.to(acc_dtype).flatten(3)  # (B, Q, M, K)

    output = value.new_zeros(batch, num_heads, head_dim, num_queries, dtype=acc_dtype)
    start_key = start_sample = 0
    for (height, width), count in zip(shapes, points, strict=True):
        keys = slice(start_key, start_key + height * width)
        samples = slice(start_sample, start_sample + count)
        start_key, start_sample = keys.stop, samples.stop
        level = value[:, keys].to(acc_dtype).permute(0, 2, 3, 1)  # (B, M, D, H * W)
        location = locations[:, :, :, samples].transpose(1, 2)  # (B, M, Q, P, 2)
        weight = weights[:, :, :, samples].transpose(1, 2)  # (B, M, Q, P)
        sample = _sample_bilinear if interpolation == "bilinear" else _sample_nearest
        sampled, counts = sample(level, height, width, location)  # (B, M, D, Q, P)
        weight = torch.where(counts, weight, 0)
        output = output + (sampled * weight.unsqueeze(2)).sum(-1)
    return output.permute(0, 3, 1, 2).flatten(2).to(value.dtype)


def ms_deform_attn_fused_reference(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Compute :func:`msda.ms_deform_attn_fused` in plain PyTorch; same arguments, same result."""
    shapes = _as_pairs(spatial_shapes)
    points = _points_per_level(shapes, sampling_offsets, num_points)
    locations, weights = locations_and_weights(
        shapes,
        points,
        reference_points,
        sampling_offsets,
        attention_logits,
        torch.promote_types(value.dtype, torch.float32),
    )
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None, None], 0)
    return ms_deform_attn_reference(
        value, shapes, level_start_index, locations, weights, num_points=points
    )


def locations_and_weights(
    shapes: Sequence[tuple[int, int]],
    points: Sequence[int],
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    acc_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute where the fused operator samples and with what weights, in ``acc_dtype``.

    Args:
        shapes: (height, width) of each level.
        points: samples of each level; K is their sum.
        reference_points: as in :func:`msda.ms_deform_attn_fused`; so are the next two.
        sampling_offsets: (B, Q, M, L, P, 2) or (B, Q, M, K, 2).
        attention_logits: (B, Q, M, L, P) or (B, Q, M, K).
        acc_dtype: float32, or float64 for float64 values.

    Returns:
        Locations (B, Q, M, K, 2), and weights (B, Q, M, K) after the softmax over K.
    """
    offsets = sampling_offsets.to(acc_dtype).flatten(3, -2)  # (B, Q, M, K, 2)

    # Per sample: the reference of its level, and what one unit of its offset is worth.
    levels = [level for level, count in enumerate(points) for _ in range(count)]
    reference = reference_points.to(acc_dtype)
    if reference.shape[2] == 1:
        reference = reference.expand(-1, -1, len(shapes), -1)
    reference = reference[:, :, levels].unsqueeze(2)  # (B, Q, 1, K, 2 or 4)
    if reference.shape[-1] == 4:
        half_over_points = offsets.new_tensor([0.5 / points[level] for level in levels])
        unit = reference[..., 2:] * half_over_points[:, None]
    else:
        sizes = [[shapes[level][1], shapes[level][0]] for level in levels]
        unit = 1 / offsets.new_tensor(sizes).view(-1, 2)
    weights = attention_logits.to(acc_dtype).flatten(3).softmax(-1)
    return reference[..., :2] + offsets * unit, weights


def _as_pairs(spatial_shapes: SpatialShapes) -> list[tuple[int, int]]:
    if isinstance(spatial_shapes, Tensor):
        spatial_shapes = spatial_shapes.tolist()
    return [(height, width) for height, width in spatial_shapes]


def _points_per_level(
    shapes: Sequence[tuple[int, int]], points: Tensor, num_points: Sequence[int] | None
) -> list[int]:
    if num_points is not None:
        return list(num_points)
    return [points.shape[4]] * len(shapes)


def _sample_bilinear(
    level: Tensor, height: int, width: int, location: Tensor
) -> tuple[Tensor, Tensor]:
    """Sample a level (B, M, D, H * W) at (B, M, Q, P, 2).

    Returns:
        The samples (B, M, D, Q, P), and which of them count (B, M, Q, P).
    """
    x = location[..., 0] * width - 0.5
    y = location[..., 1] * height - 0.5
    counts = (x > -1) & (x < width) & (y > -1) & (y < height)
    location = torch.where(counts.unsqueeze(-1), location, -1)  # wholly outside, and finite
    sampled = F.grid_sample(
        level.flatten(0, 1).unflatten(-1, (height, width)),
        2 * location.flatten(0, 1) - 1,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled.unflatten(0, level.shape[:2]), counts


def _sample_nearest(
    level: Tensor, height: int, width: int, location: Tensor
) -> tuple[Tensor, Tensor]:
    """Like :func:`_sample_bilinear`, by RT-DETRv2's 'discrete' rule: one pixel, clamped."""
    pixel = location.detach() * location.new_tensor([width, height]) + 0.5
    counts = pixel.isfinite().all(-1)
    pixel = torch.where(counts.unsqueeze(-1), pixel, 0)
    x = pixel[..., 0].clamp(0, width - 1).long()
    y = pixel[..., 1].clamp(0, height - 1).long()
    index = (y * width + x).flatten(2).unsqueeze(2)  # (B, M, 1, Q * P)
    sampled = level.gather(3, index.expand(-1, -1, level.shape[2], -1))
    return sampled.unflatten(3, location.shape[2:4]), counts
