"""`gpu`: what its parts do and write, on a device that is played."""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.common import machine, peers
from benchmarks.common.harness import ROOT
from benchmarks.gpu import command as gpu
from benchmarks.gpu import every_form
from benchmarks.gpu import operator as gpu_operator
from tests.benchmarks.fake_peers import ORIGINAL, RETURNS


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, set_threads):
    """One thread, and no handler of signals."""
    set_threads(1)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)


def parse(*arguments):
    """The options of a part."""
    parser = argparse.ArgumentParser()
    gpu.add_arguments(parser)
    options = parser.parse_args(arguments)
    options.command = "python -m benchmarks gpu"
    return options


# ---- every form ----------------------------------------------------------------------------------


def test_some_forms_run_and_the_first_is_the_encoder():
    every = list(every_form.cases())
    assert every[0].name == "encoder"
    for case in every[:2]:
        assert every_form.check(case, torch.float32, "cpu") is None


def test_a_wrong_form_is_named(monkeypatch):
    right = every_form.call
    monkeypatch.setattr(every_form, "call", lambda *arguments: right(*arguments) * 1.01)
    case = next(every_form.cases())
    assert every_form.check(case, torch.float32, "cpu").startswith("output must differ by at most")


# ---- processes -----------------------------------------------------------------------------------


def test_a_command_past_its_limit_is_ended_with_its_children():
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    command = [sys.executable, "-c", sleep.format("import time; time.sleep(60)")]
    start = time.monotonic()
    with gpu.started(command, 1, stdout=subprocess.PIPE) as child:
        child.process.stdout.read()  # ends when nobody is left who could write
    assert child.cut_off
    assert time.monotonic() - start < 20
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 20) == 3


def test_the_parts_are_run_one_by_one_with_the_options_of_all(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda command, limit, **_: commands.append(command) or 0)
    assert main(["gpu", "all", "--device=cpu", "--minutes", "2", "--seconds", "2"]) == 0
    options = ["--device=cpu", "--minutes", "2", "--seconds", "2"]
    for part, command in zip(gpu.PARTS, commands, strict=True):
        assert command == [sys.executable, "-m", "benchmarks", "gpu", part, *options]


# A test that passed, under a name that pytest's plugin would write.
FAKE_OUTCOMES = [{"selected": 1}, {"test": "a", "outcome": "passed", "seconds": 1, "message": ""}]


def test_one_call_runs_every_part_to_its_end_on_a_device_that_is_faked(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(machine, "describe_machine", lambda *_: {"device": "Fake GPU"})
    tools = {
        "nvcc": "/usr/local/cuda/bin/nvcc",
        "compute-sanitizer": str(tmp_path / "compute-sanitizer"),
        "ncu": script(tmp_path / "ncu", PROFILE),
    }
    fake = dict(python=sys.executable, errors=0, seconds=0, outcome="right")
    (tmp_path / "compute-sanitizer").write_text(FAKE_SANITIZER.format(**fake))
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setattr(gpu, "find_tool", tools.get)
    programs = {"micro": MICRO, "orders": ORDERS, "planted_faults": []}
    commands = []
    truly_run = gpu.run

    def run(command, limit, env=None, **options):
        """As on a machine with a GPU, where other programs do what is theirs."""
        assert 0 < limit <= 60 * 2 + gpu.GRACE
        commands.append(command)
        if command[0] == tools["nvcc"]:
            assert command[3] == "-arch=sm_90"
            target = Path(command[command.index("-o") + 1])
            script(target, "\n".join(map(json.dumps, programs[target.name])))
        elif command[1:3] == ["-m", "benchmarks"]:
            return main(command[3:])
        elif "pytest" in command:
            Path(env["MSDA_OUTCOMES"]).write_text("\n".join(map(json.dumps, FAKE_OUTCOMES)))
        elif command[0] == tools["compute-sanitizer"]:
            return truly_run(command, limit)
        else:
            assert command[1:3] in (["-m", "pip"], ["-m", "msda.info"]) or "--brief" in command
        return 0

    monkeypatch.setattr(gpu, "run", run)
    on_device = gpu_operator.run

    def bench_on_cpu(options, folder):
        options.device = "cpu"
        options.workload, options.dtype = ["decoder-300"], ["float32"]
        return on_device(options, folder)

    monkeypatch.setattr(gpu_operator, "run", bench_on_cpu)
    monkeypatch.setattr(peers, "_try_in_another_process", peers.check_named)
    peer = tmp_path / "original.py"
    peer.write_text(ORIGINAL + RETURNS)
    options = ["--quick", "--minutes=2", f"--results={tmp_path}", f"--peer=original={peer}"]
    assert main(["gpu", "all", *options]) == 0
    assert "gpu: all parts ended well" in capsys.readouterr().out
    parts = [command[4] for command in commands if command[1:3] == ["-m", "benchmarks"]]
    assert parts == ["build", "test", "bench", "micro", "orders", "sanitize"]
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("cuda_*.json")}
    assert results["cuda_tests.json"]["passed"] > 0
    assert len(results["cuda_operator.json"]["rows"]) == 4
    assert results["cuda_operator.json"]["peers"] == {"original": "compiled"}
    assert results["cuda_micro.json"]["measurements"] == MICRO[1:]
    assert results["cuda_orders.json"]["profiler"] == "counted"
    assert {tool["status"] for tool in results["cuda_sanitizer.json"]["tools"].values()} == {
        "clean"
    }


def test_nothing_is_run_after_a_failed_build(monkeypatch, capsys):
    parts = []
    monkeypatch.setattr(gpu, "run", lambda command, limit, **_: parts.append(command[4]) or 1)
    assert main(["gpu", "all", "--device=cpu"]) == 1
    assert parts == ["build"]
    assert "build failed" in capsys.readouterr().out


def test_the_build_is_for_the_present_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    told = gpu.build_environment("cuda", "9.0")
    assert told["MSDA_CUDA"] == "1"
    assert told["TORCH_CUDA_ARCH_LIST"] == "9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert "TORCH_CUDA_ARCH_LIST" not in gpu.build_environment("cuda", "9.0")
    assert gpu.build_environment("cpu", "")["MSDA_CUDA"] == "0"


def test_results_to_commit_are_those_of_a_whole_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    def folder(*arguments):
        return gpu.results_folder(parse(*arguments)).relative_to(gpu.ROOT)

    committed = Path("benchmarks/results/nvidia-h100-80gb-hbm3")
    assert folder("bench") == folder("test") == folder("bench", "--seconds=1") == committed
    for arguments in (
        ("bench", "--dtype=float32"),
        ("test", "--quick"),
        ("sanitize", "--device=cpu"),
    ):
        assert folder(*arguments) == Path("out/gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    command = [sys.executable, "-m", "benchmarks", "gpu", "micro"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: a CUDA device must be present")


# ---- test ----------------------------------------------------------------------------------------


def test_outcomes_are_written_as_they_come_and_summed_up(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('no need')\n"
        "def test_fatal(): os._exit(3)\n"
        "def test_never_reached(): pass\n"
    )
    log = tmp_path / "outcomes.jsonl"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "benchmarks.gpu.outcomes",
        "-p",
        "no:cacheprovider",
    ]
    environment = os.environ | {"MSDA_OUTCOMES": str(log), "PYTHONPATH": str(ROOT)}
    status = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode
    outcomes = gpu.read_outcomes(log)
    assert status == 3
    assert outcomes["selected"] == 5
    assert [outcomes[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failure,) = outcomes["failures"]
    assert failure["test"].endswith("::test_bad")
    assert "one is not two" in failure["message"]
    assert outcomes["skips"] == {"no need": 1}


def run_tests(monkeypatch, folder, status, *outcomes):
    """gpu.test with a pytest that ends with ``status`` after writing these lines."""

    def fake_run(command, limit, env):
        assert env["MSDA_BACKEND"] == "native"
        Path(env["MSDA_OUTCOMES"]).write_text("".join(json.dumps(line) + "\n" for line in outcomes))
        return status

    monkeypatch.setattr(gpu, "run", fake_run)
    code = main(["gpu", "test", "--device=cpu", "--quick", f"--results={folder}"])
    return code, json.loads((folder / "cuda_tests.json").read_text())


PASSED = {"test": "a", "outcome": "passed", "seconds": 1, "message": ""}


def test_the_test_part_passes_only_where_something_passed(monkeypatch, tmp_path):
    code, results = run_tests(monkeypatch, tmp_path, 0, {"selected": 1}, PASSED)
    assert (code, results["passed"], results["not_run"]) == (0, 1, [])
    skipped = PASSED | {"outcome": "skipped", "message": "Skipped: there is no CUDA device"}
    code, results = run_tests(monkeypatch, tmp_path, 0, {"selected": 1}, skipped)
    assert (code, results["skips"]) == (1, {"there is no CUDA device": 1})


def test_tests_that_were_cut_off_are_counted(monkeypatch, tmp_path, capsys):
    code, results = run_tests(monkeypatch, tmp_path, None, {"selected": 3}, PASSED)
    assert code == 1
    assert results["passed"] == 1
    message = "test_reference.py: 2 of 3 tests, pytest ended with cut off"
    assert results["not_run"] == [message]
    assert f"not run: {message}" in capsys.readouterr().out
    failed = PASSED | {"outcome": "failed", "message": "wrong"}  # and the rest not tried
    _, results = run_tests(monkeypatch, tmp_path, 1, {"selected": 3}, failed)
    assert results["not_run"] == ["test_reference.py: 2 of 3 tests, pytest ended with 1"]


def test_the_tests_of_the_operator_come_first():
    paths = gpu.test_files()
    names = [path.name for path in paths]
    assert names[:2] == ["test_forward.py", "test_backward.py"]
    assert len(names) == len(set(names))
    assert not any(name.startswith("test_bench_") for name in names)
    assert [path.name for path in paths if path.parent.name == "cuda"] == ["test_gpu.py"]


# ---- sanitize ------------------------------------------------------------------------------------


def test_a_missing_sanitizer_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert main(["gpu", "sanitize", f"--results={tmp_path}", "--device=cpu"]) == 0
    message = capsys.readouterr().out
    assert message.startswith("sanitize: skipped: compute-sanitizer must be on PATH")
    results = json.loads((tmp_path / "cuda_sanitizer.json").read_text())
    assert results["skipped"] in message
    assert results["tools"] == {}


def test_logs_of_the_sanitizer_are_read():
    assert gpu.read_sanitizer_log("========= ERROR SUMMARY: 0 errors\n") == 0
    assert gpu.read_sanitizer_log("========= ERROR SUMMARY: 12 errors\n") == 12
    races = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
    assert gpu.read_sanitizer_log(races) == 3
    assert (
        gpu.read_sanitizer_log("========= Internal Sanitizer Error: Device not supported") is None
    )


def test_only_our_kernels_are_watched_but_for_what_others_wrote():
    def command(tool, help_text):
        return gpu.sanitizer_command("compute-sanitizer", tool, Path("log"), help_text)

    assert command("racecheck", "--kernel-regex")[-2:] == ["--kernel-regex", "kns=msda"]
    assert command("synccheck", "--kernel-name --kernel-regex")[-2] == "--kernel-name"
    assert command("memcheck", "--kernel-name")[-1] == "kns=msda"
    assert "kns=msda" not in command("initcheck", "--kernel-name")
    assert "kns=msda" not in command("racecheck", "an older one")


# What our log would say; then what the program prints; then how it ends.
FAKE_SANITIZER = """#!{python}
import sys, time
log = sys.argv[sys.argv.index("--log-file") + 1]
planted = sys.argv[-1] in ("memcheck", "racecheck")
open(log, "w").write("========= ERROR SUMMARY: %d errors\\n" % (1 if planted else {errors}))
if not planted:
    print("3 cases\\ncase 1: float32, a: right\\ncase 2: float32, b: {outcome}", flush=True)
    time.sleep({seconds})
sys.exit(9 if planted or {errors} else 0)
"""


@pytest.mark.parametrize(
    ("errors", "seconds", "status"), [(0, 0, "clean"), (4, 0, "errors"), (0, 60, "cut off")]
)
def test_the_sanitizer_is_tried_on_a_fault_and_then_believed(tmp_path, errors, seconds, status):
    sanitizer = tmp_path / "compute-sanitizer"
    fake = dict(python=sys.executable, errors=errors, seconds=seconds, outcome="right")
    sanitizer.write_text(FAKE_SANITIZER.format(**fake))
    sanitizer.chmod(0o755)
    options = parse("sanitize", "--device=cpu", f"--results={tmp_path}")
    seen = gpu.watch(str(sanitizer), "memcheck", tmp_path / "planted", "", 2, options)
    assert seen["finds_planted_fault"] is True
    assert (seen["status"], seen["cases"], seen["all_cases"]) == (status, 2, 3)
    assert seen["errors"] == errors
    # The log is kept where it says something.
    assert (tmp_path / "sanitizer-memcheck.log").exists() == (status != "clean")


# ---- micro and orders ----------------------------------------------------------------------------

MICRO = [
    {"device": "GPU", "multiprocessors": 100, "clock_hz": 1e9},
    {
        "name": "dram.copy",
        "ms": 0.5,
        "bytes_per_second": 3e12,
        "rows_per_second": 1e9,
        "verified": True,
    },
    {"name": "red.v4.f32.hot", "skipped": "vector reductions need compute capability 9.0, got 8.0"},
]


@pytest.mark.parametrize("status", [0, 1])
def test_measurements_are_kept_however_the_program_ends(tmp_path, status, capsys):
    program = f"import sys\nprint('''{chr(10).join(map(json.dumps, MICRO))}''')\nsys.exit({status})"
    options = parse("micro", "--device=cpu", f"--results={tmp_path}")
    options.program = [sys.executable, "-c", program]
    assert gpu.micro(options) == status
    results = json.loads((tmp_path / "cuda_micro.json").read_text())
    assert results["program_device"] == MICRO[0]
    assert results["measurements"] == MICRO[1:]
    text = capsys.readouterr().out
    assert "3.000 TB/s" in text
    assert "30.0 B/clk/SM" in text
    assert "skipped: vector reductions need" in text


ORDER = {"name": "encoder-2.float32.forward", "ms": 2.0, "verified": True}
ORDERS = [
    MICRO[0],
    ORDER | {"tile_heads": 0, "split": 0},
    ORDER | {"tile_heads": 2, "split": 1, "ms": 3.0},
    ORDER | {"tile_heads": 4, "split": 1, "ms": 1.0, "verified": False},
]
# Nsight Compute: what it prints first, then a line for each metric of each launch.
PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","1,000"
"0","7","forward_kernel","smsp__inst_executed.sum","inst","10"
"1","7","forward_kernel","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","2,500"
"1","7","forward_kernel","smsp__inst_executed.sum","inst","20"
"2","7","forward_kernel","smsp__inst_executed.sum","inst","30"
"""
REFUSED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\n"


def script(path, text):
    """An executable Python program that prints ``text``."""
    path.write_text(f"#!{sys.executable}\nprint({text!r})\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("profiler", "said"),
    [(PROFILE, "counted"), (REFUSED, REFUSED.strip()), (None, "ncu was not found")],
    ids=["counted", "refused", "none"],
)
def test_orders_are_timed_and_counted_where_there_is_a_profiler(
    tmp_path, profiler, said, monkeypatch, capsys
):
    ncu = profiler and script(tmp_path / "ncu", profiler)
    monkeypatch.setattr(gpu, "find_tool", lambda name: ncu)
    options = parse("orders", "--device=cpu", f"--results={tmp_path}")
    options.program = [script(tmp_path / "orders", "\n".join(map(json.dumps, ORDERS)))]
    assert gpu.orders(options) == 0
    results = json.loads((tmp_path / "cuda_orders.json").read_text())
    assert results["profiler"] == said
    counted = [row.pop("counted", {}) for row in results["measurements"]]
    assert results["measurements"] == ORDERS[1:]
    assert [row.get("instructions") for row in counted] == (
        [10, 20, 30] if profiler == PROFILE else [None] * 3
    )
    assert counted[1].get("l1_load_sectors") == (2500 if profiler == PROFILE else None)
    text = capsys.readouterr().out
    assert "heads       2  split       1    3.0000 ms   1.50x" in text
    assert "0.50x  WRONG RESULT" in text


ARCHITECTURES = ("75", "80", "90", "100", "120")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ["micro.cu", "orders.cu", "planted_faults.cu"])
def test_programs_compile_without_a_warning(tmp_path, source):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    # orders.cu holds our own kernels, which take minutes and are compiled for all elsewhere.
    wanted = ARCHITECTURES if source != "orders.cu" else ("90",)
    chosen = [name for name in wanted if f"compute_{name}" in known]
    assert "90" in chosen
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    command = ["nvcc", "-std=c++17", "-Werror", "all-warnings", "--threads", "0", *targets]
    program = tmp_path / "program"
    done = subprocess.run(
        [*command, "-o", str(program), str(gpu.FOLDER / source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        ran = subprocess.run([program], capture_output=True, text=True)
        assert ran.returncode == 2
        assert "a CUDA device must be present, got none" in ran.stderr
