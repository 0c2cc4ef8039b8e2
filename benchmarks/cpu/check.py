"""Hold speed on a CPU against the committed ratios; fail where it has got worse.

Compared are ratios within one run, never times: ours against the grid_sample core, the fused call
against the unfused one, 16 bits against 32, a call on one query against an operator of PyTorch's on
as little. Both sides of a ratio run in turn on one thread, and the fastest call of each counts,
because a busy machine only ever adds time. Committed ratios belong to a model of processor and an
instruction set; a machine of which there are none is measured and not judged.

A ratio may be lower than the committed one by ``MARGIN``. One that is lower is measured anew, up to
``ATTEMPTS`` times, and fails if it is lower every time. That is wide enough for a shared machine,
and narrow enough for what this is to notice: a kernel that is no longer vectorised, a copy or a
check that was added to every call.

    python -m benchmarks check                       two minutes
    python -m benchmarks check --thorough            more time for each ratio, half the margin
    python -m benchmarks check --thorough --write    commit what comes as the new ratios
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common.accuracy import require_agreement
from benchmarks.common.baselines import after_prologue
from benchmarks.common.harness import RESULTS, Deadline, Table, write_json
from benchmarks.common.machine import describe_machine, require_kernels
from benchmarks.common.timing import Run, call_of, seconds
from msda.testing import (
    FusedInputs,
    Inputs,
    grid_sample_core,
    leaves,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    ours,
)

COMMITTED = RESULTS / "check.json"
MARGIN = 0.4  # of the committed ratio that may be missing
THOROUGH_MARGIN = 0.2
SECONDS, THOROUGH_SECONDS = 4.0, 15.0  # for each ratio and attempt
ATTEMPTS = 3

# An encoder at half the paper's size: it fits no cache of the first two levels, and is quick.
SHAPES = [(50, 84), (25, 42), (13, 21), (7, 11)]
NUM_QUERIES = 300


@dataclass(frozen=True)
class Pair:
    """The two sides of a ratio: time of ``baseline`` over time of ``ours``."""

    ours: Run
    baseline: Run
    calls: int = 1  # of each in a row, where one is too short for the clock


def encoder(dtype: torch.dtype = torch.float32) -> Inputs:
    return make_inputs(SHAPES, locations="local", dtype=dtype)


def decoder() -> Inputs:
    return make_inputs(SHAPES, locations="clustered", num_queries=NUM_QUERIES)


def against_core(direction: str, inputs: Inputs) -> Pair:
    """Ours against the grid_sample core."""
    require_agreement(ours, grid_sample_core, inputs)
    return Pair(call_of(direction, ours, inputs), call_of(direction, grid_sample_core, inputs))


def against_unfused(direction: str, inputs: FusedInputs) -> Pair:
    """The fused call against our own after locations and softmax by PyTorch."""
    unfused = after_prologue(ours)
    require_agreement(ours, unfused, inputs)
    return Pair(call_of(direction, ours, inputs), call_of(direction, unfused, inputs))


def sixteen_bits(direction: str, dtype: torch.dtype) -> Pair:
    """16-bit values against float32 ones."""
    inputs = encoder(dtype)
    in_float32 = map_tensors(inputs, lambda tensor: tensor.float())
    return Pair(call_of(direction, ours, inputs), call_of(direction, ours, in_float32))


def small_call(backward: bool) -> Pair:
    """A call that does next to nothing against grid_sample on as little."""
    inputs = leaves(make_inputs([(3, 4)], num_queries=1, num_heads=1, head_dim=4, num_points=1))
    image = torch.rand(1, 4, 3, 4, requires_grad=True)
    grid = torch.rand(1, 1, 1, 2, requires_grad=True)

    def baseline() -> Any:
        return F.grid_sample(image, grid, align_corners=False)

    if not backward:
        return Pair(lambda: ours(inputs), baseline, calls=100)
    results = [ours(inputs), baseline()]
    gradients = [torch.ones_like(result) for result in results]
    tensors = [inputs.tensors(), (image, grid)]

    def gradient(side: int) -> Run:
        return lambda: torch.autograd.grad(
            results[side], tensors[side], gradients[side], retain_graph=True
        )

    return Pair(gradient(0), gradient(1), calls=100)


PAIRS: dict[str, Callable[[], Pair]] = {
    "encoder, forward": lambda: against_core("forward", encoder()),
    "encoder, backward": lambda: against_core("backward", encoder()),
    "decoder, forward": lambda: against_core("forward", decoder()),
    "decoder, backward": lambda: against_core("backward", decoder()),
    "fused encoder, forward": lambda: against_unfused("forward", make_fused_inputs(SHAPES)),
    "fused encoder, backward": lambda: against_unfused("backward", make_fused_inputs(SHAPES)),
    "encoder, forward, bfloat16": lambda: sixteen_bits("forward", torch.bfloat16),
    "encoder, backward, bfloat16": lambda: sixteen_bits("backward", torch.bfloat16),
    "encoder, forward, float16": lambda: sixteen_bits("forward", torch.float16),
    "call on one query, forward": lambda: small_call(backward=False),
    "call on one query, backward": lambda: small_call(backward=True),
}


def fastest(run: Run, calls: int) -> float:
    """Seconds of the fastest of three calls, or of a call in the fastest of three rows of them."""
    return min(seconds(lambda: [run() for _ in range(calls)]) for _ in range(3)) / calls


def measure(pair: Pair, budget: float) -> float:
    """The ratio of the two sides' fastest calls, within so many seconds."""
    deadline = Deadline(budget / 60)
    best = {"ours": float("inf"), "baseline": float("inf")}
    rounds = 0
    while rounds < 2 or deadline.left() > 0:
        for side in best:
            best[side] = min(best[side], fastest(getattr(pair, side), pair.calls))
        rounds += 1
    return best["baseline"] / best["ours"]


def judge(name: str, committed: float | None, budget: float, margin: float) -> dict[str, Any]:
    """Measure a ratio until it is high enough, or was not in any attempt."""
    pair = PAIRS[name]()
    least = committed * (1 - margin) if committed is not None else 0.0
    ratios: list[float] = []
    while not ratios or (ratios[-1] < least and len(ratios) < ATTEMPTS):
        ratios.append(measure(pair, budget))
    return {"ratio": max(ratios), "attempts": len(ratios), "least": least}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--thorough", action="store_true", help="more time, half the margin")
    parser.add_argument("--write", action="store_true", help=f"write {COMMITTED.name}")


def main(options: argparse.Namespace) -> int:
    """Measure every ratio; 1 where one has got worse."""
    require_kernels()
    torch.set_num_threads(1)

    machine = describe_machine()
    kind = f"{machine['cpu']}, {machine['cpu_capability']}"
    everything = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {}
    # Ratios may be committed under the name alone, from before processors were named by numbers.
    by_name = f"{machine['cpu'].partition(' (family')[0]}, {machine['cpu_capability']}"
    committed = everything.get(kind, everything.get(by_name, {})).get("ratios", {})
    margin = THOROUGH_MARGIN if options.thorough else MARGIN
    print(f"{kind} kernels, torch {machine['torch']}")
    if not committed:
        print(f"{COMMITTED.name} holds no ratios of {kind}: measured, not judged.")

    table = Table({"ratio": -30, "committed": 11, "least": 9, "now": 9, "verdict": 10})
    ratios, worse = {}, []
    for name in PAIRS:
        before = committed.get(name)
        budget = THOROUGH_SECONDS if options.thorough else SECONDS
        found = judge(name, before, budget, margin)
        ratios[name] = round(found["ratio"], 3)
        verdict = ""
        if before is not None:
            verdict = "holds" if found["ratio"] >= found["least"] else "WORSE"
        if verdict == "WORSE":
            worse.append(name)
        known = ("-", "-") if before is None else (f"{before:.2f}x", f"{found['least']:.2f}x")
        table.add(name, *known, f"{found['ratio']:.2f}x", verdict)

    if options.write:
        write_json(COMMITTED, everything | {kind: {"machine": machine, "ratios": ratios}})
        print(f"written: {COMMITTED}")
        return 0
    if worse:
        print(
            f"\n{len(worse)} of {len(PAIRS)} ratios must be at least {1 - margin:.0%} of the "
            f"committed one, were less in each of {ATTEMPTS} attempts: {'; '.join(worse)}"
        )
    return int(bool(worse))
