"""The comparison in runtimes: each is there before and after, and a wrong result is not timed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("openvino")

import report
from bench_runtimes import built

BENCHMARKS = Path(report.__file__).parent


def run(*command, tmp_path):
    """In a process of its own, as people run it: three runtimes beside each other."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, cwd=tmp_path
    )
    return done.returncode, done.stdout + done.stderr


def test_each_runtime_is_measured_before_and_after(tmp_path, monkeypatch):
    output = tmp_path / "machine" / "runtimes.json"
    models = ["--model", "decoder", "--model", "detector-small"]
    command = [BENCHMARKS / "bench_runtimes.py", "--quick", *models, "--threads", "1"]
    status, text = run(*command, "--output", output, tmp_path=tmp_path)
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
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "cpu_heading", lambda path, results: "a machine:")
    lines = report.runtimes_table().split("\n")
    assert lines[0].startswith("OpenVINO 2") and lines[0].endswith(", a machine:")
    assert len(lines) == 4 + len(rows)


def test_a_wrong_result_is_not_timed(tmp_path):
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(BENCHMARKS)!r})
        import bench_runtimes
        workload = bench_runtimes.CPU_WORKLOADS["decoder"].tiny()
        bench_runtimes.CPU_WORKLOADS = {{"decoder": workload}}
        run = bench_runtimes.InOpenVINO.run
        bench_runtimes.InOpenVINO.run = lambda *given: [1.001 * one for one in run(*given)]
        list(bench_runtimes.measure("decoder", None, 1, 0.1))
    """
    status, text = run("-c", program, tmp_path=tmp_path)
    assert status == 1
    assert "AssertionError: openvino must agree to 1e-05, got 1.0e-03" in text
