"""Tables of what ran on a CUDA device."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.report.tables import Block, Record, Table, by_key, records

MAIN_WORKLOADS = ("encoder-2", "decoder-300", "dino-900")  # of the README


def operator(record: Record, whole: bool) -> tuple[str, Table]:
    """One line per workload and direction, a column per side; each cell has a number per dtype.

    Not whole: the main workloads, beside PyTorch.
    """
    right = [row for row in record["rows"] if "cold_ms" in row["sides"]["msda"]]
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    timed = (name for row in right for name, side in row["sides"].items() if "ratio" in side)
    sides = [name for name in dict.fromkeys(timed) if name != "msda"] if whole else ["grid_sample"]

    rows = []
    for line, by_dtype in by_key(right, ("workload", "direction"), "dtype").items():
        if not whole and line[0] not in MAIN_WORKLOADS:
            continue
        found = [by_dtype.get(dtype) for dtype in dtypes]
        ours = [row and row["sides"]["msda"] for row in found]
        cells = [*line, joined(one and f"{one['cold_ms']:.3g}" for one in ours)]
        cells.append(joined(row and f"{row['floor']['over_floor']:.1f}" for row in found))
        for name in sides:
            ratios = [row and row["sides"].get(name, {}).get("ratio") for row in found]
            cells.append(joined(ratio and f"{ratio:.1f}x" for ratio in ratios))
        cells.append(joined(one and f"{one['extra_bytes'] / 1e6:.1f}" for one in ours))
        rows.append(cells)
    note = (
        f"Each cell is {' / '.join(dtypes)}: medians with the L2 cache emptied before each call, "
        "and the time of the others over ours. The floor follows from this GPU's own rates, "
        f"{record['ceilings']['dram_bytes_per_second'] / 1e12:.2f} TB/s among them."
    )
    wrong = len(record["rows"]) - len(right)
    note += f" {wrong} results of ours were wrong and are not shown." if wrong else ""
    columns = ["workload", "direction", "msda, ms", "times the floor", *sides, "extra memory, MB"]
    return "", Table(columns, rows, note)


def joined(texts: Iterable[str | None]) -> str:
    """One text per dtype; a dash where there is none, nothing where there are none at all."""
    given = list(texts)
    return " / ".join(text or "-" for text in given) if any(given) else ""


small = Block("cuda_operator", functools.partial(operator, whole=False))


def whole(page: str) -> str:
    """All that was measured, and what the tests and the sanitizer said."""
    measured = Block("cuda_operator", functools.partial(operator, whole=True))(page)
    said = (sentence for path, _ in records("cuda_tests") for sentence in checks(path.parent))
    return "\n\n".join([measured, *said])


def checks(folder: Path) -> Iterator[str]:
    """What the tests and the sanitizer said on one device, and at which commit."""
    tests = json.loads((folder / "cuda_tests.json").read_text())
    machine = tests["machine"]
    unfinished = "; not all were run" if tests["not_run"] else ""
    yield (
        f"Tests on {machine['device']}, at {machine['commit']}: {tests['passed']} passed, "
        f"{tests['failed']} failed, {tests['skipped']} skipped{unfinished}."
    )
    sanitizer = folder / "cuda_sanitizer.json"
    if sanitizer.exists():
        results = json.loads(sanitizer.read_text())
        said = []
        for tool, seen in results["tools"].items():
            errors = "" if seen["errors"] is None else f", {seen['errors']} errors"
            said.append(f"{tool} {seen['status']}{errors}")
        commit = results["machine"]["commit"]
        yield f"compute-sanitizer there, at {commit}: {'; '.join(said) or 'not run'}."
