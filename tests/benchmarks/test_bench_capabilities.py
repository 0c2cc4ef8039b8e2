"""bench_capabilities.py: instruction sets against each other, and the floor under the best."""

import json
import subprocess
import sys
from pathlib import Path

import report

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_report_shows_the_floor_beside_the_best_instruction_set(monkeypatch, tmp_path):
    machine = dict(cpu="some", cores=2, cpu_capability="avx512", torch="2", msda="0", commit="abc")
    results = {
        "machine": machine,
        "workload": "encoder",
        "loads_per_second": 3.5e9,
        "floor_ms": {"forward": 9.0, "backward": 12.0},
        "rows": [
            {"capability": "avx2", "direction": "forward", "ms": 24.0, "speed": 0.5},
            {"capability": "avx512", "direction": "forward", "ms": 12.0, "speed": 1.0},
        ],
    }
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "capabilities.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    table = report.capabilities_table()
    assert "| forward | avx2 | 24.0 | 0.50 |  |" in table
    assert "| forward | avx512 | 12.0 | 1.00 | 9.0 |" in table
    assert "3.50 billion a second" in table


def test_instruction_sets_are_timed_against_each_other(tmp_path):
    result = tmp_path / "capabilities.json"
    command = [sys.executable, BENCHMARKS / "bench_capabilities.py", "--rounds", "1"]
    command += ["--workload", "decoder", "--output", result]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = json.loads(result.read_text())["rows"]
    assert [row["speed"] for row in rows if row["capability"] == rows[-1]["capability"]] == [1, 1]
    assert all(row["ms"] > 0 for row in rows)
