"""MSDeformAttn is the module of the paper: names, shapes, initialisation, and what it computes."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from msda import MSDeformAttn
from msda.reference import ms_deform_attn_reference
from msda.testing import relative_error
from tests.helpers.results import assert_same_bits

pytestmark = pytest.mark.not_on_executor("the module calls torch's operator")

SHAPES = [(6, 9), (3, 5)]
NUM_KEYS = 69


def make_module(device="cpu", n_points=3, **options):
    """12 channels, 2 levels and 3 heads; offsets and attention depend on the queries."""
    module = MSDeformAttn(d_model=12, n_levels=2, n_heads=3, n_points=n_points)
    nn.init.normal_(module.sampling_offsets.weight, std=0.3)
    nn.init.normal_(module.attention_weights.weight)
    for layer in (module.attention_weights, module.value_proj, module.output_proj):
        nn.init.normal_(layer.bias)
    return module.to(device, **options)


def make_arguments(device="cpu", reference_size=2, dtype=torch.float32, num_queries=7):
    query = torch.randn(2, num_queries, 12)
    reference = torch.rand(2, num_queries, 2, reference_size) * 0.8 + 0.1
    features = torch.randn(2, NUM_KEYS, 12)
    return tuple(tensor.to(device, dtype) for tensor in (query, reference, features))


def restated(module, query, reference, features, points_per_level, mask=None):
    """The module's forward, step by step as in the paper, in float64 on the CPU."""

    def project(layer, tensor):
        return tensor @ layer.weight.double().cpu().T + layer.bias.double().cpu()

    query, reference, features = (tensor.double().cpu() for tensor in (query, reference, features))
    value = project(module.value_proj, features)
    if mask is not None:
        value = value * ~mask.cpu().unsqueeze(-1)
    heads, samples = module.n_heads, sum(points_per_level)
    batch, num_queries = query.shape[:2]
    offsets = project(module.sampling_offsets, query).view(batch, num_queries, heads, samples, 2)
    weights = project(module.attention_weights, query).view(batch, num_queries, heads, samples)
    locations, k = torch.empty_like(offsets), 0
    for level, ((height, width), count) in enumerate(zip(SHAPES, points_per_level, strict=True)):
        for _ in range(count):
            centre = reference[:, :, None, level, :2]
            if reference.shape[-1] == 2:
                step = offsets[:, :, :, k] / torch.tensor([width, height])
            else:
                step = offsets[:, :, :, k] / count * reference[:, :, None, level, 2:] * 0.5
            locations[:, :, :, k] = centre + step
            k += 1
    output = ms_deform_attn_reference(
        value.unflatten(-1, (heads, -1)),
        SHAPES,
        None,
        locations,
        weights.softmax(-1),
        num_points=points_per_level,
    )
    return project(module.output_proj, output)


# ---- names, shapes, initialisation ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "offsets", "weights"),
    [
        ((), 256, 128),
        ((256, 4, 8, 4), 256, 128),
        ((64, 1, 4, 2), 16, 8),
        ((256, 3, 8, [3, 6, 3]), 192, 96),
        ((256, 3, 8, (4, 4, 4)), 192, 96),
    ],
    ids=str,
)
def test_state_dict_has_the_original_names_and_shapes(arguments, offsets, weights):
    module = MSDeformAttn(*arguments)
    channels = arguments[0] if arguments else 256
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    assert shapes == {
        "sampling_offsets.weight": (offsets, channels),
        "sampling_offsets.bias": (offsets,),
        "attention_weights.weight": (weights, channels),
        "attention_weights.bias": (weights,),
        "value_proj.weight": (channels, channels),
        "value_proj.bias": (channels,),
        "output_proj.weight": (channels, channels),
        "output_proj.bias": (channels,),
    }
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_numpy_integers_are_integers():
    numbers = MSDeformAttn(*np.array([32, 2, 4, 3]))
    assert str(numbers) == str(MSDeformAttn(32, 2, 4, 3))
    counts = MSDeformAttn(32, 2, 4, np.array([1, 3]))
    assert str(counts) == str(MSDeformAttn(32, 2, 4, [1, 3]))
    shapes, start = np.array([[4, 5], [2, 3]], dtype=np.int32), np.array([0, 20])
    query, points = torch.rand(1, 7, 32), torch.rand(1, 7, 2, 2)
    features = torch.rand(1, 26, 32)
    expected = counts(query, points, features, [(4, 5), (2, 3)], [0, 20])
    assert_same_bits(counts(query, points, features, shapes, start), expected)


@pytest.mark.parametrize("bad", [4.0, "4", None, np.float64(4), torch.tensor(4.0), [4.0, 4]])
def test_sizes_that_are_no_integers_are_refused(bad):
    for name in ("d_model", "n_levels", "n_heads", "n_points"):
        sizes = dict(d_model=32, n_levels=2, n_heads=4, n_points=2) | {name: bad}
        with pytest.raises(TypeError, match=f"^{name} must be an int, got "):
            MSDeformAttn(**sizes)


def test_first_offsets_point_along_a_ring_worked_out_by_hand():
    bias = MSDeformAttn(256, 4, 8, 4).sampling_offsets.bias.view(
        8, 4, 4, 2
    )  # heads, levels, points
    ring = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for head, (x, y) in enumerate(ring):
        for point in range(4):
            expected = torch.tensor([x, y]) * (point + 1.0)
            for level in range(4):
                torch.testing.assert_close(bias[head, level, point], expected, atol=1e-5, rtol=0)


def test_first_offsets_of_three_heads_are_as_long_as_the_point_counts():
    bias = MSDeformAttn(48, 2, 3, [2, 1]).sampling_offsets.bias.view(3, 3, 2)
    torch.testing.assert_close(bias.abs().amax(-1), torch.tensor([[1.0, 2.0, 1.0]] * 3))
    # 120 degrees: (-1/2, sqrt(3)/2), made as long as its larger coordinate.
    expected = torch.tensor([-1 / math.sqrt(3), 1.0])
    torch.testing.assert_close(bias[1], expected * torch.tensor([[1.0], [2.0], [1.0]]))


def test_offsets_and_attention_do_not_depend_on_the_query_at_first():
    module = MSDeformAttn()
    assert module.sampling_offsets.weight.eq(0).all()
    assert module.attention_weights.weight.eq(0).all()
    assert module.attention_weights.bias.eq(0).all()


def test_projections_start_xavier_uniform_without_bias():
    module = MSDeformAttn(256)
    bound = math.sqrt(6 / (256 + 256))
    for projection in (module.value_proj, module.output_proj):
        assert projection.bias.eq(0).all()
        assert projection.weight.abs().max() <= bound
        # Over 65 536 draws the extremes are close to the bound and the variance is bound^2 / 3.
        assert projection.weight.abs().max() > 0.999 * bound
        assert projection.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_reset_parameters_starts_anew():
    module = make_module()
    module.reset_parameters()
    fresh = MSDeformAttn(12, 2, 3, 3)
    for name in ("sampling_offsets", "attention_weights"):
        assert_same_bits(module.get_submodule(name).weight, fresh.get_submodule(name).weight)
        assert_same_bits(module.get_submodule(name).bias, fresh.get_submodule(name).bias)
    assert module.output_proj.bias.eq(0).all()


def test_first_offsets_are_made_in_the_dtype_of_the_module():
    module = MSDeformAttn(16, 1, 8, 2).double()
    module.reset_parameters()
    assert module.sampling_offsets.bias.dtype == torch.float64


# ---- what it computes ----------------------------------------------------------------------------


@pytest.mark.parametrize("n_points", [3, [1, 4]], ids=["even", "ragged"])
@pytest.mark.parametrize("reference_size", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_forward_is_the_papers_step_by_step(device, reference_size, n_points, padded):
    module = make_module(device, n_points)
    arguments = make_arguments(device, reference_size)
    mask = torch.rand(2, NUM_KEYS, device=device) < 0.3 if padded else None
    start_index = torch.tensor([0, 54], device=device)
    shapes = torch.tensor(SHAPES, device=device)
    output = module(*arguments, shapes, start_index, mask)
    counts = n_points if isinstance(n_points, list) else [n_points] * 2
    # float32 projections of 12 channels on both sides of the operator.
    assert relative_error(output, restated(module, *arguments, counts, mask)) < 3e-6


def test_float64_module_is_exact(device):
    module = make_module(device, dtype=torch.float64)
    arguments = make_arguments(device, dtype=torch.float64)
    output = module(*arguments, SHAPES)
    assert output.dtype == torch.float64
    assert relative_error(output, restated(module, *arguments, [3, 3])) < 1e-13


def test_every_parameter_and_input_gets_its_gradient(device):
    module = make_module(device, dtype=torch.float64)
    arguments = [
        tensor.requires_grad_() for tensor in make_arguments(device, 4, dtype=torch.float64)
    ]
    leaves = [*arguments, *module.parameters()]
    actual = torch.autograd.grad(module(*arguments, SHAPES).square().sum(), leaves)
    exact = restated(module, *arguments, [3, 3])
    expected = torch.autograd.grad(exact.square().sum(), leaves)
    for gradient, other in zip(actual, expected, strict=True):
        assert relative_error(gradient, other) < 1e-12


def test_masked_features_do_not_matter_because_true_means_padding(device):
    module = make_module(device)
    query, reference, features = make_arguments(device)
    mask = torch.zeros(2, NUM_KEYS, dtype=torch.bool, device=device)
    mask[0, 10:30] = True
    mask[1, 54:] = True
    expected = module(query, reference, features, SHAPES, None, mask)
    for rubbish in (1e4, math.inf, math.nan):
        changed = features.clone()
        changed[mask] = rubbish
        assert_same_bits(module(query, reference, changed, SHAPES, None, mask), expected)
    changed = features.clone()
    changed[~mask] += 1
    assert not torch.equal(module(query, reference, changed, SHAPES, None, mask), expected)


def test_mask_equals_zeroing_the_projected_values(device):
    module = make_module(device)
    query, reference, features = make_arguments(device)
    mask = torch.rand(2, NUM_KEYS, device=device) < 0.3
    expected = module(query, reference, features, SHAPES, None, mask)
    handle = module.value_proj.register_forward_hook(
        lambda layer, inputs, value: value.masked_fill(mask.unsqueeze(-1), 0)
    )
    torch.testing.assert_close(module(query, reference, features, SHAPES), expected)
    handle.remove()


def test_one_reference_point_may_serve_all_levels(device):
    module = make_module(device)
    query, reference, features = make_arguments(device)
    shared = reference[:, :, :1]
    expected = module(query, shared.expand(-1, -1, 2, -1), features, SHAPES)
    assert_same_bits(module(query, shared, features, SHAPES), expected)


def test_list_of_equal_counts_computes_what_the_number_does(device):
    number, counts = make_module(device, 3), make_module(device, [3, 3])
    counts.load_state_dict(number.state_dict())
    arguments = make_arguments(device)
    assert_same_bits(counts(*arguments, SHAPES), number(*arguments, SHAPES))


def test_no_queries_and_no_images_are_fine(device):
    module = make_module(device)
    query, reference, features = make_arguments(device)
    output = module(query[:, :0], reference[:, :0], features, SHAPES)
    assert output.shape == (2, 0, 12)
    output.sum().backward()
    assert module.value_proj.weight.grad.eq(0).all()
    assert module(query[:0], reference[:0], features[:0], SHAPES).shape == (0, 7, 12)


# ---- representation and wrong arguments ----------------------------------------------------------


def test_representation_names_the_sizes():
    text = repr(MSDeformAttn(64, 2, 4, [1, 2]))
    assert "MSDeformAttn(" in text
    assert "d_model=64, n_levels=2, n_heads=4, n_points=[1, 2]" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(d_model=0), "d_model must be positive, got 0"),
        (dict(n_levels=-1), "n_levels must be positive, got -1"),
        (dict(n_heads=0), "n_heads must be positive, got 0"),
        (
            dict(d_model=30, n_heads=8),
            "d_model must be a multiple of n_heads, got d_model=30, n_heads=8",
        ),
        (dict(n_points=0), "n_points must be positive, got 0"),
        (dict(n_points=[4, 4, 0, 4]), r"n_points must be positive, got \[4, 4, 0, 4\]"),
        (
            dict(n_points=[4, 4]),
            r"n_points must hold one count per level \(n_levels=4\), got \[4, 4\]",
        ),
        (dict(n_levels=2, n_points=()), r"n_points must hold one count per level"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        MSDeformAttn(**options)


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [
        (0, (2, 7, 13), r"query must have shape \(B, length, 12\), got \(2, 7, 13\)"),
        (0, (7, 12), r"query must have shape \(B, length, 12\), got \(7, 12\)"),
        (2, (2, 69, 11), r"input_flatten must have shape \(B, length, 12\), got \(2, 69, 11\)"),
        (1, (2, 7, 2, 3), r"reference_points must have shape .*, got \(2, 7, 2, 3\)"),
        (1, (2, 7, 2), r"reference_points must have shape .*, got \(2, 7, 2\)"),
    ],
)
def test_arguments_of_the_wrong_shape_are_refused(index, shape, message):
    arguments = list(make_arguments())
    arguments[index] = torch.zeros(shape)
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_module()(*arguments, SHAPES)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_arguments_that_are_no_tensors_are_refused_by_name(index):
    name = ("query", "reference_points", "input_flatten")[index]
    for bad in (None, [1.0], np.zeros((2, 7, 12))):
        arguments = list(make_arguments())
        arguments[index] = bad
        with pytest.raises(TypeError, match=f"^{name} must be a Tensor, got {type(bad).__name__}$"):
            make_module()(*arguments, SHAPES)


def test_reference_points_of_other_levels_are_refused():
    query, reference, features = make_arguments()
    with pytest.raises(RuntimeError, match="reference_points must have shape"):
        make_module()(query, reference.repeat(1, 1, 2, 1)[:, :, :3], features, SHAPES)


def test_other_numbers_of_levels_are_refused():
    with pytest.raises(RuntimeError, match="must have shape"):
        make_module()(*make_arguments(), [(6, 9), (3, 4), (1, 3)])
