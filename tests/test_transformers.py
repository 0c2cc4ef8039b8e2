"""A transformers model computes the same with our core in place of its own, in every family."""

import copy
import functools
import inspect
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msda
from conftest import assert_close, assert_same_bits, plain_pytorch
from msda import forms
from msda.integrations.transformers import undo, use_msda
from msda.plot import capture_sampling, draw_sampling
from msda.testing import Inputs

transformers = pytest.importorskip("transformers")

C = 32  # channels: the group norms of some families have 32 groups
HEADS = dict(encoder_attention_heads=2, decoder_attention_heads=2)
WIDTHS = dict(encoder_ffn_dim=16, decoder_ffn_dim=16)
SMALL = dict(num_queries=7, num_labels=3)
LAYERS = dict(encoder_layers=1, decoder_layers=2)


@pytest.fixture(autouse=True)
def silence():
    transformers.logging.set_verbosity_error()


# ---- small models of every family ----------------------------------------------------------------


def stages(first):
    return [f"stage{number}" for number in range(first, 5)]


def resnet(config=None, first=2):
    config = config or transformers.ResNetConfig
    sizes = dict(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1] * 4)
    return config(**sizes, layer_type="basic", out_features=stages(first))


def swin():
    sizes = dict(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=2, image_size=64)
    return transformers.SwinConfig(**sizes, out_features=stages(2))


def images(height=64, width=96):
    return dict(pixel_values=torch.randn(2, 3, height, width))


def deformable_detr(two_stage=False):
    config = transformers.DeformableDetrConfig(
        backbone_config=resnet(),
        d_model=C,
        two_stage=two_stage,
        with_box_refine=two_stage,
        two_stage_num_proposals=7,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
    )
    return transformers.DeformableDetrForObjectDetection(config), images()


def grounding_dino(name="GroundingDino"):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = transformers.BertConfig(**sizes, vocab_size=1100, max_position_embeddings=32)
    config = getattr(transformers, f"{name}Config")(
        backbone_config=swin(),
        text_config=text,
        d_model=C,
        max_text_len=8,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
    )
    words = torch.tensor([[101, 7, 8, 1012, 9, 1012, 102]] * 2)  # 101, 102, 1012: [CLS], [SEP], "."
    model = getattr(transformers, f"{name}ForObjectDetection")(config)
    return model, images() | dict(input_ids=words)


def like_rt_detr(name, first_stage=2, **options):
    """RT-DETR and what was made from it."""
    config = getattr(transformers, f"{name}Config")(
        backbone_config=resnet(transformers.RTDetrResNetConfig, first_stage),
        d_model=C,
        encoder_hidden_dim=C,
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[C] * 3,
        num_denoising=0,
        **HEADS,
        **WIDTHS,
        **SMALL,
        **LAYERS,
        **options,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config), images()


def pp_doclayout_v2():
    reading_order = dict(
        hidden_size=16,
        num_attention_heads=2,
        intermediate_size=16,
        num_hidden_layers=1,
        coordinate_size=4,
        shape_size=2,
        num_classes=3,
        max_position_embeddings=32,
        relation_bias_embed_dim=4,
        global_pointer_head_size=4,
    )
    classes = dict(class_thresholds=[0.5] * 3, class_order=[0, 1, 2])
    return like_rt_detr("PPDocLayoutV2", reading_order_config=reading_order, **classes)


def pp_doclayout_v3():
    sizes = dict(x4_feat_dim=8, mask_feature_channels=[8, 8], num_prototypes=4)
    return like_rt_detr("PPDocLayoutV3", first_stage=1, **sizes)


def like_lw_detr(name, backbone, **options):
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=1)
    sizes |= dict(image_size=64, patch_size=8, out_features=["stage1", "stage2"])
    config = getattr(transformers, f"{name}Config")(
        backbone_config=getattr(transformers, backbone)(**sizes, **options.pop("vit")),
        d_model=C,
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_self_attention_heads=2,
        decoder_cross_attention_heads=4,
        group_detr=2,
        c2f_num_blocks=1,
        **SMALL,
        **options,
    )
    return getattr(transformers, f"{name}ForObjectDetection")(config), images(64, 64)


def lw_detr():
    vit = dict(pretrain_image_size=64, num_windows=4)
    return like_lw_detr("LwDetr", "LwDetrViTConfig", vit=vit, projector_scale_factors=[2.0, 0.5])


def rf_detr():
    from transformers.models.rf_detr import configuration_rf_detr

    transformers.RfDetrDinov2Config = configuration_rf_detr.RfDetrDinov2Config
    return like_lw_detr("RfDetr", "RfDetrDinov2Config", vit=dict(num_windows=2), decoder_n_points=2)


def mask2former():
    config = transformers.Mask2FormerConfig(
        backbone_config=resnet(first=1),
        feature_size=C,
        mask_feature_size=C,
        hidden_dim=C,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=2,
        decoder_layers=2,
        num_attention_heads=2,
        **SMALL,
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), images()


def oneformer():
    config = transformers.OneFormerConfig(
        backbone_config=resnet(first=1),
        conv_dim=C,
        mask_dim=C,
        hidden_dim=C,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=2,
        decoder_layers=2,
        query_dec_layers=1,
        num_attention_heads=2,
        text_encoder_width=16,
        text_encoder_num_layers=1,
        text_encoder_vocab_size=20,
        text_encoder_context_length=5,
        task_seq_len=5,
        **SMALL,
    )
    task = dict(task_inputs=torch.randint(0, 20, (2, 5)))
    return transformers.OneFormerForUniversalSegmentation(config), images() | task


def omdet_turbo():
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    text = transformers.CLIPTextConfig(
        **sizes, vocab_size=50, max_position_embeddings=8, projection_dim=16, eos_token_id=49
    )
    config = transformers.OmDetTurboConfig(
        text_config=text,
        backbone_config=swin(),
        apply_layernorm_after_vision_backbone=False,
        image_size=64,
        text_projection_in_dim=16,
        text_projection_out_dim=16,
        task_encoder_hidden_dim=16,
        class_embed_dim=16,
        num_queries=7,
        encoder_hidden_dim=C,
        vision_features_channels=[C] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=16,
        decoder_hidden_dim=C,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=16,
    )
    classes = torch.tensor([[5, 6, 49], [7, 8, 49], [5, 9, 49], [1, 2, 49]])
    tasks = torch.tensor([[3, 4, 49]] * 2)
    words = dict(
        classes_input_ids=classes,
        classes_attention_mask=torch.ones_like(classes),
        classes_structure=torch.tensor([2, 2]),
        tasks_input_ids=tasks,
        tasks_attention_mask=torch.ones_like(tasks),
    )
    return transformers.OmDetTurboForObjectDetection(config), images(64, 64) | words


# Models and the number of their layers with a core.
FAMILIES = {
    "deformable_detr": (deformable_detr, 3),
    "deformable_detr_two_stage": (functools.partial(deformable_detr, two_stage=True), 3),
    "grounding_dino": (grounding_dino, 3),
    "mm_grounding_dino": (functools.partial(grounding_dino, "MMGroundingDino"), 3),
    "rt_detr": (functools.partial(like_rt_detr, "RTDetr"), 2),
    "rt_detr_v2": (functools.partial(like_rt_detr, "RTDetrV2"), 2),
    "rt_detr_v2_discrete": (
        functools.partial(like_rt_detr, "RTDetrV2", decoder_method="discrete"),
        2,
    ),
    "d_fine": (functools.partial(like_rt_detr, "DFine", decoder_n_points=[3, 6, 3]), 2),
    "deimv2": (functools.partial(like_rt_detr, "Deimv2", decoder_n_points=[3, 6, 3]), 2),
    "pp_doclayout_v2": (pp_doclayout_v2, 2),
    "pp_doclayout_v3": (pp_doclayout_v3, 2),
    "pp_doclayout_v4": (
        functools.partial(like_rt_detr, "PPDocLayoutV4", hidden_size=C),
        2,
    ),
    "lw_detr": (lw_detr, 2),
    "rf_detr": (rf_detr, 2),
    "mask2former": (mask2former, 2),
    "oneformer": (oneformer, 2),
    "omdet_turbo": (omdet_turbo, 2),
}


def randomised(model):
    """The model with weights that make its outputs depend on where each query samples."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, std=0.1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


def make_model(family, dtype=torch.float64):
    """A random model and its inputs; float64, where top-k choices do not hang on rounding."""
    model, inputs = FAMILIES[family][0]()
    inputs = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return randomised(model).to(dtype), inputs


def tensors_of(output, name=""):
    """Every tensor of a model's output, by name."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    if not isinstance(output, dict | list | tuple):
        return {}
    items = output.items() if isinstance(output, dict) else enumerate(output)
    return {
        path: tensor for key, x in items for path, tensor in tensors_of(x, f"{name}.{key}").items()
    }


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


class Calls(dict):
    """Empty at first, and again once cleared."""

    def __init__(self):
        super().__init__(ours=[], theirs=[])

    def clear(self):
        for made in self.values():
            made.clear()


@pytest.fixture
def calls(monkeypatch):
    """Arguments of each call of ours, and a mark for each call of theirs."""
    made = Calls()
    ours, theirs = forms.ms_deform_attn, F.grid_sample

    def counted(*args, **options):
        made["ours"].append(args)
        return ours(*args, **options)

    def grid_sample(*args, **options):
        made["theirs"].append(None)
        return theirs(*args, **options)

    monkeypatch.setattr(forms, "ms_deform_attn", counted)
    monkeypatch.setattr(F, "grid_sample", grid_sample)
    return made


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


def forward(model, inputs):
    with torch.no_grad():
        return tensors_of(model(**inputs))


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


def make_layer(family):
    """The first layer with a core of a small model, and arguments for it."""
    model, inputs = make_model(family, torch.float32)
    name = next(name for name, x in model.named_modules() if hasattr(x, "sampling_offsets"))
    layer, taken = model.get_submodule(name), {}

    def keep(_, args, kwargs):
        taken.update(inspect.signature(layer.forward).bind(*args, **kwargs).arguments)

    with layer.register_forward_pre_hook(keep, with_kwargs=True):
        forward(model, inputs)
    taken.pop("kwargs", None)
    return layer, taken


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


# ---- cores are found by what they are ------------------------------------------------------------


def global_core(value, value_spatial_shapes, sampling_locations, attention_weights):
    return plain_pytorch(
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
