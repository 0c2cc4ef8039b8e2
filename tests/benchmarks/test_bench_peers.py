"""The benchmark beside other implementations: rows, refusals, what is missing, and each peer."""

import json
import sys

import pytest
import torch

from benchmarks import workloads
from benchmarks.__main__ import main
from benchmarks.common import harness, timing
from benchmarks.cpu import peers as bench_peers
from benchmarks.report import command as report
from msda.testing import grid_sample_core, ours, reference, relative_error


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """And what the benchmark sets for its process, undone."""
    set_threads(1)


def candidate(core, **changes):
    about = {"about": "a peer", "versions": {"torch": torch.__version__}}
    return bench_peers.Candidate(lambda inputs, threads: core, about, **changes)


def wrong(inputs):
    return grid_sample_core(inputs) * inputs.value.new_tensor(1.001)


def breaks(inputs, threads):
    raise RuntimeError("no such\nexport")


def fails(inputs):
    raise RuntimeError("no such kernel")


PEERS = {
    "right": candidate(grid_sample_core),
    "forward only": candidate(grid_sample_core, has_backward=False),
    "wrong": candidate(wrong),
    "fails": candidate(fails),
    "breaks": bench_peers.Candidate(breaks, {"about": "a peer", "versions": {}}),
}
MISSING = {"absent": "not installed"}


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Run the benchmark; its exit status and the file it wrote."""

    def run(found, *arguments):
        if found is not None:
            monkeypatch.setattr(bench_peers, "find_candidates", lambda wanted: (found, MISSING))
        path = tmp_path / "benchmarks" / "results" / "some-cpu" / "peers.json"
        status = main(["peers", "--quick", f"--output={path}", *arguments])
        return status, json.loads(path.read_text())

    return run


def test_every_row_compares_those_that_are_right_and_lists_the_others(bench, capsys):
    status, results = bench(PEERS, "--threads=1", "--threads=2")
    assert status == 0
    assert results["machine"].keys() >= {"cpu", "cores", "torch", "msda", "commit"}
    assert results["missing"] == MISSING
    assert results["sides"].keys() == PEERS.keys()
    assert results["sides"]["wrong"]["versions"] == {"torch": torch.__version__}

    lines_of = [(row["workload"], row["threads"], row["direction"]) for row in results["rows"]]
    assert lines_of == [
        (workload, threads, direction)
        for workload in workloads.CPU_WORKLOADS
        for threads in (1, 2)
        for direction in ("forward", "backward")
    ]
    for row in results["rows"]:
        expected = {"msda", "right", "wrong", "fails", "breaks"}
        if row["direction"] == "forward":
            expected.add("forward only")
        assert row["sides"].keys() == expected
        timed = {name: side for name, side in row["sides"].items() if "refused" not in side}
        assert timed.keys() == expected - {"wrong", "fails", "breaks"}
        our_side = row["sides"]["msda"]
        assert our_side["ratio"] == 1
        for side in timed.values():
            assert side["rounds"] >= 5
            assert side["ratio"] == pytest.approx(side["ms"] / our_side["ms"])
        assert row["sides"]["breaks"]["refused"] == "no such export"
        assert row["sides"]["fails"]["refused"] == "RuntimeError: no such kernel"

    text = capsys.readouterr().out
    assert "missing: absent: not installed" in text
    (heading,) = [line for line in text.splitlines() if line.startswith("workload ")]
    lines = [line for line in text.splitlines() if line.startswith(("encoder ", "decoder "))]
    assert len(lines) == len(results["rows"])
    assert {len(line) for line in lines} == {len(heading)}, "columns end where their headings do"


def wrong_gradient(inputs):
    exact = grid_sample_core(inputs)
    return exact.detach() + 1.001 * (exact - exact.detach())


@pytest.mark.parametrize(
    ("direction", "name", "core"),
    [("forward", "output", wrong), ("backward", "grad_value", wrong_gradient)],
)
def test_a_wrong_result_is_refused_and_not_timed(bench, capsys, direction, name, core):
    _, results = bench({"wrong": candidate(core)}, "--workload=decoder", "--threads=1")
    (row,) = [row for row in results["rows"] if row["direction"] == direction]
    refused = row["sides"]["wrong"]
    assert refused["refused"] == f"{name} must differ by at most 1.0e-04, got 1.0e-03"
    assert "ms" not in refused
    assert f"refused: wrong: {refused['refused']}" in capsys.readouterr().out


def test_the_command_fails_where_ours_is_wrong(bench, monkeypatch):
    monkeypatch.setattr(bench_peers, "ours", lambda inputs: 1.001 * ours(inputs))
    status, results = bench(PEERS, "--workload=decoder", "--threads=1")
    assert status == 1
    assert "ms" not in results["rows"][0]["sides"]["right"]


@pytest.mark.parametrize("name", ["transformers", *bench_peers.RUNTIMES])
def test_each_peer_that_is_installed_computes_the_operator(name):
    found, missing = bench_peers.find_candidates([name])
    if missing:
        pytest.skip(f"{name}: {missing[name]}")
    inputs = workloads.CPU_WORKLOADS["decoder"].tiny().plain(torch.float32)
    core = found[name].make(inputs, 1)
    assert relative_error(timing.forward_of(core, inputs)(), reference(inputs)) < 1e-5
    if found[name].has_backward:
        run = timing.backward_of(core, inputs)
        exact = timing.backward_of(reference, inputs)()
        for _ in range(2):  # on a graph that is kept
            for actual, gradient in zip(run(), exact, strict=True):
                assert relative_error(actual, gradient) < 1e-4
    assert "torch" in found[name].about["versions"]


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("transformers", "transformers"),
        ("ONNX Runtime", "onnxruntime"),
        ("OpenVINO", "openvino"),
        ("OpenVINO", "onnx"),
    ],
)
def test_a_package_that_is_not_installed_is_said(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    found, missing = bench_peers.find_candidates([name])
    assert found == {}
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
    status, results = bench(None, *arguments, "--threads=1")
    assert status == 0
    assert results["missing"] == {"nowhere.to_be_found": "not installed"}
    assert results["sides"]["mine"]["about"] == str(file)
    assert all(row["sides"]["mine"]["ratio"] > 0 for row in results["rows"])


def test_the_report_has_a_column_per_peer(bench, monkeypatch, tmp_path):
    _, results = bench(PEERS, "--workload=decoder", "--threads=1")
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "benchmarks" / "results")
    path = harness.RESULTS / "some-cpu" / "peers.json"
    harness.write_json(path, results | {"quick": False})
    text = report.block("peers")
    assert "(`benchmarks/results/some-cpu/peers.json`):" in text
    names = "right | forward only | wrong | fails | breaks"
    assert f"| workload | direction | threads | {names} |" in text
    side = results["rows"][1]["sides"]["right"]
    lower, upper = side["quartiles_ms"]
    cell = f"{side['ms']:.1f} ({lower:.1f} to {upper:.1f}), **{side['ratio']:.1f}x**"
    assert f"| decoder | backward | 1 | {cell} | - | refused | refused | refused |" in text
    assert f"wrong: a peer (torch {torch.__version__})." in text
    assert "Not measured: absent." in text
