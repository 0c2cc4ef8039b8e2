"""Time the operator against other ways to run it on a CPU: a part of ``make bench``.

The rivals are the bare grid_sample core; the same compiled by ``torch.compile``, and exported to
ONNX and run by ONNX Runtime, which has no backward; the core of the transformers library; and every
implementation that peers.py knows or that ``--peer`` names, as far as it runs on a CPU. One that is
not installed or does not work here is listed with the reason; one whose results differ from ours by
more than ``accuracy.others_limit`` is listed and not timed. The others are timed in turn in one
process; compiling and exporting is not part of any time. Reported are medians and their ratios to
ours. Prints a table, and with ``--output FILE`` writes it as JSON for
report.py.
"""

from __future__ import annotations

import argparse
import functools
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
from baselines import GridSampleCore, compiled, compiled_core, grid_sample_core, ours
from measure import (
    Run,
    SettledTimer,
    backward_of,
    cpu_machine,
    forward_of,
    median,
    quartiles,
    take_turns,
)
from peers import KNOWN, PeerError, find, is_file, load, split_label
from records import table_line, write_json
from torch import Tensor
from workloads import CPU_WORKLOADS

import msda
from msda.testing import Inputs

Core = Callable[[Inputs], Tensor]
Make = Callable[[Inputs, int], Core]  # for inputs of these sizes and this number of threads

OPSET = 20  # the newest of the exporter that needs no onnxscript; GridSample exists since 16


# ---- rivals --------------------------------------------------------------------------------------


def find_grid_sample() -> Make:
    """The core itself, which every torch has."""
    return lambda inputs, threads: grid_sample_core


def find_peer(label: str, what: str) -> Make:
    """Another implementation, tried on a small problem first: see peers.py."""
    core = find(label, what, "cpu").plain
    if core is None:
        raise PeerError("it takes no locations and weights")
    return lambda inputs, threads: core


def find_compiled() -> Make:
    """The core under torch.compile, whose default backend needs a C++ compiler."""
    try:
        compiled(torch.sin, 1)(torch.ones(8))
    except Exception as error:  # whatever a compiler's absence raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise PeerError(f"compiling failed: {reason}") from error

    return lambda inputs, threads: compiled_core(inputs.spatial_shapes, threads)


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


def peer_rival(label: str, what: str, about: str = "") -> Rival:
    """An implementation that is named by what can be imported, or by a file."""
    packages = ("torch",) if is_file(what) else (what.split(".")[0], "torch")
    return Rival(about or what, functools.partial(find_peer, label, what), packages)


RIVALS = {
    "grid_sample": Rival("the core that libraries run on a CPU", find_grid_sample),
    "torch.compile": Rival("the grid_sample core under inductor, fixed sizes", find_compiled),
    "ONNX Runtime": Rival(
        f"the grid_sample core exported by torch.onnx.export(dynamo=False), opset {OPSET}",
        find_onnx_runtime,
        ("onnxruntime", "onnx", "torch"),
        has_backward=False,
    ),
    "transformers": peer_rival(
        "transformers",
        KNOWN["transformers"],
        "MultiScaleDeformableAttention of its Deformable DETR",
    ),
    **{label: peer_rival(label, what) for label, what in KNOWN.items() if label != "transformers"},
}


def rivals_named(wanted: list[str] | None) -> dict[str, Rival]:
    """Those asked for by a name of ``RIVALS``, or as ``LABEL=WHAT`` or ``WHAT``; None: all."""
    if wanted is None:
        return RIVALS
    named = {}
    for one in wanted:
        label, what = (one, one) if one in RIVALS else split_label(one)
        named[label] = RIVALS[one] if one in RIVALS else peer_rival(label, what)
    return named


def find_rivals(wanted: Mapping[str, Rival]) -> tuple[dict[str, Make], dict[str, str]]:
    """How to make each rival that works here; and the reason for each other one."""
    found, missing = {}, {}
    for name, rival in wanted.items():
        try:
            found[name] = rival.find()
        except PeerError as error:
            missing[name] = str(error)
    return found, missing


def described(rival: Rival) -> dict[str, Any]:
    """What a rival is, and the versions of what it is made of."""
    modules = {package: importlib.import_module(package) for package in rival.packages}
    versions = {name: getattr(module, "__version__", "?") for name, module in modules.items()}
    return {"about": rival.about, "versions": versions}


# ---- one row -------------------------------------------------------------------------------------


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


def rows_of(
    name: str,
    threads: int,
    makes: Mapping[str, Make],
    rivals: Mapping[str, Rival],
    budget: float,
) -> list[dict]:
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
        able = [rival for rival in makes if direction == "forward" or rivals[rival].has_backward]
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
    parser.add_argument(
        "--peer",
        action="append",
        metavar="[LABEL=]WHAT",
        help=f"{', '.join(RIVALS)}, a module's name, or a .py or .so file (default: all known)",
    )
    parser.add_argument("--workload", choices=CPU_WORKLOADS, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=20, help="for each line (default: 20)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]

    rivals = rivals_named(options.peer)
    makes, missing = find_rivals(rivals)
    results: dict[str, Any] = {
        "machine": cpu_machine(),
        "rivals": {name: described(rivals[name]) for name in makes},
        "missing": missing,
        "rows": [],
    }
    print_beginning(results)
    for name in options.workload or CPU_WORKLOADS:
        for threads in options.threads or sorted({1, os.cpu_count() or 1}):
            for row in rows_of(name, threads, makes, rivals, options.seconds):
                results["rows"].append(row)
                print_row(row, list(makes))
    print_ending(results["rows"])
    if options.output:
        write_json(options.output, results)
        print(f"written: {options.output}")
    return int(any("refused" in row["rivals"].get("grid_sample", {}) for row in results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
