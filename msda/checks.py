"""The checks of csrc/ops.cpp once more, for tensors without data and for the reference.

Each raises RuntimeError: ``<name> must <rule>, got <value>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
MAX_SIDE = 2**24  # from here on float32 does not hold every integer


def check_plain(
    value: Tensor,
    spatial_shapes: Sequence[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
) -> None:
    """Check the arguments of ``ms_deform_attn``; shapes as [H0, W0, H1, ...] or as a tensor."""
    num_levels = _check_pyramid(value, spatial_shapes, spatial_shapes_tensor, num_points)
    _check_start_index(spatial_shapes, level_start_index)
    named = {"sampling_locations": sampling_locations, "attention_weights": attention_weights}
    _check_samples(value, num_levels, num_points, named)


def check_fused(
    value: Tensor,
    spatial_shapes: Sequence[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int],
    padding_mask: Tensor | None,
) -> None:
    """Check the arguments of ``ms_deform_attn_fused``."""
    num_levels = _check_pyramid(value, spatial_shapes, spatial_shapes_tensor, num_points)
    _check_start_index(spatial_shapes, level_start_index)
    named = {"sampling_offsets": sampling_offsets, "attention_logits": attention_logits}
    _check_samples(value, num_levels, num_points, named)

    _check_like_value(reference_points, "reference_points", value)
    shape = tuple(reference_points.shape)
    batch, num_queries = value.shape[0], sampling_offsets.shape[1]
    _require(
        len(shape) == 4
        and shape[:2] == (batch, num_queries)
        and shape[2] in (num_levels, 1)
        and shape[3] in (2, 4),
        lambda: (
            "reference_points must have shape (B, Q, L or 1, 2 or 4) = "
            f"({batch}, {num_queries}, {num_levels} or 1, 2 or 4), got {shape}"
        ),
    )
    if padding_mask is not None:
        _check_device(padding_mask, "padding_mask", value)
        _check_shape(padding_mask, "padding_mask", "(B, S)", tuple(value.shape[:2]))
        _require(
            padding_mask.dtype == torch.bool,
            lambda: f"padding_mask must be bool (True = padding), got {padding_mask.dtype}",
        )


def _require(condition: bool, message: Callable[[], str]) -> None:
    """``torch._check``, also in what torch.compile traces: it refuses messages that vary."""
    if not torch.compiler.is_dynamo_compiling():
        torch._check(condition, message)
    elif not condition:
        raise RuntimeError(message())


def _check_pyramid(
    value: Tensor,
    shapes: Sequence[int],
    shapes_tensor: Tensor | None,
    num_points: Sequence[int],
) -> int:
    """Check value and the pyramid's metadata; returns the number of levels."""
    _require(
        value.dim() == 4, lambda: f"value must have shape (B, S, M, D), got {tuple(value.shape)}"
    )
    _check_float(value, "value")
    if shapes_tensor is not None:
        _require(
            shapes_tensor.dim() == 2 and shapes_tensor.shape[1] == 2,
            lambda: f"spatial_shapes must have shape (L, 2), got {tuple(shapes_tensor.shape)}",
        )
        _require(
            shapes_tensor.dtype in (torch.int64, torch.int32),
            lambda: f"spatial_shapes must be int64 or int32, got {shapes_tensor.dtype}",
        )
        _require(
            shapes_tensor.is_cpu or shapes_tensor.device == value.device,
            lambda: (
                "spatial_shapes must be on the CPU or on the device of value "
                f"({value.device}), got a tensor on {shapes_tensor.device}"
            ),
        )
        num_levels = shapes_tensor.shape[0]
    else:
        num_levels = len(shapes) // 2
    _require(num_levels > 0, lambda: "spatial_shapes must hold at least one level, got none")
    _require(
        not num_points or (len(num_points) == num_levels),
        lambda: f"num_points must hold one count per level ({num_levels}), got {tuple(num_points)}",
    )
    _require(
        all(count >= 0 for count in num_points),
        lambda: f"num_points must not be negative, got {tuple(num_points)}",
    )
    if shapes_tensor is None:
        _require(
            all(size > 0 for size in shapes),
            lambda: f"spatial_shapes must be positive, got {tuple(shapes)}",
        )
        # Not of symbolic sizes, which it would keep within this range: the kernel checks them.
        _require(
            value.dtype == torch.float64
            or all(size <= MAX_SIDE for size in shapes if isinstance(size, int)),
            lambda: (
                "spatial_shapes must be at most 2^24 on a side, where float32 coordinates end, "
                f"got {tuple(shapes)}"
            ),
        )
        pixels = sum(h * w for h, w in zip(shapes[::2], shapes[1::2], strict=True))
        _require(
            pixels == value.shape[1],
            lambda: (
                f"spatial_shapes must cover the S = {value.shape[1]} keys of value, "
                f"got {pixels} pixels: {tuple(shapes)}"
            ),
        )
    return num_levels


def _check_start_index(shapes: Sequence[int], level_start_index: Tensor | None) -> None:
    if level_start_index is not None:
        _require(
            not shapes or tuple(level_start_index.shape) == (len(shapes) // 2,),
            lambda: (
                f"level_start_index must have shape (L,) = ({len(shapes) // 2},), "
                f"got {tuple(level_start_index.shape)}"
            ),
        )


def _check_samples(
    value: Tensor, num_levels: int, num_points: Sequence[int], named: dict[str, Tensor]
) -> None:
    """Check the points (B, Q, M, L, P, 2) or (B, Q, M, K, 2) and the weights, by their names."""
    (points_name, points), (weights_name, weights) = named.items()
    for name, tensor in named.items():
        _check_like_value(tensor, name, value)
    letters = "B, Q, M, K" if num_points else "B, Q, M, L, P"
    num_dims = 5 if num_points else 6
    _require(
        points.dim() == num_dims,
        lambda: f"{points_name} must have shape ({letters}, 2), got {tuple(points.shape)}",
    )
    _require(
        not num_points or sum(num_points) == points.shape[3],
        lambda: (
            f"num_points must sum to the K = {points.shape[3]} samples of {points_name}, "
            f"got {tuple(num_points)}"
        ),
    )
    per_head = (points.shape[3],) if num_points else (num_levels, points.shape[4])
    expected = (value.shape[0], points.shape[1], value.shape[2], *per_head)
    _check_shape(weights, weights_name, f"({letters})", expected)
    _check_shape(points, points_name, f"({letters}, 2)", (*expected, 2))


def _check_like_value(tensor: Tensor, name: str, value: Tensor) -> None:
    _check_device(tensor, name, value)
    _check_float(tensor, name)


def _check_device(tensor: Tensor, name: str, value: Tensor) -> None:
    _require(
        tensor.device == value.device,
        lambda: (
            f"{name} must be on the device of value ({value.device}), "
            f"got a tensor on {tensor.device}"
        ),
    )


def _check_float(tensor: Tensor, name: str) -> None:
    _require(
        tensor.dtype in FLOATS,
        lambda: f"{name} must be float32, float64, float16 or bfloat16, got {tensor.dtype}",
    )


def _check_shape(tensor: Tensor, name: str, letters: str, expected: tuple[int, ...]) -> None:
    _require(
        tuple(tensor.shape) == expected,
        lambda: f"{name} must have shape {letters} = {expected}, got {tuple(tensor.shape)}",
    )
