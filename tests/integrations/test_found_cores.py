"""The core of a layer of transformers is found by what it is, and compared before it goes."""

import functools
import pickle

import pytest
import torch
from torch import nn

import msda
from msda.integrations.transformers import undo, use_msda
from msda.plot import capture_sampling
from msda.testing import Inputs, grid_sample_core
from tests.helpers.results import assert_close, assert_same_bits
from tests.integrations.transformers_models import make_layer


def global_core(value, value_spatial_shapes, sampling_locations, attention_weights):
    return grid_sample_core(
        Inputs(value, value_spatial_shapes, sampling_locations, attention_weights)
    ).flatten(2)


def stretched(value, value_spatial_shapes, sampling_locations, attention_weights):
    return global_core(value, value_spatial_shapes, sampling_locations * 1.01, attention_weights)


def detached(value, value_spatial_shapes, sampling_locations, attention_weights):
    return global_core(value, value_spatial_shapes, sampling_locations.detach(), attention_weights)


def fails(value, value_spatial_shapes, sampling_locations, attention_weights):
    raise NotImplementedError("no CPU")


def with_sizes(value, sizes, sampling_locations, attention_weights):
    return global_core(value, sizes, sampling_locations, attention_weights)


class Attention(nn.Module):
    """The layers that such an attention has."""

    def __init__(self):
        super().__init__()
        self.sampling_offsets = nn.Linear(4, 4)
        self.attention_weights = nn.Linear(4, 2)


class CallsGlobal(Attention):
    def forward(self, *args):
        return next(global_core(*args) for _ in range(1))  # in a scope of its own


class CallsSuper(CallsGlobal):
    def forward(self, *args, scale=2):
        return scale * super().forward(*args)


class IsCore(nn.Module):
    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        shapes = value_spatial_shapes_list
        return global_core(value, shapes, sampling_locations, attention_weights)


class InheritsCore(IsCore):
    pass


class HasCore(Attention):
    def __init__(self, core=None):
        super().__init__()
        self.inner = core or InheritsCore()

    def forward(self, value, shapes, *args):
        return self.inner(value, None, shapes, None, *args, 64)


class HasMethod(Attention):
    def attend(self, value, value_spatial_shapes, sampling_locations, attention_weights):
        return global_core(value, value_spatial_shapes, sampling_locations, attention_weights)

    def forward(self, *args):
        return self.attend(*args)


class HasAttribute(Attention):
    def __init__(self, core=global_core):
        super().__init__()
        self.core = core

    def forward(self, *args):
        return self.core(*args)


class CallsStretched(Attention):
    def forward(self, *args):
        return stretched(*args)


class CallsDetached(Attention):
    def forward(self, *args):
        return detached(*args)


class CallsUnknown(Attention):
    def forward(self, *args):
        return with_sizes(*args)


class Doubled(IsCore):
    def forward(
        self,
        value,
        value_spatial_shapes,
        value_spatial_shapes_list,
        level_start_index,
        sampling_locations,
        attention_weights,
        im2col_step,
    ):
        shapes = value_spatial_shapes_list
        return 2 * global_core(value, shapes, sampling_locations, attention_weights)


def arguments_of_a_core():
    weights = torch.rand(1, 5, 1, 2, 1)
    return torch.rand(1, 16, 1, 4), [(3, 4), (2, 2)], torch.rand(1, 5, 1, 2, 1, 2), weights


@pytest.mark.parametrize(
    "layer", [CallsGlobal, CallsSuper, HasCore, HasMethod, HasAttribute], ids=lambda x: x.__name__
)
def test_a_layer_written_tomorrow_is_found(layer, calls):
    model, arguments = nn.Sequential(nn.Linear(1, 1), layer()), arguments_of_a_core()
    expected = model[1](*arguments)
    use_msda(model)
    for patched in (model[1], pickle.loads(pickle.dumps(model))[1]):
        calls.clear()
        assert_close(patched(*arguments), expected)
        assert len(calls["ours"]) == 1 and not calls["theirs"]
        assert isinstance(patched, layer)
    undo(model)
    assert_same_bits(model[1](*arguments), expected)
    assert type(model[1]) is layer


def test_a_core_alone_is_patched_and_recorded(calls):
    core, (value, shapes, *samples) = InheritsCore(), arguments_of_a_core()
    use_msda(core)
    calls.clear()
    with capture_sampling(core) as records:
        core(value, None, shapes, None, *samples, im2col_step=64)
    assert len(calls["ours"]) == 1
    (record,) = records
    assert record.reference_points is None
    assert record.sampling_locations.equal(samples[0])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: nn.Linear(2, 2), "^model must contain .* attention core, got a Sequential"),
        (Attention, "^1 must contain .* attention core, got a Attention in which none"),
        (CallsUnknown, r"^with_sizes of 1 must take \(value, .*, got \(value, sizes, "),
        (CallsStretched, "^stretched of 1 must compute .* got a different output"),
        (CallsDetached, "^detached of 1 must compute .* different gradient of sampling_locations"),
        (lambda: HasCore(Doubled()), r"^forward of 1\.inner must compute .* different output"),
        (
            lambda: HasAttribute(functools.partial(fails)),
            "^core of 1 must compute multi-scale deformable attention, got NotImplementedError: no",
        ),
    ],
    ids=["none", "no_core", "unknown", "stretched", "detached", "doubled", "fails"],
)
def test_what_is_no_such_core_is_refused_and_left_alone(layer, message):
    model = nn.Sequential(CallsGlobal(), layer())
    if not isinstance(model[1], Attention):
        model = model[1:]
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=message):
        use_msda(model)
    assert [type(module) for module in model.modules()] == classes


def test_a_forward_on_the_instance_is_refused():
    model = nn.Sequential(CallsGlobal())
    model[0].forward = model[0].forward
    with pytest.raises(ValueError, match=r"^0 must run the forward of its class, got one set on"):
        use_msda(model)


def test_a_class_replaced_after_patching_is_not_undone():
    model = use_msda(nn.Sequential(CallsGlobal()))
    patched = type(model[0])
    model[0].__class__ = type("Wrapped", (patched,), {})
    with pytest.raises(ValueError, match=r"^0 must have the class .*, got Wrap"):
        undo(model)
    use_msda(model)  # patched it is
    assert type(model[0]).__name__ == "Wrapped"


def test_an_unknown_method_of_interpolation_is_refused():
    layer, arguments = make_layer("rt_detr_v2")
    layer.method = "cubic"
    with pytest.raises(ValueError, match=r"^method must be one of .* got 'cubic'"):
        use_msda(layer)
    layer.method = "default"
    use_msda(layer)(**arguments)
    layer.method = "discrete"
    message = r"^method must be one of \('default',\), for which use_msda compared .*'discrete'"
    with pytest.raises(ValueError, match=message):
        layer(**arguments)


def test_our_own_module_needs_no_patch():
    with pytest.raises(ValueError, match=r"^model must contain"):
        use_msda(msda.MSDeformAttn(8, 1, 2, 1))
