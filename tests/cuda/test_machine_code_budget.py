"""The machine code of the CUDA kernels stays within its budget, and the gate can fail."""

import json
import re
import shutil
import subprocess
import sys

import pytest

import msda.ops
from tests.cuda.machine_code import tools as tools_of_cuda
from tests.cuda.machine_code.__main__ import main, table
from tests.cuda.machine_code.budget import format_budget, missing_architectures, over_budget, record
from tests.cuda.machine_code.listing import Problem
from tests.cuda.machine_code.tools import ROOT, find_tool, read_objects
from tests.cuda.small_kernels import SASS, read_kernels

pytestmark = pytest.mark.usefixtures("small_kernels")


# ---- the gate ------------------------------------------------------------------------------------


EMPTY = {
    "margin": 0.02,
    "targets": {},
    "architectures": ["sm_90", "compute_90"],
    "local_memory": {},
    "hot": {},
    "registers": {},
}
PLAIN = "round_kernel<float, 4, 2, plain>"
ADD = "round_kernel<float, 4, 2, add>"
SPILL = "round_kernel<float, 2, 2, spill>"


def gate(edit=lambda text: text, kinds=("plain", "add"), **hand_written):
    """What is over the budget in the listing of sm_90 after an edit, if before nothing was."""
    recorded = [read_kernels("sm_90")[kind] for kind in kinds]
    budget = record(recorded, EMPTY | hand_written)
    edited = [read_kernels("sm_90", edit)[kind] for kind in kinds]
    return list(over_budget(edited, budget))


def test_kernels_keep_what_is_recorded_of_them():
    assert gate() == []


def test_local_memory_is_over_budget():
    stack, spills = gate(kinds=["spill"])
    assert stack == f"{SPILL} on sm_90: stack must be at most 0 bytes, got 128"
    assert spills.startswith(f"{SPILL} on sm_90: local loads and stores must be 0, got ")
    assert gate(kinds=["spill"], local_memory={"*, spill>": 128}) == []
    assert gate(kinds=["spill"], local_memory={"*, spill>": 120}) == [
        f"{SPILL} on sm_90: stack must be at most 120 bytes, got 128"
    ]


def test_a_narrower_gather_is_over_budget():
    assert gate(lambda text: text.replace("LDG.E.128", "LDG.E.64", 1)) == [
        f"{ADD} on sm_90: 128-bit loads in a round must be at least 8, got 7 and 2 others",
        f"{ADD} on sm_90: other loads in a round must be at most 1, got 2",
    ]


def test_a_generic_gather_is_over_budget():
    assert len(gate(lambda text: text.replace("LDG.E.128", "LD.E.128", 1))) == 2


def test_too_many_instructions_are_over_budget():
    last = " /*05f0*/ @P3 FFMA R23, R19, R30, R23 ;\n"
    assert gate(lambda text: text.replace(last, 2 * last)) == []
    assert gate(lambda text: text.replace(last, 5 * last)) == [
        f"{PLAIN} on sm_90: instructions per sample must be at most 1.92, got 2.0"
    ]


def test_the_target_counts_where_it_is_less_than_what_is_recorded():
    targets = {"sm_90": {"round_kernel<float, 4, *": 1.5, "other_kernel*": 1}}
    assert [text.partition(", got ")[0] for text in gate(targets=targets)] == [
        f"{name} on sm_90: instructions per sample must be at most 1.5" for name in (PLAIN, ADD)
    ]


def test_scalar_reductions_are_over_budget():
    assert gate(lambda text: text.replace("ADD.F32x4", "ADD.F32")) == [
        f"{ADD} on sm_90: reductions in a round must be {{'F32x4': 2}}, got {{'F32': 2}}"
    ]


def test_more_registers_than_the_next_multiple_of_eight_are_over_budget():
    assert gate(lambda text: text.replace("REG:44", "REG:48")) == []
    assert gate(lambda text: text.replace("REG:44", "REG:49")) == [
        f"{PLAIN} on sm_90: registers must be at most 48, got 49"
    ]


def test_a_barrier_is_over_budget():
    assert gate(
        lambda text: text.replace(" WARPSYNC ", " BAR.SYNC ").replace("NOP ;", "BAR.SYNC 0x0 ;")
    )


def test_a_lost_loop_is_over_budget():
    assert gate(lambda text: re.sub(r"@!?P[0-9] BRA", "@!PT BRA", text)) == [
        f"{name} on sm_90: must have a loop over rounds, got none: "
        "no loop with 128-bit loads was found"
        for name in (PLAIN, ADD)
    ]


def test_the_budget_and_the_code_hold_the_same_kernels():
    plain, add = (read_kernels("sm_90")[kind] for kind in ("plain", "add"))
    assert list(over_budget([add], record([add, plain], EMPTY))) == [
        f"{PLAIN} on sm_90: must be in the code, got none: run update"
    ]
    assert list(over_budget([add, plain], record([add], EMPTY))) == [
        f"{PLAIN} on sm_90: must be in the budget, got none: run update"
    ]


def test_a_build_holds_all_architectures():
    kernels = list(read_kernels("sm_90").values())
    assert list(missing_architectures(kernels, {"sm_90"}, EMPTY)) == []
    more = EMPTY | {"architectures": ["sm_90", "sm_100", "sm_75", "compute_100"]}
    assert list(missing_architectures(kernels, set(), more)) == [
        "the build must hold machine code for sm_75, sm_90, sm_100, got sm_90",
        "the build must hold PTX for compute_100, got none",
    ]


def test_an_update_of_one_architecture_keeps_the_others():
    budget = record(read_kernels("sm_120").values(), EMPTY)
    budget = record(read_kernels("sm_90").values(), budget)
    assert list(budget["registers"][PLAIN]) == ["sm_120", "sm_90"]
    assert list(budget["hot"][PLAIN]) == ["sm_120", "sm_90"]
    assert list(over_budget(read_kernels("sm_120").values(), budget)) == []
    # A kernel that was removed or renamed leaves the budget.
    renamed = record([read_kernels("sm_90")["add"]], budget)
    assert list(renamed["registers"]) == list(renamed["hot"]) == [ADD]


def test_the_budget_file_is_sorted_and_has_a_line_for_each_architecture():
    budget = EMPTY
    for arch in ("sm_90", "sm_75", "sm_120"):
        budget = record(read_kernels(arch).values(), budget)
    text = format_budget(budget)
    assert json.loads(text) == budget
    assert max(map(len, text.splitlines())) <= 160
    hot = text[text.index('"hot"') : text.index('"registers"')]
    assert re.findall(r'^ *"(sm_\d+)": ', hot, re.MULTILINE) == 2 * ["sm_75", "sm_90", "sm_120"]
    assert list(json.loads(text)["registers"]) == sorted(budget["registers"])


def test_the_table_shows_what_is_measured():
    plain = read_kernels("sm_90")["plain"]
    head, line = table([plain], record([plain], EMPTY)).splitlines()
    shown = dict(zip(re.split(r"  +", head), re.split(r"  +", line), strict=True))
    assert shown["kernel"] == PLAIN and shown["arch"] == "sm_90" and shown["loads"] == "8"
    assert shown["instr/sample"] == f"{plain.round.instructions_per_sample:.2f}"


# ---- with the tools ------------------------------------------------------------------------------


@pytest.fixture
def tools():
    """Skip where there is nothing to read machine code with."""
    for name in ("cuobjdump", "nvdisasm"):
        try:
            find_tool(name)
        except Problem as problem:
            pytest.skip(str(problem))


@pytest.fixture
def nvcc(tools):
    """Skip where there is no compiler either."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed")


def names(kernels):
    return {(kernel.name, kernel.arch) for kernel in kernels}


def test_an_object_of_several_architectures_is_read(nvcc, tmp_path):
    command = ["nvcc", "-std=c++17", "-O3", "-c", "-o", "rounds.cu.o", SASS / "rounds.cu"]
    for arch, code in (("75", "sm_75"), ("90", "[sm_90,compute_90]")):
        command += ["-gencode", f"arch=compute_{arch},code={code}"]
    subprocess.run(command, cwd=tmp_path, check=True)
    kernels, ptx = read_objects(tmp_path)
    assert ptx == {"sm_90"}
    expected = [*read_kernels("sm_75").values(), *read_kernels("sm_90").values()]
    assert names(kernels) == names(expected)
    assert {kernel.arch for kernel in kernels if kernel.is_hot} == {"sm_75", "sm_90"}
    only, _ = read_objects(tmp_path / "rounds.cu.o", "sm_90")
    assert names(only) == names(read_kernels("sm_90").values())


def test_a_folder_without_objects_is_an_error(tools, tmp_path):
    with pytest.raises(Problem, match=r"is not there, or holds no compiled CUDA sources"):
        read_objects(tmp_path)


def test_kernels_are_compiled_as_cmake_says(nvcc, tmp_path, monkeypatch, capsys):
    shutil.copy(SASS / "rounds.cu", tmp_path)
    (tmp_path / "CMakeLists.txt").write_text(
        """
        cmake_minimum_required(VERSION 3.18)
        string(REPLACE "." "" CMAKE_CUDA_ARCHITECTURES "$ENV{TORCH_CUDA_ARCH_LIST}")
        set(CMAKE_BUILD_TYPE Release)
        project(rounds LANGUAGES CUDA)
        add_library(rounds OBJECT rounds.cu)
        """
    )
    budget = tmp_path / "budget.json"
    budget.write_text(format_budget(EMPTY | {"local_memory": {SPILL: 128}}))
    monkeypatch.setattr(tools_of_cuda, "ROOT", tmp_path)
    command = ["--arch", "sm_90", "--budget", str(budget)]
    assert main(["check", *command]) == 1
    assert f"{PLAIN} on sm_90: must be in the budget, got none" in capsys.readouterr().out
    assert main(["update", *command]) == 0
    assert main(["check", *command]) == 0
    assert "0 over budget" in capsys.readouterr().out


def test_the_kernels_keep_their_budget(tools):
    """Those of the library under test, for one architecture; `make machine-code` takes all."""
    command = [sys.executable, "-m", "tests.cuda.machine_code", "check", "--arch", "sm_90"]
    run = subprocess.run(
        [*command, "--object", msda.ops.LIBRARY_PATH], cwd=ROOT, capture_output=True, text=True
    )
    if "must hold CUDA kernels for sm_90, got none" in run.stderr:
        pytest.skip("msda was built without CUDA kernels for sm_90")
    assert run.returncode == 0, run.stdout + run.stderr
