"""Tables of what tried to break the operator: ``make reliability``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from benchmarks.common import harness
from benchmarks.report.tables import NO_FIGURE, Record, Table

# By how the name of what was tried begins: its line in the README's table.
LINES = {
    "kernels": "kernels against the definition",
    "calls": "calls through PyTorch",
    "hostile": "hostile arguments",
    "address": "all of these under sanitizers",
    "threads": "all of these under sanitizers",
    "64-bit Arm": "the kernels on 64-bit Arm, by qemu",
}


def runs_by(lines: Mapping[str, str] | None = None) -> dict[str, list[tuple[Record, Record]]]:
    """By what was tried, or by its line: each machine, and what came of it there."""
    found: dict[str, list[tuple[Record, Record]]] = {}
    if lines:
        found = {line: [] for line in lines.values()}
    for path in sorted((harness.RESULTS / "reliability").glob("*.json")):
        record = harness.read_record(path)
        for run in record["runs"]:
            name = run["what"]
            if lines:
                name = next((line for start, line in lines.items() if name.startswith(start)), name)
            found.setdefault(name, []).append((record["machine"], run))
    return {name: runs for name, runs in found.items() if runs}


def small(page: str) -> str:
    """The README's: how much was tried, how much failed, at which commits."""
    rows = []
    for line, runs in runs_by(LINES).items():
        cases = sum(run["cases"] for _, run in runs)
        commits = dict.fromkeys(machine["commit"] for machine, _ in runs)
        rows.append([line, f"{cases:,}", failures(runs), ", ".join(commits)])
    return shown(["what", "tried", "failed", "at commit"], rows)


def whole(page: str) -> str:
    """What was tried, of what kind, where and at which commit."""
    rows = []
    for what, runs in runs_by().items():
        places = dict.fromkeys(f"{machine['cpu']}, {machine['commit']}" for machine, _ in runs)
        rows.append([what, tried([run for _, run in runs]), failures(runs), "; ".join(places)])
    return shown(["what", "tried", "failed", "where, at which commit"], rows)


def shown(columns: list[str], rows: list[list[str]]) -> str:
    return str(Table(columns, rows)) or NO_FIGURE.format(kind="", command="make reliability")


def failures(runs: list[tuple[Record, Record]]) -> str:
    return f"**{sum(len(run['failures']) for _, run in runs)}**"


def tried(runs: list[Record]) -> str:
    """How many cases of what, in all runs."""
    kinds = sum((Counter(run["kinds"]) for run in runs), Counter())
    number = f"{sum(run['cases'] for run in runs):,}"
    if "refused" in kinds:
        refused = kinds["refused"] + kinds["refused by torch"]
        return f"{number} calls: {refused:,} refused, {kinds['computed']:,} computed right"
    capabilities: Counter[str] = Counter()
    for run in runs:
        capabilities.update(dict.fromkeys(run["capabilities"], run["cases"]))
    if capabilities:
        by_name = ", ".join(f"{name} {cases:,}" for name, cases in capabilities.items())
        return f"{number} problems ({by_name})"
    return f"{number} {'tests' if 'passed' in kinds else 'calls'}"
