"""The compiled operator's Python half, in reading order: load, fake kernels, backward, autograd."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from msda.checks import check_fused, check_plain

# ---- load ----------------------------------------------------------------------------------------

_SUFFIX = {"darwin": "dylib", "win32": "dll"}.get(sys.platform, "so")
LIBRARY_PATH = Path(__file__).with_name(f"libmsda.{_SUFFIX}")
OLDEST_TORCH = (2, 10)


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The loaded library, or None and the reason why there is none."""
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
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


# ---- fake kernels: shapes without data -----------------------------------------------------------


def _fake_output(value: Tensor, points: Tensor) -> Tensor:
    return value.new_empty(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def _fake_gradient(tensor: Tensor, wanted: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if wanted else (0,))


def _fake_forward(
    value: Tensor,
    spatial_shapes: list[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    nearest: bool,
) -> Tensor:
    check_plain(
        value,
        spatial_shapes,
        spatial_shapes_tensor,
        level_start_index,
        sampling_locations,
        attention_weights,
        num_points,
    )
    return _fake_output(value, sampling_locations)


def _fake_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: list[int],
    nearest: bool,
    needs_value: bool,
    needs_locations: bool,
    needs_weights: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        _fake_gradient(value, needs_value),
        _fake_gradient(sampling_locations, needs_locations),
        _fake_gradient(attention_weights, needs_weights),
    )


def _fake_fused_forward(
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
    check_fused(
        value,
        spatial_shapes,
        spatial_shapes_tensor,
        level_start_index,
        reference_points,
        sampling_offsets,
        attention_logits,
        num_points,
        padding_mask,
    )
    return _fake_output(value, sampling_offsets)


def _fake_fused_backward(
    grad_output: Tensor,
    output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    spatial_shapes_tensor: Tensor | None,
    level_start_index: Tensor | None,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: list[int],
    padding_mask: Tensor | None,
    needs_value: bool,
    needs_reference: bool,
    needs_offsets: bool,
    needs_logits: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _fake_gradient(value, needs_value),
        _fake_gradient(reference_points, needs_reference),
        _fake_gradient(sampling_offsets, needs_offsets),
        _fake_gradient(attention_logits, needs_logits),
    )


# ---- straight to the kernels ---------------------------------------------------------------------

# What torch.library registers for autograd runs in Python for every call, wanted or not: twice the
# time of a small problem. A plain eager call goes around it.

_INTERNALS = (
    hasattr(torch._C, "_AutoDispatchBelowAutograd")
    and hasattr(torch._C, "_get_tracing_state")
    and hasattr(torch._C, "_len_torch_dispatch_stack")
    and hasattr(torch._C, "_len_torch_function_stack")
    and hasattr(torch._C._functorch, "peek_interpreter_stack")
)


def _is_plain(arguments: tuple[Any, ...]) -> bool:
    """Whether nobody wants to see the call: no tracer, mode, transform or subclass of Tensor."""
    return (
        _INTERNALS
        and not torch.compiler.is_compiling()
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


def _call_backward(backward: Any, *arguments: Any) -> tuple[Tensor, ...]:
    """Call a backward operator, by a way that refuses its derivative where one may be asked for."""
    if torch.is_grad_enabled() or not _is_plain(arguments):
        return backward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return backward(*arguments)


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
    backward = torch.ops.msda._ms_deform_attn_backward.default
    grad_value, grad_locations, grad_weights = _call_backward(
        backward,
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
    ctx.save_for_backward(
        output, value, shapes_tensor, start_index, reference, offsets, logits, mask
    )
    ctx.spatial_shapes = shapes
    ctx.num_points = num_points


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    output, value, shapes_tensor, start_index, reference, offsets, logits, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    backward = torch.ops.msda._ms_deform_attn_fused_backward.default
    grad_value, grad_reference, grad_offsets, grad_logits = _call_backward(
        backward,
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


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
    raise RuntimeError(
        "msda cannot differentiate its backward; use the functions of msda.reference "
        "where second derivatives are needed"
    )


# ---- autograd ------------------------------------------------------------------------------------


def _direct(operator: Any, save_inputs: Any, backward: Any) -> Callable[..., Tensor]:
    """What calls an operator by the shortest way, with the derivative that is registered below."""

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                output = operator(*inputs)
            save_inputs(ctx, inputs, output)
            return output

    Direct.backward = staticmethod(backward)  # type: ignore[method-assign]

    def call(*arguments: Any) -> Tensor:
        if not _is_plain(arguments):
            return operator(*arguments)
        if torch.is_grad_enabled() and any(
            isinstance(argument, Tensor) and argument.requires_grad for argument in arguments
        ):
            return Direct.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    return call


if LIBRARY is not None:
    _FORMS = (
        ("msda::ms_deform_attn", _fake_forward, _backward, _save_inputs),
        ("msda::ms_deform_attn_fused", _fake_fused_forward, _fused_backward, _save_fused_inputs),
        ("msda::_ms_deform_attn_backward", _fake_backward, _refuse_double_backward, None),
        (
            "msda::_ms_deform_attn_fused_backward",
            _fake_fused_backward,
            _refuse_double_backward,
            None,
        ),
    )
    for _name, _fake, _grad, _setup in _FORMS:
        torch.library.register_fake(_name, _fake)
        torch.library.register_autograd(_name, _grad, setup_context=_setup)
    ms_deform_attn = _direct(torch.ops.msda.ms_deform_attn.default, _save_inputs, _backward)
    ms_deform_attn_fused = _direct(
        torch.ops.msda.ms_deform_attn_fused.default, _save_fused_inputs, _fused_backward
    )
