"""Turn claims about CUDA into facts, on any machine with a GPU and no network: ``make gpu``.

    build     build msda with CUDA kernels for this GPU, and run each form of them once
    test      the whole test suite on the GPU
    bench     the operator against PyTorch and every peer found (operator.py)
    micro     micro-benchmarks of the hardware (micro.cu): what a reduction costs, gathers, ceilings
    orders    our kernels with their work in other orders (orders.cu): heads in a tile, split
    sanitize  compute-sanitizer over each form of the kernels (every_form.py)
    all       each of these in its own process, in this order: about an hour

Needs a Python with torch >= 2.10, pytest and hypothesis, and nvcc, CMake and Ninja. Every part ends
within its time limit, does the most important first and writes results as it goes, to
benchmarks/results/<device>/cuda_*.json. Peers that must be built first: see build_peer.py. Where
the checkout is no git repository, MSDA_COMMIT says what it is. ``--device cpu --quick`` tries the
parts without a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import importlib.metadata
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.harness import RESULTS, ROOT, Deadline, Table, make_record, write_json

FOLDER = Path(__file__).resolve().parent
PARTS = ("build", "test", "bench", "micro", "orders", "sanitize")
OLDEST_SETUPTOOLS = 77  # pyproject.toml says so too
EVERY_FORM = [sys.executable, "-m", "benchmarks.gpu.every_form"]
GRACE = 30  # seconds beyond its limit after which a part is ended


# ---- tools ---------------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """The path of one of the CUDA toolkit's programs: on PATH, or in the toolkit torch finds."""
    found = shutil.which(name)
    if found is None:
        with contextlib.suppress(ImportError):
            from torch.utils.cpp_extension import CUDA_HOME

            found = shutil.which(name, path=str(Path(CUDA_HOME) / "bin")) if CUDA_HOME else None
    return found


def capability() -> str:
    """The present GPU's compute capability, e.g. "9.0"."""
    return ".".join(map(str, torch.cuda.get_device_capability()))


def environment(**variables: str) -> dict[str, str]:
    """The environment of child processes: this Python's tools and the repository first."""
    paths = [str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    nvcc = find_tool("nvcc")
    if nvcc is not None:
        paths.append(str(Path(nvcc).parent))
    child = os.environ | {"PATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    return child | variables


class Child:
    """A running command, in a process group of its own."""

    def __init__(self, command: list[str], **options: Any) -> None:
        print("+", shlex.join(command), flush=True)
        self.process = subprocess.Popen(
            command, cwd=ROOT, text=True, start_new_session=True, **options
        )
        self.cut_off = False

    def cut(self) -> None:
        """End it because its time is over."""
        self.cut_off = True
        self.end()

    def end(self) -> None:
        """End it and what it started: asked first, then made to."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self.process.pid, request)
                    self.process.wait(timeout=10)


@contextlib.contextmanager
def started(command: list[str], limit: float, **options: Any) -> Iterator[Child]:
    """A command that runs for ``limit`` seconds at most, and not beyond this block."""
    child = Child(command, **options)
    timer = threading.Timer(limit, child.cut)
    timer.daemon = True
    timer.start()
    try:
        yield child
    finally:
        timer.cancel()
        child.end()


def run(command: list[str], limit: float, **options: Any) -> int | None:
    """Run a command; its exit status, or None where it was cut off after ``limit`` seconds."""
    with started(command, limit, **options) as child:
        status = child.process.wait()
    if child.cut_off:
        print(f"cut off after {limit:.0f} s: {command[0]}", flush=True)
        return None
    return status


def compile_cuda(source: str, folder: Path, deadline: Deadline) -> Path:
    """Compile one of this folder's .cu files for the present GPU."""
    nvcc = find_tool("nvcc")
    if nvcc is None:
        sys.exit("nvcc must be on PATH, in CUDA_HOME or in /usr/local/cuda, got none")
    program = folder / Path(source).stem
    architecture = "-arch=sm_" + capability().replace(".", "")
    command = [nvcc, "-std=c++17", "-O3", architecture, "-o", str(program), str(FOLDER / source)]
    if run(command, deadline.left()) != 0:
        sys.exit(f"{source} must compile, got an error (above)")
    return program


# Options that leave out a part of a part.
SELECTING = {"test": ("file",), "bench": ("workload", "dtype", "direction"), "sanitize": ("tool",)}


def results_folder(options: argparse.Namespace) -> Path:
    """Where results go: a folder per device; for trials and for parts of a part, none to commit."""
    if options.results is not None:
        return options.results
    is_partial = any(getattr(options, name) for name in SELECTING.get(options.part, ()))
    if options.device == "cpu" or options.quick or is_partial:
        return ROOT / "out" / "gpu"
    name = torch.cuda.get_device_name()
    return RESULTS / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---- build ---------------------------------------------------------------------------------------


def build_environment(device: str, found_capability: str) -> dict[str, str]:
    """Variables of the build: CUDA or not, and for which GPU unless the caller said which."""
    variables = {
        "MSDA_CUDA": "1" if device == "cuda" else "0",
        # A folder of its own: CMake keeps earlier answers.
        "MSDA_BUILD_DIR": str(ROOT / "build" / f"gpu-{device}"),
    }
    if device == "cuda" and not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        variables["TORCH_CUDA_ARCH_LIST"] = found_capability
    nvcc = find_tool("nvcc")
    if device == "cuda" and nvcc is not None and not os.environ.get("CUDACXX"):
        variables["CUDACXX"] = nvcc
    return variables


def require_setuptools() -> None:
    """Without build isolation pip does not look whether setuptools is new enough."""
    version = importlib.metadata.version("setuptools")
    if int(version.split(".")[0]) < OLDEST_SETUPTOOLS:
        sys.exit(f"setuptools must be {OLDEST_SETUPTOOLS} or newer to build, got {version}")


def build(options: argparse.Namespace) -> int:
    """Install this checkout, editable, and run each form of the kernels once."""
    deadline = Deadline(options.minutes)
    require_setuptools()
    variables = build_environment(options.device, capability() if options.device == "cuda" else "")
    print("with", *(f"{name}={text}" for name, text in variables.items()))
    install = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e"]
    start = time.monotonic()
    if run([*install, str(ROOT)], deadline.left(), env=environment(**variables)) != 0:
        return 1
    print(f"built in {time.monotonic() - start:.0f} s")
    about = [sys.executable, "-m", "msda.info"]
    native = environment(MSDA_BACKEND="native")
    if run(about, deadline.left(), env=native) != 0:
        return 1
    forms = [*EVERY_FORM, "--device", options.device, "--brief"]
    return int(run(forms, deadline.left(), env=native) != 0)


# ---- test ----------------------------------------------------------------------------------------

# The most telling first; those not named here follow.
FIRST_TESTS = ("forward", "backward", "gpu", "op", "module", "errors", "large")
# Of the build and the machine code, and of CUDA kernels that run on the CPU.
OTHER_TESTS = ("packaging/test_build.py", "cuda/test_[!g]*.py", "benchmarks/*.py")


def test_files() -> list[Path]:
    """The test files that have cases on a device, the most telling first."""
    found = {
        path.stem.removeprefix("test_"): path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if not any(path.match(pattern) for pattern in OTHER_TESTS)
    }
    first = [found.pop(name) for name in FIRST_TESTS if name in found]
    return first + list(found.values())


def read_outcomes(log: Path) -> dict[str, Any]:
    """Sum up what the plugin outcomes.py wrote: counts, failures, and reasons of skips."""
    lines = log.read_text().splitlines() if log.exists() else []
    entries = [json.loads(line) for line in lines]
    tests = [entry for entry in entries if "test" in entry]
    counts = Counter(entry["outcome"] for entry in tests)
    return {
        "selected": sum(entry.get("selected", 0) for entry in entries),
        **{outcome: counts[outcome] for outcome in ("passed", "failed", "skipped")},
        "failures": [
            {"test": entry["test"], "message": entry["message"]}
            for entry in tests
            if entry["outcome"] == "failed"
        ],
        "skips": Counter(
            entry["message"].removeprefix("Skipped: ")
            for entry in tests
            if entry["outcome"] == "skipped"
        ),
    }


def test(options: argparse.Namespace) -> int:
    """Run the tests of the CUDA device, one process per file: an error the GPU does not recover
    from ends one file only.
    """
    deadline = Deadline(options.minutes)
    path = results_folder(options) / "cuda_tests.json"
    results: dict[str, Any] = make_record(options)
    results |= {"passed": 0, "failed": 0, "skipped": 0, "not_run": [], "files": {}}
    results |= {"failures": [], "skips": {}}
    quick = "test_forward.py" if options.device == "cuda" else "test_reference.py"
    wanted = options.file or ([quick] if options.quick else None)
    files = [file for file in test_files() if wanted is None or file.name in wanted]
    selection = "cuda" if options.device == "cuda" else "not cuda and not executor"
    for file in files:
        if not deadline.allows(5):
            results["not_run"].append(f"{file.name}: {options.minutes:g} minutes were over")
            continue
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "outcomes.jsonl"
            # pytest-benchmark, which the usual options need, is not needed here.
            plain = [
                "-o",
                "addopts=--strict-markers --import-mode=importlib",
                "-p",
                "no:cacheprovider",
            ]
            command = [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "-p",
                "benchmarks.gpu.outcomes",
                *plain,
            ]
            start = time.monotonic()
            status = run(
                [*command, "-k", selection, "--maxfail=50", "--tb=short", str(file)],
                deadline.left(),
                env=environment(
                    MSDA_BACKEND="native",
                    MSDA_OUTCOMES=str(log),
                    CUBLAS_WORKSPACE_CONFIG=":4096:8",  # deterministic algorithms demand it
                ),
            )
            outcomes = read_outcomes(log)
        outcomes["seconds"] = round(time.monotonic() - start, 1)
        outcomes["status"] = "cut off" if status is None else status
        ran = outcomes["passed"] + outcomes["failed"] + outcomes["skipped"]
        if status not in (0, 1, 5) or ran < outcomes["selected"]:  # 5: no test was selected
            results["not_run"].append(
                f"{file.name}: {outcomes['selected'] - ran} of {outcomes['selected']} tests, "
                f"pytest ended with {outcomes['status']}"
            )
        for outcome in ("passed", "failed", "skipped"):
            results[outcome] += outcomes[outcome]
        results["failures"] += outcomes.pop("failures")
        results["skips"] = dict(Counter(results["skips"]) + outcomes.pop("skips"))
        results["files"][file.name] = outcomes
        write_json(path, results)
    write_json(path, results)
    print_tests(results)
    print(f"written: {path}")
    return int(results["failed"] > 0 or bool(results["not_run"]) or results["passed"] == 0)


def print_tests(results: dict[str, Any]) -> None:
    names = ("passed", "failed", "skipped", "seconds")
    table = Table({"file": -26} | dict.fromkeys(names, 9))
    for name, file in results["files"].items():
        table.add(name, *(file[key] for key in names))
    table.add("all", *(results[key] for key in names[:3]), "")
    for failure in results["failures"][:20]:
        print(f"failed: {failure['test']}: {failure['message'].partition(chr(10))[0]}")
    for reason, count in results["skips"].items():
        print(f"skipped {count}: {reason}")
    for reason in results["not_run"]:
        print(f"not run: {reason}")


# ---- sanitize ------------------------------------------------------------------------------------

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
SHARES = {"memcheck": 0.4, "racecheck": 0.6, "synccheck": 0.7, "initcheck": 1.0}  # of time left
FOUND_STATUS = 9  # exit status where a tool found something


def read_sanitizer_log(text: str) -> int | None:
    """How many errors a log of compute-sanitizer sums up; None where it sums up nothing."""
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", text)
    races = re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)
    counts = [int(count) for count in (*errors, *races)]
    return sum(counts) if counts else None


def sanitizer_command(sanitizer: str, tool: str, log: Path, help_text: str) -> list[str]:
    """compute-sanitizer with one tool.

    It looks at our kernels alone, by their namespace; initcheck at every one: memory that an
    unwatched kernel wrote would count as never written.
    """
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(FOUND_STATUS)]
    command += ["--log-file", str(log)]
    option = next((name for name in ("--kernel-name", "--kernel-regex") if name in help_text), None)
    if tool != "initcheck" and option is not None:
        command += [option, "kns=msda"]
    return command


def sanitize(options: argparse.Namespace) -> int:
    """Run each form of the kernels under compute-sanitizer, having seen that it finds faults."""
    deadline = Deadline(options.minutes)
    folder = results_folder(options)
    path = folder / "cuda_sanitizer.json"
    results: dict[str, Any] = make_record(options) | {"tools": {}}
    sanitizer = find_tool("compute-sanitizer")
    if sanitizer is None or options.device == "cpu":
        results["skipped"] = (
            "compute-sanitizer must be on PATH or in the CUDA toolkit, got none: it comes with the "
            "toolkit (package cuda-sanitizer)"
            if sanitizer is None
            else "compute-sanitizer needs a CUDA device, got --device cpu"
        )
        write_json(path, results)
        print(f"sanitize: skipped: {results['skipped']}")
        return 0
    help_text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    results["version"] = (version.strip().splitlines() or ["unknown"])[-1]
    with tempfile.TemporaryDirectory() as scratch:
        planted = compile_cuda("planted_faults.cu", Path(scratch), deadline)
        for tool in options.tool or TOOLS:
            limit = deadline.left() * SHARES[tool]
            if limit < 20:
                results["tools"][tool] = {"status": "not run", "errors": None}
                continue
            results["tools"][tool] = watch(sanitizer, tool, planted, help_text, limit, options)
            write_json(path, results)
    write_json(path, results)
    table = Table({"tool": -12, "status": -12, "errors": 8, "cases": 12, "finds planted fault": 12})
    for tool, seen in results["tools"].items():
        cases = f"{seen.get('cases', 0)} of {seen.get('all_cases', 0)}"
        finds = {True: "yes", False: "NO", None: ""}[seen.get("finds_planted_fault")]
        errors = "" if seen["errors"] is None else seen["errors"]
        table.add(tool, seen["status"], errors, cases, finds)
    print(f"written: {path}")
    bad = ("errors", "failed")
    return int(any(seen["status"] in bad for seen in results["tools"].values()))


def watch(
    sanitizer: str,
    tool: str,
    planted: Path,
    help_text: str,
    limit: float,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One tool: over the fault planted for it, then over every form of our kernels."""
    start = time.monotonic()
    folder = results_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    planted_log = planted.with_name(f"planted-{tool}.log")
    command = sanitizer_command(sanitizer, tool, planted_log, help_text)
    run([*command, str(planted), tool], min(60, limit / 2))
    found = read_sanitizer_log(planted_log.read_text() if planted_log.exists() else "")

    log = folder / f"sanitizer-{tool}.log"
    log.unlink(missing_ok=True)
    forms = [*EVERY_FORM, "--device", "cuda"]
    if options.quick:
        forms += ["--limit", "4"]
    variables = {
        "MSDA_BACKEND": "native",
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",  # every tensor a block of its own: bounds are exact
    }
    command = sanitizer_command(sanitizer, tool, log, help_text) + forms
    seen: dict[str, Any] = {"status": "", "errors": None, "cases": 0, "all_cases": 0}
    left = limit - (time.monotonic() - start)
    with started(command, left, env=environment(**variables), stdout=subprocess.PIPE) as child:
        assert child.process.stdout is not None
        for line in child.process.stdout:
            if line.startswith("case "):
                seen["cases"] += 1
            elif match := re.fullmatch(r"(\d+) cases\s*", line):
                seen["all_cases"] = int(match[1])
            if not line.rstrip().endswith(": right"):
                print(line, end="", flush=True)
        status = child.process.wait()
    errors = read_sanitizer_log(log.read_text() if log.exists() else "")
    if child.cut_off:
        seen["status"] = "cut off"
    elif errors is None or status not in (0, FOUND_STATUS):
        seen["status"] = "failed"
    else:
        seen["status"] = "errors" if errors > 0 else "clean"
    seen["errors"] = errors
    seen["finds_planted_fault"] = bool(found)
    seen["seconds"] = round(time.monotonic() - start, 1)
    if seen["status"] == "clean":
        log.unlink()
    return seen


# ---- programs ------------------------------------------------------------------------------------


def measure(
    options: argparse.Namespace,
    part: str,
    show: Callable[[dict[str, Any], dict[str, Any]], None],
    and_then: Callable[[Path, Deadline, dict[str, Any]], None] | None = None,
) -> int:
    """Compile and run PART.cu; its lines of JSON are written to cuda_PART.json as they come.

    ``and_then`` is given the program, the time left and the results, to add to.
    """
    deadline = Deadline(options.minutes)
    path = results_folder(options) / f"cuda_{part}.json"
    if options.device == "cpu" and options.program is None:
        print(f"{part}: skipped: it needs a CUDA device, got --device cpu")
        return 0
    results: dict[str, Any] = make_record(options) | {"measurements": []}
    with tempfile.TemporaryDirectory() as scratch:
        program = options.program or [str(compile_cuda(f"{part}.cu", Path(scratch), deadline))]
        command = [*program, "--quick"] if options.quick else list(program)
        with started(command, deadline.left(), stdout=subprocess.PIPE) as child:
            assert child.process.stdout is not None
            for line in child.process.stdout:
                entry = json.loads(line)
                if "device" in entry:
                    results["program_device"] = entry
                else:
                    results["measurements"].append(entry)
                    show(entry, results)
                write_json(path, results)
            status = child.process.wait()
        if and_then is not None and status == 0:
            and_then(Path(program[0]), deadline, results)
            write_json(path, results)
    print(f"written: {path}")
    if status != 0:
        print(f"{part}: the program must end with status 0, got {status}")
    return int(status != 0)


def micro(options: argparse.Namespace) -> int:
    """Micro-benchmarks of the hardware."""
    return measure(options, "micro", print_measurement)


def print_measurement(entry: dict[str, Any], results: dict[str, Any]) -> None:
    """One line: rates, and bytes per clock of one multiprocessor."""
    if "skipped" in entry:
        print(f"{entry['name']:<28}skipped: {entry['skipped']}", flush=True)
        return
    device = results["program_device"]
    per_clock = entry["bytes_per_second"] / (device["clock_hz"] * device["multiprocessors"])
    print(
        f"{entry['name']:<28}{entry['ms']:>10.4f} ms{entry['bytes_per_second'] / 1e12:>9.3f} TB/s"
        f"{entry['rows_per_second'] / 1e9:>10.3f} G rows/s{per_clock:>8.1f} B/clk/SM"
        f"{'' if entry['verified'] else '  WRONG RESULT'}",
        flush=True,
    )


def orders(options: argparse.Namespace) -> int:
    """Our kernels with their work in other orders; with Nsight Compute, what they find in L1."""
    return measure(options, "orders", print_order, count_with_profiler)


def print_order(entry: dict[str, Any], results: dict[str, Any]) -> None:
    """One line: how the work was ordered, and the time over that of the library's own choice."""
    chosen = next(row for row in results["measurements"] if row["name"] == entry["name"])
    print(
        f"{entry['name']:<36}heads {entry['tile_heads'] or 'chosen':>7}"
        f"  split {entry['split'] or 'chosen':>7}{entry['ms']:>10.4f} ms"
        f"{entry['ms'] / chosen['ms']:>7.2f}x{'' if entry['verified'] else '  WRONG RESULT'}",
        flush=True,
    )


# Of Nsight Compute, by the names that we give them.
METRICS = {
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum": "l1_load_sectors",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_ld_lookup_hit.sum": "l1_load_sectors_hit",
    "l1tex__t_sectors_pipe_lsu_mem_global_op_red.sum": "l1_reduction_sectors",
    "lts__t_sectors_op_red.sum": "l2_reduction_sectors",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum": "bank_conflicts",
    "smsp__inst_executed.sum": "instructions",
}


def count_with_profiler(program: Path, deadline: Deadline, results: dict[str, Any]) -> None:
    """Add what Nsight Compute counts, where it is there and may, to each of the measurements."""
    profiler = find_tool("ncu")
    if profiler is None:
        results["profiler"] = "ncu was not found"
    else:
        command = [profiler, "--csv", "--kernel-name", "regex:forward_kernel|backward_kernel"]
        command += ["--metrics", ",".join(METRICS), str(program), "--once"]
        with started(command, deadline.left(), stdout=subprocess.PIPE) as child:
            text, _ = child.process.communicate()
        rows = read_profile(text)
        if len(rows) == len(results["measurements"]):
            for entry, counts in zip(results["measurements"], rows, strict=True):
                entry["counted"] = counts
            results["profiler"] = "counted"
        else:
            words = [line for line in text.splitlines() if line.startswith("==ERROR==")]
            results["profiler"] = (words or [f"{len(rows)} kernels were counted"])[0]
    print(f"orders: Nsight Compute: {results['profiler']}")


def read_profile(text: str) -> list[dict[str, float]]:
    """What ``ncu --csv`` prints: the counts of each launch, in the order of launches."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    launches: dict[str, dict[str, float]] = {}
    for row in csv.DictReader(lines[start:]):
        if row["Metric Name"] in METRICS:
            count = float(row["Metric Value"].replace(",", ""))
            launches.setdefault(row["ID"], {})[METRICS[row["Metric Name"]]] = count
    return list(launches.values())


# ---- the command ---------------------------------------------------------------------------------


def bench(options: argparse.Namespace) -> int:
    """See operator.py, which imports msda: not before it is built."""
    from benchmarks.gpu import operator

    return operator.run(options, results_folder(options))


def run_all(options: argparse.Namespace) -> int:
    """Each part in its own process; a part that fails does not keep the next from running."""
    failed = []
    given = shlex.split(options.command)
    for part in PARTS:
        print(f"\n== {part}", flush=True)
        command = [sys.executable, *(part if word == "all" else word for word in given[1:])]
        if run(command, 60 * options.minutes + GRACE, env=environment()) != 0:
            failed.append(part)
            if part == "build":
                break
    print(f"\ngpu: {', '.join(failed) + ' failed' if failed else 'all parts ended well'}")
    return int(bool(failed))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: to try the command")
    parser.add_argument(
        "--minutes", type=float, default=9.5, help="time limit of each part (default: 9.5)"
    )
    parser.add_argument("--results", type=Path, help="folder (default: by device)")
    parser.add_argument("--file", action="append", help="test: only this file of tests/")
    parser.add_argument("--tool", choices=TOOLS, action="append", help="sanitize: only this tool")
    parser.add_argument("--program", nargs="+", help="micro, orders: run this instead of compiling")
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="[LABEL=]WHAT",
        help="bench: a module's name, or a .py or .so file; none: no peers (default: all known)",
    )
    for name in ("workload", "dtype", "direction"):
        parser.add_argument(f"--{name}", action="append", help=f"bench: only this {name}")
    parser.add_argument(
        "--seconds", type=float, default=0.6, help="bench: of timing for each row (default: 0.6)"
    )


def main(options: argparse.Namespace) -> int:
    """Run one part, or all."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu: ended from outside"))
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            "gpu: a CUDA device must be present and torch must be built with CUDA, got "
            f"torch {torch.__version__} and no device"
        )
    if options.part == "all":
        return run_all(options)
    parts = {"build": build, "test": test, "bench": bench, "micro": micro, "orders": orders}
    return (parts | {"sanitize": sanitize})[options.part](options)
