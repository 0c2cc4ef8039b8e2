"""Build msda: run CMake with Ninja and pack the result. CMakeLists.txt describes the build.

This file is also the build backend named in pyproject.toml (PEP 517): setuptools' own, plus build
requirements for whatever the machine lacks. A torch that is already installed in the target
environment is built against in place, so that ``pip install .`` does not download it again.

A machine with a torch for CUDA 13 or later and no nvcc gets one from the package index.

Environment variables: MSDA_CUDA, MSDA_TORCH_ROOT and TORCH_CUDA_ARCH_LIST are CMake's; MAX_JOBS is
how many compilers run at once (default: one for each core); MSDA_BUILD_DIR keeps CMake's build
folder for incremental builds.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools

OLDEST_SETUPTOOLS = 77  # reads pyproject.toml as it is
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"msda: setuptools >= {OLDEST_SETUPTOOLS} is needed to build, got "
        f"{setuptools.__version__}: pip install -U setuptools, or build with pip's build isolation"
    )

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
    require_platform()
    requires = _setuptools.get_requires_for_build_wheel(config_settings)
    requires += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    torch = find_torch()
    if torch is None:
        requires.append("torch>=2.10")
    if find_nvcc() is None:
        requires += nvcc_packages(torch)
    return requires


get_requires_for_build_editable = get_requires_for_build_wheel


def find_torch():
    """The folder of torch: MSDA_TORCH_ROOT, this Python's or that of the environment around it."""
    if os.environ.get("MSDA_TORCH_ROOT"):
        return Path(os.environ["MSDA_TORCH_ROOT"])
    spec = importlib.util.find_spec("torch")
    if spec is not None and spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations)))
    for folder in (path / "torch" for path in site_packages()):
        if (folder / "version.py").exists() and torch_version(folder) >= OLDEST_TORCH:
            return folder
    return None


def site_packages():
    """Of the environment that is installed into, which an isolated build hides."""
    return [Path(sysconfig.get_path(scheme)) for scheme in ("platlib", "purelib")]


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


# ---- nvcc ----------------------------------------------------------------------------------------

OLDEST_NVCC = (12, 0)
TESTED_CUDA = (13, 0)  # built for where torch names none
# What makes up nvcc on the package index, from CUDA 13 on: of CUDA 12 it has no nvcc.
NVCC_PACKAGES = ("cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl")


def cuda_version(torch):
    """(major, minor) of the CUDA that the torch in a folder is for; None where it is for CPUs."""
    version = torch / "version.py"
    text = version.read_text() if version.exists() else ""
    match = re.search(r"^cuda\b.*= '(\d+)\.(\d+)", text, re.MULTILINE)
    return tuple(int(number) for number in match.groups()) if match else None


def find_nvcc():
    """The first nvcc that is new enough: the user's, the machine's, one of the package index."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [Path(home, "bin", "nvcc") for home in homes if home]
    for entry in (*sys.path, *site_packages()):
        candidates += sorted(Path(entry).glob("nvidia/cu*/bin/nvcc"))
    return next((Path(one) for one in candidates if one and nvcc_version(one) >= OLDEST_NVCC), None)


def nvcc_version(nvcc):
    """(major, minor) of an nvcc; (0, 0) where it does not run."""
    try:
        run = subprocess.run([nvcc, "--version"], capture_output=True, text=True)
    except OSError:
        return 0, 0
    match = re.search(r"release (\d+)\.(\d+)", run.stdout)
    return tuple(int(number) for number in match.groups()) if match else (0, 0)


def nvcc_packages(torch):
    """The requirements that bring the nvcc for a torch; none where none is wanted, or there is.

    Of a torch that is yet to be fetched it is not known what it is for; on Linux mostly for CUDA.
    """
    switch, cuda = os.environ.get("MSDA_CUDA", ""), torch and cuda_version(torch)
    is_wanted = switch == "1" or (switch == "" and (torch is None or cuda is not None))
    major, minor = cuda or TESTED_CUDA
    if not is_wanted or major < 13 or not sys.platform.startswith("linux"):
        return []
    return [f"nvidia-{name}=={major}.{minor}.*" for name in NVCC_PACKAGES]


def nvcc_options(torch):
    """CMake's options for nvcc, and the folder of libraries for its host compiler, or None."""
    switch, cuda = os.environ.get("MSDA_CUDA", ""), cuda_version(torch)
    nvcc = None if switch == "0" else find_nvcc()
    if nvcc is None:
        if switch == "1" or (switch == "" and cuda is not None):
            packages = " ".join(f"'{package}'" for package in nvcc_packages(torch))
            wanted = f"a torch for CUDA {'.'.join(map(str, cuda))}" if cuda else "MSDA_CUDA=1"
            remedy = f"pip install {packages}" if packages else "install NVIDIA's CUDA toolkit"
            stop(
                f"nvcc >= {'.'.join(map(str, OLDEST_NVCC))} is needed for {wanted}, and none was "
                f"found: {remedy}, or set MSDA_CUDA=0 to build for the CPU alone"
            )
        return [], None
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}"]
    root = nvcc.parent.parent
    if not root.name.startswith("cu") or root.parent.name != "nvidia":
        return options, None
    if cuda is None and switch != "1":  # it came for a torch that turned out to be for CPUs
        return [], None
    # The packages have libraries in lib, where their nvcc may say lib64, and only versioned ones.
    runtime = next(root.glob("lib/libcudart.so.*"), "")
    return [*options, f"-DCUDA_CUDART={runtime}"], root / "lib"


def stop(sentence):
    """End the build with one sentence instead of a traceback."""
    sys.exit(f"msda: {sentence}")


def require_platform():
    """End where there is nothing to build for."""
    if sys.platform not in ("linux", "darwin") or sys.maxsize < 2**32:
        bits = 64 if sys.maxsize > 2**32 else 32
        hint = ": on Windows, use WSL" if sys.platform == "win32" else ""
        stop(f"the platform must be 64-bit Linux or macOS, got {bits}-bit {sys.platform}{hint}")


def parallel_options():
    """How many compilers CMake is to run at once: MAX_JOBS, which torch's builds know too."""
    jobs = os.environ.get("MAX_JOBS", "")
    if jobs and not (jobs.isdecimal() and int(jobs) > 0):
        stop(f"MAX_JOBS must be a number of compilers to run at once, got {jobs!r}")
    return ["--parallel", jobs] if jobs else []


def require_tools():
    """The folder of a torch to build with, having checked everything else that CMake needs."""
    require_platform()
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
        cuda_options, libraries = nvcc_options(torch)
        environment = os.environ.copy()
        if libraries is not None:
            paths = [str(libraries), environment.get("LIBRARY_PATH")]
            environment["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))
        chosen = os.environ.get("MSDA_BUILD_DIR")
        build_dir = Path(chosen or self.build_temp).resolve()
        if not chosen:  # CMake's cache there may belong to an environment that is gone
            shutil.rmtree(build_dir, ignore_errors=True)
        package_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        configure = ["-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja"]
        # Settings that may have changed since CMake last ran.
        configure += [
            f"-DMSDA_TORCH_ROOT={torch}",
            f"-DMSDA_CUDA={os.environ.get('MSDA_CUDA', '')}",
        ]
        steps = (
            [*configure, f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}", *cuda_options],
            ["--build", str(build_dir), *parallel_options()],
            ["--install", str(build_dir), "--prefix", str(package_dir)],
        )
        if getattr(self, "editable_mode", False):  # setuptools copies the extension alone
            steps += (["--install", str(build_dir), "--prefix", str(ROOT / "msda")],)
        for step in steps:
            if subprocess.run(["cmake", *step], env=environment).returncode != 0:
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
