"""The build says in one sentence what it lacks, and decides about CUDA without asking for a GPU."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
TORCH = Path(torch.__file__).parent
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source tree")


@pytest.fixture
def setup_py():
    specification = importlib.util.spec_from_file_location("msda_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def fake_torch(folder, version):
    """A folder that looks like an installed torch of the given version."""
    major, minor = version.split(".")
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    header.parent.mkdir(parents=True)
    header.write_text(
        f"#define TORCH_VERSION_MAJOR {major}\n"
        f"#define TORCH_VERSION_MINOR {minor}\n"
        "#define TORCH_VERSION_PATCH 0\n"
    )
    (folder / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
    (folder / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
    (folder / "lib").mkdir()
    for library in ("torch", "torch_cpu"):
        (folder / "lib" / f"lib{library}.so").touch()
    (folder / "version.py").write_text(f"__version__ = '{version}.0'\n")
    return folder


def torch_for_cuda(folder, cuda):
    """The same, of a torch for a CUDA version, or for CPUs."""
    fake = fake_torch(folder, "2.13")
    with open(fake / "version.py", "a") as file:
        file.write(f"cuda: Optional[str] = {cuda!r}\n")
    return fake


def configure(build_dir, *options, **environment):
    """Run CMake's configure step; returns its exit status and all it printed, lines joined."""
    keep = {
        key: text for key, text in os.environ.items() if not key.startswith(("MSDA_", "TORCH_"))
    }
    command = ["cmake", "-S", str(ROOT), "-B", str(build_dir), "-G", "Ninja", *options]
    if not any(option.startswith("-DMSDA_TORCH_ROOT") for option in options):
        command.append(f"-DMSDA_TORCH_ROOT={TORCH}")
    run = subprocess.run(command, env=keep | environment, capture_output=True, text=True)
    return run.returncode, " ".join((run.stdout + run.stderr).split())


def hide(monkeypatch, setup_py, *hidden):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(
        setup_py.shutil, "which", lambda tool: None if tool in hidden else f"/usr/bin/{tool}"
    )


@pytest.mark.parametrize("tool", ["cmake", "ninja"])
def test_a_missing_build_tool_is_one_sentence(setup_py, monkeypatch, tool):
    hide(monkeypatch, setup_py, tool)
    with pytest.raises(
        SystemExit, match=f"^msda: {tool} is needed to build, .*: pip install {tool}$"
    ):
        setup_py.require_tools()


def test_a_missing_compiler_is_one_sentence(setup_py, monkeypatch):
    hide(monkeypatch, setup_py, "c++", "g++", "clang++")
    with pytest.raises(SystemExit, match=r"^msda: a C\+\+17 compiler is needed to build, "):
        setup_py.require_tools()


def test_a_missing_torch_is_one_sentence(setup_py, monkeypatch):
    hide(monkeypatch, setup_py)
    monkeypatch.setattr(setup_py, "find_torch", lambda: None)
    with pytest.raises(
        SystemExit, match=r"^msda: torch >= 2\.10 is needed to build, .*: pip install"
    ):
        setup_py.require_tools()


def test_an_old_torch_is_one_sentence(setup_py, monkeypatch, tmp_path):
    hide(monkeypatch, setup_py)
    monkeypatch.setenv("MSDA_TORCH_ROOT", str(fake_torch(tmp_path, "2.9")))
    with pytest.raises(SystemExit, match=r"^msda: torch >= 2\.10 is needed to build, got 2\.9 in "):
        setup_py.require_tools()


@pytest.mark.parametrize("version", ["66.1.1", "76.9"])
def test_old_setuptools_are_one_sentence(tmp_path, version):
    (tmp_path / "setuptools.py").write_text(f"__version__ = {version!r}")
    run = subprocess.run(
        [sys.executable, str(ROOT / "setup.py"), "--version"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode != 0
    assert run.stderr.startswith(f"msda: setuptools >= 77 is needed to build, got {version}: pip ")
    assert run.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("platform", "integers", "got"),
    [
        ("win32", 2**63 - 1, "64-bit win32: on Windows, use WSL"),
        ("linux", 2**31 - 1, "32-bit linux"),
        ("freebsd14", 2**63 - 1, "64-bit freebsd14"),
    ],
)
def test_another_platform_is_one_sentence(setup_py, monkeypatch, platform, integers, got):
    monkeypatch.setattr(setup_py.sys, "platform", platform)
    monkeypatch.setattr(setup_py.sys, "maxsize", integers)
    for step in (setup_py.get_requires_for_build_wheel, setup_py.require_tools):
        with pytest.raises(SystemExit) as stopped:
            step()
        assert str(stopped.value) == f"msda: the platform must be 64-bit Linux or macOS, got {got}"


def test_max_jobs_is_how_many_compilers_run_at_once(setup_py, monkeypatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    assert setup_py.parallel_options() == []
    monkeypatch.setenv("MAX_JOBS", "3")
    assert setup_py.parallel_options() == ["--parallel", "3"]
    for wrong in ("0", "-1", "many"):
        monkeypatch.setenv("MAX_JOBS", wrong)
        with pytest.raises(
            SystemExit, match=f"^msda: MAX_JOBS must be a number .*, got '{wrong}'$"
        ):
            setup_py.parallel_options()


@pytest.fixture(scope="module")
def configured_without_cuda(tmp_path_factory):
    """A build folder that CMake configured, and what it printed."""
    folder = tmp_path_factory.mktemp("a folder") / "of a build"
    status, text = configure(folder, MSDA_CUDA="0")
    assert status == 0, text
    return folder, text


def test_a_build_asks_for_no_python_headers_and_no_network(configured_without_cuda):
    folder, _ = configured_without_cuda
    include = sysconfig.get_path("include")
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        assert not re.search(rf"-(I|isystem) ?{re.escape(include)}\b", entry["command"])
    for source in (ROOT / "setup.py", ROOT / "CMakeLists.txt"):
        assert not re.search(r"FetchContent|DOWNLOAD|ExternalProject|urllib", source.read_text())


def test_build_requirements_name_only_what_is_missing(setup_py, monkeypatch, tmp_path):
    monkeypatch.setenv("MSDA_TORCH_ROOT", str(fake_torch(tmp_path, "2.13")))
    monkeypatch.setattr(setup_py._setuptools, "get_requires_for_build_wheel", lambda settings: [])
    hide(monkeypatch, setup_py)
    assert setup_py.get_requires_for_build_wheel() == []
    hide(monkeypatch, setup_py, "cmake", "ninja")
    assert setup_py.get_requires_for_build_wheel() == ["cmake", "ninja"]
    monkeypatch.setattr(setup_py, "find_torch", lambda: None)
    assert "torch>=2.10" in setup_py.get_requires_for_build_wheel()


def test_cmake_alone_finds_an_old_torch(tmp_path):
    old = fake_torch(tmp_path / "torch", "2.9")
    status, text = configure(tmp_path / "build", f"-DMSDA_TORCH_ROOT={old}")
    assert status != 0
    assert "msda needs torch >= 2.10 to build, found 2.9.0." in text


def test_cmake_alone_finds_no_torch(tmp_path):
    status, text = configure(tmp_path / "build", f"-DMSDA_TORCH_ROOT={tmp_path}")
    assert status != 0
    assert "msda needs torch >= 2.10 to build, found none in" in text


def test_cuda_can_be_switched_off(configured_without_cuda):
    _, text = configured_without_cuda
    assert "CUDA kernels: off (MSDA_CUDA=0)" in text


def test_the_cuda_switch_takes_no_other_words(tmp_path):
    status, text = configure(tmp_path, MSDA_CUDA="maybe")
    assert status != 0
    assert "MSDA_CUDA must be 0, 1 or empty, got 'maybe'." in text


@pytest.fixture
def path_without_nvcc(tmp_path):
    """A PATH that holds what CMake needs, but no nvcc."""
    for tool in ("cmake", "ninja", "c++", "g++", "cc", "gcc", "ld", "ar", "ranlib", "as", "uname"):
        if shutil.which(tool):
            (tmp_path / "bin" / tool).parent.mkdir(exist_ok=True)
            (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return str(tmp_path / "bin")


def test_cuda_is_left_out_without_nvcc(tmp_path, path_without_nvcc):
    environment = {"PATH": path_without_nvcc, "CUDACXX": "", "CUDA_PATH": "", "CUDA_HOME": ""}
    status, text = configure(tmp_path / "build", **environment)
    assert status == 0
    assert "CUDA kernels: off (nvcc was not found" in text
    status, text = configure(tmp_path / "build1", "-DMSDA_CUDA=1", **environment)
    assert status != 0
    assert "MSDA_CUDA=1 asks for CUDA kernels, but nvcc was not found" in text


# ---- releases ------------------------------------------------------------------------------------


def test_the_workflow_of_releases_runs_commands_that_there_are(setup_py):
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    made = re.findall(r"run: make (\S+)", workflow)
    targets = re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {target.replace("$(VENV)", ".venv") for target in targets} >= set(made) >= {"wheel"}
    for name in setup_py.NVCC_PACKAGES:
        assert f"'nvidia-{name}==13.0.*'" in workflow


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc")
def test_a_library_is_bound_to_functions_of_an_older_glibc_and_works(tmp_path):
    pytest.importorskip("elftools", reason="auditwheel is not installed")
    from tests.packaging import build_release

    source, library = tmp_path / "older.c", tmp_path / "libolder.so"
    source.write_text(
        "#include <math.h>\n#include <pthread.h>\n"
        "static pthread_once_t once = PTHREAD_ONCE_INIT;\nstatic double y, x;\n"
        "static void compute(void) { y = exp(x); }\n"
        "double exp_once(double of) { x = of; pthread_once(&once, compute); return y; }\n"
    )
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library, "-lm"], check=True)
    lowered = build_release.lower_glibc(
        library, build_release.c_libraries(build_release.platform.machine())
    )
    assert set(map(build_release.version_of, lowered.values())) <= {(2, 2, 5), (2, 17)}
    with open(library, "rb") as file:
        from elftools.elf.elffile import ELFFile

        versions = [
            build_release.version_of(name)
            for _, name, _ in build_release.needed_versions(ELFFile(file))
        ]
    assert max(versions) <= build_release.NEWEST_GLIBC
    program = "import ctypes, sys; f = ctypes.CDLL(sys.argv[1]).exp_once; "
    program += "f.restype = ctypes.c_double; f.argtypes = [f.restype]; print(f(1.0))"
    run = subprocess.run([sys.executable, "-c", program, library], capture_output=True, text=True)
    assert run.stdout.startswith("2.71828"), run.stderr


# ---- nvcc from the package index -----------------------------------------------------------------

CUDA_13 = ["cuda-nvcc", "cuda-crt", "nvvm", "cuda-runtime", "cuda-cccl"]


@pytest.fixture
def nvccs(setup_py, monkeypatch, tmp_path):
    """Nothing but the nvccs that a test makes: a function that makes one, by folder and release."""
    for variable in ("CUDACXX", "CUDA_HOME", "CUDA_PATH", "MSDA_CUDA", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(setup_py.shutil, "which", lambda tool: None)
    monkeypatch.setattr(setup_py.sys, "path", [])
    monkeypatch.setattr(setup_py, "site_packages", lambda: [tmp_path / "site"])
    version_of = setup_py.nvcc_version
    monkeypatch.setattr(
        setup_py,
        "nvcc_version",
        lambda nvcc: version_of(nvcc) if str(nvcc).startswith(str(tmp_path)) else (0, 0),
    )

    def make(folder, release):
        nvcc = tmp_path / folder / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        nvcc.write_text(
            f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n"
        )
        nvcc.chmod(0o755)
        return nvcc

    return make


@pytest.mark.parametrize(
    ("cuda", "switch", "version"),
    [
        ("13.0", "", "13.0"),
        ("13.2", "1", "13.2"),
        ("13.0", "0", None),
        (None, "", None),
        (None, "1", "13.0"),  # the tested one
        ("12.8", "", None),  # there is no nvcc on the index
    ],
)
def test_nvcc_is_a_build_requirement_where_torch_is_for_cuda_and_there_is_none(
    setup_py, nvccs, monkeypatch, tmp_path, cuda, switch, version
):
    monkeypatch.setattr(setup_py._setuptools, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.setenv("MSDA_TORCH_ROOT", str(torch_for_cuda(tmp_path / "torch", cuda)))
    monkeypatch.setenv("MSDA_CUDA", switch)
    expected = [f"nvidia-{name}=={version}.*" for name in CUDA_13] if version else []
    assert setup_py.get_requires_for_build_wheel() == ["cmake", "ninja", *expected]
    nvccs("toolkit", "12.9")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert setup_py.get_requires_for_build_wheel() == ["cmake", "ninja"]


def test_a_torch_that_is_yet_to_be_fetched_brings_nvcc_which_one_for_cpus_leaves_alone(
    setup_py, nvccs, monkeypatch, tmp_path
):
    monkeypatch.setattr(setup_py._setuptools, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.setattr(setup_py, "find_torch", lambda: None)
    packages = [f"nvidia-{name}==13.0.*" for name in CUDA_13]
    expected = ["cmake", "ninja", "torch>=2.10", *packages]
    assert setup_py.get_requires_for_build_wheel() == expected
    nvccs("site/nvidia/cu13", "13.0")
    assert setup_py.nvcc_options(torch_for_cuda(tmp_path / "torch", None)) == ([], None)
    monkeypatch.setenv("MSDA_CUDA", "0")
    assert setup_py.get_requires_for_build_wheel() == ["cmake", "ninja", "torch>=2.10"]


def test_the_first_nvcc_that_is_new_enough_builds(setup_py, nvccs, monkeypatch, tmp_path):
    old, packaged = nvccs("old", "11.4"), nvccs("site/nvidia/cu13", "13.0")
    monkeypatch.setenv("CUDA_HOME", str(old.parent.parent))
    assert setup_py.find_nvcc() == packaged
    library = packaged.parent.parent / "lib" / "libcudart.so.13"
    library.parent.mkdir()
    library.touch()
    torch = torch_for_cuda(tmp_path / "torch", "13.0")
    options = [f"-DCMAKE_CUDA_COMPILER={packaged}", f"-DCUDA_CUDART={library}"]
    assert setup_py.nvcc_options(torch) == (options, library.parent)

    new = nvccs("new", "12.6")
    monkeypatch.setenv("CUDA_HOME", str(new.parent.parent))
    assert setup_py.nvcc_options(torch) == ([f"-DCMAKE_CUDA_COMPILER={new}"], None)
    broken = tmp_path / "broken"
    broken.write_text("not a program")
    monkeypatch.setenv("CUDACXX", str(broken))
    assert setup_py.find_nvcc() == new
    monkeypatch.setenv("MSDA_CUDA", "0")
    assert setup_py.nvcc_options(torch) == ([], None)


@pytest.mark.parametrize(
    ("cuda", "switch", "says"),
    [
        ("13.0", "", "a torch for CUDA 13.0, and none was found: pip install 'nvidia-cuda-nvcc=="),
        ("12.8", "", "a torch for CUDA 12.8, and none was found: install NVIDIA's CUDA toolkit"),
        (None, "1", "MSDA_CUDA=1, and none was found: pip install 'nvidia-cuda-nvcc==13.0.*'"),
    ],
)
def test_a_missing_nvcc_is_one_sentence(setup_py, nvccs, monkeypatch, tmp_path, cuda, switch, says):
    monkeypatch.setenv("MSDA_CUDA", switch)
    with pytest.raises(SystemExit) as stopped:
        setup_py.nvcc_options(torch_for_cuda(tmp_path / "torch", cuda))
    assert str(stopped.value).startswith(f"msda: nvcc >= 12.0 is needed for {says}")
    assert str(stopped.value).endswith(", or set MSDA_CUDA=0 to build for the CPU alone")


def test_a_torch_for_cpus_needs_no_nvcc(setup_py, nvccs, tmp_path):
    assert setup_py.nvcc_options(torch_for_cuda(tmp_path / "torch", None)) == ([], None)


needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@needs_nvcc
def test_cuda_is_built_where_nvcc_is_found_whether_or_not_there_is_a_gpu(tmp_path):
    status, text = configure(tmp_path / "build")
    assert status == 0
    architectures = "75-real,80-real,86-real,87-real,90-real,100-real,110-real,120-real,120-virtual"
    assert f"CUDA kernels: on, {architectures}" in text


@needs_nvcc
def test_cuda_architectures_are_read_as_torch_reads_them(tmp_path):
    status, text = configure(tmp_path / "a", TORCH_CUDA_ARCH_LIST="8.0 9.0a;10.0+PTX")
    assert status == 0
    assert "CUDA kernels: on, 80-real,90a-real,100-real,100-virtual" in text
    status, text = configure(tmp_path / "b", TORCH_CUDA_ARCH_LIST="Hopper")
    assert status != 0
    assert "TORCH_CUDA_ARCH_LIST must hold entries such as 9.0 or 9.0+PTX, got 'Hopper'." in text


@pytest.mark.parametrize(
    ("header", "name"), [("dtypes.h", "kBFloat16"), ("arguments.h", "kOther"), ("arguments.h", "")]
)
def test_a_dtype_that_a_switch_lacks_does_not_compile(
    configured_without_cuda, tmp_path, header, name
):
    commands = json.loads((configured_without_cuda[0] / "compile_commands.json").read_text())
    command = next(one["command"] for one in commands if one["file"].endswith("csrc/ops.cpp"))
    warnings = [word for word in command.split() if word.startswith("-W")]
    for path in (ROOT / "csrc").glob("*.h"):
        shutil.copy(path, tmp_path)
    text = (tmp_path / header).read_text()
    if name:
        assert f"{name} }};" in text
        (tmp_path / header).write_text(text.replace(f"{name} }};", f"{name}, kFifth }};"))
    compile_it = [command.split()[0], "-std=c++17", "-fsyntax-only", "-x", "c++", *warnings]
    run = subprocess.run([*compile_it, str(tmp_path / header)], capture_output=True, text=True)
    assert (run.returncode == 0) == (name == "")
    assert not name or "kFifth" in run.stderr
