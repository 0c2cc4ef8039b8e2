"""Backbones: an image in, feature maps with strides 8, 16 and 32 out."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector import weight_files

RESNET_BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}


class FrozenBatchNorm2d(nn.Module):
    """Batch norm by fixed statistics: four buffers, nothing to train, the same in both modes."""

    eps = 1e-5

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.ones(num_channels))
        self.register_buffer("bias", torch.zeros(num_channels))
        self.register_buffer("running_mean", torch.zeros(num_channels))
        self.register_buffer("running_var", torch.ones(num_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift each channel, in the dtype of ``x``."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # Unlike F.batch_norm, this keeps no copy of x for the backward pass.
        shift, scale = (vector.to(x.dtype).view(1, -1, 1, 1) for vector in (shift, scale))
        return torch.addcmul(shift, x, scale)


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions, the stride in the 3x3 one (v1.5)."""

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int) -> None:
        super().__init__()
        out_channels = 4 * width
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.bn2 = FrozenBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = FrozenBatchNorm2d(out_channels)
        self.downsample = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                FrozenBatchNorm2d(out_channels),
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 4 * width, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        return F.relu(self.bn3(self.conv3(x)) + shortcut, inplace=True)


class ResNet(nn.Module):
    """ResNet-50 or -101 (arXiv 1512.03385) with torchvision's key names, without the classifier.

    As in the original detector every batch norm is frozen, and so are the first convolution and
    the first stage.

    Args:
        blocks: blocks in each of the four stages.
        dilation: DC5, the last stage keeps its resolution and dilates its convolutions instead.
    """

    def __init__(self, blocks: tuple[int, ...], dilation: bool = False) -> None:
        super().__init__()
        self.channels = [512, 1024, 2048]
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = FrozenBatchNorm2d(64)
        self.layer1 = self._stage(64, 64, blocks[0], stride=1)
        self.layer2 = self._stage(256, 128, blocks[1], stride=2)
        self.layer3 = self._stage(512, 256, blocks[2], stride=2)
        if dilation:
            self.layer4 = self._stage(1024, 512, blocks[3], stride=1, dilation=2)
        else:
            self.layer4 = self._stage(1024, 512, blocks[3], stride=2)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        for frozen in (self.conv1, self.layer1):
            frozen.requires_grad_(False)

    @staticmethod
    def _stage(
        in_channels: int, width: int, num_blocks: int, stride: int, dilation: int = 1
    ) -> nn.Sequential:
        first = Bottleneck(in_channels, width, stride, dilation=1)
        others = [Bottleneck(4 * width, width, 1, dilation) for _ in range(num_blocks - 1)]
        return nn.Sequential(first, *others)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to C3, C4 and C5."""
        x = F.relu(self.bn1(self.conv1(images)), inplace=True)
        c2 = self.layer1(F.max_pool2d(x, 3, 2, 1))
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        return [c3, c4, self.layer4(c4)]


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around which the input passes unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(channels, channels, stride=1),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.relu(self.convolutions(x) + x, inplace=True)


class TinyNet(nn.Module):
    """A small net to be trained from scratch: widths 16, 32 and 64, 0.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.channels = [64, 64, 64]
        self.stem = nn.Sequential(*_convolution(3, 16, stride=2), *_convolution(16, 32, stride=2))
        self.stages = nn.ModuleList(
            nn.Sequential(*_convolution(width, 64, stride=2), ResidualBlock(64))
            for width in (32, 64, 64)
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to maps with strides 8, 16 and 32."""
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that takes its running statistics where a batch has one value per channel.

    Such a batch, one image on a map of one pixel, has no variance; PyTorch refuses to train on it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        if x.shape[0] * x.shape[2] * x.shape[3] > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


def _convolution(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    ]


class TimmNet(nn.Module):
    """A feature extractor of the timm library; its batch norms are frozen like those of ResNet."""

    def __init__(self, name: str, dilation: bool, weights: str | Path) -> None:
        super().__init__()
        import timm  # not a requirement of this example

        options = {"output_stride": 16} if dilation else {}
        if weights:
            options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(weights)}}
        self.net = timm.create_model(name, features_only=True, **options)
        strides = self.net.feature_info.reduction()[-3:]
        if strides != [8, 16, 16 if dilation else 32]:
            raise ValueError(f"backbone must have strides 8, 16, 32, got {strides} in timm:{name}")
        self.channels = self.net.feature_info.channels()[-3:]
        self.norms = [
            module
            for module in self.net.modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm)
        ]
        for norm in self.norms:
            norm.requires_grad_(False)

    def train(self, mode: bool = True) -> TimmNet:
        """Switch everything but the batch norms."""
        super().train(mode)
        for norm in self.norms:
            norm.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to the last three maps."""
        return self.net(images)[-3:]


class Backbone(nn.Module):
    """The net called ``name`` under the key ``body``, as in the original's checkpoints.

    Args:
        name: resnet50, resnet101, tiny, or timm:NAME.
        dilation: DC5, the last stage keeps its resolution.
        weights: file with weights trained on ImageNet: torchvision's ``.pth`` of the ResNet, or
            timm's of the timm model; empty: the weights are random.

    Attributes:
        channels: channels of the three maps.
    """

    def __init__(self, name: str, dilation: bool = False, weights: str | Path = "") -> None:
        super().__init__()
        if name in RESNET_BLOCKS:
            self.body = ResNet(RESNET_BLOCKS[name], dilation)
            if weights:
                load_resnet(self.body, weights)
        elif name == "tiny":
            if dilation or weights:
                raise ValueError(
                    "backbone must not be 'tiny' where dilation or backbone weights are asked for"
                )
            self.body = TinyNet()
        elif name.startswith("timm:"):
            self.body = TimmNet(name.removeprefix("timm:"), dilation, weights)
        else:
            names = ", ".join(RESNET_BLOCKS)
            raise ValueError(f"backbone must be {names}, tiny or timm:NAME, got {name!r}")
        self.channels = self.body.channels

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) to three maps (B, channels, H / stride, W / stride)."""
        return self.body(images)


def load_resnet(resnet: ResNet, path: str | Path) -> None:
    """Load torchvision's weights, trained on ImageNet, into a ResNet.

    Raises:
        OSError: there is no such file.
        ValueError: the file does not hold the weights of this net.
    """
    try:
        state = weight_files.read(Path(path), "--backbone-weights")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    nested = state.get("state_dict")
    state = nested if isinstance(nested, dict) else state
    # What frozen batch norms and a net without a classifier have no use for.
    state = {
        key: tensor
        for key, tensor in state.items()
        if not key.startswith("fc.") and not key.endswith("num_batches_tracked")
    }
    problems = weight_files.misfits(resnet.state_dict(), state)
    if problems:
        raise ValueError(
            f"{path} must hold torchvision's weights of the net, but "
            f"{weight_files.shortened(problems.values(), '; ', 3)}"
        )
    resnet.load_state_dict(state)
