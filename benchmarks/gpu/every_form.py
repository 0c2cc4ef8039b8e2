"""Run every form of the kernels once on small inputs and compare with float64.

A minute's check after a build (``gpu build``), and what compute-sanitizer watches (``gpu
sanitize``). Every case is a forward and a backward call. Prints a line per case; exit status 0: all
right. ``python -m benchmarks.gpu.every_form --device cpu`` tries it without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.accuracy import GRADIENTS, complaint, errors_of, exact_results, our_limits
from msda.testing import (
    FusedInputs,
    Inputs,
    make_fused_inputs,
    make_inputs,
    ours,
    random_like_output,
)

PYRAMID = [(13, 21), (7, 11), (4, 6), (2, 3)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
TWO_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """One call: how its inputs are made, and what is done to them."""

    name: str
    make: Callable[..., Any]
    sizes: dict[str, Any]
    dtypes: tuple[torch.dtype, ...] = TWO_DTYPES
    change: Callable[[Any], Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the call
    shapes: Callable[[list, str], Any] | None = None  # how spatial shapes are passed
    only: tuple[str, ...] | None = None  # the gradients asked for; default: all
    deterministic: bool = False


def cases() -> Iterator[Case]:
    """Every form, the most used first."""
    some = dict(spatial_shapes=PYRAMID, batch=2, num_queries=9)
    encoder = dict(spatial_shapes=PYRAMID, batch=2)
    yield Case("encoder", make_inputs, encoder | {"locations": "local"}, DTYPES)
    yield Case("fused encoder", make_fused_inputs, encoder, DTYPES)
    yield Case("decoder", make_inputs, some, DTYPES)
    yield Case("fused decoder", make_fused_inputs, some, DTYPES)
    yield Case("boxes, padding", make_fused_inputs, some | _boxes() | {"padding": True}, DTYPES)
    for head_dim in (30, 71, 1, 3, 8, 16, 64, 128, 130):
        sizes = some | dict(num_heads=3, head_dim=head_dim)
        yield Case(f"D = {head_dim}", make_inputs, sizes, DTYPES)
        yield Case(f"fused, D = {head_dim}", make_fused_inputs, sizes | {"padding": True})
    yield Case("nearest", make_inputs, some, DTYPES, options={"interpolation": "nearest"})
    yield Case("fused encoder, padding", make_fused_inputs, encoder | {"padding": True})
    yield Case("shared point", make_fused_inputs, some | {"shared_reference": True})
    yield Case("shared box", make_fused_inputs, some | _boxes() | {"shared_reference": True})
    for dtype in (torch.int64, torch.int32):
        name = f"shapes as a tensor of {str(dtype).removeprefix('torch.')}"
        yield Case(name, make_inputs, encoder, shapes=_shapes_as(dtype))
        yield Case("fused, " + name, make_fused_inputs, some, shapes=_shapes_as(dtype))
    for counts in ([3, 6, 3, 1], [2, 0, 1, 4]):
        ragged = some | dict(num_points=counts)
        yield Case(f"points {counts}", make_inputs, ragged)
        yield Case(f"fused, points {counts}", make_fused_inputs, ragged)
    yield Case("forty samples", make_inputs, dict(some, spatial_shapes=_FIVE, num_points=8))
    yield Case("300 samples", make_inputs, some | dict(num_points=75))
    yield Case("one pixel", make_inputs, dict(spatial_shapes=[(1, 1)], num_queries=70))
    yield Case("thin maps", make_inputs, dict(spatial_shapes=[(1, 13), (11, 1)], num_queries=5))
    yield Case("16 heads of 16", make_inputs, dict(_ONE_LEVEL, num_heads=16, head_dim=16))
    yield Case("one head", make_inputs, dict(_ONE_LEVEL, num_heads=1))
    yield Case("batch of 7", make_inputs, some | dict(batch=7, num_queries=1, num_heads=5))
    yield Case("far outside and NaN", make_inputs, some, change=_far_outside)
    yield Case("not contiguous", make_inputs, some, change=_not_contiguous)
    yield Case("offset by one element", make_inputs, some, DTYPES, change=_offset)
    for make in (make_inputs, make_fused_inputs):
        kind = Inputs if make is make_inputs else FusedInputs
        form = "" if make is make_inputs else "fused, "
        for name in GRADIENTS[kind]:
            yield Case(f"{form}only grad_{name}", make, some, only=(name,))
        yield Case(f"{form}deterministic", make, encoder, DTYPES, deterministic=True)
        yield Case(f"{form}16-bit points", make, some | {"point_dtype": torch.float16})
        yield Case(f"{form}no queries", make, some | {"num_queries": 0})
        yield Case(f"{form}no batch", make, some | {"batch": 0})


_FIVE = [(8, 6), (7, 5), (4, 4), (3, 2), (1, 1)]
_ONE_LEVEL = dict(spatial_shapes=[(9, 10)], batch=2, num_queries=37, num_points=2)


def _boxes() -> dict[str, int]:
    return {"reference_size": 4}


def _shapes_as(dtype: torch.dtype) -> Callable[[list, str], Tensor]:
    return lambda shapes, device: torch.tensor(shapes, dtype=dtype, device=device)


def _far_outside(inputs: Inputs) -> Inputs:
    locations = inputs.sampling_locations.clone()
    locations[:, ::3, ::2, 0, 0] = float("nan")
    locations[:, 1::3, ::2, 1, 1] = 1e30
    locations[:, 2::3, ::2, 2, 2, 0] = -float("inf")
    return replace(inputs, sampling_locations=locations)


def _not_contiguous(inputs: Inputs) -> Inputs:
    value, locations, weights = inputs.tensors()
    return replace(
        inputs,
        value=value.transpose(1, 2).contiguous().transpose(1, 2),
        sampling_locations=locations.flip(1).flip(1).transpose(1, 2).contiguous().transpose(1, 2),
        attention_weights=torch.stack([weights, weights], -1)[..., 0],
    )


def _offset(inputs: Inputs) -> Inputs:
    """Every tensor one element behind where its memory begins: not aligned to 16 bytes."""

    def shifted(tensor: Tensor) -> Tensor:
        memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
        view = memory[1:].view(tensor.shape)
        view.copy_(tensor)
        return view

    tensors = {name: shifted(getattr(inputs, name)) for name in GRADIENTS[Inputs]}
    return replace(inputs, **tensors)


def call(case: Case, inputs: Any, device: str) -> Tensor:
    """Our operator on the inputs of a case."""
    if case.shapes is not None:
        inputs = replace(inputs, spatial_shapes=case.shapes(inputs.spatial_shapes, device))
    return ours(inputs, **case.options)


def check(case: Case, dtype: torch.dtype, device: str) -> str | None:
    """Run one case: what is wrong about it, or None."""
    given = case.make(**case.sizes, dtype=dtype, device=device)
    if case.change is not None:
        given = case.change(given)
    names = case.only or GRADIENTS[type(given)]
    # As they are, and not as copies of them: views stay views.
    inputs = replace(given, **{name: getattr(given, name).detach() for name in names})
    for name in names:
        getattr(inputs, name).requires_grad_()
    torch.use_deterministic_algorithms(case.deterministic)
    try:
        output = call(case, inputs, device)
        grad_output = random_like_output(inputs)
        tensors = [getattr(inputs, name) for name in names]
        gradients = torch.autograd.grad(output, tensors, grad_output, allow_unused=True)
    finally:
        torch.use_deterministic_algorithms(False)
    results = {"output": output.detach().cpu()}
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is not None:
            results[name] = gradient.cpu()

    on_cpu = {
        name: tensor.detach().cpu()
        for name, tensor in vars(inputs).items()
        if isinstance(tensor, Tensor)
    }
    exact = exact_results(replace(inputs, **on_cpu), grad_output.cpu(), **case.options)

    def limit(name: str) -> float:
        return max(our_limits(dtype)(name), our_limits(results[name].dtype)(name))

    wrong = complaint(errors_of(results, exact), limit)
    missing = [name for name in names if name not in results]
    if wrong is None and missing and "interpolation" not in case.options:
        return f"grad_{missing[0]} must be computed, got None"
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--brief", action="store_true", help="say nothing of cases that are right")
    parser.add_argument("--limit", type=int, help="stop after so many cases")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("every_form: a CUDA device must be present, got none")
    every = [(case, dtype) for case in cases() for dtype in case.dtypes][: options.limit]
    print(f"{len(every)} cases", flush=True)
    failed = 0
    for number, (case, dtype) in enumerate(every, 1):
        try:
            wrong = check(case, dtype, options.device)
        except Exception as error:  # of any kind: the next case may still say something
            wrong = f"{type(error).__name__}: {error}"
        failed += wrong is not None
        name = str(dtype).removeprefix("torch.")
        if options.brief and wrong is None:
            continue
        print(f"case {number}: {name}, {case.name}: {wrong or 'right'}", flush=True)
    print(f"{len(every) - failed} of {len(every)} cases right")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
