"""Hold what the CUDA kernels ask of memory against a committed budget.

    python -m tests.cuda.memory_traffic COMMAND

    check    compare with the budget; exit status 1 if over
    update   write what is counted into the budget
    show     print the table
    hits     write into the budget file how often a model of L1 holds the pixels of an encoder;
             takes minutes

    --workload NAME   this one alone; may be given several times
    --samples N       count in workloads of about so many samples (default: the budget's; show only)

The kernels run on the CPU, in the executor of tests/cuda/executor, which counts the accesses of
each warp: what it counts, how, and what it does not model is said in tests/cuda/executor/traffic.h.
No GPU is needed; make test builds the executor.

The budget file, tests/cuda/memory_traffic.json:

    margin   by how much requests and sectors may exceed what is recorded
    samples  about how many samples the workloads of benchmarks/workloads.py are scaled down to
    full     what must fill its sectors: by class, in the cases whose "workload, case" is like a
             pattern, as of a shell, how many sectors for each one that the same bytes would fill
    traffic  by workload and case, for each class of access: requests of a warp, sectors, and the
             least sectors that those requests could do with, all for one sample; of shared memory,
             wavefronts in the place of sectors. Corners: pixels read for a sample
    hits     the share of an encoder's pixel sectors that the model of L1 holds, by dtype, heads in
             a tile, KiB of L1 and whether its index is a hash; nothing is held to these

`update` rewrites traffic and `hits` hits; the rest is kept by hand.
"""

from __future__ import annotations

import argparse
import collections
import fnmatch
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.workloads import GPU_WORKLOADS, Workload  # noqa: E402
from msda.testing import gradient_names, random_like_output  # noqa: E402
from tests.helpers import executor  # noqa: E402

BUDGET = Path(__file__).with_suffix(".json")

# Those that differ in more than the number of images, and sizes off the fast paths.
WORKLOADS = {
    name: workload
    for name, workload in GPU_WORKLOADS.items()
    if name not in ("encoder-4", "encoder-4-uniform", "dino-900", "hub-large", "msda-triton")
} | {
    name: Workload(
        f"{head_dim} channels to a head",
        [(40, 40), (20, 20)],
        sizes=dict(num_queries=300, num_heads=heads, head_dim=head_dim),
    )
    for name, head_dim, heads in (
        ("head-dim-64", 64, 4),
        ("head-dim-24", 24, 8),
        ("head-dim-72", 72, 2),
        ("unaligned-19", 19, 3),  # rows begin anywhere in a sector
    )
}
OF_ARCHITECTURES = {"sm_75": 75, "sm_90": 90}
DTYPES = {"float32": torch.float32, "float16": torch.float16, "float64": torch.float64}
MULTIPROCESSORS = 2  # so few that a small problem fills them, as the large one fills a GPU

# What an array is counted under, by how it is accessed.
CLASSES = {
    "pixels": ("value",),
    "reductions": (),
    "points and weights": ("points", "weights", "reference", "padding_mask", "level_table"),
    "grad_output": ("grad_output", "output"),
    "outputs": ("output", "grad_points", "grad_weights", "grad_reference", "grad_value"),
    "scratch": ("cells", "corner_weights", "sorted_cells", "sample_order", "cell_starts"),
    "shared memory": ("shared memory",),
}
LOADS = ("pixels", "points and weights", "grad_output")
COUNTS = ("requests", "sectors", "least")


def class_of(array: str, kind: str) -> str:
    """The class of one kind of access to one array."""
    if kind == "reduction":
        return "reductions"
    for name, arrays in CLASSES.items():
        fits = name in ("scratch", "shared memory") or (name in LOADS) == (kind == "load")
        if array in arrays and fits:
            return name
    raise KeyError(f"{array} must have a class of {kind}, got none")


# ---- counting ------------------------------------------------------------------------------------


def cases_of(name: str, workload: Workload) -> Iterator[tuple[str, str, str, str]]:
    """(case, dtype, direction, architecture or "") of everything that is counted of a workload."""
    dtypes = ["float32", "float16"] if name != "unaligned-19" else list(DTYPES)
    for dtype in dtypes:
        for prefix in ("", "fused ") if workload.has_fused else ("",):
            yield f"{prefix}forward, {dtype}", dtype, f"{prefix}forward", "sm_75"
            for arch in OF_ARCHITECTURES:
                yield f"{prefix}backward, {dtype}, {arch}", dtype, f"{prefix}backward", arch
        yield f"deterministic, {dtype}", dtype, "deterministic", "sm_75"


def count(
    workload: Workload, dtype: torch.dtype, direction: str, arch: str
) -> dict[str, dict[str, float]]:
    """Requests, sectors and the least sectors of each class, for one sample."""
    inputs = workload.fused(dtype) if direction.startswith("fused") else workload.plain(dtype)
    device = executor.make_device(
        num_multiprocessors=MULTIPROCESSORS,
        compute_capability=OF_ARCHITECTURES[arch],
        counts_memory=True,
    )
    if direction.endswith("forward"):
        executor.forward(inputs, device)
    elif direction == "deterministic":
        executor.gather(inputs, random_like_output(inputs), device)
    else:
        names = [name for name in gradient_names(inputs) if name != "reference_points"]
        executor.backward(inputs, random_like_output(inputs), names, device)
    sums: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for entry in device.traffic:
        counts = sums[class_of(entry["array"], entry["kind"])]
        counts["requests"] += entry["requests"]
        counts["sectors"] += entry["sectors"]
        counts["least"] += entry["least_sectors"]
    samples = inputs.tensors()[-1].numel()
    return {
        name: {count: round(sums[name][count] / samples, 3) for count in COUNTS}
        for name in CLASSES
        if name in sums
    }


def corners_of(workload: Workload) -> float:
    """Pixels that one sample reads, in the mean."""
    from benchmarks.common.floors import count_reads

    inputs = workload.plain(torch.float32)
    return round(count_reads(inputs).corners / inputs.attention_weights.numel(), 2)


def measure(names: Iterable[str], samples: int) -> dict[str, dict]:
    """The traffic of these workloads, as the budget has it."""
    traffic: dict[str, dict] = {}
    for name in names:
        workload = WORKLOADS[name].scaled(samples)
        traffic[name] = {"corners": corners_of(workload)}
        for case, dtype, direction, arch in cases_of(name, workload):
            traffic[name][case] = count(workload, DTYPES[dtype], direction, arch)
    return traffic


# ---- the model of L1 -----------------------------------------------------------------------------

HIT_SAMPLES = 700_000  # so many that a tile is a small part of the map
L1_KIB = (32, 128)
TILE_HEADS = (1, 2, 4, 8)


def hits() -> dict[str, dict[str, dict[str, float]]]:
    """The share of pixel sectors found in L1: by dtype and heads in a tile, then by cache."""
    workload = WORKLOADS["encoder-2"].scaled(HIT_SAMPLES)
    shares: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in ("float32", "float16"):
        inputs = workload.plain(DTYPES[dtype])
        for heads in TILE_HEADS:
            of_cache = shares.setdefault(dtype, {}).setdefault(str(heads), {})
            for kib in L1_KIB:
                for is_hashed in (True, False):
                    device = executor.make_device(
                        num_multiprocessors=MULTIPROCESSORS,
                        counts_memory=True,
                        l1_bytes=kib * 1024,
                        l1_is_hashed=is_hashed,
                    )
                    executor.forward(inputs, device, split=1, tile_heads=heads)
                    (pixels,) = (entry for entry in device.traffic if entry["array"] == "value")
                    name = f"{kib} KiB{'' if is_hashed else ', not hashed'}"
                    of_cache[name] = round(pixels["hits"] / pixels["sectors"], 3)
    return shares


def markdown_hits(shares: dict[str, dict[str, dict[str, float]]]) -> str:
    """The shares in percent, in Markdown."""
    caches = list(next(iter(next(iter(shares.values())).values())))
    lines = [
        f"| dtype | heads in a tile | {' | '.join(caches)} |",
        "|---" * (2 + len(caches)) + "|",
    ]
    for dtype, of_heads in shares.items():
        for heads, of_cache in of_heads.items():
            cells = [f"{100 * of_cache[cache]:.0f} %" for cache in caches]
            lines.append(f"| {dtype} | {heads} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---- the budget ----------------------------------------------------------------------------------


def over_budget(traffic: dict[str, dict], budget: dict) -> Iterator[str]:
    """One sentence for each thing that is over the budget."""
    for here, recorded, counted in _pairs(budget["traffic"], traffic):
        if counted is None or recorded is None:
            yield f"{here}: must be in the budget and in the code, got one of them: run update"
            continue
        for name in COUNTS[:2]:
            limit = round(recorded[name] * (1 + budget["margin"]) + 0.001, 3)
            if counted[name] > limit:
                unit = "wavefronts" if (name, here[-6:]) == ("sectors", "memory") else name
                yield f"{here}: {unit} of a sample must be at most {limit}, got {counted[name]}"
    for workload, cases in traffic.items():
        for case, classes in cases.items():
            for pattern, limits in budget["full"].items():
                if case == "corners" or not fnmatch.fnmatchcase(f"{workload}, {case}", pattern):
                    continue
                for name, limit in limits.items():
                    if name in classes and not _is_full(classes[name], limit):
                        yield (
                            f"{workload}, {case}: {name} must take at most {limit} times the "
                            f"sectors that their bytes fill, got {classes[name]['sectors']} for "
                            f"{classes[name]['least']}"
                        )


def _is_full(counted: dict[str, float], limit: float) -> bool:
    return counted["sectors"] <= limit * counted["least"] + 0.001


def _pairs(
    recorded: dict[str, dict], counted: dict[str, dict]
) -> Iterator[tuple[str, dict | None, dict | None]]:
    """(where, what is recorded, what is counted) of each class of the workloads counted."""
    for workload, cases in counted.items():
        known = recorded.get(workload, {})
        for case in dict.fromkeys([*known, *cases]):
            if case == "corners":
                continue
            before, now = known.get(case, {}), cases.get(case, {})
            for name in dict.fromkeys([*before, *now]):
                yield f"{workload}, {case}: {name}", before.get(name), now.get(name)


def format_budget(budget: dict) -> str:
    """JSON with a line for each case."""
    lines = ["{"]
    for key in ("margin", "samples", "full"):
        lines.append(f'  "{key}": {json.dumps(budget[key])},')
    lines.append('  "traffic": {')
    workloads = [
        f"    {json.dumps(workload)}: {{\n"
        + ",\n".join(f"      {json.dumps(k)}: {json.dumps(v)}" for k, v in cases.items())
        + "\n    }"
        for workload, cases in budget["traffic"].items()
    ]
    lines += [",\n".join(workloads), "  },", f'  "hits": {json.dumps(budget["hits"])}', "}"]
    return "\n".join(lines) + "\n"


# ---- the command line ----------------------------------------------------------------------------


def markdown_table(traffic: dict[str, dict]) -> str:
    """The counts, in Markdown."""
    lines = [
        f"| workload (corners read for a sample) | case | {' | '.join(CLASSES)} |",
        "|---" * (2 + len(CLASSES)) + "|",
    ]
    for workload, of_case in traffic.items():
        for case, classes in of_case.items():
            if case == "corners":
                continue
            cells = [f"{workload} ({of_case['corners']})", case]
            for name in CLASSES:
                counts = classes.get(name)
                cells.append(
                    f"{counts['requests']:.2f}: {counts['sectors']:.2f} / {counts['least']:.2f}"
                    if counts
                    else "-"
                )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("check", "update", "show", "hits"))
    parser.add_argument("--workload", choices=WORKLOADS, action="append")
    parser.add_argument("--samples", type=int)
    options = parser.parse_args(arguments)
    if options.samples and options.command != "show":
        parser.error("--samples must be left to the budget, except to show")
    budget = json.loads(BUDGET.read_text())
    if options.command == "hits":
        budget["hits"] = hits()
        BUDGET.write_text(format_budget(budget))
        print(markdown_hits(budget["hits"]))
        return 0
    traffic = measure(options.workload or WORKLOADS, options.samples or budget["samples"])
    print(markdown_table(traffic))
    if options.command == "show":
        return 0
    if options.command == "update":
        known = {name: entry for name, entry in budget["traffic"].items() if name in WORKLOADS}
        budget["traffic"] = known | traffic
        BUDGET.write_text(format_budget(budget))
    wrong = list(over_budget(traffic, budget))
    print(f"\n{len(traffic)} workloads, {len(wrong)} over budget")
    for text in wrong:
        print(text)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
