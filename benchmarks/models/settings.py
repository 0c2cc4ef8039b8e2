"""Measure what settings of a CPU do to whole programs of the detector.

Images per second in mixed precision and on huge pages, beside float32 on ordinary ones; the average
precision that training and evaluation in mixed precision come to; and training under several ways
for threads to wait, on an idle machine and on one with twice as many busy processes as cores. Most
of this is read when torch is loaded: every row is a process of its own, and rows that are compared
take turns. Parts that it was not told to measure stay in the record as they are.

Whatever else runs on the machine falsifies it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import harness
from benchmarks.common.machine import require_kernels
from benchmarks.models import detector as model_benchmark
from detector import run_checkpoints
from detector.config import PRESETS

PRESET = "digits"  # the demo's
TRAINING = "training the demo"
# Of the detector with a ResNet-50: how it is called, and for images of which size.
CALLS = {
    "ResNet-50, inference at 800 x 1333": ("forward", (800, 1333)),
    "ResNet-50, forward and backward at 480 x 640": ("both", (480, 640)),
}
AMPS = ("off", "bf16")

Variables = dict[str, str]
PAGES: dict[str, Variables] = {"ordinary": {}, "huge": {"THP_MEM_ALLOC_ENABLE": "1"}}
LONG_SPINS = "GOMP_SPINCOUNT=10000"
PROGRAMS = "as train.py sets it"
WAITS: dict[str, Variables] = {
    "GNU OpenMP's own, 300000": {"GOMP_SPINCOUNT": "300000"},
    LONG_SPINS: {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=3000": {"GOMP_SPINCOUNT": "3000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    PROGRAMS: {},
}
MEASURED = {name for given in (*PAGES.values(), *WAITS.values()) for name in given}
Speed = dict[str, float]  # images_per_second and, of processor time, images_per_processor_second

# ---- a row ---------------------------------------------------------------------------------------


def run(command: Sequence[object], variables: Mapping[str, str], threads: int) -> str:
    """What a Python program prints, in an environment of ours with these variables."""
    kept = {name: value for name, value in os.environ.items() if name not in MEASURED}
    environment = kept | {"OMP_NUM_THREADS": str(threads), **variables}
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=harness.ROOT
    )
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    return done.stdout


def speed_of_training(amp: str, seconds: float, variables: Variables, threads: int) -> Speed:
    """Of train.py, from its start on, by what it notes in its checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--preset", PRESET, "--amp", amp, "--device", "cpu", "--output", folder]
        settings += ["--max-minutes", seconds / 60]
        run([harness.DETECTOR / "train.py", *settings], variables, threads)
        state = run_checkpoints.load(Path(folder) / run_checkpoints.LAST)
    images = state["step"] * PRESETS[PRESET].train.batch_size
    return speed(
        images, state["seconds"]["training_seconds"], state["seconds"]["processor_seconds"]
    )


def speed_of_calls(
    task: str, amp: str, seconds: float, variables: Variables, threads: int
) -> Speed:
    """Of the detector with a ResNet-50, in a process of its own."""
    command = harness.python_call(__name__, "print_calls", task, amp, seconds)
    return json.loads(run(command[1:], variables, threads))


def print_calls(name: str, amp: str, seconds: str) -> None:
    """What a process prints that measures calls."""
    print(json.dumps(time_calls(name, amp, float(seconds))))


def time_calls(name: str, amp: str, seconds: float) -> Speed:
    """Repeat a call for so long, at least twice."""
    kind, size = CALLS[name]
    config = PRESETS[model_benchmark.PRESET].model
    task = model_benchmark.Task(config, size, 1, "cpu", amp)
    call = {"forward": task.forward, "both": task.both}[kind]
    call()
    calls, started, busy = 0, time.perf_counter(), time.process_time()
    while calls < 2 or time.perf_counter() - started < seconds:
        call()
        calls += 1
    return speed(calls, time.perf_counter() - started, time.process_time() - busy)


def speed(images: int, seconds: float, processor_seconds: float) -> Speed:
    """Images per second of each kind."""
    return {
        "images_per_second": images / seconds,
        "images_per_processor_second": images / processor_seconds,
    }


# ---- all rows ------------------------------------------------------------------------------------


@contextlib.contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Within it, so many processes do nothing but use the processor."""
    command = [sys.executable, "-c", "while True: pass"]
    running = [subprocess.Popen(command) for _ in range(number)]
    try:
        time.sleep(1)
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def best_of(rounds: Sequence[Speed]) -> dict[str, Any]:
    """The best of several rounds, and all: whatever else the machine does can only take away."""
    best = {name: max(one[name] for one in rounds) for name in rounds[0]}
    return best | {"rounds": list(rounds)}


def precision_rows(options: argparse.Namespace, table: harness.Table) -> list[dict]:
    """Speed of each task in both precisions, on ordinary and on huge pages."""
    rows = []
    for task in (TRAINING, *CALLS):
        results: dict[tuple[str, str], list[Speed]] = {}
        for _, amp, pages in itertools.product(range(options.rounds), AMPS, PAGES):
            # How threads wait is not what is compared here.
            given = (amp, options.seconds, PAGES[pages] | WAITS[LONG_SPINS], options.threads)
            result = speed_of_training(*given) if task == TRAINING else speed_of_calls(task, *given)
            results.setdefault((amp, pages), []).append(result)
        for (amp, pages), rounds in results.items():
            rows.append({"task": task, "amp": amp, "pages": pages, **best_of(rounds)})
            add_line(table, task, amp, f"{pages} pages", rows[-1])
    return rows


def waiting_rows(options: argparse.Namespace, table: harness.Table, busy: int) -> list[dict]:
    """Speed of training under each way to wait, alone and among busy processes."""
    results: dict[tuple[str, bool], list[Speed]] = {}
    for _, among_others in itertools.product(range(options.rounds), (False, True)):
        with busy_processes(busy) if among_others else contextlib.nullcontext():
            for name, variables in WAITS.items():
                result = speed_of_training("off", options.seconds, variables, options.threads)
                results.setdefault((name, among_others), []).append(result)
    rows = []
    for name in WAITS:
        alone, among_others = (best_of(results[name, others]) for others in (False, True))
        rows.append({"waiting": name, "alone": alone, "among_others": among_others})
        add_line(table, name, "alone", "", alone)
        add_line(table, name, "among others", "", among_others)
    return rows


def demo_rows(options: argparse.Namespace) -> list[dict]:
    """Average precision that training in each precision comes to, evaluated in each."""
    rows = []
    for amp in AMPS:
        with tempfile.TemporaryDirectory() as folder:
            settings = ["--preset", PRESET, "--amp", amp, "--device", "cpu", "--output", folder]
            settings += ["--epochs", options.epochs, "--eval-every", options.epochs]
            run([harness.DETECTOR / "train.py", *settings], {}, options.threads)
            best, results = Path(folder) / run_checkpoints.BEST, Path(folder) / "results.json"
            for used in AMPS:
                command = [harness.DETECTOR / "evaluate.py", best, "--amp", used, "--json", results]
                run([*command, "--device", "cpu", "--num-workers", 0], {}, options.threads)
                found = json.loads(results.read_text())
                rows.append({"trained": amp, "evaluated": used, "AP": found["AP"]})
                print(f"trained {amp}, evaluated {used}: AP {found['AP']:.3f}", flush=True)
    return rows


def add_line(
    table: harness.Table, first: str, second: str, third: str, row: Mapping[str, Any]
) -> None:
    speeds = [row[f"images_per_{unit}"] for unit in ("second", "processor_second")]
    table.add(first, second, third, *(f"{speed:.3g}" for speed in speeds))


PARTS = ("precision", "waiting", "demo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=6.0, rounds=1, threads=harness.all_cores())
    parser.add_argument("--epochs", type=int, default=4, help="of the demo (default: 4)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="default: all")


def main(options: argparse.Namespace) -> int:
    """Measure the parts asked for."""
    require_kernels()
    if options.quick:
        options.seconds, options.rounds, options.epochs = 0.5, 1, 1
    kept = {}
    if options.output and options.output.exists():
        kept = json.loads(options.output.read_text())
    record = kept | harness.make_record(options, threads=options.threads)
    columns = {"": -46, "precision": -14, "pages": -16, "images/s": 12}
    table = harness.Table(columns | {"per processor second": 12})
    if "precision" in options.only:
        record["precision"] = precision_rows(options, table)
    if "waiting" in options.only:
        busy = 2 * harness.all_cores()
        rows = waiting_rows(options, table, busy)
        record["waiting"] = {"busy_processes": busy, "rows": rows}
    if "demo" in options.only:
        record["demo"] = {"epochs": options.epochs, "rows": demo_rows(options)}
    harness.keep_record(options, record)
    return 0
