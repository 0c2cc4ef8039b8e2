"""What is measured of a kernel.

NOTE [instructions per sample]
A kernel works in rounds. In a round each of the 32 lanes of a warp prepares one sample, then the
sub-warps of kLanes lanes each gather kLanes of them, four corners in one load each. So the loop
that holds 4 * kLanes gathers is one round, and its length over 32 is the number of instructions
that a warp issues for a sample. If the compiler left the gathers in a loop of their own, that loop
counts as often as it runs in a round. If it made several versions of the loop, the longest counts.

Every instruction of the round counts once, NOPs excepted: both arms of a branch, the body of a
smaller loop, and the helper functions it calls. This is an upper bound where arms exclude each
other; the table also shows the longest path from the head of the loop back to it, which is what a
warp issues when all its lanes take the same arms. What lies before the rounds (softmax of a fused
kernel) and after them is not counted, and neither are paths for warps whose lanes have diverged
(BRA.DIV, BRA.CONV): ours never do.
"""

import collections
import dataclasses
import functools
import re
from collections.abc import Callable

from tests.cuda.machine_code.listing import Flow, Instruction, Listing, Loop, Problem

SAMPLES_PER_ROUND = 32
CORNERS = 4

# Template arguments of the kernels: their names, or the words for their values 0, 1, ...
_ARGUMENTS = ("type", "width", "lanes", ("general", "exact"), ("plain", "fused"), ("any", "common"))
TEMPLATES = {"forward_kernel": _ARGUMENTS, "backward_kernel": _ARGUMENTS}
HOT_HEAD_DIM = 32
HOT_VECTOR_BYTES = 16
BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}


@dataclasses.dataclass
class Round:
    """What one round of a warp issues."""

    instructions_per_sample: float
    longest_path: float  # the same, along one path
    gathers: int  # loads of a vector
    other_loads: int  # others from global memory
    reductions: dict[str, int]  # atomic additions, by what one instruction adds
    shuffles: int


@dataclasses.dataclass
class Kernel:
    """One kernel for one architecture."""

    name: str
    arch: str
    registers: int
    stack: int  # bytes of local memory
    listing: Listing | None = None  # of hot kernels

    @property
    def template(self) -> str:
        """The name without template arguments."""
        return self.name.partition("<")[0]

    @functools.cached_property
    def arguments(self) -> dict[str, str]:
        """The template arguments by name, for the kernels of TEMPLATES."""
        arguments = self.name.rstrip(">").partition("<")[2].split(", ")
        names = [n if isinstance(n, str) else "/".join(n) for n in TEMPLATES[self.template]]
        return dict(zip(names, arguments, strict=True))

    @property
    def vector_bits(self) -> int:
        """What one gather loads."""
        return 8 * int(self.arguments["width"]) * BYTES[self.arguments["type"]]

    @property
    def gathers_per_round(self) -> int:
        """How many loads fetch the corners of the samples of a sub-warp."""
        return CORNERS * int(self.arguments["lanes"])

    @property
    def is_hot(self) -> bool:
        """Whether the rounds of this kernel have a budget."""
        if self.template not in TEMPLATES or self.arguments["type"] == "double":
            return False
        return (
            int(self.arguments["width"]) * int(self.arguments["lanes"]) == HOT_HEAD_DIM
            and self.vector_bits == 8 * HOT_VECTOR_BYTES
            and not {"general", "any"} & set(self.arguments.values())
        )

    @functools.cached_property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return self._count(lambda i: i.operation in ("LDL", "STL"))

    @functools.cached_property
    def barriers(self) -> int:
        """Barriers of a block, in the whole kernel."""
        return self._count(lambda i: i.operation in ("BAR", "UCGABAR_WAIT"))

    def _count(self, wanted: Callable[[Instruction], bool]) -> int:
        return sum(wanted(i) for i in self.listing.instructions)

    @functools.cached_property
    def round(self) -> Round:
        """The longest version of a round. See NOTE [instructions per sample]."""
        if self.listing is None:
            raise Problem("it is not one of the hot kernels")
        bits = self.vector_bits
        instructions = self.listing.instructions
        flow = Flow(self.listing)
        loops = flow.loops()

        def gathers(loop: Loop) -> int:
            return sum(_gathered_bits(instructions[i]) == bits for i in loop.instructions)

        rounds = []
        for n, loop in enumerate(loops):
            # The innermost loops with gathers. Preparation may load a vector too, of a table, but
            # not as many.
            found = gathers(loop)
            if found < CORNERS or any(
                inner.instructions < loop.instructions and gathers(inner) >= CORNERS
                for inner in loops[:n]
            ):
                continue
            inner, outer, trips = loop, loop, 1
            around = next((o for o in loops[n + 1 :] if o.instructions > loop.instructions), None)
            if found < self.gathers_per_round and self.gathers_per_round % found == 0 and around:
                outer, trips = around, self.gathers_per_round // found
            rounds.append(self._measure(flow, outer, inner, trips, bits))
        if not rounds:
            raise Problem(f"no loop with {bits}-bit loads was found")
        return max(rounds, key=lambda r: r.instructions_per_sample)

    def _measure(self, flow: Flow, outer: Loop, inner: Loop, trips: int, bits: int) -> Round:
        times = {i: trips if i in inner.instructions else 1 for i in outer.instructions}
        issued = {i: times[i] * self._cost(self.listing.instructions[i]) for i in times}
        gathers = other_loads = shuffles = 0
        reductions: collections.Counter[str] = collections.Counter()
        for i in sorted(times):
            instruction = self.listing.instructions[i]
            if instruction.operation in ("LDG", "LD"):
                is_gather = _gathered_bits(instruction) == bits
                gathers += times[i] * is_gather
                other_loads += times[i] * (not is_gather)
            shuffles += times[i] * (instruction.operation == "SHFL")
            if instruction.operation in ("RED", "REDG", "ATOM", "ATOMG"):
                reductions[_what_is_added(instruction)] += times[i]
        return Round(
            round(sum(issued.values()) / SAMPLES_PER_ROUND, 2),
            round(flow.longest_path(outer, issued) / SAMPLES_PER_ROUND, 2),
            gathers,
            other_loads,
            dict(sorted(reductions.items())),
            shuffles,
        )

    def _cost(self, instruction: Instruction) -> int:
        if instruction.operation == "NOP":
            return 0
        if instruction.operation == "CALL" and not instruction.targets[0].startswith(".L"):
            if instruction.targets[0] not in self.listing.labels:
                raise Problem(f"{instruction.targets[0]} is called, which is not in the kernel")
            helper = Flow(self.listing, self.listing.labels[instruction.targets[0]])
            return 1 + len(helper.successors)
        return 1


def _gathered_bits(instruction: Instruction) -> int:
    """How many bits each lane loads from global memory; 0 if it is no such load.

    Generic loads (LD) do not count: the compiler lost sight of where they read.
    """
    if instruction.operation != "LDG":
        return 0
    for modifier in instruction.modifiers:
        if modifier in ("U8", "S8", "U16", "S16", "64", "128", "256"):
            return int(modifier.lstrip("US"))
    return 32


def _what_is_added(instruction: Instruction) -> str:
    """For example F32x4, from REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU."""
    for modifier in instruction.modifiers:
        if re.match(r"(F|BF|S|U)?(16|32|64)(x\d+)?$", modifier):
            return modifier
    return instruction.opcode
