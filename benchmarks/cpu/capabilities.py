"""Time the instruction sets that this CPU has against each other.

A process can use one set, so every set gets a process of its own, which checks its results against
the grid_sample core and then waits for its turn. float32, one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

import torch

import msda
from benchmarks.common import harness
from benchmarks.common.accuracy import require_agreement
from benchmarks.common.machine import require_kernels
from benchmarks.common.timing import call_of, median, seconds, summary
from benchmarks.workloads import CPU_WORKLOADS, sized
from msda.testing import grid_sample_core, ours

DIRECTIONS = ("forward", "backward")


def work(workload: str, quick: str) -> None:
    """One instruction set's process: a line with a direction comes in, seconds go out."""
    torch.set_num_threads(1)
    inputs = sized(CPU_WORKLOADS[workload], quick == "True").plain(torch.float32)
    require_agreement(ours, grid_sample_core, inputs)
    runs = {direction: call_of(direction, ours, inputs) for direction in DIRECTIONS}
    for run in runs.values():
        run()
    print("ready", flush=True)
    for line in sys.stdin:
        print(seconds(runs[line.strip()]), flush=True)


class Worker:
    """The process of one instruction set."""

    def __init__(self, capability: str, workload: str, quick: bool) -> None:
        self.process = subprocess.Popen(
            harness.python_call(__name__, "work", workload, quick),
            env=os.environ | {"MSDA_CPU_CAPABILITY": capability},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=harness.ROOT,
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, rounds=15)
    parser.add_argument("--workload", choices=CPU_WORKLOADS, default="encoder")


def main(options: argparse.Namespace) -> int:
    """Time every set in turn."""
    require_kernels()
    capabilities = msda.info()["cpu_capabilities_supported"]
    rows: list[dict[str, Any]] = []
    record = harness.make_record(options, workload=options.workload, rows=rows)
    harness.print_machine(record)
    best = capabilities[-1]
    table = harness.Table({"set": -12, "direction": -12, "ms": 10, f"speed, {best} = 1": 12})
    workers = {name: Worker(name, options.workload, options.quick) for name in capabilities}
    for direction in DIRECTIONS:
        times: dict[str, list[float]] = {name: [] for name in capabilities}
        for _ in range(1 if options.quick else options.rounds):
            for name, worker in workers.items():
                times[name].append(worker.time(direction))
        for name, samples in times.items():
            row = {"capability": name, "direction": direction, **summary(samples)}
            row["speed"] = median(times[best]) / median(samples)
            rows.append(row)
            table.add(name, direction, f"{row['ms']:.1f}", f"{row['speed']:.2f}")
    for worker in workers.values():
        worker.stop()
    harness.keep_record(options, record)
    return 0
