"""Instruction sets against each other: how they are timed, and the table."""

import json

from benchmarks.__main__ import main
from benchmarks.common import harness
from benchmarks.report import command as report


def test_instruction_sets_are_timed_against_each_other(tmp_path, monkeypatch):
    record = tmp_path / "some-cpu" / "capabilities.json"
    assert main(["capabilities", "--quick", "--workload=decoder", f"--output={record}"]) == 0
    rows = json.loads(record.read_text())["rows"]
    best = rows[-1]["capability"]
    assert [row["speed"] for row in rows if row["capability"] == best] == [1, 1]
    assert all(row["ms"] > 0 and row["rounds"] == 1 for row in rows)

    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    made = json.loads(record.read_text()) | {"quick": False, "rows": []}
    for capability, speed in (("avx2", 0.5), ("avx512", 1.0)):
        row = {"capability": capability, "direction": "forward", "ms": 12 / speed, "speed": speed}
        made["rows"].append(row)
    harness.write_json(record, made)
    table = report.block("capabilities")
    assert "| speed of | avx2 | avx512 |" in table
    assert "| forward | 0.50 | 1.00 |" in table
