"""Time whole models of the transformers library before and after ``use_msda``, on the CPU.

The models have their usual sizes and random weights; nothing is downloaded. Outputs are compared
first, then both are timed in turn in one process: a forward call without gradients on one image.
Prints a table, and with ``--output FILE`` writes it as JSON for report.py.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from measure import CpuTimer, Run, cpu_machine, median, peak_extra_memory, quartiles, take_turns
from records import table_line, write_json
from torch import Tensor, nn

import msda
from msda.integrations.transformers import use_msda

WIDTHS = (-18, 11, 8, 12, 12, 8, 13, 11)
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
class Workload:
    """A model and the size of the image that it is given."""

    make: Callable[[], nn.Module]
    size: tuple[int, int]  # height, width


WORKLOADS = {
    "deformable_detr": Workload(deformable_detr, (800, 1333)),
    "rt_detr": Workload(rt_detr, (640, 640)),
    "mask2former": Workload(mask2former, (512, 512)),
}


def make_pair(name: str) -> tuple[nn.Module, nn.Module]:
    """The model, and a copy with our cores; queries sample at different offsets, as if trained."""
    torch.manual_seed(0)
    before = WORKLOADS[name].make().eval()
    for path, module in before.named_modules():
        if path.endswith("sampling_offsets"):
            nn.init.normal_(module.weight, std=0.02)
    return before, use_msda(copy.deepcopy(before))


def forward_of(model: nn.Module, image: Tensor) -> Run:
    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            output = model(pixel_values=image)
        return {name: x for name, x in output.items() if isinstance(x, Tensor)}

    return run


def largest_error(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Largest relative norm of the difference of an output, which must be within the limit."""
    errors = {
        name: ((after[name] - x).norm() / x.norm()).item()
        for name, x in before.items()
        if x.is_floating_point()
    }
    for name, error in errors.items():
        assert error <= LIMIT, f"{name} must agree to {LIMIT:g}, got {error:.1e}"
    return max(errors.values())


def measure(name: str, size: tuple[int, int], threads: int, budget: float) -> dict[str, object]:
    """One line of the table."""
    torch.set_num_threads(threads)
    before, after = make_pair(name)
    image = torch.randn(1, 3, *size)
    runs = {"before": forward_of(before, image), "after": forward_of(after, image)}
    error = largest_error(runs["before"](), runs["after"]())
    times = take_turns(CpuTimer(), runs, cold=False, budget=budget, least=5)
    medians = {side: median(samples) for side, samples in times.items()}
    row: dict[str, object] = {"model": name, "size": list(size), "threads": threads}
    for side, run in runs.items():
        row[f"{side}_ms"] = medians[side] * 1e3
        row[f"{side}_quartiles_ms"] = [quartile * 1e3 for quartile in quartiles(times[side])]
        row[f"{side}_extra_bytes"] = peak_extra_memory(run)
    return row | {"ratio": medians["before"] / medians["after"], "error": error}


def print_row(row: dict) -> None:
    cells = (
        row["model"],
        "{} x {}".format(*row["size"]),
        str(row["threads"]),
        f"{row['before_ms']:.0f}",
        f"{row['after_ms']:.0f}",
        f"{row['ratio']:.2f}x",
        f"{row['before_extra_bytes'] / 1e6:.0f}",
        f"{row['after_extra_bytes'] / 1e6:.0f}",
    )
    print(table_line(cells, WIDTHS), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=WORKLOADS, action="append", help="default: all")
    parser.add_argument("--size", type=int, nargs=2, help="height and width; default: the usual")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=60, help="for each line (default: 60)")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]
    transformers.logging.set_verbosity_error()

    above = ("", "", "", "before", "after", "", "extra memory, MB")
    print(table_line(above, (*WIDTHS[:-2], sum(WIDTHS[-2:]))))
    below = ("model", "image", "threads", "ms", "ms", "ratio", "before", "after")
    print(table_line(below, WIDTHS))
    rows: list[dict] = []
    for name in options.model or WORKLOADS:
        size = tuple(options.size or WORKLOADS[name].size)
        for threads in options.threads or sorted({1, os.cpu_count() or 1}):
            rows.append(measure(name, size, threads, options.seconds))
            print_row(rows[-1])
    if options.output:
        versions = {"transformers": transformers.__version__}
        write_json(options.output, {"machine": cpu_machine() | versions, "rows": rows})
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
