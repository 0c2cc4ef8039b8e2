"""What calls.py and hostile.py share: they try cases by seeds, with the options of kernels_fuzz."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

MOST_FAILURES = 20


class Wrong(Exception):
    """What came is not what was expected; says both."""


def main(program: str, check: Callable[[int], Iterable[str]]) -> int:
    """Run the cases that the command line asks for; returns the exit status.

    Args:
        program: the path of the program, as its repeat command names it.
        check: runs the case of one seed, raises Wrong, and returns the kinds it counts as.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, help="so many seeds (1, if nothing else is given)")
    parser.add_argument("--seconds", type=float, help="as many seeds as there is time for")
    parser.add_argument("--stats", type=Path, help="file for what was run, as JSON")
    parser.add_argument("--at", type=Path, help="file for the seed at work, should it crash")
    options = parser.parse_args()
    most = options.count or (1 if options.seconds is None else sys.maxsize)
    at = None if options.at is None else os.open(options.at, os.O_CREAT | os.O_WRONLY)
    kinds: Counter[str] = Counter()
    failures = cases = 0
    start = time.monotonic()
    for seed in range(options.first, options.first + most):
        if options.seconds is not None and time.monotonic() - start >= options.seconds:
            break
        if at is not None:
            os.pwrite(at, f"{seed:20d}".encode(), 0)
        cases += 1
        try:
            kinds.update(check(seed))
        except Wrong as wrong:
            print(f"wrong: {wrong}; repeat: python {program} --first {seed}", flush=True)
            failures += 1
            if failures == MOST_FAILURES:
                break
    if options.stats is not None:
        stats = {"cases": cases, "seconds": time.monotonic() - start, "kinds": dict(kinds)}
        options.stats.write_text(json.dumps(stats))
    return min(failures, 1)
