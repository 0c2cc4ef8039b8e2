"""The skeleton of every table of the pages: what it is of, its lines, and a note.

A block stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->`` of a page and is made from
every committed record of one name, or says that there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import harness

Record = dict[str, Any]

NO_FIGURE = "No {kind}figure exists yet: `{command}` measures them."


@dataclass(frozen=True)
class Table:
    """One table of a record; nothing is shown of one without rows."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return ""
        head, *lines = (f"| {' | '.join(cells)} |" for cells in (self.columns, *self.rows))
        text = "\n".join([head, "|---" * len(self.columns) + "|", *lines])
        return f"{text}\n\n{self.note}" if self.note else text


@dataclass(frozen=True)
class Block:
    """What is shown of every committed record called ``record``.json."""

    record: str
    make: Callable[[Record], Sequence[Any]]  # what it is of, then its tables
    figure: str = ""  # what a figure beside the record shows

    def __call__(self, page: str) -> str:
        """What stands in a page."""
        parts: list[str] = []
        for path, record in records(self.record):
            title, *tables = self.make(record)
            parts.append(title + measured_on(path, record))
            parts += [text for text in map(str, tables) if text]
            picture = path.with_suffix(".png")
            if self.figure and picture.exists():
                up = "../" * page.count("/")
                parts.append(f"![{self.figure}]({up}{picture.relative_to(harness.ROOT)})")
        return "\n\n".join(parts) or no_figure(self.record)


def no_figure(record: str) -> str:
    """What a page says where there is no record of a name."""
    if record.startswith("cuda"):
        return NO_FIGURE.format(kind="GPU ", command="make gpu")
    return NO_FIGURE.format(kind="", command=f"python -m benchmarks {record}")


def records(name: str) -> list[tuple[Path, Record]]:
    """The committed records of a name, without trials of a command."""
    found = [
        (path, harness.read_record(path)) for path in sorted(harness.RESULTS.glob(f"*/{name}.json"))
    ]
    return [(path, record) for path, record in found if not record.get("quick")]


def measured_on(path: Path, record: Record) -> str:
    """What a record was measured on and with, and which file it is."""
    machine = record["machine"]
    if "device" in machine:
        about = [f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}"]
    else:
        threads = record.get("threads")
        about = [machine["cpu"], f"{threads} threads" if threads else f"{machine['cores']} cores"]
        about.append(f"{machine['cpu_capability']} kernels")
    packages = {"transformers": "transformers", "openvino": "OpenVINO"}
    packages |= {"onnxruntime": "ONNX Runtime", "torch": "torch"}
    about += [
        f"{title} {machine[name].split('-')[0]}"
        for name, title in packages.items()
        if name in machine
    ]
    about.append(f"msda {machine['msda']} at {machine['commit']}")
    return f"{', '.join(about)} (`{path.relative_to(harness.ROOT)}`):"


# ---- cells ---------------------------------------------------------------------------------------


def times(ratio: float | None, digits: int = 1) -> str:
    """How many times faster; a dash where it was not measured."""
    return "-" if ratio is None else f"**{ratio:.{digits}f}x**"


def with_spread(middle: float, quartiles: Sequence[float] | None, form: str = ".2f") -> str:
    """A median and, where the record has them, its quartiles."""
    if quartiles is None:
        return f"{middle:{form}}"
    lower, upper = quartiles
    return f"{middle:{form}} ({lower:{form}} to {upper:{form}})"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f}"


def by_key(rows: Iterable[Record], line: Sequence[str], column: str) -> dict[tuple, dict]:
    """Rows in a table: by the values of ``line``, then by that of ``column``."""
    found: dict[tuple, dict] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in line), {})[row[column]] = row
    return found
