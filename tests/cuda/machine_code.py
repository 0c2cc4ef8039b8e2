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

import argparse
import collections
import concurrent.futures
import dataclasses
import fnmatch
import functools
import importlib.metadata
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BUDGET = Path(__file__).with_suffix(".json")

SAMPLES_PER_ROUND = 32
CORNERS = 4
REGISTER_STEP = 8
LINE = 160  # characters in the budget file

# Template arguments of the kernels: their names, or the words for their values 0, 1, ...
_ARGUMENTS = ("type", "width", "lanes", ("general", "exact"), ("plain", "fused"), ("any", "common"))
TEMPLATES = {"forward_kernel": _ARGUMENTS, "backward_kernel": _ARGUMENTS}
HOT_HEAD_DIM = 32
HOT_VECTOR_BYTES = 16
BYTES = {"double": 8, "float": 4, "Half": 2, "BFloat16": 2}


class Problem(Exception):
    """Why the machine code could not be read."""


# ---- reading a listing ---------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a listing: `@P0 LDG.E.128 R4, [R2.64+0x10] ;`."""

    guard: str  # "P0", "!P0" or ""
    opcode: str  # with its modifiers
    operands: str
    targets: tuple[str, ...]  # labels

    @property
    def operation(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.opcode.split(".")[1:]

    @property
    def is_conditional(self) -> bool:
        """Whether a predicate decides, before the instruction or as its first operand."""
        guarded = self.guard not in ("", "PT", "UPT")
        return guarded or re.match(r"!?U?P[0-9]\b", self.operands) is not None


@dataclasses.dataclass
class Listing:
    """The instructions of a function and where its labels stand."""

    instructions: list[Instruction]
    labels: dict[str, int]


_LABEL = re.compile(r"^(\S+):$")
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?U?P[0-9T]+)\s+)?"
    r"(?P<opcode>[A-Z][A-Za-z0-9_.]*)\s*(?P<operands>.*?)\s*(?:\(\*(?P<note>.*?)\*\))?\s*;"
)


def read_listing(text: str) -> dict[str, Listing]:
    """Functions by their mangled name, from what `nvdisasm -c` prints."""
    functions: dict[str, Listing] = {}
    listing = None
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if section:
            listing = functions.setdefault(section.group(1), Listing([], {}))
            continue
        if listing is None:
            continue
        label = _LABEL.match(line)
        if label:
            listing.labels[label.group(1)] = len(listing.instructions)
            continue
        match = _INSTRUCTION.match(line)
        if match is None and re.match(r"\s*/\*[0-9a-f]{4,}\*/", line):
            raise Problem(f"an instruction was not understood: {line.strip()}")
        if match:
            targets = tuple(re.findall(r"`\(([^)]*)\)", match["operands"]))
            note = match["note"] or ""
            if note.startswith('"BRANCH_TARGETS '):
                targets = tuple(note.strip('"').split(" ", 1)[1].split(","))
            listing.instructions.append(
                Instruction(match["guard"] or "", match["opcode"], match["operands"], targets)
            )
    return functions


# ---- control flow --------------------------------------------------------------------------------


@dataclasses.dataclass
class Loop:
    """A natural loop: all instructions from which its head can be reached again without it."""

    head: int
    instructions: frozenset[int]


class Flow:
    """The control flow of one kernel, between instructions by their index.

    BSSY, BSYNC, BREAK, WARPSYNC and YIELD say which lanes wait for each other, not where control
    goes: BSYNC stands right before the label that its BSSY names.
    """

    def __init__(self, listing: Listing, start: int = 0):
        self.listing = listing
        self.start = start
        self.successors: dict[int, list[int]] = {}
        pending = [start]
        while pending:
            i = pending.pop()
            if i not in self.successors:
                self.successors[i] = self._successors(i)
                pending += self.successors[i]

    def _successors(self, i: int) -> list[int]:
        instruction = self.listing.instructions[i]
        operation = instruction.operation
        following = [i + 1] if i + 1 < len(self.listing.instructions) else []
        if instruction.guard in ("!PT", "!UPT"):
            return following
        if operation in ("EXIT", "RET"):
            return following if instruction.is_conditional else []
        if operation in ("BRX", "BRXU", "JMX", "JMXU"):
            if not instruction.targets:
                raise Problem(f"{instruction.opcode} names no targets")
            return [self._index(label) for label in instruction.targets]
        # A call of a label of the same function is a jump: nothing returns from there.
        is_call = operation == "CALL" and not instruction.targets[0].startswith(".L")
        if operation not in ("BRA", "JMP", "CALL") or is_call:
            return following
        if "DIV" in instruction.modifiers:
            return following
        target = [self._index(instruction.targets[0])]
        if "CONV" in instruction.modifiers or not instruction.is_conditional:
            return target
        return target + [j for j in following if j not in target]

    def _index(self, label: str) -> int:
        if label not in self.listing.labels:
            raise Problem(f"the label {label} is missing")
        return self.listing.labels[label]

    def loops(self) -> list[Loop]:
        """The natural loops, one for each head, smallest first."""
        dominates = self._dominators()
        predecessors = collections.defaultdict(list)
        for i, successors in self.successors.items():
            for j in successors:
                predecessors[j].append(i)
        bodies = collections.defaultdict(set)
        for i, successors in self.successors.items():
            for head in successors:
                if not dominates(head, i):
                    continue
                body = bodies[head]
                body.add(head)
                pending = [i]
                while pending:
                    j = pending.pop()
                    if j not in body:
                        body.add(j)
                        pending += predecessors[j]
        loops = [Loop(head, frozenset(body)) for head, body in bodies.items()]
        return sorted(loops, key=lambda loop: (len(loop.instructions), loop.head))

    def longest_path(self, loop: Loop, weights: dict[int, int]) -> int:
        """The weight of the heaviest path through a loop that enters nothing twice."""
        order = [i for i in self._reverse_postorder() if i in loop.instructions]
        position = {i: n for n, i in enumerate(order)}
        heaviest = dict.fromkeys(order, 0)
        for i in order:
            heaviest[i] += weights[i]
            for j in self.successors[i]:
                # Edges backwards close a loop: this one, or one within it.
                if j in position and position[j] > position[i]:
                    heaviest[j] = max(heaviest[j], heaviest[i])
        return max(heaviest.values())

    def _dominators(self) -> Callable[[int, int], bool]:
        """A function that tells whether every path from the start to b leads through a.

        After Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001).
        """
        order = self._reverse_postorder()
        position = {i: n for n, i in enumerate(order)}
        predecessors = collections.defaultdict(list)
        for i in order:
            for j in self.successors[i]:
                predecessors[j].append(i)
        parent = {self.start: self.start}
        changed = True
        while changed:
            changed = False
            for i in order[1:]:
                nearest = None
                for j in predecessors[i]:
                    if j not in parent:
                        continue
                    while nearest is not None and nearest != j:
                        if position[nearest] > position[j]:
                            nearest = parent[nearest]
                        else:
                            j = parent[j]
                    nearest = j
                if parent.get(i) != nearest:
                    parent[i] = nearest
                    changed = True

        def dominates(a: int, b: int) -> bool:
            while position[b] > position[a]:
                b = parent[b]
            return a == b

        return dominates

    def _reverse_postorder(self) -> list[int]:
        order: list[int] = []
        seen = {self.start}
        stack = [(self.start, iter(self.successors[self.start]))]
        while stack:
            i, successors = stack[-1]
            j = next((j for j in successors if j not in seen), None)
            if j is None:
                order.append(i)
                stack.pop()
            else:
                seen.add(j)
                stack.append((j, iter(self.successors[j])))
        return order[::-1]


# ---- what is measured ----------------------------------------------------------------------------


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


# ---- tools ---------------------------------------------------------------------------------------


def find_tool(name: str) -> Path:
    """The program of the pip package of that name."""
    package = f"nvidia-cuda-{name}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise Problem(f"{name} is not installed: pip install {package}") from None
    for file in files:
        if file.stem == name and file.parent.name == "bin":
            return Path(file.locate())
    raise Problem(f"the package {package} holds no program {name}")


def _run(*command: str | Path, cwd: Path | None = None, env: dict | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise Problem(f"{command[0]} was not found: install it, or put it on PATH")
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if run.returncode:
        raise Problem(f"{Path(command[0]).name} failed: {(run.stderr or run.stdout).strip()}")
    return run.stdout


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Mangled names and their short, readable forms."""
    names = list(names)
    if not names:
        return {}
    return dict(zip(names, map(short_name, _run("c++filt", *names).splitlines()), strict=True))


def short_name(demangled: str) -> str:
    """For example forward_kernel<float, 4, 8, exact, plain>, from a demangled signature."""
    text = demangled.replace("(anonymous namespace)::", "").replace("msda::", "")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            text = text[:i]
            break
    text = text.removeprefix("void ")
    name, _, arguments = text.rstrip(">").partition("<")
    if name not in TEMPLATES:
        return text
    values = arguments.split(", ")
    if len(values) != len(TEMPLATES[name]):
        raise Problem(f"TEMPLATES must name {len(values)} arguments of {name}: {values}")
    return f"{name}<{', '.join(map(_word, TEMPLATES[name], values))}>"


def _word(words: str | tuple[str, ...], value: str) -> str:
    if isinstance(words, str):
        return value
    return words[{"false": 0, "true": 1}[value] if value.isalpha() else int(value.split(")")[-1])]


def read_resources(text: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack by mangled name, from what `cuobjdump -res-usage` prints."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def read_cubin(cubin: Path, arch: str) -> list[Kernel]:
    """The kernels of one file of machine code; the hot ones with their listings."""
    resources = read_resources(_run(find_tool("cuobjdump"), "-res-usage", cubin))
    names = demangle(resources)
    kernels = {
        symbol: Kernel(names[symbol], arch, *numbers) for symbol, numbers in resources.items()
    }
    hot = [symbol for symbol, kernel in kernels.items() if kernel.is_hot]
    if hot:
        symbols = _run("readelf", "--symbols", "--wide", cubin)
        indices = {
            name: index
            for index, name in re.findall(r"^\s*(\d+):.* GLOBAL .* (\S+)$", symbols, re.MULTILINE)
        }
        wanted = ",".join(indices[symbol] for symbol in hot)
        listings = read_listing(_run(find_tool("nvdisasm"), "-c", "-fun", wanted, cubin))
        for symbol in hot:
            kernels[symbol].listing = listings[symbol]
    return list(kernels.values())


def read_objects(path: Path, arch: str | None = None) -> tuple[list[Kernel], set[str]]:
    """All kernels in an object or a folder of them, and the architectures of the PTX beside."""
    objects = [path] if path.is_file() else sorted(path.rglob("*.cu.o"))
    if not objects:
        raise Problem(f"{path} is not there, or holds no compiled CUDA sources (*.cu.o)")
    cuobjdump = find_tool("cuobjdump")
    ptx: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        cubins = []
        for n, file in enumerate(objects):
            into = Path(folder) / str(n)
            into.mkdir()
            try:
                _run(cuobjdump, "-xelf", "all", file.resolve(), cwd=into)
            except Problem as problem:
                if "does not contain device code" not in str(problem):
                    raise
                continue
            cubins += [(cubin, cubin.suffixes[-2].strip(".")) for cubin in into.iterdir()]
            ptx |= set(re.findall(r"\.(sm_\w+)\.ptx", _run(cuobjdump, "-lptx", file)))
        cubins = [(cubin, of) for cubin, of in cubins if arch in (None, of)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(lambda cubin: read_cubin(*cubin), cubins)
            return [kernel for several in kernels for kernel in several], ptx


def compile_kernels(arch: str) -> Path:
    """Build the CUDA sources for one architecture, as CMake does; the result is the folder."""
    build = ROOT / "build" / "machine_code" / arch
    number = re.fullmatch(r"sm_(\d+)(\d[af]?)", arch)
    if number is None:
        raise Problem(f"--arch must be such as sm_90, got {arch}")
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ".".join(number.groups())}
    options = ["-DMSDA_CUDA=1", "-DMSDA_WERROR=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    _run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options, env=environment)
    targets = re.findall(
        r"^(\S+\.cu\.o):", _run("ninja", "-C", build, "-t", "targets", "all"), re.M
    )
    _run("ninja", "-C", build, *targets)
    return build


# ---- the budget ----------------------------------------------------------------------------------


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


def _number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def _join(archs: Iterable[str]) -> str:
    return ", ".join(sorted(archs, key=_number)) or "none"


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
        return dict(sorted(entries.items(), key=lambda item: _number(item[0])))

    ordered = dict(budget)
    for title in ("hot", "registers"):
        ordered[title] = {n: order(budget[title][n]) for n in sorted(budget[title])}
    return write(ordered, 0, 0) + "\n"


# ---- the command line ----------------------------------------------------------------------------


def table(kernels: Iterable[Kernel], budget: dict, every: bool = False) -> str:
    """The kernels by name and architecture: the hot ones, or every one."""
    head = ("kernel", "arch", "registers", "stack", "spills", "barriers", "loads", "others")
    rows = [(*head, "reductions", "shuffles", "path", "instr/sample", "budget")]
    for kernel in sorted(kernels, key=lambda k: (not k.is_hot, k.name, _number(k.arch))):
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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
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
