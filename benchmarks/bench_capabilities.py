"""Time the instruction sets that this machine has against each other: a part of ``make bench``.

A process can use one set, so every set gets a process of its own, which checks its results against
the grid_sample core and then waits for its turn. Encoder, float32, one thread. Also measured is how
fast one core loads from its first-level cache, for a floor under the kernels' times.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_operator import assert_equal, ours
from measure import backward_of, cpu_machine, forward_of, median, seconds
from records import table_line, write_json
from workloads import CPU_WORKLOADS

import msda

DIRECTIONS = {"forward": forward_of, "backward": backward_of}
HERE = Path(__file__).resolve().parent

# 64-byte loads and stores of one sample of 32 float32 channels: two for each corner's pixel, and a
# slot each for its weight and its offset. Backward also reads and writes the gradient's pixel.
SLOTS_PER_SAMPLE = {"forward": 4 * (2 + 2), "backward": 4 * (2 + 2 + 2 + 2)}


def work(workload: str) -> None:
    """One instruction set's process: a line with a direction comes in, seconds go out."""
    torch.set_num_threads(1)
    inputs = CPU_WORKLOADS[workload].plain(torch.float32)
    assert_equal(inputs)
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


def load_rate() -> float | None:
    """64-byte loads per second of one core; None without a C++ compiler."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "load_rate")
        source = HERE / "load_rate.cpp"
        command = [compiler, "-O3", "-march=native", str(source), "-o", str(program)]
        subprocess.run(command, check=True)
        return float(subprocess.run([program], check=True, capture_output=True, text=True).stdout)


def floors(rate: float, workload: str) -> dict[str, float]:
    """Milliseconds below which the load slots alone do not let each direction come."""
    inputs = CPU_WORKLOADS[workload].plain(torch.float32)
    samples = inputs.attention_weights.numel()
    return {name: samples * slots / rate * 1e3 for name, slots in SLOTS_PER_SAMPLE.items()}


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
