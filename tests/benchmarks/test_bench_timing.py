"""Timers, medians and memory; those of a GPU on a device that is played."""

import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import harness, machine, timing
from benchmarks.gpu import operator as gpu_operator
from msda.testing import grid_sample_core, make_inputs

SMALL = [(5, 7), (3, 4)]


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Tiny problems: threads would only wait for each other."""
    set_threads(1)


def test_sides_take_turns():
    order = []
    runs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    times = timing.take_turns(timing.CpuTimer(), runs, budget=0, least=3)
    assert [len(samples) for samples in times.values()] == [3, 3]
    assert "".join(order) == "ab" * (len(order) // 2)


def test_a_slow_call_is_repeated_less_often_than_a_fast_one():
    fast = timing.take_turns(timing.CpuTimer(), {"": lambda: None}, budget=0.01)
    slow = {"": lambda: time.sleep(0.002)}
    slow = timing.take_turns(timing.CpuTimer(), slow, budget=0.01, least=1)
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
    timer = timing.CudaTimer()
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
    assert timing.peak_extra_memory(lambda: fake_device.append("call"), "cuda") == 250
    assert fake_device == ["call", "wait", "reset", "call", "wait"]


def test_a_gpu_is_described(fake_device, monkeypatch):
    monkeypatch.setattr(machine, "output_of", lambda *command: "")
    monkeypatch.setenv("MSDA_COMMIT", "abc1234")
    about = machine.describe_machine("cuda")
    assert about["device"] == "Fake GPU"
    assert about["capability"] == "9.0"
    assert about["driver"] == "unknown"
    assert about["commit"] == "abc1234"


def test_medians_and_quartiles():
    assert timing.median([3, 1, 100]) == 3
    assert timing.quartiles([1, 2, 3, 4, 5]) == [2, 4]
    assert timing.quartiles([7]) == [7, 7]
    of_calls = {"cold_ms": 3e3, "cold_quartiles_ms": [2e3, 4e3], "cold_rounds": 5}
    assert timing.summary([1, 2, 3, 4, 5], "cold_") == of_calls


def test_peak_memory_counts_what_a_call_allocates():
    assert timing.peak_extra_memory(lambda: torch.empty(1000)) >= 4000


def test_backward_is_timed_alone_and_gives_all_gradients():
    calls = []

    def core(inputs):
        calls.append(inputs)
        return grid_sample_core(inputs)

    inputs = make_inputs(SMALL, num_queries=3)
    run = timing.backward_of(core, inputs)
    gradients = run()
    run()
    assert len(calls) == 1
    assert [gradient.shape for gradient in gradients] == [t.shape for t in inputs.tensors()]


def test_a_short_call_is_timed_after_one_that_is_not():
    called = []

    def run():
        called.append(None)
        time.sleep(0.01)

    timer = timing.SettledTimer()
    assert timer.lead(run) >= 0.01
    for lead, calls in ((0.01, 2), (timing.SettledTimer.SHORT, 1)):
        called.clear()
        assert timer(run, lead=lead) >= 0.01
        assert len(called) == calls


def test_ceilings_of_a_gpu(fake_device, tmp_path):
    path = tmp_path / "cuda_micro.json"
    rows = [{"name": "dram.copy", "bytes_per_second": 3e12, "verified": True}]
    harness.write_json(path, {"machine": {"device": "Fake GPU"}, "measurements": rows})
    ceilings = gpu_operator.ceilings_of("cuda", timing.CudaTimer(), path, quick=False)
    assert ceilings.dram_bytes_per_second == 3e12
    assert ceilings.dram_source == "cuda_micro.json"
    assert (ceilings.multiprocessors, ceilings.clock_hz) == (132, 20e9)
