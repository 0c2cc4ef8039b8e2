"""Backbones of the detector: frozen norms, strides, weights from files, those of timm."""

import sys
import types

import pytest
import torch
from torch import nn

from detector.backbone import RESNET_BLOCKS, Backbone, FrozenBatchNorm2d, ResNet, TinyNet
from detector.model import build_model
from tests.detector.small_models import padded_batch, tiny_config
from tests.helpers.results import assert_same_bits


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
    config = tiny_config(backbone="resnet50")
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
    model = build_model(tiny_config(backbone="timm:some_net"), backbone_weights="net.safetensors")
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
