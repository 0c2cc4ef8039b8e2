"""How long threads wait busily: to be imported before torch, which reads it when it is loaded.

The threads of an operation wait for each other at its end, and the next operation is mostly a
matter of microseconds. So they spin, for milliseconds, before they sleep. On a machine with others
at work, a thread spins away the time that the one it waits for would need: training lost most of
its share.
"""

from __future__ import annotations

import os
import sys
import time

# Turns of the loop, of GNU's OpenMP, whose own number is some 300 000. The first costs up to a
# fifth on an idle machine; the second up to a quarter there, but keeps several times more of a
# machine that others use as well (docs/benchmarks.md).
SPINS_ALONE, SPINS_AMONG_OTHERS = 10_000, 1_000
_CHOSEN_BY_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
_LOOK = 0.2  # seconds
_BUSY = 0.25  # of our processors: more than a machine has to do that has nothing to do


def set_spinning() -> None:
    """Let threads spin as it suits the machine now; what the user has set stays."""
    if "torch" in sys.modules or any(name in os.environ for name in _CHOSEN_BY_USER):
        return
    spins = SPINS_AMONG_OTHERS if share_in_use() > _BUSY else SPINS_ALONE
    os.environ["GOMP_SPINCOUNT"] = str(spins)


def share_in_use() -> float:
    """The part of this process's processors that others use; 0 where the system does not tell."""
    before = _ticks()
    time.sleep(_LOOK)
    busy, total = (after - first for first, after in zip(before, _ticks(), strict=True))
    return busy / total if total else 0.0


def _ticks() -> tuple[int, int]:
    """Time that the processors of this process have been busy, and all their time."""
    try:
        names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with open("/proc/stat") as file:
            lines = [line.split() for line in file if line.startswith("cpu")]
    except (OSError, AttributeError):  # not Linux
        return 0, 0
    # user, nice, system, idle, waiting for input and output, ...
    rows = [[int(number) for number in numbers[:8]] for name, *numbers in lines if name in names]
    total = sum(map(sum, rows))
    return total - sum(row[3] + row[4] for row in rows), total


set_spinning()
