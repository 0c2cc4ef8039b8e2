"""A pytest plugin that writes each outcome as it comes, so that a run cut off loses nothing.

Use: ``MSDA_OUTCOMES=log.jsonl python -m pytest -p benchmarks.gpu.outcomes`` in the repository. One
JSON object per line: how many tests were selected, then test, outcome, seconds and message of each.
"""

from __future__ import annotations

import json
import os
from typing import Any


def write(entry: dict[str, Any]) -> None:
    with open(os.environ["MSDA_OUTCOMES"], "a") as log:
        log.write(json.dumps(entry) + "\n")


def pytest_collection_finish(session: Any) -> None:
    """Write how many tests there are."""
    write({"selected": len(session.items)})


def pytest_runtest_logreport(report: Any) -> None:
    """Write the outcome of a test; of setup and teardown only what went wrong or was skipped."""
    if report.when != "call" and report.outcome == "passed":
        return
    message = ""
    if report.outcome == "skipped":
        message = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    elif report.outcome == "failed":
        crash = getattr(report.longrepr, "reprcrash", None)
        message = crash.message if crash is not None else str(report.longrepr)
    write(
        {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "message": message[:1000],
        }
    )
