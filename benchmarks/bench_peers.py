"""Time the operator against other ways to run it on a CPU: a part of ``make bench``.

The rivals are the bare grid_sample core, the core of the transformers library, the grid_sample core
compiled by ``torch.compile``, and the same exported to ONNX and run by ONNX Runtime, which has no
backward. One that is not installed or does not work here is listed with the reason; one whose
results differ from ours by more than ``accuracy.others_limit`` is listed and not timed. The others
are timed in turn in one process; compiling and exporting is not part of any time. Reported are
medians and their ratios to ours. Prints a table, and with ``--output FILE`` writes it as JSON for
report.py.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import GRADIENTS, complaint, errors_of, others_limit
from baselines import grid_sample_core
from measure import (
    CpuTimer,
    Run,
    backward_of,
    cpu_machine,
    forward_of,
    median,
    quartiles,
    seconds,
    take_turns,
)
from peers import KNOWN, PeerError, find, load
from records import table_line, write_json
from torch import Tensor, nn
from torch._functorch import config as functorch
from workloads import CPU_WORKLOADS

import msda
from msda.testing import Inputs

Core = Callable[[Inputs], Tensor]
Make = Callable[[Inputs, int], Core]  # for inputs of these sizes and this number of threads

OPSET = 20  # the newest of the exporter that needs no onnxscript; GridSample exists since 16
SHORT = 0.1  # seconds; what the threads of one rival leave to the next is over long before


def ours(inputs: Inputs) -> Tensor:
    value, locations, weights = inputs.tensors()
    return msda.ms_deform_attn(value, inputs.spatial_shapes, None, locations, weights)


# ---- rivals --------------------------------------------------------------------------------------


class GridSampleCore(nn.Module):
    """The baseline as a module of tensors alone: what compilers and exporters take."""

    def __init__(self, spatial_shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.spatial_shapes = spatial_shapes

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """(B, Q, M * D)."""
        return grid_sample_core(Inputs(value, self.spatial_shapes, locations, weights))


def find_grid_sample() -> Make:
    """The core itself, which every torch has."""
    return lambda inputs, threads: grid_sample_core


def find_transformers() -> Make:
    """The core of transformers' Deformable DETR, tried on a small problem first."""
    core = find("transformers", KNOWN["transformers"], "cpu").plain
    if core is None:
        raise PeerError("it takes no locations and weights")
    return lambda inputs, threads: core


def compiled(function: Callable[..., Tensor], threads: int) -> Callable[..., Tensor]:
    """A function under torch.compile, for fixed sizes and so many threads."""
    # The number of threads becomes a part of the code, and this option one of its key in the cache.
    options = {"cpp.threads": threads}
    return torch.compile(function, fullgraph=True, dynamic=False, options=options)


def find_compiled() -> Make:
    """The core under torch.compile, whose default backend needs a C++ compiler."""
    # Backward is timed again and again on one graph, whose tensors it must therefore not overwrite.
    functorch.donated_buffer = False
    try:
        compiled(torch.sin, 1)(torch.ones(8))
    except Exception as error:  # whatever a compiler's absence raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeerError(f"compiling failed: {reason}") from error

    def make(inputs: Inputs, threads: int) -> Core:
        torch.compiler.reset()  # else each size and number of threads counts as a recompilation
        core = compiled(GridSampleCore(inputs.spatial_shapes), threads)
        return lambda inputs: core(*inputs.tensors())

    return make


def find_onnx_runtime() -> Make:
    """The core as ONNX Runtime executes it."""
    load("onnx")  # the exporter's
    runtime = load("onnxruntime")

    def make(inputs: Inputs, threads: int) -> Core:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else its threads go on spinning for a while, at the expense of who comes next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        providers = ["CPUExecutionProvider"]
        session = runtime.InferenceSession(exported(inputs), options, providers=providers)
        names = [argument.name for argument in session.get_inputs()]

        def core(inputs: Inputs) -> Tensor:
            arrays = (tensor.numpy() for tensor in inputs.tensors())
            (output,) = session.run(None, dict(zip(names, arrays, strict=True)))
            return torch.from_numpy(output)

        return core

    return make


def exported(inputs: Inputs) -> bytes:
    """The core as an ONNX model for inputs of these sizes."""
    model = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the newer exporter needs onnxscript
        torch.onnx.export(
            GridSampleCore(inputs.spatial_shapes),
            inputs.tensors(),
            model,
            input_names=["value", "sampling_locations", "attention_weights"],
            opset_version=OPSET,
            dynamo=False,
        )
    return model.getvalue()


@dataclass(frozen=True)
class Rival:
    """One way to run the operator. ``find`` raises PeerError where it does not work here."""

    about: str
    find: Callable[[], Make]
    packages: tuple[str, ...] = ("torch",)  # whose versions its times belong to
    has_backward: bool = True


RIVALS = {
    "grid_sample": Rival("the core that libraries run on a CPU", find_grid_sample),
    "transformers": Rival(
        "MultiScaleDeformableAttention of its Deformable DETR",
        find_transformers,
        ("transformers", "torch"),
    ),
    "torch.compile": Rival("the grid_sample core under inductor, fixed sizes", find_compiled),
    "ONNX Runtime": Rival(
        f"the grid_sample core exported by torch.onnx.export(dynamo=False), opset {OPSET}",
        find_onnx_runtime,
        ("onnxruntime", "onnx", "torch"),
        has_backward=False,
    ),
}


def find_rivals(wanted: list[str]) -> tuple[dict[str, Make], dict[str, str]]:
    """How to make each rival that works here; and the reason for each other one."""
    found, missing = {}, {}
    for name in wanted:
        try:
            found[name] = RIVALS[name].find()
        except PeerError as error:
            missing[name] = str(error)
    return found, missing


def described(name: str) -> dict[str, Any]:
    """What a rival is, and the versions of what it is made of."""
    rival = RIVALS[name]
    versions = {package: importlib.import_module(package).__version__ for package in rival.packages}
    return {"about": rival.about, "versions": versions}


# ---- one row -------------------------------------------------------------------------------------


class SettledTimer(CpuTimer):
    """Times a short call after one that is not timed.

    Each rival has threads of its own. Those of the last one may still be waiting busily for more,
    and the caches hold its memory.
    """

    def lead(self, run: Run) -> float:
        """How long the call takes, by which it counts as short; see :class:`measure.Timer`."""
        run()
        return seconds(run)

    def __call__(self, run: Run, *, cold: bool = False, lead: float = 0.0) -> float:
        """See :class:`measure.Timer`."""
        if lead < SHORT:
            run()
        return seconds(run)


def in_a_line(error: Exception) -> str:
    """An error as the reason why a rival is not timed."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def results_by_name(run: Run, backward: bool) -> dict[str, Tensor]:
    """What one of the calls to be timed computes."""
    results: Any = run()
    return dict(zip(GRADIENTS[Inputs], results, strict=True)) if backward else {"output": results}


def measure_row(
    inputs: Inputs, direction: str, cores: Mapping[str, Core], budget: float
) -> dict[str, Any]:
    """Check every rival against ours, then time those that are right: one row of the results."""
    backward = direction == "backward"
    make = backward_of if backward else forward_of
    runs = {"msda": make(ours, inputs)}
    expected = results_by_name(runs["msda"], backward)
    results: dict[str, dict[str, Any]] = {"msda": {}}
    for name, core in cores.items():
        try:
            run = make(core, inputs)
            errors = errors_of(results_by_name(run, backward), expected)
            wrong = complaint(errors, others_limit, inputs.value.dtype)
        except Exception as error:  # whatever a stranger's code raises
            results[name] = {"refused": in_a_line(error)}
            continue
        results[name] = {"errors": errors}
        if wrong is None:
            runs[name] = run
        else:
            results[name]["refused"] = wrong

    times = take_turns(SettledTimer(), runs, cold=False, budget=budget)
    our_median = median(times["msda"])
    for name, samples in times.items():
        results[name] |= {
            "ms": median(samples) * 1e3,
            "quartiles_ms": [quartile * 1e3 for quartile in quartiles(samples)],
            "rounds": len(samples),
            "ratio": median(samples) / our_median,
        }
    return {"direction": direction, "dtype": "float32", "rivals": results}


def rows_of(name: str, threads: int, makes: Mapping[str, Make], budget: float) -> list[dict]:
    """Both rows of one workload and number of threads; each rival is made once for both."""
    torch.set_num_threads(threads)
    inputs = CPU_WORKLOADS[name].plain(torch.float32)
    cores: dict[str, Core] = {}
    broken: dict[str, str] = {}
    for rival, make in makes.items():
        try:
            cores[rival] = make(inputs, threads)
        except Exception as error:  # whatever an exporter raises
            broken[rival] = in_a_line(error)
    rows = []
    for direction in ("forward", "backward"):
        able = [rival for rival in makes if direction == "forward" or RIVALS[rival].has_backward]
        taking_part = {rival: cores[rival] for rival in able if rival in cores}
        row = {"workload": name, "threads": threads}
        row |= measure_row(inputs, direction, taking_part, budget)
        row["rivals"] |= {rival: {"refused": broken[rival]} for rival in able if rival in broken}
        rows.append(row)
    return rows


# ---- printing ------------------------------------------------------------------------------------

WIDTHS = [-9, -10, 7, 10]
RIVAL_WIDTH = 18


def print_beginning(results: dict[str, Any]) -> None:
    print(*(f"{key}: {text}" for key, text in results["machine"].items()), sep=", ")
    for name, rival in results["rivals"].items():
        versions = ", ".join(f"{package} {number}" for package, number in rival["versions"].items())
        print(f"{name}: {rival['about']} ({versions})")
    for name, reason in results["missing"].items():
        print(f"missing: {name}: {reason}")
    cells = ["workload", "direction", "threads", "msda", *results["rivals"]]
    print("\n" + table_line(cells, WIDTHS + [RIVAL_WIDTH] * len(results["rivals"])))


def print_row(row: dict[str, Any], names: list[str]) -> None:
    cells = [row["workload"], row["direction"], str(row["threads"])]
    cells.append(f"{row['rivals']['msda']['ms']:.2f}")
    cells += [rival_cell(row["rivals"].get(name)) for name in names]
    print(table_line(cells, WIDTHS + [RIVAL_WIDTH] * len(names)), flush=True)


def rival_cell(rival: dict[str, Any] | None) -> str:
    if rival is None:
        return "-"
    return f"{rival['ms']:.1f} {rival['ratio']:6.1f}x" if "ms" in rival else "refused"


def print_ending(rows: list[dict[str, Any]]) -> None:
    print("\nms, medians of one run; x: a rival's time over ours, more is better; -: has no such.")
    for row in rows:
        for name, rival in row["rivals"].items():
            if "refused" in rival:
                where = f"{row['workload']}, {row['direction']}, threads: {row['threads']}"
                print(f"refused: {name}: {rival['refused']} ({where})")


# ---- the command ---------------------------------------------------------------------------------


def main() -> int:
    """Measure everything asked for; 1 where the grid_sample core and ours disagree."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--peer", choices=RIVALS, action="append", help="default: all")
    parser.add_argument("--workload", choices=CPU_WORKLOADS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=20, help="for each line (default: 20)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]

    makes, missing = find_rivals(options.peer or list(RIVALS))
    results: dict[str, Any] = {
        "machine": cpu_machine(),
        "rivals": {name: described(name) for name in makes},
        "missing": missing,
        "rows": [],
    }
    print_beginning(results)
    for name in options.workload or CPU_WORKLOADS:
        for threads in options.threads or sorted({1, os.cpu_count() or 1}):
            for row in rows_of(name, threads, makes, options.seconds):
                results["rows"].append(row)
                print_row(row, list(makes))
    print_ending(results["rows"])
    if options.output:
        write_json(options.output, results)
        print(f"written: {options.output}")
    return int(any("refused" in row["rivals"].get("grid_sample", {}) for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
