"""The programs that compile the kernels and read their machine code."""

import concurrent.futures
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from tests.cuda.machine_code.kernel import TEMPLATES, Kernel
from tests.cuda.machine_code.listing import Problem, read_listing

ROOT = Path(__file__).resolve().parents[3]


def find_tool(name: str) -> Path:
    """The program of the pip package of that name."""
    package = f"nvidia-cuda-{name}"
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError:
        raise Problem(f"{name} is not installed: pip install {package}") from None
    for file in files:
        if file.stem == name and file.parent.name == "bin":
            return Path(file.locate())
    raise Problem(f"the package {package} holds no program {name}")


def _run(*command: str | Path, cwd: Path | None = None, env: dict | None = None) -> str:
    if shutil.which(command[0]) is None:
        raise Problem(f"{command[0]} was not found: install it, or put it on PATH")
    run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if run.returncode:
        raise Problem(f"{Path(command[0]).name} failed: {(run.stderr or run.stdout).strip()}")
    return run.stdout


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Mangled names and their short, readable forms."""
    names = list(names)
    if not names:
        return {}
    return dict(zip(names, map(short_name, _run("c++filt", *names).splitlines()), strict=True))


def short_name(demangled: str) -> str:
    """For example forward_kernel<float, 4, 8, exact, plain>, from a demangled signature."""
    text = demangled.replace("(anonymous namespace)::", "").replace("msda::", "")
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            text = text[:i]
            break
    text = text.removeprefix("void ")
    name, _, arguments = text.rstrip(">").partition("<")
    if name not in TEMPLATES:
        return text
    values = arguments.split(", ")
    if len(values) != len(TEMPLATES[name]):
        raise Problem(f"TEMPLATES must name {len(values)} arguments of {name}: {values}")
    return f"{name}<{', '.join(map(_word, TEMPLATES[name], values))}>"


def _word(words: str | tuple[str, ...], value: str) -> str:
    if isinstance(words, str):
        return value
    return words[{"false": 0, "true": 1}[value] if value.isalpha() else int(value.split(")")[-1])]


def read_resources(text: str) -> dict[str, tuple[int, int]]:
    """Registers and bytes of stack by mangled name, from what `cuobjdump -res-usage` prints."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", text)
    return {name: (int(registers), int(stack)) for name, registers, stack in found}


def read_cubin(cubin: Path, arch: str) -> list[Kernel]:
    """The kernels of one file of machine code; the hot ones with their listings."""
    resources = read_resources(_run(find_tool("cuobjdump"), "-res-usage", cubin))
    names = demangle(resources)
    kernels = {
        symbol: Kernel(names[symbol], arch, *numbers) for symbol, numbers in resources.items()
    }
    hot = [symbol for symbol, kernel in kernels.items() if kernel.is_hot]
    if hot:
        symbols = _run("readelf", "--symbols", "--wide", cubin)
        indices = {
            name: index
            for index, name in re.findall(r"^\s*(\d+):.* GLOBAL .* (\S+)$", symbols, re.MULTILINE)
        }
        wanted = ",".join(indices[symbol] for symbol in hot)
        listings = read_listing(_run(find_tool("nvdisasm"), "-c", "-fun", wanted, cubin))
        for symbol in hot:
            kernels[symbol].listing = listings[symbol]
    return list(kernels.values())


def read_objects(path: Path, arch: str | None = None) -> tuple[list[Kernel], set[str]]:
    """All kernels in an object or a folder of them, and the architectures of the PTX beside."""
    objects = [path] if path.is_file() else sorted(path.rglob("*.cu.o"))
    if not objects:
        raise Problem(f"{path} is not there, or holds no compiled CUDA sources (*.cu.o)")
    cuobjdump = find_tool("cuobjdump")
    ptx: set[str] = set()
    with tempfile.TemporaryDirectory() as folder:
        cubins = []
        for n, file in enumerate(objects):
            into = Path(folder) / str(n)
            into.mkdir()
            try:
                _run(cuobjdump, "-xelf", "all", file.resolve(), cwd=into)
            except Problem as problem:
                if "does not contain device code" not in str(problem):
                    raise
                continue
            cubins += [(cubin, cubin.suffixes[-2].strip(".")) for cubin in into.iterdir()]
            ptx |= set(re.findall(r"\.(sm_\w+)\.ptx", _run(cuobjdump, "-lptx", file)))
        cubins = [(cubin, of) for cubin, of in cubins if arch in (None, of)]
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            kernels = pool.map(lambda cubin: read_cubin(*cubin), cubins)
            return [kernel for several in kernels for kernel in several], ptx


def compile_kernels(arch: str) -> Path:
    """Build the CUDA sources for one architecture, as CMake does; the result is the folder."""
    build = ROOT / "build" / "machine_code" / arch
    number = re.fullmatch(r"sm_(\d+)(\d[af]?)", arch)
    if number is None:
        raise Problem(f"--arch must be such as sm_90, got {arch}")
    environment = os.environ | {"TORCH_CUDA_ARCH_LIST": ".".join(number.groups())}
    options = ["-DMSDA_CUDA=1", "-DMSDA_WERROR=ON", f"-DPython3_EXECUTABLE={sys.executable}"]
    _run("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *options, env=environment)
    targets = re.findall(
        r"^(\S+\.cu\.o):", _run("ninja", "-C", build, "-t", "targets", "all"), re.M
    )
    _run("ninja", "-C", build, *targets)
    return build
