"""The benchmark of settings of a CPU: what its rows run, and the table that it makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.common import harness
from benchmarks.models import detector as model_benchmark
from benchmarks.models import settings
from benchmarks.report import command as report
from detector import run_checkpoints
from detector.config import PRESETS, Config

SMALL = PRESETS["shapes-easy"].replace(hidden_dim=32, num_heads=2, num_queries=10, num_classes=5)


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("kind", ["forward", "both"])
def test_a_call_is_repeated_and_timed(monkeypatch, set_threads, kind, amp):
    set_threads(1)
    monkeypatch.setitem(PRESETS, model_benchmark.PRESET, Config(model=SMALL.model))
    monkeypatch.setitem(settings.CALLS, "small", (kind, (64, 96)))
    speed = settings.time_calls("small", amp, seconds=0.01)
    assert 0 < speed["images_per_second"] <= 1.5 * speed["images_per_processor_second"] < 1e4


def test_a_program_gets_the_variables_of_its_row_alone(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("OTHER", "1")
    code = "import os; print({k: os.environ.get(k) for k in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', "
    code += "'THP_MEM_ALLOC_ENABLE', 'OMP_NUM_THREADS', 'OTHER')})"
    printed = settings.run(["-c", code], {"OMP_WAIT_POLICY": "passive"}, threads=3)
    assert eval(printed) == {
        "GOMP_SPINCOUNT": None,
        "OMP_WAIT_POLICY": "passive",
        "THP_MEM_ALLOC_ENABLE": None,
        "OMP_NUM_THREADS": "3",
        "OTHER": "1",
    }
    with pytest.raises(SystemExit, match=r"1 / 0 failed:\nTraceback"):
        settings.run(["-c", "1 / 0"], {}, threads=1)


def test_busy_processes_are_busy_and_end(monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(command):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return started[-1]

    monkeypatch.setattr(settings.subprocess, "Popen", start)
    monkeypatch.setattr(settings.time, "sleep", lambda seconds: None)
    with settings.busy_processes(2):
        assert [process.poll() for process in started] == [None, None]
    assert all(process.poll() is not None for process in started)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Results of a run whose programs are played: bfloat16 is twice as fast, 1000 spins best."""
    commands = []

    def run(command, variables, threads):
        command = [str(part) for part in command]
        commands.append((command, variables, threads))
        if command[0] == "-c":
            rate = 2.0 if "bf16" in command[1] else 1.0
            return json.dumps(settings.speed(10, 10 / rate, 5.0))
        if command[0].endswith("train.py"):
            output = Path(command[command.index("--output") + 1])
            seconds = 4.0 if variables.get("GOMP_SPINCOUNT") == "1000" else 8.0
            spent = {"training_seconds": seconds, "processor_seconds": 2 * seconds}
            state = {"optimizer": {}, "step": 10, "seconds": spent, "w": torch.ones(1)}
            run_checkpoints.save(state, output / run_checkpoints.LAST)
            run_checkpoints.save({"w": torch.ones(1)}, output / run_checkpoints.BEST)
        else:
            results = Path(command[command.index("--json") + 1])
            results.write_text(json.dumps({"AP": 0.5 if "bf16" in command else 0.25}))
        return ""

    monkeypatch.setattr(settings, "run", run)
    monkeypatch.setattr(settings.time, "sleep", lambda seconds: None)
    folder = tmp_path / "machine"
    options = ["--threads=2", "--seconds=3", "--rounds=2", "--epochs=4"]
    assert main(["settings", *options, f"--output={folder / 'settings.json'}"]) == 0
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return folder, commands


def test_rows_run_the_programs_as_they_say(folder):
    _, commands = folder
    training = [c for c in commands if c[0][0].endswith("train.py") and "--max-minutes" in c[0]]
    assert all(threads == 2 for _, _, threads in commands)
    assert {command[command.index("--max-minutes") + 1] for command, *_ in training} == {"0.05"}
    # Two rounds of two precisions and pages; then of each way to wait, alone and among others.
    assert len(training) == 2 * 4 + 2 * 2 * len(settings.WAITS)
    given = [variables for _, variables, _ in training[8:]]
    assert given == [*settings.WAITS.values()] * 4
    assert given.count({}) == 4  # as the program sets it
    assert sum("--epochs" in command for command, *_ in commands) == 2
    assert sum(command[0].endswith("evaluate.py") for command, *_ in commands) == 4


def test_report_shows_what_came(folder):
    text = report.block("settings")
    assert "2 threads" in text and "settings.json" in text
    assert "| ResNet-50, inference at 800 x 1333 | 1 | 1, **1.00x** | 2, **2.00x** |" in text
    assert "| GOMP_SPINCOUNT=1000 | 40 | 40 | 20 | 20 |" in text
    assert "| trained in float32 | 0.250 | 0.500 |" in text
    assert "AP of the demo after 4 epochs" in text


def test_a_record_holds_every_round(folder):
    record = json.loads((folder[0] / "settings.json").read_text())
    assert all(len(row["rounds"]) == 2 for row in record["precision"])
