"""Results against float64: what every timed call is held to before it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from msda.testing import (
    TOLERANCES,
    AnyInputs,
    FusedInputs,
    Inputs,
    leaves,
    map_tensors,
    random_like_output,
    reference,
    relative_error,
)

# The gradients that training asks for: reference points are given, not learned.
GRADIENTS = {
    Inputs: ("value", "sampling_locations", "attention_weights"),
    FusedInputs: ("value", "sampling_offsets", "attention_logits"),
}
POINTS = ("sampling_locations", "sampling_offsets")

Core = Callable[[Any], Tensor]  # computes the operator: inputs, plain or fused, to (B, Q, M * D)
Limits = Callable[[str], float]  # how far a result may be from the right one, by its name

# Where a coordinate is rounded across the edge of a cell, the gradient of that location is the
# other cell's: 9e-4 in all with plain float32 coordinates, 3e-3 where one of only 125 000 does.
POINTS_LIMIT = 5e-3

# What is allowed to baselines and peers, against the same float64 result. float32: coordinates of
# some hundred pixels in plain float32 arithmetic. 16 bits: most round the coordinates too, on maps
# of 200 pixels by up to 0.16 pixels in float16 and 1.7 in bfloat16. Our values are noise from pixel
# to pixel, so this alone makes 0.03 to 0.08 and 0.3 to 0.9 of the output, and 0.3 and 1.1 of the
# gradients of locations. What is still refused are zeros (1) and another's numbers (1.4); that a
# peer is called rightly shows in float32.
PEER_LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 0.3,
    torch.bfloat16: 0.9,
}
PEER_POINTS_LIMITS = {
    torch.float64: 1e-10,
    torch.float32: 2e-2,
    torch.float16: 0.6,
    torch.bfloat16: 1.8,
}


def queries_at_once(inputs: AnyInputs, budget: float) -> int:
    """How many queries the float64 reference may take at once to stay below ``budget`` bytes."""
    batch, _, num_heads, head_dim = inputs.value.shape
    weights = inputs.tensors()[-1]
    samples = weights.shape[3:].numel()
    # The samples themselves, their products with the weights, and both again in backward.
    per_query = 8 * 6 * batch * num_heads * samples * (head_dim + 8)
    return max(1, int(budget / max(per_query, 1)))


def exact_results(
    inputs: AnyInputs, grad_output: Tensor, *, budget: float = 1e9, **options: object
) -> dict[str, Tensor]:
    """Output and gradients by the float64 reference, on the device of ``inputs``.

    Queries are handled in chunks, so that beyond the results no more than about ``budget`` bytes
    are needed at once.

    Returns:
        "output" (B, Q, M * D) and, by the names of ``GRADIENTS``, each gradient.
    """
    names = GRADIENTS[type(inputs)]
    exact = leaves(map_tensors(inputs, lambda tensor: tensor.detach().double()), names)
    per_query = [
        name
        for name, tensor in vars(exact).items()
        if isinstance(tensor, Tensor) and name not in ("value", "padding_mask")
    ]
    num_queries = grad_output.shape[1]
    step = queries_at_once(inputs, budget)
    outputs = [grad_output.new_zeros((*grad_output.shape[:1], 0, grad_output.shape[2])).double()]
    for start in range(0, num_queries, step):
        rows = slice(start, start + step)
        part = replace(exact, **{name: getattr(exact, name)[:, rows] for name in per_query})
        output = reference(part, **options)
        output.backward(grad_output[:, rows].double())
        outputs.append(output.detach())
    results = {"output": torch.cat(outputs, 1)}
    for name in names:
        tensor = getattr(exact, name)
        results[name] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return results


def results_of(core: Core, inputs: AnyInputs, grad_output: Tensor | None) -> dict[str, Tensor]:
    """Output and, where ``grad_output`` is given, gradients of a function under test."""
    if grad_output is None:
        with torch.no_grad():
            return {"output": core(inputs)}
    names = GRADIENTS[type(inputs)]
    inputs = leaves(inputs, names)
    output = core(inputs)
    tensors = [getattr(inputs, name) for name in names]
    gradients = torch.autograd.grad(output, tensors, grad_output.to(output.dtype))
    return {"output": output.detach(), **dict(zip(names, gradients, strict=True))}


def errors_of(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """The relative error of each result, in the Euclidean norm."""
    for name, tensor in actual.items():
        if tensor.shape != expected[name].shape:
            wanted, got = tuple(expected[name].shape), tuple(tensor.shape)
            raise ValueError(f"{_title(name)} must have shape {wanted}, got {got}")
    return {name: relative_error(tensor, expected[name]) for name, tensor in actual.items()}


def our_limits(dtype: torch.dtype) -> Limits:
    """What our own results may differ by, for values of ``dtype``."""
    limit = 5 * TOLERANCES[dtype]
    return lambda name: max(limit, POINTS_LIMIT) if name in POINTS else limit


def peer_limits(dtype: torch.dtype) -> Limits:
    """What the results of baselines and peers may differ by."""
    return lambda name: (PEER_POINTS_LIMITS if name in POINTS else PEER_LIMITS)[dtype]


def complaint(errors: Mapping[str, float], limits: Limits) -> str | None:
    """The first result that differs by more than its limit, in words; None where none does."""
    for name, error in errors.items():
        if not error <= limits(name):  # NaN is more
            return f"{_title(name)} must differ by at most {limits(name):.1e}, got {error:.1e}"
    return None


def require(errors: Mapping[str, float], limits: Limits, what: str = "") -> None:
    """Refuse, by an AssertionError, results that differ by more than their limits."""
    wrong = complaint(errors, limits)
    assert wrong is None, f"{what}: {wrong}" if what else wrong


def require_agreement(one: Core, other: Core, inputs: Inputs | FusedInputs) -> None:
    """Refuse two functions whose outputs or gradients differ by more than our own limits."""
    grad_output = random_like_output(inputs)
    results = [results_of(core, inputs, grad_output) for core in (one, other)]
    require(errors_of(*results), our_limits(inputs.value.dtype))


def _title(name: str) -> str:
    """A gradient is called after its argument; what is not an argument keeps its name."""
    arguments = {argument for names in GRADIENTS.values() for argument in names}
    return f"grad_{name}" if name in arguments else name
