"""Build msda: run CMake with Ninja and pack the result. CMakeLists.txt describes the build.

This file is also the build backend named in pyproject.toml (PEP 517): setuptools' own, with what
the machine lacks added to the build requirements. A torch that is already installed in the target
environment is built against in place, so that ``pip install .`` does not download it again.

Environment variables: MSDA_CUDA, MSDA_TORCH_ROOT and TORCH_CUDA_ARCH_LIST are CMake's;
MSDA_BUILD_DIR keeps CMake's build folder for incremental builds.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools import build_meta as _setuptools
from setuptools.build_meta import *  # noqa: F403  the hooks of the build backend
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
LIBRARY = {"darwin": "libmsda.dylib", "win32": "msda.dll"}.get(sys.platform, "libmsda.so")


def get_requires_for_build_wheel(config_settings=None):
    """Build requirements beyond pyproject.toml's: what this machine does not have yet."""
    requires = _setuptools.get_requires_for_build_wheel(config_settings)
    requires += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if find_torch() is None:
        requires.append("torch>=2.10")
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


def find_torch():
    """The folder of torch: MSDA_TORCH_ROOT, that of this Python, or of the environment around it.

    An isolated build hides the environment it installs into; its site-packages are looked at here.
    """
    if os.environ.get("MSDA_TORCH_ROOT"):
        return Path(os.environ["MSDA_TORCH_ROOT"])
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    for scheme in ("platlib", "purelib"):
        folder = Path(sysconfig.get_path(scheme)) / "torch"
        if (folder / "version.py").exists() and torch_version(folder) >= OLDEST_TORCH:
            return folder
    return None


def torch_version(folder):
    """(major, minor) of the torch in a folder, read without importing it."""
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    if header.exists():
        pattern, text = r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text()
        return tuple(int(number) for number in re.findall(pattern, text)[:2])
    version = folder / "version.py"
    match = (
        re.search(r"__version__ = '(\d+)\.(\d+)", version.read_text()) if version.exists() else None
    )
    return tuple(int(number) for number in match.groups()) if match else (0, 0)


def stop(sentence):
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"msda: {sentence}")


def require_tools():
    """The folder of a torch to build with, having checked everything else that CMake needs."""
    for tool in ("cmake", "ninja"):
        if shutil.which(tool) is None:
            stop(f"{tool} is needed to build, and none was found: pip install {tool}")
    compilers = (
        [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    )
    if not any(shutil.which(compiler) for compiler in compilers):
        stop(
            "a C++17 compiler is needed to build, and none was found "
            f"(looked for {', '.join(compilers)}): install GCC or Clang, or set CXX"
        )
    torch = find_torch()
    if torch is None:
        stop("torch >= 2.10 is needed to build, and none was found: pip install torch")
    if torch_version(torch) < OLDEST_TORCH:
        stop(
            "torch >= 2.10 is needed to build, got "
            f"{'.'.join(map(str, torch_version(torch)))} in {torch}: pip install -U torch"
        )
    return torch


class BuildWithCMake(build_ext):
    """Build the one 'extension': a torch operator library, which is no Python extension module."""

    def get_ext_filename(self, fullname):
        """Name the library without Python's version in it: it does not depend on Python."""
        *packages, _ = fullname.split(".")
        return os.path.join(*packages, LIBRARY)

    def build_extension(self, ext):
        """Configure, build and install into the package."""
        torch = require_tools()
        build_dir = Path(os.environ.get("MSDA_BUILD_DIR") or self.build_temp).resolve()
        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        steps = (
            ["-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", f"-DMSDA_TORCH_ROOT={torch}"],
            ["--build", str(build_dir)],
            ["--install", str(build_dir), "--prefix", str(package_dir)],
        )
        for step in steps:
            if subprocess.run(["cmake", *step]).returncode != 0:
                stop(
                    f"the build failed in `cmake {step[0]}`; the message of CMake or of the "
                    "compiler is above"
                )


class WheelForEveryPython(bdist_wheel):
    """Tag the wheel py3-none-<platform>: one binary serves every Python and torch >= 2.10."""

    def get_tag(self):
        """Keep only the platform of the usual tag."""
        return "py3", "none", super().get_tag()[2]


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("msda.libmsda", sources=[])],
        cmdclass={"build_ext": BuildWithCMake, "bdist_wheel": WheelForEveryPython},
    )
