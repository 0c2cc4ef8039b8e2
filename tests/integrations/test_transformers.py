"""`msda.use_msda(model)` lets models of transformers run ours, and changes nothing else."""

import copy
import pickle

import pytest
import torch

from msda import forms
from msda.integrations.transformers import undo, use_msda
from msda.plot import capture_sampling, draw_sampling
from tests.helpers.results import assert_close, assert_same_bits
from tests.integrations.transformers_models import (
    FAMILIES,
    forward,
    make_layer,
    make_model,
    tensors_of,
)

# ---- every family --------------------------------------------------------------------------------


def run(model, inputs):
    """Outputs, and gradients of a weighted sum of them all, by name."""
    model = copy.deepcopy(model)  # one family keeps embeddings of words, and with them a graph
    outputs = tensors_of(model(**inputs))
    random = torch.Generator().manual_seed(0)
    loss = 0
    for tensor in outputs.values():
        if tensor.requires_grad:
            weights = torch.rand(tensor.shape, generator=random, dtype=torch.float64) - 0.5
            loss = loss + (tensor.nan_to_num(0, 0, 0) * weights.to(tensor.dtype)).sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: x.detach() for name, x in outputs.items()}, gradients


def assert_same_outputs(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        # Two-stage models give infinite logits where no box can be.
        finite = tensor.isfinite()
        assert actual[name].dtype == tensor.dtype, name
        assert_same_bits(actual[name][~finite], tensor[~finite])
        if finite.any() and tensor.is_floating_point():
            assert_close(actual[name][finite], tensor[finite], 1e-12)
        elif finite.any():
            assert actual[name].equal(tensor), name


def assert_same_gradients(actual, expected):
    # Some gradients are sums that cancel to zero; what rounding leaves of them is no error.
    noise = 1e-12 * torch.stack([x.norm() for x in expected.values() if x is not None]).norm()
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            limit = 1e-9 * gradient.norm() + noise
            assert (actual[name] - gradient).norm() <= limit, name


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_stay_the_same_until_undo_restores_their_bits(family, calls):
    model, inputs = make_model(family)
    names = list(model.state_dict())
    expected, expected_gradients = run(model, inputs)
    assert not calls["ours"]
    assert bool(calls["theirs"]) != family.endswith("discrete")
    layers = [name for name in expected_gradients if name.endswith("sampling_offsets.weight")]
    assert len(layers) == FAMILIES[family][1]
    if not family.endswith("discrete"):  # which gives locations no gradient
        total = torch.stack([x.norm() for x in expected_gradients.values() if x is not None]).norm()
        assert all(expected_gradients[name].norm() > 1e-5 * total for name in layers)

    assert use_msda(model) is model
    assert list(model.state_dict()) == names
    calls.clear()
    outputs, gradients = run(model, inputs)
    assert len(calls["ours"]) == len(layers) and not calls["theirs"]
    assert_same_outputs(outputs, expected)
    assert_same_gradients(gradients, expected_gradients)

    assert undo(model) is model
    calls.clear()
    restored, restored_gradients = run(model, inputs)
    assert not calls["ours"]
    for name, tensor in expected.items():
        assert_same_bits(restored[name], tensor)
    for name, gradient in expected_gradients.items():
        if gradient is not None:
            assert_same_bits(restored_gradients[name], gradient)


# ---- what a patched model can do -----------------------------------------------------------------


# A core that is a module, a global function for even and for ragged points, and an attribute.
PLACES = ["deformable_detr", "mask2former", "rt_detr_v2", "d_fine"]


@pytest.mark.parametrize("family", PLACES)
def test_copies_and_pickles_of_a_patched_model_are_patched(family, calls):
    model, inputs = make_model(family)
    use_msda(model)
    unpickled = pickle.loads(pickle.dumps(model))
    twin = copy.deepcopy(model)
    assert type(unpickled) is type(model)
    assert [type(x) for x in unpickled.modules()] == [type(x) for x in model.modules()]
    calls.clear()
    expected = forward(model, inputs)
    count = len(calls["ours"])
    for other in (unpickled, twin):
        calls.clear()
        outputs = forward(other, inputs)
        assert len(calls["ours"]) == count and not calls["theirs"]
        for name, tensor in expected.items():
            assert_same_bits(outputs[name], tensor)
        undo(other)
        forward(other, inputs)
        assert len(calls["ours"]) == count and calls["theirs"]


def test_another_model_of_the_same_class_stays_as_it_was(calls):
    (model, inputs), (other, _) = make_model("mask2former"), make_model("mask2former")
    use_msda(model)
    calls.clear()
    forward(other, inputs)
    assert calls["theirs"] and not calls["ours"]


def test_a_patched_model_is_saved_as_before(tmp_path):
    model, _ = make_model("rt_detr_v2")
    model.save_pretrained(tmp_path / "before")
    use_msda(model).save_pretrained(tmp_path / "after")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()


def test_patching_twice_and_undoing_twice_is_harmless(calls):
    model, inputs = make_model("rt_detr_v2")
    classes = [type(module) for module in model.modules()]
    use_msda(use_msda(model))
    calls.clear()
    forward(model, inputs)
    assert len(calls["ours"]) == 2
    undo(undo(model))
    assert [type(module) for module in model.modules()] == classes


def test_a_patched_layer_still_counts_as_one_of_its_class():
    model, inputs = make_model("rt_detr_v2")
    expected = model(**inputs, output_attentions=True).cross_attentions
    weights = use_msda(model)(**inputs, output_attentions=True).cross_attentions
    assert len(weights) == len(expected) == 2
    for actual, exact in zip(weights, expected, strict=True):
        assert_close(actual, exact, 1e-12)


def test_gradient_checkpointing_gives_the_same_gradients(calls):
    model, inputs = make_model("deformable_detr")
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    use_msda(model).train()
    _, expected = run(model, inputs)
    calls.clear()
    model.gradient_checkpointing_enable()
    _, gradients = run(model, inputs)
    assert len(calls["ours"]) == 6  # forward, and again in backward
    assert_same_gradients(gradients, expected)


@pytest.mark.parametrize("family", PLACES)
def test_a_patched_layer_compiles_into_one_graph_and_exports(family):
    layer, arguments = make_layer(family)
    expected = layer(**arguments)[0]
    use_msda(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        output = torch.compile(layer, backend=backend, fullgraph=True)(**arguments)[0]
        exported = torch.export.export(layer, (), arguments, strict=False)
        exported_output = exported.module()(**arguments)[0]
    assert len(graphs) == 1
    for graph in (graphs[0].graph, exported.graph):
        targets = [str(node.target) for node in graph.nodes]
        assert any("msda" in target for target in targets)
        assert not any("grid_sample" in target for target in targets)
    for actual in (output, exported_output):
        assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("family", PLACES)
def test_in_16_bits_a_patched_layer_is_no_less_accurate(family, dtype):
    layer, arguments = make_layer(family)
    lowered = {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in arguments.items()
    }
    # What 16-bit locations lose is lost before the core.
    raised = {
        name: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in lowered.items()
    }
    with torch.no_grad():
        layer.to(dtype)
        theirs = layer(**lowered)[0]
        ours = use_msda(layer)(**lowered)[0]
        exact = layer.double()(**raised)[0]
    assert ours.dtype == theirs.dtype == dtype
    errors = [(x.double() - exact).norm() / exact.norm() for x in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1]  # both have the rounding of projections and locations


@pytest.mark.parametrize("family", PLACES)
def test_under_autocast_a_patched_layer_is_no_less_accurate(family):
    layer, arguments = make_layer(family)
    with torch.no_grad():
        exact = layer(**arguments)[0]
        with torch.autocast("cpu", torch.bfloat16):
            theirs = layer(**arguments)[0]
            ours = use_msda(layer)(**arguments)[0]
    errors = [(x.float() - exact).norm() / exact.norm() for x in (ours, theirs)]
    assert errors[0] <= 1.2 * errors[1]


# ---- pictures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", PLACES)
def test_where_a_patched_model_samples_is_recorded_and_drawn(family, calls):
    model, inputs = make_model(family, torch.float32)
    layers = [name for name, x in model.named_modules() if hasattr(x, "sampling_offsets")]
    use_msda(model)
    calls.clear()
    with capture_sampling(model) as samples, capture_sampling(model) as again:
        forward(model, inputs)
    assert len(calls["ours"]) == len(layers)
    forward(model, inputs)  # not recorded any more
    assert [record.name for record in samples] == layers
    assert [record.name for record in again] == layers
    assert forms.core_observers.get() == ()
    for record, arguments in zip(samples, calls["ours"], strict=False):
        _, shapes, _, locations, weights = arguments
        assert record.sampling_locations.equal(locations)
        assert record.attention_weights.equal(weights)
        assert record.spatial_shapes == tuple(tuple(shape) for shape in shapes)
        assert record.num_points == ((3, 6, 3) if family == "d_fine" else record.num_points)
        assert record.reference_points.shape[:2] == locations.shape[:2]
    pytest.importorskip("matplotlib")
    image = torch.rand(64, 96, 3).numpy()
    figure = draw_sampling(image, samples, query=[0, 3])
    assert len(figure.axes) == 2 * len(layers)
    for axes in figure.axes:
        assert axes.collections and axes.lines  # samples and reference point


def test_a_forward_that_fails_is_not_recorded():
    layer, arguments = make_layer("mask2former")
    use_msda(layer)
    wrong = arguments | dict(spatial_shapes_list=[(1, 1)])
    with capture_sampling(layer) as samples:
        with pytest.raises((RuntimeError, ValueError)):
            layer(**wrong)
        assert forms.core_observers.get() == ()
        layer(**arguments)
    assert len(samples) == 1


def test_an_unpatched_model_is_not_recorded_but_refused():
    layer, _ = make_layer("mask2former")
    with pytest.raises(ValueError, match=r"must contain .*use_msda"), capture_sampling(layer):
        pass
