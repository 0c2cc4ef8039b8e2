"""The reference is right: worked out by hand, recomputed number by number, differentiated."""

import math

import pytest
import torch

from msda.reference import ms_deform_attn_fused_reference, ms_deform_attn_reference
from msda.testing import REFERENCE, call, gradient_names, leaves, make_fused_inputs, make_inputs
from tests.helpers.inputs import off_edges

pytestmark = pytest.mark.not_on_executor("this is the definition")

INF, NAN = math.inf, math.nan

# The map of the cases worked out by hand; pixel centres are at x, y in {0.25, 0.75}.
#   1 2
#   3 4
MAP, SHAPE = [1.0, 2.0, 3.0, 4.0], [(2, 2)]


def attend(values, shapes, samples, **options):
    """The float64 reference for B = Q = M = D = 1; samples are (x, y, weight), levels in order."""
    value = torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)
    table = torch.tensor(samples, dtype=torch.float64).view(1, 1, 1, -1, 3)
    counts = options.pop("num_points", [len(samples)])
    output = ms_deform_attn_reference(
        value, shapes, None, table[..., :2], table[..., 2], num_points=counts, **options
    )
    return output.item()


# ---- by hand -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.25, 0.25, 1.0),  # the centre of each pixel
        (0.75, 0.25, 2.0),
        (0.25, 0.75, 3.0),
        (0.75, 0.75, 4.0),
        (0.5, 0.5, 2.5),  # between all four
        (0.5, 0.25, 1.5),  # between two
        (0.375, 0.625, 0.75 * (0.25 * 1 + 0.75 * 3) + 0.25 * (0.25 * 2 + 0.75 * 4)),
        (0.0, 0.0, 0.25 * 1),  # the corners of the map: half a pixel outside on both axes
        (1.0, 0.0, 0.25 * 2),
        (0.0, 1.0, 0.25 * 3),
        (1.0, 1.0, 0.25 * 4),
        (0.0, 0.25, 0.5 * 1),  # its edges
        (1.0, 0.75, 0.5 * 4),
        (0.5, 1.0, 0.5 * 3.5),
        (-0.125, 0.25, 0.25 * 1),  # beyond them
        (0.75, 1.125, 0.25 * 4),
        (-0.25, 0.25, 0.0),  # x = -1: a whole pixel outside, no longer counts
        (1.25, 0.75, 0.0),  # x = W
        (0.25, -0.25, 0.0),
        (0.75, 1.25, 0.0),
        (0.5, 7.0, 0.0),
    ],
)
def test_bilinear_sample_worked_out_by_hand(x, y, expected):
    assert attend(MAP, SHAPE, [(x, y, 1.0)]) == expected


def test_samples_are_summed_with_their_weights():
    samples = [(0.25, 0.25, 0.5), (0.75, 0.25, 0.25), (0.5, 0.5, -2.0), (9.0, 9.0, 100.0)]
    assert attend(MAP, SHAPE, samples) == 0.5 * 1 + 0.25 * 2 - 2 * 2.5


def test_map_of_one_pixel_falls_off_linearly_on_all_sides():
    assert attend([8.0], [(1, 1)], [(0.5, 0.5, 1.0)]) == 8
    assert attend([8.0], [(1, 1)], [(0.25, 0.5, 1.0)]) == 6
    assert attend([8.0], [(1, 1)], [(0.5, 1.25, 1.0)]) == 2
    assert attend([8.0], [(1, 1)], [(0.25, 1.25, 1.0)]) == 1.5


def test_each_level_has_its_own_map_and_points():
    values = [1.0, 2.0, 3.0, 4.0, 10.0, 20.0, 30.0]  # 2 x 2, then 1 x 3
    samples = [(0.5, 0.5, 1.0), (0.5, 0.5, 1.0), (5 / 6, 0.5, 2.0)]
    output = attend(values, [(2, 2), (1, 3)], samples, num_points=[1, 2])
    assert output == pytest.approx(2.5 + 20 + 2 * 30, rel=1e-15)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e300, -1e300])
def test_locations_far_away_or_not_finite_contribute_exactly_zero(bad):
    for x, y in [(bad, 0.25), (0.25, bad), (bad, bad)]:
        assert attend(MAP, SHAPE, [(0.25, 0.25, 1.0), (x, y, 5.0)]) == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_locations_that_are_not_finite_contribute_exactly_zero_to_nearest(bad):
    for x, y in [(bad, 0.0), (0.0, bad), (bad, bad)]:
        samples = [(0.0, 0.0, 1.0), (x, y, 5.0)]
        assert attend(MAP, SHAPE, samples, interpolation="nearest") == 1


def test_axes_are_width_for_x_and_height_for_y():
    # 1 2 3
    # 4 5 6
    values, shape = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [(2, 3)]
    assert attend(values, shape, [(5 / 6, 0.25, 1.0)]) == pytest.approx(3, rel=1e-15)
    assert attend(values, shape, [(0.5, 0.75, 1.0)]) == pytest.approx(5, rel=1e-15)


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (0.0, 0.0, 1),  # trunc(0.5) = 0
        (0.2, 0.0, 2),  # trunc(0.6 + 0.5) = 1: the rule counts pixels from 1/2 to the left
        (0.5, 0.0, 3),  # trunc(1.5 + 0.5) = 2
        (0.99, 0.0, 3),  # trunc(2.97 + 0.5) = 3, clamped to the last column
        (0.0, 0.2, 1),  # trunc(0.4 + 0.5) = 0
        (0.0, 0.3, 4),  # trunc(0.6 + 0.5) = 1
        (0.5, 0.99, 6),  # trunc(1.98 + 0.5) = 2, clamped to the last row
        (-5.0, -5.0, 1),  # far outside: the pixel at the edge
        (5.0, 5.0, 6),
        (5.0, -5.0, 3),
        (1e300, 0.3, 6),
    ],
)
def test_nearest_sample_worked_out_by_hand_with_each_axis_clamped_by_its_own_size(x, y, expected):
    # 1 2 3
    # 4 5 6
    values, shape = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [(2, 3)]
    assert attend(values, shape, [(x, y, 1.0)], interpolation="nearest") == expected


def test_gradients_worked_out_by_hand():
    value = torch.tensor(MAP, dtype=torch.float64).view(1, 4, 1, 1).requires_grad_()
    location = torch.full((1, 1, 1, 1, 1, 2), 0.5, dtype=torch.float64, requires_grad=True)
    weight = torch.full((1, 1, 1, 1, 1), 3.0, dtype=torch.float64, requires_grad=True)
    ms_deform_attn_reference(value, SHAPE, None, location, weight).backward()
    assert value.grad.flatten().tolist() == [0.75, 0.75, 0.75, 0.75]  # weight / 4
    assert weight.grad.item() == 2.5  # the sample
    # W * weight * (east - west), H * weight * (south - north)
    assert location.grad.flatten().tolist() == [2 * 3 * 1, 2 * 3 * 2]


def test_fused_worked_out_by_hand_for_points():
    # Offsets are in pixels: from the centre of the map to pixels 1 and 4, and one pixel too far.
    offsets = torch.tensor([[-0.5, -0.5], [0.5, 0.5], [1.5, 0.5]], dtype=torch.float64)
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64).log()
    output = ms_deform_attn_fused_reference(
        torch.tensor(MAP, dtype=torch.float64).view(1, 4, 1, 1),
        SHAPE,
        None,
        torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64),
        offsets.view(1, 1, 1, 1, 3, 2),
        logits.view(1, 1, 1, 1, 3),
    )
    assert output.item() == pytest.approx(1 / 6 * 1 + 3 / 6 * 4 + 2 / 6 * 0, rel=1e-14)


def test_fused_worked_out_by_hand_for_boxes():
    # Offsets are in units of (w, h) / (2 * P): with P = 2 and a box 0.5 wide, 2 units are a pixel
    # of a map two wide.
    offsets = torch.tensor([[-2.0, -1.0], [2.0, 1.0]], dtype=torch.float64)
    output = ms_deform_attn_fused_reference(
        torch.tensor(MAP, dtype=torch.float64).view(1, 4, 1, 1),
        SHAPE,
        None,
        torch.tensor([0.5, 0.5, 0.5, 1.0], dtype=torch.float64).view(1, 1, 1, 4),
        offsets.view(1, 1, 1, 1, 2, 2),
        torch.zeros(1, 1, 1, 1, 2, dtype=torch.float64),
    )
    assert output.item() == 0.5 * 1 + 0.5 * 4


def test_padding_mask_is_true_for_padding():
    output = ms_deform_attn_fused_reference(
        torch.tensor(MAP, dtype=torch.float64).view(1, 4, 1, 1),
        SHAPE,
        None,
        torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, 1, 2, dtype=torch.float64),
        torch.zeros(1, 1, 1, 1, 1, dtype=torch.float64),
        padding_mask=torch.tensor([[False, False, True, False]]),
    )
    assert output.item() == (1 + 2 + 4) / 4


# ---- number by number ----------------------------------------------------------------------------


def sample_by_numbers(pixel_at, width, height, x, y, interpolation):
    """One sample of one channel, straight from the formulas. pixel_at(row, column) -> number."""
    if interpolation == "nearest":
        if not (math.isfinite(x) and math.isfinite(y)):
            return 0.0
        column = min(max(math.trunc(x * width + 0.5), 0), width - 1)
        row = min(max(math.trunc(y * height + 0.5), 0), height - 1)
        return pixel_at(row, column)
    x, y = x * width - 0.5, y * height - 0.5
    if not (-1 < x < width and -1 < y < height):
        return 0.0
    west, north = math.floor(x), math.floor(y)
    fx, fy = x - west, y - north

    def corner(row, column):
        inside = 0 <= row < height and 0 <= column < width
        return pixel_at(row, column) if inside else 0.0

    top = (1 - fx) * corner(north, west) + fx * corner(north, west + 1)
    bottom = (1 - fx) * corner(north + 1, west) + fx * corner(north + 1, west + 1)
    return (1 - fy) * top + fy * bottom


def attend_by_numbers(value, shapes, locations, weights, counts, interpolation="bilinear"):
    """Nested lists in, nested lists (B, Q, M * D) out; samples of all levels on one axis."""
    output = []
    for image, image_locations, image_weights in zip(value, locations, weights, strict=True):
        rows = []
        for query_locations, query_weights in zip(image_locations, image_weights, strict=True):
            row = []
            for m, (points, attention) in enumerate(
                zip(query_locations, query_weights, strict=True)
            ):
                for d in range(len(image[0][m])):
                    total, start, k = 0.0, 0, 0
                    for (height, width), count in zip(shapes, counts, strict=True):

                        def pixel_at(y, x, start=start, width=width, m=m, d=d, image=image):
                            return image[start + y * width + x][m][d]

                        for _ in range(count):
                            total += attention[k] * sample_by_numbers(
                                pixel_at, width, height, *points[k], interpolation
                            )
                            k += 1
                        start += height * width
                    row.append(total)
            rows.append(row)
        output.append(rows)
    return output


def locations_by_numbers(reference_points, offsets, shapes, counts):
    """Nested lists (B, Q, M, K, 2) of locations from reference points (B, Q, L or 1, 2 or 4)."""
    levels = [level for level, count in enumerate(counts) for _ in range(count)]

    def location(references, offset, level):
        reference = references[level if len(references) > 1 else 0]
        height, width = shapes[level]
        if len(reference) == 2:
            unit = (1 / width, 1 / height)
        else:
            unit = (reference[2] / (2 * counts[level]), reference[3] / (2 * counts[level]))
        return [reference[axis] + offset[axis] * unit[axis] for axis in range(2)]

    return [
        [
            [
                [
                    location(references, offset, level)
                    for offset, level in zip(head, levels, strict=True)
                ]
                for head in query
            ]
            for references, query in zip(image_references, image, strict=True)
        ]
        for image_references, image in zip(reference_points, offsets, strict=True)
    ]


def softmax_by_numbers(logits):
    if not isinstance(logits[0], float):
        return [softmax_by_numbers(row) for row in logits]
    powers = [math.exp(logit - max(logits)) for logit in logits]
    return [power / sum(powers) for power in powers]


SIZES = dict(batch=2, num_queries=6, num_heads=2, head_dim=3, dtype=torch.float64)
SHAPES = [(4, 5), (1, 1), (3, 2)]


def special_locations(inputs):
    """Put borders, corners, the far outside, NaN and infinities among the locations."""
    numbers = [0.0, 1.0, -0.1, 1.1, 0.5, -0.5, 1.5, 0.1, 0.9, 1e30, -1e30, NAN, INF, -INF]
    flat = inputs.sampling_locations.view(-1)
    flat[: len(numbers)] = torch.tensor(numbers)
    flat[41 : 41 + len(numbers)] = torch.tensor(numbers)
    return inputs


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
@pytest.mark.parametrize("num_points", [2, [3, 0, 2]], ids=["even", "ragged"])
def test_reference_matches_numbers_one_by_one(num_points, interpolation):
    inputs = special_locations(make_inputs(SHAPES, num_points=num_points, **SIZES))
    expected = attend_by_numbers(
        inputs.value.tolist(),
        SHAPES,
        inputs.sampling_locations.flatten(3, -2).tolist(),
        inputs.attention_weights.flatten(3).tolist(),
        num_points if isinstance(num_points, list) else [num_points] * len(SHAPES),
        interpolation,
    )
    output = call(REFERENCE, inputs, interpolation=interpolation)
    torch.testing.assert_close(
        output, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("num_points", [2, [3, 0, 2]], ids=["even", "ragged"])
@pytest.mark.parametrize("shared", [False, True], ids=["per_level", "shared"])
@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
def test_fused_reference_matches_numbers_one_by_one(num_points, reference_size, shared):
    inputs = make_fused_inputs(
        SHAPES,
        num_points=num_points,
        reference_size=reference_size,
        shared_reference=shared,
        padding=True,
        **SIZES,
    )
    counts = num_points if isinstance(num_points, list) else [num_points] * len(SHAPES)
    value = inputs.value.clone()
    value[inputs.padding_mask] = 0
    expected = attend_by_numbers(
        value.tolist(),
        SHAPES,
        locations_by_numbers(
            inputs.reference_points.tolist(),
            inputs.sampling_offsets.flatten(3, -2).tolist(),
            SHAPES,
            counts,
        ),
        softmax_by_numbers(inputs.attention_logits.flatten(3).tolist()),
        counts,
    )
    output = call(REFERENCE, inputs)
    torch.testing.assert_close(
        output, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-13
    )


# ---- derivatives ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "inputs",
    [
        make_inputs(SHAPES, num_points=[2, 1, 2], **SIZES),
        make_fused_inputs(SHAPES, num_points=2, padding=True, **SIZES),
        make_fused_inputs(SHAPES, num_points=[2, 0, 1], reference_size=4, **SIZES),
        make_fused_inputs(SHAPES, num_points=1, reference_size=4, shared_reference=True, **SIZES),
    ],
    ids=["plain", "points", "boxes", "shared_box"],
)
def test_gradients_of_the_reference_match_finite_differences(inputs):
    names = gradient_names(inputs)
    inputs = leaves(off_edges(inputs, margin=0.05), names)

    def function(*tensors):
        return call(
            REFERENCE, type(inputs)(**vars(inputs) | dict(zip(names, tensors, strict=True)))
        )

    tensors = tuple(getattr(inputs, name) for name in names)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 1e30, -0.5, 1.5])
def test_samples_that_do_not_count_have_exactly_zero_gradients(bad):
    inputs = make_inputs([(4, 5)], num_points=2, **SIZES)
    inputs.sampling_locations[:, :, :, :, 1] = bad
    inputs = leaves(inputs)
    call(REFERENCE, inputs).sum().backward()
    assert inputs.sampling_locations.grad[:, :, :, :, 1].eq(0).all()
    assert inputs.attention_weights.grad[:, :, :, :, 1].eq(0).all()
    assert inputs.value.grad.isfinite().all()
    assert inputs.sampling_locations.grad[:, :, :, :, 0].ne(0).any()


def test_nearest_gives_no_gradient_to_locations():
    inputs = make_inputs(SHAPES, num_points=2, **SIZES)
    inputs = leaves(inputs)
    call(REFERENCE, inputs, interpolation="nearest").sum().backward()
    assert inputs.sampling_locations.grad is None or inputs.sampling_locations.grad.eq(0).all()
    assert inputs.value.grad.ne(0).any()


# ---- dtypes and empty inputs ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_reference_returns_the_dtype_of_value_and_computes_in_float32(dtype):
    inputs = make_inputs(SHAPES, num_points=2, **SIZES | {"dtype": dtype})
    output = call(REFERENCE, inputs)
    assert output.dtype == dtype
    wide = make_inputs(SHAPES, num_points=2, **SIZES | {"dtype": torch.float32})
    wide.value = inputs.value.float()
    torch.testing.assert_close(output, call(REFERENCE, wide).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("size", ["batch", "num_queries", "num_points"])
@pytest.mark.parametrize("make", [make_inputs, make_fused_inputs], ids=["plain", "fused"])
def test_reference_accepts_empty_inputs(make, size):
    inputs = make(SHAPES, **SIZES | {"num_points": 2} | {size: 0})
    inputs = leaves(inputs)
    output = call(REFERENCE, inputs)
    assert output.shape == (inputs.value.shape[0], inputs.tensors()[-1].shape[1], 2 * 3)
    assert output.eq(0).all()
    output.sum().backward()
    for name in gradient_names(inputs):
        assert getattr(inputs, name).grad.eq(0).all()
