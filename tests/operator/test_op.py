"""The operator is a citizen of PyTorch: opcheck, compile, export, autocast, meta, grad modes."""

import copy
import io
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import msda
from msda.testing import (
    OPERATOR,
    FusedInputs,
    call,
    gradient_names,
    leaves,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    random_like_output,
    relative_error,
)
from tests.helpers.cases import every_form
from tests.helpers.inputs import off_edges
from tests.helpers.results import assert_close, assert_same_bits, compute, compute_gradients

pytestmark = pytest.mark.not_on_executor("these are promises of torch's operator")

SHAPES = [(6, 9), (3, 5), (2, 2)]
SIZES = dict(batch=2, num_queries=5, num_heads=2, head_dim=4, num_points=2)


@pytest.fixture(autouse=True)
def forget_compiled_code():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


# ---- opcheck -------------------------------------------------------------------------------------


def flat(shapes):
    return [size for shape in shapes for size in shape]


def operator_arguments(inputs, shapes_as_tensor=False, start_index=None, nearest=False):
    """What functional.py hands to the operator."""
    value, *others = inputs.tensors()
    shapes = [] if shapes_as_tensor else flat(inputs.spatial_shapes)
    shapes_tensor = torch.tensor(inputs.spatial_shapes) if shapes_as_tensor else None
    last = inputs.padding_mask if hasattr(inputs, "padding_mask") else nearest
    return (value, shapes, shapes_tensor, start_index, *others, inputs.num_points or [], last)


START_INDEX = torch.tensor([0, 54, 69])
PLAIN_FORMS = {
    "shapes": (SIZES, {}),
    "shapes_tensor": (SIZES, dict(shapes_as_tensor=True, start_index=START_INDEX)),
    "ragged": (SIZES | {"num_points": [2, 0, 3]}, {}),
    "nearest": (SIZES, dict(nearest=True)),
    "bfloat16": (SIZES | {"dtype": torch.bfloat16}, {}),
    "no_queries": (SIZES | {"num_queries": 0}, {}),
}
FUSED_FORMS = {
    "points": (SIZES, {}),
    "boxes": (SIZES | {"reference_size": 4, "shared_reference": True}, {}),
    "mask": (SIZES | {"padding": True}, dict(shapes_as_tensor=True, start_index=START_INDEX)),
    "ragged": (SIZES | {"num_points": [2, 0, 3], "padding": True}, {}),
    "no_batch": (SIZES | {"batch": 0}, {}),
}
plain_forms = pytest.mark.parametrize(("sizes", "form"), PLAIN_FORMS.values(), ids=PLAIN_FORMS)
fused_forms = pytest.mark.parametrize(("sizes", "form"), FUSED_FORMS.values(), ids=FUSED_FORMS)


@plain_forms
def test_opcheck_of_the_operator(device, sizes, form):
    inputs = make_inputs(SHAPES, **sizes, device=device)
    arguments = operator_arguments(leaves(inputs), **form)
    torch.library.opcheck(torch.ops.msda.ms_deform_attn, arguments)


@fused_forms
def test_opcheck_of_the_fused_operator(device, sizes, form):
    inputs = make_fused_inputs(SHAPES, **sizes, device=device)
    arguments = operator_arguments(leaves(inputs), **form)
    torch.library.opcheck(torch.ops.msda.ms_deform_attn_fused, arguments)


@plain_forms
def test_opcheck_of_the_backward(device, sizes, form):
    inputs = make_inputs(SHAPES, **sizes, device=device)
    arguments = operator_arguments(inputs, **form)
    for needs in [(True, True, True), (False, True, False)]:
        torch.library.opcheck(
            torch.ops.msda._ms_deform_attn_backward,
            (random_like_output(inputs), *arguments, *needs, False),
        )


@fused_forms
def test_opcheck_of_the_fused_backward(device, sizes, form):
    inputs = make_fused_inputs(SHAPES, **sizes, device=device)
    arguments = operator_arguments(inputs, **form)
    output = compute(inputs)
    for needs in [(True, True, True, True), (True, False, False, True)]:
        torch.library.opcheck(
            torch.ops.msda._ms_deform_attn_fused_backward,
            (random_like_output(inputs), output, *arguments, *needs, False),
        )


# ---- torch.compile -------------------------------------------------------------------------------


def compiled(**options):
    """The two functions, compiled, and what counts the compilations."""
    counter = CompileCounterWithBackend("aot_eager")
    functions = {
        kind: torch.compile(function, fullgraph=True, backend=counter, **options)
        for kind, function in OPERATOR.items()
    }
    return functions, counter


def assert_same_results(functions, inputs, **options):
    grad_output = random_like_output(inputs)
    assert_same_bits(call(functions, inputs, **options), compute(inputs, **options))
    actual = compute_gradients(functions, inputs, grad_output, gradient_names(inputs), **options)
    expected = compute_gradients(OPERATOR, inputs, grad_output, gradient_names(inputs), **options)
    for name in gradient_names(inputs):
        assert_same_bits(actual[name], expected[name])


@every_form
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_to_one_graph_with_the_same_results(device, make, dynamic):
    functions, counter = compiled(dynamic=dynamic)
    assert_same_results(functions, make(SHAPES, **SIZES, device=device))
    assert counter.frame_count == 2  # without and with gradients


@every_form
def test_spatial_shapes_tensor_compiles_to_one_graph(make):
    functions, _ = compiled()
    inputs = make(SHAPES, **SIZES)
    assert_same_results(functions, replace(inputs, spatial_shapes=torch.tensor(SHAPES)))


def test_ragged_and_nearest_compile_to_one_graph(device):
    functions, _ = compiled()
    inputs = make_inputs(SHAPES, **SIZES | {"num_points": [2, 0, 3]}, device=device)
    assert_same_results(functions, inputs, interpolation="nearest")


@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
@every_form
def test_changing_image_sizes_are_compiled_at_most_twice(device, make, dynamic):
    functions, counter = compiled(dynamic=dynamic)
    for i in range(6):
        shapes = [(8 + 2 * i, 11 + 3 * i), (4 + i, 6 + i), (2 + i, 3)]
        inputs = make(shapes, **SIZES | {"num_queries": 7 + i}, device=device)
        assert_same_bits(call(functions, inputs), compute(inputs))
    assert counter.frame_count <= (1 if dynamic else 2)


def test_changing_batch_and_shapes_of_a_module_in_training_are_compiled_at_most_twice(device):
    module = msda.MSDeformAttn(16, 2, 4, 2).to(device)
    counter = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(module, fullgraph=True, backend=counter)
    for i in range(4):
        shapes = [(8 + i, 9 + 2 * i), (4 + i, 5)]
        num_keys = sum(height * width for height, width in shapes)
        query = torch.rand(2 + i, 6 + i, 16, device=device)
        reference = torch.rand(2 + i, 6 + i, 2, 2, device=device)
        features = torch.rand(2 + i, num_keys, 16, device=device, requires_grad=True)
        expected = torch.autograd.grad(module(query, reference, features, shapes).sum(), features)
        actual = torch.autograd.grad(fast(query, reference, features, shapes).sum(), features)
        torch.testing.assert_close(actual, expected)
    assert counter.frame_count <= 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiles_with_inductor(device):
    def function(*arguments, **options):
        return msda.ms_deform_attn_fused(*arguments, **options).sin()

    inputs = make_fused_inputs(SHAPES, **SIZES, device=device)
    grad_output = random_like_output(inputs)
    actual, expected = (
        compute_gradients({FusedInputs: version}, inputs, grad_output, gradient_names(inputs))
        for version in (torch.compile(function, fullgraph=True), function)
    )
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name])


# ---- export, copies ------------------------------------------------------------------------------


def module_and_arguments(device="cpu", **options):
    module = msda.MSDeformAttn(16, 3, 2, 2)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(module.attention_weights.weight)
    query, reference = torch.rand(2, 5, 16), torch.rand(2, 5, 3, 2)
    features, mask = torch.randn(2, 73, 16), torch.rand(2, 73) < 0.2
    tensors = [tensor.to(device) for tensor in (query, reference, features)]
    return module.to(device), (*tensors, SHAPES, None, mask.to(device))


def test_exports_to_one_call_of_the_operator(device):
    module, arguments = module_and_arguments(device)
    exported = torch.export.export(module, arguments, strict=False)
    targets = [str(node.target) for node in exported.graph.nodes]
    assert targets.count("msda.ms_deform_attn_fused.default") == 1
    assert_same_bits(exported.module()(*arguments), module(*arguments))


def test_exports_with_a_dynamic_batch_and_number_of_queries(device):
    module, arguments = module_and_arguments(device)
    batch, queries = torch.export.Dim("batch"), torch.export.Dim("queries")
    per_query, fixed = {0: batch, 1: queries}, [(None, None)] * len(SHAPES)
    dynamic = (per_query, per_query, {0: batch}, fixed, None, {0: batch})
    exported = torch.export.export(module, arguments, dynamic_shapes=dynamic, strict=False)
    query, reference, features, shapes, start, mask = arguments
    larger = (query.repeat(2, 3, 1), reference.repeat(2, 3, 1, 1), features.repeat(2, 1, 1))
    larger = (*larger, shapes, start, mask.repeat(2, 1))
    torch.testing.assert_close(exported.module()(*larger), module(*larger))


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))],
    ids=["deepcopy", "pickle"],
)
def test_module_survives_copying(device, duplicate):
    module, arguments = module_and_arguments(device)
    twin = duplicate(module)
    assert_same_bits(twin(*arguments), module(*arguments))
    twin.output_proj.bias.data += 1
    assert not torch.equal(twin(*arguments), module(*arguments))


def test_module_survives_saving(device):
    module, arguments = module_and_arguments(device)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = msda.MSDeformAttn(16, 3, 2, 2).to(device)
    twin.load_state_dict(torch.load(file, weights_only=True))
    assert_same_bits(twin(*arguments), module(*arguments))


# ---- autocast ------------------------------------------------------------------------------------


def test_module_under_autocast_is_close_to_float32(device):
    module, (query, reference, features, *others) = module_and_arguments(device)
    features.requires_grad_()

    def run():
        output = module(query, reference, features, *others)
        inputs = [features, *module.parameters()]
        return output, torch.autograd.grad(output.float().square().sum(), inputs)

    expected, expected_gradients = run()
    with torch.autocast(device, torch.bfloat16):
        output, gradients = run()
    assert output.dtype == torch.bfloat16
    # A projection rounds weights and inputs to 2^-9; three of them in a row.
    assert relative_error(output, expected) < 2e-2
    for gradient, exact in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == exact.dtype
        assert gradient.isfinite().all()
        assert relative_error(gradient, exact) < 5e-2


@pytest.mark.parametrize("make", [make_inputs, make_fused_inputs], ids=["plain", "fused"])
def test_autocast_leaves_the_operator_and_its_coordinates_alone(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    expected = compute(inputs)
    with torch.autocast(device, torch.bfloat16):
        assert_same_bits(compute(inputs), expected)
        half = replace(inputs, value=inputs.value.bfloat16())
        assert compute(half).dtype == torch.bfloat16


# ---- modes and devices ---------------------------------------------------------------------------


@every_form
def test_meta_tensors_give_shapes_without_data(make):
    for options in (SIZES, SIZES | {"num_points": [2, 0, 3], "dtype": torch.float16}):
        inputs = make(SHAPES, **options)
        on_meta = map_tensors(inputs, lambda tensor: tensor.to("meta"))
        if getattr(inputs, "padding_mask", None) is not None:
            on_meta = replace(on_meta, padding_mask=inputs.padding_mask.to("meta"))
        output, expected = compute(on_meta), compute(inputs)
        assert output.device.type == "meta"
        assert (output.shape, output.dtype) == (expected.shape, expected.dtype)
        assert output.stride() == expected.stride()


@every_form
def test_works_without_gradients(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    expected = compute(inputs)
    with torch.no_grad():
        assert_same_bits(compute(leaves(inputs)), expected)
    with torch.inference_mode():
        assert_same_bits(compute(inputs), expected)
        assert_same_bits(compute(make(SHAPES, **SIZES, device=device)), expected)


def test_the_reference_has_second_derivatives():
    inputs = off_edges(make_inputs(SHAPES, **SIZES, dtype=torch.float64), margin=0.05)
    inputs = leaves(inputs)

    def function(*tensors):
        value, *points = tensors
        return msda.reference.ms_deform_attn_reference(value, SHAPES, None, *points)

    assert torch.autograd.gradgradcheck(function, inputs.tensors(), fast_mode=True)


def test_forward_mode_derivatives_are_never_silently_zero(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)

    def function(value):
        return compute(replace(inputs, value=value))

    try:
        output, tangent = torch.func.jvp(function, (inputs.value,), (inputs.value,))
    except (NotImplementedError, RuntimeError):
        return
    assert_close(tangent, output)  # the output is linear in value


def test_gradients_flow_through_in_place_changes_and_hooks(device):
    inputs = make_inputs(SHAPES, **SIZES, device=device)
    value = inputs.value.clone().requires_grad_()
    seen = []
    value.register_hook(lambda gradient: seen.append(gradient.clone()))
    doubled = value * 1
    doubled.mul_(2)
    compute(replace(inputs, value=doubled)).sum().backward()
    plain = leaves(inputs, ["value"])
    compute(plain).sum().backward()
    torch.testing.assert_close(value.grad, 2 * plain.value.grad)
    assert_same_bits(seen[0], value.grad)


def test_changing_an_input_before_backward_is_noticed(device):
    inputs = leaves(make_inputs(SHAPES, **SIZES, device=device), ["attention_weights"])
    output = compute(inputs)
    inputs.value.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_output_may_be_changed_before_backward_on_the_cpu():
    inputs = make_fused_inputs(SHAPES, **SIZES)
    names = gradient_names(inputs)
    changed, left = leaves(inputs, names), leaves(inputs, names)
    compute(changed).mul_(2).sum().backward()
    (2 * compute(left)).sum().backward()
    for name in names:
        assert_same_bits(getattr(changed, name).grad, getattr(left, name).grad)


@pytest.mark.parametrize(
    "name",
    [
        "ms_deform_attn",
        "ms_deform_attn_fused",
        "_ms_deform_attn_backward",
        "_ms_deform_attn_fused_backward",
    ],
)
@pytest.mark.parametrize("key", ["CPU", "CUDA", "Meta", "Autograd"])
def test_every_operator_has_a_kernel_for(name, key):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"msda::{name}", key)
