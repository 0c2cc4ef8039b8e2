"""Try to break the operator, and say what was tried.

``make fuzz``, ``make sanitize`` and ``make arm`` run this:

    fuzz      random problems through the CPU kernels (main.cpp), random calls through PyTorch
              (calls.py), and arguments that nobody should give (hostile.py)
    sanitize  the same under the address, undefined-behaviour and thread sanitizers; without --quick
              also tests of the operator and of the CUDA kernels on the CPU
    arm       the CPU kernels compiled for 64-bit Arm, run by qemu

``--minutes`` is the time to try cases for, beside that to compile. Whatever fails prints one line
with the command that repeats it, and the exit status is 1; once mended, it becomes a test of
tests/. ``--output FILE`` writes what was tried, as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
BUILD = ROOT / "build"
MOST_FAILURES = 20
MEMORY_SANITIZERS = "address,undefined,float-cast-overflow"
# Of the operator, under sanitizers: those that reach its C++ code and not only Python's.
OPERATOR_TESTS = ("errors", "forward", "backward", "same_bits", "module", "op")


@dataclass
class Tally:
    """What was tried of one thing, and what failed."""

    what: str
    cases: int = 0
    seconds: float = 0.0
    seeds: list[list[int]] = field(default_factory=list)  # [first, last] of each process
    capabilities: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Count in what another process tried of the same."""
        self.cases += other.cases
        self.seconds += other.seconds
        self.seeds += other.seeds
        self.capabilities = self.capabilities or other.capabilities
        self.count(other.kinds)
        self.failures += other.failures

    def count(self, kinds: dict[str, int]) -> None:
        """Add to the numbers of cases by kind."""
        for kind, number in kinds.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + number

    def fail(self, line: str) -> None:
        """Note and print a failure."""
        print(line, flush=True)
        self.failures.append(line)


# ---- builds --------------------------------------------------------------------------------------


def must_find(*programs: str, packages: str) -> list[str]:
    """The paths of programs; each may name several, of which one will do."""
    found = []
    for names in programs:
        paths = [path for path in map(shutil.which, names.split("|")) if path]
        if not paths:
            sys.exit(f"{names} must be installed (Debian: apt-get install {packages}), got none")
        found.append(paths[0])
    return found


def build(folder: Path, compiler: str, *options: str, source: Path = FOLDER) -> Path:
    """Compile kernels_fuzz, or all of the library with it; returns its path."""
    configure = ["cmake", "-S", source, "-B", folder, "-G", "Ninja"]
    configure += [f"-DCMAKE_CXX_COMPILER={compiler}", *options]
    for command in (configure, ["cmake", "--build", folder]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{shlex.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    beside = [folder / "kernels_fuzz", folder / "tests" / "fuzz" / "kernels_fuzz"]
    return next(path for path in beside if path.exists())


def default_compiler() -> str:
    return os.environ.get("CXX") or must_find("c++|g++|clang++", packages="g++")[0]


# ---- processes -----------------------------------------------------------------------------------


def try_seeds(
    what: str, command: Sequence[str | Path], first: int, seconds: float, **variables: str
) -> Tally:
    """Run a program that knows --first and --seconds for so long, again after each failure."""
    tally = Tally(what)
    repeat = shown([*(f"{name}={text}" for name, text in variables.items()), *command])
    end = time.monotonic() + seconds
    seed = first
    with tempfile.TemporaryDirectory() as scratch:
        stats, at = Path(scratch) / "stats", Path(scratch) / "at"
        python = Path(command[0]).name.startswith("python")
        while (left := end - time.monotonic()) > 0 and len(tally.failures) < MOST_FAILURES:
            stats.unlink(missing_ok=True)
            run = [*command, "--first", str(seed), "--seconds", f"{left:.1f}", "--stats", stats]
            run += ["--at", at] if python else []
            done = subprocess.run(
                list(map(str, run)), env=os.environ | variables, capture_output=True, text=True
            )
            told = [line for line in done.stdout.splitlines() if re.match("wrong|crash", line)]
            tried = json.loads(stats.read_text()) if stats.exists() else {"cases": 0, "seconds": 0}
            tally.cases += tried["cases"]
            tally.seconds += tried["seconds"]
            tally.count(tried.get("kinds", {}))
            tally.capabilities = tried.get("capabilities", [])
            if done.returncode == 0:
                seed += tried["cases"]
                break
            if not told and at.exists():
                last = int(at.read_text())
                told = [f"crash; repeat: --first {last}"]
            if not told:
                told = [f"{what} must run, got {ending(done)}: {done.stderr[-2000:]}"]
                tally.fail(told[0])
                break
            for line in told:
                text, seed = line.split("; repeat: ")[0], int(line.rsplit(" ", 1)[1])
                text += "" if text.startswith("wrong") else f": {ending(done)}"
                tally.fail(f"{text}; repeat: {repeat} --first {seed}")
            seed += 1
            if not stats.exists():
                tally.cases += seed - int(run[run.index("--first") + 1])
    tally.seeds = [[first, seed - 1]]
    return tally


def ending(done: subprocess.CompletedProcess[str]) -> str:
    """How a process ended, with what a sanitizer said."""
    said = [line for line in done.stderr.splitlines() if "ERROR" in line or "runtime error" in line]
    how = (
        signal.Signals(-done.returncode).name if done.returncode < 0 else f"exit {done.returncode}"
    )
    return ", ".join([how, *(line.strip() for line in said[:1])])


def shown(command: Sequence[str | Path]) -> str:
    """A command as one types it."""
    texts = ["python" if part == sys.executable else str(part) for part in command]
    return shlex.join([text.removeprefix(f"{ROOT}/") for text in texts])


def python_program(name: str) -> list[str | Path]:
    return [sys.executable, FOLDER / f"{name}.py"]


def side_by_side(
    processes: int,
    what: str,
    command: Sequence[str | Path],
    first: int,
    seconds: float,
    **variables: str,
) -> Tally:
    """try_seeds() in several processes, each with seeds of its own."""
    total = Tally(what)
    with ThreadPoolExecutor(processes) as pool:
        starts = [first + i * 10**9 for i in range(processes)]
        for tally in pool.map(
            lambda start: try_seeds(what, command, start, seconds, **variables), starts
        ):
            total.add(tally)
    return total


# ---- fuzz ----------------------------------------------------------------------------------------


def fuzz(options: argparse.Namespace) -> list[Tally]:
    """Kernels on all processors but one, and calls through Python on that."""
    seconds = 60 * options.minutes
    processes = max(1, (os.cpu_count() or 1) - 1)
    if has_libfuzzer():
        program = build(BUILD / "fuzz", "clang++", "-DMSDA_LIBFUZZER=ON")
        try_kernels = fuzz_guided
    else:
        print("clang++ with libFuzzer is not installed: seeds take its place, unguided by coverage")
        program = build(BUILD / "kernels", default_compiler())
        try_kernels = fuzz_by_seeds
    with ThreadPoolExecutor(2) as pool:
        kernels = pool.submit(try_kernels, program, processes, options.first, seconds)
        calls = try_seeds(
            "calls through PyTorch", python_program("calls"), options.first, 0.6 * seconds
        )
        hostile = try_seeds(
            "hostile arguments", python_program("hostile"), options.first, 0.4 * seconds
        )
        return [kernels.result(), calls, hostile]


def has_libfuzzer() -> bool:
    """Whether there is a clang++ that finds its library."""
    if shutil.which("clang++") is None:
        return False
    code = 'extern "C" int LLVMFuzzerTestOneInput(const char*, unsigned long) { return 0; }'
    command = ["clang++", "-x", "c++", "-", "-fsanitize=fuzzer", "-o", os.devnull]
    return subprocess.run(command, input=code, text=True, capture_output=True).returncode == 0


def fuzz_by_seeds(program: Path, processes: int, first: int, seconds: float) -> Tally:
    return side_by_side(processes, "kernels, random seeds", [program], first, seconds)


def fuzz_guided(program: Path, processes: int, first: int, seconds: float) -> Tally:
    """By libFuzzer: cases are made from those that reached code which none had reached before."""
    total = Tally("kernels, libFuzzer")
    with ThreadPoolExecutor(processes) as pool:
        starts = range(first, first + processes)
        for tally in pool.map(lambda seed: guided_process(program, seed, seconds), starts):
            total.add(tally)
    return total


def guided_process(program: Path, seed: int, seconds: float) -> Tally:
    corpus = BUILD / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    start = random.Random(seed)
    for number in range(64):
        (corpus / f"start-{seed}-{number}").write_bytes(start.randbytes(48))
    tally = Tally("kernels, libFuzzer", seeds=[[seed, seed]])
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 1 and len(tally.failures) < MOST_FAILURES:
        with tempfile.TemporaryDirectory() as scratch:
            stats = Path(scratch) / "stats"
            # What is new is told by code alone, not by how often it ran: five times as many cases.
            command = [program, corpus, f"-max_total_time={left:.0f}", f"-seed={seed % 2**31}"]
            command += ["-max_len=128", "-len_control=0", "-entropic=0", "-use_counters=0"]
            command += ["-reduce_inputs=0", f"-artifact_prefix={scratch}/", "-verbosity=0"]
            done = subprocess.run(
                list(map(str, command)),
                env=os.environ | {"MSDA_FUZZ_STATS": str(stats)},
                capture_output=True,
                text=True,
            )
            told = [line for line in done.stdout.splitlines() if re.match("wrong|crash", line)]
            tried = json.loads(stats.read_text()) if stats.exists() else {"cases": 0, "seconds": 0}
        tally.cases += tried["cases"]
        tally.seconds += tried["seconds"]
        tally.count(tried.get("kinds", {}))
        tally.capabilities = tried.get("capabilities", tally.capabilities)
        if done.returncode == 0:
            break
        for line in told or [f"{program.name} must run, got {ending(done)}: {done.stderr[-2000:]}"]:
            tally.fail(line.replace("repeat: kernels_fuzz", f"repeat: {shown([program])}"))
            for entry in corpus.iterdir():  # or the next process would begin and end with it
                if line.endswith(f"--bytes {entry.read_bytes().hex()}"):
                    entry.unlink()
        seed += 1000
    return tally


# ---- sanitize ------------------------------------------------------------------------------------


def sanitize(options: argparse.Namespace) -> list[Tally]:
    """Half of the time for kernels, a quarter each for calls and for threads; tests on top."""
    seconds, cores = 60 * options.minutes, os.cpu_count() or 1
    compiler = must_find("g++", packages="g++")[0]
    folder = BUILD / "sanitize" / "memory"
    kernels = build(
        folder,
        compiler,
        "-DMSDA_CUDA=0",
        "-DMSDA_FUZZ=ON",
        "-DMSDA_KERNEL_OPTIMIZATION=-O0",  # each access as it is written; and it compiles in time
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
        f"-DCMAKE_CXX_FLAGS=-g1 -fsanitize={MEMORY_SANITIZERS} -fno-sanitize=vptr "
        "-fno-sanitize-recover=all -fno-omit-frame-pointer",
        f"-DPython3_EXECUTABLE={sys.executable}",
        source=ROOT,
    )
    racing = build(
        BUILD / "sanitize" / "threads",
        compiler,
        "-DMSDA_KERNEL_OPTIMIZATION=-O1",
        "-DCMAKE_CXX_FLAGS=-g1 -fsanitize=thread",
    )
    for program, faults in (
        (kernels, ("read_past_the_heap", "load_misaligned")),
        (racing, ("race",)),
    ):
        for fault in faults:
            must_be_seen(program, fault)
    first = options.first
    memory, variables = "address and undefined behaviour", sanitized_library(folder, compiler)
    tallies = [side_by_side(cores, f"{memory}: kernels", [kernels], first, seconds / 2)]
    with ThreadPoolExecutor(2) as pool:
        running = [
            pool.submit(
                try_seeds,
                f"{memory}: {what}",
                python_program(name),
                first,
                seconds / 4,
                **variables,
            )
            for name, what in (("calls", "calls through PyTorch"), ("hostile", "hostile arguments"))
        ]
        tallies += [one.result() for one in running]
    tallies.append(
        try_seeds(
            "threads: kernels on 3 threads",
            [racing, "--threads", "3"],
            first,
            seconds / 4,
        )
    )
    if not options.quick:
        paths = [ROOT / "tests" / "operator" / f"test_{name}.py" for name in OPERATOR_TESTS]
        arguments, package = ["-m", "not executor", *paths], Path(variables["PYTHONPATH"])
        what = f"{memory}: tests of the operator"
        tallies.append(run_tests(what, arguments, variables, package))
        tallies.append(sanitize_cuda_kernels(f"{memory}: CUDA kernels on the CPU"))
    return tallies


def must_be_seen(program: Path, fault: str) -> None:
    """End, unless the sanitizer that a program was built with sees a planted fault."""
    command = [program, "--threads", "3", "--fault", fault, "--count", "50"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode == 0 or not re.search("Sanitizer|runtime error", done.stderr):
        sys.exit(f"{shown(command)} must end by a sanitizer, got {ending(done)}")


def sanitized_library(folder: Path, compiler: str) -> dict[str, str]:
    """Environment variables under which Python imports msda with a sanitized library."""
    package = folder / "package" / "msda"
    package.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "msda").iterdir():
        link = package / source.name
        if source.suffix in (".so", ".dylib") or link.exists():
            continue
        link.symlink_to(source)
    shutil.copy(folder / "libmsda.so", package)
    libraries = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        )
        libraries.append(path.stdout.strip())
    return {
        # Python leaks on purpose; what is found ends the process; memory has an end.
        "ASAN_OPTIONS": "detect_leaks=0:external_symbolizer_path=:allocator_may_return_null=1:"
        "max_allocation_size_mb=16384",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONPATH": str(package.parent),
        "MSDA_BACKEND": "native",
    }


def run_tests(
    what: str, arguments: Sequence[str | Path], variables: dict[str, str], package: Path = ROOT
) -> Tally:
    """Tests in a child process, with the msda of ``package``; their number and what failed."""
    tally = Tally(what)
    start = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-rf", "--tb=short"]
    command += ["-c", ROOT / "pyproject.toml", "--rootdir", ROOT, *arguments]
    command += ["-o", "pythonpath="]  # which would come before the package
    places = map(str, (package, ROOT, ROOT / "examples" / "deformable_detr"))
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(places)},
        cwd=package,
        capture_output=True,
        text=True,
    )
    tally.seconds = time.monotonic() - start
    outcomes = re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-500:])
    tally.kinds = {outcome: int(number) for number, outcome in outcomes}
    tally.cases = tally.kinds.get("passed", 0) + tally.kinds.get("failed", 0)
    if done.returncode != 0:
        lines = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        for line in lines or [f"{what} must pass, got {ending(done)}: {done.stdout[-2000:]}"]:
            tally.fail(line)
    return tally


def sanitize_cuda_kernels(what: str) -> Tally:
    """All tests of the CUDA kernels that the sanitized executor runs, in its own environment."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import executor

    build_executor = ["cmake", "-S", ROOT, "-B", executor.BUILD, "-G", "Ninja"]
    build_executor += ["-DMSDA_CUDA_EXECUTOR=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    subprocess.run(build_executor, check=True, capture_output=True)
    target = ["cmake", "--build", executor.BUILD, "--target", "cuda_executor"]
    subprocess.run(target, check=True, capture_output=True)
    variables = executor.sanitized_environment()
    tests = [ROOT / "tests" / "operator", ROOT / "tests" / "cuda" / "test_kernels.py"]
    return run_tests(what, ["-m", "executor", *tests], variables)


# ---- arm -----------------------------------------------------------------------------------------


def arm(options: argparse.Namespace) -> list[Tally]:
    """Seeds on all processors."""
    compiler, qemu = must_find(
        "aarch64-linux-gnu-g++",
        "qemu-aarch64|qemu-aarch64-static",
        packages="g++-aarch64-linux-gnu qemu-user",
    )
    program = build(
        BUILD / "arm",
        compiler,
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
    )
    what = "64-bit Arm (NEON) by qemu: kernels"
    command: list[str | Path] = [qemu, program]
    return [side_by_side(os.cpu_count() or 1, what, command, options.first, 60 * options.minutes)]


# ---- command line --------------------------------------------------------------------------------

PARTS = {"fuzz": fuzz, "sanitize": sanitize, "arm": arm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--minutes", type=float, default=1.0, help="time to try cases for")
    parser.add_argument("--first", type=int, help="the first seed (new ones in every run)")
    parser.add_argument("--quick", action="store_true", help="sanitize: without tests")
    parser.add_argument("--output", type=Path, help="file for what was tried, as JSON")
    options = parser.parse_args()
    if options.first is None:
        options.first = int(time.time()) * 10**4
    tallies = PARTS[options.part](options)
    for tally in tallies:
        print(f"{tally.what}: {tally.cases} tried, {len(tally.failures)} failed")
    if options.output is not None:
        sys.path.insert(0, str(ROOT))
        from benchmarks.common.harness import write_json
        from benchmarks.common.machine import describe_machine

        results = {
            "machine": describe_machine(),
            "minutes": options.minutes,
            "runs": [asdict(tally) for tally in tallies],
        }
        write_json(options.output, results)
    return int(any(tally.failures for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
