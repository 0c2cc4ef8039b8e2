"""Time the fused operator on a CPU against the one that is not, and the cost of a call.

Both run our kernels from the same reference points, offsets and logits to the same output. One side
computes locations and softmax inside the kernel, the other by PyTorch before it, as modules do that
have no fused operator. A third call, of the operator on locations and weights that are there
already, shows what the fused kernel adds to it. The line "both" is a forward and a backward call as
in training. Then the overhead of a call: the time of a problem of one query, which no work hides.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import msda
from benchmarks.common import harness, timing
from benchmarks.common.accuracy import Core, require_agreement
from benchmarks.common.baselines import after_prologue, prologue
from benchmarks.common.machine import require_kernels
from benchmarks.workloads import CPU_WORKLOADS, Workload, sized
from msda.testing import FusedInputs, Inputs, leaves, make_inputs, ours, random_like_output

DIRECTIONS = ("forward", "backward", "both")
unfused = after_prologue(ours)


def run_of(direction: str, core: Core, inputs: Inputs | FusedInputs) -> timing.Run:
    """The call of a direction; "both": a forward call and the backward call of its graph."""
    if direction != "both":
        return timing.call_of(direction, core, inputs)
    tensors, grad_output = leaves(inputs), random_like_output(inputs)
    return lambda: torch.autograd.grad(core(tensors), tensors.tensors(), grad_output)


def measure(
    name: str, workload: Workload, direction: str, threads: int, budget: float
) -> dict[str, Any]:
    """One line of the table."""
    torch.set_num_threads(threads)
    inputs = workload.fused(torch.float32)
    runs = {
        "fused": run_of(direction, ours, inputs),
        "unfused": run_of(direction, unfused, inputs),
        "plain": run_of(direction, ours, prologue(inputs)),
    }
    times = timing.take_turns(timing.CpuTimer(), runs, budget=budget, least=9)
    row: dict[str, Any] = {"workload": name, "direction": direction, "threads": threads}
    for side, run in runs.items():
        row |= timing.summary(times[side], f"{side}_")
        row[f"{side}_extra_bytes"] = timing.peak_extra_memory(run)
    middle = {side: timing.median(times[side]) for side in runs}
    return row | {
        "ratio": middle["unfused"] / middle["fused"],
        "over_plain": middle["fused"] / middle["plain"],
    }


def measure_calls(rounds: int) -> dict[str, float]:
    """Microseconds for a call on one query, one thread: the least of ``rounds`` of 300 calls."""
    torch.set_num_threads(1)
    inputs = make_inputs([(3, 4)], num_queries=1, num_heads=1, head_dim=4, num_points=1)
    tracked = leaves(inputs)
    output = ours(tracked)
    grad_output = torch.ones_like(output)
    module = msda.MSDeformAttn(16, 1, 4, 1)
    query, reference, features = torch.rand(1, 1, 16), torch.rand(1, 1, 1, 2), torch.rand(1, 12, 16)
    runs = {
        "operator, forward": timing.forward_of(ours, inputs),
        "operator, forward with a graph": lambda: ours(tracked),
        "operator, backward": lambda: torch.autograd.grad(
            output, tracked.tensors(), grad_output, retain_graph=True
        ),
        "module, forward": timing.forward_of(
            lambda _: module(query, reference, features, inputs.spatial_shapes), inputs
        ),
    }
    timer = timing.CpuTimer()
    return {
        name: 1e6 * min(timer.per_call(run, 300) for _ in range(rounds))
        for name, run in runs.items()
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=10.0)
    harness.add_choice(parser, "workload", CPU_WORKLOADS)
    harness.add_thread_counts(parser)


def main(options: argparse.Namespace) -> int:
    """Measure every line, then the calls."""
    require_kernels()
    rows: list[dict[str, Any]] = []
    record = harness.make_record(options, rows=rows)
    harness.print_machine(record)
    print("\nratio: time of the operator after PyTorch's locations and softmax over the fused one;")
    print("over plain: time of the fused one over the operator's without locations and softmax.")
    columns = {"workload": -10, "direction": -11, "threads": 8, "unfused, ms": 12, "fused, ms": 10}
    columns |= {"ratio": 8, "over plain": 11, "extra MB: unfused": 10, "fused": 8}
    table = harness.Table(columns)
    budget = 0.0 if options.quick else options.seconds
    for name in options.workload or CPU_WORKLOADS:
        workload = sized(CPU_WORKLOADS[name], options.quick)
        # PyTorch rounds its locations to float32.
        require_agreement(ours, unfused, workload.fused(torch.float32))
        for threads in harness.thread_counts(options):
            for direction in DIRECTIONS:
                row = measure(name, workload, direction, threads, budget)
                rows.append(row)
                table.add(
                    *(name, direction, threads),
                    *(f"{row[f'{side}_ms']:.2f}" for side in ("unfused", "fused")),
                    *(f"{row['ratio']:.2f}x", f"{row['over_plain']:.2f}"),
                    *(f"{row[f'{side}_extra_bytes'] / 1e6:.1f}" for side in ("unfused", "fused")),
                )
    record["calls"] = measure_calls(2 if options.quick else 20)
    print("\ncall on one query, one thread, us:")
    for name, microseconds in record["calls"].items():
        print(f"  {name:<32}{microseconds:7.1f}")
    harness.keep_record(options, record)
    return 0
