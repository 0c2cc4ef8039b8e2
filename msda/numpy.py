"""The operator over NumPy arrays, without torch: the C interface ``csrc/msda.h``, by ctypes.

Works where torch is not installed. Forward only. Apart from that the functions are those of
:mod:`msda`: the same arguments, kernels and errors.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]
SpatialShapes: TypeAlias = Sequence[tuple[int, int]] | Array

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
LIBRARY_PATH = Path(__file__).with_name(f"libmsda_cpu.{_SUFFIX}")

# By the number that msda_dtype of csrc/msda.h gives each.
DTYPES = (
    "float32", "float64", "float16", "bfloat16", "int64", "int32", "bool", "int8", "uint8", "int16",
    "uint16", "uint32", "uint64", "complex64", "complex128",
)  # fmt: skip
_OUT_OF_MEMORY = 2
_INTERPOLATIONS = ("bilinear", "nearest")
_MAX_RANK = 8


class _Tensor(ctypes.Structure):
    """msda_tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    )


class _Options(ctypes.Structure):
    """msda_options."""

    _fields_ = (
        ("num_points", ctypes.POINTER(ctypes.c_int64)),
        ("num_counts", ctypes.c_int64),
        ("nearest", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("loop", ctypes.c_void_p),
        ("pool", ctypes.c_void_p),
    )


def _load() -> ctypes.CDLL:
    if not LIBRARY_PATH.exists():
        raise ImportError(
            f"msda.numpy needs {LIBRARY_PATH.name}, which is not installed beside it: "
            "this is an install without compiled kernels"
        )
    library = ctypes.CDLL(str(LIBRARY_PATH))
    for name, count in (("msda_ms_deform_attn", 6), ("msda_ms_deform_attn_fused", 8)):
        tensors = [ctypes.POINTER(_Tensor)] * count
        getattr(library, name).argtypes = [*tensors, ctypes.POINTER(_Options)]
    for name in ("last_error", "version", "arguments", "cpu_capability"):
        getattr(library, f"msda_{name}").restype = ctypes.c_char_p
    return library


LIBRARY = _load()


def ms_deform_attn(
    value: Array,
    spatial_shapes: SpatialShapes,
    level_start_index: Array | Sequence[int] | None,
    sampling_locations: Array,
    attention_weights: Array,
    *,
    num_points: Sequence[int] | None = None,
    interpolation: str = "bilinear",
    num_threads: int = 0,
    output: Array | None = None,
) -> Array:
    """Compute ``msda.ms_deform_attn`` of NumPy arrays, without torch and without gradients.

    An array with gaps (a slice, a transposed view) is copied first; others are read in place.

    Args:
        value: (B, S, M, D) projected features of all levels; float32, float64, float16, or bfloat16
            as the package ml_dtypes has it.
        spatial_shapes: (height, width) of each level: a sequence of pairs, or (L, 2) int64 or
            int32.
        level_start_index: (L,) first row of each level in S, int64 or int32; None derives it.
        sampling_locations: (B, Q, M, L, P, 2) (x, y), 0..1 across the map; outside reads zero. Any
            of the four dtypes; float32 is meant.
        attention_weights: (B, Q, M, L, P) already softmaxed over L * P. Any of the four dtypes.
        num_points: one count for each level; locations are then (B, Q, M, K, 2) and weights
            (B, Q, M, K) with K = sum(num_points), levels in order.
        interpolation: "bilinear" or "nearest", as in ``msda.ms_deform_attn``.
        num_threads: at most so many threads; 0 takes OMP_NUM_THREADS, or all processors.
        output: (B, Q, M * D) contiguous, of the dtype of ``value``, which the result is written
            to; None makes one.

    Returns:
        (B, Q, M * D) heads concatenated; dtype of ``value``.

    Raises:
        TypeError: an argument that must be an array is none.
        ValueError: ``interpolation`` or ``spatial_shapes`` is malformed.
        RuntimeError: shapes or dtypes do not fit together.
        MemoryError: there is not enough memory.

    Example:
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = np.random.rand(2, 32 * 48 + 16 * 24, 8, 32).astype("float32")
        >>> locations = np.random.rand(2, 100, 8, 2, 4, 2).astype("float32")
        >>> weights = np.full((2, 100, 8, 2, 4), 1 / 8, "float32")
        >>> ms_deform_attn(value, shapes, None, locations, weights).shape
        (2, 100, 256)
    """
    if interpolation not in _INTERPOLATIONS:
        raise ValueError(f"interpolation must be one of {_INTERPOLATIONS}, got {interpolation!r}")
    return _call(
        "msda_ms_deform_attn",
        value,
        spatial_shapes,
        level_start_index,
        {"sampling_locations": sampling_locations, "attention_weights": attention_weights},
        num_points=num_points,
        nearest=interpolation == "nearest",
        num_threads=num_threads,
        output=output,
    )


def ms_deform_attn_fused(
    value: Array,
    spatial_shapes: SpatialShapes,
    level_start_index: Array | Sequence[int] | None,
    reference_points: Array,
    sampling_offsets: Array,
    attention_logits: Array,
    *,
    num_points: Sequence[int] | None = None,
    padding_mask: Array | None = None,
    num_threads: int = 0,
    output: Array | None = None,
) -> Array:
    """Compute ``msda.ms_deform_attn_fused`` of NumPy arrays: see :func:`ms_deform_attn`.

    Args:
        value: as in :func:`ms_deform_attn`.
        spatial_shapes: as in :func:`ms_deform_attn`.
        level_start_index: as in :func:`ms_deform_attn`.
        reference_points: (B, Q, L or 1, 2) points (x, y) or (B, Q, L or 1, 4) boxes (centre x,
            centre y, width, height), 0..1 across the map. Any of the four dtypes.
        sampling_offsets: (B, Q, M, L, P, 2) last axis (x, y): pixels of the level for points, units
            of (w, h) / (2 * P) for boxes. Any of the four dtypes.
        attention_logits: (B, Q, M, L, P) before the softmax over L * P. Any of the four dtypes.
        num_points: as in :func:`ms_deform_attn`; offsets are then (B, Q, M, K, 2), logits
            (B, Q, M, K).
        padding_mask: (B, S) bool, True = padding: those values read as zero.
        num_threads: as in :func:`ms_deform_attn`.
        output: as in :func:`ms_deform_attn`.

    Returns:
        (B, Q, M * D) heads concatenated; dtype of ``value``.

    Raises:
        TypeError, ValueError, RuntimeError, MemoryError: as in :func:`ms_deform_attn`.

    Example:
        >>> shapes = [(32, 48), (16, 24)]
        >>> value = np.random.rand(2, 32 * 48 + 16 * 24, 8, 32).astype("float32")
        >>> points = np.random.rand(2, 100, 2, 2).astype("float32")
        >>> offsets, logits = np.zeros((2, 100, 8, 2, 4, 2)), np.zeros((2, 100, 8, 2, 4))
        >>> ms_deform_attn_fused(value, shapes, None, points, offsets, logits).shape
        (2, 100, 256)
    """
    return _call(
        "msda_ms_deform_attn_fused",
        value,
        spatial_shapes,
        level_start_index,
        {
            "reference_points": reference_points,
            "sampling_offsets": sampling_offsets,
            "attention_logits": attention_logits,
            "padding_mask": padding_mask,
        },
        num_points=num_points,
        nearest=False,
        num_threads=num_threads,
        output=output,
    )


def arguments() -> str:
    """The table of arguments that the library checks by: a line each."""
    return LIBRARY.msda_arguments().decode()


def _call(
    function: str,
    value: Array,
    spatial_shapes: SpatialShapes,
    level_start_index: Array | Sequence[int] | None,
    samples: dict[str, Array | None],
    *,
    num_points: Sequence[int] | None,
    nearest: bool,
    num_threads: int,
    output: Array | None,
) -> Array:
    """``samples``: the arguments between the start index and the output, in their order."""
    arrays: dict[str, Array | None] = {"value": value, "spatial_shapes": _pairs(spatial_shapes)}
    arrays["level_start_index"] = (
        None if level_start_index is None else _integers(level_start_index, "level_start_index")
    )
    arrays |= samples
    for name, array in arrays.items():
        optional = name in ("level_start_index", "padding_mask") and array is None
        if not optional and not isinstance(array, np.ndarray):
            raise TypeError(f"{name} must be an array, got {type(array).__name__}")
    if output is None:
        points = samples.get("attention_weights", samples.get("attention_logits"))
        assert points is not None
        if value.ndim == 4 and points.ndim > 1:  # else the call is refused before output is read
            batch, _, num_heads, head_dim = value.shape
            output = np.empty((batch, points.shape[1], num_heads * head_dim), value.dtype)
    elif not isinstance(output, np.ndarray):
        raise TypeError(f"output must be an array, got {type(output).__name__}")
    elif not output.flags.writeable:
        raise ValueError("output must be writeable, got one that is read-only")
    counts = None if num_points is None else _integers(num_points, "num_points")
    options = _Options(nearest=nearest, num_threads=num_threads)
    if counts is not None:
        options.num_points = _pointer(counts.ctypes.data or 1)
        options.num_counts = len(counts)
    memory: list[Any] = [counts]
    tensors = [_tensor(array, name, memory) for name, array in arrays.items()]
    tensors.append(_tensor(output, "output", memory))
    status = getattr(LIBRARY, function)(*tensors, options)
    if status != 0:
        message = LIBRARY.msda_last_error().decode()
        raise MemoryError(message) if status == _OUT_OF_MEMORY else RuntimeError(message)
    assert output is not None
    return output


def _tensor(array: Array | None, name: str, memory: list[Any]) -> Any:
    """An array as the library takes it; its memory is added to ``memory``, to outlive the call."""
    if array is None:
        return None
    if array.ndim > _MAX_RANK:
        raise RuntimeError(f"{name} must have at most {_MAX_RANK} axes, got {array.ndim}")
    dtype = array.dtype
    number = DTYPES.index(dtype.name) if dtype.name in DTYPES else -1
    if number < 0 or not dtype.isnative:
        raise RuntimeError(f"{name} must have a dtype of {DTYPES} in native order, got {dtype}")
    if any(stride % array.itemsize for stride in array.strides):
        if name == "output":
            raise RuntimeError(f"output must be contiguous, got strides of bytes {array.strides}")
        array = np.ascontiguousarray(array)
    sizes = np.array(array.shape, np.int64)
    strides = np.array(array.strides, np.int64) // array.itemsize
    memory += [array, sizes, strides]
    return ctypes.byref(
        _Tensor(
            data=array.ctypes.data,
            sizes=_pointer(sizes.ctypes.data),
            strides=_pointer(strides.ctypes.data),
            rank=array.ndim,
            dtype=number,
        )
    )


def _pointer(address: int) -> Any:
    return ctypes.cast(address, ctypes.POINTER(ctypes.c_int64))


def _pairs(spatial_shapes: SpatialShapes) -> Array:
    """(L, 2) integers."""
    if isinstance(spatial_shapes, np.ndarray):
        return spatial_shapes
    try:
        pairs = [(height, width) for height, width in spatial_shapes]
        sizes = _integers([size for pair in pairs for size in pair], "spatial_shapes")
    except (TypeError, ValueError):
        raise ValueError(
            "spatial_shapes must be a sequence of (height, width) pairs or an integer array, "
            f"got {spatial_shapes!r}"
        ) from None
    return sizes.reshape(-1, 2)


def _integers(numbers: Any, name: str) -> Array:
    """An integer array as it is, or a sequence of ints as int64."""
    if isinstance(numbers, np.ndarray) and name != "num_points":
        return numbers
    try:
        array = np.array(list(numbers), np.int64 if len(numbers) == 0 else None)
    except (TypeError, ValueError):
        array = np.array(0.0)
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise TypeError(f"{name} must be a sequence of ints, got {numbers!r}")
    return array.astype(np.int64)
