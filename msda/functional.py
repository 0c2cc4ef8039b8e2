"""The functions users call: documented, typed, and thin."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor

from msda import ops
from msda.checks import check_arguments
from msda.ops import has_kernel
from msda.reference import SpatialShapes

_INTERPOLATIONS = ("bilinear", "nearest")
MAX_INT64 = 2**63 - 1

# Called with the arguments of each call, by name, once they are checked to be tensors.
observers: list[Callable[[Mapping[str, Any]], None]] = []


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
) -> Tensor:
    """Sum sampled values of a feature pyramid, weighted by attention (arXiv 2010.04159, eq. 3).

    For each query and head, ``output = sum over levels and points of attention_weight * sample``,
    where a sample is read at pixel coordinates ``x = loc_x * W - 1/2``, ``y = loc_y * H - 1/2``.
    Pixels outside a map are zero; a sample with x outside (-1, W) or y outside (-1, H), or with a
    location that is NaN or infinite, contributes exactly zero to output and gradients. Coordinates
    and sums are float32 (float64 for float64 values) whatever the dtypes. The CPU backward gives
    the same bits for any number of threads; the CUDA backward gives the same bits in every run
    under ``torch.use_deterministic_algorithms(True)``, else it adds in no fixed order. For that it
    takes 32 bytes of memory for a while for each of the B * Q * M * L * P samples (48 for float64
    values) and some 4 for each of the B * S * M pixels of a head, beside what ``torch.sort`` takes.
    Derivatives of gradients (``create_graph=True``) are right but slow: the reference is
    differentiated twice.

    Letters: B batch, S = sum of H * W over levels, Q queries, M heads, D channels per head,
    L levels, P points. Inputs need not be contiguous. Q and B may be 0.

    Args:
        value: (B, S, M, D) projected features, levels flattened row by row and concatenated;
            float32, float64, float16 or bfloat16.
        spatial_shapes: (L, 2) rows are (height, width): a sequence of int pairs (preferred, nothing
            to read back) or an int64 or int32 tensor. A CUDA tensor is never read on the host.
        level_start_index: (L,) first row of each level in S: an int64 or int32 tensor, a sequence
            of ints, or None. It follows from ``spatial_shapes``: on the CPU it is checked against
            them, elsewhere it is not read.
        sampling_locations: (B, Q, M, L, P, 2) last axis (x, y), 0..1 across the map. Any of the
            four dtypes; use float32 even for 16-bit values, because a bfloat16 location moves in
            steps of 0.6 pixels on a map 160 wide (float16: 0.08).
        attention_weights: (B, Q, M, L, P) already softmaxed over the L * P axes; any of the four
            dtypes.
        num_points: one count per level for levels with different numbers of points, as in
            RT-DETRv2 and D-FINE. ``sampling_locations`` is then (B, Q, M, K, 2) and
            ``attention_weights`` (B, Q, M, K) with K = sum(num_points), levels in order.
        interpolation: "bilinear", or "nearest": RT-DETRv2's 'discrete' mode, which reads the pixel
            (trunc(loc_x * W + 1/2), trunc(loc_y * H + 1/2)), each clamped to the map, and gives no
            gradient to locations.

    Returns:
        (B, Q, M * D) heads concatenated; dtype and device of ``value``.

    Raises:
        TypeError: an argument that must be a tensor is none.
        ValueError: ``interpolation`` or ``spatial_shapes`` is malformed.
        RuntimeError: shapes, dtypes, layouts or devices do not fit together, or a tensor reaches
            beyond its storage; there is not enough memory; a kernel failed.
        NotImplementedError: a forward-mode derivative is asked for.

    Example:
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = torch.rand(2, 32 * 48 + 16 * 24, 8, 32)
        >>> locations = torch.rand(2, 100, 8, 2, 4, 2)
        >>> weights = torch.rand(2, 100, 8, 8).softmax(-1).unflatten(-1, (2, 4))
        >>> ms_deform_attn(value, shapes, None, locations, weights).shape
        torch.Size([2, 100, 256])
    """
    check_tensor(value, "value")
    check_tensor(sampling_locations, "sampling_locations")
    check_tensor(attention_weights, "attention_weights")
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {_INTERPOLATIONS}, got {interpolation!r}")
    shapes, shapes_tensor = split_shapes(spatial_shapes)
    counts = as_counts(num_points)
    start_index = as_start_index(level_start_index, shapes)
    if observers:
        _observe(
            value=value,
            spatial_shapes=spatial_shapes,
            sampling_locations=sampling_locations,
            attention_weights=attention_weights,
            num_points=num_points,
        )
    if not has_kernel(value):
        arguments: dict[str, Any] = dict(
            value=value,
            spatial_shapes=shapes,
            spatial_shapes_tensor=shapes_tensor,
            level_start_index=start_index,
            sampling_locations=sampling_locations,
            attention_weights=attention_weights,
            num_points=counts,
            nearest=interpolation == "nearest",
        )
        _prepare_reference(**arguments)
        return ops.plain_by_reference(**arguments)
    return ops.ms_deform_attn(
        value,
        shapes,
        shapes_tensor,
        start_index,
        sampling_locations,
        attention_weights,
        counts,
        interpolation == "nearest",
    )


def ms_deform_attn_fused(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    num_points: Sequence[int] | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Compute :func:`ms_deform_attn` from reference points, offsets and logits in one kernel.

    Locations (arXiv 2010.04159, section 4.1; for boxes appendix A.4) and the softmax over all
    samples of a head are computed inside the kernel, in float32 (float64 for float64 values), and
    never written to memory:

        points:  loc = (x, y) + offset / (W, H)
        boxes:   loc = (x, y) + offset * (w, h) / (2 * P)

    Because offsets are small, 16-bit offsets lose little here, unlike 16-bit locations.

    Args:
        value: as in :func:`ms_deform_attn`.
        spatial_shapes: as in :func:`ms_deform_attn`.
        level_start_index: as in :func:`ms_deform_attn`.
        reference_points: (B, Q, L, 2) points (x, y) or (B, Q, L, 4) boxes (centre x, centre y,
            width, height), 0..1 across the map; L may be 1 where all levels share them. Any of the
            four dtypes; float32 is meant.
        sampling_offsets: (B, Q, M, L, P, 2) last axis (x, y): pixels of the level for points, units
            of (w, h) / (2 * P) for boxes. Any of the four dtypes.
        attention_logits: (B, Q, M, L, P) before the softmax over L * P. Any of the four dtypes.
        num_points: as in :func:`ms_deform_attn`; offsets are then (B, Q, M, K, 2), logits
            (B, Q, M, K).
        padding_mask: (B, S) bool, True = padding: those values read as zero and get no gradient.

    Returns:
        (B, Q, M * D) heads concatenated; dtype and device of ``value``.

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`ms_deform_attn`.

    Example:
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = torch.rand(2, 32 * 48 + 16 * 24, 8, 32)
        >>> reference_points = torch.rand(2, 100, 2, 2)
        >>> offsets, logits = torch.randn(2, 100, 8, 2, 4, 2), torch.randn(2, 100, 8, 2, 4)
        >>> ms_deform_attn_fused(value, shapes, None, reference_points, offsets, logits).shape
        torch.Size([2, 100, 256])
    """
    check_tensor(value, "value")
    check_tensor(reference_points, "reference_points")
    check_tensor(sampling_offsets, "sampling_offsets")
    check_tensor(attention_logits, "attention_logits")
    if padding_mask is not None:
        check_tensor(padding_mask, "padding_mask")
    shapes, shapes_tensor = split_shapes(spatial_shapes)
    counts = as_counts(num_points)
    start_index = as_start_index(level_start_index, shapes)
    if observers:
        _observe(
            value=value,
            spatial_shapes=spatial_shapes,
            reference_points=reference_points,
            sampling_offsets=sampling_offsets,
            attention_logits=attention_logits,
            num_points=num_points,
        )
    if not has_kernel(value):
        arguments: dict[str, Any] = dict(
            value=value,
            spatial_shapes=shapes,
            spatial_shapes_tensor=shapes_tensor,
            level_start_index=start_index,
            reference_points=reference_points,
            sampling_offsets=sampling_offsets,
            attention_logits=attention_logits,
            num_points=counts,
            padding_mask=padding_mask,
        )
        _prepare_reference(**arguments)
        return ops.fused_by_reference(**arguments)
    return ops.ms_deform_attn_fused(
        value,
        shapes,
        shapes_tensor,
        start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        counts,
        padding_mask,
    )


def _observe(**arguments: Any) -> None:
    if not torch.compiler.is_compiling():
        for observe in observers:
            observe(arguments)


def check_tensor(argument: object, name: str) -> None:
    """Refuse arguments that are no tensor, and nested tensors, which torch sends elsewhere."""
    if not isinstance(argument, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(argument).__name__}")
    if argument.is_nested:
        raise RuntimeError(f"{name} must be a dense tensor, got a nested one")


def as_ints(numbers: Iterable[Any], name: str) -> list[int]:
    """Python ints of all kinds of integers, NumPy's too; symbolic sizes stay as they are.

    Raises:
        TypeError: one is no integer.
        ValueError: one is too large for the operator.
    """
    ints = list(numbers)
    if torch.compiler.is_compiling():  # a comparison would become a condition on sizes
        return ints
    for i, number in enumerate(ints):
        if type(number) is not int and not isinstance(number, SymInt):
            number = ints[i] = operator.index(number)
        if not -MAX_INT64 <= number <= MAX_INT64:
            raise ValueError(f"{name} must be below 2^63, got {number}")
    return ints


def as_counts(num_points: Sequence[int] | None) -> list[int]:
    """One count per level, or an empty list where all levels have the same number of points."""
    if num_points is None:
        return []
    try:
        counts = as_ints(num_points, "num_points")
    except TypeError:
        raise TypeError(
            f"num_points must be a sequence of one int per level, got {num_points!r}"
        ) from None
    if not counts:  # to the operators it would mean that there are none
        raise RuntimeError("num_points must hold one count per level, got ()")
    return counts


def split_shapes(spatial_shapes: SpatialShapes) -> tuple[list[int], Tensor | None]:
    """The two ways in which the operator takes shapes: [H0, W0, H1, W1, ...] or a tensor."""
    if isinstance(spatial_shapes, Tensor):
        check_tensor(spatial_shapes, "spatial_shapes")
        return [], spatial_shapes
    try:
        sizes = [size for height, width in spatial_shapes for size in (height, width)]
    except (TypeError, ValueError):
        raise _no_pairs(spatial_shapes) from None
    if _are_traced(sizes):
        return [], _stack(sizes).view(-1, 2)
    try:
        return as_ints(sizes, "spatial_shapes"), None
    except TypeError:
        raise _no_pairs(spatial_shapes) from None


def _no_pairs(spatial_shapes: object) -> ValueError:
    return ValueError(
        "spatial_shapes must be a sequence of (height, width) pairs or an integer tensor, "
        f"got {spatial_shapes!r}"
    )


def _are_traced(numbers: list[Any]) -> bool:
    """Whether ``torch.jit.trace`` made tensors of sizes, which as ints would be constants."""
    is_traced = bool(torch.jit.is_tracing())  # type: ignore[attr-defined]
    return is_traced and any(isinstance(number, Tensor) for number in numbers)


def _stack(numbers: Iterable[Any]) -> Tensor:
    return torch.stack([torch.as_tensor(number, dtype=torch.int64) for number in numbers])


def as_start_index(
    level_start_index: Tensor | Sequence[int] | None, shapes: list[int]
) -> Tensor | None:
    """The start index as a tensor; None where numbers were given, which are compared here.

    Raises:
        TypeError: it is neither a tensor nor a sequence of ints.
        RuntimeError: it is not what follows from the shapes.
    """
    if level_start_index is None:
        return None
    if isinstance(level_start_index, Tensor):
        check_tensor(level_start_index, "level_start_index")
        return level_start_index
    try:
        given = list(level_start_index)
        if _are_traced(given):
            return _stack(given)
        given = as_ints(given, "level_start_index")
    except TypeError:
        raise TypeError(
            "level_start_index must be an integer tensor, a sequence of ints or None, "
            f"got {level_start_index!r}"
        ) from None
    if not shapes:  # they are in a tensor
        return torch.tensor(given, dtype=torch.int64)
    starts = [0]
    for height, width in zip(shapes[:-2:2], shapes[1:-2:2], strict=True):
        starts.append(starts[-1] + height * width)
    if given != starts:
        raise RuntimeError(
            "level_start_index must be the running sum of height * width, "
            f"{tuple(starts)}, got {tuple(given)}"
        )
    return None


def _prepare_reference(**arguments: Any) -> None:
    """Check the arguments of a call that the reference serves, and warn that it does."""
    shapes = arguments["spatial_shapes_tensor"]
    _warn_of_reference(arguments["value"].device.type)
    check_arguments(**arguments)
    if shapes is not None and shapes.is_meta:
        raise RuntimeError(
            "spatial_shapes must hold numbers where the reference runs, got a meta tensor"
        )


def _warn_of_reference(device: str) -> None:
    if torch.compiler.is_compiling():
        return
    if ops.BACKEND == "native":
        _warn(f"msda has no kernel for {device} tensors: the slower PyTorch reference runs.")
    elif not ops.BACKEND_REASON.startswith("MSDA_BACKEND"):
        _warn(f"msda runs its slower PyTorch reference: {ops.BACKEND_REASON}; {ops.REMEDY}")


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=5)
