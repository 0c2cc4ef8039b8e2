"""Count and time the detectors of the paper's tables: parameters, multiply-adds and images/s.

Every preset of examples/ that has a row in the tables of Deformable DETR (arXiv 2010.04159), next
to what was published. Multiply-adds are those of one image without padding: of convolutions and
matrix products as PyTorch's FlopCounterMode counts them, and of the operator by the rule of
msda/flops.py; what FlopCounterMode leaves out (norms, softmax, activations) is left out. No image
is needed for counting; images/s are measured on forward passes as in inference, in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import msda.flops  # noqa: F401  lets the counter count the operator
from benchmarks.common.harness import Table, add_record, all_cores, keep_record, make_record
from benchmarks.common.machine import require_kernels
from benchmarks.common.timing import Run, make_timer
from benchmarks.models.detector import QUICK_SIZE, make_images, make_model, rates, rounds_of
from detector.config import PRESETS, ModelConfig
from detector.model import build_model


@dataclass(frozen=True)
class Published:
    """A row of the table in the README of the original code; "FLOPs" as it calls them."""

    title: str
    parameters_m: int
    flops_g: int
    v100_images_per_second: float  # batch 1


# The paper's own Table 1 has the last three, each with 40 M parameters, 173 G and 19 images/s.
PUBLISHED = {
    "r50_deformable_detr_single_scale": Published("single scale", 34, 78, 27.0),
    "r50_deformable_detr_single_scale_dc5": Published("single scale, DC5", 34, 128, 22.1),
    "r50_deformable_detr": Published("multi-scale", 40, 173, 15.0),
    "r50_deformable_detr_plus_iterative_bbox_refinement": Published(
        "+ iterative refinement", 41, 173, 15.0
    ),
    "r50_deformable_detr_plus_plus_two_stage": Published("++ two-stage", 41, 173, 14.5),
}
PARTS = {
    "backbone": "DeformableDETR.backbone.0",
    "encoder": "DeformableDETR.transformer.encoder",
    "decoder": "DeformableDETR.transformer.decoder",
}


def parameters(config: ModelConfig) -> dict[str, int]:
    """Parameters that are trained, and all of them with the statistics of frozen batch norms."""
    with torch.device("meta"):
        model = build_model(config)
    norms = sum(buffer.numel() for buffer in model.buffers())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "all": sum(p.numel() for p in model.parameters()) + norms}


def multiply_adds(config: ModelConfig, size: Sequence[int]) -> dict[str, int]:
    """Multiply-adds of a forward pass over one image (H, W), by part of the model.

    "sampling" is the operator alone: it is also in "encoder" and "decoder". "rest" are the input
    projections, class heads and, of two-stage models, the proposals.
    """
    model = build_model(config).eval().requires_grad_(False)
    # Nothing is computed, but tensors take themselves to be on the CPU: autocast knows no meta
    # device. The counter has no rule for the CPU's own attention kernel.
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        model(torch.empty(1, 3, *size))
    flops = counter.get_flop_counts()
    parts = {part: sum(flops[module].values()) for part, module in PARTS.items()}
    parts["rest"] = counter.get_total_flops() - sum(parts.values())
    parts["total"] = counter.get_total_flops()
    parts["sampling"] = flops["Global"][torch.ops.msda.ms_deform_attn_fused]
    return {part: count // 2 for part, count in parts.items()}


def matching_width(
    config: ModelConfig, size: Sequence[int], multiply_adds_there: int, wanted: float
) -> int:
    """The width at which an image as high as ``size`` takes so many multiply-adds.

    The count is a straight line but for the rounding of map sizes.
    """
    height, width = size
    half = width // 2
    slope = (multiply_adds_there - multiply_adds(config, (height, half))["total"]) / (width - half)
    return round(width + (wanted - multiply_adds_there) / slope)


def times_of(size: Sequence[int], device: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of a forward pass of each preset over one image, in each round."""
    images = make_images(size, device=device)

    def run_of(model: nn.Module) -> Run:
        def run() -> object:
            with torch.no_grad():
                return model(images)

        return run

    runs = {name: run_of(make_model(PRESETS[name].model, device).eval()) for name in PUBLISHED}
    for run in runs.values():
        run()
    return rounds_of(make_timer(device), runs, rounds, 10 if device == "cuda" else 1)


def count(name: str, size: Sequence[int]) -> dict:
    """Everything of a preset but its speed."""
    config, published = PRESETS[name].model, PUBLISHED[name]
    counted = multiply_adds(config, size)
    width = matching_width(config, size, counted["total"], 1e9 * published.flops_g)
    return {
        "preset": name,
        "published": asdict(published),
        "parameters": parameters(config),
        "multiply_adds": counted,
        "matching_width": width,
    }


def print_rows(rows: Sequence[dict]) -> None:
    columns = {"": -24, "M trained": 9, "all": 7, "publ.": 7}
    columns |= {f"G {part}": 9 for part in (*PARTS, "rest", "sampling", "total")}
    table = Table(columns | {"G publ.": 7, "images/s": 7, "V100": 6})
    for row in rows:
        published, giga = row["published"], row["multiply_adds"]
        table.add(
            published["title"],
            *(f"{row['parameters'][kind] / 1e6:.2f}" for kind in ("trained", "all")),
            published["parameters_m"],
            *(f"{giga[part] / 1e9:.1f}" for part in (*PARTS, "rest", "sampling", "total")),
            published["flops_g"],
            f"{row['images_per_second']:.3g}",
            f"{published['v100_images_per_second']:.1f}",
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_record(parser, rounds=3, threads=all_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))


def main(options: argparse.Namespace) -> int:
    """Count every published configuration, then time them in turn."""
    require_kernels(options.device)
    torch.set_num_threads(options.threads)
    size = options.size
    if options.quick:
        size, options.rounds = QUICK_SIZE, 1
    rows: list[dict[str, Any]] = [count(name, size) for name in PUBLISHED]
    times = times_of(size, options.device, options.rounds)
    for row in rows:
        row["images_per_second"], row["quartiles"] = rates(times[row["preset"]])
    print(
        "one image of {} x {}, float32, {}, {} threads".format(
            *size, options.device, options.threads
        )
    )
    print_rows(rows)
    widths = ", ".join(f"{row['published']['title']}: {row['matching_width']}" for row in rows)
    print(f"\nwidth at height {size[0]} for which our count is the published one: {widths}")
    record = make_record(
        options,
        device=options.device,
        size=list(size),
        threads=options.threads,
        rounds=options.rounds,
        rows=rows,
    )
    keep_record(options, record)
    return 0
