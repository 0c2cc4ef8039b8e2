"""`msda.use_msda(model)` lets models run ours whatever the form of their core."""

import copy
import functools
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import msda
from msda import forms, register_core, report, undo, use_msda
from tests.helpers.results import assert_close, assert_same_bits
from tests.integrations import plain_attention, stand_in_models
from tests.integrations.plain_attention import attend, bilinear
from tests.integrations.stand_in_models import (
    FORMS,
    WIDE,
    B,
    CallsWithMethod,
    D,
    Global,
    L,
    Layer,
    M,
    P,
    Ragged,
    WithSizes,
    inputs,
    model_of,
    plain,
    ragged,
    run,
)

# ---- every form of core --------------------------------------------------------------------------


@pytest.fixture
def our_calls(monkeypatch):
    """The arguments of each call of ours."""
    made, ours = [], forms.ms_deform_attn

    def counted(*args, **options):
        made.append(args)
        return ours(*args, **options)

    monkeypatch.setattr(forms, "ms_deform_attn", counted)
    return made


@pytest.mark.parametrize("name", FORMS)
def test_a_model_of_each_form_computes_the_same_by_ours_until_it_is_undone(name, our_calls):
    layer, core, form = FORMS[name]
    model = model_of(layer)
    expected = run(model)
    assert not our_calls

    assert use_msda(model) is model
    before = report(model)
    our_calls.clear()
    actual = run(model)
    assert len(our_calls) == 2
    for ours, theirs in zip(actual, expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert [(entry.module, entry.core, entry.form, entry.status) for entry in report(model)] == [
        (str(number), core, form, "in place") for number in range(2)
    ]
    assert [entry.calls for entry in before] == [0, 0]
    assert [entry.calls for entry in report(model)] == [1, 1]

    undo(model)
    our_calls.clear()
    for again, theirs in zip(run(model), expected, strict=True):
        assert_same_bits(again, theirs)
    assert not our_calls and report(model) == []


@pytest.mark.parametrize("name", FORMS)
def test_copies_and_pickles_are_patched_and_count_for_themselves(name, our_calls):
    model = use_msda(model_of(FORMS[name][0]))
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [entry.calls for entry in report(other)] == [0, 0]
        our_calls.clear()
        for ours, theirs in zip(run(other), expected, strict=True):
            assert_same_bits(ours, theirs)
        assert len(our_calls) == 2
        assert [entry.calls for entry in report(other)] == [1, 1]
    assert [entry.calls for entry in report(model)] == [1, 1]


@pytest.mark.parametrize("name", FORMS)
def test_a_patched_layer_of_each_form_compiles_into_one_graph(name):
    torch.compiler.reset()  # all these layers share the code of one forward
    layer = use_msda(model_of(FORMS[name][0]))[0]
    expected = layer(*inputs(), WIDE)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert_close(compiled(*inputs(), WIDE), expected, 1e-12)


def test_calls_from_many_threads_are_all_counted():
    layer = use_msda(Global().double())
    arguments = [x.detach() for x in inputs()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: layer(*arguments, WIDE), range(200)))
    assert [entry.calls for entry in (*report(layer), *report(layer))] == [200, 200]
    assert layer._replicate_for_data_parallel() is not layer
    layer._replicate_for_data_parallel()(*arguments, WIDE)  # as DataParallel runs it
    assert report(layer)[0].calls == 201


def test_counts_leave_nothing_behind_in_what_is_copied_or_undone():
    layer = Global().double()
    before = set(vars(layer))
    use_msda(layer)(*inputs(), WIDE)
    assert set(vars(copy.deepcopy(layer))) == set(vars(undo(layer))) == before


def test_a_model_is_served_before_and_after_its_export(our_calls):
    model = model_of(WithSizes)
    expected = run(model)
    use_msda(model)
    for layer in model:
        layer.export()
    our_calls.clear()
    for ours, theirs in zip(run(model), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert len(our_calls) == 2


@pytest.mark.parametrize("shapes", [[(3, 7), (4, 3)], [(3, 3), (2, 2)]], ids=["wide", "square"])
def test_discrete_differs_from_own_clamping_only_on_wide_maps(shapes):
    layer = Ragged("discrete").double()
    query, points, _ = inputs()
    points = points.detach().clamp(max=0.7)  # theirs reads beyond a map that is higher than wide
    memory = torch.rand(B, sum(h * w for h, w in shapes), M * D, dtype=torch.float64)
    layer.sampling_offsets.weight.data.zero_()
    layer.sampling_offsets.bias.data.zero_()
    expected = layer(query, points, memory, shapes)
    assert_close(use_msda(layer)(query, points, memory, shapes), expected, 1e-12)


# ---- what is refused -----------------------------------------------------------------------------


def one_pixel_off(
    value,
    value_spatial_shapes,
    sampling_locations,
    attention_weights,
    num_points_list,
    method="default",
):
    """Right but for 'discrete'."""
    if method == "discrete":
        sampling_locations = sampling_locations + 0.3
    return ragged(
        value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method
    )


class OnePixelOff(Ragged):
    def __init__(self, method="default"):
        super().__init__()
        self.bound_core = functools.partial(one_pixel_off, method=method)


@pytest.mark.parametrize("name", FORMS)
def test_a_core_of_each_form_that_computes_otherwise_is_refused(name, monkeypatch):
    stretched = bilinear

    def wrong(maps, locations, *args, **options):
        return 1.01 * stretched(maps, locations)

    monkeypatch.setattr(stand_in_models, "bilinear", wrong)
    monkeypatch.setattr(plain_attention, "bilinear", wrong)
    monkeypatch.setattr(stand_in_models, "discrete", wrong)
    monkeypatch.setattr(attend, "__defaults__", (wrong,))
    layer, core, _ = FORMS[name]
    model = model_of(layer)
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"^{core} of 0 must compute .* got a different output"):
        use_msda(model)
    assert [type(module) for module in model.modules()] == classes
    entries = report(model)
    assert [(entry.module, entry.core, entry.status) for entry in entries] == [
        (str(number), core, "refused") for number in range(2)
    ]
    assert all("different output" in entry.reason for entry in entries)


def test_only_the_method_that_a_model_uses_is_judged_and_a_refusal_names_it():
    use_msda(OnePixelOff())
    with pytest.raises(ValueError, match=r"^bound_core of OnePixelOff .* with method='discrete'"):
        use_msda(OnePixelOff("discrete"))


def test_a_method_that_was_not_compared_is_refused_when_it_is_used():
    layer = use_msda(CallsWithMethod("default").double())
    layer.method = "discrete"
    with pytest.raises(ValueError, match=r"^method must be one of \('default',\), .*'discrete'"):
        layer(*inputs(), WIDE)
    assert report(layer)[0].calls == 0


def test_models_with_different_methods_live_side_by_side():
    models = [CallsWithMethod(method).double() for method in ("default", "discrete")]
    expected = [model(*inputs(), WIDE) for model in models]
    for model, exact in zip([use_msda(model) for model in models], expected, strict=True):
        assert_close(model(*inputs(), WIDE), exact, 1e-12)


def test_what_is_not_refused_can_be_replaced_alone(our_calls):
    model = nn.ModuleList([Global(), OnePixelOff("discrete")]).double()
    expected = run(model)
    use_msda(model, strict=False)
    our_calls.clear()
    assert_close(run(model)[0], expected[0], 1e-12)
    assert len(our_calls) == 1
    printed = str(report(model)).splitlines()
    assert printed[0] == "0  plain       in place  plain, used 1 times"
    assert printed[1].startswith("1  bound_core  refused   bound_core of 1 must compute")
    with pytest.raises(ValueError, match=r"^bound_core of 1"):
        use_msda(model)


# ---- compiled operators --------------------------------------------------------------------------


class Operator(torch.autograd.Function):
    """Written as around the compiled extensions; None where there is no such extension."""

    extension = None

    @staticmethod
    def forward(
        ctx,
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        given = (
            value,
            value_spatial_shapes,
            value_level_start_index,
            sampling_locations,
            attention_weights,
        )
        ctx.save_for_backward(*given)
        return Operator.extension.ms_deform_attn_forward(*given, im2col_step)

    @staticmethod
    def backward(ctx, grad_output):
        gradients = Operator.extension.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, 64)
        return gradients[0], None, None, gradients[1], gradients[2], None


class Tries(Layer):
    """Falls back without a word, as Mask2Former and MaskDINO do."""

    def attend(self, value, shapes, locations, weights):
        weights = weights.unflatten(3, (L, P))
        tensor, start = torch.tensor(shapes), torch.tensor([0, 21])
        try:
            return Operator.apply(value, tensor, start, locations, weights, 64)
        except:  # noqa: E722
            return plain(value, tensor, locations, weights)


class OnlyOperator(Layer):
    def attend(self, value, shapes, locations, weights):
        tensor, start = torch.tensor(shapes), torch.tensor([0, 21])
        return Operator.apply(value, tensor, start, locations, weights.unflatten(3, (L, P)), 64)


def test_an_operator_that_does_not_run_is_left_alone_beside_a_core(our_calls):
    model = model_of(Tries)
    expected = run(model)
    use_msda(model)
    our_calls.clear()
    for ours, theirs in zip(run(model), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert len(our_calls) == 2
    assert [(entry.core, entry.status, entry.calls) for entry in report(model)] == [
        ("plain", "in place", 1),
        ("plain", "in place", 1),
        ("Operator", "left alone", 0),
        ("Operator", "left alone", 0),
    ]


class ReadsBoth(Layer):
    """Its method reads a global and an attribute of one name."""

    plain = None

    def attend(self, value, shapes, locations, weights):
        core = self.plain or plain
        return core(value, shapes, locations, weights.unflatten(3, (L, P)))


class HasBoth(ReadsBoth):
    def __init__(self):
        super().__init__()
        self.plain = plain


def test_a_core_whose_name_means_something_else_too_is_refused():
    model = model_of(ReadsBoth)
    message = "plain of 0 must have a name that its methods use for nothing else, got one that is"
    with pytest.raises(ValueError, match=message):
        use_msda(model)
    assert [(entry.core, entry.status) for entry in report(model)] == [("plain", "refused")] * 2


def test_a_core_whose_name_means_something_else_too_is_left_alone_beside_a_core(our_calls):
    model = model_of(HasBoth)
    expected = run(model)
    use_msda(model)
    our_calls.clear()
    for ours, theirs in zip(run(model), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert len(our_calls) == 2
    assert [(entry.core, entry.status) for entry in report(model)] == [
        ("plain", "in place"),
        ("plain", "in place"),
        ("plain", "left alone"),
        ("plain", "left alone"),
    ]


def test_an_operator_alone_is_replaced_where_it_runs_and_refused_where_not(monkeypatch, our_calls):
    model = model_of(OnlyOperator)
    with pytest.raises(ValueError, match=r"^Operator of 0 must compute .* got AttributeError"):
        use_msda(model)
    import msda.drop_in as extension

    monkeypatch.setattr(Operator, "extension", extension)
    expected = run(model)
    use_msda(model)
    our_calls.clear()
    for ours, theirs in zip(run(model), expected, strict=True):
        assert_close(ours, theirs, 1e-12)
    assert len(our_calls) == 2
    assert [(entry.form, entry.calls) for entry in report(model)] == [("operator", 1)] * 2
    undo(model)
    extension.uninstall()


# ---- a stranger's form ---------------------------------------------------------------------------


def theirs(feats, sizes, points, probs):
    """Maps (B, M * D, S) and points from -1 to 1."""
    value = feats.permute(0, 2, 1).unflatten(2, (probs.shape[2], -1))
    return plain(value, sizes, (points + 1) / 2, probs)


class Stranger(Layer):
    def attend(self, value, shapes, locations, weights):
        feats = value.flatten(2).permute(0, 2, 1)
        return theirs(feats, shapes, 2 * locations - 1, weights.unflatten(3, (L, P)))


def adapter(feats, sizes, points, probs):
    return dict(
        value=feats.permute(0, 2, 1).unflatten(2, (probs.shape[2], -1)),
        spatial_shapes=sizes,
        sampling_locations=(points + 1) / 2,
        attention_weights=probs,
    )


def example(value, spatial_shapes, sampling_locations, attention_weights):
    return dict(
        feats=value.flatten(2).permute(0, 2, 1),
        sizes=spatial_shapes,
        points=2 * sampling_locations - 1,
        probs=attention_weights,
    )


@pytest.fixture
def registry(monkeypatch):
    """The table of forms, restored after the test."""
    monkeypatch.setattr(forms, "_FORMS", dict(forms._FORMS))


def test_a_form_can_be_added(registry, our_calls):
    model = model_of(Stranger)
    with pytest.raises(ValueError, match=r"^0 must contain .* none was found"):
        use_msda(model)
    register_core("stranger", adapter, example)
    expected = run(model)
    use_msda(model)
    our_calls.clear()
    for ours, exact in zip(run(model), expected, strict=True):
        assert_close(ours, exact, 1e-12)
    assert len(our_calls) == 2
    assert [entry.form for entry in report(model)] == ["stranger"] * 2
    pickled = pickle.dumps(model)
    assert type(pickle.loads(pickled)[0]) is type(model[0])
    forms._FORMS.pop("stranger")
    with pytest.raises(ValueError, match=r"must be given to msda\.register_core before"):
        pickle.loads(pickled)


def test_an_added_form_that_computes_otherwise_is_refused(registry):
    def wrong(**arguments):
        return adapter(**arguments) | dict(sampling_locations=arguments["points"])

    def wrongly(feats, sizes, points, probs):
        return wrong(feats=feats, sizes=sizes, points=points, probs=probs)

    register_core("stranger", wrongly, example)
    with pytest.raises(ValueError, match=r"^theirs of 0 must compute .* different output"):
        use_msda(model_of(Stranger))


def test_what_is_no_function_is_no_form():
    with pytest.raises(TypeError, match=r"^adapter must be callable, got str"):
        register_core("wrong", "adapter", example)


def test_what_is_no_module_is_refused_by_its_type():
    class Detector:  # as rfdetr's, which holds the module
        model = Global()

    with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got Detector$"):
        use_msda(Detector())


def test_our_own_module_needs_no_patch_and_a_report_of_nothing_says_so():
    module = msda.MSDeformAttn(8, 1, 2, 1)
    with pytest.raises(ValueError, match=r"^model must contain"):
        use_msda(module)
    assert str(report(nn.Linear(1, 1))) == "no core was replaced"
