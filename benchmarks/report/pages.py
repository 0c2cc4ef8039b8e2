"""Write the tables of the pages from committed result files: ``python benchmarks/report.py``.

Each table stands between ``<!-- NAME:begin -->`` and ``<!-- NAME:end -->``. With ``--check``
nothing is written, and the exit status is 1 if a page does not say what the files say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def cpu_heading(path: Path, results: dict, dtype: str = "float32, ") -> str:
    """What a table of CPU results was measured on."""
    machine = results["machine"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['cpu_capability']} kernels, "
        f"{dtype}torch {machine['torch']}, msda {machine['msda']} at {machine['commit']} "
        f"(`{path.relative_to(ROOT)}`):"
    )


def operator_table() -> str:
    """All workloads in float32 of every committed operator.json."""
    return _operator_tables(workload_rows, "float32, ")


def dtypes_table() -> str:
    """All dtypes of the main workloads of every committed operator.json."""
    return _operator_tables(dtype_rows, "")


def _operator_tables(rows_of: Callable[[dict], str], dtype: str) -> str:
    parts = []
    for path in sorted(RESULTS.glob("*/operator.json")):
        results = json.loads(path.read_text())
        parts += [cpu_heading(path, results, dtype), rows_of(results)]
    return "\n\n".join(parts)


OPERATOR_DIRECTIONS = ("forward", "backward", "fused forward", "fused backward")


def workload_rows(results: dict) -> str:
    """float32: one line per workload and number of threads, a column per direction."""
    by_line: dict[tuple[str, int], dict[str, dict]] = {}
    for row in results["rows"]:
        if row["dtype"] == "float32":
            by_line.setdefault((row["workload"], row["threads"]), {})[row["direction"]] = row
    headings = [
        "workload",
        "threads",
        *OPERATOR_DIRECTIONS,
        "share of the floor",
        "extra memory, MB",
    ]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for (workload, threads), by_direction in by_line.items():
        rows = [by_direction.get(direction) for direction in OPERATOR_DIRECTIONS]
        cells = [workload, str(threads), *(_operator_cell(row) for row in rows)]
        cells.append(_cell(row and f"{row['floor']['share']:.2f}" for row in rows[:2]))
        cells.append(_cell(row and _extra_memory(row) for row in rows[:2]))
        lines.append(f"| {' | '.join(cells)} |")
    copied = results["rates"]["copy_bytes_per_second"]
    copied_by = ", ".join(f"{rate / 1e9:.1f} GB/s ({threads})" for threads, rate in copied.items())
    loads = results["rates"]["loads_per_second"]
    floor = f"Memory is copied there at {copied_by}"
    if loads:
        floor += f", a core loads {loads / 1e9:.2f} billion vectors of 64 bytes per second"
    lines += [
        "",
        "Milliseconds and the time of the grid_sample core over ours; where two are given, the "
        f"second is of that core under torch.compile. {floor}: of forward and backward, the share "
        "of the higher floor and the memory beyond the inputs, ours and the core's.",
    ]
    return "\n".join(lines)


def _operator_cell(row: dict | None) -> str:
    """Time and ratios of one direction; a dash where it was not measured."""
    if row is None:
        return "-"
    ratios = [f"**{row['rivals']['grid_sample']['ratio']:.1f}x**"]
    if "torch.compile" in row["rivals"]:
        ratios.append(f"{row['rivals']['torch.compile']['ratio']:.1f}x")
    return f"{row['ms']:.2f}, {' / '.join(ratios)}"


def _extra_memory(row: dict) -> str:
    core = row["rivals"]["grid_sample"]["extra_bytes"]
    return f"{row['extra_bytes'] / 1e6:.1f} ({core / 1e6:.0f})"


def dtype_rows(results: dict) -> str:
    """The workloads that were measured in every dtype, on one thread: time, ratio, error."""
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    by_line: dict[tuple[str, str], dict[str, dict]] = {}
    for row in results["rows"]:
        if row["threads"] == 1:
            by_line.setdefault((row["workload"], row["direction"]), {})[row["dtype"]] = row
    headings = ["workload", "direction", *dtypes]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for (workload, direction), by_dtype in by_line.items():
        cells = [workload, direction, *(_dtype_cell(by_dtype.get(dtype)) for dtype in dtypes)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "One thread: milliseconds, the time of the grid_sample core over ours, and the largest "
        "relative error against float64 (Euclidean norm, the largest of the gradients), ours and "
        "the core's. 16 bits: the core computes in float32, as PyTorch's 16-bit grid_sample on a "
        "CPU reads outside its input.",
    ]
    return "\n".join(lines)


def _dtype_cell(row: dict | None) -> str:
    if row is None:
        return "-"
    core = row["rivals"]["grid_sample"]
    ours, theirs = (max(one["errors"].values()) for one in (row, core))
    return f"{row['ms']:.2f}, **{core['ratio']:.1f}x**, {ours:.0e} ({theirs:.0e})"


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


def capabilities_table() -> str:
    """Each instruction set, and beside the best one the time that its load slots allow."""
    parts = []
    for path in sorted(RESULTS.glob("*/capabilities.json")):
        results = json.loads(path.read_text())
        floors = results.get("floor_ms", {})
        best = results["rows"][-1]["capability"]
        lines = [
            f"The {results['workload']} on one thread. {cpu_heading(path, results)}",
            "",
            "| direction | instruction set | ms | of the best one's speed | floor, ms |",
            "|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            floor = floors.get(row["direction"]) if row["capability"] == best else None
            lines.append(
                f"| {row['direction']} | {row['capability']} | {row['ms']:.1f} "
                f"| {row['speed']:.2f} | {'' if floor is None else f'{floor:.1f}'} |"
            )
        if floors:
            lines += [
                "",
                "The floor is the time that the loads and stores of the inner loop take alone, in "
                "vectors of 64 bytes and all out of the first-level cache: "
                f"{results['loads_per_second'] / 1e9:.2f} billion a second.",
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


def convergence_table() -> str:
    """Every committed convergence.json: epochs and seconds to each AP, and the figure."""
    parts = []
    for path in sorted(RESULTS.glob("*/convergence.json")):
        results = json.loads(path.read_text())
        machine, experiment = results["machine"], results["experiment"]
        where = machine.get("device") or f"{machine['cpu']}, one thread a run"
        headings = ["arm", "learning rate"]
        headings += [f"AP {threshold:g}" for threshold in results["thresholds"]]
        lines = [
            f"{where}, torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, "
            f"data set `{experiment['preset']}`, {results['total_seconds'] / 60:.0f} minutes of "
            f"training in all (`{path.relative_to(ROOT)}`, curves in `convergence.csv` beside it):",
            "",
            f"| {' | '.join(headings)} |",
            "|---" * len(headings) + "|",
        ]
        for name, arm in results["arms"].items():
            cells = [name, f"{arm['lr']:g}"]
            cells += [_reached(one, len(arm["runs"])) for one in arm["thresholds"].values()]
            lines.append(f"| {' | '.join(cells)} |")
        epochs = ", ".join(f"{kind} {number}" for kind, number in experiment["epochs"].items())
        seconds = "processor" if results["seconds"] == "processor_seconds" else "GPU"
        lines += [
            "",
            f"Epochs, and in brackets {seconds} seconds of training, until validation AP passes a "
            f"threshold: the median of the seeds and, where they differ, least to most. Epochs "
            f"trained: {epochs}; seeds: {len(next(iter(results['arms'].values()))['runs'])}. "
            + _chosen_rates(results),
            "",
            f"![AP over epochs and over seconds]({path.with_suffix('.png').relative_to(ROOT)})",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _chosen_rates(results: dict) -> str:
    """How each arm came by its learning rate."""
    tried = next(iter(results["arms"].values()))["tuning"]
    if not tried:
        return "Learning rates are those that the smaller experiment chose."
    tuning = ", ".join(f"{kind} {n}" for kind, n in results["experiment"]["tuning_epochs"].items())
    text = (
        f"Each arm has the learning rate, of {' or '.join(tried)}, with the highest AP after "
        f"{tuning} epochs."
    )
    highest = [name for name, arm in results["arms"].items() if arm["lr"] == max(map(float, tried))]
    return text + (f" For {' and '.join(highest)} that is the highest tried." if highest else "")


def _reached(entry: dict, seeds: int) -> str:
    """Epochs and seconds to one threshold."""
    if entry["epochs"] is None:
        return f"{entry['reached']} of {seeds} seeds" if entry["reached"] else "not reached"
    texts = []
    for what, digits in (("epochs", 1), ("seconds", 0)):
        middle, least, most = (f"{entry[what][key]:.{digits}f}" for key in ("median", "min", "max"))
        texts.append(middle if least == most else f"{middle}, {least} to {most}")
    return f"{texts[0]} ({texts[1]} s)"


NO_TRANSFORMERS_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_transformers.py --output "
    "benchmarks/results/<machine>/transformers.json` measures them."
)


def transformers_table() -> str:
    """Every committed transformers.json, one table per machine; or that there is none yet."""
    parts = []
    for path in sorted(RESULTS.glob("*/transformers.json")):
        results = json.loads(path.read_text())
        lines = [
            f"transformers {results['machine']['transformers']}, {cpu_heading(path, results)}",
            "",
            "| model | image | threads | before, ms | after, ms | ratio "
            "| extra memory, MB: before / after |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['model']} | {row['size'][0]} x {row['size'][1]} | {row['threads']} "
            f"| {row['before_ms']:.0f} | {row['after_ms']:.0f} | **{row['ratio']:.2f}x** "
            f"| {row['before_extra_bytes'] / 1e6:.0f} / {row['after_extra_bytes'] / 1e6:.0f} |"
            for row in results["rows"]
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_TRANSFORMERS_FIGURE


NO_RUNTIMES_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_runtimes.py --output "
    "benchmarks/results/<machine>/runtimes.json` measures them."
)


def runtimes_table() -> str:
    """Every committed runtimes.json, one table per machine; or that there is none yet."""
    parts = []
    for path in sorted(RESULTS.glob("*/runtimes.json")):
        results = json.loads(path.read_text())
        machine = results["machine"]
        lines = [
            f"OpenVINO {machine['openvino'].split('-')[0]}, ONNX Runtime {machine['onnxruntime']}, "
            f"{cpu_heading(path, results)}",
            "",
            "| model | in | threads | ms (quartiles) | against standard operators "
            "| relative error | share of the operator |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            lower, upper = row["quartiles_ms"]
            ratio, error, share = row["ratio"], row["error"], row["operator_share"]
            lines.append(
                f"| {row['model']} | {row['side']} | {row['threads']} "
                f"| {row['ms']:.2f} ({lower:.2f} to {upper:.2f}) "
                f"| {'-' if ratio is None else f'**{ratio:.2f}x**'} "
                f"| {'-' if error is None else f'{error:.0e}'} "
                f"| {'-' if share is None else f'{share:.0%}'} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_RUNTIMES_FIGURE


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


NO_SCALING_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_scaling.py --output "
    "benchmarks/results/<machine>/scaling.json` measures them, `python benchmarks/plots.py` draws."
)


SCALING_SIDES = (64, 256, 512, 1024, 2048)  # pixels, of the many that are measured


def scaling_table() -> str:
    """Every committed scaling.json, one table and figure per machine; or that there is none yet."""
    parts = []
    for path in sorted(RESULTS.glob("*/scaling.json")):
        results = json.loads(path.read_text())
        lines = [
            scaling_heading(path, results),
            "",
            "| | direction | image | tokens | dense, ms | msda, ms | ratio "
            "| extra memory, MB: dense / msda | GFLOP: dense / msda |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [_scaling_row(row) for row in results["rows"] if row["side"] in SCALING_SIDES]
        lines += [
            "",
            "~: not measured, but computed by a law fitted to the measured points (dense: a S + "
            f"b S², msda: a S). {_scaling_exponents(results['fits'])}MSDeformAttn is the faster "
            f"one from here on: {_scaling_crossovers(results['crossovers'])}.",
        ]
        figure = path.with_suffix(".png")
        if figure.exists():
            text = "Time and memory of dense and deformable attention over the number of tokens"
            lines += ["", f"![{text}]({figure.relative_to(ROOT)})"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_SCALING_FIGURE


def scaling_heading(path: Path, results: dict) -> str:
    """What a scaling.json was measured on; some are of a GPU."""
    machine = results["machine"]
    where = machine.get("device") or f"{machine['cpu']}, threads: {results['threads']}"
    return (
        f"{where}, torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, "
        f"{results['dtype']} (`{path.relative_to(ROOT)}`, which has more sizes):"
    )


def _scaling_row(row: dict) -> str:
    both = [row["rivals"]["dense"], row["rivals"]["msda"]]
    marks = ["" if rival["computed"] is None else "~" for rival in both]
    marked = list(zip(marks, both, strict=True))
    times = [f"{mark}{rival['ms']:.{3 if rival['ms'] < 1 else 1}f}" for mark, rival in marked]
    memory = [f"{mark}{rival['extra_bytes'] / 1e6:.1f}" for mark, rival in marked]
    flops = [f"{rival['flops'] / 1e9:.2f}" for rival in both]
    direction = {"forward": "forward", "both": "forward + backward"}[row["direction"]]
    cells = [row["thing"], direction, f"{row['side']} x {row['side']}", str(row["tokens"]), *times]
    cells += [f"**{max(marks)}{row['ratio']:.1f}x**", " / ".join(memory), " / ".join(flops)]
    return f"| {' | '.join(cells)} |"


def _scaling_exponents(fits: list[dict]) -> str:
    """One sentence: by which power of S the times grow."""
    found = []
    for fit in fits:
        if fit["quantity"] == "ms" and fit["half_exponent"] is not None:
            found.append(
                f"{fit['thing']}, {fit['direction']}, {fit['rival']} {fit['exponent']:.2f} "
                f"({fit['half_exponent']:.2f})"
            )
    if not found:
        return ""
    return (
        "Time grows with this power of S from 256 pixels on (over the larger half of the "
        f"measured sizes): {'; '.join(found)}. "
    )


def _scaling_crossovers(crossovers: list[dict]) -> str:
    return "; ".join(f"{one['thing']}, {one['direction']}: {one['where']}" for one in crossovers)


NO_DETECTOR_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_detector.py --output "
    "benchmarks/results/<machine>/detector.json` measures them."
)


def detector_table() -> str:
    """Every committed detector.json: speed and memory, then the time of each part."""
    parts = []
    for path in sorted(RESULTS.glob("*/detector.json")):
        results = json.loads(path.read_text())
        height, width = results["size"]
        errors = ", ".join(f"{name} {error:.0e}" for name, error in results["errors"].items())
        lines = [
            f"{results['preset']}, batch {results['batch']}, {height} x {width}: "
            f"{_detector_machine(path, results)}",
            "",
            "| direction | images/s: reference operator | msda | ratio "
            "| extra memory, MB: reference operator / msda |",
            "|---|---|---|---|---|",
        ]
        for row in results["rows"]:
            speed, extra = row["images_per_second"], row["extra_bytes"]
            lines.append(
                f"| {DIRECTIONS[row['direction']]} | {speed['reference']:.3g} "
                f"| {speed['msda']:.3g} | **{row['ratio']:.2f}x** "
                f"| {extra['reference'] / 1e6:.0f} / {extra['msda'] / 1e6:.0f} |"
            )
        lines += [
            "",
            f"Medians of {results['rounds']} rounds in turns; relative errors of ours against the "
            f"reference operator: {errors}.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_DETECTOR_FIGURE


def parts_table() -> str:
    """The time of each part of the detector, of every committed detector.json."""
    parts = []
    for path in sorted(RESULTS.glob("*/detector.json")):
        results = json.loads(path.read_text())
        height, width = results["size"]
        lines = [
            f"{results['preset']}, batch {results['batch']}, {height} x {width}, by a profiler in "
            f"one pass: {_detector_machine(path, results)}",
            "",
            *_detector_parts(results["rows"]),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_DETECTOR_FIGURE


DIRECTIONS = {"forward": "forward", "both": "forward + backward"}


def _detector_machine(path: Path, results: dict) -> str:
    """What a run of the detector was measured on; some are of a GPU."""
    machine = results["machine"]
    cpu = f"{machine['cpu']}, {results['threads']} threads, {machine['cpu_capability']} kernels"
    where = machine["device"] if results["device"] == "cuda" else cpu
    dtype = "float32" if results.get("amp", "off") == "off" else f"autocast to {results['amp']}"
    return (
        f"{where}, torch {machine['torch']}, msda {machine['msda']} at {machine['commit']}, "
        f"{dtype} (`{path.relative_to(ROOT)}`)."
    )


def _detector_parts(rows: list[dict]) -> list[str]:
    """Seconds and shares, a column for each direction and side."""
    columns = [(row, side) for row in rows for side in ("reference", "msda")]
    titles = [f"{DIRECTIONS[row['direction']]}: {side}, s" for row, side in columns]
    lines = [f"| part | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for part in rows[0]["part_seconds"]["msda"]:
        cells = [part]
        for row, side in columns:
            seconds = row["part_seconds"][side]
            share = seconds[part] / sum(seconds.values())
            cells.append(f"{seconds[part]:.3g} ({share:.0%})" if seconds[part] else "-")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


NO_CPU_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_cpu.py --output "
    "benchmarks/results/<machine>/cpu.json` measures them."
)


def cpu_table() -> str:
    """Every committed cpu.json: precision, huge pages and waiting threads in whole programs."""
    parts = []
    for path in sorted(RESULTS.glob("*/cpu.json")):
        results = json.loads(path.read_text())
        parts += [cpu_heading(path, results, f"{results['threads']} threads, ")]
        tables = {"precision": _precision, "waiting": _waiting, "demo": _demo}
        parts += [
            "\n".join(make(results[name])) for name, make in tables.items() if name in results
        ]
    return "\n\n".join(parts) or NO_CPU_FIGURE


def _precision(rows: list[dict]) -> list[str]:
    """A line per task, a column per precision and kind of pages."""
    by_task: dict[str, dict[str, float]] = {}
    for row in rows:
        column = f"{AMP_NAMES[row['amp']]}, {row['pages']} pages"
        by_task.setdefault(row["task"], {})[column] = row["images_per_second"]
    columns = list(next(iter(by_task.values())))
    lines = [f"| images/s | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for task, speeds in by_task.items():
        first = speeds[columns[0]]
        cells = [f"{speeds[columns[0]]:.3g}"]
        cells += [f"{speeds[name]:.3g}, **{speeds[name] / first:.2f}x**" for name in columns[1:]]
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return lines


AMP_NAMES = {"off": "float32", "bf16": "autocast to bfloat16"}


def _waiting(results: dict) -> list[str]:
    """Training by how threads wait: images per second, alone and among busy processes."""
    lines = [
        f"| how threads wait | images/s, alone | among {results['busy_processes']} busy processes "
        "| per second of processor time, alone | among them |",
        "|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        speeds = [
            f"{row[where][name]:.3g}"
            for name in ("images_per_second", "images_per_processor_second")
            for where in ("alone", "among_others")
        ]
        lines.append(f"| {row['waiting']} | {' | '.join(speeds)} |")
    return lines


def _demo(results: dict) -> list[str]:
    """Average precision by the precision of training and evaluation."""
    found = {(row["trained"], row["evaluated"]): row["AP"] for row in results["rows"]}
    columns = [f"evaluated in {name}" for name in AMP_NAMES.values()]
    lines = [
        f"| AP of the demo after {results['epochs']} epochs | {' | '.join(columns)} |",
        "|---|---|---|",
    ]
    for trained, name in AMP_NAMES.items():
        cells = [f"{found[trained, evaluated]:.3f}" for evaluated in AMP_NAMES]
        lines.append(f"| trained in {name} | {' | '.join(cells)} |")
    return lines


NO_PAPER_FIGURE = (
    "No figure of these exists yet: `python benchmarks/bench_paper.py --output "
    "benchmarks/results/<machine>/paper.json` counts and measures them."
)


def paper_table() -> str:
    """Every committed paper.json: the published configurations, counted and timed by our code."""
    parts = []
    for path in sorted(RESULTS.glob("*/paper.json")):
        results = json.loads(path.read_text())
        height, width = results["size"]
        lines = [
            f"One image of {height} x {width}; images/s: {_detector_machine(path, results)}",
            "",
            "| configuration | parameters, M: ours / published | multiply-adds, G: backbone "
            "| encoder | decoder | rest | of these sampling | total: ours / published "
            f"| as published at {height} x | images/s | published, V100 |",
            "|---" * 11 + "|",
        ]
        for row in results["rows"]:
            published, counted = row["published"], row["multiply_adds"]
            cells = [
                published["title"],
                f"{row['parameters']['trained'] / 1e6:.1f} / {published['parameters_m']}",
            ]
            cells += [
                f"{counted[part] / 1e9:.1f}" for part in ("backbone", "encoder", "decoder", "rest")
            ]
            cells += [
                f"{counted['sampling'] / 1e9:.2f}",
                f"**{counted['total'] / 1e9:.0f}** / {published['flops_g']}",
                str(row["matching_width"]),
                f"{row['images_per_second']:.3g}",
                f"{published['v100_images_per_second']:g}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        widths = [row["matching_width"] for row in results["rows"]]
        lines += [
            "",
            "Published: the table of the original code's README; the paper's Table 1 has the last "
            "three, each with 40 M, 173 G and 19 images/s on a V100. Parameters are those that are "
            "trained. We count convolutions and matrix products as PyTorch's `FlopCounterMode` "
            "does, the sampling by the rule of `msda/flops.py`, and give multiply-adds; at 2 FLOPs "
            "each the numbers would be twice as large. For which images the published FLOPs are "
            "is not said there: our multiply-adds equal them for images of "
            f"{height} x {min(widths)} to {height} x {max(widths)}, by configuration.",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) or NO_PAPER_FIGURE


def traffic_table() -> str:
    """What the CUDA kernels ask of memory, from the budget that the tests hold them to."""
    sys.path.insert(0, str(ROOT / "tests"))
    from memory_traffic import BUDGET, markdown_table

    traffic = json.loads(BUDGET.read_text())["traffic"]
    shown = {
        name: {case: counts for case, counts in traffic[name].items() if "fused" not in case}
        for name in ("encoder-2", "decoder-300", "rf-detr")
    }
    return markdown_table(shown)


NO_RELIABILITY_FIGURE = (
    "No figure of these exists yet: `make reliability` tries the operator and writes the files "
    "that this block is made from."
)


def reliability_table() -> str:
    """What all runs of tests/fuzz/run.py tried, a line for each thing."""
    runs: dict[str, list[tuple[str, dict]]] = {}
    for path in sorted((RESULTS / "reliability").glob("*.json")):
        results = json.loads(path.read_text())
        where = f"{results['machine']['cpu']}, {results['machine']['commit']}"
        for run in results["runs"]:
            runs.setdefault(run["what"], []).append((where, run))
    lines = []
    for what, found in runs.items():
        places = "; ".join(dict.fromkeys(where for where, _ in found))
        failed = sum(len(run["failures"]) for _, run in found)
        cells = [what, _tried([run for _, run in found]), f"**{failed}**", places]
        lines.append(f"| {' | '.join(cells)} |")
    if not lines:
        return NO_RELIABILITY_FIGURE
    headings = ["what", "tried", "failed", "where, at which commit"]
    return "\n".join(
        [
            f"| {' | '.join(headings)} |",
            "|---" * len(headings) + "|",
            *lines,
            "",
            "Problems of the kernels: random sizes, dtypes, subsets of gradients, splits over "
            "threads, NaN and Inf, addresses. Each number is held against a scalar definition in "
            "double precision, within the bound of its rounding errors "
            "(`tests/fuzz/definition.h`); arrays lie between pages that cannot be read. Calls are "
            "held against the float64 reference. Seeds and kinds are in the files "
            "(`benchmarks/results/reliability`).",
        ]
    )


def _tried(runs: list[dict]) -> str:
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


def hits_table() -> str:
    """How often a model of L1 holds an encoder's pixels."""
    sys.path.insert(0, str(ROOT / "tests"))
    from memory_traffic import BUDGET, markdown_hits

    return markdown_hits(json.loads(BUDGET.read_text())["hits"])


# What stands on which page.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "gpu": gpu_table,
        "operator": operator_table,
        "peers": peers_table,
        "scaling": scaling_table,
        "detector": detector_table,
        "transformers": transformers_table,
        "convergence": convergence_table,
        "reliability": reliability_table,
    },
    "docs/benchmarks.md": {
        "dtypes": dtypes_table,
        "fused": fused_table,
        "capabilities": capabilities_table,
        "parts": parts_table,
        "cpu": cpu_table,
        "paper": paper_table,
    },
    "docs/runtimes.md": {"runtimes": runtimes_table},
    "docs/cuda.md": {"hits": hits_table, "traffic": traffic_table},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    options = parser.parse_args()
    out_of_date = False
    for page, tables in PAGES.items():
        path = ROOT / page
        old = new = path.read_text()
        for name, table in tables.items():
            begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
            if not pattern.search(new):
                sys.exit(f"{page} must hold {begin} and {end}, got neither or one")
            text = f"{begin}\n{table()}\n{end}"
            new = pattern.sub(lambda _, text=text: text, new)
        out_of_date |= new != old
        if not options.check:
            path.write_text(new)
    return int(options.check and out_of_date)


if __name__ == "__main__":
    sys.exit(main())
