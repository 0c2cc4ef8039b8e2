"""Hold CPU results against what was set out to reach: ``python benchmarks/targets.py FOLDER``.

Reads operator.json, fused.json and capabilities.json of a folder. A target that is missed is
printed with its reason; nothing fails: ratios of a busy machine are not an error of the code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from records import table_line

# What profiles and runs with one thing changed say on the machine of the committed results.
BACKWARD = (
    "caches and memory: with every sample on one pixel, in arrays that hold one head after the "
    "other, the call takes half the time; with such arrays alone 0.8 of it"
)
FORWARD = (
    "instructions rather than caches: with every sample on one pixel the call takes 0.9 of the "
    "time; half of it is the loop over pixels, a quarter the preparation of samples, a ninth the "
    "copy of the head's pixels"
)
SMALL = (
    "300 queries read 20 MB of pixels from all over the maps, at 18 to 31 GB/s; backward fills and "
    "adds to 23 MB besides"
)
SIXTEEN_BIT = (
    "with every sample on one pixel 16 bits take as long as 32: converting them costs what the "
    "shorter loads save"
)
CALL = (
    "an empty autograd function of three inputs, differentiated by torch, takes 22 us of the "
    "backward"
)
FUSED = (
    "in the profile a fifth of backward waits for the output, which the gradient of the softmax "
    "needs and the plain form does not read"
)


@dataclass(frozen=True)
class Target:
    """One line: what, the least (or, for times, the most) that was asked, and what came."""

    name: str
    asked: float
    measured: float
    unit: str  # "x": at least; "us": at most
    if_missed: str

    @property
    def holds(self) -> bool:
        """Whether it was reached."""
        return self.measured <= self.asked if self.unit == "us" else self.measured >= self.asked

    def cells(self) -> tuple[str, str, str, str]:
        """What, asked, measured and the verdict, as texts."""
        sign, digits = ("<=", 0) if self.unit == "us" else (">=", 2 if self.asked < 2 else 1)
        unit = " us" if self.unit == "us" else "x"
        return (
            self.name,
            f"{sign} {self.asked:g}{unit}",
            f"{self.measured:.{digits}f}{unit}",
            "holds" if self.holds else "missed",
        )


def load(folder: Path, name: str) -> dict | None:
    """A result file, or None where that benchmark has not run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def targets(folder: Path) -> Iterator[Target]:
    """The targets that the folder's results can be held against."""
    if operator := load(folder, "operator"):
        yield from operator_targets(operator["rows"])
    if capabilities := load(folder, "capabilities"):
        yield from capability_targets(capabilities)
    if fused := load(folder, "fused"):
        for row in fused["rows"]:
            if row["workload"] == "encoder" and row["direction"] == "both":
                name = f"fused encoder, forward and backward, {_threads(row)}"
                yield Target(name, 1.3, row["ratio"], "x", FUSED)
        calls = fused["calls"]
        yield Target("call overhead, forward", 15, calls["operator, forward"], "us", CALL)
        yield Target("call overhead, backward", 40, calls["operator, backward"], "us", CALL)


def _threads(row: dict) -> str:
    return "1 thread" if row["threads"] == 1 else f"{row['threads']} threads"


def operator_targets(rows: list[dict]) -> Iterator[Target]:
    """Against the grid_sample core, and 16-bit values against float32."""
    asked = {
        ("encoder", "forward", 1): (40, FORWARD),
        ("encoder", "backward", 1): (30, BACKWARD),
        ("encoder", "forward", 2): (45, FORWARD),
        ("encoder", "backward", 2): (30, BACKWARD),
        ("decoder", "forward", 1): (22, SMALL),
        ("decoder", "backward", 1): (12, SMALL),
    }
    for row in rows:
        key = (row["workload"], row["direction"], row["threads"])
        if row["dtype"] == "float32" and key in asked:
            least, why = asked[key]
            ratio = row["rivals"]["grid_sample"]["ratio"]
            yield Target(f"{key[0]}, {key[1]}, {_threads(row)}", least, ratio, "x", why)
        if row["dtype"] in ("bfloat16", "float16") and key in asked and key[0] == "encoder":
            least = 1.2 if row["direction"] == "forward" else 1.0
            name = f"encoder, {row['direction']}, {row['dtype']} against float32"
            ratio = row["rivals"]["float32"]["ratio"]
            yield Target(name, least, ratio, "x", SIXTEEN_BIT)


def capability_targets(capabilities: dict) -> Iterator[Target]:
    """Instruction sets against each other, and the best against the floor of its load slots."""
    best = capabilities["rows"][-1]["capability"]
    for row in capabilities["rows"]:
        direction = row["direction"]
        if row["capability"] == "avx2" and best != "avx2":
            name = f"{capabilities['workload']}, {direction}, avx2 against {best}"
            yield Target(name, 0.6, row["speed"], "x", "")
        if row["capability"] == best and "floor_ms" in capabilities:
            share = capabilities["floor_ms"][direction] / row["ms"]
            asked, why = (0.75, FORWARD) if direction == "forward" else (0.6, BACKWARD)
            name = f"{capabilities['workload']}, {direction}, share of the load-slot floor"
            yield Target(name, asked, share, "x", why)


def reasons(found: Iterable[Target]) -> dict[str, list[str]]:
    """Why targets were missed, each reason with the names of those."""
    names: dict[str, list[str]] = {}
    for target in found:
        if not target.holds:
            names.setdefault(target.if_missed, []).append(target.name)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where the result files lie")
    folder = parser.parse_args().folder
    found = list(targets(folder))
    if not found:
        print(f"folder must hold operator.json, fused.json or capabilities.json, got {folder}")
        return 2
    widths = (-56, 10, 11, 9)
    print("\n" + table_line(("target", "asked", "measured", ""), widths))
    for target in found:
        print(table_line(target.cells(), widths))
    for reason, names in reasons(found).items():
        print(f"\nmissed: {'; '.join(names)}:\n  {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
