"""`gpu bench`: rows, refusals, time limits and order, tried on a CPU."""

import json

import pytest
import torch

from benchmarks import workloads
from benchmarks.__main__ import main
from benchmarks.common import harness, machine, peers
from benchmarks.gpu import command as gpu
from benchmarks.gpu import operator as gpu_operator
from msda.testing import grid_sample_core, ours
from tests.benchmarks.fake_peers import FILLS, ORIGINAL, WRONG


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch, set_threads):
    """One thread, no handler of signals; peers are tried here: processes take seconds to start."""
    set_threads(1)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    monkeypatch.setattr(
        peers,
        "_try_in_another_process",
        lambda what, device: peers.check(peers.recognise(what, peers.load(what)), device),
    )


@pytest.fixture
def peer_file(tmp_path):
    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write


def bench(folder, *arguments):
    """Run the benchmark on tiny sizes; its exit status and the file it wrote."""
    given = ["gpu", "bench", "--device=cpu", "--quick", f"--results={folder}", *arguments]
    return main(given), json.loads((folder / "cuda_operator.json").read_text())


def test_bench_writes_every_row_and_lists_peers(tmp_path, peer_file, capsys):
    right = peer_file("right", ORIGINAL + FILLS)
    wrong = peer_file("wrong", ORIGINAL + WRONG)
    status, results = bench(
        tmp_path, "--workload=decoder-300", "--peer", right, f"--peer=liar={wrong}", "--peer=absent"
    )
    assert status == 0
    assert results["quick"] is True
    assert results["command"].startswith("python -m benchmarks gpu bench --device=cpu")
    assert results["machine"].keys() >= {"cpu", "torch", "msda", "commit", "date"}
    assert results["peers"] == {"right": "compiled"}
    assert results["missing_peers"]["absent"] == "not installed"
    assert "must differ" in results["missing_peers"]["liar"]
    assert results["not_run"] == []
    assert len(results["rows"]) == 3 * 4
    for row in results["rows"]:
        expected = {"msda", "grid_sample", "right"}
        if row["direction"].startswith("fused"):
            expected.add("msda unfused")
        assert row["sides"].keys() == expected
        assert row["floor"]["over_floor"] > 0
        for side in row["sides"].values():
            assert side.keys() >= {"errors", "cold_ms", "warm_quartiles_ms", "extra_bytes"}
            ratio = side["cold_ms"] / row["sides"]["msda"]["cold_ms"]
            assert side["ratio"] == pytest.approx(ratio)
    text = capsys.readouterr().out
    assert "no peer absent: not installed" in text
    lines = [line for line in text.splitlines() if line.startswith("decoder-300")]
    assert len(lines) == len(results["rows"])
    (heading,) = [line for line in text.splitlines() if line.startswith("workload ")]
    fused = next(line for line in lines if "fused" in line)
    assert len(fused) == len(heading), "columns must end where their headings do"


def test_bench_times_no_reference_in_the_name_of_the_kernels(tmp_path, monkeypatch):
    told = {"backend": "reference", "backend_reason": "asked for"}
    monkeypatch.setattr(machine.msda, "info", lambda: told)
    with pytest.raises(SystemExit, match=r"^the backend must be native, got reference: asked for"):
        bench(tmp_path)
    native = {"backend": "native", "backend_reason": "", "cuda_architectures": []}
    monkeypatch.setattr(machine.msda, "info", lambda: native)
    with pytest.raises(SystemExit, match=r"^msda must be built with CUDA kernels, got none"):
        machine.require_kernels("cuda")


def test_bench_does_not_time_a_wrong_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_operator, "ours", lambda inputs: 2 * ours(inputs))
    status, results = bench(
        tmp_path, "--workload=rf-detr", "--dtype=float32", "--direction=forward", "--peer=none"
    )
    assert status == 1
    (row,) = results["rows"]
    assert row["sides"]["msda"]["refused"].startswith("output must differ by at most 1.0e-05")
    assert "cold_ms" not in row["sides"]["grid_sample"]
    assert "refused: msda: output must differ" in capsys.readouterr().out


def test_bench_refuses_a_peer_that_is_wrong_in_one_dtype_only(tmp_path, monkeypatch):
    def core(inputs):
        if inputs.value.dtype == torch.float16:
            raise RuntimeError("half is not implemented")
        return grid_sample_core(inputs)

    monkeypatch.setattr(
        gpu_operator, "find_named", lambda *_: ([peers.Peer("half", "compiled", core, None)], {})
    )
    status, results = bench(tmp_path, "--workload=rf-detr", "--direction=forward")
    refused = {row["dtype"]: row["sides"]["half"].get("refused") for row in results["rows"]}
    assert status == 0
    assert refused["float32"] is None
    assert refused["float16"] == "RuntimeError: half is not implemented"


def test_bench_stops_in_time_and_says_what_it_left_out(tmp_path):
    status, results = bench(tmp_path, "--minutes=0", "--workload=rt-detr", "--peer=none")
    left = [(entry["workload"], entry["reason"]) for entry in results["not_run"]]
    assert left == [("rt-detr", "0 minutes were over")]
    assert len(results["rows"]) <= 1  # how long a row takes is not known before the first
    assert status == int(not results["rows"])


def test_bench_does_the_most_telling_first():
    names, dtypes = list(workloads.GPU_WORKLOADS), list(gpu_operator.DTYPES)
    steps = list(gpu_operator.plan(names, dtypes, list(gpu_operator.DIRECTIONS)))
    first = [(name, ["float32", "float16"]) for name in gpu_operator.MAIN_WORKLOADS]
    assert [step[:2] for step in steps[:6]] == first * 2
    assert [step[2] for step in steps[:3]] == [["backward", "forward"]] * 3
    assert [step[2] for step in steps[3:6]] == [["fused backward", "fused forward"]] * 3
    every = [(n, dtype, d) for n, some, directions in steps for dtype in some for d in directions]
    assert len(every) == len(set(every)) == len(names) * len(dtypes) * 4
    assert list(gpu_operator.plan(["rt-detr"], ["bfloat16"], ["forward"])) == [
        ("rt-detr", ["bfloat16"], ["forward"])
    ]


def test_ceilings_are_taken_from_the_micro_benchmarks_of_the_same_device(tmp_path):
    path = tmp_path / "cuda_micro.json"
    rows = [
        {"name": "dram.copy", "bytes_per_second": 3e12, "verified": True},
        {"name": "l2.read", "bytes_per_second": 5e12, "verified": False},
    ]
    harness.write_json(path, {"machine": {"device": "GPU A"}, "measurements": rows})
    assert gpu_operator.read_micro(path, "GPU A") == {"dram.copy": 3e12}
    assert gpu_operator.read_micro(path, "GPU B") == {}
    assert gpu_operator.read_micro(tmp_path / "none.json", "GPU A") == {}
