"""The operators' Python half; csrc/ops.cpp is the other.

In reading order: load, names of arguments, fake kernels, reference, backward, autograd, vmap.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from itertools import compress
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from msda._remedy import remedy, torch_is_too_old
from msda.checks import check_arguments
from msda.reference import (
    SpatialShapes,
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
)

# ---- load ----------------------------------------------------------------------------------------

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
LIBRARY_PATH = Path(__file__).with_name(f"libmsda.{_SUFFIX}")


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason why there is none."""
    if torch_is_too_old():
        return None, f"it needs torch >= 2.10, got {torch.__version__}"
    if not LIBRARY_PATH.exists():
        return None, f"{LIBRARY_PATH.name} is not installed beside {Path(__file__).name}"
    try:
        torch.ops.load_library(LIBRARY_PATH)
        return ctypes.CDLL(str(LIBRARY_PATH)), ""
    except OSError as error:
        return None, f"loading it failed: {error}"


def _choose_backend(has_library: bool, why_not: str) -> tuple[str, str]:
    """'native' or 'reference', and why."""
    wanted = os.environ.get("MSDA_BACKEND", "")
    if wanted not in ("", "native", "reference"):
        raise ImportError(f"MSDA_BACKEND must be 'native' or 'reference', got {wanted!r}")
    if wanted == "native" and not has_library:
        raise ImportError(f"MSDA_BACKEND=native, but the compiled library is missing: {why_not}")
    if wanted:
        return wanted, f"MSDA_BACKEND={wanted}"
    if has_library:
        return "native", "the compiled library is loaded"
    return "reference", f"the compiled library is missing: {why_not}"


LIBRARY, _WHY_NOT = _load()
BACKEND, BACKEND_REASON = _choose_backend(LIBRARY is not None, _WHY_NOT)


def library_text(function: str) -> str | None:
    """The answer of one of the library's C functions without arguments."""
    assert LIBRARY is not None
    call = getattr(LIBRARY, function)
    call.restype = ctypes.c_char_p
    answer = call()
    return None if answer is None else answer.decode()


def _mend() -> str | None:
    """How to get the parts that this build lacks; the library's errors end with it."""
    has_cuda_kernels = LIBRARY is not None and bool(library_text("msda_cuda_architectures"))
    text = remedy(LIBRARY is not None, has_cuda_kernels)
    if LIBRARY is not None and text is not None:
        LIBRARY.msda_set_cuda_remedy(text.encode())
    return text


REMEDY = _mend()


def has_kernel(value: Tensor) -> bool:
    """Whether the compiled operators serve a call with this value."""
    return BACKEND == "native" and value.device.type in ("cpu", "cuda", "meta")


# ---- the operators by the names of their arguments -----------------------------------------------

# Schemas are in csrc/ops.cpp. A backward operator takes grad_output, in the fused form the output,
# the arguments of its forward, a flag for each gradient, and whether it must be deterministic.

# By the flag that asks for it, the input whose gradient a backward operator computes.
_WANTED = {
    "needs_value": "value",
    "needs_locations": "sampling_locations",
    "needs_weights": "attention_weights",
    "needs_reference": "reference_points",
    "needs_offsets": "sampling_offsets",
    "needs_logits": "attention_logits",
}


def _schema(name: str) -> list[Any]:
    """The arguments of an operator, as torch describes them."""
    return list(getattr(torch.ops.msda, name).default._schema.arguments)


def argument_names(name: str) -> list[str]:
    """The names of an operator's arguments, in the order of its schema."""
    return [argument.name for argument in _schema(name)]


def _backward_name(name: str) -> str:
    return f"_{name}_backward"


class _Saved:
    """Saves the arguments of an operator for its derivative: those without a default."""

    def __init__(self, name: str) -> None:
        schema = [argument for argument in _schema(name) if not argument.has_default_value()]
        self.names = [argument.name for argument in schema]
        is_tensor = ["Tensor" in str(argument.type) for argument in schema]
        tensors = [place for place, one in enumerate(is_tensor) if one]
        others = [place for place, one in enumerate(is_tensor) if not one]
        # By position, and compiled: this runs in every call that records a graph.
        self._tensors, self._others = itemgetter(*tensors), itemgetter(*others)
        order = [*tensors, *others]
        self._in_order = itemgetter(*(order.index(place) for place in range(len(order))))

    def save(self, ctx: Any, arguments: tuple[Any, ...], *tensors: Tensor | None) -> None:
        """Save the arguments of a call, and further tensors."""
        ctx.save_for_backward(*tensors, *self._tensors(arguments))
        ctx.others = self._others(arguments)

    def restore(self, ctx: Any, count: int = 0) -> tuple[Any, ...]:
        """``count`` further tensors, then the arguments in their order."""
        saved = ctx.saved_tensors
        return (*saved[:count], *self._in_order((*saved[count:], *ctx.others)))


# ---- fake kernels: shapes without data -----------------------------------------------------------


def _register_fake(name: str) -> None:
    names = argument_names(name)

    def fake(*given: Any, **named: Any) -> Any:
        arguments = dict(zip(names, given, strict=False)) | named
        check_arguments(**arguments)
        value = arguments["value"]
        if "grad_output" not in arguments:
            is_fused = "sampling_offsets" in arguments
            points = arguments["sampling_offsets" if is_fused else "sampling_locations"]
            batch, _, num_heads, head_dim = value.shape
            return value.new_empty(batch, points.shape[1], num_heads * head_dim)
        return tuple(
            arguments[wanted].new_empty(arguments[wanted].shape if arguments[flag] else (0,))
            for flag, wanted in _WANTED.items()
            if flag in arguments
        )

    torch.library.register_fake(f"msda::{name}", fake)


# ---- the reference, with the arguments of the operators ------------------------------------------


def plain_by_reference(
    value: Tensor,
    spatial_shapes: list[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    nearest: bool,
) -> Tensor:
    """Compute ``torch.ops.msda.ms_deform_attn`` in plain PyTorch."""
    return ms_deform_attn_reference(
        value,
        _shapes(spatial_shapes, spatial_shapes_tensor),
        None,
        sampling_locations,
        attention_weights,
        num_points=num_points or None,
        interpolation="nearest" if nearest else "bilinear",
    )


def fused_by_reference(
    value: Tensor,
    spatial_shapes: list[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: list[int],
    padding_mask: Tensor | None,
) -> Tensor:
    """Compute ``torch.ops.msda.ms_deform_attn_fused`` in plain PyTorch."""
    return ms_deform_attn_fused_reference(
        value,
        _shapes(spatial_shapes, spatial_shapes_tensor),
        None,
        reference_points,
        sampling_offsets,
        attention_logits,
        num_points=num_points or None,
        padding_mask=padding_mask,
    )


def _shapes(sizes: list[int], tensor: Tensor | None) -> SpatialShapes:
    """Shapes as the reference takes them."""
    return list(zip(sizes[::2], sizes[1::2], strict=True)) if tensor is None else tensor


# ---- backward ------------------------------------------------------------------------------------


def _first_derivative(name: str, backward: Callable[..., Any]) -> tuple[Any, Any]:
    """What autograd saves of an operator's call, and how it then computes the gradients."""
    saved, backward_names = _Saved(name), argument_names(_backward_name(name))
    wanted = [one for flag, one in _WANTED.items() if flag in backward_names]
    places = [saved.names.index(one) for one in wanted]
    needs_of = itemgetter(*places)
    reads_output = "output" in backward_names

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        if reads_output:  # apart from the CPU's backward
            on_cpu = inputs[0].device.type == "cpu"
            saved.save(ctx, inputs, None if on_cpu else output)
        else:
            saved.save(ctx, inputs)

    def compute(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        needs = needs_of(ctx.needs_input_grad)
        gradients = backward(
            grad_output,
            *saved.restore(ctx, int(reads_output)),
            *needs,
            torch.are_deterministic_algorithms_enabled(),
        )
        by_input: list[Tensor | None] = [None] * len(saved.names)
        for place, gradient in compress(zip(places, gradients, strict=True), needs):
            by_input[place] = gradient
        return tuple(by_input)

    return save_inputs, compute


# ---- backward of the backward --------------------------------------------------------------------


def _second_derivative(name: str, by_reference: Callable[..., Tensor]) -> tuple[Any, Any]:
    """The same for a backward operator. Slow and exact: it differentiates the reference twice."""
    saved, names = _Saved(_backward_name(name)), argument_names(_backward_name(name))
    forward_names = argument_names(name)
    flags = [flag for flag in _WANTED if flag in names]
    wanted_names = [_WANTED[flag] for flag in flags]

    def save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        saved.save(ctx, inputs)

    def compute(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        arguments = dict(zip(saved.names, saved.restore(ctx), strict=True))
        fixed = {one: arguments[one] for one in forward_names if one not in wanted_names}
        wanted = [arguments[flag] for flag in flags]

        def reference(*tensors: Tensor) -> Tensor:
            return by_reference(**dict(zip(wanted_names, tensors, strict=True)), **fixed)

        def first(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
            pull_back = torch.func.vjp(reference, *tensors)[1]
            return tuple(compress(pull_back(grad_output), wanted))

        differentiable = ["grad_output", *wanted_names]
        pull_back = torch.func.vjp(first, *(arguments[one] for one in differentiable))[1]
        gradients = pull_back(tuple(compress(grads, wanted)))
        by_name = dict(zip(differentiable, gradients, strict=True))
        # None for the output: its part is in the gradients of what it was computed from.
        return tuple(by_name.get(one) for one in names)

    return save_inputs, compute


# ---- autograd ------------------------------------------------------------------------------------

# A derivative that torch.library registers runs in Python for every call, wanted or not, which
# doubles the time of a small problem, and torch.func refuses it. So a plain eager call goes around
# the registered derivative, which in turn knows torch.func.

_INTERNALS = (
    hasattr(torch._C, "_AutoDispatchBelowAutograd")
    and hasattr(torch._C, "_get_tracing_state")
    and hasattr(torch._C, "_len_torch_dispatch_stack")
    and hasattr(torch._C, "_len_torch_function_stack")
    and hasattr(torch._C._functorch, "peek_interpreter_stack")
    and hasattr(torch._functorch.utils, "enable_single_level_autograd_function")
    and hasattr(torch.autograd.function, "_SingleLevelFunction")
)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody watches the call: no tracer, mode, transform or subclass of Tensor."""
    return (
        _INTERNALS
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(
            type(argument) is Tensor or type(argument) is Parameter
            for argument in arguments
            if isinstance(argument, Tensor)
        )
    )


def _wants_graph(arguments: tuple[Any, ...]) -> bool:
    return torch.is_grad_enabled() and any(
        isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
    )


def _refuse_nested(names: list[str], arguments: tuple[Any, ...]) -> None:
    """Refuse nested tensors, which would not reach the checks."""
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, Tensor) and argument.is_nested:
            name = name.removesuffix("_tensor")
            raise RuntimeError(f"{name} must be a dense tensor, got a nested one")


def _refuse_forward_mode(arguments: tuple[Any, ...]) -> None:
    """Refuse a forward-mode derivative: there is none, and PyTorch would take it for zero."""
    if any(
        forward_ad.unpack_dual(argument).tangent is not None
        for argument in arguments
        if isinstance(argument, Tensor)
    ):
        raise NotImplementedError(
            "msda has no forward-mode derivative; use the functions of msda.reference for it"
        )


def _differentiable(name: str, save_inputs: Any, backward: Any) -> Callable[..., Any]:
    """Give an operator its derivative; return a function that calls it by the shortest way."""
    operator = getattr(torch.ops.msda, name).default
    if not _INTERNALS:
        torch.library.register_autograd(f"msda::{name}", backward, setup_context=save_inputs)
        return operator

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            save_inputs(ctx, inputs, output)
            return output

    class DerivativeInTransform(torch.autograd.function._SingleLevelFunction):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            # The transforms around this one see the call next, and differentiate it too.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return Derivative.forward(ctx, *inputs)

    Derivative.backward = DerivativeInTransform.backward = staticmethod(backward)  # type: ignore[method-assign]

    names = argument_names(name)

    def at_autograd(*arguments: Any) -> Any:
        _refuse_nested(names, arguments)
        _refuse_forward_mode(arguments)
        if not _wants_graph(arguments):
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*arguments)
        if torch._C._functorch.peek_interpreter_stack() is None:
            return Derivative.apply(*arguments)
        with torch._functorch.utils.enable_single_level_autograd_function():
            return DerivativeInTransform.apply(*arguments)  # type: ignore[attr-defined]

    _REGISTRATIONS.impl(name, at_autograd, "Autograd")

    def call(*arguments: Any) -> Any:
        if not _is_plain(arguments):
            return operator(*arguments)
        if _wants_graph(arguments):
            return Derivative.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


# ---- vmap ----------------------------------------------------------------------------------------


def _register_vmap(name: str) -> None:
    """Let vmap make one call of many: its axis becomes a part of the batch."""
    operator = getattr(torch.ops.msda, name).default
    names = argument_names(name)

    def rule(info: Any, axes: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
        def fold(name: str, argument: Any, axis: Any) -> Any:
            if not isinstance(argument, Tensor):
                return argument
            if name in ("spatial_shapes_tensor", "level_start_index"):
                if axis is not None:
                    raise RuntimeError(
                        f"{name.removesuffix('_tensor')} must be the same for all calls that vmap "
                        f"makes one of, got a tensor that differs along axis {axis}"
                    )
                return argument
            if axis is None:
                argument, axis = argument.expand(info.batch_size, *argument.shape), 0
            return argument.movedim(axis, 0).flatten(0, 1)

        def unfold(output: Tensor) -> Tensor:
            return output.unflatten(0, (info.batch_size, -1))

        outputs = operator(*map(fold, names, arguments, axes))
        if isinstance(outputs, Tensor):
            return unfold(outputs), 0
        # A gradient that nobody wants has one axis, of length 0.
        wanted = [gradient.dim() > 1 for gradient in outputs]
        return (
            tuple(unfold(g) if w else g for g, w in zip(outputs, wanted, strict=True)),
            tuple(0 if w else None for w in wanted),
        )

    torch.library.register_vmap(f"msda::{name}", rule)


# ---- registration --------------------------------------------------------------------------------


def _register(name: str, by_reference: Callable[..., Tensor]) -> tuple[Any, Any]:
    """Add Python's half to an operator and its backward; return what calls each."""
    for each in (name, _backward_name(name)):
        _register_fake(each)
        _register_vmap(each)
    backward = _differentiable(_backward_name(name), *_second_derivative(name, by_reference))
    return _differentiable(name, *_first_derivative(name, backward)), backward


if LIBRARY is not None:
    _REGISTRATIONS = torch.library.Library("msda", "FRAGMENT")
    ms_deform_attn, ms_deform_attn_backward = _register("ms_deform_attn", plain_by_reference)
    ms_deform_attn_fused, ms_deform_attn_fused_backward = _register(
        "ms_deform_attn_fused", fused_by_reference
    )
