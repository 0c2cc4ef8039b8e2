"""Time the operator against the grid_sample core that libraries run on a CPU: ``make bench``.

For every workload, number of threads and direction, ours and the baseline are asserted equal and
then timed in turn in the same process, so that a busy machine slows both; reported are medians and
their ratio. Times are of this machine and run; only the ratios carry over. Prints a table, and with
``--output FILE`` writes what it printed, with versions and hardware, as JSON for report.py.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from baselines import grid_sample_core
from measure import backward_of, cpu_machine, forward_of, median, peak_extra_memory, seconds
from records import table_line, write_json
from torch import Tensor
from workloads import CPU_WORKLOADS

import msda
from msda.testing import TOLERANCES, Inputs, map_tensors, relative_error


def ours(inputs: Inputs) -> Tensor:
    return msda.ms_deform_attn(
        inputs.value,
        inputs.spatial_shapes,
        None,
        inputs.sampling_locations,
        inputs.attention_weights,
    )


def assert_equal(inputs: Inputs) -> None:
    """Both sides against each other: outputs and gradients, within five float32 tolerances."""
    with torch.no_grad():
        error = relative_error(ours(inputs), grid_sample_core(inputs))
    limit = 5 * TOLERANCES[inputs.value.dtype]
    assert error < limit, f"forward differs by {error:.1e}, at most {limit:.1e} expected"
    pairs = zip(backward_of(ours, inputs)(), backward_of(grid_sample_core, inputs)(), strict=True)
    for name, (actual, expected) in zip(("value", "locations", "weights"), pairs, strict=True):
        error = relative_error(actual, expected)
        # Where grid_sample rounds a coordinate across a cell edge, its gradient of that location is
        # the other cell's: up to 9e-4 in all.
        allowed = 2e-3 if name == "locations" else limit
        assert error < allowed, f"grad_{name} differs by {error:.1e}, at most {allowed:.1e}"


def assert_close_in(dtype: torch.dtype, actual: object, expected: object) -> None:
    """Ours in 16 bits against ours in float32: inputs, grad_output and results are each rounded."""
    pairs = (
        [(actual, expected)] if isinstance(actual, Tensor) else zip(actual, expected, strict=True)
    )
    for half, full in pairs:
        error = relative_error(half, full)
        limit = 5 * TOLERANCES[dtype]
        assert error < limit, f"{dtype} differs by {error:.1e}, at most {limit:.1e} expected"


def measure(name: str, direction: str, threads: int, seconds_budget: float) -> dict[str, object]:
    """Time one line of the table."""
    torch.set_num_threads(threads)
    inputs = CPU_WORKLOADS[name].plain(torch.float32)
    make = forward_of if direction == "forward" else backward_of
    our_run, base_run = make(ours, inputs), make(grid_sample_core, inputs)
    seconds(our_run)
    base_times, our_times = [seconds(base_run)], []
    # Several calls of one side, then of the other, so that both find their inputs in the caches as
    # far as they fit; fewer of a slow baseline.
    base_repeats = 5 if base_times[0] < 0.1 else 1
    rounds = max(3, min(30, int(seconds_budget / (1.5 * base_repeats * base_times[0]))))
    base_times.clear()
    for _ in range(rounds):
        our_times += [seconds(our_run) for _ in range(5)]
        base_times += [seconds(base_run) for _ in range(base_repeats)]
    our_median, base_median = median(our_times), median(base_times)

    row: dict[str, object] = {
        "workload": name,
        "direction": direction,
        "threads": threads,
        "dtype": "float32",
        "msda_ms": our_median * 1e3,
        "grid_sample_ms": base_median * 1e3,
        "ratio": base_median / our_median,
        "msda_extra_bytes": peak_extra_memory(our_run),
        "grid_sample_extra_bytes": peak_extra_memory(base_run),
        "rounds": rounds,
    }
    for dtype in (torch.bfloat16, torch.float16):
        values = map_tensors(inputs, lambda tensor: tensor)
        values.value = inputs.value.to(dtype)
        run = make(ours, values)
        assert_close_in(dtype, run(), our_run())
        times = []
        for _ in range(max(5, min(30, 2 * rounds))):
            times.append((seconds(our_run), seconds(run)))
        full, half = (median(column) for column in zip(*times, strict=True))
        row[f"{str(dtype).removeprefix('torch.')}_speedup"] = full / half
    return row


WIDTHS = (-9, -10, 7, 14, 10, 9, 10, 10, 14, 9)


def print_headings() -> None:
    above = ("", "", "", "grid_sample", "msda", "", "bf16", "fp16", "extra memory, MB")
    print("\n" + table_line(above, (*WIDTHS[:-2], sum(WIDTHS[-2:]))))
    below = ("workload", "direction", "threads", "ms", "ms", "ratio", "vs fp32", "vs fp32")
    print(table_line((*below, "grid_sample", "msda"), WIDTHS))


def print_row(row: dict) -> None:
    cells = (
        row["workload"],
        row["direction"],
        str(row["threads"]),
        f"{row['grid_sample_ms']:.1f}",
        f"{row['msda_ms']:.2f}",
        f"{row['ratio']:.1f}x",
        f"{row['bfloat16_speedup']:.2f}x",
        f"{row['float16_speedup']:.2f}x",
        f"{row['grid_sample_extra_bytes'] / 1e6:.1f}",
        f"{row['msda_extra_bytes'] / 1e6:.1f}",
    )
    print(table_line(cells, WIDTHS), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--workload", choices=CPU_WORKLOADS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument(
        "--seconds", type=float, default=15, help="for the baseline of each line (default: 15)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]

    results = {"machine": cpu_machine(), "rows": []}
    print(*(f"{key}: {text}" for key, text in results["machine"].items()), sep=", ")
    print_headings()
    all_cores = os.cpu_count() or 1
    for name in options.workload or CPU_WORKLOADS:
        assert_equal(CPU_WORKLOADS[name].plain(torch.float32))
        for threads in options.threads or sorted({1, all_cores}):
            for direction in ("forward", "backward"):
                row = measure(name, direction, threads, options.seconds)
                results["rows"].append(row)
                print_row(row)
    print("\nratio: time of the grid_sample core over ours, medians of one run; more is better.")
    if options.output:
        write_json(options.output, results)
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
