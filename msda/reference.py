"""The definition of multi-scale deformable attention, in plain PyTorch.

Every kernel of this package agrees with these two functions; they are also what runs where the
compiled library is missing. With pixel coordinates x = loc_x * W - 1/2 and y = loc_y * H - 1/2
(cell centres), corners nw, ne, sw, se around (x, y), fractions fx, fy measured from nw, and
corners outside the map equal to zero:

    sample = (1-fy) * [(1-fx) * nw + fx * ne] + fy * [(1-fx) * sw + fx * se]
    output = sum over levels and points of attention_weight * sample

A sample counts if -1 < x < W and -1 < y < H; NaN and infinite locations never do. What is not read
contributes exactly zero to the output and to every gradient, whatever NaN or Inf it meets there: a
sample that does not count, a corner outside the map, a padded pixel. What is read and is not finite
makes what it reaches not finite: NaN, or Inf of either sign, as the order of the sums has it.
Coordinates, softmax and sums are float32, or float64 where ``value`` is float64; results have the
dtype of ``value``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SpatialShapes = Sequence[Sequence[int]] | Tensor


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of coordinates and sums: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


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
    sample = _sample_bilinear if interpolation == "bilinear" else _sample_nearest
    return _attend(value, shapes, points, sampling_locations, attention_weights, None, sample)


def _attend(
    value: Tensor,
    shapes: list[tuple[int, int]],
    points: list[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    padding_mask: Tensor | None,
    sample: Callable[..., tuple[Tensor, Tensor]],
) -> Tensor:
    if padding_mask is not None:
        value = value.masked_fill(padding_mask[..., None, None], 0)
    acc_dtype = sum_dtype(value.dtype)
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
        padding = None if padding_mask is None else padding_mask[:, keys]  # (B, H * W)
        sampled, counts = sample(level, height, width, location, padding)  # (B, M, D, Q, P)
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
        sum_dtype(value.dtype),
    )
    return _attend(value, shapes, points, locations, weights, padding_mask, _sample_bilinear)


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
    locations = reference[..., :2] + offsets * unit
    # Such a sample does not count, and 0 times what made it so is not to become its gradient.
    finite = locations.isfinite()
    offsets, unit = torch.where(finite, offsets, 0), torch.where(finite, unit, 0)
    return torch.where(finite, reference[..., :2] + offsets * unit, locations.detach()), weights


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
    level: Tensor, height: int, width: int, location: Tensor, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sample a level (B, M, D, H * W), 0 where ``padding`` (B, H * W), at (B, M, Q, P, 2).

    Returns:
        The samples (B, M, D, Q, P), and which of them count (B, M, Q, P) and read a pixel.
    """
    x = location[..., 0] * width - 0.5
    y = location[..., 1] * height - 0.5
    counts = (x > -1) & (x < width) & (y > -1) & (y < height)
    if padding is not None:
        counts = counts & _reads_a_corner(x, y, height, width, counts, padding)
    location = torch.where(counts.unsqueeze(-1), location, -1)  # wholly outside, and finite
    sampled = F.grid_sample(
        level.flatten(0, 1).unflatten(-1, (height, width)),
        2 * location.flatten(0, 1) - 1,
        mode="bilinear",
        padding_mode="zeros",
        align_corners=False,
    )
    return sampled.unflatten(0, level.shape[:2]), counts


def _reads_a_corner(
    x: Tensor, y: Tensor, height: int, width: int, counts: Tensor, padding: Tensor
) -> Tensor:
    """Which samples (B, M, Q, P) have a corner that lies in the map and not on padding."""
    west = torch.where(counts, x, 0).floor().long()
    north = torch.where(counts, y, 0).floor().long()
    reads = torch.zeros_like(counts)
    for column, row in ((west, north), (west + 1, north), (west, north + 1), (west + 1, north + 1)):
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        key = torch.where(inside, row * width + column, 0)
        is_padding = padding.gather(1, key.flatten(1)).view(key.shape)
        reads = reads | (inside & ~is_padding)
    return reads


def _sample_nearest(
    level: Tensor, height: int, width: int, location: Tensor, _: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Like :func:`_sample_bilinear`, by RT-DETRv2's 'discrete' rule: one pixel, clamped."""
    pixel = location.detach() * location.new_tensor([width, height]) + 0.5
    counts = pixel.isfinite().all(-1)
    pixel = torch.where(counts.unsqueeze(-1), pixel, 0)
    x = pixel[..., 0].clamp(0, width - 1).long()
    y = pixel[..., 1].clamp(0, height - 1).long()
    index = (y * width + x).flatten(2).unsqueeze(2)  # (B, M, 1, Q * P)
    sampled = level.gather(3, index.expand(-1, -1, level.shape[2], -1))
    sampled = sampled.unflatten(3, location.shape[2:4])
    return torch.where(counts.unsqueeze(2), sampled, 0), counts
