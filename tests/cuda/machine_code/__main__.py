"""Hold the machine code of the CUDA kernels against a committed budget.

    python -m tests.cuda.machine_code check    compare with the budget; exit status 1 if over
    python -m tests.cuda.machine_code update   write what is measured into the budget
    python -m tests.cuda.machine_code show     print the table

    --object FILE_OR_DIR   a library, an object, or a folder of objects (*.cu.o);
                           default: the library that the package loads
    --arch sm_90           this architecture alone; without --object, compile csrc/cuda for it, in
                           build/machine_code
    --all                  also show the kernels that are not hot

It needs the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm, and binutils; no GPU.

The budget file, tests/cuda/machine_code.json:

    margin         by how much the instructions per sample may exceed what is recorded
    targets        what they may never exceed, by architecture and kernel
    architectures  what a full build holds, machine code and PTX
    local_memory   kernels that may use local memory, with the bytes of stack; the others must not
    hot            kernels whose rounds are counted: 32 channels in vectors of 16 bytes, for
                   common inputs. A round must gather with loads of a vector only
    registers      all kernels. Registers are handed out in eights, so the limit is the next
                   multiple of 8

`update` rewrites hot and registers; the rest is kept by hand.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.cuda.machine_code.budget import (
    format_budget,
    instruction_limit,
    missing_architectures,
    number_of,
    over_budget,
    record,
)
from tests.cuda.machine_code.kernel import Kernel
from tests.cuda.machine_code.listing import Problem
from tests.cuda.machine_code.tools import ROOT, compile_kernels, read_objects

BUDGET = ROOT / "tests" / "cuda" / "machine_code.json"


def table(kernels: Iterable[Kernel], budget: dict, every: bool = False) -> str:
    """The kernels by name and architecture: the hot ones, or every one."""
    head = ("kernel", "arch", "registers", "stack", "spills", "barriers", "loads", "others")
    rows = [(*head, "reductions", "shuffles", "path", "instr/sample", "budget")]
    for kernel in sorted(kernels, key=lambda k: (not k.is_hot, k.name, number_of(k.arch))):
        if not kernel.is_hot and not every:
            continue
        row: list[object] = [kernel.name, kernel.arch, kernel.registers, kernel.stack]
        if kernel.is_hot:
            row += [kernel.spills, kernel.barriers]
            try:
                got = kernel.round
            except Problem as problem:
                rows.append((*map(str, row), str(problem)))
                continue
            entry = budget["hot"].get(kernel.name, {}).get(kernel.arch)
            reductions = " ".join(f"{n} {kind}" for kind, n in got.reductions.items()) or "0"
            limit = instruction_limit(kernel, entry, budget) if entry else "none"
            row += [got.gathers, got.other_loads, reductions, got.shuffles]
            row += [f"{got.longest_path:.2f}", f"{got.instructions_per_sample:.2f}", limit]
        rows.append(tuple(map(str, row)))
    full = [row for row in rows if len(row) == len(rows[0])]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        ).rstrip()
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; the result is the exit status."""
    parser = argparse.ArgumentParser("machine_code", description=__doc__.partition("\n")[0])
    parser.add_argument("command", choices=("check", "update", "show"))
    parser.add_argument(
        "--object", type=Path, help="file or folder; default: the package's library"
    )
    parser.add_argument("--arch", help="sm_90, for example: this architecture alone")
    parser.add_argument("--all", action="store_true", help="show every kernel, not the hot ones")
    parser.add_argument("--budget", type=Path, default=BUDGET, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    try:
        return _main(options)
    except Problem as problem:
        print(f"machine_code: {problem}", file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    budget = json.loads(options.budget.read_text())
    path = options.object or ROOT / "msda" / "libmsda.so"
    if options.arch is not None and options.object is None:
        path = compile_kernels(options.arch)
    kernels, ptx = read_objects(path, options.arch)
    if not kernels:
        raise Problem(f"{path} must hold CUDA kernels for {options.arch or 'a GPU'}, got none")
    if options.command == "update":
        budget = record(kernels, budget)
        options.budget.write_text(format_budget(budget))
    print(table(kernels, budget, options.all))
    if options.command == "show":
        return 0
    wrong = sorted(set(over_budget(kernels, budget)))
    if options.arch is None:
        wrong += missing_architectures(kernels, ptx, budget)
    print(f"\n{len(kernels)} kernels, {len(wrong)} over budget")
    for text in wrong:
        print(text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
