"""The detector's transformer: positions, how it starts, refinement, two stages, the dense arm."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from detector.boxes import inverse_sigmoid
from detector.config import TrainConfig
from detector.losses import SetCriterion
from detector.model import build_model, postprocess
from detector.position_encoding import LearnedEmbedding, SineEmbedding
from msda import MSDeformAttn
from tests.detector.small_models import (
    every_deformable,
    every_dense,
    every_variant,
    flat,
    loss,
    padded_batch,
    randomise,
    tiny_config,
)
from tests.helpers.results import assert_same_bits

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
    model = build_model(tiny_config(variant))
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
    config = tiny_config(variant, feedforward_dim=128)
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
    model = build_model(tiny_config())
    boxes = model(padded_batch(torch.float32)[0])["pred_boxes"]
    points = model.transformer.reference_points(model.query_embed.weight[:, :64]).sigmoid()
    torch.testing.assert_close(boxes[0, :, :2], points, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(boxes[..., 2:], torch.tensor(-2.0).sigmoid().expand(2, 9, 2))


# ---- refinement and two-stage --------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["iter_refine", "two_stage", "dense_refine"])
def test_boxes_are_refined_without_gradients_between_layers(variant):
    model = randomise(build_model(tiny_config(variant)))
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
    model = randomise(build_model(tiny_config("iter_refine")))
    references = []
    for layer in model.transformer.decoder.layers:
        layer.cross_attn.register_forward_pre_hook(lambda _, call: references.append(call[1]))
    outputs = model(padded_batch(torch.float32)[0])
    assert [reference.shape for reference in references] == [(2, 9, 1, 2), (2, 9, 1, 4)]
    assert_same_bits(references[1][:, :, 0], outputs["aux_outputs"][0]["pred_boxes"])
    assert not references[1].requires_grad


def test_proposals_start_as_boxes_around_the_tokens():
    model = build_model(tiny_config("two_stage"))
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
    model = randomise(build_model(tiny_config("two_stage")))
    references = []
    first = model.transformer.decoder.layers[0].cross_attn
    first.register_forward_pre_hook(lambda _, call: references.append(call[1]))
    proposed = model(padded_batch(torch.float32)[0])["enc_outputs"]
    best = proposed["pred_logits"][..., 0].topk(9, 1).indices
    expected = proposed["pred_boxes"].take_along_dim(best[..., None], 1)
    torch.testing.assert_close(references[0][:, :, 0], expected)


def test_only_the_encoders_own_outputs_train_its_heads():
    model = randomise(build_model(tiny_config("two_stage")))
    outputs = model(*padded_batch(torch.float32))
    (outputs["pred_boxes"].sum() + outputs["pred_logits"].sum()).backward(retain_graph=True)
    heads = (model.class_embed[-1].weight, model.bbox_embed[-1].layers[0].weight)
    assert all(weight.grad is None for weight in heads)
    loss(outputs["enc_outputs"]).backward()
    assert all(weight.grad.abs().max() > 0 for weight in heads)


def test_padded_tokens_get_no_gradient_from_their_infinite_boxes():
    model = randomise(build_model(tiny_config("two_stage")))
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
    few = randomise(build_model(tiny_config("two_stage", num_queries=22))).eval()
    many = build_model(tiny_config("two_stage", num_queries=400)).eval()
    many.load_state_dict(few.state_dict())
    outputs, expected = flat(many(images)), flat(few(images))
    assert outputs["pred_logits"].shape == (1, 16 + 4 + 1 + 1, 5)
    for name, tensor in outputs.items():
        assert_same_bits(tensor, expected[name])
    assert len(postprocess(many(images), torch.tensor([[32, 32]]))[0]["scores"]) == 100


def test_more_objects_than_queries_are_matched_as_far_as_there_are_queries():
    model = randomise(build_model(tiny_config("two_stage", num_queries=400)))
    boxes = torch.rand(30, 4) * 0.4 + 0.3
    targets = [{"labels": torch.arange(30) % 5, "boxes": boxes}]
    losses = SetCriterion(TrainConfig())(model(torch.randn(1, 3, 32, 32)), targets)
    sum(losses.values()).backward()
    assert all(number.isfinite() for number in losses.values())
    assert model.bbox_embed[0].layers[0].weight.grad.abs().max() > 0


# ---- the dense arm -------------------------------------------------------------------------------


def test_dense_arm_has_the_sizes_of_the_deformable_one():
    dense, deformable = build_model(tiny_config("dense")), build_model(tiny_config())
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
    model = randomise(build_model(tiny_config(variant))).eval()
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
    model = randomise(build_model(tiny_config(variant)))
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
    model = randomise(build_model(tiny_config(variant)))
    loss(model(*padded_batch(torch.float32))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_absolute_boxes_are_detrs():
    model = build_model(tiny_config("dense"))
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
    model, other = build_model(tiny_config("dense_reference")), build_model(tiny_config())
    weights = {k: v for k, v in other.state_dict().items() if "attn" not in k}
    model.load_state_dict(weights, strict=False)
    images = padded_batch(torch.float32)[0]
    # At the start boxes depend on the reference points alone, not on what attention finds.
    torch.testing.assert_close(model(images)["pred_boxes"], other(images)["pred_boxes"])
