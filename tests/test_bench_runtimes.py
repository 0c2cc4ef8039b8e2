"""The comparison in runtimes: each is there before and after, and a wrong result is not timed."""

import json
import sys

import pytest

pytest.importorskip("openvino")

import bench_runtimes
import report
from bench_runtimes import built


@pytest.mark.filterwarnings("ignore")
def test_each_runtime_is_measured_before_and_after(tmp_path, monkeypatch):
    output = tmp_path / "machine" / "runtimes.json"
    models = ["--model", "decoder", "--model", "detector-small"]
    command = ["bench", "--quick", *models, "--threads", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(bench_runtimes, "SIZES", dict(bench_runtimes.SIZES))
    monkeypatch.setattr(bench_runtimes, "CPU_WORKLOADS", dict(bench_runtimes.CPU_WORKLOADS))
    assert bench_runtimes.main() == 0
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
                assert row["error"] < 1e-4
                assert 0 < row["operator_share"] <= 1, (name, side)
                before = by_side[side.split(",")[0]]
                assert row["ratio"] == pytest.approx(before["ms"] / row["ms"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "cpu_heading", lambda path, results: "a machine:")
    lines = report.runtimes_table().split("\n")
    assert lines[0].startswith("OpenVINO 2") and lines[0].endswith(", a machine:")
    assert len(lines) == 4 + len(rows)


@pytest.mark.filterwarnings("ignore")
def test_a_wrong_result_is_not_timed(monkeypatch):
    workload = bench_runtimes.CPU_WORKLOADS["decoder"].tiny()
    monkeypatch.setattr(bench_runtimes, "CPU_WORKLOADS", {"decoder": workload})
    run = bench_runtimes.InOpenVINO.run
    monkeypatch.setattr(
        bench_runtimes.InOpenVINO, "run", lambda *given: [1.001 * one for one in run(*given)]
    )
    with pytest.raises(AssertionError, match=r"^openvino must agree to 1e-05, got 1.0e-03"):
        list(bench_runtimes.measure("decoder", None, 1, 0.1))
