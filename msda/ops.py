"""The operator's Python half, in reading order: load, fake kernels, backward, autograd, vmap."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from itertools import compress
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
    """What one of the library's C functions without arguments answers."""
    assert LIBRARY is not None
    call = getattr(LIBRARY, function)
    call.restype = ctypes.c_char_p
    answer = call()
    return None if answer is None else answer.decode()


def _mend() -> str | None:
    """What to type for what this build lacks; the library's errors end with it."""
    has_cuda_kernels = LIBRARY is not None and bool(library_text("msda_cuda_architectures"))
    text = remedy(LIBRARY is not None, has_cuda_kernels)
    if LIBRARY is not None and text is not None:
        LIBRARY.msda_set_cuda_remedy(text.encode())
    return text


REMEDY = _mend()


# ---- fake kernels: shapes without data -----------------------------------------------------------


# By the flag that asks for it, the input whose gradient a backward operator computes.
_WANTED = {
    "needs_value": "value",
    "needs_locations": "sampling_locations",
    "needs_weights": "attention_weights",
    "needs_reference": "reference_points",
    "needs_offsets": "sampling_offsets",
    "needs_logits": "attention_logits",
}


def _register_fake(name: str) -> None:
    names = _argument_names(name)

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


def _argument_names(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.msda, name).default._schema.arguments]


# ---- backward ------------------------------------------------------------------------------------


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, shapes, shapes_tensor, start_index, locations, weights, num_points, nearest = inputs
    ctx.save_for_backward(value, shapes_tensor, start_index, locations, weights)
    ctx.spatial_shapes = shapes
    ctx.num_points = num_points
    ctx.nearest = nearest


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, shapes_tensor, start_index, locations, weights = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_value, grad_locations, grad_weights = _ms_deform_attn_backward(
        grad_output,
        value,
        ctx.spatial_shapes,
        shapes_tensor,
        start_index,
        locations,
        weights,
        ctx.num_points,
        ctx.nearest,
        needs[0],
        needs[4],
        needs[5],
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if needs[0] else None,
        None,  # spatial_shapes
        None,  # spatial_shapes_tensor
        None,  # level_start_index
        grad_locations if needs[4] else None,
        grad_weights if needs[5] else None,
        None,  # num_points
        None,  # nearest
    )


def _save_fused_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, shapes, shapes_tensor, start_index, reference, offsets, logits, num_points, mask = inputs
    kept = None if value.device.type == "cpu" else output  # the CPU's backward does not read it
    ctx.save_for_backward(kept, value, shapes_tensor, start_index, reference, offsets, logits, mask)
    ctx.spatial_shapes = shapes
    ctx.num_points = num_points


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    output, value, shapes_tensor, start_index, reference, offsets, logits, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    grad_value, grad_reference, grad_offsets, grad_logits = _ms_deform_attn_fused_backward(
        grad_output,
        output,
        value,
        ctx.spatial_shapes,
        shapes_tensor,
        start_index,
        reference,
        offsets,
        logits,
        ctx.num_points,
        mask,
        needs[0],
        needs[4],
        needs[5],
        needs[6],
        torch.are_deterministic_algorithms_enabled(),
    )
    return (
        grad_value if needs[0] else None,
        None,  # spatial_shapes
        None,  # spatial_shapes_tensor
        None,  # level_start_index
        grad_reference if needs[4] else None,
        grad_offsets if needs[5] else None,
        grad_logits if needs[6] else None,
        None,  # num_points
        None,  # padding_mask
    )


# ---- backward of the backward --------------------------------------------------------------------

# Slow and exact: the reference is differentiated twice, once somebody asks for it.


def _second_derivative(
    reference: Callable[..., Tensor],
    tensors: list[Tensor],
    grad_output: Tensor,
    wanted: tuple[bool, ...],
    grads: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Differentiate the gradients that a backward operator computed.

    Args:
        reference: what the forward operator computes from ``tensors``.
        tensors: what the backward operator can differentiate by.
        grad_output: (B, Q, M * D) what it was given.
        wanted: which of its gradients it computed.
        grads: gradients by its gradients.

    Returns:
        Gradients by ``grad_output`` and by each of ``tensors``.
    """

    def first(grad_output: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        pull_back = torch.func.vjp(reference, *tensors)[1]
        return tuple(compress(pull_back(grad_output), wanted))

    pull_back = torch.func.vjp(first, grad_output, *tensors)[1]
    return pull_back(tuple(compress(grads, wanted)))


def as_given(
    shapes: list[int], shapes_tensor: Tensor | None, num_points: list[int]
) -> tuple[SpatialShapes, list[int] | None]:
    """Shapes and counts of points as the reference takes them."""
    pairs = list(zip(shapes[::2], shapes[1::2], strict=True))
    return pairs if shapes_tensor is None else shapes_tensor, num_points or None


def _save_backward_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    grad_output, value, shapes, shapes_tensor, _, locations, weights, *options = inputs
    ctx.save_for_backward(grad_output, value, locations, weights, shapes_tensor)
    ctx.spatial_shapes = shapes
    ctx.num_points, ctx.nearest, *needs = options
    ctx.wanted = tuple(needs[:3])


def _double_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, *tensors, shapes_tensor = ctx.saved_tensors
    shapes, counts = as_given(ctx.spatial_shapes, shapes_tensor, ctx.num_points)

    def reference(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn_reference(
            value,
            shapes,
            None,
            locations,
            weights,
            num_points=counts,
            interpolation="nearest" if ctx.nearest else "bilinear",
        )

    by_grad_output, by_value, by_locations, by_weights = _second_derivative(
        reference, tensors, grad_output, ctx.wanted, grads
    )
    return (
        by_grad_output,
        by_value,
        None,  # spatial_shapes
        None,  # spatial_shapes_tensor
        None,  # level_start_index
        by_locations,
        by_weights,
        *[None] * 6,  # num_points, nearest, needs_*, deterministic
    )


def _save_fused_backward_inputs(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]
) -> None:
    grad_output, _, value, shapes, shapes_tensor, _, reference, offsets, logits, *options = inputs
    num_points, mask, *needs = options
    ctx.save_for_backward(grad_output, value, reference, offsets, logits, shapes_tensor, mask)
    ctx.spatial_shapes = shapes
    ctx.num_points = num_points
    ctx.wanted = tuple(needs[:4])


def _double_fused_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    grad_output, *tensors, shapes_tensor, mask = ctx.saved_tensors
    shapes, counts = as_given(ctx.spatial_shapes, shapes_tensor, ctx.num_points)

    def reference(value: Tensor, *points: Tensor) -> Tensor:
        return ms_deform_attn_fused_reference(
            value, shapes, None, *points, num_points=counts, padding_mask=mask
        )

    by_grad_output, by_value, by_reference, by_offsets, by_logits = _second_derivative(
        reference, tensors, grad_output, ctx.wanted, grads
    )
    return (
        by_grad_output,
        None,  # output: its part is in the gradients of what it was computed from
        by_value,
        None,  # spatial_shapes
        None,  # spatial_shapes_tensor
        None,  # level_start_index
        by_reference,
        by_offsets,
        by_logits,
        *[None] * 7,  # num_points, padding_mask, needs_*, deterministic
    )


# ---- autograd ------------------------------------------------------------------------------------

# What torch.library would register for autograd runs in Python for every call, wanted or not, which
# is twice the time of a small problem, and torch.func refuses it. So a plain eager call goes around
# what is registered, and what is registered knows torch.func.

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
    """Whether nobody wants to see the call: no tracer, mode, transform or subclass of Tensor."""
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
    """A nested tensor would not get as far as the checks."""
    for name, argument in zip(names, arguments, strict=False):
        if isinstance(argument, Tensor) and argument.is_nested:
            name = name.removesuffix("_tensor")
            raise RuntimeError(f"{name} must be a dense tensor, got a nested one")


def _refuse_forward_mode(arguments: tuple[Any, ...]) -> None:
    """There is no forward-mode derivative; PyTorch would take it to be zero."""
    if any(
        forward_ad.unpack_dual(argument).tangent is not None
        for argument in arguments
        if isinstance(argument, Tensor)
    ):
        raise NotImplementedError(
            "msda has no forward-mode derivative; use the functions of msda.reference for it"
        )


def _differentiable(name: str, backward: Any, save_inputs: Any) -> Callable[..., Any]:
    """Give an operator its derivative; return what calls it by the shortest way."""
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

    names = _argument_names(name)

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
    """Let vmap make one call of many: the axis that it maps over becomes a part of the batch."""
    operator = getattr(torch.ops.msda, name).default
    names = _argument_names(name)

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


if LIBRARY is not None:
    _REGISTRATIONS = torch.library.Library("msda", "FRAGMENT")
    for _name in (
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "_ms_deform_attn_backward",
        "_ms_deform_attn_fused_backward",
    ):
        _register_fake(_name)
        _register_vmap(_name)
    ms_deform_attn = _differentiable("ms_deform_attn", _backward, _save_inputs)
    ms_deform_attn_fused = _differentiable(
        "ms_deform_attn_fused", _fused_backward, _save_fused_inputs
    )
    _ms_deform_attn_backward = _differentiable(
        "_ms_deform_attn_backward", _double_backward, _save_backward_inputs
    )
    _ms_deform_attn_fused_backward = _differentiable(
        "_ms_deform_attn_fused_backward", _double_fused_backward, _save_fused_backward_inputs
    )
