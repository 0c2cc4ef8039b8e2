"""Sides of a comparison: each is checked against float64 before any is timed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from benchmarks.common.accuracy import (
    Core,
    complaint,
    errors_of,
    our_limits,
    peer_limits,
    results_of,
)
from benchmarks.common.timing import Run, call_of, peak_extra_memory

OURS = "msda"


@dataclass(frozen=True)
class Side:
    """One way to compute the operator, and the arguments that its callers would hand it."""

    core: Core
    inputs: Any
    is_ours: bool = False


def check_sides(
    sides: Mapping[str, Side], direction: str, exact: Mapping[str, Tensor], grad_output: Tensor
) -> tuple[dict[str, dict[str, Any]], dict[str, Run]]:
    """Hold the results of each side against float64.

    Returns:
        By side, what a record holds of it: errors and memory, or why it is refused. And the calls
        to time, of the sides that are right.
    """
    backward = direction.endswith("backward")
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for name, side in sides.items():
        dtype, device = side.inputs.value.dtype, side.inputs.value.device.type
        try:
            found = results_of(side.core, side.inputs, grad_output if backward else None)
            errors = errors_of(found, exact)
            wrong = complaint(errors, (our_limits if side.is_ours else peer_limits)(dtype))
            if backward:
                del errors["output"]
            results[name] = {"errors": errors}
            if wrong is not None:
                results[name]["refused"] = wrong
                continue
            run = call_of(direction, side.core, side.inputs)
            results[name]["extra_bytes"] = peak_extra_memory(run, device)
            runs[name] = run
        except Exception as error:  # whatever a stranger's code raises
            if is_device_lost(error):
                raise
            results[name] = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
    return results, runs


def is_device_lost(error: BaseException) -> bool:
    """Whether a GPU refuses everything after this error."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)
