"""The budget: what is recorded in it, and what is over it."""

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Iterator

from tests.cuda.machine_code.kernel import Kernel
from tests.cuda.machine_code.listing import Problem

REGISTER_STEP = 8
LINE = 160  # characters in the budget file


def record(kernels: Iterable[Kernel], budget: dict) -> dict:
    """The budget with what is measured; other architectures than these keep what they have."""
    kernels = list(kernels)
    archs = {kernel.arch for kernel in kernels}
    names = {kernel.name for kernel in kernels}
    sections: dict[str, dict[str, dict]] = {"hot": {}, "registers": {}}
    for title, section in sections.items():
        for name, entries in budget.get(title, {}).items():
            kept = {arch: entry for arch, entry in entries.items() if arch not in archs}
            if kept and name in names:
                section[name] = kept
    for kernel in kernels:
        # Several objects may hold the same kernel.
        registers = sections["registers"].setdefault(kernel.name, {})
        registers[kernel.arch] = max(kernel.registers, registers.get(kernel.arch, 0))
        if kernel.is_hot:
            sections["hot"].setdefault(kernel.name, {})[kernel.arch] = _hot_entry(kernel)
    return budget | sections


def _hot_entry(kernel: Kernel) -> dict:
    try:
        measured = kernel.round
    except Problem as problem:
        raise Problem(f"{kernel.name} on {kernel.arch}: {problem}") from None
    return {
        "instructions": measured.instructions_per_sample,
        "other_loads": measured.other_loads,
        "reductions": measured.reductions,
        "shuffles": measured.shuffles,
        "barriers": kernel.barriers,
    }


def over_budget(kernels: Iterable[Kernel], budget: dict) -> Iterator[str]:
    """One sentence for each thing that is over the budget."""
    kernels = list(kernels)
    for kernel in kernels:
        here = f"{kernel.name} on {kernel.arch}: "
        recorded = budget["registers"].get(kernel.name, {}).get(kernel.arch)
        if recorded is None:
            yield here + "must be in the budget, got none: run update"
            continue
        limit = math.ceil(recorded / REGISTER_STEP) * REGISTER_STEP
        if kernel.registers > limit:
            yield here + f"registers must be at most {limit}, got {kernel.registers}"
        stack = max(_matching(budget["local_memory"], kernel), default=0)
        if kernel.stack > stack:
            yield here + f"stack must be at most {stack} bytes, got {kernel.stack}"
        if kernel.listing is not None and kernel.spills and not stack:
            yield here + f"local loads and stores must be 0, got {kernel.spills}"
        entry = budget["hot"].get(kernel.name, {}).get(kernel.arch)
        if entry is not None:
            yield from (here + text for text in _round_over_budget(kernel, entry, budget))
    archs = {kernel.arch for kernel in kernels}
    found = {(kernel.name, kernel.arch) for kernel in kernels}
    for name, entries in (budget["registers"] | budget["hot"]).items():
        for arch in sorted(archs & entries.keys()):
            if (name, arch) not in found:
                yield f"{name} on {arch}: must be in the code, got none: run update"


def _round_over_budget(kernel: Kernel, entry: dict, budget: dict) -> Iterator[str]:
    try:
        got = kernel.round
    except Problem as problem:
        yield f"must have a loop over rounds, got none: {problem}"
        return
    limit = instruction_limit(kernel, entry, budget)
    if got.instructions_per_sample > limit:
        yield f"instructions per sample must be at most {limit}, got {got.instructions_per_sample}"
    if got.gathers < kernel.gathers_per_round:
        yield (
            f"{kernel.vector_bits}-bit loads in a round must be at least "
            f"{kernel.gathers_per_round}, got {got.gathers} and {got.other_loads} others"
        )
    if got.other_loads > entry["other_loads"]:
        yield (
            f"other loads in a round must be at most {entry['other_loads']}, got {got.other_loads}"
        )
    if any(got.reductions[k] > entry["reductions"].get(k, 0) for k in got.reductions):
        yield f"reductions in a round must be {entry['reductions']}, got {got.reductions}"
    if got.shuffles > entry["shuffles"]:
        yield f"shuffles in a round must be at most {entry['shuffles']}, got {got.shuffles}"
    if kernel.barriers > entry["barriers"]:
        yield f"barriers must be at most {entry['barriers']}, got {kernel.barriers}"


def instruction_limit(kernel: Kernel, entry: dict, budget: dict) -> float:
    """The recorded value with its margin, or the target if that is less."""
    recorded = round(entry["instructions"] * (1 + budget["margin"]), 2)
    return min([recorded, *_matching(budget["targets"].get(kernel.arch, {}), kernel)])


def _matching(limits: dict, kernel: Kernel) -> list:
    """The limits whose pattern, as of a shell, is that of the kernel's name."""
    return [limit for name, limit in limits.items() if fnmatch.fnmatchcase(kernel.name, name)]


def missing_architectures(kernels: Iterable[Kernel], ptx: set[str], budget: dict) -> Iterator[str]:
    """One sentence for each difference from a full build."""
    for kind, found in (
        ("machine code", {kernel.arch for kernel in kernels}),
        ("PTX", {arch.replace("sm_", "compute_") for arch in ptx}),
    ):
        prefix = "sm_" if kind == "machine code" else "compute_"
        expected = {arch for arch in budget["architectures"] if arch.startswith(prefix)}
        if found != expected:
            yield f"the build must hold {kind} for {_join(expected)}, got {_join(found)}"


def number_of(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def _join(archs: Iterable[str]) -> str:
    return ", ".join(sorted(archs, key=number_of)) or "none"


def format_budget(budget: dict) -> str:
    """JSON, sorted, with a line for each kernel, or for each of its architectures."""

    def write(value: object, indent: int, room: int) -> str:
        line = json.dumps(value)
        if not isinstance(value, dict) or not value or len(line) <= room:
            return line
        pad = " " * (indent + 2)
        items = [
            f"{pad}{json.dumps(k)}: {write(v, indent + 2, LINE - indent - len(json.dumps(k)))}"
            for k, v in value.items()
        ]
        return "{\n" + ",\n".join(items) + "\n" + " " * indent + "}"

    def order(entries: dict) -> dict:
        return dict(sorted(entries.items(), key=lambda item: number_of(item[0])))

    ordered = dict(budget)
    for title in ("hot", "registers"):
        ordered[title] = {n: order(budget[title][n]) for n in sorted(budget[title])}
    return write(ordered, 0, 0) + "\n"
