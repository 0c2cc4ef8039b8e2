"""The detector's model: against the reference operator, at its start, with padding, both arms."""

import itertools
import math
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msda.modules
from detector.backbone import (
    RESNET_BLOCKS,
    Backbone,
    BatchNorm2d,
    FrozenBatchNorm2d,
    ResNet,
    TinyNet,
)
from detector.boxes import inverse_sigmoid
from detector.config import ModelConfig, TrainConfig
from detector.losses import SetCriterion
from detector.model import DeformableDETR, build_model, postprocess
from detector.position_encoding import LearnedEmbedding, SineEmbedding
from detector.transformer import flatten_levels
from msda import MSDeformAttn
from msda.reference import ms_deform_attn_fused_reference
from msda.testing import relative_error
from tests.helpers.results import assert_same_bits

DEFORMABLE = {
    "single_scale": dict(num_feature_levels=1),
    "multi_scale": dict(),
    "iter_refine": dict(box_refine=True),
    "two_stage": dict(box_refine=True, two_stage=True),
}
DENSE = {
    "dense": dict(attention="dense", reference_boxes=False),
    "dense_reference": dict(attention="dense"),
    "dense_refine": dict(attention="dense", box_refine=True),
}
VARIANTS = DEFORMABLE | DENSE
every_deformable = pytest.mark.parametrize("variant", DEFORMABLE)
every_dense = pytest.mark.parametrize("variant", DENSE)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def small_config(variant="multi_scale", **changes):
    sizes = dict(
        backbone="tiny",
        num_classes=5,
        hidden_dim=64,  # two channels in each group of the norms
        num_heads=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        feedforward_dim=48,
        num_encoder_points=2,
        num_decoder_points=3,
        num_queries=9,
        dropout=0.0,
    )
    return ModelConfig(**(sizes | VARIANTS[variant] | changes))


def randomise(model):
    """Let every parameter matter, those that start at zero too."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


def padded_batch(dtype=torch.float64, height=96, width=128):
    """Two images, the second one padded."""
    images = torch.randn(2, 3, height, width, dtype=dtype)
    padding_mask = torch.zeros(2, height, width, dtype=torch.bool)
    padding_mask[1, height * 2 // 3 :] = True
    padding_mask[1, :, width * 3 // 4 :] = True
    images.masked_fill_(padding_mask[:, None], 0)
    return images, padding_mask


def flat(outputs):
    """Every tensor among the outputs, by name."""
    tensors = {}
    for name, entry in outputs.items():
        if isinstance(entry, torch.Tensor):
            tensors[name] = entry
        for place, part in enumerate(entry) if isinstance(entry, list) else [("", entry)]:
            if isinstance(part, dict):
                tensors |= {f"{name}{place}.{key}": tensor for key, tensor in part.items()}
    return tensors


def loss(outputs):
    """A number that depends on all outputs; logits of padding are infinite, their boxes are not."""
    return sum(
        (
            tensor * torch.linspace(-1, 1, tensor.numel(), dtype=tensor.dtype).view(tensor.shape)
        ).sum()
        for tensor in flat(outputs).values()
    )


class ReferenceAttention(MSDeformAttn):
    """MSDeformAttn on the plain PyTorch definition of the operator."""

    def forward(self, query, reference_points, input_flatten, shapes, start=None, mask=None):
        samples = (self.n_levels, self.n_points)
        output = ms_deform_attn_fused_reference(
            self.value_proj(input_flatten).unflatten(-1, (self.n_heads, -1)),
            shapes,
            start,
            reference_points,
            self.sampling_offsets(query).unflatten(-1, (self.n_heads, *samples, 2)),
            self.attention_weights(query).unflatten(-1, (self.n_heads, *samples)),
            padding_mask=mask,
        )
        return self.output_proj(output)


# ---- what it computes ----------------------------------------------------------------------------


@every_deformable
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs_and_gradients_are_those_of_the_reference_operator(variant, padded):
    images, padding_mask = padded_batch()
    model = randomise(build_model(small_config(variant))).double()
    reference = DeformableDETR(small_config(variant), attention=ReferenceAttention).double()
    reference.load_state_dict(model.state_dict())
    arguments = (images, padding_mask) if padded else (images,)
    outputs, expected = flat(model(*arguments)), flat(reference(*arguments))
    assert outputs.keys() == expected.keys()
    for name, tensor in outputs.items():
        assert relative_error(tensor, expected[name]) < 1e-11, name
    loss(outputs).backward()
    loss(expected).backward()
    parameters = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert relative_error(parameter.grad, parameters[name].grad) < 1e-9, name


@every_variant
def test_outputs_have_the_documented_shapes(variant):
    config = small_config(variant)
    outputs = build_model(config)(*padded_batch(torch.float32))
    layers = [outputs, *outputs["aux_outputs"]]
    assert len(layers) == config.num_decoder_layers
    for layer in layers:
        assert layer["pred_logits"].shape == (2, 9, 5)
        assert layer["pred_boxes"].shape == (2, 9, 4)
        assert ((layer["pred_boxes"] > 0) & (layer["pred_boxes"] < 1)).all()
    assert ("enc_outputs" in outputs) == config.two_stage
    if config.two_stage:
        num_tokens = 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
        assert outputs["enc_outputs"]["pred_logits"].shape == (2, num_tokens, 5)
        assert outputs["enc_outputs"]["pred_boxes"].shape == (2, num_tokens, 4)


def test_auxiliary_outputs_can_be_switched_off():
    images, _ = padded_batch(torch.float32)
    assert "aux_outputs" not in build_model(small_config(aux_loss=False))(images)


@every_variant
def test_gradient_checkpointing_changes_no_bit(variant):
    images, padding_mask = padded_batch(torch.float32)
    models = [
        build_model(small_config(variant, dropout=0.2), gradient_checkpointing=recompute)
        for recompute in (False, True)
    ]
    models[1].load_state_dict(models[0].state_dict())
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    for layer in (*models[1].transformer.encoder.layers, *models[1].transformer.decoder.layers):
        layer.register_forward_pre_hook(count)
    for model in models:
        torch.manual_seed(3)
        loss(model.train()(images, padding_mask)).backward()
    assert calls == 2 * 4  # each layer ran again in the backward pass
    others = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        assert_same_bits(parameter.grad, others[name].grad)


# ---- padding -------------------------------------------------------------------------------------


@every_variant
def test_mask_without_padding_changes_nothing(variant):
    images, _ = padded_batch()
    model = randomise(build_model(small_config(variant))).double().eval()
    with torch.no_grad():
        expected = flat(model(images))
        outputs = flat(model(images, torch.zeros(2, 96, 128, dtype=torch.bool)))
    for name, tensor in outputs.items():
        # 1e-6 is part of the embedding of places; a count of rows is as exact as a number.
        assert relative_error(tensor, expected[name]) < 1e-11, name


@every_variant
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_padding_of_the_maps_does_not_matter(variant, position_embedding):
    config = small_config(variant, position_embedding=position_embedding)
    model = randomise(build_model(config)).double().eval()
    num_levels = config.num_feature_levels
    sizes = [(7, 9), (4, 5), (2, 3), (1, 2)][:num_levels]
    maps = [torch.randn(1, 64, *size, dtype=torch.float64) for size in sizes]

    def decode(maps, masks):
        embed = model.backbone[1]
        positions = [embed(m, None if masks is None else masks[i]) for i, m in enumerate(maps)]
        tokens = flatten_levels(maps, positions, masks, model.transformer.level_embed)
        embedding = None if model.query_embed is None else model.query_embed.weight
        hidden, boxes, _ = model.transformer(tokens, embedding, model.class_embed, model.bbox_embed)
        return [*hidden, *boxes]

    padded, masks = [], []
    for feature_map, (height, width) in zip(maps, sizes, strict=True):
        larger = torch.full((1, 64, height + 3, width + 2), 1e3, dtype=torch.float64)
        larger[:, :, :height, :width] = feature_map
        mask = torch.ones(1, height + 3, width + 2, dtype=torch.bool)
        mask[:, :height, :width] = False
        padded.append(larger)
        masks.append(mask)
    with torch.no_grad():
        for actual, expected in zip(decode(padded, masks), decode(maps, None), strict=True):
            assert relative_error(actual, expected) < 1e-9


def test_tokens_know_their_place_in_image_and_map():
    maps = [torch.zeros(1, 32, 4, 6), torch.zeros(1, 32, 2, 3)]
    masks = [torch.zeros(1, 4, 6, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.bool)]
    masks[0][:, :, 3:] = True  # half of the columns
    masks[1][:, :, 2:] = True
    positions = [torch.zeros(1, *m.shape[2:], 32) for m in maps]
    tokens = flatten_levels(maps, positions, masks, torch.zeros(2, 32))
    assert tokens.shapes == [(4, 6), (2, 3)]
    assert tokens.centres.dtype == torch.float32
    # Row 1, column 2 of the first level, 3 columns of it image; row 1, column 0 of the second.
    torch.testing.assert_close(tokens.centres[0, 8], torch.tensor([2.5 / 3, 1.5 / 4]))
    torch.testing.assert_close(tokens.centres[0, 27], torch.tensor([0.5 / 2, 1.5 / 2]))
    torch.testing.assert_close(tokens.valid_ratios, torch.tensor([[[0.5, 1.0], [2 / 3, 1.0]]]))
    on_maps = tokens.on_maps(torch.tensor([[[0.4, 0.8, 0.2, 0.1]]]))
    expected = torch.tensor([[0.2, 0.8, 0.1, 0.1], [0.4 * 2 / 3, 0.8, 0.2 * 2 / 3, 0.1]])
    torch.testing.assert_close(on_maps[0, 0], expected)


# ---- positions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_sine_embedding_is_worked_out_by_hand(padded):
    rows, columns = (3, 4) if padded else (5, 6)
    mask = torch.ones(1, 5, 6, dtype=torch.bool)
    mask[:, :rows, :columns] = False
    embedding = SineEmbedding(8)(torch.zeros(1, 8, 5, 6), mask if padded else None)
    assert embedding.shape == (1, 5, 6, 8)
    for row in range(rows):
        for column in range(columns):
            expected = []
            for place, count in ((row, rows), (column, columns)):  # the row comes first
                angle = (place + 0.5) / (count + 1e-6) * 2 * math.pi
                slow = angle / 100  # 10000 ** (2 / 4)
                expected += [math.sin(angle), math.cos(angle), math.sin(slow), math.cos(slow)]
            torch.testing.assert_close(embedding[0, row, column], torch.tensor(expected))


def test_sine_embedding_of_16_bit_features_is_computed_in_float32():
    embedding, features = SineEmbedding(64), torch.zeros(1, 64, 40, 50)
    exact = embedding(features, None)
    assert_same_bits(embedding(features.bfloat16(), None), exact.bfloat16())


def test_learned_embedding_puts_the_column_first():
    embedding = LearnedEmbedding(8)
    vectors = embedding(torch.zeros(2, 8, 3, 5), None)
    assert vectors.shape == (1, 3, 5, 8)
    expected = torch.cat([embedding.col_embed.weight[4], embedding.row_embed.weight[2]])
    assert_same_bits(vectors[0, 2, 4], expected)


def test_learned_embedding_refuses_maps_it_has_no_vectors_for():
    with pytest.raises(ValueError, match=r"^position_embedding must be 'sine' .* 51 x 3$"):
        LearnedEmbedding(8)(torch.zeros(1, 8, 51, 3), None)


# ---- at the start --------------------------------------------------------------------------------


@every_deformable
def test_heads_start_as_the_originals(variant):
    model = build_model(small_config(variant))
    for head in model.class_embed:
        torch.testing.assert_close(head.bias, torch.full((5,), -math.log(99)))
        assert head.weight.abs().max() > 0
    for index, head in enumerate(model.bbox_embed):
        last = head.layers[-1]
        small = variant in ("single_scale", "multi_scale") or (
            variant == "iter_refine" and index == 0
        )
        assert last.weight.eq(0).all()
        assert last.bias.tolist() == [0, 0, *([-2, -2] if small else [0, 0])]
        assert head.layers[0].weight.abs().max() > 0
    for projection, norm in model.input_proj:
        assert projection.bias.eq(0).all()
        fan = projection.weight[0].numel() + projection.weight[:, 0].numel()
        assert 0.9 * math.sqrt(6 / fan) < projection.weight.abs().max() <= math.sqrt(6 / fan)
        assert norm.num_groups == 32


@every_variant
def test_transformer_starts_as_the_originals(variant):
    config = small_config(variant, feedforward_dim=128)
    transformer = build_model(config).transformer
    layer = transformer.decoder.layers[0]
    for weight in (layer.linear1.weight, layer.self_attn.in_proj_weight):
        bound = math.sqrt(6 / sum(weight.shape))
        assert 0.98 * bound < weight.abs().max() <= bound
    if config.attention == "deformable":
        fresh = MSDeformAttn(64, config.num_feature_levels, 4, 3)
        assert_same_bits(layer.cross_attn.sampling_offsets.bias, fresh.sampling_offsets.bias)
        assert layer.cross_attn.sampling_offsets.weight.eq(0).all()
        assert layer.cross_attn.attention_weights.weight.eq(0).all()
    if hasattr(transformer, "reference_points"):
        assert transformer.reference_points.bias.eq(0).all()
    assert 0.8 < transformer.level_embed.std() < 1.2


def test_first_boxes_are_an_eighth_of_the_image_around_the_reference_points():
    model = build_model(small_config())
    boxes = model(padded_batch(torch.float32)[0])["pred_boxes"]
    points = model.transformer.reference_points(model.query_embed.weight[:, :64]).sigmoid()
    torch.testing.assert_close(boxes[0, :, :2], points, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes[..., 2:], torch.tensor(-2.0).sigmoid().expand(2, 9, 2))


# ---- refinement and two-stage --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["iter_refine", "two_stage", "dense_refine"])
def test_boxes_are_refined_without_gradients_between_layers(variant):
    model = randomise(build_model(small_config(variant)))
    outputs = model(*padded_batch(torch.float32))
    outputs["pred_boxes"].sum().backward()
    assert model.bbox_embed[0].layers[-1].weight.grad is None
    assert model.bbox_embed[1].layers[-1].weight.grad.abs().max() > 0
    # The second layer's boxes are the first layer's, moved by what the second head says.
    hidden = []
    model.transformer.decoder.layers[1].register_forward_hook(lambda *call: hidden.append(call[2]))
    outputs = model(*padded_batch(torch.float32))
    first = outputs["aux_outputs"][0]["pred_boxes"]
    expected = (model.bbox_embed[1](hidden[0]) + inverse_sigmoid(first)).sigmoid()
    torch.testing.assert_close(outputs["pred_boxes"], expected)


def test_decoder_looks_in_the_boxes_of_the_layer_before():
    model = randomise(build_model(small_config("iter_refine")))
    references = []
    for layer in model.transformer.decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, call: references.append(call[1]))
    outputs = model(padded_batch(torch.float32)[0])
    assert [reference.shape for reference in references] == [(2, 9, 1, 2), (2, 9, 1, 4)]
    assert_same_bits(references[1][:, :, 0], outputs["aux_outputs"][0]["pred_boxes"])
    assert not references[1].requires_grad


def test_proposals_start_as_boxes_around_the_tokens():
    model = build_model(small_config("two_stage"))
    batch = padded_batch(torch.float32, height=64, width=480)  # the second image: 42 x 360
    boxes = iter(model(*batch)["enc_outputs"]["pred_boxes"].transpose(0, 1))
    image_sizes = [[(8, 60), (6, 45)], [(4, 30), (3, 23)], [(2, 15), (2, 12)], [(1, 8), (1, 6)]]
    for level, sizes in enumerate(image_sizes):
        height, width = sizes[0]
        for row, column in itertools.product(range(height), range(width)):
            for box, (rows, columns) in zip(next(boxes), sizes, strict=True):
                x, y, size = (column + 0.5) / columns, (row + 0.5) / rows, 0.05 * 2**level
                # Of 60 columns the first and last are too close to the border.
                inside = all(0.01 < number < 0.99 for number in (x, y))
                expected = torch.tensor([x, y, size, size] if inside else [1.0, 1.0, 1.0, 1.0])
                torch.testing.assert_close(box, expected, rtol=1e-5, atol=1e-6)
    assert next(boxes, None) is None


def test_decoder_starts_from_the_best_proposals():
    model = randomise(build_model(small_config("two_stage")))
    references = []
    first = model.transformer.decoder.layers[0].cross_attn
    first.register_forward_pre_hook(lambda _, call: references.append(call[1]))
    proposed = model(padded_batch(torch.float32)[0])["enc_outputs"]
    best = proposed["pred_logits"][..., 0].topk(9, 1).indices
    expected = proposed["pred_boxes"].take_along_dim(best[..., None], 1)
    torch.testing.assert_close(references[0][:, :, 0], expected)


def test_only_the_encoders_own_outputs_train_its_heads():
    model = randomise(build_model(small_config("two_stage")))
    outputs = model(*padded_batch(torch.float32))
    (outputs["pred_boxes"].sum() + outputs["pred_logits"].sum()).backward(retain_graph=True)
    heads = (model.class_embed[-1].weight, model.bbox_embed[-1].layers[0].weight)
    assert all(weight.grad is None for weight in heads)
    loss(outputs["enc_outputs"]).backward()
    assert all(weight.grad.abs().max() > 0 for weight in heads)


def test_padded_tokens_get_no_gradient_from_their_infinite_boxes():
    model = randomise(build_model(small_config("two_stage")))
    images, padding_mask = padded_batch(torch.float32)
    padding_mask[:] = True
    padding_mask[:, :8, :8] = False  # hardly any token is usable, less than there are queries
    outputs = model(images, padding_mask)
    usable = (outputs["enc_outputs"]["pred_boxes"] < 1).all(-1).sum(1)
    assert (usable < 9).all()
    loss(outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_with_fewer_tokens_than_queries_all_tokens_become_queries():
    images = torch.randn(1, 3, 32, 32)
    few = randomise(build_model(small_config("two_stage", num_queries=22))).eval()
    many = build_model(small_config("two_stage", num_queries=400)).eval()
    many.load_state_dict(few.state_dict())
    outputs, expected = flat(many(images)), flat(few(images))
    assert outputs["pred_logits"].shape == (1, 16 + 4 + 1 + 1, 5)
    for name, tensor in outputs.items():
        assert_same_bits(tensor, expected[name])
    assert len(postprocess(many(images), torch.tensor([[32, 32]]))[0]["scores"]) == 100


def test_more_objects_than_queries_are_matched_as_far_as_there_are_queries():
    model = randomise(build_model(small_config("two_stage", num_queries=400)))
    boxes = torch.rand(30, 4) * 0.4 + 0.3
    targets = [{"labels": torch.arange(30) % 5, "boxes": boxes}]
    losses = SetCriterion(TrainConfig())(model(torch.randn(1, 3, 32, 32)), targets)
    sum(losses.values()).backward()
    assert all(number.isfinite() for number in losses.values())
    assert model.bbox_embed[0].layers[0].weight.grad.abs().max() > 0


# ---- small, thin, alone --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_dim", [32, 64], ids=["one channel a group", "two"])
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (1, 3000), (3000, 1)], ids=str)
@pytest.mark.parametrize("variant", ["two_stage", "multi_scale", "dense_refine"])
def test_one_small_or_thin_image_trains_and_is_predicted(variant, size, hidden_dim):
    model = build_model(small_config(variant, hidden_dim=hidden_dim))
    images = torch.randn(1, 3, *size)
    for padding_mask in (None, torch.zeros(1, *size, dtype=torch.bool)):
        outputs = model(images, padding_mask)
        loss(outputs).backward()
        assert all(tensor.isfinite().all() for tensor in flat(outputs).values())
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert model.eval()(images)["pred_boxes"].isfinite().all()


def test_a_single_value_per_channel_is_normalised_by_the_statistics_so_far():
    norm = BatchNorm2d(3).train()
    norm.running_mean.fill_(2.0)
    norm.running_var.fill_(4.0)
    x = torch.randn(1, 3, 1, 1)
    torch.testing.assert_close(norm(x), (x - 2) / (4 + norm.eps) ** 0.5)
    assert norm.running_mean.tolist() == [2.0] * 3
    larger = torch.randn(2, 3, 1, 1)
    torch.testing.assert_close(norm(larger), torch.nn.BatchNorm2d(3)(larger))


# ---- the dense arm -------------------------------------------------------------------------------


def test_dense_arm_has_the_sizes_of_the_deformable_one():
    dense, deformable = build_model(small_config("dense")), build_model(small_config())
    for part in ("encoder", "decoder"):
        layers = [getattr(model.transformer, part).layers for model in (dense, deformable)]
        assert len(layers[0]) == len(layers[1]) == 2
        for layer, other in zip(*layers, strict=True):
            assert layer.linear1.weight.shape == other.linear1.weight.shape
            attention = layer.self_attn if part == "encoder" else layer.cross_attn
            assert (attention.embed_dim, attention.num_heads) == (64, 4)
    assert len(dense.input_proj) == len(deformable.input_proj) == 4
    assert dense.class_embed[0].weight.shape == deformable.class_embed[0].weight.shape


@every_dense
def test_dense_queries_look_at_every_token_of_every_level(variant):
    model = randomise(build_model(small_config(variant))).eval()
    features = []

    def leaf(module, arguments):
        features.append(arguments[0].features.detach().requires_grad_())
        arguments[0].features = features[-1]

    model.transformer.encoder.register_forward_pre_hook(leaf)
    outputs = model(*padded_batch(torch.float32))
    outputs["pred_logits"][1, 0].sum().backward()
    gradient = features[0].grad.abs().sum(-1)
    assert gradient[0].eq(0).all()
    seen = torch.cat(
        [
            F.interpolate((~padded_batch()[1][1:])[None].float(), size).flatten()
            for size in ((12, 16), (6, 8), (3, 4), (2, 2))
        ]
    ).bool()
    assert (gradient[1] > 0).equal(seen)


@every_dense
def test_dense_keys_know_their_place_and_values_do_not(variant):
    model = randomise(build_model(small_config(variant)))
    tokens, calls = [], []
    model.transformer.encoder.register_forward_pre_hook(lambda _, call: tokens.append(call[0]))
    layers = model.transformer.encoder.layers[0], model.transformer.decoder.layers[0]
    for attention in (layers[0].self_attn, layers[1].cross_attn):
        attention.register_forward_pre_hook(lambda _, call: calls.append(call))
    model(*padded_batch(torch.float32))
    for _, keys, values in calls:
        assert_same_bits(keys, values + tokens[0].positions)
    assert_same_bits(calls[0][0], calls[0][1])


@every_dense
def test_dense_gradients_are_finite_and_reach_everything(variant):
    model = randomise(build_model(small_config(variant)))
    loss(model(*padded_batch(torch.float32))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_absolute_boxes_are_detrs():
    model = build_model(small_config("dense"))
    assert not hasattr(model.transformer, "reference_points")
    assert model.query_embed.weight.shape == (9, 64)
    last = model.bbox_embed[0].layers[-1]
    assert last.weight.abs().max() > 0
    assert last.bias.abs().max() < 1
    calls = []
    model.transformer.decoder.register_forward_pre_hook(lambda _, call: calls.append(call))
    boxes = model(padded_batch(torch.float32)[0])["pred_boxes"]
    queries, query_pos, reference = calls[0][:3]
    assert queries.eq(0).all()
    assert_same_bits(query_pos[1], model.query_embed.weight)
    assert reference is None
    assert boxes.std(1).min() > 1e-4  # queries do not start alike


def test_dense_reference_boxes_are_the_deformable_ones():
    model, other = build_model(small_config("dense_reference")), build_model(small_config())
    weights = {k: v for k, v in other.state_dict().items() if "attn" not in k}
    model.load_state_dict(weights, strict=False)
    images = padded_batch(torch.float32)[0]
    # At the start boxes depend on the reference points alone, not on what attention finds.
    torch.testing.assert_close(model(images)["pred_boxes"], other(images)["pred_boxes"])


# ---- backbones -----------------------------------------------------------------------------------


def test_frozen_norm_is_batch_norm_by_fixed_statistics():
    frozen, norm = FrozenBatchNorm2d(6), nn.BatchNorm2d(6).eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = torch.rand(6) + 0.5
        getattr(frozen, name).copy_(values)
        getattr(norm, name).data.copy_(values)
    x = torch.randn(2, 6, 4, 5)
    torch.testing.assert_close(frozen(x), norm(x))
    assert frozen(x.bfloat16()).dtype == torch.bfloat16
    assert not list(frozen.parameters())


def test_frozen_norms_survive_training_mode(monkeypatch):
    monkeypatch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))
    backbone = Backbone("resnet50")
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    images = torch.randn(2, 3, 64, 64)
    expected = backbone.eval()(images)
    for actual, other in zip(backbone.train()(images), expected, strict=True):
        assert_same_bits(actual, other)
    for name, buffer in backbone.named_buffers():
        assert_same_bits(buffer, before[name])


@pytest.mark.parametrize("dilation", [False, True], ids=["plain", "dc5"])
def test_resnet_maps_have_the_known_strides(dilation):
    with torch.device("meta"):
        resnet = ResNet((3, 4, 6, 3), dilation)
        maps = resnet(torch.empty(1, 3, 128, 192))
    last = (8, 12) if dilation else (4, 6)
    sizes = [(1, 512, 16, 24), (1, 1024, 8, 12), (1, 2048, *last)]
    assert [feature_map.shape for feature_map in maps] == sizes
    # As in torchvision, the first block of the dilated stage is not dilated itself.
    dilations = [block.conv2.dilation[0] for block in resnet.layer4]
    assert dilations == ([1, 2, 2] if dilation else [1, 1, 1])


def test_resnet_101_is_deeper():
    with torch.device("meta"):
        resnet = Backbone("resnet101").body
    assert [len(stage) for stage in (resnet.layer1, resnet.layer2, resnet.layer3)] == [3, 4, 23]
    # torchvision's resnet101 has 44 549 160 parameters: 2 049 000 of the classifier, and 105 344 of
    # the norms, which are buffers here.
    assert sum(p.numel() for p in resnet.parameters()) == 44_549_160 - 2_049_000 - 105_344


def test_tiny_net_is_small_and_wholly_trained():
    net = TinyNet()
    maps = net(torch.randn(2, 3, 96, 64))
    assert [m.shape for m in maps] == [(2, 64, 12, 8), (2, 64, 6, 4), (2, 64, 3, 2)]
    assert 250_000 < sum(p.numel() for p in net.parameters()) < 350_000
    assert all(p.requires_grad for p in net.parameters())


def torchvision_file(path, blocks):
    """A ResNet as torchvision's file holds it."""
    state = ResNet(blocks).state_dict()
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000)}
    state["bn1.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, path)
    return state


def test_backbone_weights_come_from_torchvisions_file(tmp_path, monkeypatch):
    monkeypatch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))
    state = torchvision_file(tmp_path / "resnet50.pth", (1, 1, 1, 1))
    config = small_config(backbone="resnet50")
    model = build_model(config, backbone_weights=tmp_path / "resnet50.pth")
    for name, tensor in model.backbone[0].body.state_dict().items():
        assert_same_bits(tensor, state[name])


def test_weights_of_another_net_are_refused_with_the_file(tmp_path, monkeypatch):
    monkeypatch.setitem(RESNET_BLOCKS, "resnet50", (1, 1, 1, 1))
    torchvision_file(tmp_path / "other.pth", (1, 1, 2, 1))
    with pytest.raises(ValueError, match=r"(?s)other\.pth must hold torchvision's.*layer3\.1"):
        Backbone("resnet50", weights=tmp_path / "other.pth")
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        Backbone("resnet50", weights=tmp_path / "nothing.pth")


@pytest.mark.parametrize("options", [dict(dilation=True), dict(weights="file.pth")], ids=str)
def test_tiny_net_has_neither_dilation_nor_weights(options):
    with pytest.raises(ValueError, match=r"^backbone must not be 'tiny'"):
        Backbone("tiny", **options)


class FakeTimmNet(nn.Module):
    """What timm makes with features_only=True, in small."""

    def __init__(self, strides):
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(1 if i else 3, 1, 3, 2, 1) for i in range(len(strides))
        )
        self.norm = nn.BatchNorm2d(1)
        self.feature_info = types.SimpleNamespace(
            reduction=lambda: strides, channels=lambda: [1] * len(strides)
        )

    def forward(self, x):
        maps = []
        for convolution in self.convolutions:
            x = convolution(x)
            maps.append(self.norm(x))
        return maps


@pytest.fixture
def fake_timm(monkeypatch):
    """timm itself cannot be imported without torchvision."""
    calls = []

    def create_model(name, **options):
        calls.append((name, options))
        return FakeTimmNet([2, 4, 8, 16] if "short" in name else [2, 4, 8, 16, 32])

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return calls


def test_timm_backbone_gives_its_last_three_maps(fake_timm):
    model = build_model(small_config(backbone="timm:some_net"), backbone_weights="net.safetensors")
    name, options = fake_timm[0]
    assert (name, options["features_only"], options["pretrained"]) == ("some_net", True, True)
    assert options["pretrained_cfg_overlay"] == {"file": "net.safetensors"}
    assert model(padded_batch(torch.float32)[0])["pred_boxes"].shape == (2, 9, 4)
    Backbone("timm:some_net")
    assert "pretrained" not in fake_timm[1][1]


def test_timm_norms_are_frozen_too(fake_timm):
    backbone = Backbone("timm:some_net").train()
    assert backbone.training and not backbone.body.net.norm.training
    assert not backbone.body.net.norm.weight.requires_grad
    assert backbone.body.net.convolutions[0].weight.requires_grad


def test_timm_backbone_of_other_strides_is_refused(fake_timm):
    with pytest.raises(
        ValueError, match=r"^backbone must have strides 8, 16, 32, got \[4, 8, 16\]"
    ):
        Backbone("timm:short_net")


def test_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match=r"^backbone must be resnet50, .* got 'vgg16'$"):
        Backbone("vgg16")


# ---- precision, compilation, export --------------------------------------------------------------


@every_variant
def test_autocast_gives_the_operator_16_bits_and_keeps_boxes_in_float32(variant, monkeypatch):
    dtypes = []
    fused = msda.modules.ms_deform_attn_fused

    def record(value, shapes, start, reference, offsets, logits, **options):
        dtypes.append((value.dtype, reference.dtype))
        return fused(value, shapes, start, reference, offsets, logits, **options)

    monkeypatch.setattr(msda.modules, "ms_deform_attn_fused", record)
    model = randomise(build_model(small_config(variant)))
    batch = padded_batch(torch.float32)
    exact = model(*batch)
    dtypes.clear()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(*batch)
    if variant in DEFORMABLE:
        assert dtypes == [(torch.bfloat16, torch.float32)] * 4
    for name, tensor in flat(outputs).items():
        assert tensor.dtype == torch.float32, name
        assert tensor.isfinite().all(), name
    if variant != "two_stage":  # whose choice of proposals may change
        assert (outputs["pred_boxes"] - exact["pred_boxes"]).abs().max() < 0.05
    loss(outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_autocast_does_not_touch_reference_points_and_box_heads():
    model = randomise(build_model(small_config()))
    points, hidden = [], torch.randn(2, 9, 64)
    first = model.transformer.decoder.layers[0].cross_attn
    first.register_forward_pre_hook(lambda _, call: points.append(call[1]))
    images = padded_batch(torch.float32)[0]
    model(images)
    exact = model.bbox_embed[0](hidden)
    with torch.autocast("cpu", torch.bfloat16):
        model(images)
        assert_same_bits(model.bbox_embed[0](hidden), exact)
    assert_same_bits(points[1], points[0])


def test_model_of_16_bits_throughout_still_has_float32_boxes():
    model = build_model(small_config("two_stage")).bfloat16()
    images, padding_mask = padded_batch(torch.bfloat16)
    outputs = flat(model(images, padding_mask))
    assert {tensor.dtype for tensor in outputs.values()} == {torch.float32}


@pytest.mark.parametrize("variant", ["multi_scale", "two_stage", "dense"])
def test_model_compiles_to_one_graph(variant):
    torch.compiler.reset()  # a second model of the same class would be compiled for any size
    model = randomise(build_model(small_config(variant)))
    batch = padded_batch(torch.float32)
    expected = flat(model(*batch))
    outputs = flat(torch.compile(model, fullgraph=True, backend="eager")(*batch))
    for name, tensor in outputs.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_model_exports(padded):
    model = randomise(build_model(small_config("two_stage"))).eval()
    batch = padded_batch(torch.float32)[: 1 + padded]
    exported = torch.export.export(model, batch).module()
    for name, tensor in flat(exported(*batch)).items():
        torch.testing.assert_close(tensor, flat(model(*batch))[name], rtol=1e-4, atol=1e-5)


# ---- post-processing and wrong input -------------------------------------------------------------


def test_postprocess_ranks_pairs_of_query_and_class():
    logits = torch.tensor([[[0.0, 3.0], [2.0, -1.0]], [[-4.0, -3.0], [-2.0, -1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.5, 0.5, 1.0]]]).expand(2, -1, -1)
    sizes = torch.tensor([[100, 200], [10, 40]])  # height, width
    first, second = postprocess(dict(pred_logits=logits, pred_boxes=boxes), sizes, top=3)
    torch.testing.assert_close(first["scores"], torch.tensor([3.0, 2.0, 0.0]).sigmoid())
    assert first["labels"].tolist() == [1, 0, 0]
    assert first["queries"].tolist() == [0, 1, 0]
    expected = torch.tensor([[80, 30, 120, 70], [0, 0, 100, 100], [80, 30, 120, 70.0]])
    torch.testing.assert_close(first["boxes"], expected)
    assert second["labels"].tolist() == [1, 0, 1]
    torch.testing.assert_close(second["boxes"][0], torch.tensor([0.0, 0.0, 20.0, 10.0]))


def test_postprocess_gives_all_pairs_where_there_are_few():
    outputs = dict(pred_logits=torch.randn(1, 2, 3), pred_boxes=torch.rand(1, 2, 4))
    (detections,) = postprocess(outputs, torch.tensor([[10, 10]]))
    assert len(detections["scores"]) == 6


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        ((3, 64, 64), None, r"images must have shape (B, 3, H, W), got (3, 64, 64)"),
        ((1, 1, 64, 64), None, r"images must have shape (B, 3, H, W), got (1, 1, 64, 64)"),
        (
            (1, 3, 64, 64),
            torch.zeros(1, 64, 60, dtype=torch.bool),
            "padding_mask must be bool of shape (B, H, W) = (1, 64, 64), got torch.bool of shape "
            "(1, 64, 60)",
        ),
        (
            (1, 3, 64, 64),
            torch.zeros(1, 64, 64),
            "padding_mask must be bool of shape (B, H, W) = (1, 64, 64), got torch.float32",
        ),
    ],
)
def test_wrong_input_is_refused(images, mask, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        build_model(small_config())(torch.zeros(images), mask)


# ---- full size -----------------------------------------------------------------------------------

FULL_SIZE = """
import resource, sys, time, torch
from tests.detector.test_model import ReferenceAttention
from detector.config import ModelConfig
from detector.model import DeformableDETR
from msda import MSDeformAttn

torch.manual_seed(0)
attention = dict(msda=MSDeformAttn, reference=ReferenceAttention)[sys.argv[1]]
model = DeformableDETR(ModelConfig(), attention=attention)
images = torch.randn(1, 3, 800, 1333)
start = time.process_time()
outputs = model(images)
middle = time.process_time()
(outputs["pred_logits"].square().mean() + outputs["pred_boxes"].square().mean()).backward()
end = time.process_time()
norm = sum(p.grad.square().sum() for p in model.parameters() if p.grad is not None).sqrt()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(middle - start, end - middle, peak, float(norm), float(outputs["pred_boxes"].sum()))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("MSDA_SLOW") != "1", reason="takes minutes; set MSDA_SLOW=1")
def test_full_size_runs_forward_and_backward(capsys):
    root = Path(__file__).resolve().parents[2]
    folders = [root, root / "examples" / "deformable_detr"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    results = {}
    for attention in ("msda", "reference"):  # each in its own process, for its own peak
        run = subprocess.run(
            [sys.executable, "-c", FULL_SIZE, attention],
            env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        results[attention] = [float(number) for number in run.stdout.split()]
    with capsys.disabled():
        print("\nResNet-50, 4 levels, one image of 800 x 1333, float32, CPU")
        for attention, (forward, backward, peak, *_) in results.items():
            seconds = f"{forward:.1f} CPU seconds forward, {backward:.1f} backward"
            print(f"{attention:10} {seconds}, peak {peak:.1f} GiB")
    for number, other in zip(results["msda"][3:], results["reference"][3:], strict=True):
        assert math.isfinite(number)
        assert number == pytest.approx(other, rel=1e-3)
