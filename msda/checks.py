"""The arguments of the operators in one table, and the checks made from it.

``csrc/arguments.h`` holds the same table and ``csrc/call.h`` the same checks, for the compiled
operator. Those here serve tensors without data and the reference;
``tests/operator/test_arguments.py`` compares the tables and walks every rule through both.
``csrc/cuda/level_table.cu`` checks sizes that only a GPU knows. Each check raises RuntimeError:
``<name> must <rule>, got <value>``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import SymBool, SymInt, Tensor

from msda import dtypes

# ---- the table -----------------------------------------------------------------------------------

FLOATS = tuple(getattr(torch, name) for name in dtypes.FLOATS)
FLOAT = f"be {dtypes.listed(dtypes.FLOATS)}"
INTEGER = "be int64 or int32"
BOOL = "be bool (True = padding)"
OF_VALUE = "have the dtype of value"
DTYPES = {FLOAT: FLOATS, INTEGER: (torch.int64, torch.int32), BOOL: (torch.bool,)}

ANYWHERE = "be on any device"
WITH_VALUE = "be on the device of value"
ON_HOST_OR_WITH_VALUE = "be on the CPU or on the device of value"


class Argument(NamedTuple):
    """The rules of a tensor. Axes: B batch, S keys, M heads, D channels per head, Q queries,
    L levels, P points of each level, or, with ``num_points``, K of all levels together.
    """

    name: str
    dtypes: str
    place: str
    shape: tuple[str, ...]
    ragged_shape: tuple[str, ...] | None = None  # with num_points, where it is another


def _points(name: str) -> Argument:
    shape, ragged_shape = ("B", "Q", "M", "L", "P", "2"), ("B", "Q", "M", "K", "2")
    return Argument(name, FLOAT, WITH_VALUE, shape, ragged_shape)


def _weights(name: str) -> Argument:
    return Argument(name, FLOAT, WITH_VALUE, ("B", "Q", "M", "L", "P"), ("B", "Q", "M", "K"))


# In the order in which they are checked.
ARGUMENTS = {
    argument.name: argument
    for argument in (
        Argument("value", FLOAT, ANYWHERE, ("B", "S", "M", "D")),
        Argument("spatial_shapes", INTEGER, ON_HOST_OR_WITH_VALUE, ("L", "2")),
        Argument("level_start_index", INTEGER, ON_HOST_OR_WITH_VALUE, ("L",)),
        _points("sampling_locations"),
        _weights("attention_weights"),
        _points("sampling_offsets"),
        _weights("attention_logits"),
        Argument("reference_points", FLOAT, WITH_VALUE, ("B", "Q", "L or 1", "2 or 4")),
        Argument("padding_mask", BOOL, WITH_VALUE, ("B", "S")),
        Argument("grad_output", OF_VALUE, WITH_VALUE, ("B", "Q", "M * D")),
        Argument("output", OF_VALUE, WITH_VALUE, ("B", "Q", "M * D")),
    )
}

_PYRAMID = ("value", "spatial_shapes", "level_start_index")
_POINTS = ("sampling_locations", "sampling_offsets")

MAX_SIDE = 2**24  # from here on float32 does not hold every integer
MAX_PIXELS = 2**63


def describe_arguments() -> str:
    """A line for each argument."""
    lines = []
    for argument in ARGUMENTS.values():
        shapes = [_letters(shape) for shape in (argument.shape, argument.ragged_shape) if shape]
        lines.append(
            f"{argument.name}: {' or '.join(shapes)}; must {argument.dtypes}; must {argument.place}"
        )
    return "\n".join(lines) + "\n"


# ---- the check of one tensor ---------------------------------------------------------------------


@dataclass
class _Known:
    """The sizes of a call, from the arguments checked so far."""

    value: Tensor
    ragged: bool  # num_points was given
    sizes: dict[str, int]  # by letter

    def check(self, name: str, tensor: Any) -> None:
        """Check a tensor against its row of the table."""
        argument = ARGUMENTS[name]
        if not isinstance(tensor, Tensor):
            raise RuntimeError(f"{name} must be a Tensor, got {type(tensor).__name__}")
        if tensor.is_nested:
            raise RuntimeError(f"{name} must be a dense tensor, got a nested one")
        if tensor.layout is not torch.strided:
            raise RuntimeError(
                f"{name} must be a dense tensor, got one of layout {_plain(tensor.layout)}"
            )
        if tensor.dtype not in DTYPES.get(argument.dtypes, (self.value.dtype,)):
            rule = argument.dtypes
            if rule == OF_VALUE:
                rule += f" ({_plain(self.value.dtype)})"
            raise RuntimeError(f"{name} must {rule}, got {_plain(tensor.dtype)}")
        may_be_here = argument.place == ANYWHERE or tensor.device == self.value.device
        if not may_be_here and not (argument.place == ON_HOST_OR_WITH_VALUE and tensor.is_cpu):
            raise RuntimeError(
                f"{name} must {argument.place} ({self.value.device}), "
                f"got a tensor on {tensor.device}"
            )
        shape = (self.ragged and argument.ragged_shape) or argument.shape
        if not self.has_shape(tensor, shape):
            raise RuntimeError(
                f"{name} must have shape {self.expected_shape(shape)}, got {tuple(tensor.shape)}"
            )
        _check_extent(tensor, name)

    def has_shape(self, tensor: Tensor, shape: tuple[str, ...]) -> bool:
        """Whether a tensor has a shape. A letter that is not yet known becomes known."""
        if tensor.dim() != len(shape):
            return False
        fits = [self.axis_fits(*one) for one in zip(shape, tensor.shape, strict=True)]
        return all(fits)

    def axis_fits(self, axis: str, size: int) -> bool:
        """Whether an axis may be so long."""
        if axis == "2":
            return size == 2
        if axis == "2 or 4":
            return size in (2, 4)
        if axis == "L or 1":
            return size in (self.sizes["L"], 1)
        if axis == "M * D":
            return size == self.sizes["M"] * self.sizes["D"]
        return size == self.sizes.setdefault(axis, size)

    def expected_shape(self, shape: tuple[str, ...]) -> str:
        """'(B, Q, M * D) = (2, 5, 12)', as far as the numbers are known."""
        numbers = []
        for axis in shape:
            if axis == "M * D":
                numbers.append(str(self.sizes["M"] * self.sizes["D"]))
            elif axis == "L or 1":
                numbers.append(f"{self.sizes['L']} or 1")
            elif not axis.isalpha():
                numbers.append(axis)
            elif axis in self.sizes:
                numbers.append(str(self.sizes[axis]))
            else:
                return _letters(shape)
        return f"{_letters(shape)} = {_letters(tuple(numbers))}"


def _letters(shape: tuple[str, ...]) -> str:
    return f"({', '.join(shape)}{',' if len(shape) == 1 else ''})"


def _plain(name: object) -> str:
    return str(name).removeprefix("torch.")


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor's numbers can be looked at, here and now: not while a program is traced."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type in ("cpu", "cuda")
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _check_extent(tensor: Tensor, name: str) -> None:
    """Refuse elements beyond the storage, which may have been freed or shortened since."""
    if not has_numbers(tensor) or tensor.numel() == 0 or torch._is_zerotensor(tensor):
        return
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps)
    reached, storage = (last + 1) * tensor.element_size(), tensor.untyped_storage().nbytes()
    if reached > storage:
        raise RuntimeError(
            f"{name} must lie within its storage, got a tensor that reaches {reached} bytes "
            f"into a storage of {storage}"
        )


# ---- the check of a call -------------------------------------------------------------------------


def check_arguments(**arguments: Any) -> None:
    """Check the arguments of an operator, by the names of its schema.

    Shapes are ``spatial_shapes``, [H0, W0, H1, ...], or ``spatial_shapes_tensor``. Arguments that
    are not in the table are not checked.
    """
    num_points = arguments["num_points"] or ()
    known = _check_pyramid(
        arguments["value"],
        arguments["spatial_shapes"] or (),
        arguments["spatial_shapes_tensor"],
        arguments["level_start_index"],
        num_points,
    )
    for name in ARGUMENTS:
        if name in _PYRAMID or name not in arguments:
            continue
        if arguments[name] is None and name == "padding_mask":
            continue
        if arguments[name] is None and name == "output":
            if known.value.is_cuda:
                raise RuntimeError("output must be given on CUDA, got None")
            continue
        known.check(name, arguments[name])
        if num_points and name in _POINTS and sum(num_points) != known.sizes["K"]:
            raise RuntimeError(
                f"num_points must sum to the K = {known.sizes['K']} samples of {name}, "
                f"got {tuple(num_points)}"
            )


def _check_pyramid(
    value: Tensor,
    shapes: Sequence[int],
    shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    num_points: Sequence[int],
) -> _Known:
    """Check value and the pyramid's metadata."""
    known = _Known(value, bool(num_points), {})
    known.check("value", value)
    if shapes_tensor is None:
        if len(shapes) % 2 != 0:
            raise RuntimeError(
                f"spatial_shapes must hold (height, width) pairs, got {len(shapes)} numbers"
            )
        known.sizes["L"] = len(shapes) // 2
    else:
        if shapes:
            raise RuntimeError("spatial_shapes must be given as numbers or as a tensor, got both")
        known.check("spatial_shapes", shapes_tensor)
        if shapes_tensor.is_cpu and has_numbers(shapes_tensor):
            if len(shapes_tensor) > max(1, value.shape[1]):  # a level has a pixel at least
                raise RuntimeError(
                    f"spatial_shapes must cover the S = {value.shape[1]} keys of value, "
                    f"got {len(shapes_tensor)} levels"
                )
            shapes = shapes_tensor.flatten().tolist()
    num_levels = known.sizes["L"]
    if num_levels == 0:
        raise RuntimeError("spatial_shapes must hold at least one level, got none")
    if num_points and len(num_points) != num_levels:
        raise RuntimeError(
            f"num_points must hold one count per level ({num_levels}), got {tuple(num_points)}"
        )
    starts = _check_sizes(value, tuple(shapes)) if shapes else None
    if any(count < 0 for count in num_points):
        raise RuntimeError(f"num_points must not be negative, got {tuple(num_points)}")
    if level_start_index is not None:
        known.check("level_start_index", level_start_index)
        if starts is not None and level_start_index.is_cpu and has_numbers(level_start_index):
            given = tuple(level_start_index.tolist())
            if given != starts:
                raise RuntimeError(
                    "level_start_index must be the running sum of height * width, "
                    f"{starts}, got {given}"
                )
    return known


def _check_sizes(value: Tensor, shapes: tuple[int, ...]) -> tuple[int, ...]:
    """Check heights and widths; returns the first key of each level."""
    if not all(size > 0 for size in shapes):
        raise RuntimeError(f"spatial_shapes must be positive, got {shapes}")
    # Symbolic sizes go unchecked, or they could take no other values: the kernel checks them.
    if value.dtype != torch.float64 and any(
        size > MAX_SIDE for size in shapes if not isinstance(size, SymInt)
    ):
        raise RuntimeError(
            "spatial_shapes must be at most 2^24 on a side, where float32 coordinates end, "
            f"got {shapes}"
        )
    num_keys, starts = value.shape[1], [0]
    for height, width in zip(shapes[::2], shapes[1::2], strict=True):
        starts.append(starts[-1] + height * width)
        if isinstance(starts[-1], int) and starts[-1] >= MAX_PIXELS:
            raise RuntimeError(
                f"spatial_shapes must cover the S = {num_keys} keys of value, "
                f"got 2^63 pixels or more: {shapes}"
            )
    covers: bool | SymBool = starts[-1] == num_keys
    if isinstance(covers, SymBool):
        torch._check(covers, lambda: f"spatial_shapes must cover the S = {num_keys} keys of value")
    elif not covers:
        raise RuntimeError(
            f"spatial_shapes must cover the S = {num_keys} keys of value, "
            f"got {starts[-1]} pixels: {shapes}"
        )
    return tuple(starts[:-1])
