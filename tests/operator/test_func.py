"""torch.func and derivatives of any order: vmap, grad, per-sample gradients, double backward."""

from dataclasses import fields, replace

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, grad_and_value, jacrev, jvp, vjp, vmap

import msda
from msda.testing import (
    OPERATOR,
    REFERENCE,
    call,
    gradient_names,
    leaves,
    make_fused_inputs,
    make_inputs,
    random_like_output,
    relative_error,
)
from tests.helpers.cases import every_form
from tests.helpers.inputs import in_float64, off_edges
from tests.helpers.results import assert_close, assert_same_bits, compute, compute_gradients

pytestmark = pytest.mark.not_on_executor("transforms are rules of torch's operator")

SHAPES = [(6, 9), (3, 5), (2, 2)]
SIZES = dict(batch=2, num_queries=5, num_heads=2, head_dim=4, num_points=2)
# Of a few numbers, for derivatives that are computed number by number.
TINY_SHAPES = [(2, 3), (1, 2)]
TINY = dict(batch=1, num_queries=2, num_heads=1, head_dim=2, num_points=1, dtype=torch.float64)


@pytest.fixture
def no_loop():
    """Without a rule of ours vmap would call the operator once per sample."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


in_one_call = pytest.mark.usefixtures("no_loop")


def function_of(inputs, functions=OPERATOR, **options):
    """The operator as a function of its floating-point tensors alone."""

    def function(*tensors):
        return call(functions, replace(inputs, **dict(zip(names, tensors, strict=True))), **options)

    names = gradient_names(inputs)
    return function


def weighted(function, grad_output):
    return lambda *tensors: (function(*tensors) * grad_output).sum()


def many(make, count=3, **options):
    """Several inputs of one form, and their tensors stacked along a new first axis."""
    samples = [make(SHAPES, **SIZES | options, seed=seed) for seed in range(count)]
    return samples, [
        torch.stack(same) for same in zip(*(s.tensors() for s in samples), strict=True)
    ]


# ---- gradients -----------------------------------------------------------------------------------


@every_form
def test_torch_func_gives_the_gradients_of_autograd(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    names, grad_output = gradient_names(inputs), random_like_output(inputs)
    expected = compute_gradients(OPERATOR, inputs, grad_output, names)
    function, tensors = function_of(inputs), inputs.tensors()
    everything = tuple(range(len(tensors)))

    gradients, value = grad_and_value(weighted(function, grad_output), everything)(*tensors)
    output, pull_back = vjp(function, *tensors)
    assert_same_bits(output, compute(inputs))
    torch.testing.assert_close(value, (output * grad_output).sum())
    for name, one, other in zip(names, gradients, pull_back(grad_output), strict=True):
        assert_same_bits(one, expected[name])
        assert_same_bits(other, expected[name])


@every_form
def test_gradient_by_one_argument_alone(device, make):
    inputs = make(SHAPES, **SIZES, device=device)
    grad_output = random_like_output(inputs)
    function = weighted(function_of(inputs), grad_output)
    for position, name in enumerate(gradient_names(inputs)):
        expected = compute_gradients(OPERATOR, inputs, grad_output, [name])[name]
        assert_same_bits(grad(function, position)(*inputs.tensors()), expected)


@every_form
def test_jacobian_is_that_of_the_reference(make):
    inputs = off_edges(make(TINY_SHAPES, **TINY), margin=0.05)
    everything = tuple(range(len(gradient_names(inputs))))
    actual = jacrev(function_of(inputs), everything)(*inputs.tensors())
    expected = jacrev(function_of(inputs, REFERENCE), everything)(*inputs.tensors())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_autograd_passes_through_a_transform(device):
    inputs = leaves(make_inputs(SHAPES, **SIZES, device=device), ["value"])
    function = weighted(function_of(inputs), random_like_output(inputs))
    value, locations, weights = inputs.tensors()
    (function(value, locations, weights) ** 2).backward()
    # Linear in value: the inner product of value with its gradient is the sum itself.
    inner = leaves(inputs, ["value"]).value
    gradient = grad(function)(inner, locations, weights)
    ((gradient * inner).sum() ** 2).backward()
    torch.testing.assert_close(inner.grad, 2 * gradient * (gradient * inner).sum())
    torch.testing.assert_close(value.grad, inner.grad.detach())


# ---- vmap ----------------------------------------------------------------------------------------


@in_one_call
@every_form
def test_vmap_equals_a_loop(make):
    samples, stacked = many(make)
    expected = torch.stack([compute(replace(sample, **mask_of(samples[0]))) for sample in samples])
    assert_same_bits(vmap(function_of(samples[0]))(*stacked), expected)


def mask_of(inputs):
    """The mask, if any, which function_of does not map over."""
    present = {field.name for field in fields(inputs)}
    return {"padding_mask": inputs.padding_mask} if "padding_mask" in present else {}


@in_one_call
@every_form
def test_vmap_takes_any_axis_and_shares_the_others(make):
    samples, stacked = many(make)
    function, shared = function_of(samples[0]), samples[0].tensors()
    for position in range(len(stacked)):
        for axis in (0, 1, -1):
            mapped = [None] * len(stacked)
            mapped[position] = axis
            arguments = list(shared)
            arguments[position] = stacked[position].movedim(0, axis)
            expected = torch.stack(
                [
                    function(*shared[:position], tensor, *shared[position + 1 :])
                    for tensor in stacked[position]
                ]
            )
            assert_same_bits(vmap(function, tuple(mapped))(*arguments), expected)


@in_one_call
def test_vmap_maps_over_masks():
    inputs = make_fused_inputs(SHAPES, **SIZES)
    masks = torch.rand(4, *inputs.value.shape[:2]) < 0.3
    actual = vmap(lambda mask: compute(inputs, padding_mask=mask))(masks)
    assert_same_bits(actual, torch.stack([compute(inputs, padding_mask=mask) for mask in masks]))


@in_one_call
@pytest.mark.parametrize(
    "options", [dict(num_queries=0), dict(batch=0), dict(num_points=[1, 0, 3])]
)
def test_vmap_over_empty_and_ragged_inputs(options):
    samples, stacked = many(make_inputs, **options)
    expected = torch.stack([compute(sample) for sample in samples])
    assert_same_bits(vmap(function_of(samples[0]))(*stacked), expected)


@in_one_call
def test_vmap_nests_and_takes_shapes_as_a_tensor():
    samples, stacked = many(make_fused_inputs, count=6)
    inputs = replace(samples[0], spatial_shapes=torch.tensor(SHAPES))
    twice = [tensor.unflatten(0, (2, 3)) for tensor in stacked]
    actual = vmap(vmap(function_of(inputs)))(*twice)
    expected = torch.stack([compute(sample) for sample in samples])
    assert_same_bits(actual.flatten(0, 1), expected)


@pytest.mark.parametrize("name", ["spatial_shapes", "level_start_index"])
def test_vmap_over_the_pyramid_is_refused(name):
    inputs = make_inputs(SHAPES, **SIZES)
    mapped = torch.tensor(SHAPES if name == "spatial_shapes" else [0, 54, 69]).repeat(2, 1, 1)
    if name == "level_start_index":
        mapped = mapped[:, 0]

    def function(tensor):
        pyramid = {"spatial_shapes": SHAPES, "level_start_index": None} | {name: tensor}
        value, *points = inputs.tensors()
        return msda.ms_deform_attn(value, *pyramid.values(), *points)

    with pytest.raises(RuntimeError, match=f"^{name} must be the same for all"):
        vmap(function)(mapped)


@in_one_call
@every_form
def test_gradients_of_vmap_are_summed_over_what_is_shared(make):
    samples, stacked = many(make)
    _, *points = stacked
    shared, *mask = samples[0].value, mask_of(samples[0])
    function = function_of(samples[0])
    grad_output = random_like_output(samples[0])

    def total(value, *points):
        mapped = vmap(function, (None, *[0] * len(points)))(value, *points)
        return (mapped * grad_output).sum()

    gradients = grad(total, tuple(range(len(stacked))))(shared, *points)
    alone = [
        compute_gradients(
            OPERATOR,
            replace(sample, value=shared, **mask[0]),
            grad_output,
            gradient_names(sample),
        )
        for sample in samples
    ]
    names = gradient_names(samples[0])
    expected = [sum(one["value"] for one in alone)]
    expected += [torch.stack([one[name] for one in alone]) for name in names[1:]]
    for one, other in zip(gradients, expected, strict=True):
        assert_close(one, other)


# ---- modules -------------------------------------------------------------------------------------


def module_and_samples(device="cpu", count=4):
    """A module of float64, and what it attends to, one image each."""
    module = msda.MSDeformAttn(16, 3, 2, 2).to(device, torch.float64)
    torch.nn.init.normal_(module.sampling_offsets.weight, std=0.1)
    torch.nn.init.normal_(module.attention_weights.weight)
    sizes = dict(device=device, dtype=torch.float64)
    query, reference = torch.rand(count, 5, 16, **sizes), torch.rand(count, 5, 3, 2, **sizes)
    return module, (query, reference, torch.randn(count, 73, 16, **sizes))


@in_one_call
def test_per_sample_gradients_equal_a_loop(device):
    module, samples = module_and_samples(device)
    parameters = dict(module.named_parameters())

    def loss(parameters, *sample):
        batch_of_one = [tensor.unsqueeze(0) for tensor in sample]
        output = functional_call(module, parameters, (*batch_of_one, SHAPES))
        return output.square().sum()

    gradients = vmap(grad(loss), (None, 0, 0, 0))(parameters, *samples)
    for i in range(len(samples[0])):
        one = [tensor[i : i + 1] for tensor in samples]
        expected = torch.autograd.grad(module(*one, SHAPES).square().sum(), parameters.values())
        for (name, gradient), other in zip(gradients.items(), expected, strict=True):
            # float64, with matrix products of other shapes.
            assert relative_error(gradient[i], other) < 1e-12, name


def test_functional_call_runs_with_the_parameters_that_it_is_given(device):
    module, samples = module_and_samples(device)
    other, _ = module_and_samples(device)
    torch.nn.init.normal_(other.output_proj.weight)
    parameters = dict(other.named_parameters())
    actual = functional_call(module, parameters, (*samples, SHAPES))
    assert_same_bits(actual, other(*samples, SHAPES))
    assert not torch.equal(actual, module(*samples, SHAPES))


@in_one_call
def test_an_ensemble_of_modules_is_one_vmap(device):
    modules, (samples, *_) = zip(*(module_and_samples(device) for _ in range(3)), strict=True)
    parameters, buffers = torch.func.stack_module_state(list(modules))

    def run(parameters, buffers):
        return functional_call(modules[0], (parameters, buffers), (*samples, SHAPES))

    expected = torch.stack([module(*samples, SHAPES) for module in modules])
    # float64, with matrix products of other shapes.
    assert relative_error(vmap(run)(parameters, buffers), expected) < 1e-13


@pytest.mark.parametrize("transform", ["grad", "vmap", "vmap_of_grad"])
def test_transforms_compile_to_one_graph(transform):
    torch.compiler.reset()
    samples, stacked = many(make_fused_inputs)
    function = function_of(samples[0])
    gradient = grad(weighted(function, random_like_output(samples[0])), (0, 1, 2, 3))
    transformed, arguments = {
        "grad": (gradient, samples[0].tensors()),
        "vmap": (vmap(function), stacked),
        "vmap_of_grad": (vmap(gradient), stacked),
    }[transform]
    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), transformed(*arguments), rtol=0, atol=0)
    torch.compiler.reset()


# ---- derivatives of gradients --------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, dict(num_points=[2, 0, 1]), dict(padding=True)],
    ids=["even", "ragged", "padded"],
)
@every_form
def test_second_derivatives_match_finite_differences(make, options):
    if "padding" in options and make is make_inputs:
        pytest.skip("the plain form takes no mask")
    sizes = dict(batch=2, num_queries=3, num_heads=2, head_dim=2, num_points=1)
    inputs = make([(3, 4), (2, 2), (1, 2)], **sizes | options, dtype=torch.float64)
    inputs = leaves(off_edges(inputs, margin=0.05))
    assert torch.autograd.gradgradcheck(function_of(inputs), inputs.tensors(), fast_mode=True)


@every_form
def test_second_derivatives_are_those_of_the_reference(device, make):
    inputs = off_edges(make(SHAPES, **SIZES, device=device), margin=0.05)
    exact = in_float64(inputs)

    def second(functions, inputs):
        inputs = leaves(inputs)
        grad_output = random_like_output(inputs).requires_grad_()
        output = call(functions, inputs)
        first = torch.autograd.grad(output, inputs.tensors(), grad_output, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        return torch.autograd.grad(total, [*inputs.tensors(), grad_output])

    for actual, expected in zip(second(OPERATOR, inputs), second(REFERENCE, exact), strict=True):
        # Two derivatives in float32, of gradients that are in float32 already.
        assert_close(actual.cpu(), expected, scale=10)


@every_form
@pytest.mark.parametrize("as_tensor", [False, True], ids=["pairs", "tensor"])
def test_each_second_derivative_alone(make, as_tensor):
    inputs = off_edges(make(TINY_SHAPES, **TINY), margin=0.05)
    if as_tensor:
        inputs = replace(inputs, spatial_shapes=torch.tensor(TINY_SHAPES))
    grad_output = random_like_output(inputs)

    def second(functions, by, then_by):
        given = leaves(inputs, {by, then_by})
        output = call(functions, given)
        (first,) = torch.autograd.grad(output, getattr(given, by), grad_output, create_graph=True)
        if not first.requires_grad:  # the reference, where the output is linear
            return torch.zeros_like(getattr(given, then_by))
        total = (first * torch.arange(first.numel()).view(first.shape)).sum()
        wanted = getattr(given, then_by)
        return torch.autograd.grad(total, wanted, materialize_grads=True)[0]

    for by in gradient_names(inputs):
        for then_by in gradient_names(inputs):
            actual, expected = (second(f, by, then_by) for f in (OPERATOR, REFERENCE))
            torch.testing.assert_close(actual, expected, msg=f"{by}, {then_by}")


def test_second_derivatives_of_nearest_are_those_of_the_reference():
    inputs = off_edges(make_inputs(TINY_SHAPES, **TINY))
    actual, expected = (
        jacrev(jacrev(function_of(inputs, functions, interpolation="nearest"), (0, 1, 2)), (0, 2))(
            *inputs.tensors()
        )
        for functions in (OPERATOR, REFERENCE)
    )
    torch.testing.assert_close(actual, expected)


@every_form
def test_hessian_is_that_of_the_reference(make):
    inputs = off_edges(make(TINY_SHAPES, **TINY), margin=0.05)
    everything = tuple(range(len(gradient_names(inputs))))

    def hessian(functions):
        function = function_of(inputs, functions)
        total = lambda *tensors: function(*tensors).square().sum()  # noqa: E731
        return jacrev(jacrev(total, everything), everything)(*inputs.tensors())

    torch.testing.assert_close(hessian(OPERATOR), hessian(REFERENCE))


def test_third_derivatives_are_those_of_the_reference():
    inputs = off_edges(make_inputs(TINY_SHAPES, **TINY), margin=0.05)
    value, locations, weights = inputs.tensors()

    def third(functions):
        function = function_of(inputs, functions)

        def along_a_line(t):
            # 16 pixels of 0.01: no sample crosses an edge of its cell.
            return function(value * t, locations + 0.01 * t, weights * t).square().sum()

        return grad(grad(grad(along_a_line)))(torch.ones((), dtype=torch.float64))

    torch.testing.assert_close(third(OPERATOR), third(REFERENCE))


def test_gradient_penalty_trains_a_module(device):
    module, samples = module_and_samples(device)
    features = samples[2].requires_grad_()
    output = module(samples[0], samples[1], features, SHAPES)
    (gradient,) = torch.autograd.grad(output.square().sum(), features, create_graph=True)
    gradient.norm().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert module.sampling_offsets.weight.grad.ne(0).any()


@every_form
def test_nothing_is_computed_twice_before_it_is_asked_for(make, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the reference ran")

    monkeypatch.setattr(msda.ops, "ms_deform_attn_reference", refuse)
    monkeypatch.setattr(msda.ops, "ms_deform_attn_fused_reference", refuse)
    inputs = make(SHAPES, **SIZES)
    inputs = leaves(inputs)
    function, tensors = function_of(inputs), inputs.tensors()
    torch.autograd.grad(compute(inputs).sum(), tensors, create_graph=True)
    grad(lambda *tensors: function(*tensors).sum())(*inputs.tensors())
    (gradient,) = torch.autograd.grad(compute(inputs).sum(), inputs.value, create_graph=True)
    with pytest.raises(AssertionError, match="the reference ran"):
        gradient.sum().backward()


# ---- forward mode --------------------------------------------------------------------------------


def dual(function, tensor):
    with forward_ad.dual_level():
        output = function(forward_ad.make_dual(tensor, torch.ones_like(tensor)))
        return forward_ad.unpack_dual(output).tangent


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda function, tensor: jvp(function, (tensor,), (tensor,)),
        dual,
        lambda function, tensor: grad(lambda x: jvp(function, (x,), (tensor,))[1].sum())(tensor),
        lambda function, tensor: jvp(grad(lambda x: function(x).sum()), (tensor,), (tensor,)),
        lambda function, tensor: torch.func.jacfwd(function)(tensor),
    ],
    ids=["jvp", "dual", "grad_of_jvp", "jvp_of_grad", "jacfwd"],
)
@every_form
def test_forward_mode_is_refused_in_one_sentence(make, differentiate):
    inputs = make(TINY_SHAPES, **TINY)
    function, (value, *points) = function_of(inputs), inputs.tensors()
    message = "^msda has no forward-mode derivative; use the functions of msda.reference for it$"
    with pytest.raises(NotImplementedError, match=message):
        differentiate(lambda value: function(value, *points), value)


def test_forward_mode_elsewhere_does_not_matter():
    inputs = make_inputs(SHAPES, **SIZES)
    with forward_ad.dual_level():
        forward_ad.make_dual(torch.ones(2), torch.ones(2))
        assert_same_bits(compute(inputs), compute(inputs))
    x = torch.ones(3)
    output, tangent = jvp(lambda x: x.sum() * compute(inputs), (x,), (x,))
    torch.testing.assert_close(output, tangent)  # linear in x
