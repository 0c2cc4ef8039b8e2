"""Tables, result files and time limits, without msda: usable before it is built."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path


def table_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """One line of a table: each cell as wide as told, to the left where its width is negative."""
    pairs = zip(cells, widths, strict=True)
    return "".join(
        f"{cell:>{width}}" if width > 0 else f"{cell:<{-width}}" for cell, width in pairs
    )


def write_json(path: Path, results: object) -> None:
    """Write results so that the file is whole at any time, however the run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(results, indent=2) + "\n")
    draft.replace(path)


class Deadline:
    """A time limit that a run keeps itself to."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds left; 0 where none are."""
        return max(0.0, self.end - time.monotonic())

    def allows(self, needed: float) -> bool:
        """Whether something that takes ``needed`` seconds can still be done."""
        return self.left() >= needed
