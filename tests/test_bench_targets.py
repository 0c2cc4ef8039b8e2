"""benchmarks/targets.py and bench_capabilities.py: what was asked against what came."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import report
import targets

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def operator_row(workload, direction, threads, dtype="float32", **ratios):
    rivals = {name: {"ratio": ratio} for name, ratio in ratios.items()}
    named = dict(workload=workload, direction=direction, threads=threads, dtype=dtype)
    return named | {"rivals": rivals}


@pytest.fixture
def folder(tmp_path):
    rows = [
        operator_row("encoder", "forward", 1, grid_sample=40.0),
        operator_row("encoder", "forward", 1, "bfloat16", grid_sample=9.0, float32=1.25),
        operator_row("encoder", "forward", 1, "float16", grid_sample=9.0, float32=0.9),
        operator_row("decoder", "backward", 1, grid_sample=6.0),
        operator_row("decoder", "backward", 1, "float16", grid_sample=9.0, float32=0.9),
        operator_row("mask2former", "forward", 1, grid_sample=1.0),
    ]
    (tmp_path / "operator.json").write_text(json.dumps({"rows": rows}))
    capabilities = {
        "workload": "encoder",
        "floor_ms": {"forward": 9.0, "backward": 12.0},
        "rows": [
            {"capability": "avx2", "direction": "forward", "ms": 24.0, "speed": 0.5},
            {"capability": "avx512", "direction": "forward", "ms": 12.0, "speed": 1.0},
        ],
    }
    (tmp_path / "capabilities.json").write_text(json.dumps(capabilities))
    calls = {"operator, forward": 15.0, "operator, backward": 40.1}
    both = dict(workload="encoder", direction="both", threads=2, ratio=1.31)
    (tmp_path / "fused.json").write_text(json.dumps({"rows": [both], "calls": calls}))
    return tmp_path


def test_each_target_holds_from_its_limit_on(folder):
    verdicts = {target.name: target.holds for target in targets.targets(folder)}
    assert verdicts == {
        "encoder, forward, 1 thread": True,
        "encoder, forward, bfloat16 against float32": True,
        "encoder, forward, float16 against float32": False,
        "decoder, backward, 1 thread": False,
        "encoder, forward, avx2 against avx512": False,
        "encoder, forward, share of the load-slot floor": True,
        "fused encoder, forward and backward, 2 threads": True,
        "call overhead, forward": True,
        "call overhead, backward": False,
    }


def test_table_and_reasons_are_printed(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["targets.py", str(folder)])
    assert targets.main() == 0
    printed = capsys.readouterr().out
    assert "decoder, backward, 1 thread" in printed and ">= 12x" in printed
    assert f"missed: call overhead, backward:\n  {targets.CALL}." in printed
    assert "missed: encoder, forward, 1 thread" not in printed


def test_folder_without_results_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["targets.py", str(tmp_path)])
    assert targets.main() == 2
    assert "folder must hold" in capsys.readouterr().out


def test_report_shows_what_was_missed_and_why(folder, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", folder.parent)
    table = report.targets_table()
    assert "| decoder, backward, 1 thread | >= 12x | 6.0x | missed |" in table
    assert f"- Missed: decoder, backward, 1 thread: {targets.SMALL}." in table


def test_instruction_sets_are_timed_against_each_other(tmp_path):
    result = tmp_path / "capabilities.json"
    command = [sys.executable, BENCHMARKS / "bench_capabilities.py", "--rounds", "1"]
    command += ["--workload", "decoder", "--output", result]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["speed"] for row in rows if row["capability"] == rows[-1]["capability"]] == [1, 1]
    assert all(row["ms"] > 0 for row in rows)
