"""Other implementations of the operator, found by name or file and called through one face.

A peer is named by anything that can be imported (``mmcv._ext``), by a Python file, or by a compiled
library. Its contents tell which kind it is:

- ``ms_deform_attn_forward`` and ``ms_deform_attn_backward``: the original compiled operator and its
  copies (Grounding DINO, detrex, the Hugging Face hub kernel; mmcv, whose backward fills gradients
  that it is handed), as a Python module or as a library of torch operators;
- ``triton_multiscale_deformable_attention``: msda-triton;
- a ``MultiScaleDeformableAttention`` layer: transformers;
- ``FlashDeformAttnFunction``: DCNv4, which takes logits and is therefore compared as a fused one.

A peer that is missing, does not run here, or computes something else is listed with the reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.accuracy import complaint, errors_of, exact_results, peer_limits, results_of
from benchmarks.common.baselines import after_prologue, prologue
from benchmarks.common.harness import ROOT, python_call
from msda.testing import FusedInputs, Inputs, make_fused_inputs, map_tensors, random_like_output

# Looked for where no other is named: label, and what to import.
KNOWN = {
    "original": "MultiScaleDeformableAttention",
    "mmcv": "mmcv._ext",
    "groundingdino": "groundingdino._C",
    "detrex": "detrex._C",
    "msda-triton": "msda_triton",
    "DCNv4": "DCNv4",
    "transformers": "transformers.models.deformable_detr.modeling_deformable_detr",
}
IM2COL_STEP = 64  # the original's default; images that one of its launches handles


class PeerError(Exception):
    """Why a peer is not compared."""


@dataclass(frozen=True)
class Peer:
    """One implementation. Each function is None where it has no such form."""

    name: str
    kind: str
    plain: Callable[[Inputs], Tensor] | None
    fused: Callable[[FusedInputs], Tensor] | None
    what: str = ""  # it is named by


# ---- finding -------------------------------------------------------------------------------------


def split_label(what: str) -> tuple[str, str]:
    """``LABEL=NAME`` or ``NAME`` into (label, name)."""
    label, equals, name = what.partition("=")
    if equals:
        return label, name
    return (Path(what).name.split(".")[0] if is_file(what) else what), what


def is_file(what: str) -> bool:
    """Whether a peer is named by a file and not by what can be imported."""
    return "/" in what or what.endswith((".py", ".so", ".pyd", ".dylib"))


def load(what: str) -> Any:
    """Import a peer's module, or load its file."""
    if not is_file(what):
        try:
            return importlib.import_module(what)
        except Exception as error:  # whatever a stranger's import raises
            raise PeerError(f"importing it failed: {in_a_line(error)}") from error
    path = Path(what)
    if not path.exists():
        raise PeerError(f"there is no file {what}")
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    stem = path.parent.name if folder else path.name.split(".")[0]
    # A compiled module's name must be that of its file: its entry point is called after it.
    specification = importlib.util.spec_from_file_location(
        stem, path, submodule_search_locations=folder
    )
    if specification is None or specification.loader is None:
        raise PeerError(f"{what} is neither a Python file nor a compiled library")
    try:
        module = importlib.util.module_from_spec(specification)
        if folder:
            sys.modules[stem] = module  # for its relative imports
        specification.loader.exec_module(module)
        return module
    except ImportError as error:
        if "PyInit" not in str(error) and "init function" not in str(error):
            raise PeerError(f"loading it failed: {in_a_line(error)}") from error
        return load_operators(path)
    except Exception as error:
        raise PeerError(f"loading it failed: {in_a_line(error)}") from error


def load_operators(path: Path) -> Any:
    """Load a library of torch operators; what it registers, as a namespace of functions."""

    def registered() -> set[str]:
        return {schema.name for schema in torch._C._jit_get_all_schemas()}

    before = registered()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise PeerError(f"loading it failed: {in_a_line(error)}") from error
    functions = {}
    for qualified in registered() - before:
        namespace, name = qualified.split("::")
        functions[name] = getattr(getattr(torch.ops, namespace), name)
    return SimpleNamespace(**functions)


def recognise(label: str, module: Any) -> Peer:
    """Make a peer of a module by what it holds."""
    for holder in _holders(module):
        if hasattr(holder, "ms_deform_attn_forward") and hasattr(holder, "ms_deform_attn_backward"):
            core = CompiledCore(holder.ms_deform_attn_forward, holder.ms_deform_attn_backward)
            return Peer(label, "compiled", core, after_prologue(core))
        if hasattr(holder, "triton_multiscale_deformable_attention"):
            core = triton_core(holder.triton_multiscale_deformable_attention)
            return Peer(label, "Triton", core, after_prologue(core))
        if hasattr(holder, "FlashDeformAttnFunction"):
            return Peer(label, "flash", None, flash_core(holder.FlashDeformAttnFunction))
        layer = getattr(holder, "MultiScaleDeformableAttention", None)
        if inspect.isclass(layer) and issubclass(layer, nn.Module):
            core = layer_core(layer)
            return Peer(label, "layer", core, after_prologue(core))
    raise PeerError("it holds no operator that is known here")


def _holders(module: Any) -> list[Any]:
    """A module and those of its submodules in which peers keep their functions."""
    names = ("frontend", "torch_frontend", "autograd_function", "functions", "ops")
    holders = [module]
    for name in names:
        holder = getattr(module, name, None)
        if holder is None and hasattr(module, "__path__"):
            try:
                holder = importlib.import_module(f"{module.__name__}.{name}")
            except Exception:  # it has none, or one that does not import
                continue
        if holder is not None:
            holders.append(holder)
    return holders


# ---- calling -------------------------------------------------------------------------------------


@functools.cache
def shapes_tensors(
    shapes: tuple[tuple[int, int], ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(L, 2) heights and widths, and (L,) first rows. Made once: the copy to a GPU takes time."""
    table = torch.tensor(shapes, device=device)
    sizes = table.prod(1)
    return table, sizes.cumsum(0) - sizes


def tables_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Shapes and start indices as tensors on the device of ``inputs``."""
    return shapes_tensors(tuple(inputs.spatial_shapes), inputs.value.device)


def in_value_dtype(inputs: Inputs) -> Inputs:
    """Locations and weights in the dtype of value, as most peers demand."""
    return map_tensors(inputs, lambda tensor: tensor.to(inputs.value.dtype))


class CompiledCore:
    """The original's pair of compiled functions, under autograd as all its libraries put it."""

    def __init__(self, forward: Callable[..., Tensor], backward: Callable[..., Any]) -> None:
        self.forward = forward
        self.backward = backward
        self.fills_gradients: bool | None = None  # mmcv's convention; known after the first call

    def __call__(self, inputs: Inputs) -> Tensor:
        """(B, Q, M * D)."""
        inputs = in_value_dtype(inputs)
        return _CompiledFunction.apply(self, *tables_of(inputs), *inputs.tensors())

    def gradients(self, arguments: Sequence[Tensor], grad_output: Tensor, step: int) -> Any:
        """Of value, locations and weights, by whichever convention the backward function has."""
        if not self.fills_gradients:
            try:
                gradients = self.backward(*arguments, grad_output, step)
                self.fills_gradients = False
                return gradients
            except TypeError:
                if self.fills_gradients is False:
                    raise
        value, _, _, locations, weights = arguments
        gradients = [torch.zeros_like(tensor) for tensor in (value, locations, weights)]
        self.backward(*arguments, grad_output, *gradients, im2col_step=step)
        self.fills_gradients = True
        return gradients


class _CompiledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, core, shapes, start_index, value, locations, weights):
        ctx.core, ctx.step = core, min(IM2COL_STEP, value.shape[0])
        arguments = (value, shapes, start_index, locations, weights)
        ctx.save_for_backward(*arguments)
        # By position: the copies differ in the names of their parameters.
        return core.forward(*arguments, ctx.step)

    @staticmethod
    def backward(ctx, grad_output):
        grad_output = grad_output.contiguous()
        gradients = ctx.core.gradients(ctx.saved_tensors, grad_output, ctx.step)
        return None, None, None, *gradients


def triton_core(function: Callable[..., Tensor]) -> Callable[[Inputs], Tensor]:
    """msda-triton's function; not its wrapper, which hides errors by falling back to PyTorch."""
    options = {"padding_mode": "zeros", "align_corners": False}
    known = inspect.signature(function).parameters
    options = {name: option for name, option in options.items() if name in known}

    def core(inputs: Inputs) -> Tensor:
        value, locations, weights = in_value_dtype(inputs).tensors()
        return function(value, tables_of(inputs)[0], locations, weights, **options).flatten(2)

    return core


def layer_core(layer: type[nn.Module]) -> Callable[[Inputs], Tensor]:
    """Transformers' layer without parameters, which takes shapes as a list too."""
    if "value_spatial_shapes_list" not in inspect.signature(layer.forward).parameters:
        raise PeerError("its layer projects its inputs: no operator to compare with")
    instance = layer()

    def core(inputs: Inputs) -> Tensor:
        value, locations, weights = in_value_dtype(inputs).tensors()
        shapes, start_index = tables_of(inputs)
        return instance(
            value=value,
            value_spatial_shapes=shapes,
            value_spatial_shapes_list=inputs.spatial_shapes,
            level_start_index=start_index,
            sampling_locations=locations,
            attention_weights=weights,
            im2col_step=IM2COL_STEP,
        )

    return core


def flash_core(function: type[torch.autograd.Function]) -> Callable[[FusedInputs], Tensor]:
    """DCNv4's operator: locations by PyTorch, softmax inside, all in the dtype of value."""

    def core(inputs: FusedInputs) -> Tensor:
        plain = prologue(inputs)
        num_points = plain.sampling_locations.shape[4]
        locations = plain.sampling_locations.flatten(3).to(inputs.value.dtype)
        logits = inputs.attention_logits.flatten(3).to(inputs.value.dtype)
        both = torch.cat([locations, logits], -1)
        step = min(IM2COL_STEP, inputs.value.shape[0])
        return function.apply(inputs.value, *tables_of(plain), both, step, num_points)

    return core


# ---- checking ------------------------------------------------------------------------------------


def check(peer: Peer, device: str) -> None:
    """Run a peer forward and backward on a small problem in float32, or else float16.

    Raises:
        PeerError: it fails, or its results differ from float64 by more than allowed.
    """
    failures = []
    for dtype in (torch.float32, torch.float16):
        inputs: Any = make_fused_inputs(
            [(12, 20), (6, 10)], batch=2, num_queries=37, dtype=dtype, device=device
        )
        core: Any = peer.fused
        if peer.plain is not None:
            core, inputs = peer.plain, prologue(inputs)
        grad_output = random_like_output(inputs)
        try:
            results = results_of(core, inputs, grad_output)
        except Exception as error:  # whatever a stranger's code raises
            failures.append(f"{dtype}: {in_a_line(error)}".removeprefix("torch."))
            continue
        try:
            errors = errors_of(results, exact_results(inputs, grad_output))
            wrong = complaint(errors, peer_limits(dtype))
        except ValueError as error:
            wrong = str(error)
        if wrong is None:
            return
        raise PeerError(wrong)
    raise PeerError("; ".join(failures))


def find(label: str, what: str, device: str) -> Peer:
    """Load, recognise and check a peer.

    Raises:
        PeerError: why it cannot be compared.
    """
    if is_file(what) or _is_installed(what):
        _try_in_another_process(what, device)
    else:
        raise PeerError("not installed")
    return replace(recognise(label, load(what)), what=what)


def find_named(wanted: Sequence[str], device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that compute the operator here; and the reason for each other one.

    Args:
        wanted: each the label of a known one or ``[LABEL=]WHAT``; none: all known. "none": no peer.
        device: "cpu" or "cuda".
    """
    found, missing = [], {}
    for one in wanted or KNOWN:
        if one == "none":
            continue
        label, what = (one, KNOWN[one]) if one in KNOWN else split_label(one)
        try:
            found.append(find(label, what, device))
        except PeerError as error:
            missing[label] = str(error)
    return found, missing


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name.split(".")[0]) is not None
    except (ImportError, ValueError):
        return False


def _try_in_another_process(what: str, device: str, limit: float = 120) -> None:
    """Check a peer where a crash, or an error that a GPU does not recover from, harms nobody."""
    place = Path(what).resolve() if is_file(what) else what
    command = python_call("benchmarks.common.peers", "check_named", place, device)
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        raise PeerError(f"it did not finish a small problem within {limit:.0f} s") from None
    if done.returncode == 1 and done.stdout.strip():
        raise PeerError(done.stdout.strip().splitlines()[-1])
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PeerError(f"its process ended with status {done.returncode}: {last}")


def check_named(what: str, device: str) -> None:
    """End this process with the reason, printed, and status 1 where a peer cannot be compared."""
    try:
        check(recognise(what, load(what)), device)
    except PeerError as error:
        print(error)
        sys.exit(1)


def in_a_line(error: BaseException) -> str:
    """An error as the reason why a peer is not compared."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
