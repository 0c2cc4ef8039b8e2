"""The machine code of the CUDA kernels stays within its budget, and the gate that says so can fail.

The listings in tests/sass come from small kernels made for these tests, rounds.cu.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import msda.ops
from tests.cuda import machine_code
from tests.cuda.machine_code import Flow, Kernel, Problem

SASS = Path(__file__).parent / "sass"
KINDS = ("plain", "rolled", "switch", "add", "shuffle", "spill")


@pytest.fixture(autouse=True)
def small_kernels(monkeypatch):
    """Let the gate take the small kernels for its own."""
    if shutil.which("c++filt") is None:
        pytest.skip("c++filt is not installed")
    monkeypatch.setitem(machine_code.TEMPLATES, "round_kernel", ("type", "width", "lanes", KINDS))
    monkeypatch.setattr(machine_code, "HOT_HEAD_DIM", 8)


def read_kernels(arch, edit=lambda text: text):
    """The small kernels of one architecture by kind, read from their listing after an edit."""
    text = edit((SASS / f"rounds.{arch}.sass").read_text())
    listings = machine_code.read_listing(text)
    resources = machine_code.read_resources(text)
    names = machine_code.demangle(listings)
    return {
        names[symbol].rpartition(" ")[2].rstrip(">"): Kernel(
            names[symbol], arch, *resources[symbol], listings[symbol]
        )
        for symbol in listings
    }


def listing(body):
    """A listing of one kernel from lines of instructions and labels."""
    lines = ['\t.section\t.text.kernel,"ax",@progbits', "kernel:"]
    address = 0
    for line in body.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(line.strip())
        else:
            lines.append(f"        /*{address:04x}*/  {line.strip()} ;")
            address += 16
    return machine_code.read_listing("\n".join(lines))["kernel"]


def loops(body):
    """For each loop: the indices of its first instruction and of all, smallest loop first."""
    return [(loop.head, sorted(loop.instructions)) for loop in Flow(listing(body)).loops()]


# ---- reading -------------------------------------------------------------------------------------


def test_instructions_are_read_with_their_parts():
    code = listing(
        """
        @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64+0x400]
        REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU desc[UR6][R28.64], R4
        @P1 BRA P2, `(.L_x_1)
        BRX R4 -0x240 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
        .L_x_1:
        .L_x_2:
        EXIT
        """
    )
    load, red, branch, table, _ = code.instructions
    assert (load.guard, load.opcode, load.operands) == (
        "!P0",
        "LDG.E.128.CONSTANT",
        "R4, desc[UR4][R2.64+0x400]",
    )
    assert red.opcode == "REDG.E.ADD.F32x4.FTZ.RN.STRONG.GPU" and red.guard == ""
    assert branch.targets == (".L_x_1",) and branch.is_conditional
    assert table.targets == (".L_x_1", ".L_x_2")
    assert code.labels == {"kernel": 0, ".L_x_1": 4, ".L_x_2": 4}


def test_an_unknown_line_is_an_error():
    with pytest.raises(Problem, match=r"an instruction was not understood: .*something else"):
        listing("something else")


@pytest.mark.parametrize(
    ("demangled", "short"),
    [
        (
            "void msda::forward_kernel<float, 4, 8, true, false, true>(msda::ForwardParams)",
            "forward_kernel<float, 4, 8, exact, plain, common>",
        ),
        (
            "void msda::backward_kernel<msda::Half, 8, 4, false, true, false>(msda::X<(int)1>)",
            "backward_kernel<Half, 8, 4, general, fused, any>",
        ),
        ("msda::(anonymous namespace)::fill(float*, int)", "fill"),
        ("void round_kernel<float, 4, 2, (Kind)3>(int)", "round_kernel<float, 4, 2, add>"),
    ],
)
def test_kernels_have_short_names(demangled, short):
    assert machine_code.short_name(demangled) == short


def test_a_new_template_argument_must_be_named():
    with pytest.raises(Problem, match=r"TEMPLATES must name 2 arguments of forward_kernel"):
        machine_code.short_name("void msda::forward_kernel<float, 4>(msda::ForwardParams)")


@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
def test_registers_and_stack_are_read(arch):
    kernels = read_kernels(arch)
    assert kernels["plain"].registers == {"sm_75": 46, "sm_90": 44, "sm_120": 42}[arch]
    assert all(kernel.stack == 0 for kind, kernel in kernels.items() if kind != "spill")


# ---- control flow --------------------------------------------------------------------------------


def test_a_backward_branch_is_a_loop():
    assert loops(
        """
        MOV R1, R2
        .L_x_0:
        IADD3 R1, R1, 0x1, RZ
        @P0 BRA `(.L_x_0)
        EXIT
        """
    ) == [(1, [1, 2])]


@pytest.mark.parametrize(
    "branch", ["@!P0 BRA", "BRA.U !UP0,", "BRA P1,", "@!P0 BRA.U", "@P0 BRA P1,"]
)
def test_every_conditional_branch_may_fall_through(branch):
    assert loops(
        f"""
        .L_x_0:
        NOP
        {branch} `(.L_x_0)
        EXIT
        """
    ) == [(0, [0, 1])]


def test_loops_nest():
    assert loops(
        """
        .L_x_0:
        LDS R1, [R2]
        .L_x_1:
        IADD3 R1, R1, 0x1, RZ
        @P0 BRA `(.L_x_1)
        @P1 BRA `(.L_x_0)
        EXIT
        """
    ) == [(1, [1, 2]), (0, [0, 1, 2, 3])]


def test_a_loop_goes_on_behind_a_break_to_its_end():
    """A break of an unrolled inner loop leads out of that, not out of the loop."""
    assert loops(
        """
        .L_x_0:
        BSSY B0, `(.L_x_1)
        @P0 BRA `(.L_x_2)
        FFMA R1, R2, R3, R1
        .L_x_2:
        BSYNC B0
        .L_x_1:
        @P1 BRA `(.L_x_0)
        @P2 EXIT
        EXIT
        """
    ) == [(0, [0, 1, 2, 3, 4])]


def test_a_jump_back_from_code_moved_to_the_end_is_no_loop():
    assert (
        loops(
            """
            @P0 BRA `(.L_x_1)
            .L_x_0:
            STG.E [R2], R1
            EXIT
            .L_x_1:
            MOV R1, RZ
            BRA `(.L_x_0)
            """
        )
        == []
    )


def test_paths_of_diverged_warps_are_not_followed():
    assert loops(
        """
        .L_x_0:
        BRA.DIV UR4, `(.L_x_3)
        SHFL.BFLY PT, R1, R1, 0x1, 0x1f
        .L_x_1:
        BRA.CONV ~URZ, `(.L_x_2)
        CALL.REL.NOINC `($warpsync)
        .L_x_2:
        @P0 BRA `(.L_x_0)
        EXIT
        .L_x_3:
        WARPSYNC.COLLECTIVE R1, `(.L_x_4)
        .L_x_4:
        SHFL.BFLY PT, R1, R1, 0x1, 0x1f
        BRA `(.L_x_1)
        $warpsync:
        RET.REL.NODEC R2 `(kernel)
        """
    ) == [(0, [0, 1, 2, 4])]


def test_a_call_within_the_kernel_is_a_jump():
    assert loops(
        """
        .L_x_0:
        @P0 CALL.REL.NOINC `(.L_x_1)
        BRA `(.L_x_0)
        .L_x_1:
        EXIT
        """
    ) == [(0, [0, 1])]


def test_all_targets_of_a_jump_table_are_followed():
    assert loops(
        """
        .L_x_0:
        BRX R4 -0x240 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*)
        .L_x_1:
        BRA `(.L_x_3)
        .L_x_2:
        NOP
        .L_x_3:
        @P0 BRA `(.L_x_0)
        EXIT
        """
    ) == [(0, [0, 1, 2, 3])]


def test_a_jump_table_must_name_its_targets():
    with pytest.raises(Problem, match="BRX names no targets"):
        loops("BRX R4 -0x240")


# ---- instructions per sample ---------------------------------------------------------------------


def test_a_round_is_counted():
    """By hand: instructions 0x230 to 0x600 of the listing, 62, of which two are NOPs."""
    plain = read_kernels("sm_90")["plain"]
    (loop,) = Flow(plain.listing).loops()
    assert sorted(loop.instructions) == list(range(0x23, 0x61))
    assert plain.round.instructions_per_sample == plain.round.longest_path == round(60 / 32, 2)
    assert (plain.round.gathers, plain.round.other_loads) == (8, 1)
    assert (plain.round.reductions, plain.round.shuffles, plain.barriers) == ({}, 0, 0)


@pytest.mark.parametrize(
    ("arch", "reductions"),
    [("sm_75", {"F32": 8}), ("sm_90", {"F32x4": 2}), ("sm_120", {"F32x4": 2})],
)
def test_reductions_are_counted_by_kind(arch, reductions):
    assert read_kernels(arch)["add"].round.reductions == reductions


def test_a_loop_that_is_not_unrolled_counts_as_often_as_it_runs():
    rolled = read_kernels("sm_90")["rolled"]
    inner, outer = Flow(rolled.listing).loops()
    assert rolled.round.gathers == 8
    instructions = len(outer.instructions) + len(inner.instructions) - 2  # NOPs of the outer
    assert rolled.round.instructions_per_sample == round(instructions / 32, 2)
    assert rolled.round.longest_path == rolled.round.instructions_per_sample


def test_exclusive_arms_all_count_but_the_longest_path_takes_one():
    switch = read_kernels("sm_90")["switch"].round
    assert (switch.gathers, switch.other_loads) == (9, 3)  # one of the other loads is of 64 bits
    assert switch.longest_path < switch.instructions_per_sample


def test_padding_does_not_count_and_a_helper_does():
    code = """
        .L_x_0:
        LDG.E R1, [R2]
        LDG.E R1, [R2]
        LDG.E R1, [R2]
        LDG.E R1, [R2]
        {extra}
        @P0 BRA `(.L_x_0)
        EXIT
        $helper:
        MUFU.RCP R1, R1
        @P0 BRA `(.L_x_1)
        FMUL R1, R1, R1
        .L_x_1:
        RET.REL.NODEC R2 `(kernel)
        """
    name = "round_kernel<float, 1, 1, plain>"
    for extra, instructions in (("NOP", 5), ("MOV R1, R2", 6), ("CALL.REL.NOINC `($helper)", 10)):
        kernel = Kernel(name, "sm_90", 8, 0, listing(code.format(extra=extra)))
        assert kernel.round.instructions_per_sample == round(instructions / 32, 2)


def test_a_kernel_without_gathers_has_no_round():
    kernel = Kernel("round_kernel<float, 1, 1, plain>", "sm_90", 8, 0, listing("EXIT"))
    with pytest.raises(Problem, match="no loop with 32-bit loads was found"):
        _ = kernel.round


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
    budget = machine_code.record(recorded, EMPTY | hand_written)
    edited = [read_kernels("sm_90", edit)[kind] for kind in kinds]
    return list(machine_code.over_budget(edited, budget))


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
    assert list(machine_code.over_budget([add], machine_code.record([add, plain], EMPTY))) == [
        f"{PLAIN} on sm_90: must be in the code, got none: run update"
    ]
    assert list(machine_code.over_budget([add, plain], machine_code.record([add], EMPTY))) == [
        f"{PLAIN} on sm_90: must be in the budget, got none: run update"
    ]


def test_a_build_holds_all_architectures():
    kernels = list(read_kernels("sm_90").values())
    assert list(machine_code.missing_architectures(kernels, {"sm_90"}, EMPTY)) == []
    more = EMPTY | {"architectures": ["sm_90", "sm_100", "sm_75", "compute_100"]}
    assert list(machine_code.missing_architectures(kernels, set(), more)) == [
        "the build must hold machine code for sm_75, sm_90, sm_100, got sm_90",
        "the build must hold PTX for compute_100, got none",
    ]


def test_an_update_of_one_architecture_keeps_the_others():
    budget = machine_code.record(read_kernels("sm_120").values(), EMPTY)
    budget = machine_code.record(read_kernels("sm_90").values(), budget)
    assert list(budget["registers"][PLAIN]) == ["sm_120", "sm_90"]
    assert list(budget["hot"][PLAIN]) == ["sm_120", "sm_90"]
    assert list(machine_code.over_budget(read_kernels("sm_120").values(), budget)) == []
    # A kernel that was removed or renamed leaves the budget.
    renamed = machine_code.record([read_kernels("sm_90")["add"]], budget)
    assert list(renamed["registers"]) == list(renamed["hot"]) == [ADD]


def test_the_budget_file_is_sorted_and_has_a_line_for_each_architecture():
    budget = EMPTY
    for arch in ("sm_90", "sm_75", "sm_120"):
        budget = machine_code.record(read_kernels(arch).values(), budget)
    text = machine_code.format_budget(budget)
    assert json.loads(text) == budget
    assert max(map(len, text.splitlines())) <= 160
    hot = text[text.index('"hot"') : text.index('"registers"')]
    assert re.findall(r'^ *"(sm_\d+)": ', hot, re.MULTILINE) == 2 * ["sm_75", "sm_90", "sm_120"]
    assert list(json.loads(text)["registers"]) == sorted(budget["registers"])


def test_the_table_shows_what_is_measured():
    plain = read_kernels("sm_90")["plain"]
    head, line = machine_code.table([plain], machine_code.record([plain], EMPTY)).splitlines()
    shown = dict(zip(re.split(r"  +", head), re.split(r"  +", line), strict=True))
    assert shown["kernel"] == PLAIN and shown["arch"] == "sm_90" and shown["loads"] == "8"
    assert shown["instr/sample"] == f"{plain.round.instructions_per_sample:.2f}"


# ---- with the tools ------------------------------------------------------------------------------


@pytest.fixture
def tools():
    """Skip where there is nothing to read machine code with."""
    for name in ("cuobjdump", "nvdisasm"):
        try:
            machine_code.find_tool(name)
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
    kernels, ptx = machine_code.read_objects(tmp_path)
    assert ptx == {"sm_90"}
    expected = [*read_kernels("sm_75").values(), *read_kernels("sm_90").values()]
    assert names(kernels) == names(expected)
    assert {kernel.arch for kernel in kernels if kernel.is_hot} == {"sm_75", "sm_90"}
    only, _ = machine_code.read_objects(tmp_path / "rounds.cu.o", "sm_90")
    assert names(only) == names(read_kernels("sm_90").values())


def test_a_folder_without_objects_is_an_error(tools, tmp_path):
    with pytest.raises(Problem, match=r"is not there, or holds no compiled CUDA sources"):
        machine_code.read_objects(tmp_path)


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
    budget.write_text(machine_code.format_budget(EMPTY | {"local_memory": {SPILL: 128}}))
    monkeypatch.setattr(machine_code, "ROOT", tmp_path)
    command = ["--arch", "sm_90", "--budget", str(budget)]
    assert machine_code.main(["check", *command]) == 1
    assert f"{PLAIN} on sm_90: must be in the budget, got none" in capsys.readouterr().out
    assert machine_code.main(["update", *command]) == 0
    assert machine_code.main(["check", *command]) == 0
    assert "0 over budget" in capsys.readouterr().out


def test_the_kernels_keep_their_budget(tools):
    """Those of the library under test, for one architecture; `make machine-code` takes all."""
    command = [sys.executable, machine_code.__file__, "check", "--arch", "sm_90"]
    run = subprocess.run(
        [*command, "--object", msda.ops.LIBRARY_PATH], capture_output=True, text=True
    )
    if "must hold CUDA kernels for sm_90, got none" in run.stderr:
        pytest.skip("msda was built without CUDA kernels for sm_90")
    assert run.returncode == 0, run.stdout + run.stderr
