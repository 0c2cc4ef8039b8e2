"""The operator's benchmark: cases, rows, refusals, tables."""

import json

import pytest

from benchmarks import workloads
from benchmarks.__main__ import main
from benchmarks.common import baselines, harness, timing
from benchmarks.cpu import operator as bench_operator
from benchmarks.report import command as report
from benchmarks.report import speed
from msda.testing import grid_sample_core, make_inputs, ours, reference, relative_error


@pytest.fixture
def bench(monkeypatch, tmp_path, set_threads):
    """Run the benchmark on tiny problems; its exit status and the file it wrote."""
    set_threads(1)
    monkeypatch.setattr(bench_operator, "load_rate", lambda: 3e9)
    monkeypatch.setattr(bench_operator, "copy_rate", lambda threads: 1e10)
    monkeypatch.setattr(bench_operator, "cpu_floors", lambda *a, **k: {"floor_ms": 0.1, "bytes": 1})
    monkeypatch.setattr(bench_operator, "compiled_core", lambda shapes, threads: grid_sample_core)
    bench_operator.prepared.cache_clear()
    # Under pytest-xdist, pytest-benchmark would not time anything.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(*arguments):
        path = tmp_path / "some-cpu" / "operator.json"
        status = main(["operator", "--quick", f"--output={path}", *arguments])
        return status, json.loads(path.read_text())

    yield run
    bench_operator.prepared.cache_clear()


def test_every_case_belongs_to_a_workload_and_is_there_once():
    cases = list(bench_operator.cases())
    assert len(set(cases)) == len(cases)
    named = {case.workload for case in cases}
    assert named == workloads.ALL_CPU_WORKLOADS.keys()
    main = {(c.dtype, c.direction) for c in cases if c.workload == "encoder"}
    assert len(main) == 4 * 4
    assert not any(c.is_fused for c in cases if c.workload == "d-fine")


def test_rows_hold_times_ratios_errors_memory_and_floors(bench, capsys):
    status, results = bench("--workload=decoder", "--workload=d-fine", "--threads=1")
    assert status == 0
    assert results["machine"].keys() >= {"cpu", "torch", "msda", "commit"}
    rows = {(r["direction"], r["dtype"]): r for r in results["rows"] if r["workload"] == "decoder"}
    assert len(rows) == 16
    for (direction, dtype), row in rows.items():
        core = row["baselines"]["grid_sample"]
        assert core["ratio"] == pytest.approx(core["ms"] / row["ms"])
        assert ("float32" in row["baselines"]) == (dtype in ("float16", "bfloat16"))
        assert row["extra_bytes"] > 0 and core["extra_bytes"] > 0
        assert row["floor"]["share"] == pytest.approx(0.1 / row["ms"])
        assert row["rounds"] >= 3 and core["quartiles_ms"][0] <= core["ms"]
        points = "sampling_offsets" if "fused" in direction else "sampling_locations"
        assert (points in row["errors"]) == direction.endswith("backward")
        assert all(0 < error < 0.02 for error in row["errors"].values())
    assert rows["forward", "float64"]["errors"]["output"] < 1e-14
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("decoder ")]
    (heading,) = [line for line in out.splitlines() if line.startswith("workload ")]
    assert len(lines) == 16 and {len(line) for line in lines} == {len(heading)}


def test_the_compiled_core_computes_the_operator_again_and_again():
    inputs = make_inputs([(9, 7), (5, 4)], num_queries=11)
    with baselines.functorch.patch(donated_buffer=True):  # what is set for a process, undone
        core = baselines.compiled_core(inputs.spatial_shapes, 1)
        assert relative_error(timing.forward_of(core, inputs)(), reference(inputs)) < 1e-5
        run, exact = timing.backward_of(core, inputs), timing.backward_of(reference, inputs)()
        for _ in range(2):  # on a graph that is kept
            for actual, gradient in zip(run(), exact, strict=True):
                assert relative_error(actual, gradient) < 1e-4


def test_a_wrong_result_fails_and_is_not_reported(bench, monkeypatch):
    monkeypatch.setattr(bench_operator, "ours", lambda inputs: 1.01 * ours(inputs))
    status, results = bench("--workload=decoder", "--direction=forward", "--dtype=float32")
    assert status == 1
    assert results["rows"] == []


def test_report_shows_all_workloads_and_all_dtypes(bench, monkeypatch, tmp_path):
    _, results = bench("--workload=decoder", "--threads=1")
    path = tmp_path / "some-cpu" / "operator.json"
    harness.write_json(path, results | {"quick": False})
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = report.block("operator") + report.block("dtypes")
    row = next(row for row in results["rows"] if row["workload"] == "decoder")
    core, (lower, upper) = row["baselines"]["grid_sample"], row["quartiles_ms"]
    spread = f"{row['ms']:.2f} ({lower:.2f} to {upper:.2f})"
    assert f"| decoder | forward | 1 | {spread} | **{core['ratio']:.1f}x** |" in text
    cell = f"{row['ms']:.2f}, **{core['ratio']:.1f}x**"
    error, core_error = row["errors"]["output"], core["errors"]["output"]
    assert f"| decoder | forward | {cell}, {error:.0e} ({core_error:.0e}) |" in text
    assert "| workload | direction | float32 | bfloat16 | float16 | float64 |" in text
    monkeypatch.setattr(speed, "WORKLOADS", ["decoder"])
    assert "| decoder, backward |" in report.block("speed", "README.md")
