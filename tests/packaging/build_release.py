"""Make the wheel of a release: ``make wheel``.

    python tests/packaging/build_release.py                   for x86-64, with CUDA kernels for
                                                              every architecture
    python tests/packaging/build_release.py --arch aarch64    for 64-bit Arm, without them: with
                                                              the cross-compiler, and the torch of
                                                              MSDA_TORCH_ROOT for that processor

It makes the sdist, unpacks it in a folder of its own, builds the wheel there, lets it ask for no
newer glibc than manylinux allows, has auditwheel grant the tag, and tells what the library asks of
a system. Whatever that is beyond torch and the C and C++ libraries is an error.

NOTE [the same bytes]
Two builds with the same compilers and torch give the same file, since nothing of the moment or the
machine is in it: times are that of SOURCE_DATE_EPOCH (the last commit's where it is not set), modes
those of umask 022, paths are left out by CMakeLists.txt. One is not: nvcc names what is in an
anonymous namespace after a hash of the source's absolute path, so that path is always the same one.

NOTE [older glibc]
A program is bound to the newest version of each function that the C library has where it is linked:
of dlopen to that of glibc 2.34, which merely moved it from libdl to libc. Those versions are then
exchanged, in the tables of the finished library, for the newest that manylinux allows and that
glibc still offers for the function. csrc/older_systems.cpp defines what has none.
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEWEST_GLIBC = (2, 28)
# The libraries of the wheel, and what each may need beside the C and C++ libraries.
LIBRARIES = {"libmsda.so": {"libtorch.so", "libtorch_cpu.so"}, "libmsda_cpu.so": set()}
MAY_NEED = {"libc.so.6", "libm.so.6"}
MAY_NEED |= {"libstdc++.so.6", "libgcc_s.so.1"}  # auditwheel allows them: every torch brings them
MAY_NEED |= {"ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}  # the loader itself
TOOLCHAIN = """set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {arch})
set(CMAKE_CXX_COMPILER {arch}-linux-gnu-g++)
"""


def run(*command: object, **variables: str) -> str:
    """What a command printed; ends with its output where it fails."""
    done = subprocess.run(
        list(map(str, command)),
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        sys.exit(f"{done.stdout}\n{' '.join(map(str, command))} failed")
    return done.stdout


def stop(sentence: str) -> None:
    """End with one sentence."""
    sys.exit(f"make wheel: {sentence}")


# ---- older glibc ---------------------------------------------------------------------------------


def version_of(name: str) -> tuple[int, ...]:
    """GLIBC_2.2.5 -> (2, 2, 5); of other names nothing."""
    match = re.fullmatch(r"GLIBC_(\d+(?:\.\d+)+)", name)
    return tuple(map(int, match.group(1).split("."))) if match else ()


def symbols(elf) -> list[tuple[str, int, bool]]:
    """Name, number of the version and whether it is defined, of each dynamic symbol."""
    versions = elf.get_section_by_name(".gnu.version")
    return [
        (symbol.name, versions.get_symbol(index)["ndx"], symbol["st_shndx"] != "SHN_UNDEF")
        for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols())
    ]


def number_of(index: object) -> int:
    """pyelftools has words for the first two numbers; the highest bit hides a version."""
    return index & 0x7FFF if isinstance(index, int) else 0


def offered(library: Path) -> dict[str, set[str]]:
    """The versions of each function that a C library has, old ones included."""
    from elftools.elf.elffile import ELFFile

    with open(library, "rb") as file:
        elf = ELFFile(file)
        names = {
            version["vd_ndx"]: next(iter(auxiliaries)).name
            for version, auxiliaries in elf.get_section_by_name(".gnu.version_d").iter_versions()
        }
        found: dict[str, set[str]] = {}
        for name, index, is_defined in symbols(elf):
            if is_defined and number_of(index) in names:
                found.setdefault(name, set()).add(names[number_of(index)])
        return found


def needed_versions(elf) -> list[tuple[int, str, int]]:
    """Offset in the file, name and number of each version that a library needs."""
    section = elf.get_section_by_name(".gnu.version_r")
    found, entry = [], section["sh_offset"]
    for version, auxiliaries in section.iter_versions():
        offset = entry + version["vn_aux"]
        for auxiliary in auxiliaries:
            found.append((offset, auxiliary.name, auxiliary["vna_other"]))
            offset += auxiliary["vna_next"]
        entry += version["vn_next"]
    return found


def lower_glibc(library: Path, c_libraries: list[Path]) -> dict[str, str]:
    """Let a library ask for older versions of glibc's functions; returns which for which."""
    from elftools.elf.elffile import ELFFile

    has = {}
    for c_library in c_libraries:
        for name, versions in offered(c_library).items():
            has.setdefault(name, set()).update(versions)
    content, lowered = bytearray(library.read_bytes()), {}
    with open(library, "rb") as file:
        elf = ELFFile(file)
        table = elf.get_section_by_name(".gnu.version")["sh_offset"]
        versions = needed_versions(elf)
        entries = {name: (offset, number) for offset, name, number in versions}
        for offset, name, number in versions:
            if version_of(name) <= NEWEST_GLIBC:
                continue
            older = {}
            for index, (function, its_number, _) in enumerate(symbols(elf)):
                if number_of(its_number) == number:
                    choice = [
                        one for one in has.get(function, ()) if () < version_of(one) <= NEWEST_GLIBC
                    ]
                    if not choice:
                        stop(f"{function} must be in glibc 2.28, got {name} alone")
                    older[index] = max(choice, key=version_of)
                    lowered[f"{function} of {name}"] = older[index]
            # The entry takes the version of most, from another entry: its hash and its name.
            common, _ = Counter(one for one in older.values() if one in entries).most_common(1)[0]
            for field in (offset, offset + 8):
                source = entries[common][0] + field - offset
                content[field : field + 4] = content[source : source + 4]
            # The rest go to the entry of theirs; without one they are bound to whatever there is.
            for index, version in older.items():
                if version != common:
                    _, its_number = entries.get(version, (0, 1))
                    content[table + 2 * index : table + 2 * index + 2] = its_number.to_bytes(
                        2, "little"
                    )
    library.write_bytes(content)
    return lowered


# ---- steps ---------------------------------------------------------------------------------------


def date_of_release() -> str:
    """SOURCE_DATE_EPOCH; else when the last commit was made."""
    if os.environ.get("SOURCE_DATE_EPOCH"):
        return os.environ["SOURCE_DATE_EPOCH"]
    done = subprocess.run(
        ["git", "-C", ROOT, "log", "-1", "--format=%ct"], capture_output=True, text=True
    )
    if done.returncode != 0:
        stop("SOURCE_DATE_EPOCH must be set where there is no git, got nothing")
    return done.stdout.strip()


def unpacked_sdist(arch: str, scratch: Path) -> Path:
    """The sources as a release has them, in a folder whose path is always the same."""
    folder = Path("/tmp/msda-wheel" if arch == platform.machine() else f"/tmp/msda-wheel-{arch}")
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", "--outdir", scratch, ROOT)
    (sdist,) = scratch.glob("*.tar.gz")
    folder.mkdir(mode=0o700, exist_ok=True)
    source = folder / "source"
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(scratch)
    return Path(shutil.move(scratch / sdist.name.removesuffix(".tar.gz"), source))


def build(arch: str, source: Path, scratch: Path) -> Path:
    """The wheel as setup.py makes it, stripped."""
    variables = {
        "MSDA_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": "",
        "LDFLAGS": "-Wl,--strip-all",
    }
    if arch != platform.machine():
        if not os.environ.get("MSDA_TORCH_ROOT"):
            stop(
                f"MSDA_TORCH_ROOT must be the folder torch of an unpacked wheel for {arch}, got "
                "nothing: pip download --no-deps --only-binary=:all: --platform "
                f"manylinux_2_28_{arch} torch"
            )
        toolchain = scratch / "toolchain.cmake"
        toolchain.write_text(TOOLCHAIN.format(arch=arch))
        variables |= {
            "MSDA_CUDA": "0",
            "CMAKE_TOOLCHAIN_FILE": str(toolchain),
            "_PYTHON_HOST_PLATFORM": f"linux-{arch}",
        }
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    text = run(*command, "-v", "-w", scratch / "built", source, **variables)
    warnings = [
        line.strip()
        for line in text.splitlines()
        if re.search(r"\bwarning\b", line, re.I) and "byte-compiling is disabled" not in line
    ]
    if warnings:
        stop("the build must give no warning, got: " + "\n".join(warnings))
    print("\n".join(line.strip() for line in text.splitlines() if "CUDA kernels:" in line))
    (wheel,) = (scratch / "built").glob("*.whl")
    return wheel


def c_libraries(arch: str) -> list[Path]:
    """glibc's libraries that the linker took."""
    compiler = "gcc" if arch == platform.machine() else f"{arch}-linux-gnu-gcc"
    names = ("libc.so.6", "libm.so.6")
    return [Path(run(compiler, f"-print-file-name={name}").strip()) for name in names]


def finish(arch: str, wheel: Path, scratch: Path, output: Path) -> Path:
    """Lower what it asks of glibc, and have the tag granted."""
    folder = scratch / "unpacked"
    run(sys.executable, "-m", "wheel", "unpack", "-d", folder, wheel)
    (package,) = folder.iterdir()
    for name in LIBRARIES:
        lowered = lower_glibc(package / "msda" / name, c_libraries(arch))
        print(f"{name}: older versions for {len(lowered)} functions of a newer glibc")
    run(sys.executable, "-m", "wheel", "pack", "-d", scratch, package)
    (packed,) = scratch.glob("*.whl")
    command = [sys.executable, "-m", "auditwheel", "repair", "--plat", "auto", "--only-plat"]
    text = run(*command, "--exclude", "libtorch*", "-w", scratch / "granted", packed)
    (granted,) = (scratch / "granted").glob("*.whl")
    match = re.search(rf"-manylinux_(\d+)_(\d+)_{arch}\.whl$", granted.name)
    if not match or tuple(map(int, match.groups())) > NEWEST_GLIBC:
        stop(f"auditwheel must grant manylinux_2_28 or an older one, got {granted.name}: {text}")
    output.mkdir(exist_ok=True)
    return Path(shutil.copy(granted, output))


def report(wheel: Path, scratch: Path) -> None:
    """Tell what is in the wheel and what it asks of a system; end where that is too much."""
    shutil.unpack_archive(wheel, scratch / "final", "zip")
    print(f"{wheel.name}: {wheel.stat().st_size:,} bytes")
    for name in LIBRARIES:
        report_library(scratch / "final" / "msda" / name)


def report_library(library: Path) -> None:
    """The same of one library in it."""
    from elftools.elf.elffile import ELFFile

    with open(library, "rb") as file:
        elf = ELFFile(file)
        tags = list(elf.get_section_by_name(".dynamic").iter_tags())
        needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
        paths = [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
        versions = {number: name for _, name, number in needed_versions(elf)}
        wanted: dict[str, list[str]] = {}
        exported = []
        for name, index, is_defined in symbols(elf):
            if name and is_defined:
                exported.append(name)
            elif name:
                wanted.setdefault(versions.get(number_of(index), "of any version"), []).append(name)
        is_stripped = elf.get_section_by_name(".symtab") is None
    print(f"{library.name}: {library.stat().st_size:,} bytes")
    print(f"needs {', '.join(sorted(needed))}")
    for version in sorted(wanted, key=lambda name: (name.split("_")[0], version_of(name), name)):
        print(f"  {version}: {' '.join(sorted(wanted[version]))}")
    print(f"exports {' '.join(sorted(exported))}")
    extra = needed - MAY_NEED - LIBRARIES[library.name]
    if extra:
        stop(f"{library.name} must need nothing beyond torch, C and C++, got {extra}")
    if paths or not is_stripped:
        stop(f"{library.name} must be stripped and have no run path, got one that is not so")
    if any(not name.startswith("msda_") for name in exported):
        stop(f"{library.name} must export msda_* alone, got {exported}")


def main() -> int:
    """Build, finish, report, and try it where it runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", choices=["x86_64", "aarch64"], default=platform.machine())
    parser.add_argument("--output", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    os.umask(0o022)
    os.environ["SOURCE_DATE_EPOCH"] = date_of_release()
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        source = unpacked_sdist(options.arch, scratch)
        wheel = finish(options.arch, build(options.arch, source, scratch), scratch, options.output)
        report(wheel, scratch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
