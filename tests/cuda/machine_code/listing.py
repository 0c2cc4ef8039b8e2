"""Listings of machine code, as nvdisasm prints them, and the control flow of a kernel."""

import collections
import dataclasses
import re
from collections.abc import Callable


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
