"""msda.flops: what PyTorch's FLOP counter counts, against counts by hand."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import msda
import msda.flops  # registers the operators with the counter
from msda.testing import leaves, make_fused_inputs, make_inputs

pytestmark = [
    pytest.mark.skipif(
        msda.info()["backend"] != "native", reason="the reference is not one operator"
    ),
    pytest.mark.not_on_executor("FLOPs are counted by a formula"),
]

SHAPES = [(4, 6), (2, 3)]
SIZES = dict(batch=2, num_queries=5, num_heads=3, head_dim=8)


def counted(run):
    """FLOPs by operator, without the counts of PyTorch's own operators."""
    with FlopCounterMode(display=False) as counter:
        run()
    counts = counter.get_flop_counts().get("Global", {})
    return {str(operator): flops for operator, flops in counts.items() if "msda" in str(operator)}


def plain(inputs, **options):
    value, *others = inputs.tensors()
    return msda.ms_deform_attn(
        value, inputs.spatial_shapes, None, *others, num_points=inputs.num_points, **options
    )


def fused(inputs):
    value, *others = inputs.tensors()
    return msda.ms_deform_attn_fused(
        value, inputs.spatial_shapes, None, *others, num_points=inputs.num_points
    )


# 2 images * 5 queries * 3 heads * 2 levels * 4 points * 8 channels * (4 + 1) multiply-adds * 2
UNIFORM = 19_200
# 2 + 5 points in all
RAGGED = 16_800


@pytest.mark.parametrize(
    ("num_points", "expected"), [(4, UNIFORM), ([2, 5], RAGGED)], ids=["uniform", "ragged"]
)
@pytest.mark.parametrize("with_graph", [False, True])
def test_forward_counts_five_multiply_adds_per_sample_and_channel(num_points, expected, with_graph):
    for core, make, name in (
        (plain, make_inputs, "msda.ms_deform_attn"),
        (fused, make_fused_inputs, "msda.ms_deform_attn_fused"),
    ):
        inputs = make(SHAPES, num_points=num_points, **SIZES)
        inputs = leaves(inputs) if with_graph else inputs
        assert counted(lambda core=core, inputs=inputs: core(inputs)) == {name: expected}


@pytest.mark.parametrize("graph_is_counted", [False, True])
@pytest.mark.parametrize(
    ("num_points", "forward"), [(4, UNIFORM), ([2, 5], RAGGED)], ids=["uniform", "ragged"]
)
def test_backward_counts_five_for_values_and_four_for_the_rest(
    num_points, forward, graph_is_counted
):
    both = forward * 9 // 5
    for core, make, name in (
        (plain, make_inputs, "msda._ms_deform_attn_backward"),
        (fused, make_fused_inputs, "msda._ms_deform_attn_fused_backward"),
    ):
        tensors = leaves(make(SHAPES, num_points=num_points, **SIZES))
        made_before = core(tensors)

        def run(core=core, tensors=tensors, made_before=made_before):
            output = core(tensors) if graph_is_counted else made_before
            output.sum().backward()

        counts = counted(run)
        assert counts.pop(name) == both
        assert list(counts.values()) == ([forward] if graph_is_counted else [])


# By tensor: value, locations, weights; value, reference points, offsets, logits.
@pytest.mark.parametrize(
    ("core", "make", "factors"),
    [(plain, make_inputs, [5, 4, 4]), (fused, make_fused_inputs, [5, 4, 4, 4])],
    ids=["plain", "fused"],
)
def test_a_gradient_alone_counts_what_it_needs(core, make, factors):
    for place, factor in enumerate(factors):
        inputs = make(SHAPES, **SIZES)
        inputs.tensors()[place].requires_grad_()
        output = core(inputs)
        counts = counted(lambda output=output: output.sum().backward())
        assert list(counts.values()) == [UNIFORM * factor // 5]


def test_nearest_counts_one_pixel_per_sample():
    tensors = leaves(make_inputs(SHAPES, **SIZES))
    counts = counted(lambda: plain(tensors, interpolation="nearest").sum().backward())
    assert counts == {
        "msda.ms_deform_attn": UNIFORM // 5,
        "msda._ms_deform_attn_backward": 2 * UNIFORM // 5,
    }


def test_a_module_counts_its_projections_and_the_operator():
    attention = msda.MSDeformAttn(d_model=24, n_levels=2, n_heads=3, n_points=4)
    query, features = torch.rand(2, 5, 24), torch.rand(2, 30, 24)
    reference_points = torch.rand(2, 5, 2, 2)
    with FlopCounterMode(display=False) as counter:
        attention(query, reference_points, features, SHAPES)
    linear = 2 * (30 * 24 * 24 + 5 * 24 * (48 + 24 + 24)) * 2
    assert counter.get_total_flops() == UNIFORM + linear
    assert counter.get_flop_counts()["MSDeformAttn"][torch.ops.msda.ms_deform_attn_fused] == UNIFORM


def test_meta_tensors_count_without_memory():
    shapes = [(1000, 1000), (500, 500)]
    inputs = [torch.empty(size, device="meta") for size in (
        (8, 1_250_000, 8, 32), (8, 1_250_000, 8, 2, 4, 2), (8, 1_250_000, 8, 2, 4)
    )]  # fmt: skip
    counts = counted(lambda: msda.ms_deform_attn(inputs[0], shapes, None, *inputs[1:]))
    assert counts == {"msda.ms_deform_attn": 8 * 1_250_000 * 8 * 8 * 32 * 10}


def test_importing_msda_does_not_import_the_counter():
    # Where Triton is installed, the counter imports it: six times as long as msda takes.
    code = "import sys, msda; sys.exit('torch.utils.flop_counter' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
