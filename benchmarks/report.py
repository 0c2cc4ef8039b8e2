"""Write the tables of README.md from committed result files: ``python benchmarks/report.py``.

Each table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. With ``--check``
nothing is written, and the exit status is 1 if README.md does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import targets

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_heading(path: Path, results: dict) -> str:
    """What a table of CPU results was measured on."""
    machine = results["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']} kernels, "
        f"torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, float32 "
        f"(`{path.relative_to(ROOT)}`):"
    )


def operator_table() -> str:
    """Ratios of every committed operator.json, one table per machine."""
    parts = []
    for path in sorted(RESULTS.glob("*/operator.json")):
        results = json.loads(path.read_text())
        lines = [
            cpu_heading(path, results),
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


def fused_table() -> str:
    """Every committed fused.json, one table per machine."""
    parts = []
    for path in sorted(RESULTS.glob("*/fused.json")):
        results = json.loads(path.read_text())
        lines = [
            cpu_heading(path, results),
            "",
            "| workload | direction | threads | unfused, ms | fused, ms | ratio "
            "| extra memory, MB: unfused / fused |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['workload']} | {row['direction']} | {row['threads']} "
            f"| {row['unfused_ms']:.2f} | {row['fused_ms']:.2f} | **{row['ratio']:.2f}x** "
            f"| {row['unfused_extra_bytes'] / 1e6:.1f} / {row['fused_extra_bytes'] / 1e6:.1f} |"
            for row in results["rows"]
        ]
        calls = ", ".join(f"{name} {us:.0f} us" for name, us in results["calls"].items())
        lines += ["", f"A call on one query there, one thread: {calls}."]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def targets_table() -> str:
    """What was asked and what came, one table per machine, with the reasons for what was missed."""
    parts = []
    for folder in sorted(path for path in RESULTS.glob("*") if path.is_dir()):
        found = list(targets.targets(folder))
        if not found:
            continue
        lines = [f"`benchmarks/results/{folder.name}`:", "", "| target | asked | measured | |"]
        lines += ["|---|---|---|---|"]
        lines += [f"| {' | '.join(target.cells())} |" for target in found]
        lines += [""] + [
            f"- Missed: {'; '.join(names)}: {reason}."
            for reason, names in targets.reasons(found).items()
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


NO_PEER_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_peers.py --output "
    "benchmarks/results/<machine>/peers.json` measures those that are installed."
)


def peers_table() -> str:
    """Every committed peers.json, one table per machine; or that there is none yet."""
    parts = []
    for path in sorted(RESULTS.glob("*/peers.json")):
        results = json.loads(path.read_text())
        names = list(results["rivals"])
        headings = ["workload", "direction", "threads", "msda, ms", *names]
        lines = [
            cpu_heading(path, results),
            "",
            f"| {' | '.join(headings)} |",
            "|---" * len(headings) + "|",
        ]
        for row in results["rows"]:
            cells = [row["workload"], row["direction"], str(row["threads"])]
            cells.append(f"{row['rivals']['msda']['ms']:.2f}")
            cells += [_peer_cell(row["rivals"].get(name)) for name in names]
            lines.append(f"| {' | '.join(cells)} |")
        described = []
        for name, rival in results["rivals"].items():
            versions = ", ".join(f"{what} {number}" for what, number in rival["versions"].items())
            described.append(f"{name}: {rival['about']} ({versions}).")
        described += [f"{name}: missing ({why})." for name, why in results["missing"].items()]
        lines += ["", f"Milliseconds and, in brackets, times ours. {' '.join(described)}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_PEER_FIGURE


def _peer_cell(rival: dict | None) -> str:
    """A peer's time and ratio; a dash where it has no such direction."""
    if rival is None:
        return "-"
    return f"{rival['ms']:.1f} (**{rival['ratio']:.1f}x**)" if "ms" in rival else "refused"


NO_GPU_FIGURE = (
    "No GPU figure exists yet: `make gpu` on a machine with a CUDA device measures them "
    "and writes the files that this block is made from."
)


def gpu_table() -> str:
    """What every folder of GPU results holds, one table per device; or that there is none yet."""
    parts = []
    for path in sorted(RESULTS.glob("*/cuda_operator.json")):
        results = json.loads(path.read_text())
        if results["machine"]["device"] == "cpu" or results["smoke"]:
            continue  # a trial of the harness
        parts.append(f"{gpu_heading(path, results)}\n\n{gpu_rows(results)}")
        parts += gpu_checks(path.parent)
    return "\n\n".join(parts) or NO_GPU_FIGURE


def gpu_heading(path: Path, results: dict) -> str:
    machine, ceilings = results["machine"], results["ceilings"]
    return (
        f"{machine['device']}, driver {machine['driver']}, CUDA {machine['cuda']}, "
        f"torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, "
        f"{ceilings['dram_bytes_per_second'] / 1e12:.2f} TB/s measured "
        f"(`{results['command']}`, `{path.relative_to(ROOT)}`). Medians with the L2 cache emptied "
        "before each call; a rival's column is its time over ours."
    )


def gpu_rows(results: dict) -> str:
    """One line per workload and direction; a column per rival that ran at all."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    right = [row for row in results["rows"] if "cold_ms" in row["rivals"]["msda"]]
    rivals = dict.fromkeys(
        name for row in right for name, rival in row["rivals"].items() if "ratio" in rival
    )
    rivals.pop("msda", None)
    lines_of: dict[tuple[str, str], dict[str, dict]] = {}
    for row in right:
        lines_of.setdefault((row["workload"], row["direction"]), {})[row["dtype"]] = row

    headings = ["workload", "direction", "msda, ms", "times the floor", *rivals, "extra memory, MB"]
    lines = [
        f"Each cell is {' / '.join(dtypes)}.",
        "",
        f"| {' | '.join(headings)} |",
        "|---" * len(headings) + "|",
    ]
    for (workload, direction), by_dtype in lines_of.items():
        rows = [by_dtype.get(dtype) for dtype in dtypes]
        ours = [row and row["rivals"]["msda"] for row in rows]
        cells = [workload, direction]
        cells.append(_cell(one and f"{one['cold_ms']:.3g}" for one in ours))
        cells.append(_cell(row and f"{row['floor']['over_floor']:.1f}" for row in rows))
        for name in rivals:
            ratios = [row and row["rivals"].get(name, {}).get("ratio") for row in rows]
            cells.append(_cell(ratio and f"{ratio:.1f}x" for ratio in ratios))
        cells.append(_cell(one and f"{one['extra_bytes'] / 1e6:.1f}" for one in ours))
        lines.append(f"| {' | '.join(cells)} |")
    wrong = len(results["rows"]) - len(right)
    if wrong:
        lines += ["", f"{wrong} results of ours were wrong and are not shown."]
    return "\n".join(lines)


def _cell(texts: Iterable[str | None]) -> str:
    """One text per dtype; a dash where there is none, nothing where there are none at all."""
    given = list(texts)
    return " / ".join(text or "-" for text in given) if any(given) else ""


def gpu_checks(folder: Path) -> list[str]:
    """What the tests and the sanitizer said on the same device, with what they were run on."""
    sentences = []
    tests = folder / "cuda_tests.json"
    if tests.exists():
        results = json.loads(tests.read_text())
        unfinished = "; not all were run" if results["not_run"] else ""
        sentences.append(
            f"Tests there, at {results['machine']['commit']}: {results['passed']} passed, "
            f"{results['failed']} failed, {results['skipped']} skipped{unfinished}."
        )
    sanitizer = folder / "cuda_sanitizer.json"
    tools = json.loads(sanitizer.read_text())["tools"] if sanitizer.exists() else {}
    if tools:
        commit = json.loads(sanitizer.read_text())["machine"]["commit"]
        said = []
        for tool, seen in tools.items():
            errors = "" if seen["errors"] is None else f", {seen['errors']} errors"
            said.append(f"{tool} {seen['status']}{errors}")
        sentences.append(f"compute-sanitizer there, at {commit}: {'; '.join(said)}.")
    return [" ".join(sentences)] if sentences else []


TABLES = {
    "operator": operator_table,
    "targets": targets_table,
    "peers": peers_table,
    "fused": fused_table,
    "gpu": gpu_table,
}


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
