"""Real problem sizes by name: what the benchmarks measure, and where each size comes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from msda.testing import PAPER_SHAPES, FusedInputs, Inputs, make_fused_inputs, make_inputs


@dataclass(frozen=True)
class Workload:
    """A problem size: arguments of ``make_inputs`` without dtype and device."""

    source: str
    spatial_shapes: list[tuple[int, int]]
    locations: str = "uniform"  # see make_inputs; local and initial have one query per pixel
    has_fused: bool = True  # fused inputs sample around the query's reference point, in any case
    sizes: dict[str, Any] = field(default_factory=dict)

    def plain(self, dtype: torch.dtype) -> Inputs:
        """Arguments of ``msda.ms_deform_attn``, on the CPU."""
        shapes, locations = self.spatial_shapes, self.locations
        return make_inputs(shapes, locations=locations, dtype=dtype, **self.sizes)

    def fused(self, dtype: torch.dtype) -> FusedInputs:
        """Arguments of ``msda.ms_deform_attn_fused``, on the CPU."""
        return make_fused_inputs(self.spatial_shapes, dtype=dtype, **self.sizes)

    def tiny(self) -> Workload:
        """The same form at a size that takes no time: to try a benchmark, not to report."""
        shapes = [(max(1, h // 16), max(1, w // 16)) for h, w in self.spatial_shapes]
        sizes = dict(self.sizes)
        if "num_queries" in sizes:
            sizes["num_queries"] = 7
        if "batch" in sizes:
            sizes["batch"] = 2
        return replace(self, spatial_shapes=shapes, sizes=sizes)

    def scaled(self, samples: int) -> Workload:
        """The same form with about so many samples, of one image: maps and queries both fewer, so
        that as many samples share a pixel.
        """
        sizes = self.sizes | {"batch": 1}
        points = sizes.get("num_points", 4)
        of_query = points * len(self.spatial_shapes) if isinstance(points, int) else sum(points)
        of_query *= sizes.get("num_heads", 8)
        queries = sizes.get("num_queries") or sum(h * w for h, w in self.spatial_shapes)
        share = min(1.0, samples / (queries * of_query))
        shapes = [
            (max(1, round(h * share**0.5)), max(1, round(w * share**0.5)))
            for h, w in self.spatial_shapes
        ]
        if "num_queries" in sizes:
            sizes["num_queries"] = max(1, round(queries * share))
        return replace(self, spatial_shapes=shapes, sizes=sizes)


def sized(workload: Workload, quick: bool) -> Workload:
    """A workload as it is, or tiny where a command is only tried."""
    return workload.tiny() if quick else workload


# Pyramids of other sizes than the paper's.
MASK2FORMER_SHAPES = [(128, 128), (64, 64), (32, 32)]
RT_DETR_SHAPES = [(80, 80), (40, 40), (20, 20)]
SQUARE_SHAPES = [(64, 64), (32, 32), (16, 16), (8, 8)]

CPU_WORKLOADS = {
    "encoder": Workload(
        "Deformable DETR R50 encoder, 800 x 1333: one query per pixel, offsets of 2.5 pixels",
        PAPER_SHAPES,
        locations="local",
    ),
    "decoder": Workload(
        "Deformable DETR decoder: 300 queries, uniform locations",
        PAPER_SHAPES,
        sizes=dict(num_queries=300),
    ),
}

# What the operator benchmark measures besides.
OTHER_CPU_WORKLOADS = {
    "encoder-initial": Workload(
        "the encoder with the offsets of an untrained module and noise of half a pixel",
        PAPER_SHAPES,
        locations="initial",
        has_fused=False,
    ),
    "encoder-clustered": Workload(
        "the encoder with queries that look at the object next to them, as after training",
        PAPER_SHAPES,
        locations="clustered",
        has_fused=False,
    ),
    "encoder-uniform": Workload(
        "the encoder with uniform locations: no two queries share what they read",
        PAPER_SHAPES,
        has_fused=False,
    ),
    "dino-900": Workload(
        "DINO and Grounding DINO decoder: 900 queries on few objects",
        PAPER_SHAPES,
        locations="clustered",
        sizes=dict(num_queries=900),
    ),
    "mask2former": Workload(
        "Mask2Former pixel decoder, 1024 x 1024: strides 8, 16, 32",
        MASK2FORMER_SHAPES,
        locations="local",
    ),
    "rt-detr": Workload(
        "RT-DETR decoder, 640 x 640, batch 8: 300 queries on few objects",
        RT_DETR_SHAPES,
        locations="clustered",
        sizes=dict(batch=8, num_queries=300),
    ),
    "d-fine": Workload(
        "D-FINE and RT-DETRv2 decoder, 640 x 640, batch 8: 3, 6 and 3 points",
        RT_DETR_SHAPES,
        locations="clustered",
        has_fused=False,  # PyTorch's prologue here takes equal numbers of points
        sizes=dict(batch=8, num_queries=300, num_points=[3, 6, 3]),
    ),
    "rf-detr": Workload(
        "RF-DETR decoder in training, 560 x 560: 13 groups of 300 queries, one level",
        [(40, 40)],
        locations="clustered",
        sizes=dict(num_queries=3900, num_heads=16, head_dim=16, num_points=2),
    ),
    "bevformer-tsa": Workload(
        "BEVFormer temporal self-attention: a grid of 200 x 200",
        [(200, 200)],
        locations="local",
    ),
    "bevformer-sca": Workload(
        "BEVFormer-base spatial cross-attention: one camera of 1600 x 928, 10 000 queries",
        [(116, 200), (58, 100), (29, 50), (15, 25)],
        sizes=dict(num_queries=10_000, num_points=8),
    ),
    "hub-large": Workload(
        "the largest size of the benchmark of Hugging Face's hub kernel: batch 8, 900 queries",
        SQUARE_SHAPES,
        sizes=dict(batch=8, num_queries=900),
    ),
    "msda-triton": Workload(
        "the size in msda-triton's README: batch 4, 10 000 queries",
        SQUARE_SHAPES,
        sizes=dict(batch=4, num_queries=10_000),
    ),
    "dcnv4": Workload(
        "the size of DCNv4's script: 15 200 queries on 100 x 152 and three smaller, 8 points",
        [(100, 152), (50, 76), (25, 38), (13, 19)],
        sizes=dict(num_queries=15_200, num_points=8),
    ),
}

ALL_CPU_WORKLOADS = CPU_WORKLOADS | OTHER_CPU_WORKLOADS

# The most important first: a run that is cut off has done those.
GPU_WORKLOADS = {
    "encoder-2": Workload(
        "Deformable DETR R50 encoder, 800 x 1333, batch 2: offsets of 2.5 pixels",
        PAPER_SHAPES,
        locations="local",
        sizes=dict(batch=2),
    ),
    "decoder-300": Workload(
        "Deformable DETR decoder, batch 2: 300 queries, uniform locations",
        PAPER_SHAPES,
        sizes=dict(batch=2, num_queries=300),
    ),
    "encoder-2-uniform": Workload(
        "the same encoder with uniform locations: no two queries share what they read",
        PAPER_SHAPES,
        has_fused=False,
        sizes=dict(batch=2),
    ),
    "mask2former": Workload(
        "Mask2Former pixel decoder, 1024 x 1024, batch 2: strides 8, 16, 32",
        MASK2FORMER_SHAPES,
        locations="local",
        sizes=dict(batch=2),
    ),
    "dino-900": Workload(
        "DINO and Grounding DINO decoder, batch 2: 900 queries, uniform locations",
        PAPER_SHAPES,
        sizes=dict(batch=2, num_queries=900),
    ),
    "bevformer-tsa": Workload(
        "BEVFormer temporal self-attention: a grid of 200 x 200 and its past",
        [(200, 200)],
        locations="local",
        sizes=dict(batch=2),
    ),
    "bevformer-sca": Workload(
        "BEVFormer-base spatial cross-attention: 6 cameras of 1600 x 928, 10 000 queries each",
        [(116, 200), (58, 100), (29, 50), (15, 25)],
        sizes=dict(batch=6, num_queries=10_000, num_points=8),
    ),
    "encoder-4": Workload(
        "Deformable DETR R50 encoder, 800 x 1333, batch 4: offsets of 2.5 pixels",
        PAPER_SHAPES,
        locations="local",
        sizes=dict(batch=4),
    ),
    "rt-detr": Workload(
        "RT-DETR decoder in training, 640 x 640, batch 16: 300 queries and 200 for denoising",
        RT_DETR_SHAPES,
        sizes=dict(batch=16, num_queries=500),
    ),
    "rf-detr": Workload(
        "RF-DETR decoder in training, 560 x 560, batch 4: 13 groups of 300 queries, one level",
        [(40, 40)],
        sizes=dict(batch=4, num_queries=3900, num_heads=16, head_dim=16, num_points=2),
    ),
    "encoder-4-uniform": Workload(
        "the encoder at batch 4 with uniform locations",
        PAPER_SHAPES,
        has_fused=False,
        sizes=dict(batch=4),
    ),
    "encoder-2-clustered": Workload(
        "the encoder, batch 2, with queries that look at the object next to them",
        PAPER_SHAPES,
        locations="clustered",
        has_fused=False,
        sizes=dict(batch=2),
    ),
    "hub-large": OTHER_CPU_WORKLOADS["hub-large"],
    "msda-triton": OTHER_CPU_WORKLOADS["msda-triton"],
    "dcnv4": OTHER_CPU_WORKLOADS["dcnv4"],
}
