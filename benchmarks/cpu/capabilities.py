"""Time the instruction sets that this machine has against each other: a part of ``make bench``.

A process can use one set, so every set gets a process of its own, which checks its results against
the grid_sample core and then waits for its turn. Encoder, float32, one thread. Also measured is how
fast one core loads from its first-level cache, for a floor under the kernels' times.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import torch
from accuracy import assert_agree
from baselines import grid_sample_core, ours
from measure import backward_of, cpu_machine, forward_of, median, seconds
from records import table_line, write_json
from roofline import load_rate, slots_per_sample
from workloads import CPU_WORKLOADS

import msda

DIRECTIONS = {"forward": forward_of, "backward": backward_of}


def work(workload: str) -> None:
    """One instruction set's process: a line with a direction comes in, seconds go out."""
    torch.set_num_threads(1)
    inputs = CPU_WORKLOADS[workload].plain(torch.float32)
    assert_agree(ours, grid_sample_core, inputs)
    runs = {name: make(ours, inputs) for name, make in DIRECTIONS.items()}
    for run in runs.values():
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds(runs[line.strip()]), flush=True)


class Worker:
    """The process of one instruction set."""

    def __init__(self, capability: str, workload: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", workload],
            env=os.environ | {"MSDA_CPU_CAPABILITY": capability},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        answer = self.process.stdout.readline().strip()
        if answer != "ready":
            raise RuntimeError(f"the {capability} kernels failed their check, see above")

    def time(self, direction: str) -> float:
        """Seconds of one call."""
        self.process.stdin.write(direction + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def stop(self) -> None:
        """Let the process end."""
        self.process.stdin.close()
        self.process.wait()


def floors(rate: float, workload: str) -> dict[str, float]:
    """Milliseconds below which the load slots alone do not let each direction come."""
    inputs = CPU_WORKLOADS[workload].plain(torch.float32)
    samples = inputs.attention_weights.numel()
    return {
        name: samples * slots_per_sample(inputs, backward=name == "backward") / rate * 1e3
        for name in DIRECTIONS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="calls of each (default: 15)")
    parser.add_argument("--workload", choices=CPU_WORKLOADS, default="encoder")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work)
        return 0

    capabilities = msda.info()["cpu_capabilities_supported"]
    results = {"machine": cpu_machine(), "workload": options.workload, "rows": []}
    rate = load_rate()
    if rate:
        results["loads_per_second"] = rate
        results["floor_ms"] = floors(rate, options.workload)
    workers = {name: Worker(name, options.workload) for name in capabilities}
    widths = (-12, -12, 10, 12)
    print("\n" + table_line(("set", "direction", "ms", f"vs {capabilities[-1]}"), widths))
    for direction in DIRECTIONS:
        times = {name: [] for name in capabilities}
        for _ in range(options.rounds):
            for name, worker in workers.items():
                times[name].append(worker.time(direction))
        best = median(times[capabilities[-1]])
        for name in capabilities:
            one = median(times[name])
            row = {"capability": name, "direction": direction, "ms": one * 1e3, "speed": best / one}
            results["rows"].append(row)
            cells = (name, direction, f"{row['ms']:.1f}", f"{row['speed']:.2f}x")
            print(table_line(cells, widths), flush=True)
    for worker in workers.values():
        worker.stop()
    if rate:
        parts = ", ".join(f"{name} {ms:.1f} ms" for name, ms in results["floor_ms"].items())
        print(f"\n{rate / 1e9:.2f} billion 64-byte loads per second; their floor: {parts}.")
    if options.output:
        write_json(options.output, results)
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
