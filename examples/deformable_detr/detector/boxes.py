"""Boxes: (N, 4) tensors, either (centre x, centre y, width, height) or (x0, y0, x1, y1)."""

from __future__ import annotations

import torch
from torch import Tensor


def to_corners(boxes: Tensor) -> Tensor:
    """(..., 4) centre x, centre y, width, height to x0, y0, x1, y1."""
    centre, size = boxes[..., :2], boxes[..., 2:]
    return torch.cat([centre - size / 2, centre + size / 2], -1)


def to_centres(boxes: Tensor) -> Tensor:
    """(..., 4) x0, y0, x1, y1 to centre x, centre y, width, height."""
    start, end = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(start + end) / 2, end - start], -1)


def area(boxes: Tensor) -> Tensor:
    """Area of each box of corners; negative extents count as none."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def generalized_iou(a: Tensor, b: Tensor) -> Tensor:
    """Generalised intersection over union (arXiv 1902.09630) of corners that broadcast: -1..1.

    All pairs: ``generalized_iou(a[:, None], b[None])``. Degenerate boxes give finite numbers.
    """
    intersection = area(
        torch.cat(
            [torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])], -1
        )
    )
    union = area(a) + area(b) - intersection
    hull = area(
        torch.cat(
            [torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])], -1
        )
    )
    tiny = torch.finfo(union.dtype).tiny
    iou = intersection / union.clamp(min=tiny)
    return iou - (hull - union) / hull.clamp(min=tiny)


def inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    """The logit of x, with x and 1 - x kept above ``eps``."""
    return torch.log(x.clamp(eps, 1.0) / (1 - x).clamp(eps, 1.0))
