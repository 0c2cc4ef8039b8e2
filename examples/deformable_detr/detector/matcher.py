"""Give every object of an image the query that predicts it best, one to one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from detector.boxes import generalized_iou, to_corners

Targets = Sequence[Mapping[str, Tensor]]


class Costs(NamedTuple):
    """What a pair of query and object costs: weights of the terms of section 3 of the paper."""

    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    focal_alpha: float = 0.25


class Matching(NamedTuple):
    """T pairs for each of K layers; pair t of every layer belongs to the same image."""

    images: Tensor  # (T,) int64
    queries: Tensor  # (K, T) int64
    targets: Tensor  # (K, T) int64, counted through the targets of all images


@torch.no_grad()
def match(
    groups: Sequence[Mapping[str, Tensor]], targets: Sequence[Targets], costs: Costs
) -> list[Matching]:
    """Match the predictions of each layer with the objects of each image at the least total cost.

    Args:
        groups: predictions of layers that share a number of queries: ``pred_logits``
            (K, B, Q, num_classes) and ``pred_boxes`` (K, B, Q, 4), centre form.
        targets: for each group, ``labels`` (N,) and ``boxes`` (N, 4) of each of the B images.
        costs: weights of the terms.

    Returns:
        One ``Matching`` per group, min(N, Q) pairs for each image.
    """
    # (K, B, Q, max N) each
    tables = [_cost(*of_group, costs) for of_group in zip(groups, targets, strict=True)]
    device = tables[0].device

    # One copy to the host, whatever the number of layers: each makes the host wait for the device.
    flat = torch.cat([table.flatten() for table in tables]).cpu()
    # Numbers that are not finite show in the losses, which name them; scipy would only refuse them.
    flat = torch.nan_to_num(flat, nan=1e6, posinf=1e6, neginf=-1e6)
    on_host = [
        part.view(table.shape).numpy()
        for part, table in zip(flat.split([t.numel() for t in tables]), tables, strict=True)
    ]
    return [
        _assign(table, [len(target["labels"]) for target in of_group], device)
        for table, of_group in zip(on_host, targets, strict=True)
    ]


def _cost(group: Mapping[str, Tensor], targets: Targets, costs: Costs) -> Tensor:
    """Cost of each query for each object, (K, B, Q, max N); past an image's N it is padding."""
    logits, boxes = group["pred_logits"], group["pred_boxes"]
    pad = torch.nn.utils.rnn.pad_sequence
    labels = pad([target["labels"] for target in targets], batch_first=True)  # (B, N)
    target_boxes = pad([target["boxes"] for target in targets], batch_first=True).to(boxes.dtype)

    # What the focal loss of this logit would change by, were it an object of this class.
    p = logits.sigmoid()
    alpha = costs.focal_alpha
    object_loss = alpha * (1 - p) ** 2 * -(p + 1e-8).log()
    background_loss = (1 - alpha) * p**2 * -(1 - p + 1e-8).log()
    labels = labels[:, None].expand(*logits.shape[:3], -1)  # (K, B, Q, N)
    class_cost = (object_loss - background_loss).gather(-1, labels)

    box_cost = torch.cdist(boxes, target_boxes.expand(len(boxes), -1, -1, -1), p=1)
    giou = generalized_iou(
        to_corners(boxes)[..., None, :],  # (K, B, Q, 1, 4)
        to_corners(target_boxes)[:, None],  # (B, 1, N, 4)
    )
    return costs.class_weight * class_cost + costs.box_weight * box_cost - costs.giou_weight * giou


def _assign(table: np.ndarray, sizes: Sequence[int], device: torch.device) -> Matching:
    """Solve the assignment problem of each layer and image: table (K, B, Q, max N) of costs."""
    starts = np.cumsum([0, *sizes[:-1]])  # of each image's targets among all of them
    queries, targets = [], []
    for layer in table:
        pairs = [
            linear_sum_assignment(costs[:, :size]) for costs, size in zip(layer, sizes, strict=True)
        ]
        queries.append(np.concatenate([query for query, _ in pairs]))
        targets.append(
            np.concatenate(
                [start + target for start, (_, target) in zip(starts, pairs, strict=True)]
            )
        )
    images = np.repeat(np.arange(len(sizes)), np.minimum(sizes, table.shape[2]))
    # One copy back, for the same reason.
    rows = torch.from_numpy(np.stack([images, *queries, *targets]).astype(np.int64)).to(device)
    return Matching(rows[0], rows[1 : len(table) + 1], rows[len(table) + 1 :])
