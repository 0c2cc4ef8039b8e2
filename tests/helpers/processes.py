"""Programs that tests run in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments, path=ROOT, **environment):
    """A fresh Python that imports msda from ``path``: its return code, stdout and stderr."""
    variables = {name: text for name, text in os.environ.items() if not name.startswith("MSDA_")}
    variables["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=variables | environment,
        cwd=path,
        timeout=120,
    )
