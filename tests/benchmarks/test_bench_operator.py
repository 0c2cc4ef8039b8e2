"""The operator's benchmark and the guard over its ratios: rows, refusals, verdicts, tables."""

import json
import sys

import accuracy
import baselines
import bench_check
import bench_operator
import pytest
import records
import report
import roofline
import torch
import workloads

from msda.testing import make_inputs, relative_error

# ---- workloads and rivals ------------------------------------------------------------------------


@pytest.mark.parametrize("locations", ["initial", "clustered"])
@pytest.mark.parametrize("num_points", [4, [3, 6, 3]])
def test_locations_differ_between_queries_and_lie_mostly_on_the_map(locations, num_points):
    shapes = [(40, 60), (20, 30), (10, 15)]
    inputs = make_inputs(shapes, locations=locations, num_points=num_points)
    points = inputs.sampling_locations.flatten(3, -2)  # (B, Q, M, K, 2)
    assert points.shape == (1, 3150, 8, 12, 2)
    inside = ((points > 0) & (points < 1)).all(-1).float().mean().item()
    assert 0.7 < inside < 1
    assert points.std(1).min() > 0.02, "queries look at different places"
    again = make_inputs(shapes, locations=locations, num_points=num_points)
    assert torch.equal(again.sampling_locations, inputs.sampling_locations)


def test_clustered_locations_share_more_rows_than_uniform_ones():
    shapes = [(100, 167), (50, 84)]
    touched = {}
    for locations in ("uniform", "clustered"):
        inputs = make_inputs(shapes, locations=locations, num_queries=900)
        touched[locations] = roofline.count_reads(inputs).touched_rows
    assert touched["clustered"] < 0.8 * touched["uniform"]


def test_unknown_locations_are_refused():
    with pytest.raises(ValueError, match=r"locations must be one of uniform, .* got 'far'"):
        make_inputs([(4, 4)], locations="far")
    with pytest.raises(ValueError, match="num_queries must be None for initial locations, got one"):
        make_inputs([(4, 4)], locations="initial", num_queries=3)


def test_baseline_takes_levels_with_different_numbers_of_points():
    inputs = make_inputs([(9, 7), (5, 4)], num_queries=11, num_points=[3, 5], dtype=torch.float64)
    assert relative_error(baselines.grid_sample_core(inputs), accuracy.reference(inputs)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_baseline_computes_16_bits_in_float32(dtype):
    inputs = make_inputs([(9, 7), (5, 4)], num_queries=11, dtype=dtype)
    output = baselines.in_float32(baselines.grid_sample_core)(inputs)
    assert output.dtype == dtype
    assert relative_error(output, accuracy.reference(inputs)) < torch.finfo(dtype).eps


# ---- floors --------------------------------------------------------------------------------------


def test_floors_of_a_cpu_follow_from_its_rates(monkeypatch):
    monkeypatch.setattr(roofline, "copy_rate", lambda threads: 1e9 * threads)
    monkeypatch.setattr(roofline, "load_rate", lambda: 2e9)
    inputs = make_inputs([(8, 8)], num_queries=10)  # 320 samples per level and point
    reads = roofline.Reads(touched_rows=100, corners=0)
    samples = 10 * 8 * 4
    forward = roofline.cpu_floors(inputs, reads, 2, backward=False)
    # Rows of 32 floats, locations and weights, and the output; all once.
    assert forward["bytes"] == 100 * 128 + samples * 3 * 4 + 10 * 256 * 4
    assert forward["copy_ms"] == pytest.approx(forward["bytes"] / 2e9 * 1e3)
    # Two vectors of 16 floats for each corner, its weight and its offset.
    assert forward["load_ms"] == pytest.approx(samples * 4 * 4 / 4e9 * 1e3)
    assert forward["floor_ms"] == max(forward["copy_ms"], forward["load_ms"])
    backward = roofline.cpu_floors(inputs, reads, 1, backward=True)
    assert backward["load_ms"] == pytest.approx(samples * 4 * 8 / 2e9 * 1e3)
    half = roofline.slots_per_sample(
        make_inputs([(8, 8)], num_queries=1, dtype=torch.float16), backward=True
    )
    assert half == 4 * (1 + 2 + 4), "sums of 16-bit gradients are float32"
    monkeypatch.setattr(roofline, "load_rate", lambda: None)
    assert "load_ms" not in roofline.cpu_floors(inputs, reads, 1, backward=False)


# ---- the benchmark -------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch, tmp_path, set_threads):
    """Run the benchmark on tiny problems; its exit status and the file it wrote."""
    set_threads(1)
    problems = {name: one.tiny() for name, one in bench_operator.WORKLOADS.items()}
    monkeypatch.setattr(bench_operator, "WORKLOADS", problems)
    monkeypatch.setattr(bench_operator, "load_rate", lambda: 3e9)
    monkeypatch.setattr(bench_operator, "copy_rate", lambda threads: 1e10)
    monkeypatch.setattr(bench_operator, "cpu_floors", lambda *a, **k: {"floor_ms": 0.1, "bytes": 1})
    bench_operator.problem.cache_clear()
    # Under pytest-xdist, pytest-benchmark would not time anything.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def run(*arguments):
        path = tmp_path / "some-cpu" / "operator.json"
        options = ["bench_operator.py", "--seconds=0", f"--output={path}", *arguments]
        monkeypatch.setattr(sys, "argv", options)
        return bench_operator.main(), json.loads(path.read_text())

    yield run
    bench_operator.problem.cache_clear()


def test_every_case_belongs_to_a_workload_and_is_there_once():
    cases = list(bench_operator.cases())
    assert len(set(cases)) == len(cases)
    named = {case.workload for case in cases}
    assert named == workloads.CPU_WORKLOADS.keys() | workloads.OTHER_CPU_WORKLOADS.keys()
    main = {(c.dtype, c.direction) for c in cases if c.workload == "encoder"}
    assert len(main) == 4 * 4
    assert not any(c.fused for c in cases if c.workload == "d-fine")


def test_rows_hold_times_ratios_errors_memory_and_floors(bench, capsys):
    status, results = bench("--workload=decoder", "--workload=d-fine", "--threads=1")
    assert status == 0
    assert results["machine"].keys() >= {"cpu", "torch", "msda", "commit"}
    rows = {(r["direction"], r["dtype"]): r for r in results["rows"] if r["workload"] == "decoder"}
    assert len(rows) == 16
    for (direction, dtype), row in rows.items():
        core = row["rivals"]["grid_sample"]
        assert core["ratio"] == pytest.approx(core["ms"] / row["ms"])
        assert ("float32" in row["rivals"]) == (dtype in ("float16", "bfloat16"))
        assert row["extra_bytes"] > 0 and core["extra_bytes"] > 0
        assert row["floor"]["share"] == pytest.approx(0.1 / row["ms"])
        assert row["rounds"] >= 3
        points = "sampling_offsets" if "fused" in direction else "sampling_locations"
        assert (points in row["errors"]) == direction.endswith("backward")
        assert all(0 < error < 0.02 for error in row["errors"].values())
    assert rows["forward", "float64"]["errors"]["output"] < 1e-14
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("decoder ")]
    (heading,) = [line for line in out.splitlines() if line.startswith("workload ")]
    assert len(lines) == 16 and {len(line) for line in lines} == {len(heading)}


def test_a_wrong_result_fails_and_is_not_reported(bench, monkeypatch):
    monkeypatch.setattr(bench_operator, "ours", lambda inputs: 1.01 * baselines.ours(inputs))
    status, results = bench("--workload=decoder", "--direction=forward", "--dtype=float32")
    assert status == 1
    assert results["rows"] == []


def test_report_shows_all_workloads_and_all_dtypes(bench, monkeypatch, tmp_path):
    _, results = bench("--workload=decoder", "--threads=1")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    text = report.operator_table() + report.dtypes_table()
    row = results["rows"][0]
    cell = f"{row['ms']:.2f}, **{row['rivals']['grid_sample']['ratio']:.1f}x**"
    assert f"| decoder | 1 | {cell}" in text
    error, theirs = row["errors"]["output"], row["rivals"]["grid_sample"]["errors"]["output"]
    assert f"| decoder | forward | {cell}, {error:.0e} ({theirs:.0e}) |" in text
    headings = "| workload | direction | float32 | bfloat16 | float16 | float64 |"
    assert headings in text


# ---- the guard -----------------------------------------------------------------------------------


@pytest.fixture
def check(monkeypatch, tmp_path, set_threads):
    """Run the guard on ratios that are made up; ``measured`` gives those of each attempt."""
    set_threads(1)
    measured = {"fast": [10.0], "slow": [1.0]}
    monkeypatch.setattr(bench_check, "COMMITTED", tmp_path / "check.json")
    monkeypatch.setattr(bench_check, "PAIRS", {name: lambda name=name: name for name in measured})
    attempts = {name: iter(()) for name in measured}

    def measure(name, budget):
        return next(attempts[name])

    monkeypatch.setattr(bench_check, "measure", measure)

    def run(*arguments):
        attempts.update({name: iter(ratios) for name, ratios in measured.items()})
        monkeypatch.setattr(sys, "argv", ["bench_check.py", *arguments])
        return bench_check.main()

    run.measured, run.path = measured, tmp_path / "check.json"
    return run


def test_guard_fails_where_a_ratio_is_lower_in_every_attempt(check, capsys):
    assert check() == 0, "nothing to hold it against"
    assert "measured, not judged" in capsys.readouterr().out
    assert check("--write") == 0
    assert check() == 0
    check.measured["fast"] = [5.9, 5.0, 6.1]  # at least 6.0, in one of three attempts
    assert check() == 0
    check.measured["fast"] = [5.9, 5.0, 5.9]
    assert check() == 1
    out = capsys.readouterr().out
    assert "1 of 2 ratios must be at least 60% of the committed one" in out
    assert "WORSE" in out
    check.measured["fast"] = [7.9, 7.9, 7.9]
    assert check("--thorough") == 1, "with half the margin"


def test_guard_keeps_the_ratios_of_other_instruction_sets(check):
    records.write_json(check.path, {"sse9": {"machine": {}, "ratios": {"fast": 3.0}}})
    check("--write")
    written = json.loads(check.path.read_text())
    assert written["sse9"]["ratios"] == {"fast": 3.0}
    (other,) = written.keys() - {"sse9"}
    assert written[other]["ratios"] == {"fast": 10.0, "slow": 1.0}


def test_committed_ratios_are_of_the_pairs_there_are():
    committed = json.loads(bench_check.COMMITTED.read_text())
    for entry in committed.values():
        assert entry["ratios"].keys() == bench_check.PAIRS.keys()
        assert all(ratio > 0 for ratio in entry["ratios"].values())


def test_a_slower_call_lowers_its_ratio(monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setattr(bench_check, "SHAPES", [(12, 20), (6, 10)])
    pair = bench_check.PAIRS["encoder, forward"]()
    ratio = bench_check.measure(pair, 0.3)

    def slower():
        for _ in range(3):  # a ratio of a third, whatever disturbs the clock
            pair.base()
        return pair.ours()

    worse = bench_check.measure(bench_check.Pair(slower, pair.base), 0.3)
    assert worse < 1 < ratio
