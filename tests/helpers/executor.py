"""The CUDA kernels on the CPU: the module that CMake builds from tests/cuda/executor, and calls."""

import functools
import importlib.util
import os
import sysconfig
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from msda.testing import FusedInputs, Inputs

ROOT = Path(__file__).resolve().parents[2]
BUILD = Path(os.environ.get("MSDA_BUILD_DIR") or ROOT / "build" / "cmake").resolve()

# "plain", or "sanitized" in a process that was started with sanitized_environment().
VARIANT = os.environ.get("MSDA_CUDA_EXECUTOR_VARIANT", "plain")

ORDERS = ["forward", "reverse", "random"]

# Before and from the compute capability on that adds four numbers in one instruction.
CAPABILITIES = [75, 90]


# ---- the module ----------------------------------------------------------------------------------


def folder(variant):
    return BUILD / "tests" / "cuda" / "executor" / variant


@functools.cache
def load():
    """The module, or a skip that says why there is none."""
    path = folder(VARIANT) / f"_cuda_executor{sysconfig.get_config_var('EXT_SUFFIX')}"
    stamp, missing = path.parent.parent / "stamp", path.parent.parent / "missing"
    if missing.exists():
        pytest.skip(f"the CUDA executor was not built: {missing.read_text()}")
    if not path.exists() or not stamp.exists():
        pytest.skip("the CUDA executor was not built: make test builds it")
    for pattern in ("csrc/*.h", "csrc/cuda/*", "tests/cuda/executor/**/*.*"):
        for source in ROOT.glob(pattern):
            if source.stat().st_mtime > stamp.stat().st_mtime:
                pytest.fail(f"the CUDA executor is older than {source}: make test builds it")
    spec = importlib.util.spec_from_file_location("_cuda_executor", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sanitized_environment():
    """Environment variables of a process that loads the sanitized module; or a skip."""
    load()
    preload = folder("sanitized") / "preload"
    if not preload.exists():
        pytest.skip("the compiler has no library of AddressSanitizer")
    return os.environ | {
        "LD_PRELOAD": preload.read_text(),
        # Python leaks on purpose, and another program would get the same LD_PRELOAD.
        "ASAN_OPTIONS": "detect_leaks=0:external_symbolizer_path=",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "MSDA_CUDA_EXECUTOR_VARIANT": "sanitized",
    }


def make_device(**options):
    return load().Device(**options)


# ---- calls of the kernels ------------------------------------------------------------------------

# What the kernels call our arguments.
NAMES = {
    Inputs: {
        "value": "value",
        "sampling_locations": "points",
        "attention_weights": "weights",
    },
    FusedInputs: {
        "value": "value",
        "reference_points": "reference",
        "sampling_offsets": "points",
        "attention_logits": "weights",
        "padding_mask": "padding_mask",
    },
}


def to_named_array(tensor):
    """A NumPy array and the name of its dtype: NumPy has no bfloat16."""
    name = str(tensor.dtype).removeprefix("torch.")
    tensor = tensor.detach().contiguous()
    return (tensor.view(torch.uint16) if name == "bfloat16" else tensor).numpy(), name


def to_tensor(array, name):
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.view(torch.bfloat16) if name == "bfloat16" else tensor


def _arguments(inputs):
    arrays = {}
    for ours, theirs in NAMES[type(inputs)].items():
        tensor = getattr(inputs, ours)
        if tensor is None:
            continue
        if theirs == "points":
            tensor = tensor.flatten(3, -2)  # (B, Q, M, K, 2)
        elif theirs == "weights":
            tensor = tensor.flatten(3)  # (B, Q, M, K)
        arrays[theirs] = to_named_array(tensor)
    num_points = inputs.num_points
    if num_points is None:
        num_points = [inputs.tensors()[-1].shape[4]] * len(inputs.spatial_shapes)
    return arrays, inputs.spatial_shapes, list(num_points)


def forward(inputs, device=None, **options):
    """The output; ``options`` are those of the module's Options."""
    options = load().Options(**options)
    results = load().forward(device or make_device(), *_arguments(inputs), options)
    return to_tensor(*results["output"])


def backward(inputs, grad_output, names, device=None, output=None, **options):
    """Gradients by the arguments called ``names``; that of value in the type of its sums."""
    arrays, *sizes = _arguments(inputs)
    arrays["grad_output"] = to_named_array(grad_output)
    if isinstance(inputs, FusedInputs):
        arrays["output"] = to_named_array(forward(inputs) if output is None else output)
    theirs = NAMES[type(inputs)]
    wanted = {theirs[name] for name in names}
    options = load().Options(**options)
    results = load().backward(device or make_device(), arrays, *sizes, wanted, options)
    gradients = {}
    for name in names:
        given = getattr(inputs, name)
        gradient = to_tensor(*results[f"grad_{theirs[name]}"]).view(given.shape)
        gradients[name] = gradient if name == "value" else gradient.to(given.dtype)
    return gradients


def gather(inputs, grad_output, device=None, **options):
    """The gradient of value without atomic additions."""
    arrays, *sizes = _arguments(inputs)
    arrays["grad_output"] = to_named_array(grad_output)
    options = load().Options(**options)
    return to_tensor(*load().gather(device or make_device(), arrays, *sizes, options)["grad_value"])


# ---- the operator --------------------------------------------------------------------------------


class Operator(torch.autograd.Function):
    """The operator with the CUDA kernels in its place."""

    # What make_device() takes, and how often forward was called. Tests set them.
    gpu: ClassVar[dict] = {}
    calls: ClassVar[int] = 0

    @staticmethod
    def forward(ctx, make_inputs, options, *tensors):
        Operator.calls += 1
        ctx.inputs, ctx.options = make_inputs(*tensors), options
        ctx.output = forward(ctx.inputs, make_device(**Operator.gpu), **options)
        return ctx.output

    @staticmethod
    def backward(ctx, grad_output):
        tensors = [name for name in NAMES[type(ctx.inputs)] if name != "padding_mask"]
        needed = zip(tensors, ctx.needs_input_grad[2:], strict=True)
        names = [name for name, needs_gradient in needed if needs_gradient]
        gpu = make_device(**Operator.gpu)
        gradients = backward(ctx.inputs, grad_output, names, gpu, ctx.output, **ctx.options)
        if "value" in names:
            summed = gradients["value"]
            gathered = gather(ctx.inputs, grad_output, gpu, **ctx.options)
            scale = gathered.nan_to_num(posinf=0, neginf=0).norm().item() if summed.numel() else 1
            tolerance = 8 * torch.finfo(summed.dtype).eps
            torch.testing.assert_close(
                summed, gathered, rtol=tolerance, atol=tolerance * scale, equal_nan=True
            )
            gradients["value"] = gathered.to(ctx.inputs.value.dtype)
        return None, None, *(gradients.get(name) for name in tensors)


def ms_deform_attn(
    value, shapes, _, locations, weights, *, num_points=None, interpolation="bilinear"
):
    def make_inputs(*tensors):
        return Inputs(tensors[0], shapes, *tensors[1:], num_points)

    options = dict(nearest=interpolation == "nearest")
    return Operator.apply(make_inputs, options, value, locations, weights)


def ms_deform_attn_fused(
    value, shapes, _, reference, offsets, logits, *, num_points=None, padding_mask=None
):
    def make_inputs(*tensors):
        return FusedInputs(tensors[0], shapes, *tensors[1:], num_points, padding_mask)

    return Operator.apply(make_inputs, {}, value, reference, offsets, logits)


OPERATOR = {Inputs: ms_deform_attn, FusedInputs: ms_deform_attn_fused}
