"""Time the operator on a GPU against the grid_sample core and every peer found: ``gpu bench``.

For every workload, dtype and direction: each side's result is compared with float64 first, and one
that differs is listed and not timed. The others are timed in turn, with the L2 cache emptied before
each call (cold) and not (warm). Reported are medians, ratios to ours, and our time over the floor
that the GPU's own rates set (floors.py). Plain rows are given locations and weights, fused rows
reference points, offsets and logits; sides that are not fused then compute locations and softmax by
PyTorch, as their modules do, and so does "msda unfused".

Ours takes locations and weights in float32 whatever the dtype of value; the others take them in
that dtype, as they demand it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common.accuracy import exact_results
from benchmarks.common.baselines import after_prologue, prologue
from benchmarks.common.floors import Ceilings, count_reads, floors
from benchmarks.common.harness import Deadline, Table, make_record, print_machine, write_json
from benchmarks.common.machine import require_kernels
from benchmarks.common.peers import Peer, find_named, in_value_dtype
from benchmarks.common.sides import OURS, Side, check_sides, is_device_lost
from benchmarks.common.timing import Timer, make_timer, median, summary, take_turns
from benchmarks.workloads import GPU_WORKLOADS, Workload, sized
from msda.testing import (
    FusedInputs,
    Inputs,
    grid_sample_core,
    map_tensors,
    ours,
    random_like_output,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("backward", "forward", "fused backward", "fused forward")
# The most telling: measured in full before anything else, plain before fused, bfloat16 last.
MAIN_WORKLOADS = ("encoder-2", "decoder-300", "dino-900")
TINY_CALL = 0.2e-3  # seconds of GPU work below which the host's share is measured too
COPIED_BYTES = 2**30  # to measure DRAM bandwidth where micro.cu did not


UNFUSED = "msda unfused"
BASELINES = ("grid_sample", UNFUSED)


@dataclass(frozen=True)
class Setup:
    """What all rows of a run share."""

    device: str
    timer: Timer
    ceilings: Ceilings
    peers: list[Peer]
    budget: float  # seconds of timing for each row


# ---- ceilings ------------------------------------------------------------------------------------


def ceilings_of(device: str, timer: Timer, micro: Path, quick: bool) -> Ceilings:
    """The rates of this GPU: from the results of micro.cu where they are of it, else measured."""
    if device == "cpu":  # numbers to try the harness with
        return Ceilings(1e10, 1, 1e9, "assumed", "assumed")
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock_hz, clock_source = timer.clock_hz, "a kernel of known cycles"
    measured = read_micro(micro, properties.name)
    if measured:
        bandwidth, source = measured["dram.copy"], micro.name
    else:
        words = (COPIED_BYTES // 64 if quick else COPIED_BYTES) // 4
        given = torch.randint(2**31 - 1, (words,), dtype=torch.int32, device=device)
        copy = torch.empty_like(given)
        times = take_turns(timer, {"copy": lambda: copy.copy_(given)}, budget=0.2)
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


def sides_of(inputs: Inputs | FusedInputs, peers: list[Peer]) -> dict[str, Side]:
    """Everybody who has this form, ours first, with what their callers hand them."""
    if isinstance(inputs, FusedInputs):
        cores = {"grid_sample": after_prologue(grid_sample_core), UNFUSED: after_prologue(ours)}
        cores |= {peer.name: peer.fused for peer in peers if peer.fused}
        given: Inputs | FusedInputs = inputs
    else:
        cores = {"grid_sample": grid_sample_core}
        cores |= {peer.name: peer.plain for peer in peers if peer.plain}
        given = in_value_dtype(inputs)  # as they demand
    sides = {OURS: Side(ours, inputs, is_ours=True)}
    return sides | {
        name: Side(core, given, is_ours=name == UNFUSED) for name, core in cores.items()
    }


def measure_row(
    setup: Setup,
    direction: str,
    inputs: Inputs | FusedInputs,
    exact: Mapping[str, Tensor],
    grad_output: Tensor,
    floor: dict[str, float],
) -> dict[str, Any]:
    """Check every side, then time those that are right: one row of the results."""
    sides = sides_of(inputs, setup.peers)
    results, runs = check_sides(sides, direction, exact, grad_output)
    if OURS in runs:
        for state in ("cold", "warm"):
            times = take_turns(setup.timer, runs, cold=state == "cold", budget=setup.budget / 2)
            for name, samples in times.items():
                results[name] |= summary(samples, f"{state}_")
        for name, run in runs.items():
            if results[name]["warm_ms"] < TINY_CALL * 1e3:
                results[name]["call_us"] = setup.timer.per_call(run, 200) * 1e6
        our_ms = results[OURS]["cold_ms"]
        for name in runs:
            results[name]["ratio"] = results[name]["cold_ms"] / our_ms
        floor = floor | {"over_floor": our_ms / floor["floor_ms"]}
    return {"direction": direction, "floor": floor, "sides": results}


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
        grad_base = random_like_output(base)
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


# ---- printing ------------------------------------------------------------------------------------

COLUMNS = {
    "workload": -18,
    "dtype": -9,
    "direction": -15,
    "msda cold, ms": 10,
    "warm, ms": 10,
    "floor, ms": 10,
    "over floor": 8,
    "us per call": 9,
    "extra MB": 10,
}


def print_beginning(record: dict[str, Any], ceilings: Ceilings) -> None:
    print_machine(record)
    print(
        f"DRAM {ceilings.dram_bytes_per_second / 1e12:.2f} TB/s ({ceilings.dram_source}), "
        f"{ceilings.multiprocessors} multiprocessors at {ceilings.clock_hz / 1e9:.3f} GHz "
        f"({ceilings.clock_source})"
    )
    for label, reason in record["missing_peers"].items():
        print(f"no peer {label}: {reason}")


def print_ending(record: dict[str, Any]) -> None:
    print("\nlast columns: a side's time over ours, both cold; more is better for us.")
    for reason, where in refusals(record["rows"]).items():
        more = f" and {len(where) - 1} more" if len(where) > 1 else ""
        print(f"refused: {reason} ({where[0]}{more})")
    for entry in record["not_run"]:
        print(f"not run, or not to the end: {entry['workload']}: {entry['reason']}")


def row_cells(row: dict[str, Any], names: list[str]) -> list[str]:
    """A row as text; the cell of another side is its time over ours, cold."""
    found, floor = row["sides"][OURS], row["floor"]
    cells = [row["workload"], row["dtype"], row["direction"]]
    if "cold_ms" not in found:
        return [*cells, "wrong"] + [""] * (len(COLUMNS) - 4 + len(names))
    call = f"{found['call_us']:.1f}" if "call_us" in found else ""
    cells += [f"{found['cold_ms']:.4f}", f"{found['warm_ms']:.4f}", f"{floor['floor_ms']:.4f}"]
    cells += [f"{floor['over_floor']:.1f}x", call, f"{found['extra_bytes'] / 1e6:.1f}"]
    for name in names:
        side = row["sides"].get(name)
        if side is None:
            cells.append("")
        else:
            cells.append(f"{side['ratio']:.1f}x" if "ratio" in side else "refused")
    return cells


def refusals(rows: list[dict[str, Any]]) -> dict[str, list[str]]:
    """What was refused and where, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for name, side in row["sides"].items():
            if "refused" in side:
                where = f"{row['workload']} {row['dtype']} {row['direction']}"
                reasons.setdefault(f"{name}: {side['refused']}", []).append(where)
    return reasons


# ---- the command ---------------------------------------------------------------------------------


def run(options: argparse.Namespace, folder: Path) -> int:
    """Measure everything asked for, writing after each row; 0 if nothing of ours was wrong."""
    require_kernels(options.device)
    known = {"workload": GPU_WORKLOADS, "dtype": DTYPES, "direction": DIRECTIONS}
    for option, names in known.items():
        for name in getattr(options, option) or ():
            if name not in names:
                sys.exit(f"--{option} must be one of {', '.join(names)}, got {name}")
    deadline = Deadline(options.minutes)
    device, path = options.device, folder / "cuda_operator.json"
    timer = make_timer(device)
    ceilings = ceilings_of(device, timer, folder / "cuda_micro.json", options.quick)
    peers, missing = find_named(options.peer, device)
    setup = Setup(device, timer, ceilings, peers, 0.002 if options.quick else options.seconds)
    record = make_record(
        options,
        ceilings=asdict(ceilings),
        peers={peer.name: peer.kind for peer in peers},
        missing_peers=missing,
        not_run=[],
        rows=[],
    )
    names = [*BASELINES, *(peer.name for peer in peers)]
    print_beginning(record, ceilings)
    table = Table(COLUMNS | dict.fromkeys(names, 9))

    lost, longest = "", 0.0
    wanted = (options.workload or GPU_WORKLOADS, options.dtype or DTYPES)
    in_order = [name for name in DIRECTIONS if name in (options.direction or DIRECTIONS)]
    for name, dtypes, directions in plan(*map(list, wanted), in_order):
        rows = rows_of(setup, name, sized(GPU_WORKLOADS[name], options.quick), dtypes, directions)
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
            record["rows"].append(row)
            write_json(path, record)
            table.add(*row_cells(row, names))
        rows.close()
        if reason:
            record["not_run"].append({"workload": name, "reason": reason})
    write_json(path, record)
    print_ending(record)
    print(f"written: {path}")
    wrong = any("refused" in row["sides"][OURS] for row in record["rows"])
    return int(wrong or not record["rows"] or lost.startswith("the GPU"))
