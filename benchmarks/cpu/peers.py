"""Time the operator on a CPU against other implementations of it.

They are the grid_sample core exported to ONNX and run by OpenVINO and by ONNX Runtime, which have
no backward; the core of the transformers library; and every implementation that common/peers.py
knows or that ``--peer`` names, as far as it runs on a CPU. One that is not installed or does not
work here is listed with the reason; one whose results differ from float64 by more than
``accuracy.peer_limits`` is listed and not timed. The others are timed in turn with ours in one
process; exporting is not part of any time. The core under PyTorch itself is a baseline of
``python -m benchmarks operator``.
"""

from __future__ import annotations

import argparse
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import harness
from benchmarks.common.accuracy import Core, exact_results
from benchmarks.common.baselines import GridSampleCore
from benchmarks.common.machine import require_kernels, versions
from benchmarks.common.peers import KNOWN, PeerError, find_named, in_a_line, is_file, load
from benchmarks.common.sides import OURS, Side, check_sides
from benchmarks.common.timing import SettledTimer, median, summary, take_turns
from benchmarks.workloads import CPU_WORKLOADS, sized
from msda.testing import Inputs, ours, random_like_output

OPSET = 20  # the newest of the exporter that needs no onnxscript; GridSample exists since 16
ABOUT = {
    "transformers": "MultiScaleDeformableAttention of its Deformable DETR",
}


# ---- runtimes that run the exported core ---------------------------------------------------------


def in_openvino(inputs: Inputs, threads: int) -> Core:
    """The core as OpenVINO executes it, for inputs of these sizes."""
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = load("openvino").Core()
    compiled = core.compile_model(core.read_model(io.BytesIO(exported(inputs))), "CPU", options)
    return lambda inputs: torch.from_numpy(compiled([one.numpy() for one in inputs.tensors()])[0])


def in_onnx_runtime(inputs: Inputs, threads: int) -> Core:
    """The core as ONNX Runtime executes it, for inputs of these sizes."""
    runtime = load("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads go on spinning for a while, at the expense of the side that is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers = ["CPUExecutionProvider"]
    session = runtime.InferenceSession(exported(inputs), options, providers=providers)
    names = [argument.name for argument in session.get_inputs()]

    def core(inputs: Inputs) -> Tensor:
        arrays = (tensor.numpy() for tensor in inputs.tensors())
        (output,) = session.run(None, dict(zip(names, arrays, strict=True)))
        return torch.from_numpy(output)

    return core


def exported(inputs: Inputs) -> bytes:
    """The core as an ONNX model for inputs of these sizes."""
    load("onnx")  # the exporter's
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


# By name: how they are made, and their packages.
RUNTIMES: dict[str, tuple[Callable[[Inputs, int], Core], tuple[str, ...]]] = {
    "OpenVINO": (in_openvino, ("openvino", "onnx", "torch")),
    "ONNX Runtime": (in_onnx_runtime, ("onnxruntime", "onnx", "torch")),
}
ABOUT |= dict.fromkeys(
    RUNTIMES, f"the grid_sample core by torch.onnx.export(dynamo=False), opset {OPSET}"
)


# ---- the peers -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A peer that works here."""

    make: Callable[[Inputs, int], Core]  # for inputs of these sizes and this number of threads
    about: dict[str, Any]  # what it is, and the versions of what it is made of
    has_backward: bool = True


def find_candidates(wanted: list[str]) -> tuple[dict[str, Candidate], dict[str, str]]:
    """Each peer that works here, by name, and why each other one does not."""
    found, missing = {}, {}
    for name, (make, packages) in RUNTIMES.items():
        if wanted and name not in wanted:
            continue
        try:
            for package in packages:
                load(package)
            found[name] = Candidate(make, describe(name, *packages), has_backward=False)
        except PeerError as error:
            missing[name] = str(error)
    others = [one for one in wanted if one not in RUNTIMES]
    peers, not_found = find_named(others if others or not wanted else ["none"], "cpu")
    missing |= not_found
    for peer in peers:
        if peer.plain is None:
            missing[peer.name] = "it takes no locations and weights"
            continue
        packages = ("torch",) if is_file(peer.what) else (peer.what.split(".")[0], "torch")
        core = peer.plain
        found[peer.name] = Candidate(
            lambda inputs, threads, core=core: core, describe(peer.what, *packages, name=peer.name)
        )
    return found, missing


def describe(what: str, *packages: str, name: str = "") -> dict[str, Any]:
    """What a record says of a peer."""
    return {"about": ABOUT.get(name or what, what), "versions": versions(*packages)}


# ---- rows ----------------------------------------------------------------------------------------


def rows_of(
    name: str, threads: int, candidates: Mapping[str, Candidate], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Both rows of one workload and number of threads; each peer is made once for both."""
    torch.set_num_threads(threads)
    inputs = sized(CPU_WORKLOADS[name], options.quick).plain(torch.float32)
    grad_output = random_like_output(inputs)
    exact = exact_results(inputs, grad_output)
    sides, broken = {OURS: Side(ours, inputs, is_ours=True)}, {}
    for peer, candidate in candidates.items():
        try:
            sides[peer] = Side(candidate.make(inputs, threads), inputs)
        except Exception as error:  # whatever an exporter raises
            broken[peer] = {"refused": in_a_line(error)}
    for direction in ("forward", "backward"):
        able = {OURS} | {
            peer
            for peer, candidate in candidates.items()
            if direction == "forward" or candidate.has_backward
        }
        chosen = {side: entry for side, entry in sides.items() if side in able}
        results, runs = check_sides(chosen, direction, exact, grad_output)
        results |= {peer: reason for peer, reason in broken.items() if peer in able}
        if OURS in runs:
            budget = 0.0 if options.quick else options.seconds
            times = take_turns(SettledTimer(), runs, budget=budget)
            for side, samples in times.items():
                ratio = median(samples) / median(times[OURS])
                results[side] |= summary(samples) | {"ratio": ratio}
        yield {
            "workload": name,
            "threads": threads,
            "direction": direction,
            "dtype": "float32",
            "sides": results,
        }


def cell(side: dict[str, Any] | None) -> str:
    if side is None:
        return "-"
    return f"{side['ms']:.1f} {side['ratio']:6.1f}x" if "ms" in side else "refused"


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=20.0)
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="[LABEL=]WHAT",
        help=f"{', '.join(map(repr, RUNTIMES))}, {', '.join(KNOWN)}, a module's name, or a .py or "
        ".so file (default: all these)",
    )
    harness.add_choice(parser, "workload", CPU_WORKLOADS)
    harness.add_thread_counts(parser)


def main(options: argparse.Namespace) -> int:
    """Measure everything asked for; 1 where a result of ours is wrong."""
    require_kernels()
    candidates, missing = find_candidates(options.peer)
    rows: list[dict[str, Any]] = []
    record = harness.make_record(
        options,
        sides={name: candidate.about for name, candidate in candidates.items()},
        missing=missing,
        rows=rows,
    )
    harness.print_machine(record)
    for name, reason in missing.items():
        print(f"missing: {name}: {reason}")
    print("\nms, medians of one run; x: a peer's time over ours, more is better; -: has no such.")
    columns = {"workload": -10, "direction": -11, "threads": 8, "msda": 10}
    table = harness.Table(columns | dict.fromkeys(candidates, 18))
    for name in options.workload or CPU_WORKLOADS:
        for threads in harness.thread_counts(options):
            for row in rows_of(name, threads, candidates, options):
                rows.append(row)
                cells = [cell(row["sides"].get(peer)) for peer in candidates]
                ms = row["sides"][OURS].get("ms")
                shown = "refused" if ms is None else f"{ms:.2f}"
                table.add(name, row["direction"], threads, shown, *cells)
                for side, result in row["sides"].items():
                    if "refused" in result:
                        print(f"refused: {side}: {result['refused']}")
    harness.keep_record(options, record)
    return int(any("refused" in row["sides"][OURS] for row in rows))
