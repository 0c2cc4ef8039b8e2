"""Machine code is read, and the instructions per sample are counted, as one does by hand."""

import pytest

from tests.cuda.machine_code.kernel import Kernel
from tests.cuda.machine_code.listing import Flow, Problem
from tests.cuda.machine_code.tools import short_name
from tests.cuda.small_kernels import listing, loops, read_kernels

pytestmark = pytest.mark.usefixtures("small_kernels")


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
    assert short_name(demangled) == short


def test_a_new_template_argument_must_be_named():
    with pytest.raises(Problem, match=r"TEMPLATES must name 2 arguments of forward_kernel"):
        short_name("void msda::forward_kernel<float, 4>(msda::ForwardParams)")


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
