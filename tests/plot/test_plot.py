"""Recorded sampling points are the operator's own, and drawn where they are."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from msda.plot import add_legend, capture_sampling, draw_sampling
from msda.reference import ms_deform_attn_reference
from tests.helpers.results import assert_close
from tests.plot.small_attention import (
    NUM_KEYS,
    QUERIES,
    SHAPES,
    TwoLayers,
    make_arguments,
    make_attention,
)


def attend(attention, record, features, mask=None):
    """The module's output, from what was recorded: in float64, by the plain operator."""
    attention = attention.double()
    value = attention.value_proj(features.double())
    if mask is not None:
        value = value * ~mask[..., None]
    output = ms_deform_attn_reference(
        value.unflatten(-1, (attention.n_heads, -1)),
        record.spatial_shapes,
        None,
        record.sampling_locations.double(),
        record.attention_weights.double(),
        num_points=record.num_points,
    )
    return attention.output_proj(output)


def hooks_of(model):
    return [hook for module in model.modules() for hook in module._forward_hooks]


# ---- recording -----------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("levels", [2, 1], ids=["per_level", "shared"])
@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("n_points", [3, [3, 1]], ids=["even", "ragged"])
def test_what_is_recorded_gives_the_output_of_the_module(n_points, reference_size, levels, masked):
    attention = make_attention(n_points, torch.float64)
    arguments = make_arguments(reference_size, levels, torch.float64)
    mask = torch.rand(2, NUM_KEYS) < 0.4 if masked else None
    with capture_sampling(attention) as samples:
        output = attention(*arguments, input_padding_mask=mask)
    (record,) = samples
    sample_axes = (2, 3) if n_points == 3 else (4,)
    assert record.sampling_locations.shape == (2, QUERIES, 3, *sample_axes, 2)
    assert record.attention_weights.shape == (2, QUERIES, 3, *sample_axes)
    assert record.spatial_shapes == ((6, 9), (3, 5))
    assert record.num_points == (None if n_points == 3 else (3, 1))
    assert record.reference_points.equal(arguments[1])
    assert_close(attend(attention, record, arguments[2], mask), output)


def test_records_are_float32_and_detached(device):
    attention = make_attention().to(device)
    arguments = make_arguments(device=device)
    with capture_sampling(attention) as samples:
        output = attention(*arguments)
        output.sum().backward()
    (record,) = samples
    for tensor in (record.sampling_locations, record.attention_weights):
        assert tensor.dtype == torch.float32
        assert tensor.device == output.device
        assert not tensor.requires_grad
    assert_close(attend(attention, record, arguments[2]).float(), output)


def test_under_autocast_the_locations_of_16_bit_offsets_are_recorded():
    attention, arguments = make_attention(), make_arguments()
    with capture_sampling(attention) as samples, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            attention(*arguments)
            offsets = attention.sampling_offsets(arguments[0])
        attention(*arguments)
    (record, exact) = samples
    assert offsets.dtype == torch.bfloat16
    assert record.sampling_locations.dtype == torch.float32
    sizes = torch.tensor([(width, height) for height, width in SHAPES])[:, None]  # (L, 1, 2)
    expected = arguments[1][:, :, None, :, None] + offsets.float().view(2, 7, 3, 2, 3, 2) / sizes
    torch.testing.assert_close(record.sampling_locations, expected)
    assert not record.sampling_locations.equal(exact.sampling_locations)


def test_every_call_is_recorded_in_order_under_the_name_of_its_module():
    model, arguments = TwoLayers(), make_arguments()
    with capture_sampling(model) as samples, torch.no_grad():
        model(*arguments)
        model(*arguments)
    assert [record.name for record in samples] == ["first", "first", "last.0"] * 2
    assert [record.num_points for record in samples[:3]] == [None, None, (1, 4)]
    assert samples[2].spatial_shapes == ((6, 9), (3, 5))  # given as a tensor
    for early, late in zip(samples[:3], samples[3:], strict=True):
        assert early.sampling_locations.equal(late.sampling_locations)
    assert not samples[0].sampling_locations.equal(samples[1].sampling_locations)


def test_recording_changes_nothing_of_output_and_gradients():
    model, arguments = TwoLayers(), make_arguments()
    expected = model(*arguments)
    (expected_grad,) = torch.autograd.grad(expected.sum(), model.first.value_proj.weight)
    with capture_sampling(model):
        output = model(*arguments)
        (grad,) = torch.autograd.grad(output.sum(), model.first.value_proj.weight)
    assert output.equal(expected)
    assert grad.equal(expected_grad)


def test_blocks_may_be_nested():
    model, arguments = TwoLayers(), make_arguments()
    with torch.no_grad(), capture_sampling(model) as all_samples:
        with capture_sampling(model.last) as last:
            model(*arguments)
        model(*arguments)
    assert [record.name for record in last] == ["0"]
    assert len(all_samples) == 6
    assert last[0].sampling_locations.equal(all_samples[2].sampling_locations)
    assert not hooks_of(model)


def test_hooks_are_removed_also_after_an_exception():
    model = TwoLayers()
    with capture_sampling(model):
        assert len(hooks_of(model)) == 6
    assert not hooks_of(model)
    query, reference, features, _ = make_arguments()
    with pytest.raises(RuntimeError, match="spatial_shapes"), capture_sampling(model) as samples:
        model(query, reference, features, [(6, 9), (1, 1)])
    assert samples == []
    assert not hooks_of(model)


def test_a_forward_that_fails_leaves_no_trace_in_the_next_record():
    attention, arguments = make_attention(), make_arguments()
    with capture_sampling(attention) as samples, torch.no_grad():
        with pytest.raises(RuntimeError):
            attention(*arguments[:3], [(6, 9), (1, 1)])
        output = attention(*arguments)
    (record,) = samples
    assert_close(attend(attention, record, arguments[2]).float(), output)


def test_a_compiled_model_runs_eagerly_within_the_block_and_compiled_after_it():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    attention, arguments = make_attention(), make_arguments()
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    with torch.no_grad():
        expected = compiled(*arguments)
        with capture_sampling(compiled) as samples:
            output = compiled(*arguments)
        after = compiled(*arguments)
    assert len(graphs) == 1
    assert [record.name for record in samples] == ["_orig_mod"]
    assert output.equal(expected) and after.equal(expected)


def test_a_model_without_attention_is_refused():
    with (
        pytest.raises(ValueError, match=r"^model must contain an msda.MSDeformAttn or .* a Linear"),
        capture_sampling(nn.Linear(2, 2)),
    ):
        pass


# ---- drawing -------------------------------------------------------------------------------------


matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def record():
    attention, arguments = make_attention(), make_arguments()
    with capture_sampling(attention) as samples, torch.no_grad():
        attention(*arguments)
    return samples[0]


@pytest.fixture
def image():
    return torch.rand(40, 60, 3).numpy()  # 60 wide


def dots_of(axes):
    """Positions (N, 2), areas (N,) and colours (N, 4)."""
    (dots,) = axes.collections
    return tuple(
        torch.as_tensor(array)
        for array in (dots.get_offsets().data, dots.get_sizes(), dots.get_facecolors())
    )


@pytest.mark.parametrize("valid_ratio", [(1.0, 1.0), (0.5, 0.8)], ids=["whole", "padded"])
def test_dots_lie_where_the_locations_are(record, image, valid_ratio):
    figure = draw_sampling(image, record, query=4, batch_index=1, valid_ratio=valid_ratio)
    (axes,) = figure.axes
    positions, areas, colours = dots_of(axes)
    size = torch.tensor([60.0, 40.0]) / torch.tensor(valid_ratio)
    weights = record.attention_weights[1, 4].flatten()  # (M * L * P,)
    order = weights.argsort(descending=True)
    expected = record.sampling_locations[1, 4].flatten(0, 2)[order] * size
    torch.testing.assert_close(positions.float(), expected)
    # Areas are proportional to weights, and each level has its own colour.
    shares = areas / areas.sum() * weights.sum()
    torch.testing.assert_close(shares.float(), weights[order], rtol=1e-5, atol=1e-7)
    levels = torch.arange(2)[None, :, None].expand(3, 2, 3).flatten()[order]
    first, second = (colours[levels == level].unique(dim=0) for level in range(2))
    assert len(first) == len(second) == 1
    assert first[0, :3].mean() > second[0, :3].mean() + 0.1  # from light to dark
    assert axes.get_xlim() == (0, 60) and axes.get_ylim() == (40, 0)


def test_the_reference_point_and_the_box_are_marked(record, image):
    box = torch.tensor([[0.5, 0.25, 0.2, 0.4]])
    (axes,) = draw_sampling(image, record, query=2, boxes=box, titles=["a cat"]).axes
    for cross in axes.lines:
        x, y = (float(position[0]) for position in cross.get_data())
        expected = record.reference_points[0, 2, 0] * torch.tensor([60, 40])
        torch.testing.assert_close(torch.tensor([x, y]), expected)
    for rectangle in axes.patches:
        assert rectangle.get_bbox().bounds == pytest.approx((24, 2, 12, 16))
    assert axes.lines and axes.patches
    assert axes.get_title() == "a cat"


def test_levels_of_ragged_points_have_their_own_colours(image):
    attention, arguments = make_attention([1, 4]), make_arguments(reference_size=4, levels=1)
    with capture_sampling(attention) as samples, torch.no_grad():
        attention(*arguments)
    (axes,) = draw_sampling(image, samples, query=0).axes
    counts = dots_of(axes)[2].unique(dim=0, return_counts=True)[1]
    assert sorted(counts.tolist()) == [3 * 1, 3 * 4]


def test_there_is_a_panel_for_each_record_and_query(record, image):
    figure = draw_sampling(image, [record, record], query=[0, 5, 6])
    titles = [f"attention, query {query}" for query in (0, 5, 6)]
    assert [axes.get_title() for axes in figure.axes] == titles * 2
    assert len(figure.legends) == 1
    rows = {round(axes.get_position().y0, 6) for axes in figure.axes}
    assert len(rows) == 2


def test_a_figure_of_the_caller_is_drawn_into(record, image):
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    axes = figure.subplots(1, 3)
    assert draw_sampling(image, record, query=[1, 2], axes=axes[:2]) is figure
    assert [len(place.collections) for place in axes] == [1, 1, 0]
    assert not figure.legends
    add_legend(axes, record)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[:3] == ["reference point", "level 6 x 9", "level 3 x 5"]


def test_figures_of_photos_and_grey_images_are_saved(record, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    for mode in ("RGB", "L"):
        figure = draw_sampling(Image.new(mode, (90, 60)), record, query=[0, 3])
        figure.savefig(tmp_path / "sampling.png")
        with Image.open(tmp_path / "sampling.png") as drawn:
            assert len(drawn.convert("RGB").getcolors(maxcolors=1 << 24)) > 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(query=[]), "samples and query must not be empty, got 1 records and 0 queries"),
        (dict(query=0, boxes=torch.rand(4)), r"boxes must have shape \(1, 4\), got \(4,\)"),
        (dict(query=[0, 1], titles=["a"]), "titles must hold one entry per record and query, 2"),
        (dict(query=[0, 1], axes=[None]), "axes must hold one entry per record and query, 2"),
    ],
    ids=["no_query", "boxes", "titles", "axes"],
)
def test_what_does_not_fit_is_refused(record, image, options, message):
    with pytest.raises(ValueError, match=message):
        draw_sampling(image, record, **options)


def test_a_query_out_of_range_is_refused(record, image):
    with pytest.raises(IndexError):
        draw_sampling(image, record, query=QUERIES)


def test_recording_needs_no_matplotlib_and_drawing_says_what_is_missing():
    code = """if True:
        import sys
        sys.modules["matplotlib"] = None  # importing it fails
        import torch
        from msda import MSDeformAttn
        from msda.plot import capture_sampling, draw_sampling
        attention = MSDeformAttn(8, 1, 2, 1)
        with capture_sampling(attention) as samples:
            attention(torch.rand(1, 2, 8), torch.rand(1, 2, 1, 2), torch.rand(1, 12, 8), [(3, 4)])
        try:
            draw_sampling(torch.rand(3, 4).numpy(), samples, query=0)
        except ImportError as error:
            print(error)
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "msda.plot draws with matplotlib: pip install matplotlib\n"
