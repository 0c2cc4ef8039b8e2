"""Time the operator on a CPU against the grid_sample core that libraries run there.

Every case is a test for pytest-benchmark: a workload, a direction, a dtype and a number of threads.
Ours and the baselines are compared with float64 first. Then the calls are timed in turn in one
process, so that a busy machine slows all of them. Times and ratios are of this machine.

Baselines are the core as it is, for 16 bits computed in float32 (``baselines.in_float32`` says
why); compiled by ``torch.compile``, for the two main workloads; and, for 16 bits, our own call in
float32. In fused directions the core gets its locations and weights from reference points, offsets
and logits by PyTorch, as in modules.

A row also holds the relative error of each result against float64, the memory that a call takes
beyond its inputs, the bytes that it cannot do without, and its share of the machine's floor: the
time those bytes take where memory is copied, or the time of the kernel's loads, whichever is more.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.common import harness
from benchmarks.common.accuracy import exact_results
from benchmarks.common.baselines import after_prologue, compiled_core, in_float32, prologue
from benchmarks.common.floors import copy_rate, count_reads, cpu_floors, load_rate
from benchmarks.common.machine import require_kernels
from benchmarks.common.sides import OURS, Side, check_sides
from benchmarks.common.timing import Run, SettledTimer, summary
from benchmarks.workloads import ALL_CPU_WORKLOADS, CPU_WORKLOADS, sized
from msda.testing import grid_sample_core, map_tensors, ours, random_like_output

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64
DIRECTIONS = ("forward", "backward", "fused forward", "fused backward")


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    workload: str
    direction: str
    dtype: str
    threads: int

    @property
    def is_fused(self) -> bool:
        """Whether locations and softmax are part of the call."""
        return self.direction.startswith("fused")

    def __str__(self) -> str:
        return f"{self.workload}, {self.direction}, {self.dtype}, threads: {self.threads}"


def cases() -> Iterator[Case]:
    """All rows: the main workloads in every dtype, the others in float32 on all cores."""
    cores = harness.all_cores()
    for name, workload in ALL_CPU_WORKLOADS.items():
        main = name in CPU_WORKLOADS
        for dtype in DTYPES if main else ["float32"]:
            # 16 bits and float64 on one thread, where least disturbs them.
            for threads in sorted({1, cores}) if dtype == "float32" else [1]:
                for direction in DIRECTIONS if workload.has_fused else DIRECTIONS[:2]:
                    if main or threads == cores:
                        yield Case(name, direction, dtype, threads)


# ---- what is computed and timed ------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # the plain and the fused form of one workload
def prepared(
    workload: str, fused: bool, dtype: str, quick: bool
) -> tuple[Any, Tensor, dict[str, Tensor]]:
    """Arguments on the CPU, grad_output, and the float64 results for them."""
    shape = sized(ALL_CPU_WORKLOADS[workload], quick)
    inputs = (shape.fused if fused else shape.plain)(DTYPES[dtype])
    grad_output = random_like_output(inputs)
    return inputs, grad_output, exact_results(inputs, grad_output)


def sides_of(case: Case, inputs: Any) -> dict[str, Side]:
    """Ours, and what it is timed against."""
    core = after_prologue(grid_sample_core) if case.is_fused else grid_sample_core
    sixteen_bits = case.dtype in ("bfloat16", "float16")
    sides = {OURS: Side(ours, inputs, is_ours=True)}
    sides["grid_sample"] = Side(in_float32(core) if sixteen_bits else core, inputs)
    if case.workload in CPU_WORKLOADS and case.dtype == "float32" and not case.is_fused:
        compiled = compiled_core(inputs.spatial_shapes, case.threads)
        sides["torch.compile"] = Side(compiled, inputs)
    if sixteen_bits:
        sides["float32"] = Side(ours, map_tensors(inputs, lambda tensor: tensor.float()))
    return sides


def test_operator(
    case: Case, quick: bool, budget: float, table: harness.Table, benchmark: Any, capsys: Any
) -> None:
    """Check one case, time it beside its baselines, and keep the row."""
    torch.set_num_threads(case.threads)
    inputs, grad_output, exact = prepared(case.workload, case.is_fused, case.dtype, quick)
    sides = sides_of(case, inputs)
    results, runs = check_sides(sides, case.direction, exact, grad_output)
    for name, result in results.items():
        assert "refused" not in result, f"{case}: {name}: {result['refused']}"
    for name, samples in time_in_turn(benchmark, runs, budget).items():
        results[name] |= summary(samples)
    row: dict[str, Any] = asdict(case) | results.pop(OURS)
    for result in results.values():
        result["ratio"] = result["ms"] / row["ms"]
    reads = count_reads(prologue(inputs) if case.is_fused else inputs)
    backward = case.direction.endswith("backward")
    row["floor"] = cpu_floors(inputs, reads, case.threads, backward=backward)
    row["floor"]["share"] = row["floor"]["floor_ms"] / row["ms"]
    row["baselines"] = results
    benchmark.extra_info["row"] = row
    with capsys.disabled():
        add_row(table, row)


def time_in_turn(benchmark: Any, runs: dict[str, Run], budget: float) -> dict[str, list[float]]:
    """Let pytest-benchmark time ours; each time after one call of every baseline, timed here."""
    timer = SettledTimer()
    leads = {name: timer.lead(run) for name, run in runs.items()}
    baselines = {name: run for name, run in runs.items() if name != OURS}
    times: dict[str, list[float]] = {name: [] for name in baselines}

    def time_baselines() -> None:
        for name, run in baselines.items():
            times[name].append(timer(run, lead=leads[name]))
        timer.settle(runs[OURS], leads[OURS])

    rounds = max(3, min(30, int(budget / sum(leads.values()))))
    benchmark.pedantic(runs[OURS], setup=time_baselines, rounds=rounds)
    return {OURS: list(benchmark.stats.stats.data), **times}


COLUMNS = {
    "workload": -18,
    "direction": -15,
    "dtype": -9,
    "threads": 8,
    "msda, ms": 10,
    "grid_sample": 12,
    "torch.compile": 14,
    "float32": 8,
    "of floor": 8,
    "extra MB": 8,
}


def add_row(table: harness.Table, row: dict[str, Any]) -> None:
    def ratio(name: str, digits: int = 1) -> str:
        found = row["baselines"].get(name)
        return f"{found['ratio']:.{digits}f}x" if found else ""

    table.add(
        *(row[name] for name in ("workload", "direction", "dtype", "threads")),
        f"{row['ms']:.2f}",
        ratio("grid_sample"),
        ratio("torch.compile"),
        ratio("float32", 2),
        f"{row['floor']['share']:.2f}",
        f"{row['extra_bytes'] / 1e6:.1f}",
    )


# ---- the command ---------------------------------------------------------------------------------


class Chosen:
    """A pytest plugin: runs these cases and keeps their rows."""

    def __init__(self, **arguments: list[Any]) -> None:
        self.arguments = arguments
        self.rows: list[dict[str, Any]] = []

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Call the test with each of the arguments."""
        for name, values in self.arguments.items():
            metafunc.parametrize(name, values, ids=str if name == "case" else lambda _: "")

    def pytest_report_teststatus(self, report: Any) -> Any:
        """No dots between the rows of the table."""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: Any) -> None:
        """Take the rows from pytest-benchmark."""
        done = session.config._benchmarksession.benchmarks
        self.rows = [one.extra_info["row"] for one in done if "row" in one.extra_info]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=6.0)
    harness.add_choice(parser, "workload", ALL_CPU_WORKLOADS)
    harness.add_choice(parser, "direction", DIRECTIONS)
    harness.add_choice(parser, "dtype", DTYPES)
    harness.add_thread_counts(parser)


def main(options: argparse.Namespace) -> int:
    """Run the cases asked for; 1 where a result is wrong."""
    require_kernels()
    record = harness.make_record(options)
    chosen = [
        case
        for case in cases()
        if case.workload in (options.workload or ALL_CPU_WORKLOADS)
        and case.direction in (options.direction or DIRECTIONS)
        and case.dtype in (options.dtype or DTYPES)
        and case.threads in harness.thread_counts(options)
    ]
    harness.print_machine(record)
    print("\nRatios: a baseline's time over ours, medians of one run; more is better.")
    budget = 0.0 if options.quick else options.seconds
    plugin = Chosen(
        case=chosen, quick=[options.quick], budget=[budget], table=[harness.Table(COLUMNS)]
    )
    arguments = [__file__, "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    arguments += ["--no-header", "--benchmark-only", "--benchmark-quiet", "-p", "no:xdist"]
    status = pytest.main(arguments, plugins=[plugin])
    rates: dict[str, Any] = {"copy_bytes_per_second": {}, "loads_per_second": load_rate()}
    for threads in sorted({row["threads"] for row in plugin.rows}):
        rates["copy_bytes_per_second"][str(threads)] = copy_rate(threads)
    harness.keep_record(options, record | {"rates": rates, "rows": plugin.rows})
    return int(status)
