"""Show a Deformable DETR of the transformers library running faster by msda, with equal outputs.

The weights are random and nothing is downloaded: ``python examples/transformers_model.py``.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
import transformers
from torch import Tensor, nn

import msda
from msda.integrations.transformers import use_msda

ROUNDS = 3
LIMIT = 1e-4  # relative: float32 rounding of 1e-7, grown in twelve layers


def make_model() -> nn.Module:
    """Deformable DETR with ResNet-50, its queries sampling at different offsets as if trained."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=backbone)
    model = transformers.DeformableDetrForObjectDetection(config).eval()
    for name, module in model.named_modules():
        if name.endswith("sampling_offsets"):
            nn.init.normal_(module.weight, std=0.02)
    return model


def run(model: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], float]:
    """Class logits and boxes of all queries; seconds of the call."""
    start = time.perf_counter()
    with torch.no_grad():
        output = model(pixel_values=image)
    seconds = time.perf_counter() - start
    return {name: output[name] for name in ("logits", "pred_boxes")}, seconds


def main() -> None:
    """Compare outputs, then time both models in turns."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    size = dict(type=int, nargs=2, default=(480, 640), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--size", **size, help="of the image in pixels (default: 480 640)")
    height, width = parser.parse_args().size

    torch.manual_seed(0)
    before, image = make_model(), torch.randn(1, 3, height, width)
    after = use_msda(copy.deepcopy(before))

    expected, outputs = run(before, image)[0], run(after, image)[0]  # and warm-up
    for name, tensor in expected.items():
        error = ((outputs[name] - tensor).norm() / tensor.norm()).item()
        assert error <= LIMIT, f"{name} must agree to {LIMIT:g}, got {error:.1e}"
        print(f"{name}: equal within {error:.0e}")

    times = [[run(model, image)[1] for model in (before, after)] for _ in range(ROUNDS)]
    old, new = torch.tensor(times).median(0).values.tolist()
    print(f"transformers {transformers.__version__}: {old:.2f} s for {height} x {width} pixels")
    print(f"with msda {msda.__version__}: {new:.2f} s, {old / new:.1f} times as fast")


if __name__ == "__main__":
    main()
