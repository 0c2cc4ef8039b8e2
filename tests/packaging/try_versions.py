"""Prove that one wheel serves several versions of torch and Python: ``make abi``.

    torch==2.10.0 torch                       fresh environments, with the running Python
    --python py310 --python py313 torch       the same with other Pythons
    --inside env/bin/python                   environments that have a torch already, which are left
                                              as they are

The wheel is the one given (``--wheel``) or is built with the running Python's torch;
check_installed.py tries it. Versions other than the pinned one usually come with CUDA libraries:
expect several gigabytes each.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build_wheel(folder: Path) -> Path:
    """Build the wheel with the running Python's torch."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*command, "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def fresh_environment(python: str, requirement: str, folder: Path) -> str:
    """The Python of a new environment with this torch."""
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    inside = str(folder / "bin" / "python")
    subprocess.run([inside, "-m", "pip", "install", "-q", requirement, "numpy"], check=True)
    return inside


def smoke_test(wheel: Path, python: str, folder: Path) -> str:
    """Which Python and torch the wheel passed the smoke test under; raises where it did not."""
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    versions = (
        "import platform, torch; print(platform.python_version(), 'torch', torch.__version__)"
    )
    for program in (["-c", versions], [str(ROOT / "tests" / "packaging" / "check_installed.py")]):
        run = subprocess.run(
            [python, *program], cwd=folder, env=environment, capture_output=True, text=True
        )
        if run.returncode != 0:
            raise RuntimeError(f"{run.stdout}{run.stderr}")
        if program[0] == "-c":
            told = run.stdout.strip()
    assert str(folder / "msda") in run.stdout, "another msda was tried"
    return told


def main() -> int:
    """Try everything; the exit status is 0 if all pass."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("torch", nargs="*", help="requirements, e.g. torch==2.10.0 or torch")
    parser.add_argument("--wheel", type=Path)
    parser.add_argument("--python", action="append", help="makes the fresh environments")
    parser.add_argument("--inside", action="append", default=[], help="has a torch already")
    options = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        wheel = (options.wheel or build_wheel(Path(scratch))).resolve()
        tries = [
            (python, requirement)
            for python in options.python or [sys.executable]
            for requirement in options.torch
        ]
        tries += [(python, "") for python in options.inside]
        for index, (python, requirement) in enumerate(tries):
            folder = Path(scratch) / str(index)
            try:
                if requirement:
                    python = fresh_environment(python, requirement, folder / "environment")
                print(f"pass  {wheel.name} on Python {smoke_test(wheel, python, folder / 'wheel')}")
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(f"FAIL  {wheel.name} on {python} {requirement}: {error}")
                failed += 1
            sys.stdout.flush()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
