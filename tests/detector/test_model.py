"""The detector's model: against the reference operator, with padding, at any size, in 16 bits."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import msda.modules
from detector.backbone import BatchNorm2d
from detector.model import DeformableDETR, build_model, postprocess
from detector.transformer import flatten_levels
from msda.testing import relative_error
from tests.detector.small_models import (
    DEFORMABLE,
    ReferenceAttention,
    every_deformable,
    every_variant,
    flat,
    loss,
    padded_batch,
    randomise,
    tiny_config,
)
from tests.helpers.results import assert_same_bits

# ---- what it computes ----------------------------------------------------------------------------


@every_deformable
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_outputs_and_gradients_are_those_of_the_reference_operator(variant, padded):
    images, padding_mask = padded_batch()
    model = randomise(build_model(tiny_config(variant))).double()
    reference = DeformableDETR(tiny_config(variant), attention=ReferenceAttention).double()
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
    config = tiny_config(variant)
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
    assert "aux_outputs" not in build_model(tiny_config(aux_loss=False))(images)


@every_variant
def test_gradient_checkpointing_changes_no_bit(variant):
    images, padding_mask = padded_batch(torch.float32)
    models = [
        build_model(tiny_config(variant, dropout=0.2), gradient_checkpointing=recompute)
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
    model = randomise(build_model(tiny_config(variant))).double().eval()
    with torch.no_grad():
        expected = flat(model(images))
        outputs = flat(model(images, torch.zeros(2, 96, 128, dtype=torch.bool)))
    for name, tensor in outputs.items():
        # 1e-6 is part of the embedding of places; a count of rows is as exact as a number.
        assert relative_error(tensor, expected[name]) < 1e-11, name


@every_variant
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_padding_of_the_maps_does_not_matter(variant, position_embedding):
    config = tiny_config(variant, position_embedding=position_embedding)
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


# ---- small, thin, alone --------------------------------------------------------------------------


@pytest.mark.parametrize("hidden_dim", [32, 64], ids=["one channel a group", "two"])
@pytest.mark.parametrize("size", [(1, 1), (32, 32), (1, 3000), (3000, 1)], ids=str)
@pytest.mark.parametrize("variant", ["two_stage", "multi_scale", "dense_refine"])
def test_one_small_or_thin_image_trains_and_is_predicted(variant, size, hidden_dim):
    model = build_model(tiny_config(variant, hidden_dim=hidden_dim))
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


# ---- precision, compilation, export --------------------------------------------------------------


@every_variant
def test_autocast_gives_the_operator_16_bits_and_keeps_boxes_in_float32(variant, monkeypatch):
    dtypes = []
    fused = msda.modules.ms_deform_attn_fused

    def record(value, shapes, start, reference, offsets, logits, **options):
        dtypes.append((value.dtype, reference.dtype))
        return fused(value, shapes, start, reference, offsets, logits, **options)

    monkeypatch.setattr(msda.modules, "ms_deform_attn_fused", record)
    model = randomise(build_model(tiny_config(variant)))
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
    model = randomise(build_model(tiny_config()))
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
    model = build_model(tiny_config("two_stage")).bfloat16()
    images, padding_mask = padded_batch(torch.bfloat16)
    outputs = flat(model(images, padding_mask))
    assert {tensor.dtype for tensor in outputs.values()} == {torch.float32}


@pytest.mark.parametrize("variant", ["multi_scale", "two_stage", "dense"])
def test_model_compiles_to_one_graph(variant):
    torch.compiler.reset()  # a second model of the same class would be compiled for any size
    model = randomise(build_model(tiny_config(variant)))
    batch = padded_batch(torch.float32)
    expected = flat(model(*batch))
    outputs = flat(torch.compile(model, fullgraph=True, backend="eager")(*batch))
    for name, tensor in outputs.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_model_exports(padded):
    model = randomise(build_model(tiny_config("two_stage"))).eval()
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
        build_model(tiny_config())(torch.zeros(images), mask)


# ---- full size -----------------------------------------------------------------------------------


FULL_SIZE = """
import resource, sys, time, torch
from tests.detector.small_models import ReferenceAttention
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
