"""Prove that one wheel serves several versions of torch: ``make abi``.

Builds the wheel with the running Python's torch, then, for each version given, makes a fresh
virtual environment, installs that torch and the wheel, and runs tests/smoke.py there. Versions
other than the pinned one usually come with CUDA libraries: expect several gigabytes each.
"""

import argparse
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the running Python's torch."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("msda-*.whl")
    return wheel


def smoke_test(wheel: Path, requirement: str, folder: Path) -> bool:
    """Whether the wheel passes the smoke test in a fresh environment with this torch."""
    print(f"== {wheel.name} on {requirement}", flush=True)
    venv.create(folder, with_pip=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, requirement, "numpy"], check=True)
    subprocess.run([*pip, "--no-deps", str(wheel)], check=True)
    test = subprocess.run([str(python), str(ROOT / "tests" / "smoke.py")], cwd=folder)
    return test.returncode == 0


def main() -> int:
    """Build once, test everywhere; the exit status is 0 if all versions pass."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("torch", nargs="+", help="requirements, e.g. torch==2.10.0 or torch")
    requirements = parser.parse_args().torch
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        passed = {
            requirement: smoke_test(wheel, requirement, Path(scratch) / f"env{index}")
            for index, requirement in enumerate(requirements)
        }
    for requirement, good in passed.items():
        print(f"{'pass' if good else 'FAIL'}  {requirement}")
    return 0 if all(passed.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
