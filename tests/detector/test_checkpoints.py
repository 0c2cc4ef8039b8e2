"""Checkpoints of the detector: the original's keys and files, our files, other classes."""

import argparse
import dataclasses
import os
import re
from collections import defaultdict

import convert
import pytest
import torch

from detector.backbone import RESNET_BLOCKS
from detector.checkpoint_formats import (
    config_from_state,
    load_into,
    read_checkpoint,
    save_original,
    save_ours,
)
from detector.config import Config, ModelConfig
from detector.model import DeformableDETR, build_model
from tests.detector.official_layout import NUM_ALIASES, NUM_ENTRIES, NUM_TRAINABLE, official_shapes
from tests.detector.small_models import (
    DEFORMABLE,
    assert_same_tensors,
    checkpoint_of,
    every_deformable,
    load_weights,
    original_file,
    randomise,
    resnet_config,
)


@pytest.fixture
def small_model(shallow_resnet):
    return randomise(build_model(resnet_config("two_stage")), scale=0.2)


# ---- the original's keys -------------------------------------------------------------------------


@every_deformable
def test_state_dict_is_the_originals_key_for_key(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**DEFORMABLE[variant]))
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    expected = official_shapes(variant)
    assert len(expected) == NUM_ENTRIES[variant]
    assert shapes == expected


@every_deformable
def test_keys_that_are_one_tensor_in_the_original_are_one_here(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**DEFORMABLE[variant]))
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


@every_deformable
def test_trainable_parameters_are_as_many_as_the_originals(variant):
    with torch.device("meta"):
        model = DeformableDETR(ModelConfig(**DEFORMABLE[variant]))
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
    assert_same_tensors(state, small_model.state_dict())
    assert config == dataclasses.replace(small_model.config, dropout=0.25)
    assert categories is None
    checkpoint = read_checkpoint(path)
    assert checkpoint.category_ids == list(range(7))
    assert checkpoint.config.data.label_ids == "category"
    model = build_model(config)
    load_into(model, state)
    assert_same_tensors(model.state_dict(), small_model.state_dict())


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


@every_deformable
@pytest.mark.parametrize("backbone", RESNET_BLOCKS)
@pytest.mark.parametrize("position_embedding", ["sine", "learned"])
def test_weights_alone_tell_the_model(variant, backbone, position_embedding):
    config = ModelConfig(
        **DEFORMABLE[variant], backbone=backbone, position_embedding=position_embedding
    )
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict()
    assert config_from_state(state) == config


def test_what_shapes_do_not_tell_can_be_given():
    config = resnet_config("two_stage", dropout=0.0, dilation=True, aux_loss=False, num_queries=9)
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
    assert_same_tensors(state, small_model.state_dict())
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
    assert_same_tensors(state, small_model.state_dict())
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


@every_deformable
def test_other_class_count_is_refused_with_shapes_and_the_flag(shallow_resnet, variant):
    trained = randomise(build_model(resnet_config(variant)), scale=0.2)
    model = build_model(resnet_config(variant, num_classes=3))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"shape \(3, 32\), got \(7, 32\).*--reset-classes"):
        load_into(model, trained.state_dict())
    assert_same_tensors(model.state_dict(), before)


@every_deformable
def test_other_class_count_gets_new_heads_by_one_flag(shallow_resnet, variant):
    trained = randomise(build_model(resnet_config(variant)), scale=0.2).state_dict()
    model = build_model(resnet_config(variant, num_classes=3))
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
    model = build_model(resnet_config("two_stage", num_classes=3, feedforward_dim=40))
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = small_model.state_dict()
    state["surplus"] = state.pop("transformer.level_embed")
    with pytest.raises(ValueError, match="does not fit the model") as error:
        load_into(model, state)
    assert "transformer.level_embed is missing" in str(error.value)
    assert "surplus is unexpected" in str(error.value)
    with pytest.raises(ValueError, match=r"linear1\.weight must have shape \(40, 32\), got \(48,"):
        load_into(model, small_model.state_dict(), reset_classes=True)
    assert_same_tensors(model.state_dict(), before)


# ---- command line --------------------------------------------------------------------------------


def test_command_line_converts_there_and_back(tmp_path, small_model, capsys):
    pytest.importorskip("safetensors")
    steps = [original_file(tmp_path / "original.pth", small_model)]
    for target, kind in (("folder", "transformers"), ("ours.pt", "ours"), ("b.pth", "original")):
        steps.append(tmp_path / target)
        convert.main([str(steps[-2]), str(steps[-1]), "--to", kind])
        assert str(steps[-1]) in capsys.readouterr().out
    state, config, _ = load_weights(steps[-1])
    assert_same_tensors(state, small_model.state_dict())
    assert config == load_weights(steps[0])[1]
    # Labels of the original's checkpoints are category ids.
    assert read_checkpoint(steps[2]).category_ids == list(range(7))
    assert read_checkpoint(steps[2]).config.data.label_ids == "category"


def test_command_line_keeps_what_our_files_know(tmp_path, small_model):
    written = checkpoint_of(small_model, list("abcdefg"))
    save_ours(tmp_path / "last.pt", written)
    convert.main([str(tmp_path / "last.pt"), str(tmp_path / "weights.pt"), "--to", "ours"])
    read = read_checkpoint(tmp_path / "weights.pt")
    assert_same_tensors(read.state, written.state)
    assert dataclasses.replace(read, state=written.state) == written


def test_command_line_says_what_is_wrong_in_a_sentence(tmp_path):
    (tmp_path / "rubbish.pth").write_bytes(b"rubbish")
    with pytest.raises(SystemExit, match=r"^convert\.py: .*rubbish\.pth: must be a checkpoint"):
        convert.main([str(tmp_path / "rubbish.pth"), str(tmp_path / "out.pt"), "--to", "ours"])
    assert not (tmp_path / "out.pt").exists()
