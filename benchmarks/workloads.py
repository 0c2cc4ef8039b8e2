"""Real problem sizes by name: what the benchmarks measure, and where each size comes from."""

from __future__ import annotations

from collections.abc import Callable

import torch

from msda.testing import PAPER_SHAPES, Inputs, make_inputs

# name: (source, arguments of make_inputs without dtype)
_SIZES: dict[str, tuple[str, dict]] = {
    "encoder": (
        "Deformable DETR R50 encoder, 800 x 1333: one query per pixel, offsets of 2.5 pixels",
        {"spatial_shapes": PAPER_SHAPES, "locations": "local"},
    ),
    "decoder": (
        "Deformable DETR decoder: 300 queries, uniform locations",
        {"spatial_shapes": PAPER_SHAPES, "num_queries": 300},
    ),
}

WORKLOADS: dict[str, Callable[[torch.dtype], Inputs]] = {
    name: lambda dtype, arguments=arguments: make_inputs(**arguments, dtype=dtype)
    for name, (_, arguments) in _SIZES.items()
}
SOURCES = {name: source for name, (source, _) in _SIZES.items()}
