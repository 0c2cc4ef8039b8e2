"""What `make gpu` is made of works where there is no GPU: timing, peers, floors, files, tables."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import accuracy
import baselines
import bench_gpu
import every_form
import gpu
import measure
import peers
import pytest
import records
import report
import roofline
import torch
import workloads

from msda.testing import PAPER_SHAPES, Inputs, make_fused_inputs, make_inputs, relative_error

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SMALL = [(5, 7), (3, 4)]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Tiny problems: threads would only wait for each other."""
    set_threads(1)


# ---- timing --------------------------------------------------------------------------------------


def test_rivals_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = measure.take_turns(measure.CpuTimer(), runs, cold=False, budget=0, least=3)
    assert [len(samples) for samples in times.values()] == [3, 3]
    assert "".join(order) == "ab" * (len(order) // 2)


def test_a_slow_call_is_repeated_less_often_than_a_fast_one():
    fast = measure.take_turns(measure.CpuTimer(), {"": lambda: None}, cold=False, budget=0.01)
    slow = {"": lambda: time.sleep(0.002)}
    slow = measure.take_turns(measure.CpuTimer(), slow, cold=False, budget=0.01, least=1)
    assert len(fast[""]) == 30
    assert 1 <= len(slow[""]) <= 5


class FakeEvent:
    """An event of a device on which each call takes a millisecond."""

    def __init__(self, log, **options):
        assert options == {"enable_timing": True}
        self.log = log

    def record(self):
        self.log.append("event")

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 1.0


@pytest.fixture
def fake_device(monkeypatch):
    """What happens on a device that is not there, in order."""
    log = []
    properties = SimpleNamespace(
        name="Fake GPU",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=80e9,
        L2_cache_size=50_000_000,
    )
    buffer = SimpleNamespace(
        fill_=lambda number: log.append("write"), sum=lambda: log.append("read")
    )

    def empty(words, dtype, device):
        assert 4 * words > properties.L2_cache_size
        return buffer

    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: FakeEvent(log, **options))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("busy"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 350)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: log.append("reset"))
    return log


def test_the_gpu_is_busy_while_a_call_is_enqueued_and_its_cache_is_empty_or_warm(fake_device):
    timer = measure.CudaTimer()
    assert timer.clock_hz == 20e9  # 20 million cycles in a millisecond
    run = lambda: fake_device.append("call")  # noqa: E731
    lead = timer.lead(run)
    assert 30e-6 < lead < 1e-2
    fake_device.clear()
    assert timer(run, cold=True, lead=lead) == 1e-3
    assert fake_device == ["write", "read", "busy", "event", "call", "event"]
    fake_device.clear()
    timer(run, cold=False, lead=lead)
    assert fake_device == ["call", "busy", "event", "call", "event"]
    fake_device.clear()
    timer.per_call(run, 3)
    assert fake_device == ["call", "wait", "call", "call", "call", "wait"]


def test_peak_memory_of_a_gpu_is_beyond_what_was_held_before(fake_device):
    assert measure.peak_extra_memory(lambda: fake_device.append("call"), "cuda") == 250
    assert fake_device == ["call", "wait", "reset", "call", "wait"]


def test_a_gpu_is_described(fake_device, monkeypatch):
    monkeypatch.setattr(measure, "output_of", lambda *command: "")
    monkeypatch.setenv("MSDA_COMMIT", "abc1234")
    machine = measure.gpu_machine("cuda")
    assert machine["device"] == "Fake GPU"
    assert machine["capability"] == "9.0"
    assert machine["driver"] == "unknown"
    assert machine["commit"] == "abc1234"


def test_ceilings_of_a_gpu(fake_device, tmp_path):
    path = tmp_path / "cuda_micro.json"
    rows = [{"name": "dram.copy", "bytes_per_second": 3e12, "verified": True}]
    records.write_json(path, {"machine": {"device": "Fake GPU"}, "measurements": rows})
    ceilings = bench_gpu.ceilings_of("cuda", measure.CudaTimer(), path, smoke=False)
    assert ceilings.dram_bytes_per_second == 3e12
    assert ceilings.dram_source == "cuda_micro.json"
    assert (ceilings.multiprocessors, ceilings.clock_hz) == (132, 20e9)


def test_medians_and_quartiles():
    assert measure.median([3, 1, 100]) == 3
    assert measure.quartiles([1, 2, 3, 4, 5]) == [2, 4]
    assert measure.quartiles([7]) == [7, 7]


def test_peak_memory_counts_what_a_call_allocates():
    assert measure.peak_extra_memory(lambda: torch.empty(1000)) >= 4000


def test_backward_is_timed_alone_and_gives_all_gradients():
    calls = []

    def core(inputs):
        calls.append(inputs)
        return baselines.grid_sample_core(inputs)

    inputs = make_inputs(SMALL, num_queries=3)
    run = measure.backward_of(core, inputs)
    gradients = run()
    run()
    assert len(calls) == 1
    assert [gradient.shape for gradient in gradients] == [t.shape for t in inputs.tensors()]


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [make_inputs, make_fused_inputs])
def test_exact_results_do_not_depend_on_the_chunks(make):
    inputs = make(SMALL, batch=2, num_queries=11, num_heads=2, head_dim=3)
    grad_output = torch.randn(2, 11, 6)
    whole = accuracy.exact_results(inputs, grad_output)
    parts = accuracy.exact_results(inputs, grad_output, budget=1)
    assert accuracy.queries_at_once(inputs, 1) == 1
    assert whole.keys() == {"output", *accuracy.GRADIENTS[type(inputs)]}
    for name in whole:
        assert whole[name].dtype == torch.float64
        torch.testing.assert_close(parts[name], whole[name])
        assert whole[name].count_nonzero() > 0


def test_the_baselines_compute_the_operator():
    inputs = make_fused_inputs(SMALL, batch=2, num_queries=5, reference_size=4)
    expected = accuracy.reference(inputs)
    actual = baselines.after_prologue(baselines.grid_sample_core)(inputs)
    assert relative_error(actual, expected) < 1e-5
    points = make_fused_inputs(SMALL, batch=2, num_queries=5)
    plain = baselines.prologue(points)
    assert relative_error(accuracy.reference(plain), accuracy.reference(points)) < 1e-5


def test_a_complaint_names_the_result_and_both_numbers():
    errors = {"output": 1e-7, "value": 3e-3}
    text = "grad_value must differ by at most 1.0e-04, got 3.0e-03"
    assert accuracy.complaint(errors, accuracy.others_limit, torch.float32) == text
    assert accuracy.complaint({"output": 0.0}, accuracy.our_limit, torch.float16) is None
    nan = {"output": float("nan")}
    assert "got nan" in accuracy.complaint(nan, accuracy.others_limit, torch.bfloat16)


@pytest.mark.parametrize("dtype", accuracy.OTHERS_LIMITS)
def test_zeros_and_strangers_numbers_are_refused_in_every_dtype(dtype):
    expected = {"output": torch.randn(1000)}
    for wrong in (torch.zeros(1000), torch.randn(1000)):
        errors = accuracy.errors_of({"output": wrong}, expected)
        assert accuracy.complaint(errors, accuracy.others_limit, dtype) is not None


def test_a_result_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"^output must have shape \(2, 3\), got \(6,\)$"):
        accuracy.errors_of({"output": torch.ones(6)}, {"output": torch.ones(2, 3)})


# ---- roofline ------------------------------------------------------------------------------------

# 132 multiprocessors at 1.755 GHz, 3.0 TB/s.
H100 = roofline.Ceilings(3.0e12, 132, 1.755e9)


def encoder_on_meta(value_dtype, weights_dtype):
    keys = 22223
    locations = torch.empty(2, keys, 8, 4, 4, 2, device="meta")
    return Inputs(
        torch.empty(2, keys, 8, 32, dtype=value_dtype, device="meta"),
        PAPER_SHAPES,
        locations,
        torch.empty(locations.shape[:-1], dtype=weights_dtype, device="meta"),
    )


@pytest.mark.parametrize(
    ("dtype", "backward", "dram_us", "l1_us"),
    [
        (torch.float32, False, 53, 98),
        (torch.float16, False, 34, 49),
        (torch.float32, True, 91, 0),
    ],
)
def test_floors_of_the_encoder(dtype, backward, dram_us, l1_us):
    """Value, output and locations are 45.5 MB each in float32, weights 22.8 MB; 5.69 M samples."""
    inputs = encoder_on_meta(dtype, dtype)
    reads = roofline.Reads(touched_rows=2 * 22223 * 8, corners=4 * 5_689_088)
    floor = roofline.floors(inputs, reads, H100, backward=backward)
    assert round(floor["dram_ms"] * 1e3) == dram_us
    assert round(floor["l1_ms"] * 1e3) == l1_us
    assert floor["floor_ms"] == max(floor["dram_ms"], floor["l1_ms"])


def test_rates_of_the_l1_caches():
    assert H100.l1_bytes_per_second == pytest.approx(29.65e12, rel=1e-3)


def test_reads_counted_by_hand():
    # A map of 2 x 3 pixels, one head. The middle of the map lies on a row of pixels' centres, but
    # between rows: 4 corners. (0, 0) is a corner of the map: 1. Far away: none. Twice the same: 4.
    locations = torch.tensor([[0.5, 0.5], [0.0, 0.0], [9.0, 0.5], [0.5, 0.5]])
    inputs = Inputs(
        torch.ones(1, 6, 1, 4),
        [(2, 3)],
        locations.view(1, 4, 1, 1, 1, 2),
        torch.ones(1, 4, 1, 1, 1),
    )
    # x = 0.5 * 3 - 0.5 = 1: pixels 1 and 2 of both rows; and pixel 0 of row 0.
    assert roofline.count_reads(inputs) == roofline.Reads(touched_rows=5, corners=9)


def test_reads_agree_with_the_gradient_of_value():
    inputs = make_inputs(SMALL, batch=2, num_queries=9, num_heads=3, head_dim=2)
    value = inputs.value.clone().requires_grad_()
    accuracy.reference(replace(inputs, value=value)).sum().backward()
    touched = value.grad.ne(0).any(-1).sum().item()
    assert roofline.count_reads(inputs).touched_rows == touched


# ---- peers ---------------------------------------------------------------------------------------

ORIGINAL = """
import torch
from msda.reference import ms_deform_attn_reference

def ms_deform_attn_forward(value, shapes, start, locations, weights, im2col_step):
    assert shapes.dtype == start.dtype == torch.int64 and value.shape[0] % im2col_step == 0
    return ms_deform_attn_reference(value, shapes, start, locations, weights)

def _gradients(value, shapes, start, locations, weights, grad_output):
    tensors = [t.detach().requires_grad_() for t in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_reference(tensors[0], shapes, start, *tensors[1:])
        return torch.autograd.grad(output, tensors, grad_output)
"""
RETURNS = """
def ms_deform_attn_backward(value, shapes, start, loc, attn, grad_output, im2col_step):
    return list(_gradients(value, shapes, start, loc, attn, grad_output))
"""
FILLS = """
def ms_deform_attn_backward(value, value_spatial_shapes, value_level_start_index,
                            sampling_locations, attention_weights, grad_output, grad_value,
                            grad_sampling_loc, grad_attn_weight, im2col_step):
    given = (value, value_spatial_shapes, value_level_start_index, sampling_locations,
             attention_weights, grad_output)
    for result, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight),
                                _gradients(*given)):
        result.add_(gradient)  # as atomics do
"""
# Swaps x and y.
WRONG = (
    RETURNS
    + """
_right = ms_deform_attn_forward
def ms_deform_attn_forward(value, shapes, start, locations, weights, im2col_step):
    return _right(value, shapes, start, locations.flip(-1), weights, im2col_step)
"""
)
TRITON = """
from msda.reference import ms_deform_attn_reference

def triton_multiscale_deformable_attention(img, img_shapes, sampling_points, attention_weights,
                                           padding_mode, align_corners):
    assert padding_mode == "zeros" and not align_corners
    output = ms_deform_attn_reference(img, img_shapes, None, sampling_points, attention_weights)
    return output.unflatten(-1, (img.shape[2], -1))
"""
LAYER = """
from torch import nn
from msda.reference import ms_deform_attn_reference

class MultiScaleDeformableAttention(nn.Module):
    def forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
                sampling_locations, attention_weights, im2col_step):
        assert all(isinstance(height, int) for height, _ in value_spatial_shapes_list)
        return ms_deform_attn_reference(value, value_spatial_shapes_list, level_start_index,
                                        sampling_locations, attention_weights)
"""
FLASH = """
from msda.reference import ms_deform_attn_reference

class FlashDeformAttnFunction:
    @staticmethod
    def apply(value, shapes, start, locations_and_logits, im2col_step, K=8):
        levels = shapes.shape[0]
        locations, logits = locations_and_logits.split([2 * levels * K, levels * K], -1)
        weights = logits.softmax(-1).unflatten(-1, (levels, K))
        locations = locations.unflatten(-1, (levels, K, 2))
        return ms_deform_attn_reference(value, shapes, start, locations, weights)
"""
KINDS = {
    "returns": (ORIGINAL + RETURNS, "compiled"),
    "fills": (ORIGINAL + FILLS, "compiled"),
    "triton": (TRITON, "Triton"),
    "layer": (LAYER, "layer"),
    "flash": (FLASH, "flash"),
}


@pytest.fixture
def peer_file(tmp_path):
    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", KINDS)
def test_peers_are_recognised_by_what_they_hold(name, peer_file):
    text, kind = KINDS[name]
    label, path = peers.split_label(peer_file(name, text))
    peer = peers.recognise(label, peers.load(path))
    assert (peer.name, peer.kind) == (name, kind)
    assert (peer.plain is None) == (kind == "flash")
    peers.check(peer, "cpu")


def test_the_convention_of_backward_is_found_out_once(peer_file):
    for name, fills in (("returns", False), ("fills", True)):
        peer = peers.recognise(name, peers.load(peer_file(name, KINDS[name][0])))
        peers.check(peer, "cpu")
        assert peer.plain.fills_gradients is fills


def test_a_type_error_of_a_peers_own_is_not_taken_for_another_convention():
    def backward(*arguments):
        raise TypeError("of its own")

    core = peers.CompiledCore(lambda *arguments: None, backward)
    core.fills_gradients = False
    with pytest.raises(TypeError, match="of its own"):
        core.gradients([torch.ones(1)] * 5, torch.ones(1), 1)


def test_a_wrong_peer_is_refused(peer_file):
    peer = peers.recognise("wrong", peers.load(peer_file("wrong", ORIGINAL + WRONG)))
    with pytest.raises(peers.PeerError, match=r"^output must differ by at most 1.0e-04, got "):
        peers.check(peer, "cpu")


def test_a_peer_that_fails_is_refused_with_its_words():
    def fails(inputs):
        raise RuntimeError("no kernel image is available")

    peer = peers.Peer("fails", "compiled", fails, None)
    with pytest.raises(peers.PeerError, match=r"^float32: no kernel image is available; float16: "):
        peers.check(peer, "cpu")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no_such_module_anywhere", "^not installed$"),
        ("/no/such/file.so", "^there is no file "),
        ("json", "^it holds no operator that is known here$"),
    ],
)
def test_what_is_no_peer_is_said(what, message, monkeypatch):
    monkeypatch.setattr(peers, "_try_in_another_process", lambda *arguments: None)
    with pytest.raises(peers.PeerError, match=message):
        peers.find("label", what, "cpu")


def test_a_layer_that_projects_is_no_peer():
    class MultiScaleDeformableAttention(torch.nn.Module):
        def forward(self, query, value):
            return query

    module = SimpleNamespace(MultiScaleDeformableAttention=MultiScaleDeformableAttention)
    with pytest.raises(peers.PeerError, match="projects its inputs"):
        peers.recognise("mmcv.ops", module)


def test_a_peer_that_crashes_harms_nobody(peer_file):
    crashes = peer_file("crashes", "import os\nos.kill(os.getpid(), 11)\n")
    with pytest.raises(peers.PeerError, match=r"^its process ended with status -11"):
        peers.find("crashes", crashes, "cpu")


def test_a_peer_is_tried_in_a_process_of_its_own(peer_file, monkeypatch, capsys):
    for text, status in ((ORIGINAL + FILLS, 0), (ORIGINAL + WRONG, 1)):
        arguments = ["peers.py", "check", peer_file("peer", text), "--device=cpu"]
        monkeypatch.setattr(sys, "argv", arguments)
        assert peers.main() == status
        assert capsys.readouterr().out.startswith("output must differ" if status else "")


SOURCE = """
#include <THC/THCAtomics.cuh>
AT_ASSERTM(value.type().is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.type(), "forward", shapes.data<int64_t>());
"""
TODAY = """
#include <ATen/cuda/Atomic.cuh>
AT_ASSERTM(value.is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "forward", shapes.data_ptr<int64_t>());
"""


@pytest.mark.parametrize("name", peers.RECIPES)
def test_a_peer_is_built_from_a_copy_of_its_sources(name, tmp_path, monkeypatch, capsys):
    from torch.utils import cpp_extension

    recipe, source = peers.RECIPES[name], tmp_path / "source"
    for part in (*recipe.sources, "DCNv4/__init__.py"):
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        (source / part).write_text(SOURCE)
    built = []

    def compile_extension(module, sources, build_directory, **options):
        assert [Path(path).read_text() for path in sources] == [TODAY] * len(sources)
        assert "-DWITH_CUDA" in options["extra_cuda_cflags"]
        (library := Path(build_directory) / f"{module}.so").touch()
        built.append(library)

    monkeypatch.setattr(cpp_extension, "load", compile_extension)
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["peers.py", "build", name, str(source), str(output)])
    assert peers.main() == 0
    said = capsys.readouterr().out.strip()
    assert said == f"--peer {name}={output / name / recipe.result}"
    assert (output / name / recipe.result).exists()
    assert built[0].parent == (output / name / recipe.result).parent
    assert (source / recipe.sources[0]).read_text() == SOURCE
    shutil.rmtree(source / "src")
    assert peers.main() == 1
    assert capsys.readouterr().out.startswith(f"the sources of {name} must hold src, got none in")


def test_labels_of_peers():
    assert peers.split_label("mmcv=mmcv._ext") == ("mmcv", "mmcv._ext")
    assert peers.split_label("mmcv._ext") == ("mmcv._ext", "mmcv._ext")
    library = "folder/MSDA.cpython-312-x86_64-linux-gnu.so"
    assert peers.split_label(library) == ("MSDA", library)


# ---- bench ---------------------------------------------------------------------------------------


@pytest.fixture
def peers_in_this_process(monkeypatch):
    """Peers tried here and not in processes of their own, which take seconds to start."""

    def check(what, device):
        peers.check(peers.recognise("", peers.load(what)), device)

    monkeypatch.setattr(peers, "_try_in_another_process", check)


def bench(folder, *arguments):
    """Run the benchmark on tiny sizes; its exit status and the file it wrote."""
    options, _ = gpu.parse(["bench", "--device", "cpu", "--smoke", *arguments])
    status = bench_gpu.run(options, folder)
    return status, json.loads((folder / "cuda_operator.json").read_text())


def test_bench_writes_every_row_and_lists_peers(tmp_path, peer_file, peers_in_this_process, capsys):
    right = peer_file("right", ORIGINAL + FILLS)
    wrong = peer_file("wrong", ORIGINAL + WRONG)
    status, results = bench(
        tmp_path, "--workload=decoder-300", "--peer", right, f"--peer=liar={wrong}", "--peer=absent"
    )
    assert status == 0
    assert results["smoke"] is True
    assert results["command"].startswith("python benchmarks/gpu.py bench --device cpu")
    assert results["machine"].keys() >= {"device", "cuda", "torch", "msda", "commit", "date"}
    assert results["peers"] == {"right": "compiled"}
    assert results["missing_peers"]["absent"] == "not installed"
    assert "must differ" in results["missing_peers"]["liar"]
    assert results["not_run"] == []
    assert len(results["rows"]) == 3 * 4
    for row in results["rows"]:
        expected = {"msda", "grid_sample", "right"}
        if row["direction"].startswith("fused"):
            expected.add("msda unfused")
        assert row["rivals"].keys() == expected
        assert row["floor"]["over_floor"] > 0
        for rival in row["rivals"].values():
            assert rival.keys() >= {"errors", "cold_ms", "warm_ms", "ratio", "extra_bytes"}
            assert rival["ratio"] * row["rivals"]["msda"]["cold_ms"] == pytest.approx(
                rival["cold_ms"]
            )
    text = capsys.readouterr().out
    assert "no peer absent: not installed" in text
    lines = [line for line in text.splitlines() if line.startswith("decoder-300")]
    assert len(lines) == len(results["rows"])
    (heading,) = [line for line in text.splitlines() if line.startswith("workload ")]
    fused = next(line for line in lines if "fused" in line)
    assert len(fused) == len(heading), "columns must end where their headings do"


def test_bench_times_no_reference_in_the_name_of_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu.msda, "info", lambda: {"backend": "reference"})
    with pytest.raises(SystemExit, match=r"^bench: the native backend must be live, got reference"):
        bench(tmp_path)
    native = {"backend": "native", "backend_reason": "", "cuda_architectures": []}
    monkeypatch.setattr(bench_gpu.msda, "info", lambda: native)
    with pytest.raises(SystemExit, match=r"^bench: msda must be built with CUDA kernels, got none"):
        bench_gpu.require_kernels("cuda")


def test_bench_does_not_time_a_wrong_result(tmp_path, monkeypatch, capsys):
    ours = replace(bench_gpu.OURS, plain=lambda inputs: 2 * baselines.ours(inputs))
    monkeypatch.setattr(bench_gpu, "OURS", ours)
    status, results = bench(
        tmp_path, "--workload=rf-detr", "--dtype=float32", "--direction=forward", "--peer=none"
    )
    assert status == 1
    (row,) = results["rows"]
    assert row["rivals"]["msda"]["refused"].startswith("output must differ by at most 1.0e-05")
    assert "cold_ms" not in row["rivals"]["grid_sample"]
    assert "refused: msda: output must differ" in capsys.readouterr().out


def test_bench_refuses_a_rival_that_is_wrong_in_one_dtype_only(tmp_path, monkeypatch):
    def core(inputs):
        if inputs.value.dtype == torch.float16:
            raise RuntimeError("half is not implemented")
        return baselines.grid_sample_core(inputs)

    monkeypatch.setattr(
        bench_gpu, "find_peers", lambda *_: ([peers.Peer("half", "compiled", core, None)], {})
    )
    status, results = bench(tmp_path, "--workload=rf-detr", "--direction=forward")
    refused = {row["dtype"]: row["rivals"]["half"].get("refused") for row in results["rows"]}
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
    names, dtypes = list(workloads.GPU_WORKLOADS), list(bench_gpu.DTYPES)
    steps = list(bench_gpu.plan(names, dtypes, list(bench_gpu.DIRECTIONS)))
    first = [(name, ["float32", "float16"]) for name in bench_gpu.MAIN_WORKLOADS]
    assert [step[:2] for step in steps[:6]] == first * 2
    assert [step[2] for step in steps[:3]] == [["backward", "forward"]] * 3
    assert [step[2] for step in steps[3:6]] == [["fused backward", "fused forward"]] * 3
    every = [(n, dtype, d) for n, some, directions in steps for dtype in some for d in directions]
    assert len(every) == len(set(every)) == len(names) * len(dtypes) * 4
    assert list(bench_gpu.plan(["rt-detr"], ["bfloat16"], ["forward"])) == [
        ("rt-detr", ["bfloat16"], ["forward"])
    ]


def test_every_workload_is_real_and_shrinks():
    for workload in workloads.GPU_WORKLOADS.values():
        assert workload.source
        tiny = workload.tiny()
        inputs = tiny.plain(torch.float32)
        assert inputs.value.shape[2:] == (
            workload.sizes.get("num_heads", 8),
            workload.sizes.get("head_dim", 32),
        )
        if workload.has_fused:
            assert tiny.fused(torch.float16).value.dtype == torch.float16


def test_ceilings_are_taken_from_the_micro_benchmarks_of_the_same_device(tmp_path):
    path = tmp_path / "cuda_micro.json"
    rows = [
        {"name": "dram.copy", "bytes_per_second": 3e12, "verified": True},
        {"name": "l2.read", "bytes_per_second": 5e12, "verified": False},
    ]
    records.write_json(path, {"machine": {"device": "GPU A"}, "measurements": rows})
    assert bench_gpu.read_micro(path, "GPU A") == {"dram.copy": 3e12}
    assert bench_gpu.read_micro(path, "GPU B") == {}
    assert bench_gpu.read_micro(tmp_path / "none.json", "GPU A") == {}


# ---- every form ----------------------------------------------------------------------------------


def test_some_forms_run_and_the_first_is_the_encoder():
    every = list(every_form.cases())
    assert every[0].name == "encoder"
    for case in every[:2]:
        assert every_form.check(case, torch.float32, "cpu") is None


def test_a_wrong_form_is_named(monkeypatch):
    right = every_form.call
    monkeypatch.setattr(every_form, "call", lambda *arguments: right(*arguments) * 1.01)
    case = next(every_form.cases())
    assert every_form.check(case, torch.float32, "cpu").startswith("output must differ by at most")


# ---- processes -----------------------------------------------------------------------------------


def test_a_command_past_its_limit_is_ended_with_its_children():
    sleep = "import subprocess, sys; subprocess.run([sys.executable, '-c', {!r}])"
    command = [sys.executable, "-c", sleep.format("import time; time.sleep(60)")]
    start = time.monotonic()
    with gpu.started(command, 1, stdout=subprocess.PIPE) as child:
        child.process.stdout.read()  # ends when nobody is left who could write
    assert child.cut_off
    assert time.monotonic() - start < 20
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.5) is None
    assert gpu.run([sys.executable, "-c", "raise SystemExit(3)"], 20) == 3


def test_the_parts_are_run_one_by_one_and_only_bench_gets_what_is_its_own(monkeypatch):
    commands = []
    monkeypatch.setattr(gpu, "run", lambda command, limit, **_: commands.append(command) or 0)
    options, extra = gpu.parse(["all", "--device=cpu", "--minutes", "2", "--seconds", "2"])
    assert gpu.run_all(options, extra) == 0
    assert [command[2] for command in commands] == list(gpu.PARTS)
    for command in commands:
        assert command[3:7] == ["--device", "cpu", "--minutes", "2.0"]
        assert command[7:] == (["--seconds", "2"] if command[2] == "bench" else [])


# A test that passed, under a name that pytest's plugin would write.
FAKE_OUTCOMES = [{"selected": 1}, {"test": "a", "outcome": "passed", "seconds": 1, "message": ""}]


def test_one_call_runs_every_part_to_its_end_on_a_device_that_is_faked(
    tmp_path, peer_file, peers_in_this_process, monkeypatch, capsys
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(gpu, "head", lambda options: {"machine": {"device": "Fake GPU"}})
    tools = {
        "nvcc": "/usr/local/cuda/bin/nvcc",
        "compute-sanitizer": str(tmp_path / "compute-sanitizer"),
        "ncu": script(tmp_path / "ncu", PROFILE),
    }
    fake = dict(python=sys.executable, errors=0, seconds=0, outcome="right")
    (tmp_path / "compute-sanitizer").write_text(FAKE_SANITIZER.format(**fake))
    (tmp_path / "compute-sanitizer").chmod(0o755)
    monkeypatch.setattr(gpu, "find_tool", tools.get)
    programs = {"micro": MICRO, "orders": ORDERS, "planted_faults": []}
    commands = []
    truly_run = gpu.run

    def run(command, limit, env=None, **options):
        """As on a machine with a GPU, where other programs do what is theirs."""
        assert 0 < limit <= 60 * 2 + gpu.GRACE
        commands.append(command)
        if command[0] == tools["nvcc"]:
            assert command[3] == "-arch=sm_90"
            target = Path(command[command.index("-o") + 1])
            script(target, "\n".join(map(json.dumps, programs[target.name])))
        elif command[1:2] == [gpu.__file__]:
            monkeypatch.setattr(sys, "argv", command[1:])
            return gpu.main()
        elif "pytest" in command:
            Path(env["MSDA_OUTCOMES"]).write_text("\n".join(map(json.dumps, FAKE_OUTCOMES)))
        elif command[0] == tools["compute-sanitizer"]:
            return truly_run(command, limit)
        else:
            assert command[1:3] in (["-m", "pip"], ["-m", "msda.info"]) or "--brief" in command
        return 0

    monkeypatch.setattr(gpu, "run", run)
    on_device = bench_gpu.run

    def bench_on_cpu(options, folder):
        options.device = "cpu"
        options.workload, options.dtype = ["decoder-300"], ["float32"]
        return on_device(options, folder)

    monkeypatch.setattr(bench_gpu, "run", bench_on_cpu)
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    peer = peer_file("original", ORIGINAL + RETURNS)
    arguments = ["gpu.py", "all", "--smoke", "--minutes=2", f"--results={tmp_path}"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"--peer=original={peer}"])
    assert gpu.main() == 0
    assert "gpu: all parts ended well" in capsys.readouterr().out
    parts = [command[2] for command in commands if command[1:2] == [gpu.__file__]]
    assert parts == ["build", "test", "bench", "micro", "orders", "sanitize"]
    results = {path.name: json.loads(path.read_text()) for path in tmp_path.glob("cuda_*.json")}
    assert results["cuda_tests.json"]["passed"] > 0
    assert len(results["cuda_operator.json"]["rows"]) == 4
    assert results["cuda_operator.json"]["peers"] == {"original": "compiled"}
    assert results["cuda_micro.json"]["measurements"] == MICRO[1:]
    assert results["cuda_orders.json"]["profiler"] == "counted"
    assert {tool["status"] for tool in results["cuda_sanitizer.json"]["tools"].values()} == {
        "clean"
    }


def test_nothing_is_run_after_a_failed_build(monkeypatch, capsys):
    parts = []
    monkeypatch.setattr(gpu, "run", lambda command, limit, **_: parts.append(command[2]) or 1)
    assert gpu.run_all(*gpu.parse(["all", "--device=cpu"])) == 1
    assert parts == ["build"]
    assert "build failed" in capsys.readouterr().out


def test_the_build_is_for_the_present_gpu_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    told = gpu.build_environment("cuda", "9.0")
    assert told["MSDA_CUDA"] == "1"
    assert told["TORCH_CUDA_ARCH_LIST"] == "9.0"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert "TORCH_CUDA_ARCH_LIST" not in gpu.build_environment("cuda", "9.0")
    assert gpu.build_environment("cpu", "")["MSDA_CUDA"] == "0"


def test_results_to_commit_are_those_of_a_whole_part(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")

    def folder(*arguments):
        return gpu.results_folder(gpu.parse(list(arguments))[0]).relative_to(gpu.ROOT)

    committed = Path("benchmarks/results/nvidia-h100-80gb-hbm3")
    assert folder("bench") == folder("test") == folder("bench", "--seconds=1") == committed
    for arguments in (
        ("bench", "--dtype=float32"),
        ("test", "--smoke"),
        ("sanitize", "--device=cpu"),
    ):
        assert folder(*arguments) == Path("out/gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_so():
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "micro"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: a CUDA device must be present")


# ---- test ----------------------------------------------------------------------------------------


def test_outcomes_are_written_as_they_come_and_summed_up(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'one is not two'\n"
        "def test_left_out(): pytest.skip('no need')\n"
        "def test_fatal(): os._exit(3)\n"
        "def test_never_reached(): pass\n"
    )
    log = tmp_path / "outcomes.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "outcomes", "-p", "no:cacheprovider"]
    environment = os.environ | {"MSDA_OUTCOMES": str(log), "PYTHONPATH": str(BENCHMARKS)}
    status = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True).returncode
    outcomes = gpu.read_outcomes(log)
    assert status == 3
    assert outcomes["selected"] == 5
    assert [outcomes[name] for name in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failure,) = outcomes["failures"]
    assert failure["test"].endswith("::test_bad")
    assert "one is not two" in failure["message"]
    assert outcomes["skips"] == {"no need": 1}


def run_tests(monkeypatch, folder, status, *outcomes):
    """gpu.test with a pytest that ends with ``status`` after writing these lines."""

    def fake_run(command, limit, env):
        assert env["MSDA_BACKEND"] == "native"
        Path(env["MSDA_OUTCOMES"]).write_text("".join(json.dumps(line) + "\n" for line in outcomes))
        return status

    monkeypatch.setattr(gpu, "run", fake_run)
    options, _ = gpu.parse(["test", "--device=cpu", "--smoke", f"--results={folder}"])
    code = gpu.test(options)
    return code, json.loads((folder / "cuda_tests.json").read_text())


PASSED = {"test": "a", "outcome": "passed", "seconds": 1, "message": ""}


def test_the_test_part_passes_only_where_something_passed(monkeypatch, tmp_path):
    code, results = run_tests(monkeypatch, tmp_path, 0, {"selected": 1}, PASSED)
    assert (code, results["passed"], results["not_run"]) == (0, 1, [])
    skipped = PASSED | {"outcome": "skipped", "message": "Skipped: there is no CUDA device"}
    code, results = run_tests(monkeypatch, tmp_path, 0, {"selected": 1}, skipped)
    assert (code, results["skips"]) == (1, {"there is no CUDA device": 1})


def test_tests_that_were_cut_off_are_counted(monkeypatch, tmp_path, capsys):
    code, results = run_tests(monkeypatch, tmp_path, None, {"selected": 3}, PASSED)
    assert code == 1
    assert results["passed"] == 1
    message = "test_reference.py: 2 of 3 tests, pytest ended with cut off"
    assert results["not_run"] == [message]
    assert f"not run: {message}" in capsys.readouterr().out
    failed = PASSED | {"outcome": "failed", "message": "wrong"}  # and the rest not tried
    _, results = run_tests(monkeypatch, tmp_path, 1, {"selected": 3}, failed)
    assert results["not_run"] == ["test_reference.py: 2 of 3 tests, pytest ended with 1"]


def test_the_tests_of_the_operator_come_first():
    names = [path.name for path in gpu.test_files()]
    assert names[:2] == ["test_forward.py", "test_backward.py"]
    assert len(names) == len(set(names))
    assert "test_gpu_tools.py" not in names
    assert not any(name.startswith("test_cuda_") for name in names)


# ---- sanitize ------------------------------------------------------------------------------------


def test_a_missing_sanitizer_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    options, _ = gpu.parse(["sanitize", f"--results={tmp_path}", "--device=cpu"])
    assert gpu.sanitize(options) == 0
    message = capsys.readouterr().out
    assert message.startswith("sanitize: skipped: compute-sanitizer must be on PATH")
    results = json.loads((tmp_path / "cuda_sanitizer.json").read_text())
    assert results["skipped"] in message
    assert results["tools"] == {}


def test_logs_of_the_sanitizer_are_read():
    assert gpu.read_sanitizer_log("========= ERROR SUMMARY: 0 errors\n") == 0
    assert gpu.read_sanitizer_log("========= ERROR SUMMARY: 12 errors\n") == 12
    races = "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors, 0 warnings)\n"
    assert gpu.read_sanitizer_log(races) == 3
    assert (
        gpu.read_sanitizer_log("========= Internal Sanitizer Error: Device not supported") is None
    )


def test_only_our_kernels_are_watched_but_for_what_others_wrote():
    def command(tool, help_text):
        return gpu.sanitizer_command("compute-sanitizer", tool, Path("log"), help_text)

    assert command("racecheck", "--kernel-regex")[-2:] == ["--kernel-regex", "kns=msda"]
    assert command("synccheck", "--kernel-name --kernel-regex")[-2] == "--kernel-name"
    assert command("memcheck", "--kernel-name")[-1] == "kns=msda"
    assert "kns=msda" not in command("initcheck", "--kernel-name")
    assert "kns=msda" not in command("racecheck", "an older one")


# What our log would say; then what the program prints; then how it ends.
FAKE_SANITIZER = """#!{python}
import sys, time
log = sys.argv[sys.argv.index("--log-file") + 1]
planted = sys.argv[-1] in ("memcheck", "racecheck")
open(log, "w").write("========= ERROR SUMMARY: %d errors\\n" % (1 if planted else {errors}))
if not planted:
    print("3 cases\\ncase 1: float32, a: right\\ncase 2: float32, b: {outcome}", flush=True)
    time.sleep({seconds})
sys.exit(9 if planted or {errors} else 0)
"""


@pytest.mark.parametrize(
    ("errors", "seconds", "status"), [(0, 0, "clean"), (4, 0, "errors"), (0, 60, "cut off")]
)
def test_the_sanitizer_is_tried_on_a_fault_and_then_believed(tmp_path, errors, seconds, status):
    sanitizer = tmp_path / "compute-sanitizer"
    fake = dict(python=sys.executable, errors=errors, seconds=seconds, outcome="right")
    sanitizer.write_text(FAKE_SANITIZER.format(**fake))
    sanitizer.chmod(0o755)
    options, _ = gpu.parse(["sanitize", "--device=cpu", f"--results={tmp_path}"])
    seen = gpu.watch(str(sanitizer), "memcheck", tmp_path / "planted", "", 2, options)
    assert seen["finds_planted_fault"] is True
    assert (seen["status"], seen["cases"], seen["all_cases"]) == (status, 2, 3)
    assert seen["errors"] == errors
    # The log is kept where it says something.
    assert (tmp_path / "sanitizer-memcheck.log").exists() == (status != "clean")


# ---- micro ---------------------------------------------------------------------------------------

MICRO = [
    {"device": "GPU", "multiprocessors": 100, "clock_hz": 1e9},
    {
        "name": "dram.copy",
        "ms": 0.5,
        "bytes_per_second": 3e12,
        "rows_per_second": 1e9,
        "verified": True,
    },
    {"name": "red.v4.f32.hot", "skipped": "vector reductions need compute capability 9.0, got 8.0"},
]


@pytest.mark.parametrize("status", [0, 1])
def test_measurements_are_kept_however_the_program_ends(tmp_path, status, capsys):
    program = f"import sys\nprint('''{chr(10).join(map(json.dumps, MICRO))}''')\nsys.exit({status})"
    options, _ = gpu.parse(["micro", "--device=cpu", f"--results={tmp_path}"])
    options.program = [sys.executable, "-c", program]
    assert gpu.micro(options) == status
    results = json.loads((tmp_path / "cuda_micro.json").read_text())
    assert results["program_device"] == MICRO[0]
    assert results["measurements"] == MICRO[1:]
    text = capsys.readouterr().out
    assert "3.000 TB/s" in text
    assert "30.0 B/clk/SM" in text
    assert "skipped: vector reductions need" in text


ORDER = {"name": "encoder-2.float32.forward", "ms": 2.0, "verified": True}
ORDERS = [
    MICRO[0],
    ORDER | {"tile_heads": 0, "split": 0},
    ORDER | {"tile_heads": 2, "split": 1, "ms": 3.0},
    ORDER | {"tile_heads": 4, "split": 1, "ms": 1.0, "verified": False},
]
# Nsight Compute: what it prints first, then a line for each metric of each launch.
PROFILE = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","1,000"
"0","7","forward_kernel","smsp__inst_executed.sum","inst","10"
"1","7","forward_kernel","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","2,500"
"1","7","forward_kernel","smsp__inst_executed.sum","inst","20"
"2","7","forward_kernel","smsp__inst_executed.sum","inst","30"
"""
REFUSED = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access counters\n"


def script(path, text):
    """An executable Python program that prints ``text``."""
    path.write_text(f"#!{sys.executable}\nprint({text!r})\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("profiler", "said"),
    [(PROFILE, "counted"), (REFUSED, REFUSED.strip()), (None, "ncu was not found")],
    ids=["counted", "refused", "none"],
)
def test_orders_are_timed_and_counted_where_there_is_a_profiler(
    tmp_path, profiler, said, monkeypatch, capsys
):
    ncu = profiler and script(tmp_path / "ncu", profiler)
    monkeypatch.setattr(gpu, "find_tool", lambda name: ncu)
    options, _ = gpu.parse(["orders", "--device=cpu", f"--results={tmp_path}"])
    options.program = [script(tmp_path / "orders", "\n".join(map(json.dumps, ORDERS)))]
    assert gpu.orders(options) == 0
    results = json.loads((tmp_path / "cuda_orders.json").read_text())
    assert results["profiler"] == said
    counted = [row.pop("counted", {}) for row in results["measurements"]]
    assert results["measurements"] == ORDERS[1:]
    assert [row.get("instructions") for row in counted] == (
        [10, 20, 30] if profiler == PROFILE else [None] * 3
    )
    assert counted[1].get("l1_load_sectors") == (2500 if profiler == PROFILE else None)
    text = capsys.readouterr().out
    assert "heads       2  split       1    3.0000 ms   1.50x" in text
    assert "0.50x  WRONG RESULT" in text


ARCHITECTURES = ("75", "80", "90", "100", "120")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", ["micro.cu", "orders.cu", "planted_faults.cu"])
def test_programs_compile_without_a_warning(tmp_path, source):
    known = subprocess.run(["nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout
    # orders.cu holds our own kernels, which take minutes and are compiled for all elsewhere.
    wanted = ARCHITECTURES if source != "orders.cu" else ("90",)
    chosen = [name for name in wanted if f"compute_{name}" in known]
    assert "90" in chosen
    targets = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in chosen]
    command = ["nvcc", "-std=c++17", "-Werror", "all-warnings", "--threads", "0", *targets]
    program = tmp_path / "program"
    done = subprocess.run(
        [*command, "-o", str(program), str(BENCHMARKS / source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if not torch.cuda.is_available():
        ran = subprocess.run([program], capture_output=True, text=True)
        assert ran.returncode == 2
        assert "a CUDA device must be present, got none" in ran.stderr


# ---- report --------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Pages with markers, and no results yet."""
    (tmp_path / "docs").mkdir()
    for page, tables in report.PAGES.items():
        blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in tables]
        (tmp_path / page).write_text("between\n".join(blocks))
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def write_report(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *arguments])
    return report.main()


def gpu_results(folder, **changes):
    def row(direction, dtype, milliseconds):
        ours = {"cold_ms": milliseconds, "warm_ms": 0.1, "ratio": 1.0, "extra_bytes": 45_500_000}
        rivals = {"msda": ours, "peer": {"ratio": 6.25}, "late": {"refused": "half"}}
        return {
            "workload": "encoder-2",
            "direction": direction,
            "dtype": dtype,
            "floor": {"over_floor": 1.5},
            "rivals": rivals,
        }

    machine = dict(device="Some GPU", driver="580", cuda="13.0", torch="2.11", msda="0.1.0")
    results = {
        "machine": machine | {"commit": "abc1234"},
        "command": "python benchmarks/gpu.py bench",
        "smoke": False,
        "ceilings": {"dram_bytes_per_second": 3.0e12},
        "rows": [row("forward", "float32", 0.1504), row("forward", "float16", 0.0041)],
    }
    records.write_json(folder / "cuda_operator.json", results | changes)


def test_without_results_the_report_says_so_in_one_sentence(repository, monkeypatch):
    assert write_report(monkeypatch, "--check") == 1
    assert write_report(monkeypatch) == 0
    text = (repository / "README.md").read_text()
    assert f"<!-- gpu:begin -->\n{report.NO_GPU_FIGURE}\n<!-- gpu:end -->" in text
    assert report.NO_GPU_FIGURE.startswith("No GPU figure exists yet")
    assert report.NO_GPU_FIGURE.count(".") == 1
    assert write_report(monkeypatch, "--check") == 0


def test_the_report_writes_a_line_per_workload_and_direction(repository, monkeypatch):
    folder = repository / "benchmarks" / "results" / "some-gpu"
    gpu_results(folder)
    tests = {"passed": 1600, "failed": 0, "skipped": 3, "not_run": []}
    records.write_json(folder / "cuda_tests.json", {"machine": {"commit": "abc1234"}} | tests)
    tools = {"memcheck": {"status": "clean", "errors": 0}}
    records.write_json(
        folder / "cuda_sanitizer.json", {"machine": {"commit": "abc1234"}, "tools": tools}
    )
    write_report(monkeypatch)
    text = (repository / "README.md").read_text()
    assert "Some GPU, driver 580, CUDA 13.0, torch 2.11, msda 0.1.0 at abc1234" in text
    assert "`benchmarks/results/some-gpu/cuda_operator.json`" in text
    assert "| workload | direction | msda, ms | times the floor | peer | extra memory, MB |" in text
    cells = "0.15 / 0.0041 | 1.5 / 1.5 | 6.2x / 6.2x | 45.5 / 45.5"
    assert f"| encoder-2 | forward | {cells} |" in text
    assert "1600 passed, 0 failed, 3 skipped." in text
    assert "memcheck clean, 0 errors." in text
    assert "between" in text
    assert write_report(monkeypatch, "--check") == 0
    assert report.NO_GPU_FIGURE not in text


@pytest.mark.parametrize("changes", [{"smoke": True}, {"machine": {"device": "cpu"}}])
def test_a_trial_of_the_harness_is_not_reported(repository, changes):
    gpu_results(repository / "benchmarks" / "results" / "trial", **changes)
    assert report.gpu_table() == report.NO_GPU_FIGURE


def test_wrong_results_of_ours_are_not_hidden(repository):
    folder = repository / "benchmarks" / "results" / "some-gpu"
    gpu_results(folder)
    results = json.loads((folder / "cuda_operator.json").read_text())
    results["rows"][1]["rivals"]["msda"] = {"refused": "output must differ by at most 1, got 2"}
    records.write_json(folder / "cuda_operator.json", results)
    text = report.gpu_table()
    assert "| encoder-2 | forward | 0.15 / - | 1.5 / - | 6.2x / - | 45.5 / - |" in text
    assert text.endswith("1 results of ours were wrong and are not shown.")


# ---- records -------------------------------------------------------------------------------------


def test_a_table_line_is_as_wide_as_told():
    assert records.table_line(["ab", "1", "2"], [-4, 3, 3]) == "ab    1  2"


def test_results_replace_earlier_ones_whole(tmp_path):
    path = tmp_path / "new folder" / "results.json"
    records.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_deadline_counts_down():
    assert records.Deadline(1).allows(59)
    assert not records.Deadline(1).allows(61)
    assert records.Deadline(0).left() == 0
