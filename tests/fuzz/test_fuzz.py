"""The fuzzers of tests/fuzz find what they are there to find, and say how to see it again."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.helpers.executor import BUILD

FOLDER = Path(__file__).resolve().parent
PROGRAM = BUILD / "tests" / "fuzz" / "kernels_fuzz"

# Quantised and nested tensors are prototypes, or on their way out.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def kernels_fuzz():
    """Runs the program; returns the finished process."""
    if not PROGRAM.exists():
        pytest.skip("kernels_fuzz was not built: make test builds it")

    def run(*options):
        command = [str(PROGRAM), *map(str, options)]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    return run


@pytest.fixture
def load(monkeypatch):
    """Imports a module of tests/fuzz under a name of its own."""

    def load(name):
        spec = importlib.util.spec_from_file_location(f"fuzz_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look for it there
        spec.loader.exec_module(module)
        return module

    threads = torch.get_num_threads()
    yield load
    torch.set_num_threads(threads)


def kinds_of(path):
    """What a run says that it tried, without its times."""
    stats = json.loads(path.read_text())
    assert (
        sum(stats["kinds"][kind] for kind in ("plain", "nearest", "points", "boxes"))
        == (stats["cases"])
    )
    return stats["cases"], stats["kinds"]


# ---- the kernels ---------------------------------------------------------------------------------

WRONG, CRASH = 1, 2


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("write_a_wrong_number", WRONG),
        ("leave_a_row_out", WRONG),
        ("read_one_pixel_on", WRONG),  # or beyond the page, in another case
        ("write_beside", CRASH),
        ("read_through_null", CRASH),
    ],
)
def test_a_planted_fault_is_found_and_its_command_finds_it_again(kernels_fuzz, fault, status):
    found = kernels_fuzz("--fault", fault, "--count", 200)
    assert found.returncode == status, found.stdout + found.stderr
    (line,) = found.stdout.splitlines()
    assert line.startswith("wrong: " if status == WRONG else "crash: ")
    said, command = line.split("; repeat: ")
    again = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (status, found.stdout)
    assert "forward" in said or fault == "read_through_null"


def test_kernels_without_a_fault_pass_the_same_cases_in_every_run(kernels_fuzz, tmp_path):
    for name in ("one", "other"):
        done = kernels_fuzz("--first", 7, "--count", 300, "--stats", tmp_path / name)
        assert (done.returncode, done.stdout) == (0, "")
    cases, kinds = kinds_of(tmp_path / "one")
    assert (cases, kinds) == kinds_of(tmp_path / "other")
    assert cases == 300
    seen = {"NaN and infinity", "misaligned", "padding mask", "no gradient wanted", "empty"}
    assert seen | {f"value {kind}" for kind in ("float16", "bfloat16", "float32", "float64")} <= (
        set(kinds)
    )


def test_other_seeds_are_other_cases(kernels_fuzz, tmp_path):
    for first in (0, 1000):
        kernels_fuzz("--first", first, "--count", 300, "--stats", tmp_path / str(first))
    assert kinds_of(tmp_path / "0") != kinds_of(tmp_path / "1000")


@pytest.mark.parametrize("bytes_", ["00", "ff" * 200, "0123456789abcdef" * 8])
def test_any_bytes_are_a_case(kernels_fuzz, bytes_):
    done = kernels_fuzz("--bytes", bytes_)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--capability", "sse"], "--capability must be one of: baseline.*, got sse"),
        (["--fault", "none"], "--fault must be a known fault, got none"),
        (["--seed", "1"], "kernels_fuzz must be given options it knows, got --seed"),
    ],
)
def test_an_option_that_the_program_does_not_know_is_refused(kernels_fuzz, options, refusal):
    done = kernels_fuzz(*options)
    assert done.returncode == 3
    assert re.fullmatch(refusal, done.stderr.strip())


# ---- calls and hostile arguments -----------------------------------------------------------------


def first_wrong(module, seeds=range(40)):
    """What the first failing seed says."""
    for seed in seeds:
        try:
            module.check(seed)
        except module.Wrong as wrong:
            return str(wrong)
    return None


@pytest.mark.parametrize("name", ["calls", "hostile"])
def test_a_seed_is_one_case(load, name):
    module = load(name)
    assert [module.check(seed) for seed in range(10)] == [module.check(seed) for seed in range(10)]


def test_calls_see_a_wrong_output_and_a_wrong_gradient(load, monkeypatch):
    calls = load("calls")
    operators = calls.call_operators, calls.call_functions

    def spoil(what):
        def spoiled(compute):
            def run(case):
                output, gradients = compute(case)
                if what == "output":
                    output = 1.1 * output
                return output, {
                    name: 1.1 * gradient if name == what else gradient
                    for name, gradient in gradients.items()
                }

            return run

        monkeypatch.setattr(calls, "call_operators", spoiled(operators[0]))
        monkeypatch.setattr(calls, "call_functions", spoiled(operators[1]))

    assert first_wrong(calls) is None
    for what in ("output", "value", "attention_weights", "sampling_offsets"):
        spoil(what)
        assert re.search(rf"{what} must be within .* of the reference, got", first_wrong(calls))


def test_calls_see_a_refusal_of_what_is_right(load, monkeypatch):
    calls = load("calls")

    def refuse(case):
        raise RuntimeError("value must please, got displeasing numbers")

    monkeypatch.setattr(calls, "call_operators", refuse)
    monkeypatch.setattr(calls, "call_functions", refuse)
    assert "a valid call must not be refused, got value must please" in first_wrong(calls)


def test_hostile_arguments_are_counted_by_what_came_of_them(load):
    hostile = load("hostile")
    kinds = Counter(kind for seed in range(100) for kind in hostile.check(seed))
    outcomes = [kinds[outcome] for outcome in ("refused", "refused by torch", "computed")]
    assert sum(outcomes) == 100
    assert min(outcomes) > 0


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (TypeError("unsupported operand"), "got TypeError: unsupported operand"),
        (IndexError("list index out of range"), "got IndexError: list index out of range"),
        (None, "must be "),  # a result from arguments that have none, or of another shape
    ],
)
def test_hostile_sees_another_error_and_a_result_from_nothing(load, monkeypatch, error, says):
    hostile = load("hostile")

    def answer(target, arguments):
        if error is not None:
            raise error
        return torch.ones(1)

    monkeypatch.setattr(hostile, "call", answer)
    assert says in first_wrong(hostile)


# ---- the run -------------------------------------------------------------------------------------

# Knows the options of a fuzzer; has 50 cases, fails in one and crashes in another.
PROGRAM_WITH_FAULTS = """
import argparse, json, os, sys
parser = argparse.ArgumentParser()
parser.add_argument("--first", type=int)
for option in ("--seconds", "--stats", "--at"):
    parser.add_argument(option)
options = parser.parse_args()
for seed in range(options.first, 50):
    with open(options.at, "w") as file:
        file.write(str(seed))
    if seed == 12:
        os.abort()
    if seed == 5:
        print(f"wrong: five; repeat: {sys.argv[0]} --first {seed}")
        break
with open(options.stats, "w") as file:
    cases = seed - options.first + 1
    json.dump({"cases": cases, "seconds": 1.0, "kinds": {"kind": cases}}, file)
sys.exit(int(seed == 5))
"""


def test_the_run_goes_on_after_failures_and_counts_them(load, tmp_path, capsys):
    run = load("run")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM_WITH_FAULTS)
    tally = run.try_seeds("cases", [sys.executable, program], 0, 60)
    wrong, crash = tally.failures
    assert wrong == f"wrong: five; repeat: python {program} --first 5"
    assert crash == f"crash: SIGABRT; repeat: python {program} --first 12"
    assert capsys.readouterr().out.splitlines() == tally.failures
    assert tally.cases == 50
    assert tally.seeds == [[0, 49]]


def test_a_program_that_does_not_run_is_a_failure(load, tmp_path):
    run = load("run")
    program = tmp_path / "program.py"
    program.write_text("import nothing_of_this_name")
    tally = run.try_seeds("cases", [sys.executable, program], 0, 60)
    assert len(tally.failures) == 1
    assert "nothing_of_this_name" in tally.failures[0]
