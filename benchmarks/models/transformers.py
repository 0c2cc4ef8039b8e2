"""Time whole models of the transformers library before and after ``use_msda``, on the CPU.

The models have their usual sizes and random weights; nothing is downloaded. Outputs are compared
first, then both are timed in turn in one process: a forward call without gradients on one image.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from benchmarks.common import harness
from benchmarks.common.accuracy import errors_of, require
from benchmarks.common.machine import require_kernels
from benchmarks.common.timing import CpuTimer, Run, median, peak_extra_memory, summary, take_turns
from msda.integrations.transformers import use_msda

QUICK_SIZE = (160, 160)  # RT-DETR takes its 300 queries from the tokens
# float32, a dozen layers deep: roundings of 1e-7 add up; a wrong sample shows in the first digits.
LIMIT = 1e-4


def deformable_detr() -> nn.Module:
    """Deformable DETR with ResNet-50, as published."""
    backbone = transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"])
    config = transformers.DeformableDetrConfig(backbone_config=backbone)
    return transformers.DeformableDetrForObjectDetection(config)


def rt_detr() -> nn.Module:
    """RT-DETR with ResNet-50: attention of this kind in the decoder alone."""
    return transformers.RTDetrForObjectDetection(transformers.RTDetrConfig())


def mask2former() -> nn.Module:
    """Mask2Former with Swin-T: attention of this kind in the pixel decoder."""
    return transformers.Mask2FormerForUniversalSegmentation(transformers.Mask2FormerConfig())


@dataclass(frozen=True)
class Model:
    """How a model is made, and the size of the image that it is given."""

    make: Callable[[], nn.Module]
    size: tuple[int, int]  # height, width


MODELS = {
    "deformable_detr": Model(deformable_detr, (800, 1333)),
    "rt_detr": Model(rt_detr, (640, 640)),
    "mask2former": Model(mask2former, (512, 512)),
}


def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy with our cores; queries sample at different offsets, as if trained."""
    torch.manual_seed(0)
    before = MODELS[name].make().eval()
    for path, module in before.named_modules():
        if path.endswith("sampling_offsets"):
            nn.init.normal_(module.weight, std=0.02)
    return before, use_msda(copy.deepcopy(before))


def forward_of(model: nn.Module, image: Tensor) -> Run:
    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            output = model(pixel_values=image)
        return {
            name: x for name, x in output.items() if isinstance(x, Tensor) and x.is_floating_point()
        }

    return run


def measure(name: str, size: tuple[int, int], threads: int, budget: float) -> dict[str, Any]:
    """One line of the table."""
    torch.set_num_threads(threads)
    before, after = make_pair(name)
    image = torch.randn(1, 3, *size)
    runs = {"before": forward_of(before, image), "after": forward_of(after, image)}
    errors = errors_of(runs["after"](), runs["before"]())
    require(errors, lambda _: LIMIT)
    times = take_turns(CpuTimer(), runs, budget=budget)
    row: dict[str, Any] = {"model": name, "size": list(size), "threads": threads}
    for side, run in runs.items():
        row |= summary(times[side], f"{side}_")
        row[f"{side}_extra_bytes"] = peak_extra_memory(run)
    ratio = median(times["before"]) / median(times["after"])
    return row | {"ratio": ratio, "error": max(errors.values())}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=60.0)
    harness.add_choice(parser, "model", MODELS)
    parser.add_argument("--size", type=int, nargs=2, help="height and width; default: the usual")
    harness.add_thread_counts(parser)


def main(options: argparse.Namespace) -> int:
    """Measure every model asked for."""
    require_kernels()
    transformers.logging.set_verbosity_error()
    rows: list[dict[str, Any]] = []
    record = harness.make_record(options, "transformers", rows=rows)
    harness.print_machine(record)
    columns = {"model": -18, "image": 12, "threads": 8, "before, ms": 12, "after, ms": 11}
    table = harness.Table(columns | {"ratio": 8, "extra MB: before": 10, "after": 8})
    for name in options.model or MODELS:
        size = QUICK_SIZE if options.quick else tuple(options.size or MODELS[name].size)
        for threads in harness.thread_counts(options):
            row = measure(name, size, threads, 0.0 if options.quick else options.seconds)
            rows.append(row)
            table.add(
                *(name, "{} x {}".format(*size), threads),
                *(f"{row[f'{side}_ms']:.0f}" for side in ("before", "after")),
                f"{row['ratio']:.2f}x",
                *(f"{row[f'{side}_extra_bytes'] / 1e6:.0f}" for side in ("before", "after")),
            )
    harness.keep_record(options, record)
    return 0
