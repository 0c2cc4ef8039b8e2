"""The recipes of docs/call-forms.md compute what the libraries of those call forms compute."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.integrations.plain_attention import as_maps, attend

PAGE = Path(__file__).resolve().parents[2] / "docs" / "call-forms.md"
WIDE = [(4, 9), (3, 5), (2, 2)]  # no map but the last is square
BATCH, QUERIES, HEADS, HEAD_DIM = 2, 7, 4, 8


@pytest.fixture(scope="module")
def recipes():
    """What the Python of the page defines."""
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(block, PAGE.name, "exec"), names)
    return names


# ---- comparing -----------------------------------------------------------------------------------


def random(*size):
    return torch.randn(*size, dtype=torch.float64).requires_grad_()


def random_locations(*size):
    """Over the map and a tenth beyond each edge."""
    return (torch.rand(*size, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()


def random_boxes(*size):
    """(centre x, centre y, width, height)."""
    return torch.rand(*size, 4, dtype=torch.float64).requires_grad_()


def num_pixels(shapes):
    return sum(height * width for height, width in shapes)


def check(actual, expected, leaves):
    """Outputs agree, and the gradients of all leaves."""
    assert_close(actual, expected)
    grad_output = torch.randn_like(actual)
    ours = torch.autograd.grad(actual, leaves, grad_output, retain_graph=True)
    theirs = torch.autograd.grad(expected, leaves, grad_output)
    for gradient, reference in zip(ours, theirs, strict=True):
        assert_close(gradient, reference)


# ---- mmcv, Grounding DINO, detrex ----------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["length_first", "batch_first"])
@pytest.mark.parametrize("own_identity", [False, True], ids=["adds_query", "adds_identity"])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "position_and_mask"])
def test_module_called_as_mmcvs(recipes, size, batch_first, extras, own_identity):
    channels, num_levels, num_points = HEADS * HEAD_DIM, len(WIDE), 3
    module = recipes["MultiScaleDeformableAttention"](
        channels, HEADS, num_levels, num_points, dropout=0.0, batch_first=batch_first
    ).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)

    num_keys = num_pixels(WIDE)
    query, value = random(BATCH, QUERIES, channels), random(BATCH, num_keys, channels)
    identity, query_pos = random(2, BATCH, QUERIES, channels).unbind()
    mask = torch.rand(BATCH, num_keys) < 0.3  # True = padding
    reference = torch.rand(BATCH, QUERIES, num_levels, size, dtype=torch.float64).requires_grad_()

    # The formula.
    asked = query + query_pos if extras else query
    projected = module.value_proj(value)
    if extras:
        projected = torch.where(mask.unsqueeze(-1), 0, projected)
    sampled_shape = (HEADS, num_levels, num_points)
    offsets = module.sampling_offsets(asked).unflatten(-1, (*sampled_shape, 2))
    weights = module.attention_weights(asked).unflatten(-1, (HEADS, -1)).softmax(-1)
    weights = weights.unflatten(-1, sampled_shape[1:])
    locations = []
    for level, (height, width) in enumerate(WIDE):
        centre = reference[:, :, None, level, None]  # (B, Q, 1, 1, 2 or 4)
        if size == 2:
            unit = 1 / torch.tensor([width, height]).double()
        else:
            unit = centre[..., 2:] / (2 * num_points)
        locations.append(centre[..., :2] + offsets[:, :, :, level] * unit)
    levels = as_maps(projected.unflatten(-1, (HEADS, HEAD_DIM)), WIDE)
    expected = module.output_proj(attend(levels, locations, weights.unbind(3)))
    expected = expected + (identity if own_identity else query)

    def laid_out(tensor):
        return tensor if batch_first else tensor.transpose(0, 1)

    options = {"identity": laid_out(identity)} if own_identity else {}
    if extras:
        options |= {"query_pos": laid_out(query_pos), "key_padding_mask": mask}
    actual = module(
        laid_out(query),
        value=laid_out(value),
        reference_points=reference,
        spatial_shapes=torch.tensor(WIDE),
        level_start_index=torch.tensor([0, 36, 51]),
        **options,
    )
    check(laid_out(actual), expected, [query, value, reference, *module.parameters()])


def test_module_called_as_mmcvs_attends_to_the_query_where_no_value_is_given(recipes):
    module = recipes["MultiScaleDeformableAttention"](32, 4, 1, 2, dropout=0.5).eval()
    query, reference = torch.randn(12, BATCH, 32), torch.rand(BATCH, 12, 1, 2)
    options = dict(reference_points=reference, spatial_shapes=torch.tensor([[3, 4]]))
    assert_close(module(query, **options), module(query, value=query, **options))
    in_training = module.train()(query, **options) - query
    assert (in_training == 0).float().mean() > 0.2  # dropped out before identity is added


# ---- RT-DETRv2 -----------------------------------------------------------------------------------


def ragged(shapes, counts):
    """value (B, S, M, D), locations (B, Q, M, K, 2), weights (B, Q, M, K)."""
    total = sum(counts)
    value = random(BATCH, num_pixels(shapes), HEADS, HEAD_DIM)
    locations = random_locations(BATCH, QUERIES, HEADS, total, 2)
    weights = torch.rand(BATCH, QUERIES, HEADS, total, dtype=torch.float64).requires_grad_()
    return value, locations, weights


@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
def test_attention_called_as_rtdetrv2s_reads_where_the_mask_is_true(recipes, masked):
    counts = [3, 6, 2]
    value, offsets, _ = ragged(WIDE, counts)
    logits = random(BATCH, QUERIES, HEADS, sum(counts))
    boxes = random_boxes(BATCH, QUERIES, 1)
    value_mask = torch.rand(BATCH, num_pixels(WIDE)) < 0.7 if masked else None  # True = valid

    read = value * value_mask.double()[..., None, None] if masked else value
    locations = [
        boxes[:, :, None, :, :2] + offset * boxes[:, :, None, :, 2:] * 0.5 / count
        for offset, count in zip(offsets.split(counts, dim=3), counts, strict=True)
    ]
    weights = logits.softmax(-1).split(counts, dim=3)
    expected = attend(as_maps(read, WIDE), locations, weights)
    actual = recipes["rtdetrv2_attention"](value, WIDE, boxes, offsets, logits, counts, value_mask)
    check(actual, expected, [value, boxes, offsets, logits])
