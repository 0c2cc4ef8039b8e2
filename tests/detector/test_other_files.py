"""Files that are no checkpoint are refused by what they are."""

import re

import pytest
import torch

from detector import run_checkpoints, weight_files
from detector.checkpoint_formats import read_checkpoint
from tests.detector.foreign_files import OTHERS, refusal


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_no_checkpoint_is_told_by_its_kind(tmp_path, kind, suffix):
    make, message = OTHERS[kind]
    path = tmp_path / f"r50{suffix}"
    make(path)
    said = refusal(path)
    assert re.search(message, said), said
    with pytest.raises(run_checkpoints.CheckpointError, match=re.escape(str(path))) as error:
        run_checkpoints.load(path)
    assert "\n" not in str(error.value)


def test_a_download_that_broke_off_is_told(tmp_path, weights):
    path = tmp_path / "r50.pth"
    torch.save({"model": weights}, path)
    whole = path.read_bytes()
    for size in (3, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert re.search(r"must be a checkpoint, (but reading it failed|got)", refusal(path))
    assert f"(it has {len(whole) - 1:,} bytes); fetch or copy it again" in refusal(path)


def test_a_missing_file_is_told_with_what_is_beside_it(tmp_path):
    assert refusal(tmp_path / "r50.pth") == f"{tmp_path}/r50.pth does not exist; check the name"
    torch.save({}, tmp_path / "r50-e49.pth")
    assert refusal(tmp_path / "r50.pth").endswith("does not exist; its folder holds r50-e49.pth")
    assert refusal(tmp_path / "no" / "r50.pth").endswith("does not exist; nor does its folder")
    for option, given in (("--weights", "--weights "), ("", "")):
        said = refusal(tmp_path, option=option)
        assert said.endswith(f"got a folder; give a file in it: {given}{tmp_path}/r50-e49.pth")
    with pytest.raises(FileNotFoundError, match="is an address: download it first, and give the"):
        read_checkpoint("https://example.org/r50.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    assert "does not exist" in refusal(tmp_path / "link.pth")


def test_a_file_that_may_not_be_read_is_told(tmp_path, weights, monkeypatch):
    path = tmp_path / "r50.pth"
    torch.save({"model": weights}, path)

    def forbidden(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(weight_files, "open", forbidden, raising=False)
    assert refusal(path).endswith(
        f"may not be read by this user: chmod u+r {path}, or ask its owner"
    )


MODELS = {
    "detr": (
        {
            "transformer.encoder.layers.0.self_attn.in_proj_weight": torch.ones(768, 256),
            "query_embed.weight": torch.ones(100, 256),
        },
        "got those of DETR, which attends otherwise",
    ),
    "mmdetection": (
        {"bbox_head.cls_branches.0.weight": torch.ones(80, 256)},
        "got those of mmdetection, which has other names",
    ),
    "resnet": (
        {
            "conv1.weight": torch.ones(64, 3, 7, 7),
            "layer1.0.conv1.weight": torch.ones(64, 64, 1, 1),
        },
        "got those of a ResNet alone, which --backbone-weights takes",
    ),
    "yolo": (
        {"model.0.conv.weight": torch.ones(2), "model.1.conv.weight": torch.ones(2)},
        "got those of another model: model.0.conv.weight, model.1.conv.weight",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_other_models_are_told_apart(tmp_path, kind):
    state, message = MODELS[kind]
    for content in ({"model": state, "epoch": 3}, state):
        torch.save(content, tmp_path / "other.pth")
        said = refusal(tmp_path / "other.pth")
        assert "must have the key transformer.level_embed, " + message in said


def test_another_backbone_is_told(tmp_path, weights):
    swin = {
        key.replace(".body.layer", ".body.features."): tensor for key, tensor in weights.items()
    }
    torch.save({"model": swin}, tmp_path / "swin.pth")
    said = refusal(tmp_path / "swin.pth")
    assert "backbone must be one of {'resnet50'" in said
    assert "got (0, 0, 0, 0) blocks, in backbone.0.body.conv1.weight, " in said
