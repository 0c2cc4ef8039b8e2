"""What every command shares: options, records, printed tables, time limits.

Nothing here needs msda before a record is made: usable before it is built.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DETECTOR = ROOT / "examples" / "deformable_detr"

# ---- options -------------------------------------------------------------------------------------


def run(name: str, module: str, arguments: list[str]) -> int:
    """Read the options of a command and run it; its exit status.

    A command's module has ``add_arguments(parser)`` and ``main(options)``.
    """
    command = importlib.import_module(module)
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=command.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.command = shlex.join(["python", "-m", "benchmarks", name, *arguments])
    return command.main(options)


def add_record(parser: argparse.ArgumentParser, **also: Any) -> None:
    """Options of each command that measures; ``also`` seconds, rounds or threads by default."""
    parser.add_argument("--output", type=Path, help="JSON file to write the record to")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to try the command")
    helps = {
        "seconds": "of timing for each line",
        "rounds": "turns of each side",
        "threads": "of torch",
    }
    for name, default in also.items():
        parser.add_argument(
            f"--{name}",
            type=type(default),
            default=default,
            help=f"{helps[name]} (default: {default})",
        )


def add_choice(parser: argparse.ArgumentParser, name: str, choices: Any) -> None:
    """An option that may be given several times, and means everything where it is not given."""
    parser.add_argument(f"--{name}", choices=choices, action="append", help="default: all")


def add_thread_counts(parser: argparse.ArgumentParser) -> None:
    """--threads, for each of which everything is measured; see :func:`thread_counts`."""
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")


def thread_counts(options: argparse.Namespace) -> list[int]:
    """The numbers of threads that were asked for."""
    return options.threads or sorted({1, all_cores()})


def all_cores() -> int:
    """How many cores this machine has."""
    return os.cpu_count() or 1


# ---- records -------------------------------------------------------------------------------------


def make_record(options: argparse.Namespace, *packages: str, **results: Any) -> dict[str, Any]:
    """What a command measured, after what it was measured on and with, and how.

    Args:
        options: of the command; ``device`` may be one of them.
        packages: further ones than torch whose versions belong to the results.
        results: what the record is of.
    """
    from benchmarks.common.machine import describe_machine

    device = getattr(options, "device", "cpu")
    return {
        "machine": describe_machine(device, *packages),
        "command": options.command,
        "quick": options.quick,
        **results,
    }


def keep_record(options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Write a record where the options say so, and say where."""
    if options.output:
        write_json(options.output, record)
        print(f"written: {options.output}")


def write_json(path: Path, results: object) -> None:
    """Write results so that the file is whole at any time, however the run ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(results, indent=2) + "\n")
    draft.replace(path)


# By record, what keys were called when the oldest committed ones were written.
OLD_KEYS = {
    "operator": {"rivals": "baselines"},
    "peers": {"rivals": "sides"},
    "scaling": {"rivals": "attentions", "rival": "attention", "thing": "part"},
}


def read_record(path: Path) -> dict[str, Any]:
    """A record under the keys of today."""
    keys = OLD_KEYS.get(path.stem, {})

    def renamed(entry: Any) -> Any:
        if isinstance(entry, dict):
            return {keys.get(key, key): renamed(value) for key, value in entry.items()}
        return [renamed(one) for one in entry] if isinstance(entry, list) else entry

    return renamed(json.loads(path.read_text()))


# ---- printing ------------------------------------------------------------------------------------


class Table:
    """A table that is printed line by line: on the left what is text, on the right numbers."""

    def __init__(self, columns: Mapping[str, int]) -> None:
        """Print the headings.

        Args:
            columns: by heading the least width, negative for text.
        """
        self.widths = [
            min(width, -len(heading) - 2) if width < 0 else max(width, len(heading) + 2)
            for heading, width in columns.items()
        ]
        print()
        self.add(*columns)

    def add(self, *cells: object) -> None:
        """Print a line."""
        pairs = zip(map(str, cells), self.widths, strict=True)
        texts = [f"{cell:>{w}}" if w > 0 else f"{cell:<{-w}}" for cell, w in pairs]
        print("".join(texts), flush=True)


def print_machine(record: Mapping[str, Any]) -> None:
    """What a record is measured on and with."""
    print(*(f"{key}: {text}" for key, text in record["machine"].items()), sep=", ")


# ---- time limits and processes -------------------------------------------------------------------


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


def python_call(module: str, call: str, *arguments: object) -> list[str]:
    """The command of a process that makes one call, of a function of ``benchmarks``, in ROOT."""
    given = ", ".join(repr(str(one)) for one in arguments)
    return [sys.executable, "-c", f"from {module} import {call}; {call}({given})"]
