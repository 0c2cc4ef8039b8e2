"""Wrong input is refused in the form `<name> must <rule>, got <value>`, and nothing is printed."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import msda
from msda.testing import make_fused_inputs, make_inputs, random_like_output

pytestmark = pytest.mark.not_on_executor("arguments are checked before a kernel is chosen")

SHAPES = [(3, 4), (2, 2)]
SIZES = dict(batch=2, num_queries=5, num_heads=3, head_dim=4, num_points=2)


@pytest.fixture(autouse=True)
def nothing_is_printed(capfd):
    yield
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err == ""


def plain_arguments(device="cpu"):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    return vars(inputs) | dict(level_start_index=None, interpolation="bilinear")


def fused_arguments(device="cpu"):
    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    return vars(inputs) | dict(level_start_index=None)


def check_refused(function, arguments, changes, message, error=RuntimeError):
    """``changes`` maps names to values, or to functions of the right value."""
    arguments = dict(arguments)
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    with pytest.raises(error, match=message):
        function(**arguments)


def refused(cases):
    return pytest.mark.parametrize(("changes", "message"), cases)


# ---- value, shapes, points: what both functions take ---------------------------------------------

_METADATA = [
    (
        dict(value=lambda value: value[0]),
        r"^value must have shape \(B, S, M, D\), got \(16, 3, 4\)$",
    ),
    (
        dict(value=lambda value: value.int()),
        "^value must be float32, float64, float16 or bfloat16, got int32$",
    ),
    (
        dict(value=lambda value: value.to(torch.complex64)),
        "^value must be float32, float64, float16 or bfloat16, got complex64$",
    ),
    (dict(spatial_shapes=[]), "^spatial_shapes must hold at least one level, got none$"),
    (
        dict(spatial_shapes=torch.zeros(0, 2).long()),
        "^spatial_shapes must hold at least one level, got none$",
    ),
    (
        dict(spatial_shapes=[(3, 4), (2, 3)]),
        r"^spatial_shapes must cover the S = 16 keys of value, "
        r"got 18 pixels: \(3, 4, 2, 3\)$",
    ),
    (
        dict(spatial_shapes=[(3, 4)]),
        r"^spatial_shapes must cover the S = 16 keys of value, got 12 pixels: \(3, 4\)$",
    ),
    (
        dict(spatial_shapes=torch.tensor([(3, 4), (2, 1)])),
        r"^spatial_shapes must cover the S = 16 keys of value, "
        r"got 14 pixels: \(3, 4, 2, 1\)$",
    ),
    (
        dict(spatial_shapes=[(-3, -4), (2, 2)]),
        r"^spatial_shapes must be positive, got \(-3, -4, 2, 2\)$",
    ),
    (
        dict(spatial_shapes=[(4, 4), (0, 2)]),
        r"^spatial_shapes must be positive, got \(4, 4, 0, 2\)$",
    ),
    (
        dict(spatial_shapes=torch.tensor([3, 4, 2, 2])),
        r"^spatial_shapes must have shape \(L, 2\), got \(4,\)$",
    ),
    (
        dict(spatial_shapes=torch.tensor([[3, 4, 1], [2, 2, 1]])),
        r"^spatial_shapes must have shape \(L, 2\) = \(2, 2\), got \(2, 3\)$",
    ),
    (
        dict(spatial_shapes=torch.tensor(SHAPES).float()),
        "^spatial_shapes must be int64 or int32, got float32$",
    ),
    (
        dict(level_start_index=torch.tensor([0, 11])),
        r"^level_start_index must be the running sum of height \* width, \(0, 12\), got \(0, 11\)$",
    ),
    (
        dict(level_start_index=torch.tensor([0, 12, 16])),
        r"^level_start_index must have shape \(L,\) = \(2,\), got \(3,\)$",
    ),
    (
        dict(level_start_index=torch.tensor([0.0, 12.0])),
        "^level_start_index must be int64 or int32, got float32$",
    ),
    (
        dict(num_points=[2]),
        r"^num_points must hold one count per level \(2\), got \(2,\)$",
    ),
    (dict(num_points=[]), r"^num_points must hold one count per level, got \(\)$"),
    (dict(num_points=[3, -1]), r"^num_points must not be negative, got \(3, -1\)$"),
]


@refused(_METADATA)
def test_wrong_metadata_is_refused(changes, message):
    check_refused(msda.ms_deform_attn, plain_arguments(), changes, message)
    check_refused(msda.ms_deform_attn_fused, fused_arguments(), changes, message)


@refused(
    [
        (
            dict(sampling_locations=lambda points: points[..., 0]),
            r"^sampling_locations must have shape \(B, Q, M, L, P, 2\), got \(2, 5, 3, 2, 2\)$",
        ),
        (
            dict(sampling_locations=lambda points: points.repeat(1, 1, 1, 1, 1, 2)[..., :3]),
            r"^sampling_locations must have shape \(B, Q, M, L, P, 2\) = \(2, 5, 3, 2, 2, 2\), "
            r"got \(2, 5, 3, 2, 2, 3\)$",
        ),
        (
            dict(sampling_locations=lambda points: points[:1]),
            r"^sampling_locations must have shape .* = \(2, 5, 3, 2, 2, 2\), "
            r"got \(1, 5, 3, 2, 2, 2\)$",
        ),
        (
            dict(sampling_locations=lambda points: points[:, :, :2]),
            r"^sampling_locations must have shape .* = \(2, 5, 3, 2, 2, 2\), "
            r"got \(2, 5, 2, 2, 2, 2\)$",
        ),
        (
            dict(
                sampling_locations=lambda points: points[:, :, :, :1],
                attention_weights=lambda weights: weights[:, :, :, :1],
            ),
            r"^sampling_locations must have shape \(B, Q, M, L, P, 2\) = \(2, 5, 3, 2, 2, 2\), "
            r"got \(2, 5, 3, 1, 2, 2\)$",
        ),
        (
            dict(attention_weights=lambda weights: weights[:, :4]),
            r"^attention_weights must have shape \(B, Q, M, L, P\) = \(2, 5, 3, 2, 2\), "
            r"got \(2, 4, 3, 2, 2\)$",
        ),
        (
            dict(attention_weights=lambda weights: weights.flatten(3)),
            r"^attention_weights must have shape \(B, Q, M, L, P\) = .*, got \(2, 5, 3, 4\)$",
        ),
        (
            dict(num_points=[2, 2]),
            r"^sampling_locations must have shape \(B, Q, M, K, 2\), got \(2, 5, 3, 2, 2, 2\)$",
        ),
        (
            dict(
                num_points=[2, 3],
                sampling_locations=lambda points: points.flatten(3, 4),
                attention_weights=lambda weights: weights.flatten(3),
            ),
            r"^num_points must sum to the K = 4 samples of sampling_locations, got \(2, 3\)$",
        ),
        (
            dict(sampling_locations=lambda points: points.long()),
            "^sampling_locations must be float32, float64, float16 or bfloat16, got int64$",
        ),
        (
            dict(attention_weights=lambda weights: weights.bool()),
            "^attention_weights must be float32, float64, float16 or bfloat16, got bool$",
        ),
    ],
)
def test_wrong_locations_and_weights_are_refused(changes, message):
    check_refused(msda.ms_deform_attn, plain_arguments(), changes, message)


@refused(
    [
        (
            dict(sampling_offsets=lambda points: points[..., :1]),
            r"^sampling_offsets must have shape \(B, Q, M, L, P, 2\) = \(2, 5, 3, 2, 2, 2\), "
            r"got \(2, 5, 3, 2, 2, 1\)$",
        ),
        (
            dict(sampling_offsets=lambda points: points.flatten(3, 4)),
            r"^sampling_offsets must have shape \(B, Q, M, L, P, 2\), got \(2, 5, 3, 4, 2\)$",
        ),
        (
            dict(attention_logits=lambda logits: logits[:, :, :, :, :1]),
            r"^attention_logits must have shape \(B, Q, M, L, P\) = \(2, 5, 3, 2, 2\), "
            r"got \(2, 5, 3, 2, 1\)$",
        ),
        (
            dict(attention_logits=lambda logits: logits.int()),
            "^attention_logits must be float32, float64, float16 or bfloat16, got int32$",
        ),
        *(
            (
                dict(reference_points=change),
                r"^reference_points must have shape \(B, Q, L or 1, 2 or 4\) = "
                rf"\(2, 5, 2 or 1, 2 or 4\), got {got}$",
            )
            for change, got in [
                (lambda points: points[:1], r"\(1, 5, 2, 2\)"),
                (lambda points: points[:, :3], r"\(2, 3, 2, 2\)"),
                (lambda points: points.repeat(1, 1, 2, 1), r"\(2, 5, 4, 2\)"),
                (lambda points: points[:, :, :0], r"\(2, 5, 0, 2\)"),
                (lambda points: points.repeat(1, 1, 1, 2)[..., :3], r"\(2, 5, 2, 3\)"),
                (lambda points: points[:, :, 0], r"\(2, 5, 2\)"),
            ]
        ),
        (
            dict(reference_points=lambda points: points.int()),
            "^reference_points must be float32, float64, float16 or bfloat16, got int32$",
        ),
        (
            dict(padding_mask=torch.zeros(2, 15, dtype=torch.bool)),
            r"^padding_mask must have shape \(B, S\) = \(2, 16\), got \(2, 15\)$",
        ),
        (
            dict(padding_mask=torch.zeros(16, dtype=torch.bool)),
            r"^padding_mask must have shape \(B, S\) = \(2, 16\), got \(16,\)$",
        ),
        (
            dict(padding_mask=torch.zeros(2, 16)),
            r"^padding_mask must be bool \(True = padding\), got float32$",
        ),
        (
            dict(padding_mask=torch.zeros(2, 16, dtype=torch.uint8)),
            r"^padding_mask must be bool \(True = padding\), got uint8$",
        ),
    ],
)
def test_wrong_fused_arguments_are_refused(changes, message):
    check_refused(msda.ms_deform_attn_fused, fused_arguments(), changes, message)


# ---- what Python checks --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [None, [1.0], "text", 3])
def test_arguments_that_are_no_tensors_are_refused(bad):
    for name in ("value", "sampling_locations", "attention_weights"):
        message = f"^{name} must be a Tensor, got {type(bad).__name__}$"
        check_refused(msda.ms_deform_attn, plain_arguments(), {name: bad}, message, TypeError)
    for name in ("value", "reference_points", "sampling_offsets", "attention_logits"):
        message = f"^{name} must be a Tensor, got {type(bad).__name__}$"
        check_refused(msda.ms_deform_attn_fused, fused_arguments(), {name: bad}, message, TypeError)


@pytest.mark.parametrize("bad", [None, 7, [3, 4, 2, 2], [(3, 4, 5)], [(3,)], "ab"], ids=str)
def test_spatial_shapes_that_are_no_pairs_are_refused(bad):
    message = (
        r"^spatial_shapes must be a sequence of \(height, width\) pairs or an integer tensor, got"
    )
    for function, arguments in [
        (msda.ms_deform_attn, plain_arguments()),
        (msda.ms_deform_attn_fused, fused_arguments()),
    ]:
        check_refused(function, arguments, dict(spatial_shapes=bad), message, ValueError)


@pytest.mark.parametrize("bad", ["cubic", "discrete", None, 0, True])
def test_unknown_interpolations_are_refused(bad):
    message = r"^interpolation must be one of \('bilinear', 'nearest'\), got "
    check_refused(
        msda.ms_deform_attn, plain_arguments(), dict(interpolation=bad), message, ValueError
    )


@pytest.mark.parametrize(
    "changes",
    [
        dict(spatial_shapes=[(3.0, 4.0), (2.0, 2.0)]),
        dict(num_points=2),
        dict(num_points=[2.0, 2.0]),
    ],
    ids=str,
)
def test_arguments_of_the_wrong_type_are_refused_by_name(changes):
    (name,) = changes
    error = (TypeError, ValueError, RuntimeError)
    check_refused(msda.ms_deform_attn, plain_arguments(), changes, name, error)


@pytest.mark.parametrize("shapes", [SHAPES, torch.tensor(SHAPES)], ids=["ints", "tensor"])
def test_start_index_may_be_a_sequence_of_any_integers(shapes):
    for function, arguments in [
        (msda.ms_deform_attn, plain_arguments()),
        (msda.ms_deform_attn_fused, fused_arguments()),
    ]:
        arguments["spatial_shapes"] = shapes
        expected = function(**arguments)
        for start in ([0, 12], (0, 12), np.array([0, 12]), torch.tensor([0, 12]).int()):
            arguments["level_start_index"] = start
            assert torch.equal(function(**arguments), expected)
        for wrong in ([0, 11], (1, 12)):
            message = r"^level_start_index must be the running sum of height \* width, \(0, 12\)"
            check_refused(function, arguments, dict(level_start_index=wrong), message)


@pytest.mark.parametrize("bad", [3, "012", [0, 12.5], {"start": 0}], ids=str)
def test_a_start_index_that_is_no_integers_is_refused(bad):
    message = "^level_start_index must be an integer tensor, a sequence of ints or None, got "
    for function, arguments in [
        (msda.ms_deform_attn, plain_arguments()),
        (msda.ms_deform_attn_fused, fused_arguments()),
    ]:
        check_refused(function, arguments, dict(level_start_index=bad), message, TypeError)


@pytest.mark.parametrize("name", ["spatial_shapes", "num_points"])
def test_integers_beyond_64_bits_are_refused(name):
    bad = [(2**70, 4), (2, 2)] if name == "spatial_shapes" else [2, 2**70]
    message = f"^{name} must be below 2\\^63, got {2**70}$"
    check_refused(msda.ms_deform_attn, plain_arguments(), {name: bad}, message, ValueError)


# ---- sizes that do not fit the machine -----------------------------------------------------------


@pytest.mark.parametrize(
    ("num_keys", "shapes", "num_points", "name"),
    [
        (0, [(2**32, 2**32)], None, "spatial_shapes"),
        (16, [(2**60, 16), (4, 4)], None, "spatial_shapes"),
        (3, [(1, 1)] * 3, [2**63 - 1, 2**63 - 1, 4], "num_points|attention_weights"),
    ],
    ids=["pixels_of_a_level", "pixels_of_all_levels", "points_of_all_levels"],
)
def test_sums_that_overflow_are_refused(num_keys, shapes, num_points, name):
    # In a process of its own, which a read outside of value would end.
    points = f"3, 1, {len(shapes)}, 2" if num_points is None else "3, 1, 2"
    program = (
        "import torch, msda\n"
        f"value, points = torch.zeros(1, {num_keys}, 1, 4), torch.rand(1, {points}, 2)\n"
        "try:\n"
        f"    msda.ms_deform_attn(value, {shapes}, None, points, points[..., 0],"
        f" num_points={num_points})\n"
        "except (RuntimeError, ValueError) as error:\n"
        "    print(error)\n"
    )
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert any(process.stdout.startswith(f"{start} must ") for start in name.split("|"))


def test_maps_wider_than_float32_counts_are_refused_or_read_right():
    # From 2^24 on, float32 pixel coordinates are rounded to even numbers.
    width = 2**24 + 3
    value = torch.zeros(1, width + 2, 1, 1, dtype=torch.float16)
    value[0, width:] = torch.nan  # the level that follows in memory
    weights = torch.ones(1, 1, 1, 1)
    for interpolation, x in [("bilinear", (width - 1.2) / width), ("nearest", 1.5)]:
        locations = torch.tensor([x, 0.5]).view(1, 1, 1, 1, 2)
        try:
            output = msda.ms_deform_attn(
                value,
                [(1, width), (1, 2)],
                None,
                locations,
                weights,
                num_points=[1, 0],
                interpolation=interpolation,
            )
        except RuntimeError as error:
            assert str(error).startswith("spatial_shapes must ")
        else:
            assert output.item() == 0


# ---- the backward operators ----------------------------------------------------------------------


def backward_arguments(fused):
    arguments = fused_arguments() if fused else plain_arguments()
    inputs = (make_fused_inputs if fused else make_inputs)(SHAPES, **SIZES)
    value, *others = inputs.tensors()
    output = random_like_output(inputs)
    outputs = [output, output.clone()] if fused else [output]
    last = [None, *[True] * 4] if fused else [False, *[True] * 3]
    operator = (
        torch.ops.msda._ms_deform_attn_fused_backward
        if fused
        else torch.ops.msda._ms_deform_attn_backward
    )
    assert arguments["num_points"] is None
    return operator, outputs, [value, [3, 4, 2, 2], None, None, *others, [], *last]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_wrong_grad_output_is_refused(fused):
    operator, outputs, others = backward_arguments(fused)
    for bad, message in [
        (
            outputs[0][:, :4],
            r"^grad_output must have shape \(B, Q, M \* D\) = \(2, 5, 12\), got \(2, 4, 12\)$",
        ),
        (outputs[0].flatten(), r"^grad_output must have shape .*, got \(120,\)$"),
        (
            outputs[0].double(),
            r"^grad_output must have the dtype of value \(float32\), got float64$",
        ),
    ]:
        with pytest.raises(RuntimeError, match=message):
            operator(bad, *outputs[1:], *others)


def test_wrong_output_is_refused():
    operator, (grad_output, output), others = backward_arguments(fused=True)
    with pytest.raises(RuntimeError, match=r"^output must have shape \(B, Q, M \* D\) = "):
        operator(grad_output, output[..., :3], *others)
    with pytest.raises(
        RuntimeError, match=r"^output must have the dtype of value \(float32\), got"
    ):
        operator(grad_output, output.half(), *others)


def test_odd_number_of_sizes_is_refused():
    arguments = plain_arguments()
    value, points, weights = (
        arguments[name] for name in ("value", "sampling_locations", "attention_weights")
    )
    with pytest.raises(
        RuntimeError, match=r"^spatial_shapes must hold \(height, width\) pairs, got 3 numbers$"
    ):
        torch.ops.msda.ms_deform_attn(value, [3, 4, 2], None, None, points, weights, [], False)


# ---- devices -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["value", "sampling_locations", "attention_weights", "spatial_shapes"]
)
def test_tensors_on_several_devices_are_refused(name):
    arguments = plain_arguments() | {"spatial_shapes": torch.tensor(SHAPES)}
    changes = {name: lambda tensor: tensor.to("meta")}
    check_refused(msda.ms_deform_attn, arguments, changes, "must be on")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("name", ["value", "sampling_locations", "attention_weights"])
def test_tensors_on_cpu_and_cuda_are_refused(name):
    changes = {name: lambda tensor: tensor.cuda()}
    check_refused(msda.ms_deform_attn, plain_arguments(), changes, "must be on")


@refused(
    [
        (dict(value=lambda value: value[0]), "^value must have shape"),
        (dict(value=lambda value: value.int()), "^value must be float32"),
        (dict(spatial_shapes=[(3, 4), (2, 3)]), "^spatial_shapes must cover the S = 16 keys"),
        (dict(spatial_shapes=[]), "^spatial_shapes must hold at least one level"),
        (dict(spatial_shapes=[(-4, -4), (0, 2)]), "^spatial_shapes must be positive"),
        (dict(sampling_locations=lambda points: points[:1]), "^sampling_locations must have shape"),
        (
            dict(sampling_locations=lambda points: points[..., 0]),
            "^sampling_locations must have shape",
        ),
        (
            dict(attention_weights=lambda weights: weights[:, :4]),
            "^attention_weights must have shape",
        ),
        (dict(attention_weights=lambda weights: weights.int()), "^attention_weights must be float"),
        (dict(num_points=[2]), "^num_points must hold one count per level"),
    ],
)
def test_meta_tensors_are_checked_as_real_ones_are(changes, message):
    check_refused(msda.ms_deform_attn, plain_arguments("meta"), changes, message)


@refused(
    [
        (dict(reference_points=lambda points: points[:, :3]), "^reference_points must have shape"),
        (
            dict(sampling_offsets=lambda points: points[..., :1]),
            "^sampling_offsets must have shape",
        ),
        (dict(attention_logits=lambda logits: logits[:1]), "^attention_logits must have shape"),
        (
            dict(padding_mask=torch.zeros(2, 15, dtype=torch.bool, device="meta")),
            "^padding_mask must have shape",
        ),
        (dict(padding_mask=torch.zeros(2, 16, device="meta")), "^padding_mask must be bool"),
    ],
)
def test_fused_meta_tensors_are_checked_as_real_ones_are(changes, message):
    check_refused(msda.ms_deform_attn_fused, fused_arguments("meta"), changes, message)
