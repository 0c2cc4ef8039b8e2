"""The comparison in runtimes: each is there before and after, and a wrong result is not timed."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("openvino")

from benchmarks.common import harness
from benchmarks.models.runtimes import built
from benchmarks.report import command as report
from benchmarks.report import speed


def run(*arguments):
    """In a process of its own, as people run it: three runtimes beside each other."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=harness.ROOT)
    return done.returncode, done.stdout + done.stderr


def test_each_runtime_is_measured_before_and_after(tmp_path, monkeypatch):
    output = tmp_path / "machine" / "runtimes.json"
    options = ["--quick", "--model=decoder", "--model=detector-small", "--threads=1"]
    status, text = run("-m", "benchmarks", "runtimes", *options, "--output", output)
    assert status == 0, text
    rows = json.loads(output.read_text())["rows"]
    sides = {"torch", "openvino", "openvino, Python", "onnxruntime"}
    sides |= {f"{one}, library" for one in ("openvino", "onnxruntime") if built(f"msda_{one}")}
    of_model = {
        name: {row["side"]: row for row in rows if row["model"] == name}
        for name in ("decoder", "detector-small")
    }
    assert set(of_model["decoder"]) == sides | {"copy"}
    assert set(of_model["detector-small"]) == sides
    for name, by_side in of_model.items():
        for side, row in by_side.items():
            ours = "," in side
            assert (row["operator_share"] is not None) == ours
            if ours:
                assert row["error"] <= 1e-5
                assert 0 < row["operator_share"] <= 1, (name, side)
                before = by_side[side.split(",")[0]]
                assert row["ratio"] == pytest.approx(before["ms"] / row["ms"])
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    assert report.block("runtimes", "docs/runtimes.md").startswith("No figure exists yet"), (
        "it was --quick"
    )
    # As it was written before records had a command: such a one is committed.
    record = json.loads(output.read_text())
    del record["command"], record["quick"]
    harness.write_json(output, record)
    lines = report.block("runtimes", "docs/runtimes.md").split("\n")
    assert "OpenVINO 2" in lines[0] and "ONNX Runtime 1" in lines[0]
    assert len(lines) == 4 + len(rows)
    of_speed = [line for line in speed.speed("README.md").split("\n") if line.startswith("| de")]
    assert len(of_speed) == sum(side.endswith("library") for side in sides) * 2


def test_a_wrong_result_is_not_timed():
    program = """if True:
        from benchmarks.models import runtimes
        run = runtimes.InOpenVINO.run
        runtimes.InOpenVINO.run = lambda *given: [1.001 * one for one in run(*given)]
        list(runtimes.measure("decoder", 1, 0.1, quick=True))
    """
    status, text = run("-c", program)
    assert status == 1
    assert "AssertionError: openvino: output 0 must differ by at most 1.0e-05, got 1.0e-03" in text
