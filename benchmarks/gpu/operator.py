"""Time the operator on a GPU against the grid_sample core and every peer found: ``gpu.py bench``.

For every workload, dtype and direction: each rival's result is compared with float64 first, and one
that differs is listed and not timed. The others are timed in turn, with the L2 cache emptied before
each call (cold) and not (warm). Reported are medians, ratios to ours, and our time over the floor
that the GPU's own rates set (roofline.py). Plain rows are given locations and weights, fused rows
reference points, offsets and logits; rivals that are not fused then compute locations and softmax
by PyTorch, as their modules do, and so does "msda unfused".

Ours takes locations and weights in float32 whatever the dtype of value; the others take them in
that dtype, as they demand it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accuracy import complaint, errors_of, exact_results, others_limit, our_limit, results_of
from baselines import after_prologue, grid_sample_core, ours, ours_fused, prologue
from measure import (
    Timer,
    backward_of,
    forward_of,
    gpu_machine,
    make_timer,
    median,
    peak_extra_memory,
    quartiles,
    take_turns,
)
from peers import KNOWN, Peer, PeerError, find, in_value_dtype, split_label
from records import Deadline, table_line, write_json
from roofline import Ceilings, count_reads, floors
from torch import Tensor
from workloads import GPU_WORKLOADS, Workload

import msda
from msda.testing import FusedInputs, Inputs, map_tensors

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("backward", "forward", "fused backward", "fused forward")
# The most telling: measured in full before anything else, plain before fused, bfloat16 last.
MAIN_WORKLOADS = ("encoder-2", "decoder-300", "dino-900")
TINY_CALL = 0.2e-3  # seconds of GPU work below which the host's share is measured too
COPIED_BYTES = 2**30  # to measure DRAM bandwidth where micro.cu did not


OURS = Peer("msda", "ours", ours, ours_fused)
BASELINES = (
    Peer("grid_sample", "PyTorch", grid_sample_core, after_prologue(grid_sample_core)),
    Peer("msda unfused", "ours", None, after_prologue(ours)),
)


@dataclass(frozen=True)
class Setup:
    """What all rows of a run share."""

    device: str
    timer: Timer
    ceilings: Ceilings
    peers: list[Peer]
    budget: float  # seconds of timing for each row


# ---- ceilings ------------------------------------------------------------------------------------


def ceilings_of(device: str, timer: Timer, micro: Path, smoke: bool) -> Ceilings:
    """The rates of this GPU: from the results of micro.cu where they are of it, else measured."""
    if device == "cpu":  # numbers to try the harness with
        return Ceilings(1e10, 1, 1e9, "assumed", "assumed")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock_hz, clock_source = timer.clock_hz, "a kernel of known cycles"
    measured = read_micro(micro, properties.name)
    if measured:
        bandwidth, source = measured["dram.copy"], micro.name
    else:
        words = (COPIED_BYTES // 64 if smoke else COPIED_BYTES) // 4
        given = torch.randint(2**31 - 1, (words,), dtype=torch.int32, device=device)
        copy = torch.empty_like(given)
        times = take_turns(timer, {"copy": lambda: copy.copy_(given)}, cold=False, budget=0.2)
        assert torch.equal(given, copy), "a copy must equal its source"
        bandwidth, source = 2 * words * 4 / median(times["copy"]), "copy of 1 GiB by PyTorch"
    return Ceilings(
        bandwidth, properties.multi_processor_count, clock_hz, source, clock_source=clock_source
    )


def read_micro(path: Path, device_name: str) -> dict[str, float]:
    """Bytes per second of each measurement of micro.cu that is verified and of this device."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    rates = {
        row["name"]: row["bytes_per_second"]
        for row in results.get("measurements", [])
        if row.get("verified")
    }
    is_this = results["machine"]["device"] == device_name and "dram.copy" in rates
    return rates if is_this else {}


# ---- one row -------------------------------------------------------------------------------------


def rivals_of(direction: str, peers: list[Peer]) -> dict[str, tuple[Peer, Callable]]:
    """Everybody who has this form, ours first."""
    form = "fused" if direction.startswith("fused") else "plain"
    rivals = (OURS, *BASELINES, *peers)
    return {peer.name: (peer, getattr(peer, form)) for peer in rivals if getattr(peer, form)}


def inputs_for(peer: Peer, inputs: Inputs | FusedInputs) -> Inputs | FusedInputs:
    """What a rival's callers hand it: plain locations and weights as it demands them."""
    if peer is OURS or isinstance(inputs, FusedInputs):
        return inputs
    return in_value_dtype(inputs)


def is_device_lost(error: BaseException) -> bool:
    """Whether the GPU refuses everything after this error."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def measure_row(
    setup: Setup,
    direction: str,
    inputs: Inputs | FusedInputs,
    exact: dict[str, Tensor],
    grad_output: Tensor,
    floor: dict[str, float],
) -> dict[str, Any]:
    """Check every rival, then time those that are right: one row of the results."""
    timer, dtype = setup.timer, inputs.value.dtype
    backward = direction.endswith("backward")
    results: dict[str, dict[str, Any]] = {}
    runs = {}
    for name, (peer, core) in rivals_of(direction, setup.peers).items():
        given = inputs_for(peer, inputs)
        try:
            errors = errors_of(results_of(core, given, grad_output if backward else None), exact)
            limit = our_limit if peer.kind == "ours" else others_limit
            wrong = complaint(errors, limit, dtype)
            results[name] = {"errors": errors}
            if wrong is not None:
                results[name]["refused"] = wrong
                continue
            run = backward_of(core, given, grad_output) if backward else forward_of(core, given)
            results[name]["extra_bytes"] = peak_extra_memory(run, setup.device)
            runs[name] = run
        except Exception as error:  # whatever a stranger's code raises
            if is_device_lost(error):
                raise
            results[name] = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:300]}

    if OURS.name in runs:
        for state in ("cold", "warm"):
            times = take_turns(timer, runs, cold=state == "cold", budget=setup.budget / 2)
            for name, samples in times.items():
                results[name][f"{state}_ms"] = median(samples) * 1e3
                results[name][f"{state}_quartiles_ms"] = [q * 1e3 for q in quartiles(samples)]
                results[name][f"{state}_rounds"] = len(samples)
        for name, run in runs.items():
            if results[name]["warm_ms"] < TINY_CALL * 1e3:
                results[name]["call_us"] = timer.per_call(run, 200) * 1e6
        ours = results[OURS.name]["cold_ms"]
        for name in runs:
            results[name]["ratio"] = results[name]["cold_ms"] / ours
        floor = floor | {"over_floor": ours / floor["floor_ms"]}
    return {"direction": direction, "floor": floor, "rivals": results}


# ---- all rows ------------------------------------------------------------------------------------


def on_device(inputs: Any, dtype: torch.dtype, device: str) -> Any:
    """Inputs moved to a device, value in another dtype."""
    moved = map_tensors(inputs, lambda tensor: tensor.to(device))
    moved.value = moved.value.to(dtype)
    return moved


def exact_budget(device: str) -> float:
    """Bytes that the float64 reference may take for one chunk of queries."""
    return min(8e9, torch.cuda.mem_get_info()[0] / 4) if device == "cuda" else 5e8


def rows_of(
    setup: Setup, name: str, workload: Workload, dtypes: list[str], directions: list[str]
) -> Iterator[dict[str, Any]]:
    """The rows of one workload; what is common to several is computed once."""
    device = setup.device
    forms = [("", workload.plain)] + ([("fused ", workload.fused)] if workload.has_fused else [])
    for prefix, make in forms:
        wanted = [d for d in directions if d.startswith("fused") == bool(prefix)]
        if not wanted:
            continue
        base = make(torch.float32)
        shape = (base.value.shape[0], base.tensors()[-1].shape[1], base.value.shape[2:].numel())
        grad_base = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        reads = None
        for dtype_name in dtypes:
            dtype = DTYPES[dtype_name]
            inputs = on_device(base, dtype, device)
            if reads is None:
                reads = count_reads(prologue(inputs) if prefix else inputs)
            grad_output = grad_base.to(device, dtype)
            exact = exact_results(inputs, grad_output, budget=exact_budget(device))
            for direction in wanted:
                backward = direction.endswith("backward")
                floor = floors(inputs, reads, setup.ceilings, backward=backward)
                row = measure_row(setup, direction, inputs, exact, grad_output, floor)
                yield {
                    "workload": name,
                    "dtype": dtype_name,
                    "samples": base.tensors()[-1].numel(),
                    "corners": reads.corners,
                    "touched_rows": reads.touched_rows,
                } | row
            del inputs, grad_output, exact
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()


def plan(
    names: list[str], dtypes: list[str], directions: list[str]
) -> Iterator[tuple[str, list[str], list[str]]]:
    """(workload, dtypes, directions), the most telling first: a run may be cut off."""
    main = [name for name in MAIN_WORKLOADS if name in names]
    others = [name for name in names if name not in main]
    first = [dtype for dtype in dtypes if dtype != "bfloat16"]
    fused = [direction for direction in directions if direction.startswith("fused")]
    plain = [direction for direction in directions if direction not in fused]
    steps = [(name, first, chosen) for chosen in (plain, fused) for name in main]
    steps += [(name, [d for d in dtypes if d not in first], directions) for name in main]
    steps += [(name, dtypes, directions) for name in others]
    yield from (step for step in steps if step[1] and step[2])


def find_peers(wanted: list[str], device: str) -> tuple[list[Peer], dict[str, str]]:
    """The peers that run and compute the operator here; and the reason for each other one."""
    candidates = dict(KNOWN) if not wanted else {}
    candidates |= dict(split_label(what) for what in wanted if what != "none")
    found, missing = [], {}
    for label, what in candidates.items():
        try:
            found.append(find(label, what, device))
        except PeerError as error:
            missing[label] = str(error)
    return found, missing


# ---- printing ------------------------------------------------------------------------------------

WIDTHS = [-18, -9, -15, 10, 10, 10, 8, 9, 10]
HEADINGS = (
    ["", "", "", "msda", "msda", "floor", "over", "us per", "extra"],
    ["workload", "dtype", "direction", "cold ms", "warm ms", "ms", "floor", "call", "MB"],
)


def rival_widths(names: list[str]) -> list[int]:
    return [max(9, len(name) + 2) for name in names]


def print_beginning(results: dict[str, Any], ceilings: Ceilings) -> None:
    print(*(f"{key}: {text}" for key, text in results["machine"].items()), sep=", ")
    print(
        f"DRAM {ceilings.dram_bytes_per_second / 1e12:.2f} TB/s ({ceilings.dram_source}), "
        f"{ceilings.multiprocessors} multiprocessors at {ceilings.clock_hz / 1e9:.3f} GHz "
        f"({ceilings.clock_source})"
    )
    for label, reason in results["missing_peers"].items():
        print(f"no peer {label}: {reason}")
    print()


def print_headings(names: list[str]) -> None:
    widths = WIDTHS + rival_widths(names)
    print(table_line(HEADINGS[0] + [""] * len(names), widths).rstrip())
    print(table_line(HEADINGS[1] + names, widths))


def print_row(row: dict[str, Any], names: list[str]) -> None:
    print(table_line(row_cells(row, names), WIDTHS + rival_widths(names)).rstrip(), flush=True)


def print_ending(results: dict[str, Any]) -> None:
    print("\ncolumns of rivals: their time over ours, both cold; more is better for us.")
    for reason, where in refusals(results["rows"]).items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"refused: {reason} ({where[0]}{more})")
    for entry in results["not_run"]:
        print(f"not run, or not to the end: {entry['workload']}: {entry['reason']}")


def row_cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """A row as text; a rival's cell is its time over ours, cold."""
    ours, floor = row["rivals"][OURS.name], row["floor"]
    cells = [row["workload"], row["dtype"], row["direction"]]
    if "cold_ms" not in ours:
        return cells + ["wrong"] + [""] * (len(WIDTHS) - 4 + len(names))
    call = f"{ours['call_us']:.1f}" if "call_us" in ours else ""
    cells += [f"{ours['cold_ms']:.4f}", f"{ours['warm_ms']:.4f}", f"{floor['floor_ms']:.4f}"]
    cells += [f"{floor['over_floor']:.1f}x", call, f"{ours['extra_bytes'] / 1e6:.1f}"]
    for name in names:
        rival = row["rivals"].get(name)
        if rival is None:
            cells.append("")
        else:
            cells.append(f"{rival['ratio']:.1f}x" if "ratio" in rival else "refused")
    return cells


def refusals(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What was refused and where, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, rival in row["rivals"].items():
            if "refused" in rival:
                where = f"{row['workload']} {row['dtype']} {row['direction']}"
                reasons.setdefault(f"{name}: {rival['refused']}", []).append(where)
    return reasons


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="[LABEL=]WHAT",
        help="a module's name, or a .py or .so file; 'none' for no peers (default: all known)",
    )
    parser.add_argument("--workload", choices=GPU_WORKLOADS, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: all")
    parser.add_argument("--direction", choices=DIRECTIONS, action="append", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=0.6, help="of timing for each row (default: 0.6)"
    )


def require_kernels(device: str) -> None:
    """Refuse to time the PyTorch reference in the name of the kernels."""
    about = msda.info()
    if about["backend"] != "native":
        sys.exit(f"bench: the native backend must be live, got {about['backend']}")
    if device == "cuda" and not about["cuda_architectures"]:
        sys.exit("bench: msda must be built with CUDA kernels, got none: gpu.py build")


def run(options: argparse.Namespace, folder: Path) -> int:
    """Measure everything asked for, writing after each row; 0 if nothing of ours was wrong."""
    require_kernels(options.device)
    deadline = Deadline(options.minutes)
    device, path = options.device, folder / "cuda_operator.json"
    timer = make_timer(device)
    ceilings = ceilings_of(device, timer, folder / "cuda_micro.json", options.smoke)
    peers, missing = find_peers(options.peer, device)
    setup = Setup(device, timer, ceilings, peers, 0.002 if options.smoke else options.seconds)
    results: dict[str, Any] = {
        "machine": gpu_machine(device),
        "command": options.command,
        "smoke": options.smoke,
        "ceilings": asdict(ceilings),
        "peers": {peer.name: peer.kind for peer in peers},
        "missing_peers": missing,
        "not_run": [],
        "rows": [],
    }
    names = [rival.name for rival in (*BASELINES, *peers)]
    print_beginning(results, ceilings)
    print_headings(names)

    lost, longest = "", 0.0
    wanted = (options.workload or GPU_WORKLOADS, options.dtype or DTYPES)
    in_order = [name for name in DIRECTIONS if name in (options.direction or DIRECTIONS)]
    for name, dtypes, directions in plan(*map(list, wanted), in_order):
        workload = GPU_WORKLOADS[name].tiny() if options.smoke else GPU_WORKLOADS[name]
        rows = rows_of(setup, name, workload, dtypes, directions)
        reason = lost
        while not reason:
            start = time.perf_counter()
            if not deadline.allows(1.5 * longest):
                reason = lost = f"{options.minutes:g} minutes were over"
                break
            try:
                row = next(rows)
            except StopIteration:
                break
            except torch.OutOfMemoryError as error:
                reason = str(error)
                break
            except RuntimeError as error:
                if not is_device_lost(error):
                    raise
                reason = lost = f"the GPU was lost: {error}"
                break
            longest = max(longest, time.perf_counter() - start)
            results["rows"].append(row)
            write_json(path, results)
            print_row(row, names)
        rows.close()
        if reason:
            results["not_run"].append({"workload": name, "reason": reason})
    write_json(path, results)
    print_ending(results)
    print(f"written: {path}")
    wrong = any("refused" in row["rivals"][OURS.name] for row in results["rows"])
    return int(wrong or not results["rows"] or lost.startswith("the GPU"))


if __name__ == "__main__":
    sys.exit("Run me as: python benchmarks/gpu.py bench")
