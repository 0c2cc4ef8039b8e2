"""Checkpoints of the detector as transformers has them, read and written."""

import pytest
import torch

from detector.checkpoint_formats import (
    Checkpoint,
    from_transformers,
    load_into,
    save_original,
    save_transformers,
    to_transformers,
)
from detector.config import Config, ModelConfig
from detector.model import DeformableDETR, build_model
from tests.detector.small_models import (
    DEFORMABLE,
    assert_same_tensors,
    checkpoint_of,
    every_deformable,
    load_weights,
    padded_batch,
    randomise,
    resnet_config,
)


def assert_same_detections(ours, theirs):
    """In float64, on a padded batch."""
    images, padding_mask = padded_batch()
    ours, theirs = ours.double().eval(), theirs.double().eval()
    with torch.no_grad():
        actual = ours(images, padding_mask)
        expected = theirs(images, pixel_mask=(~padding_mask).long())
    # What is compared depends on image and query.
    assert expected.logits.std() > 0.05
    assert expected.pred_boxes[..., 2:].std() > 0.01
    assert (expected.logits[0] - expected.logits[1]).abs().mean() > 1e-3
    pairs = {
        "pred_logits": (actual["pred_logits"], expected.logits),
        "pred_boxes": (actual["pred_boxes"], expected.pred_boxes),
    }
    tolerance = 1e-11
    if ours.config.two_stage:
        tolerance = 1e-6  # transformers embeds the places of proposals in float32
        proposed = actual["enc_outputs"]
        boxes = expected.enc_outputs_coord_logits.sigmoid()
        pairs["proposed logits"] = (proposed["pred_logits"], expected.enc_outputs_class)
        pairs["proposed boxes"] = (proposed["pred_boxes"], boxes)
    for name, (tensor, other) in pairs.items():
        torch.testing.assert_close(
            tensor, other, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: name + text
        )


@every_deformable
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_transformers_model_gives_the_same_detections(
    shallow_resnet, tmp_path, variant, position_embedding
):
    transformers = pytest.importorskip("transformers")
    config = resnet_config(variant, position_embedding=position_embedding)
    ours = randomise(build_model(config), scale=0.2)
    names = list("abcdefg")
    save_transformers(tmp_path, checkpoint_of(ours, names))
    theirs, report = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(names))
    assert_same_detections(ours, theirs)


@every_deformable
def test_names_at_full_depth_are_those_of_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    config = resnet_config(variant)
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict()
    save_transformers(tmp_path, Checkpoint({}, Config(model=config), None, []))
    read = transformers.DeformableDetrConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.DeformableDetrForObjectDetection(read).state_dict()
    shapes = {key: tensor.shape for key, tensor in to_transformers(state).items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}


@every_deformable
def test_what_transformers_saves_loads_here(shallow_resnet, tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    config = resnet_config(variant, dropout=0.2)
    save_transformers(tmp_path / "ours", checkpoint_of(build_model(config), list("abcdefg")))
    theirs = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig.from_pretrained(tmp_path / "ours")
    )
    theirs.save_pretrained(tmp_path / "theirs")
    state, read, categories = load_weights(tmp_path / "theirs")
    assert read == config
    assert categories == list("abcdefg")
    ours = build_model(read)
    load_into(ours, state)
    randomise(theirs, scale=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    load_into(ours, load_weights(tmp_path / "theirs")[0])
    assert_same_detections(ours, theirs)


@every_deformable
@pytest.mark.parametrize("timm", [False, True], ids=["resnet", "timm"])
def test_names_of_transformers_and_back_are_the_originals(variant, timm):
    with torch.device("meta"):
        state = DeformableDETR(ModelConfig(**DEFORMABLE[variant])).state_dict()
    theirs = to_transformers(state, timm)
    assert all(key.startswith(("model.", "class_embed.", "bbox_embed.")) for key in theirs)
    assert len(theirs) == len(state) + 6 * 4  # three projections for one, weight and bias
    back = from_transformers(theirs)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in state.items()}


# One key of each kind of a file on transformers' hub, and where it goes.
HUB_KEYS = {
    "model.backbone.conv_encoder.model.conv1.weight": "backbone.0.body.conv1.weight",
    "model.backbone.conv_encoder.model.layer2.3.bn2.bias": "backbone.0.body.layer2.3.bn2.bias",
    "model.backbone.model.layer1.0.downsample.1.running_var": (
        "backbone.0.body.layer1.0.downsample.1.running_var"
    ),
    "model.input_proj.3.0.weight": "input_proj.3.0.weight",
    "model.query_position_embeddings.weight": "query_embed.weight",
    "model.level_embed": "transformer.level_embed",
    "model.reference_points.weight": "transformer.reference_points.weight",
    "model.encoder.layers.5.self_attn.output_proj.bias": (
        "transformer.encoder.layers.5.self_attn.output_proj.bias"
    ),
    "model.encoder.layers.5.self_attn_layer_norm.bias": "transformer.encoder.layers.5.norm1.bias",
    "model.encoder.layers.5.final_layer_norm.bias": "transformer.encoder.layers.5.norm2.bias",
    "model.encoder.layers.5.fc1.bias": "transformer.encoder.layers.5.linear1.bias",
    "model.encoder.layers.5.mlp.fc2.bias": "transformer.encoder.layers.5.linear2.bias",
    "model.decoder.layers.1.self_attn.out_proj.bias": (
        "transformer.decoder.layers.1.self_attn.out_proj.bias"
    ),
    "model.decoder.layers.1.self_attn.o_proj.weight": (
        "transformer.decoder.layers.1.self_attn.out_proj.weight"
    ),
    "model.decoder.layers.1.self_attn_layer_norm.bias": "transformer.decoder.layers.1.norm2.bias",
    "model.decoder.layers.1.encoder_attn_layer_norm.bias": (
        "transformer.decoder.layers.1.norm1.bias"
    ),
    "model.decoder.layers.1.final_layer_norm.bias": "transformer.decoder.layers.1.norm3.bias",
    "model.decoder.layers.1.encoder_attn.sampling_offsets.bias": (
        "transformer.decoder.layers.1.cross_attn.sampling_offsets.bias"
    ),
    "model.decoder.layers.1.fc2.weight": "transformer.decoder.layers.1.linear2.weight",
    "model.decoder.bbox_embed.6.layers.0.weight": (
        "transformer.decoder.bbox_embed.6.layers.0.weight"
    ),
    "model.enc_output_norm.weight": "transformer.enc_output_norm.weight",
    "class_embed.0.bias": "class_embed.0.bias",
}


@pytest.mark.parametrize("key", HUB_KEYS)
def test_names_of_new_and_old_hub_files_are_understood(key):
    assert HUB_KEYS[key] in from_transformers({key: torch.zeros(4)})


def test_timm_folder_says_what_transformers_shall_build(tmp_path):
    config = resnet_config("single_scale", dilation=True)
    checkpoint = checkpoint_of(build_model(config))
    with pytest.raises(ValueError, match=r"^timm must be set \(--timm\)"):
        save_transformers(tmp_path, checkpoint)
    save_transformers(tmp_path, checkpoint, timm=True)
    read_state, read, categories = load_weights(tmp_path)
    assert read == config
    assert categories is None
    assert_same_tensors(read_state, checkpoint.state)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.DeformableDetrConfig.from_pretrained(tmp_path)
    assert theirs.backbone_config.model_type == "timm_backbone"
    assert theirs.backbone_config.out_indices == [4]


@pytest.mark.parametrize("changes", [dict(attention="dense"), dict(backbone="tiny")], ids=str)
@pytest.mark.parametrize("save", [save_original, save_transformers])
def test_models_that_others_do_not_have_are_not_converted(tmp_path, save, changes):
    with pytest.raises(ValueError, match="must have attention 'deformable' and a backbone of"):
        save(tmp_path / "target", Checkpoint({}, Config(model=ModelConfig(**changes)), None, []))
    assert not (tmp_path / "target").exists()
