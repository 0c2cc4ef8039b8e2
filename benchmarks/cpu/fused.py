"""Time the fused operator against the one that is not, on the CPU: a part of ``make bench``.

Both run our kernels from the same reference points, offsets and logits to the same output. One side
computes locations and softmax inside the kernel, the other by PyTorch before it, as modules do that
have no fused operator. The line "both" is a forward and a backward call as in training. Then the
overhead of a call: the time of a problem of one query, which no work hides. Prints tables; with
``--output FILE`` writes them as JSON for report.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from accuracy import assert_agree
from baselines import after_prologue, ours, ours_fused
from measure import (
    CpuTimer,
    backward_of,
    cpu_machine,
    forward_of,
    median,
    peak_extra_memory,
    take_turns,
)
from records import table_line, write_json
from torch import Tensor
from workloads import CPU_WORKLOADS

import msda
from msda.testing import FusedInputs, leaves, make_inputs

WIDTHS = (-9, -10, 7, 13, 11, 8, 13, 11)


def both_of(core: Callable[[FusedInputs], Tensor], inputs: FusedInputs) -> Callable[[], object]:
    """A forward call and the backward call of its graph."""
    tensors = leaves(inputs)
    grad_output = torch.randn(core(inputs).shape, generator=torch.Generator().manual_seed(1))
    return lambda: torch.autograd.grad(core(tensors), tensors.tensors(), grad_output)


MAKERS = {"forward": forward_of, "backward": backward_of, "both": both_of}


unfused = after_prologue(ours)


def measure(name: str, direction: str, threads: int, budget: float) -> dict[str, object]:
    """One line of the table."""
    torch.set_num_threads(threads)
    inputs = CPU_WORKLOADS[name].fused(torch.float32)
    make = MAKERS[direction]
    runs = {"fused": make(ours_fused, inputs), "unfused": make(unfused, inputs)}
    times = take_turns(CpuTimer(), runs, cold=False, budget=budget, least=9)
    medians = {side: median(samples) for side, samples in times.items()}
    return {
        "workload": name,
        "direction": direction,
        "threads": threads,
        "fused_ms": medians["fused"] * 1e3,
        "unfused_ms": medians["unfused"] * 1e3,
        "ratio": medians["unfused"] / medians["fused"],
        "fused_extra_bytes": peak_extra_memory(runs["fused"]),
        "unfused_extra_bytes": peak_extra_memory(runs["unfused"]),
    }


def measure_calls() -> dict[str, float]:
    """Microseconds for a call on one query, one thread: the least of many batches of calls."""
    torch.set_num_threads(1)
    inputs = make_inputs([(3, 4)], num_queries=1, num_heads=1, head_dim=4, num_points=1)
    tracked = leaves(inputs)
    output = ours(tracked)
    grad_output = torch.ones_like(output)
    module = msda.MSDeformAttn(16, 1, 4, 1)
    query, reference, features = torch.rand(1, 1, 16), torch.rand(1, 1, 1, 2), torch.rand(1, 12, 16)
    runs = {
        "operator, forward": forward_of(ours, inputs),
        "operator, forward with a graph": lambda: ours(tracked),
        "operator, backward": lambda: torch.autograd.grad(
            output, tracked.tensors(), grad_output, retain_graph=True
        ),
        "module, forward": forward_of(
            lambda _: module(query, reference, features, inputs.spatial_shapes), inputs
        ),
    }
    timer = CpuTimer()
    return {
        name: 1e6 * min(timer.per_call(run, 300) for _ in range(20)) for name, run in runs.items()
    }


def print_row(row: dict) -> None:
    cells = (
        row["workload"],
        row["direction"],
        str(row["threads"]),
        f"{row['unfused_ms']:.2f}",
        f"{row['fused_ms']:.2f}",
        f"{row['ratio']:.2f}x",
        f"{row['unfused_extra_bytes'] / 1e6:.1f}",
        f"{row['fused_extra_bytes'] / 1e6:.1f}",
    )
    print(table_line(cells, WIDTHS), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=10, help="for each line (default: 10)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]

    rows: list[dict] = []
    above = ("", "", "", "unfused", "fused", "", "extra memory, MB")
    print(table_line(above, (*WIDTHS[:-2], sum(WIDTHS[-2:]))))
    below = ("workload", "direction", "threads", "ms", "ms", "ratio", "unfused", "fused")
    print(table_line(below, WIDTHS))
    for name in CPU_WORKLOADS:
        # PyTorch rounds its locations to float32.
        assert_agree(ours_fused, unfused, CPU_WORKLOADS[name].fused(torch.float32))
        for threads in sorted({1, os.cpu_count() or 1}):
            for direction in MAKERS:
                rows.append(measure(name, direction, threads, options.seconds))
                print_row(rows[-1])
    print("\nratio: time of the operator after PyTorch's locations and softmax over the fused one.")
    calls = measure_calls()
    print("\ncall on one query, one thread, us:")
    for name, microseconds in calls.items():
        print(f"  {name:<32}{microseconds:7.1f}")
    if options.output:
        write_json(options.output, {"machine": cpu_machine(), "rows": rows, "calls": calls})
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
