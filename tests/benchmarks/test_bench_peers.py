"""The benchmark beside other implementations: rows, refusals, what is missing, and each rival."""

import json
import sys
import time

import accuracy
import baselines
import bench_peers
import measure
import peers
import pytest
import report
import torch
import workloads

from msda.testing import relative_error


@pytest.fixture(autouse=True)
def tiny(monkeypatch, set_threads):
    """Problems that take no time; and what the benchmark sets for its process, undone."""
    set_threads(1)
    problems = {name: workload.tiny() for name, workload in workloads.CPU_WORKLOADS.items()}
    monkeypatch.setattr(bench_peers, "CPU_WORKLOADS", problems)
    with baselines.functorch.patch(donated_buffer=True):
        yield


def rival_of(core, **changes):
    return bench_peers.Rival("a rival", lambda: lambda inputs, threads: core, **changes)


def wrong(inputs):
    return baselines.grid_sample_core(inputs) * inputs.value.new_tensor(1.001)


def breaks(inputs, threads):
    raise RuntimeError("no such\nexport")


def fails(inputs):
    raise RuntimeError("no such kernel")


def absent():
    raise peers.PeerError("not installed")


RIVALS = {
    "grid_sample": rival_of(baselines.grid_sample_core),
    "forward only": rival_of(baselines.grid_sample_core, has_backward=False),
    "wrong": rival_of(wrong),
    "fails": rival_of(fails),
    "breaks": bench_peers.Rival("a rival", lambda: breaks),
    "absent": bench_peers.Rival("a rival", absent),
}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run the benchmark; its exit status and the file it wrote."""

    def run(rivals, *arguments):
        monkeypatch.setattr(bench_peers, "RIVALS", rivals)
        path = tmp_path / "benchmarks" / "results" / "some-cpu" / "peers.json"
        options = ["--seconds=0", f"--output={path}", *arguments]
        monkeypatch.setattr(sys, "argv", ["bench_peers.py", *options])
        return bench_peers.main(), json.loads(path.read_text())

    return run


def test_every_row_compares_those_that_are_right_and_lists_the_others(bench, capsys):
    status, results = bench(RIVALS, "--threads=1", "--threads=2")
    assert status == 0
    assert results["machine"].keys() >= {"cpu", "cores", "torch", "msda", "commit"}
    assert results["missing"] == {"absent": "not installed"}
    assert results["rivals"].keys() == RIVALS.keys() - {"absent"}
    assert results["rivals"]["wrong"]["versions"] == {"torch": torch.__version__}

    lines_of = [(row["workload"], row["threads"], row["direction"]) for row in results["rows"]]
    assert lines_of == [
        (workload, threads, direction)
        for workload in workloads.CPU_WORKLOADS
        for threads in (1, 2)
        for direction in ("forward", "backward")
    ]
    for row in results["rows"]:
        expected = {"msda", "grid_sample", "wrong", "fails", "breaks"}
        if row["direction"] == "forward":
            expected.add("forward only")
        assert row["rivals"].keys() == expected
        timed = {name: rival for name, rival in row["rivals"].items() if "refused" not in rival}
        assert timed.keys() == expected - {"wrong", "fails", "breaks"}
        ours = row["rivals"]["msda"]
        assert ours["ratio"] == 1
        for rival in timed.values():
            assert rival["rounds"] >= 5
            assert rival["ratio"] == pytest.approx(rival["ms"] / ours["ms"])
        assert row["rivals"]["breaks"]["refused"] == "RuntimeError: no such export"
        assert row["rivals"]["fails"]["refused"] == "RuntimeError: no such kernel"

    text = capsys.readouterr().out
    assert "missing: absent: not installed" in text
    (heading,) = [line for line in text.splitlines() if line.startswith("workload ")]
    lines = [line for line in text.splitlines() if line.startswith(("encoder ", "decoder "))]
    assert len(lines) == len(results["rows"])
    assert {len(line) for line in lines} == {len(heading)}, "columns end where their headings do"


@pytest.mark.parametrize(("direction", "name"), [("forward", "output"), ("backward", "grad_value")])
def test_a_wrong_result_is_refused_and_not_timed(bench, capsys, direction, name):
    _, results = bench({"wrong": rival_of(wrong)}, "--workload=decoder", "--threads=1")
    (row,) = [row for row in results["rows"] if row["direction"] == direction]
    refused = row["rivals"]["wrong"]
    assert refused["refused"] == f"{name} must differ by at most 1.0e-04, got 1.0e-03"
    assert "ms" not in refused
    assert f"refused: wrong: {refused['refused']}" in capsys.readouterr().out


def test_the_command_fails_where_ours_and_the_grid_sample_core_disagree(bench):
    status, _ = bench({"grid_sample": rival_of(wrong)}, "--workload=decoder", "--threads=1")
    assert status == 1


@pytest.mark.parametrize("name", bench_peers.RIVALS)
def test_each_rival_that_is_installed_computes_the_operator(name):
    rival = bench_peers.RIVALS[name]
    try:
        make = rival.find()
    except peers.PeerError as error:
        pytest.skip(f"{name}: {error}")
    inputs = bench_peers.CPU_WORKLOADS["decoder"].plain(torch.float32)
    core = make(inputs, 1)
    expected = accuracy.reference(inputs)
    assert relative_error(measure.forward_of(core, inputs)(), expected) < 1e-5
    if rival.has_backward:
        run = measure.backward_of(core, inputs)
        exact = measure.backward_of(accuracy.reference, inputs)()
        for _ in range(2):  # on a graph that is kept
            for actual, gradient in zip(run(), exact, strict=True):
                assert relative_error(actual, gradient) < 1e-4
    assert bench_peers.described(rival)["versions"].keys() == set(rival.packages)


@pytest.mark.parametrize("name", ["transformers", "ONNX Runtime"])
def test_a_package_that_is_not_installed_is_said(name, monkeypatch):
    for package in bench_peers.RIVALS[name].packages:
        if package != "torch":
            monkeypatch.setitem(sys.modules, package, None)
    makes, missing = bench_peers.find_rivals({name: bench_peers.RIVALS[name]})
    assert makes == {}
    assert missing[name].startswith(("not installed", "importing it failed"))


def test_a_peer_can_be_named_by_its_file(bench, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "import torch\n"
        "class MultiScaleDeformableAttention(torch.nn.Module):\n"
        "    def forward(self, value, value_spatial_shapes, value_spatial_shapes_list,\n"
        "                level_start_index, sampling_locations, attention_weights, im2col_step):\n"
        "        from msda.reference import ms_deform_attn_reference\n"
        "        return ms_deform_attn_reference(value, value_spatial_shapes_list, None,\n"
        "                                        sampling_locations, attention_weights)\n"
    )
    arguments = [f"--peer=mine={file}", "--peer=nowhere.to_be_found", "--workload=decoder"]
    status, results = bench(bench_peers.RIVALS, *arguments, "--threads=1")
    assert status == 0
    assert results["missing"] == {"nowhere.to_be_found": "not installed"}
    assert results["rivals"]["mine"]["about"] == str(file)
    assert all(row["rivals"]["mine"]["ratio"] > 0 for row in results["rows"])


def test_a_missing_compiler_is_said(monkeypatch):
    def compiled(function, threads):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(bench_peers, "compiled", compiled)
    with pytest.raises(peers.PeerError, match=r"^compiling failed: No working C\+\+ compiler fou"):
        bench_peers.find_compiled()


def test_a_short_call_is_timed_after_one_that_is_not():
    called = []

    def run():
        called.append(None)
        time.sleep(0.01)

    timer = measure.SettledTimer()
    assert timer.lead(run) >= 0.01
    for lead, calls in ((0.01, 2), (measure.SettledTimer.SHORT, 1)):
        called.clear()
        assert timer(run, lead=lead) >= 0.01
        assert len(called) == calls


def test_the_report_has_a_column_per_rival(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    assert report.peers_table() == report.NO_PEER_FIGURE
    _, results = bench(RIVALS, "--workload=decoder", "--threads=1")
    text = report.peers_table()
    assert "(`benchmarks/results/some-cpu/peers.json`):" in text
    names = "grid_sample | forward only | wrong | fails | breaks"
    assert f"| workload | direction | threads | msda, ms | {names} |" in text
    ours, core = (results["rows"][1]["rivals"][name] for name in ("msda", "grid_sample"))
    cells = f"{ours['ms']:.2f} | {core['ms']:.1f} (**{core['ratio']:.1f}x**) | - | refused"
    assert f"| decoder | backward | 1 | {cells} | refused | refused |" in text
    assert f"wrong: a rival (torch {torch.__version__})." in text
    assert "absent: missing (not installed)." in text
