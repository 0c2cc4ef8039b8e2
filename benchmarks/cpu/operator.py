"""Time the operator against the grid_sample core that libraries run on a CPU: ``make bench``.

Every case is a test for pytest-benchmark: a workload, a direction, a dtype and a number of threads.
Ours and its rivals are compared with float64 first. Then the calls are timed in turn in one
process, so that a busy machine slows all of them; reported are medians and their ratios. Times are
of this machine and run; only the ratios carry over.

Rivals are the core as it is, for 16 bits computed in float32 (``baselines.in_float32`` says why);
compiled by ``torch.compile``, for the two main workloads; and, for 16 bits, our own call in
float32. In fused directions the rivals get their locations and weights from reference points,
offsets and logits by PyTorch, as modules do.

A row also holds the relative error of each result against float64, the memory that a call takes
beyond its inputs, the bytes that it cannot do without, and its share of the machine's floor: the
time those bytes take where memory is copied, or the time of the kernel's loads, whichever is more.

``python benchmarks/bench_operator.py --output FILE`` prints a table and writes the rows for
report.py; what is left out can be chosen (``--workload``, ``--dtype``, ``--direction``).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from accuracy import complaint, errors_of, exact_results, others_limit, our_limit, results_of
from baselines import (
    after_prologue,
    compiled_core,
    grid_sample_core,
    in_float32,
    ours,
    ours_fused,
    prologue,
)
from measure import (
    Run,
    SettledTimer,
    backward_of,
    cpu_machine,
    forward_of,
    median,
    peak_extra_memory,
    quartiles,
    seconds,
)
from records import table_line, write_json
from roofline import copy_rate, count_reads, cpu_floors, load_rate
from torch import Tensor
from workloads import CPU_WORKLOADS, OTHER_CPU_WORKLOADS

import msda
from msda.testing import map_tensors

Limit = Callable[[str, torch.dtype], float]

WORKLOADS = CPU_WORKLOADS | OTHER_CPU_WORKLOADS
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64
DIRECTIONS = ("forward", "backward", "fused forward", "fused backward")
SECONDS = "MSDA_BENCH_SECONDS"  # environment: for the timing of one case


@dataclass(frozen=True)
class Case:
    """One row of the results."""

    workload: str
    direction: str
    dtype: str
    threads: int

    @property
    def fused(self) -> bool:
        """Whether locations and softmax are part of the call."""
        return self.direction.startswith("fused")

    @property
    def backward(self) -> bool:
        """Whether the call is a backward one, of a graph that is there."""
        return self.direction.endswith("backward")

    def __str__(self) -> str:
        return f"{self.workload}, {self.direction}, {self.dtype}, threads: {self.threads}"


def cases() -> Iterator[Case]:
    """All rows: the main workloads in every dtype, the others in float32 on all cores."""
    cores = os.cpu_count() or 1
    for name, workload in WORKLOADS.items():
        main = name in CPU_WORKLOADS
        for dtype in DTYPES if main else ["float32"]:
            # 16 bits and float64 on one thread, where least disturbs them.
            for threads in sorted({1, cores}) if dtype == "float32" else [1]:
                for direction in DIRECTIONS if workload.has_fused else DIRECTIONS[:2]:
                    if main or threads == cores:
                        yield Case(name, direction, dtype, threads)


# ---- what is computed and timed ------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # the plain and the fused form of one problem
def problem(workload: str, fused: bool, dtype: str) -> tuple[Any, dict[str, Tensor]]:
    """Arguments on the CPU, and the float64 results for them."""
    shape = WORKLOADS[workload]
    inputs = (shape.fused if fused else shape.plain)(DTYPES[dtype])
    return inputs, exact_results(inputs, grad_output_of(inputs))


def grad_output_of(inputs: Any) -> Tensor:
    """The gradient that backward calls start from."""
    batch, num_queries, num_heads = inputs.tensors()[-1].shape[:3]
    size = (batch, num_queries, num_heads * inputs.value.shape[3])
    output = torch.randn(size, generator=torch.Generator().manual_seed(1))
    return output.to(inputs.value.dtype)


def rivals_of(case: Case, inputs: Any) -> dict[str, tuple[Callable[[Any], Tensor], Any]]:
    """What ours is timed against, by name: a function and its arguments."""
    core = after_prologue(grid_sample_core) if case.fused else grid_sample_core
    sixteen_bits = case.dtype in ("bfloat16", "float16")
    rivals = {"grid_sample": (in_float32(core) if sixteen_bits else core, inputs)}
    all_cores = case.threads == (os.cpu_count() or 1)
    if case.workload in CPU_WORKLOADS and case.dtype == "float32" and all_cores and not case.fused:
        rivals["torch.compile"] = (compiled_core(inputs.spatial_shapes, case.threads), inputs)
    if sixteen_bits:
        longer = map_tensors(inputs, lambda tensor: tensor.float())
        rivals["float32"] = (ours_fused if case.fused else ours, longer)
    return rivals


def checked(
    core: Callable[[Any], Tensor], inputs: Any, case: Case, exact: dict[str, Tensor], limit: Limit
) -> tuple[dict[str, float], str | None]:
    """Relative error of each result that the case is about, and what is wrong with them, if so."""
    grad_output = grad_output_of(inputs) if case.backward else None
    errors = errors_of(results_of(core, inputs, grad_output), exact)
    wrong = complaint(errors, limit, DTYPES[case.dtype])
    if case.backward:
        del errors["output"]
    return errors, wrong


@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_operator(case: Case, benchmark: Any, capsys: Any) -> None:
    """Check one case, time it beside its rivals, and keep the row."""
    torch.set_num_threads(case.threads)
    inputs, exact = problem(case.workload, case.fused, case.dtype)
    our_core = ours_fused if case.fused else ours
    make = backward_of if case.backward else forward_of
    errors, wrong = checked(our_core, inputs, case, exact, our_limit)
    assert wrong is None, f"{case}: {wrong}"
    row: dict[str, Any] = vars(case) | {"errors": errors, "rivals": {}}
    our_run, runs = make(our_core, inputs), {}
    for name, (core, arguments) in rivals_of(case, inputs).items():
        errors, wrong = checked(core, arguments, case, exact, others_limit)
        assert wrong is None, f"{case}: {name}: {wrong}"
        runs[name] = make(core, arguments)
        row["rivals"][name] = {"errors": errors, "extra_bytes": peak_extra_memory(runs[name])}

    our_times, times = time_in_turn(benchmark, our_run, runs)
    row["ms"] = median(our_times) * 1e3
    row["quartiles_ms"] = [quartile * 1e3 for quartile in quartiles(our_times)]
    row["rounds"] = len(our_times)
    row["extra_bytes"] = peak_extra_memory(our_run)
    for name, samples in times.items():
        rival_ms = median(samples) * 1e3
        row["rivals"][name] |= {"ms": rival_ms, "ratio": rival_ms / row["ms"]}
    plain = prologue(inputs) if case.fused else inputs
    row["floor"] = cpu_floors(inputs, count_reads(plain), case.threads, backward=case.backward)
    row["floor"]["share"] = row["floor"]["floor_ms"] / row["ms"]
    benchmark.extra_info["row"] = row
    with capsys.disabled():
        print_row(row)


def time_in_turn(
    benchmark: Any, our_run: Run, runs: dict[str, Run]
) -> tuple[list[float], dict[str, list[float]]]:
    """Let pytest-benchmark time ours; each time after one call of every rival, timed here."""
    timer = SettledTimer()
    our_run()
    short = seconds(our_run)
    leads = {name: seconds(run) for name, run in runs.items()}  # warm: their memory was measured
    times: dict[str, list[float]] = {name: [] for name in runs}

    def rivals() -> None:
        for name, run in runs.items():
            times[name].append(timer(run, lead=leads[name]))
        timer.settle(our_run, short)

    budget = float(os.environ.get(SECONDS, "6"))
    rounds = max(3, min(30, int(budget / (sum(leads.values()) + short))))
    benchmark.pedantic(our_run, setup=rivals, rounds=rounds)
    return benchmark.stats.stats.data, times


# ---- printing ------------------------------------------------------------------------------------

WIDTHS = (-18, -15, -9, 8, 10, 13, 14, 12, 9, 10)


def print_headings() -> None:
    above = ("", "", "", "", "", "grid_sample", "torch.compile", "vs float32", "of the", "extra")
    print("\n" + table_line(above, WIDTHS))
    below = ("workload", "direction", "dtype", "threads", "msda, ms", "ratio", "ratio", "ratio")
    print(table_line((*below, "floor", "MB"), WIDTHS))


def print_row(row: dict[str, Any]) -> None:
    def ratio(name: str, digits: int = 1) -> str:
        return f"{row['rivals'][name]['ratio']:.{digits}f}x" if name in row["rivals"] else ""

    cells = (
        row["workload"],
        row["direction"],
        row["dtype"],
        str(row["threads"]),
        f"{row['ms']:.2f}",
        ratio("grid_sample"),
        ratio("torch.compile"),
        ratio("float32", 2),
        f"{row['floor']['share']:.2f}",
        f"{row['extra_bytes'] / 1e6:.1f}",
    )
    print(table_line(cells, WIDTHS), flush=True)


# ---- the command ---------------------------------------------------------------------------------


class Selected:
    """A pytest plugin: runs the cases asked for, and keeps their rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.rows: list[dict[str, Any]] = []

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Leave out what was not asked for."""
        wanted = self.options
        kept, left_out = [], []
        for item in items:
            case = item.callspec.params["case"]
            asked_for = (
                case.workload in (wanted.workload or WORKLOADS)
                and case.direction in (wanted.direction or DIRECTIONS)
                and case.dtype in (wanted.dtype or DTYPES)
                and case.threads in (wanted.threads or [case.threads])
            )
            (kept if asked_for else left_out).append(item)
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept

    def pytest_report_teststatus(self, report: Any) -> Any:
        """No dots between the rows of the table."""
        return ("passed", "", "") if report.passed and report.when == "call" else None

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: Any) -> None:
        """Take the rows from pytest-benchmark."""
        done = session.config._benchmarksession.benchmarks
        self.rows = [one.extra_info["row"] for one in done if "row" in one.extra_info]


def main() -> int:
    """Run the cases asked for; 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, choices in (("workload", WORKLOADS), ("direction", DIRECTIONS), ("dtype", DTYPES)):
        parser.add_argument(f"--{name}", choices=choices, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument(
        "--seconds", type=float, default=6, help="for the timing of each case (default: 6)"
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]

    machine = cpu_machine()
    print(*(f"{key}: {text}" for key, text in machine.items()), sep=", ")
    print_headings()
    os.environ[SECONDS] = str(options.seconds)
    selected = Selected(options)
    arguments = [__file__, "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short"]
    arguments += ["--no-header", "--benchmark-only", "--benchmark-quiet", "-p", "no:xdist"]
    status = pytest.main(arguments, plugins=[selected])
    print("\nratios: a rival's time over ours, medians of one run; more is better.")
    if options.output:
        rates = {"copy_bytes_per_second": {}, "loads_per_second": load_rate()}
        for threads in sorted({row["threads"] for row in selected.rows}):
            rates["copy_bytes_per_second"][str(threads)] = copy_rate(threads)
        write_json(options.output, {"machine": machine, "rates": rates, "rows": selected.rows})
        print(f"written: {options.output}")
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
