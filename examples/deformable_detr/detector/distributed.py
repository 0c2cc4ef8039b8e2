"""The processes that train together: started by torchrun, or one alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def joined(device: str) -> Iterator[torch.device]:
    """Join the other processes that torchrun started, if it did; give this one's device.

    Args:
        device: cpu, cuda, cuda:1 ...; empty: CUDA where there is a device.

    Raises:
        SystemExit: there is no such device here.
    """
    together = "LOCAL_RANK" in os.environ
    chosen = _device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if together:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield chosen
    finally:
        if together:
            dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    """The device that is asked for, CUDA devices with their index: this process's unless given."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise SystemExit(f"error: device must be cpu, cuda or cuda:INDEX, got {name!r}") from error
    if device.type != "cuda":
        return device
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise SystemExit(
            f"error: device must be one that torch sees ({torch.cuda.device_count()} of CUDA), "
            f"got cuda:{index}"
        )
    return torch.device("cuda", index)


def rank() -> int:
    """Number of this process, 0 for the one that logs and saves."""
    return dist.get_rank() if dist.is_initialized() else 0


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest_of(numbers: list[int], device: torch.device) -> list[int]:
    """For each number, the largest of all processes: they must stop, or save, at the same step."""
    if not dist.is_initialized():
        return numbers
    largest = torch.tensor(numbers, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def gather(value: Any) -> list[Any]:
    """The ``value`` of every process, in each of them."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def is_running(process: str) -> bool:
    """Whether a process of this number runs on this machine."""
    if os.name != "posix" or not process.isdecimal():
        return True  # who knows
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


class StopSignals:
    """Within it, Ctrl-C and SIGTERM only take note, so that the step ends and is saved.

    A second one interrupts at once, as does the first where ``at_once`` is set.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.at_once = False

    def __enter__(self) -> StopSignals:
        self._before = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, signal.Signals(number)
        # torchrun passes on what its processes got from the terminal already: no second wish.
        if self.at_once or (not first and count() == 1):
            self.at_once = False
            raise KeyboardInterrupt
        if first and rank() == 0:
            # Not print: the signal may have come in the middle of one.
            os.write(2, b"\nStopping after this step; once more to stop at once.\n")


STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_held_back() -> Iterator[None]:
    """Within it, Ctrl-C and SIGTERM wait, here and in the processes that are started.

    Those would otherwise be ended by one that comes before they leave the group.
    """
    if os.name != "posix":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_signals_to_parent(worker: int) -> None:
    """Keep Ctrl-C and the like, which go to the whole group, from a process that loads images.

    Without this the step could not be finished: its images would be missing. What ends such a
    process is the end of the one that trains.
    """
    if os.name != "posix":
        return
    os.setpgid(0, 0)
    if hasattr(signal, "sigtimedwait"):  # not on macOS
        while signal.sigtimedwait(STOP_SIGNALS, 0):
            pass  # what was held back
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
