"""Checkpoints of the detector: the original's keys, other libraries' files, other classes."""

import argparse
import dataclasses
import itertools
import os
import re
from collections import defaultdict

import convert
import pytest
import torch

from detector.backbone import RESNET_BLOCKS
from detector.checkpoints import (
    Checkpoint,
    config_from_state,
    from_transformers,
    load_into,
    read_checkpoint,
    save_original,
    save_ours,
    save_transformers,
    to_transformers,
)
from detector.config import Config, ModelConfig
from detector.model import DeformableDETR, build_model
from tests.detector.small_models import VARIANTS, original_file, randomise, small_config

every_variant = pytest.mark.parametrize("variant", VARIANTS)

# The original's state dicts: the variants by their first letter, keys, shape. {a,b} stands for
# either, {0-5} for a digit.
OFFICIAL = """
smit backbone.0.body.conv1.weight                                      64 3 7 7
smit backbone.0.body.bn1.{weight,bias,running_mean,running_var}        64
smit backbone.0.body.layer1.0.conv1.weight                             64 64 1 1
smit backbone.0.body.layer1.{1-2}.conv1.weight                         64 256 1 1
smit backbone.0.body.layer1.{0-2}.conv2.weight                         64 64 3 3
smit backbone.0.body.layer1.{0-2}.conv3.weight                         256 64 1 1
smit backbone.0.body.layer1.{0-2}.bn{1,2}.{weight,bias,running_mean,running_var}  64
smit backbone.0.body.layer1.{0-2}.bn3.{weight,bias,running_mean,running_var}      256
smit backbone.0.body.layer1.0.downsample.0.weight                      256 64 1 1
smit backbone.0.body.layer1.0.downsample.1.{weight,bias,running_mean,running_var} 256
smit backbone.0.body.layer2.0.conv1.weight                             128 256 1 1
smit backbone.0.body.layer2.{1-3}.conv1.weight                         128 512 1 1
smit backbone.0.body.layer2.{0-3}.conv2.weight                         128 128 3 3
smit backbone.0.body.layer2.{0-3}.conv3.weight                         512 128 1 1
smit backbone.0.body.layer2.{0-3}.bn{1,2}.{weight,bias,running_mean,running_var}  128
smit backbone.0.body.layer2.{0-3}.bn3.{weight,bias,running_mean,running_var}      512
smit backbone.0.body.layer2.0.downsample.0.weight                      512 256 1 1
smit backbone.0.body.layer2.0.downsample.1.{weight,bias,running_mean,running_var} 512
smit backbone.0.body.layer3.0.conv1.weight                             256 512 1 1
smit backbone.0.body.layer3.{1-5}.conv1.weight                         256 1024 1 1
smit backbone.0.body.layer3.{0-5}.conv2.weight                         256 256 3 3
smit backbone.0.body.layer3.{0-5}.conv3.weight                         1024 256 1 1
smit backbone.0.body.layer3.{0-5}.bn{1,2}.{weight,bias,running_mean,running_var}  256
smit backbone.0.body.layer3.{0-5}.bn3.{weight,bias,running_mean,running_var}      1024
smit backbone.0.body.layer3.0.downsample.0.weight                      1024 512 1 1
smit backbone.0.body.layer3.0.downsample.1.{weight,bias,running_mean,running_var} 1024
smit backbone.0.body.layer4.0.conv1.weight                             512 1024 1 1
smit backbone.0.body.layer4.{1-2}.conv1.weight                         512 2048 1 1
smit backbone.0.body.layer4.{0-2}.conv2.weight                         512 512 3 3
smit backbone.0.body.layer4.{0-2}.conv3.weight                         2048 512 1 1
smit backbone.0.body.layer4.{0-2}.bn{1,2}.{weight,bias,running_mean,running_var}  512
smit backbone.0.body.layer4.{0-2}.bn3.{weight,bias,running_mean,running_var}      2048
smit backbone.0.body.layer4.0.downsample.0.weight                      2048 1024 1 1
smit backbone.0.body.layer4.0.downsample.1.{weight,bias,running_mean,running_var} 2048
s--- input_proj.0.0.weight                                             256 2048 1 1
-mit input_proj.0.0.weight                                             256 512 1 1
-mit input_proj.1.0.weight                                             256 1024 1 1
-mit input_proj.2.0.weight                                             256 2048 1 1
-mit input_proj.3.0.weight                                             256 2048 3 3
smit input_proj.0.0.bias                                               256
smit input_proj.0.1.{weight,bias}                                      256
-mit input_proj.{1-3}.0.bias                                           256
-mit input_proj.{1-3}.1.{weight,bias}                                  256
s--- transformer.level_embed                                           1 256
-mit transformer.level_embed                                           4 256
s--- transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.weight   64 256
s--- transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.bias     64
s--- transformer.encoder.layers.{0-5}.self_attn.attention_weights.weight  32 256
s--- transformer.encoder.layers.{0-5}.self_attn.attention_weights.bias    32
s--- transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.weight  64 256
s--- transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.bias    64
s--- transformer.decoder.layers.{0-5}.cross_attn.attention_weights.weight 32 256
s--- transformer.decoder.layers.{0-5}.cross_attn.attention_weights.bias   32
-mit transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.weight   256 256
-mit transformer.encoder.layers.{0-5}.self_attn.sampling_offsets.bias     256
-mit transformer.encoder.layers.{0-5}.self_attn.attention_weights.weight  128 256
-mit transformer.encoder.layers.{0-5}.self_attn.attention_weights.bias    128
-mit transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.weight  256 256
-mit transformer.decoder.layers.{0-5}.cross_attn.sampling_offsets.bias    256
-mit transformer.decoder.layers.{0-5}.cross_attn.attention_weights.weight 128 256
-mit transformer.decoder.layers.{0-5}.cross_attn.attention_weights.bias   128
smit transformer.encoder.layers.{0-5}.self_attn.{value_proj,output_proj}.weight   256 256
smit transformer.encoder.layers.{0-5}.self_attn.{value_proj,output_proj}.bias     256
smit transformer.encoder.layers.{0-5}.linear1.weight                   1024 256
smit transformer.encoder.layers.{0-5}.linear1.bias                     1024
smit transformer.encoder.layers.{0-5}.linear2.weight                   256 1024
smit transformer.encoder.layers.{0-5}.linear2.bias                     256
smit transformer.encoder.layers.{0-5}.norm{1,2}.{weight,bias}          256
smit transformer.decoder.layers.{0-5}.cross_attn.{value_proj,output_proj}.weight  256 256
smit transformer.decoder.layers.{0-5}.cross_attn.{value_proj,output_proj}.bias    256
smit transformer.decoder.layers.{0-5}.self_attn.in_proj_weight         768 256
smit transformer.decoder.layers.{0-5}.self_attn.in_proj_bias           768
smit transformer.decoder.layers.{0-5}.self_attn.out_proj.weight        256 256
smit transformer.decoder.layers.{0-5}.self_attn.out_proj.bias          256
smit transformer.decoder.layers.{0-5}.linear1.weight                   1024 256
smit transformer.decoder.layers.{0-5}.linear1.bias                     1024
smit transformer.decoder.layers.{0-5}.linear2.weight                   256 1024
smit transformer.decoder.layers.{0-5}.linear2.bias                     256
smit transformer.decoder.layers.{0-5}.norm{1,2,3}.{weight,bias}        256
smi- transformer.reference_points.weight                               2 256
smi- transformer.reference_points.bias                                 2
smi- query_embed.weight                                                300 512
---t transformer.enc_output.weight                                     256 256
---t transformer.enc_output.bias                                       256
---t transformer.enc_output_norm.{weight,bias}                         256
---t transformer.pos_trans.weight                                      512 512
---t transformer.pos_trans.bias                                        512
---t transformer.pos_trans_norm.{weight,bias}                          512
smit class_embed.{0-5}.weight                                          91 256
smit class_embed.{0-5}.bias                                            91
---t class_embed.6.weight                                              91 256
---t class_embed.6.bias                                                91
smit bbox_embed.{0-5}.layers.{0,1}.weight                              256 256
smit bbox_embed.{0-5}.layers.{0,1}.bias                                256
smit bbox_embed.{0-5}.layers.2.weight                                  4 256
smit bbox_embed.{0-5}.layers.2.bias                                    4
---t bbox_embed.6.layers.{0,1}.weight                                  256 256
---t bbox_embed.6.layers.{0,1}.bias                                    256
---t bbox_embed.6.layers.2.weight                                      4 256
---t bbox_embed.6.layers.2.bias                                        4
--it transformer.decoder.bbox_embed.{0-5}.layers.{0,1}.weight          256 256
--it transformer.decoder.bbox_embed.{0-5}.layers.{0,1}.bias            256
--it transformer.decoder.bbox_embed.{0-5}.layers.2.weight              4 256
--it transformer.decoder.bbox_embed.{0-5}.layers.2.bias                4
---t transformer.decoder.bbox_embed.6.layers.{0,1}.weight              256 256
---t transformer.decoder.bbox_embed.6.layers.{0,1}.bias                256
---t transformer.decoder.bbox_embed.6.layers.2.weight                  4 256
---t transformer.decoder.bbox_embed.6.layers.2.bias                    4
---t transformer.decoder.class_embed.{0-6}.weight                      91 256
---t transformer.decoder.class_embed.{0-6}.bias                        91
"""
NUM_ENTRIES = {"single_scale": 549, "multi_scale": 561, "iter_refine": 597, "two_stage": 630}
NUM_ALIASES = {"single_scale": 40, "multi_scale": 40, "iter_refine": 36, "two_stage": 56}
NUM_TRAINABLE = {
    "single_scale": 33_844_193,
    "multi_scale": 39_847_265,
    "iter_refine": 40_627_260,
    "two_stage": 40_959_129,
}


def load_weights(path):
    """State dict, model and names of classes of a checkpoint."""
    checkpoint = read_checkpoint(path)
    return checkpoint.state, checkpoint.config.model, checkpoint.categories


def official_shapes(variant):
    """Key -> shape in the original's state dict."""
    shapes = {}
    for line in OFFICIAL.strip().splitlines():
        variants, keys, *shape = line.split()
        if variant[0] not in variants:
            continue
        keys = re.sub(
            r"\{(\d)-(\d)\}",
            lambda match: "{" + ",".join(map(str, range(int(match[1]), int(match[2]) + 1))) + "}",
            keys,
        )
        parts = [part.split(",") for part in re.split(r"[{}]", keys)]
        for key in map("".join, itertools.product(*parts)):
            shapes[key] = tuple(map(int, shape))
    return shapes


def checkpoint_of(model, categories=None):
    ids = list(range(10, 10 + model.config.num_classes))
    return Checkpoint(model.state_dict(), Config(model=model.config), categories, ids)


@pytest.fixture
def small_model(shallow_resnet):
    return randomise(build_model(small_config("two_stage")))


def padded_batch(dtype=torch.float64):
    """Two images of 96 x 128 pixels, the second one padded."""
    images = torch.randn(2, 3, 96, 128, dtype=dtype)
    padding_mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    padding_mask[1, 70:] = True
    padding_mask[1, :, 90:] = True
    images[1].masked_fill_(padding_mask[1], 0)
    return images, padding_mask


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key


# ---- the original's keys -------------------------------------------------------------------------


@every_variant
def test_state_dict_is_the_originals_key_for_key(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**VARIANTS[variant]))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = official_shapes(variant)
    assert len(expected) == NUM_ENTRIES[variant]
    assert shapes == expected


@every_variant
def test_keys_that_are_one_tensor_in_the_original_are_one_here(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**VARIANTS[variant]))
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    shared = [group for group in names.values() if len(group) > 1]
    assert sum(len(group) - 1 for group in shared) == NUM_ALIASES[variant]
    for first, *others in shared:
        if variant in ("single_scale", "multi_scale"):
            expected = {re.sub(r"_embed\.\d", f"_embed.{n}", first) for n in range(6)}
        else:
            bare = first.removeprefix("transformer.decoder.")
            expected = {bare, f"transformer.decoder.{bare}"}
        assert {first, *others} == expected


@every_variant
def test_trainable_parameters_are_as_many_as_the_originals(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**VARIANTS[variant]))
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == NUM_TRAINABLE[variant]
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    stem = ("backbone.0.body.conv1.", "backbone.0.body.layer1.")
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith(stem)}
    assert len(frozen) == 11


# ---- the original's files ------------------------------------------------------------------------


def test_originals_file_loads_with_its_command_line(tmp_path, small_model):
    path = original_file(tmp_path / "checkpoint.pth", small_model)
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)
    state, config, categories = load_weights(path)
    assert_same_state(state, small_model.state_dict())
    assert config == dataclasses.replace(small_model.config, dropout=0.25)
    assert categories is None
    checkpoint = read_checkpoint(path)
    assert checkpoint.category_ids == list(range(7))
    assert checkpoint.config.data.label_ids == "category"
    model = build_model(config)
    load_into(model, state)
    assert_same_state(model.state_dict(), small_model.state_dict())


def test_loading_leaves_namespace_forbidden_elsewhere(tmp_path, small_model):
    path = original_file(tmp_path / "checkpoint.pth", small_model)
    load_weights(path)
    with pytest.raises(Exception, match=r"argparse\.Namespace"):
        torch.load(path, weights_only=True)


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["MSDA_TEST_FOLDER"],)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, small_model):
    monkeypatch.setenv("MSDA_TEST_FOLDER", str(tmp_path / "made"))
    path = original_file(tmp_path / "checkpoint.pth", small_model, epoch=Malicious())
    with pytest.raises(ValueError, match=r"checkpoint\.pth: must be a checkpoint"):
        load_weights(path)
    assert not (tmp_path / "made").exists()


def test_entries_that_tools_left_behind_are_dropped(tmp_path, small_model):
    state = small_model.state_dict()
    leftovers = {
        "total_params": torch.zeros(1),
        "transformer.encoder.total_ops": torch.zeros(1),
        "backbone.0.body.bn1.num_batches_tracked": torch.tensor(5),
    }
    path = original_file(tmp_path / "checkpoint.pth", small_model, model=state | leftovers)
    assert load_weights(path)[0].keys() == state.keys()


@every_variant
@pytest.mark.parametrize("backbone", RESNET_BLOCKS)
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_weights_alone_tell_the_model(variant, backbone, position_embedding):
    config = ModelConfig(
        **VARIANTS[variant], backbone=backbone, position_embedding=position_embedding
    )
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict()
    assert config_from_state(state) == config


def test_what_shapes_do_not_tell_can_be_given():
    config = small_config("two_stage", dropout=0.0, dilation=True, aux_loss=False, num_queries=9)
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict()
    settings = dict(num_heads=4, dropout=0.0, dilation=True, aux_loss=False, num_queries=9)
    assert config_from_state(state, **settings) == config
    with pytest.raises(ValueError, match="must have a multiple of 20 entries"):
        config_from_state(state, num_heads=5)


def test_original_file_we_write_is_read_as_the_same_model(tmp_path, small_model):
    path = tmp_path / "original.pth"
    save_original(path, checkpoint_of(small_model))
    state, config, _ = load_weights(path)
    assert_same_state(state, small_model.state_dict())
    assert config == small_model.config
    with torch.serialization.safe_globals([argparse.Namespace]):
        arguments = torch.load(path, weights_only=True)["args"]
    assert (arguments.with_box_refine, arguments.nheads, arguments.enc_n_points) == (True, 4, 2)


# ---- our files -----------------------------------------------------------------------------------


def test_our_file_gives_weights_model_and_categories(tmp_path, small_model):
    path = tmp_path / "weights.pt"
    names = list("abcdefg")
    written = checkpoint_of(small_model, names)
    written.config = written.config.replace(label_ids="category", epochs=7)
    save_ours(path, written)
    state, config, categories = load_weights(path)
    assert_same_state(state, small_model.state_dict())
    assert config == small_model.config
    assert categories == names
    read = read_checkpoint(path)
    assert read.config == written.config
    assert read.category_ids == written.category_ids


def test_moving_average_is_what_is_loaded_where_there_is_one(tmp_path):
    config = Config(model=ModelConfig(backbone="tiny", attention="dense"))
    content = {"format": 1, "config": config.to_dict(), "model": {"a": torch.zeros(1)}}
    content |= {"categories": None, "category_ids": []}
    torch.save(content | {"ema": {"a": torch.ones(1)}}, tmp_path / "ema.pt")
    torch.save(content | {"ema": None}, tmp_path / "plain.pt")
    assert load_weights(tmp_path / "ema.pt")[0]["a"] == 1
    assert load_weights(tmp_path / "plain.pt")[0]["a"] == 0
    assert load_weights(tmp_path / "plain.pt")[1] == config.model


OURS = {"format": 1, "model": {}, "categories": None, "category_ids": []}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a checkpoint", "must be a checkpoint, got a text that begins with 'not a"),
        ([1, 2], "must hold a dict, got list"),
        ({"epoch": 3}, "a state dict of Deformable DETR must have the key transformer.level_embed"),
        ({"format": 99}, "format must be 1, got 99"),
        ({"format": 1, "model": {}}, "a checkpoint must hold config, got format, model"),
        (dict(OURS, config={"model": {"size": 1}}), "got model.size"),
        (dict(OURS, config={"model": {"num_heads": "8"}}), "num_heads must be of type int"),
    ],
    ids=str,
)
def test_other_files_are_refused_by_name_and_cause(tmp_path, content, message):
    path = tmp_path / "file.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}: .*{re.escape(message)}"):
        load_weights(path)


def test_truncated_file_is_refused_by_name(tmp_path, small_model):
    path = original_file(tmp_path / "checkpoint.pth", small_model)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(
        ValueError, match=r"checkpoint\.pth: must be a checkpoint, but reading it failed"
    ):
        load_weights(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth"):
        load_weights(tmp_path / "nothing.pth")


# ---- other classes -------------------------------------------------------------------------------


@every_variant
def test_other_class_count_is_refused_with_shapes_and_the_flag(shallow_resnet, variant):
    trained = randomise(build_model(small_config(variant)))
    model = build_model(small_config(variant, num_classes=3))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"shape \(3, 32\), got \(7, 32\).*--reset-classes"):
        load_into(model, trained.state_dict())
    assert_same_state(model.state_dict(), before)


@every_variant
def test_other_class_count_gets_new_heads_by_one_flag(shallow_resnet, variant):
    trained = randomise(build_model(small_config(variant))).state_dict()
    model = build_model(small_config(variant, num_classes=3))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    load_into(model, trained, reset_classes=True)
    for key, tensor in model.state_dict().items():
        if "class_embed.3." in key:  # two-stage: scores the proposals by its first row
            assert torch.equal(tensor[0], trained[key][0]), key
            assert torch.equal(tensor[1:], before[key][1:]), key
        else:
            source = before if "class_embed" in key else trained
            assert torch.equal(tensor, source[key]), key


def test_flag_also_resets_heads_of_the_same_size(small_model):
    model = build_model(small_model.config)
    before = model.class_embed[0].weight.clone()
    load_into(model, small_model.state_dict(), reset_classes=True)
    assert torch.equal(model.class_embed[0].weight, before)


def test_other_misfits_are_named_and_change_nothing(shallow_resnet, small_model):
    model = build_model(small_config("two_stage", num_classes=3, feedforward_dim=40))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = small_model.state_dict()
    state["surplus"] = state.pop("transformer.level_embed")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_into(model, state)
    assert "transformer.level_embed is missing" in str(error.value)
    assert "surplus is unexpected" in str(error.value)
    with pytest.raises(ValueError, match=r"linear1\.weight must have shape \(40, 32\), got \(48,"):
        load_into(model, small_model.state_dict(), reset_classes=True)
    assert_same_state(model.state_dict(), before)


# ---- transformers --------------------------------------------------------------------------------


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


@every_variant
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_transformers_model_gives_the_same_detections(
    shallow_resnet, tmp_path, variant, position_embedding
):
    transformers = pytest.importorskip("transformers")
    config = small_config(variant, position_embedding=position_embedding)
    ours = randomise(build_model(config))
    names = list("abcdefg")
    save_transformers(tmp_path, checkpoint_of(ours, names))
    theirs, report = transformers.DeformableDetrForObjectDetection.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert theirs.config.id2label == dict(enumerate(names))
    assert_same_detections(ours, theirs)


@every_variant
def test_names_at_full_depth_are_those_of_transformers(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    config = small_config(variant)
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict()
    save_transformers(tmp_path, Checkpoint({}, Config(model=config), None, []))
    read = transformers.DeformableDetrConfig.from_pretrained(tmp_path)
    with torch.device("meta"):
        theirs = transformers.DeformableDetrForObjectDetection(read).state_dict()
    shapes = {key: tensor.shape for key, tensor in to_transformers(state).items()}
    assert shapes == {key: tensor.shape for key, tensor in theirs.items()}


@every_variant
def test_what_transformers_saves_loads_here(shallow_resnet, tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    config = small_config(variant, dropout=0.2)
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
    randomise(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    load_into(ours, load_weights(tmp_path / "theirs")[0])
    assert_same_detections(ours, theirs)


@every_variant
@pytest.mark.parametrize("timm", [False, True], ids=["resnet", "timm"])
def test_names_of_transformers_and_back_are_the_originals(variant, timm):
    with torch.device("meta"):
        state = DeformableDETR(ModelConfig(**VARIANTS[variant])).state_dict()
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
    config = small_config("single_scale", dilation=True)
    checkpoint = checkpoint_of(build_model(config))
    with pytest.raises(ValueError, match=r"^timm must be set \(--timm\)"):
        save_transformers(tmp_path, checkpoint)
    save_transformers(tmp_path, checkpoint, timm=True)
    read_state, read, categories = load_weights(tmp_path)
    assert read == config
    assert categories is None
    assert_same_state(read_state, checkpoint.state)
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


# ---- command line --------------------------------------------------------------------------------


def test_command_line_converts_there_and_back(tmp_path, small_model, capsys):
    pytest.importorskip("safetensors")
    steps = [original_file(tmp_path / "original.pth", small_model)]
    for target, kind in (("folder", "transformers"), ("ours.pt", "ours"), ("b.pth", "original")):
        steps.append(tmp_path / target)
        convert.main([str(steps[-2]), str(steps[-1]), "--to", kind])
        assert str(steps[-1]) in capsys.readouterr().out
    state, config, _ = load_weights(steps[-1])
    assert_same_state(state, small_model.state_dict())
    assert config == load_weights(steps[0])[1]
    # Labels of the original's checkpoints are category ids.
    assert read_checkpoint(steps[2]).category_ids == list(range(7))
    assert read_checkpoint(steps[2]).config.data.label_ids == "category"


def test_command_line_keeps_what_our_files_know(tmp_path, small_model):
    written = checkpoint_of(small_model, list("abcdefg"))
    save_ours(tmp_path / "last.pt", written)
    convert.main([str(tmp_path / "last.pt"), str(tmp_path / "weights.pt"), "--to", "ours"])
    read = read_checkpoint(tmp_path / "weights.pt")
    assert_same_state(read.state, written.state)
    assert dataclasses.replace(read, state=written.state) == written


def test_command_line_says_what_is_wrong_in_a_sentence(tmp_path):
    (tmp_path / "rubbish.pth").write_bytes(b"rubbish")
    with pytest.raises(SystemExit, match=r"^convert\.py: .*rubbish\.pth: must be a checkpoint"):
        convert.main([str(tmp_path / "rubbish.pth"), str(tmp_path / "out.pt"), "--to", "ours"])
    assert not (tmp_path / "out.pt").exists()
