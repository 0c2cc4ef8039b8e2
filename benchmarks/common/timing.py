"""Calls to time, timers, and peak memory.

Times are seconds. Sides are timed in turn in one process, so that whatever slows the machine slows
all of them; what is recorded are medians with their quartiles, and ratios of medians.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.common.accuracy import GRADIENTS, Core
from msda.testing import FusedInputs, Inputs, leaves, random_like_output

Run = Callable[[], object]

# ---- calls to time -------------------------------------------------------------------------------


def forward_of(core: Core, inputs: Inputs | FusedInputs) -> Run:
    """One forward call without autograd."""

    def run() -> Tensor:
        with torch.no_grad():
            return core(inputs)

    return run


def backward_of(core: Core, inputs: Inputs | FusedInputs) -> Run:
    """One backward call alone: all gradients (``accuracy.GRADIENTS``) of a graph that is kept."""
    names = GRADIENTS[type(inputs)]
    inputs = leaves(inputs, names)
    output = core(inputs)
    grad_output = random_like_output(inputs).to(output.dtype)
    tensors = [getattr(inputs, name) for name in names]
    return lambda: torch.autograd.grad(output, tensors, grad_output, retain_graph=True)


def call_of(direction: str, core: Core, inputs: Inputs | FusedInputs) -> Run:
    """The call of a direction: one that ends in "backward", or a forward one."""
    return (backward_of if direction.endswith("backward") else forward_of)(core, inputs)


# ---- timing --------------------------------------------------------------------------------------


def seconds(run: Run) -> float:
    """One call by the host's clock: for work on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Timer(Protocol):
    """Times one call on a device."""

    def lead(self, run: Run) -> float:
        """Warm a call up; seconds by which the host must be ahead for the device not to wait."""

    def __call__(self, run: Run, *, cold: bool, lead: float) -> float:
        """Seconds that the device works on one call; cold: with its caches emptied before."""

    def per_call(self, run: Run, calls: int) -> float:
        """Seconds from call to call where the host makes many in a row."""


class CpuTimer:
    """The host's clock; caches are left as they are."""

    def lead(self, run: Run) -> float:
        """See :class:`Timer`."""
        run()
        return 0.0

    def __call__(self, run: Run, *, cold: bool = False, lead: float = 0.0) -> float:
        """See :class:`Timer`."""
        return seconds(run)

    def per_call(self, run: Run, calls: int) -> float:
        """See :class:`Timer`."""
        return seconds(lambda: [run() for _ in range(calls)]) / calls


class SettledTimer(CpuTimer):
    """Times a short call after one that is not timed.

    Each side has threads of its own. Those of the last one may still be waiting busily for more,
    and the caches hold its memory.
    """

    SHORT = 0.1  # seconds; what the threads of one side leave to the next is over long before

    def lead(self, run: Run) -> float:
        """How long the call takes, by which it counts as short; see :class:`Timer`."""
        run()
        return seconds(run)

    def settle(self, run: Run, lead: float) -> None:
        """Make the call that is not timed, where a call is short."""
        if lead < self.SHORT:
            run()

    def __call__(self, run: Run, *, cold: bool = False, lead: float = 0.0) -> float:
        """See :class:`Timer`."""
        self.settle(run, lead)
        return seconds(run)


class CudaTimer:
    """Events around a call, on the current stream.

    The GPU is kept busy until the host has enqueued the whole call, so that what is timed is the
    GPU's work and not its waiting for the host (which :meth:`per_call` shows).
    """

    FLUSHED_L2S = 3  # what is written and read to empty the L2 cache, in sizes of that cache

    def __init__(self) -> None:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        words = self.FLUSHED_L2S * properties.L2_cache_size // 4
        self.flushed = torch.empty(words, dtype=torch.int32, device="cuda")
        cycles = 20_000_000
        for _ in range(2):  # the first raises the clock
            elapsed = self._events(lambda: torch.cuda._sleep(cycles))
        self.clock_hz = cycles / elapsed  # of the multiprocessors

    def _events(self, run: Run) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    def lead(self, run: Run) -> float:
        """See :class:`Timer`."""
        times = []
        for _ in range(4):
            torch.cuda.synchronize()
            times.append(seconds(run))
        torch.cuda.synchronize()
        return 1.5 * max(times[1:]) + 30e-6

    def __call__(self, run: Run, *, cold: bool, lead: float) -> float:
        """See :class:`Timer`."""
        if cold:
            # Read after writing: the cache is left full of clean lines. Dirty ones would be written
            # back at the expense of the call.
            self.flushed.fill_(1)
            self.flushed.sum()
        else:
            run()
        torch.cuda._sleep(int(lead * self.clock_hz))
        return self._events(run)

    def per_call(self, run: Run, calls: int) -> float:
        """See :class:`Timer`."""
        run()
        torch.cuda.synchronize()

        def many() -> None:
            for _ in range(calls):
                run()
            torch.cuda.synchronize()

        return seconds(many) / calls


def make_timer(device: str) -> Timer:
    """The timer of a device type."""
    return CudaTimer() if device == "cuda" else CpuTimer()


def take_turns(
    timer: Timer, runs: Mapping[str, Run], *, budget: float, cold: bool = False, least: int = 5
) -> dict[str, list[float]]:
    """Time every call in turn, for about ``budget`` seconds: ``least`` to 30 rounds."""
    leads = {name: timer.lead(run) for name, run in runs.items()}

    def one_round() -> dict[str, float]:
        return {name: timer(run, cold=cold, lead=leads[name]) for name, run in runs.items()}

    rounds = int(budget / max(seconds(one_round), 1e-9))
    times = [one_round() for _ in range(max(least, min(30, rounds)))]
    return {name: [one[name] for one in times] for name in runs}


def median(samples: Sequence[float]) -> float:
    """The median, whose share of outliers may be half."""
    return statistics.median(samples)


def quartiles(samples: Sequence[float]) -> list[float]:
    """The lower and the upper quartile: how far single calls lie apart."""
    if len(samples) < 2:
        return [samples[0], samples[0]]
    lower, _, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return [lower, upper]


def summary(samples: Sequence[float], prefix: str = "") -> dict[str, Any]:
    """What a record holds of times: median and quartiles in milliseconds, and their number."""
    return {
        f"{prefix}ms": median(samples) * 1e3,
        f"{prefix}quartiles_ms": [quartile * 1e3 for quartile in quartiles(samples)],
        f"{prefix}rounds": len(samples),
    }


# ---- memory --------------------------------------------------------------------------------------


@contextlib.contextmanager
def silent_stderr() -> Iterator[None]:
    """Keep native code from writing to stderr: torch's profiler reports its starts and stops."""
    saved = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def peak_extra_memory(run: Run, device: str = "cpu") -> int:
    """The most bytes that torch held at once during a call, beyond those held before."""
    if device == "cuda":
        run()  # what is allocated once and kept is not the call's
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    profiler = torch.profiler.profile(activities=activities, profile_memory=True)
    with silent_stderr(), profiler as profile:
        result = run()  # kept alive: outputs count
    del result
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
