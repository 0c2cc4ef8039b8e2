"""Write the tables of README.md from committed result files: ``python benchmarks/report.py``.

Each table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. With ``--check``
nothing is written, and the exit status is 1 if README.md does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def operator_table() -> str:
    """Ratios of every committed operator.json, one table per machine."""
    parts = []
    for path in sorted(RESULTS.glob("*/operator.json")):
        results = json.loads(path.read_text())
        machine = results["machine"]
        lines = [
            f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']} kernels, "
            f"torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, float32 "
            f"(`{path.relative_to(ROOT)}`):",
            "",
            "| workload | direction | threads | grid_sample core, ms | msda, ms | ratio "
            "| extra memory, MB: grid_sample / msda | bfloat16 vs float32 | float16 vs float32 |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['workload']} | {row['direction']} | {row['threads']} "
            f"| {row['grid_sample_ms']:.1f} | {row['msda_ms']:.2f} | **{row['ratio']:.1f}x** "
            f"| {row['grid_sample_extra_bytes'] / 1e6:.1f} / {row['msda_extra_bytes'] / 1e6:.1f} "
            f"| {row['bfloat16_speedup']:.2f}x | {row['float16_speedup']:.2f}x |"
            for row in results["rows"]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


TABLES = {"operator": operator_table}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    options = parser.parse_args()
    readme = ROOT / "README.md"
    old = new = readme.read_text()
    for name, table in TABLES.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        if not pattern.search(new):
            sys.exit(f"README.md must hold {begin} and {end}, got neither or one")
        text = f"{begin}\n{table()}\n{end}"
        new = pattern.sub(lambda _, text=text: text, new)
    if options.check:
        return int(new != old)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
