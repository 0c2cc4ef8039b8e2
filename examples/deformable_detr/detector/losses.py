"""The losses of Deformable DETR: sigmoid focal, L1 and GIoU, on every decoder layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from detector.boxes import generalized_iou, to_corners
from detector.config import TrainConfig
from detector.matcher import Costs, Matching, Targets, match


class NonFiniteLoss(ArithmeticError):
    """A loss is NaN or infinite: training cannot go on from here."""


class SetCriterion:
    """Match predictions with objects, then compare each pair.

    The terms are called ``loss_class``, ``loss_box`` and ``loss_giou``, with ``_0``, ``_1`` ... for
    earlier decoder layers and ``_enc`` for the proposals of the two-stage encoder. They are sums
    over the batch, times their weight, over the mean number of objects per process.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.costs = Costs(
            config.class_weight, config.box_weight, config.giou_weight, config.focal_alpha
        )

    def __call__(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Tensor]:
        """Return the weighted terms, and ``class_error`` and ``cardinality_error`` for the log.

        Args:
            outputs: of the model: ``pred_logits`` (B, Q, num_classes), ``pred_boxes`` (B, Q, 4),
                maybe ``aux_outputs``, a list of such, and ``enc_outputs``, one such.
            targets: ``labels`` (N,) and ``boxes`` (N, 4) of each of the B images.
        """
        auxiliary = outputs.get("aux_outputs", [])
        decoder = _stack([outputs, *auxiliary])
        groups, group_targets = [decoder], [targets]
        suffixes = [["", *(f"_{layer}" for layer in range(len(auxiliary)))]]
        if "enc_outputs" in outputs:
            groups.append(_stack([outputs["enc_outputs"]]))
            # A proposal is an object or none: its one class is 0.
            group_targets.append(
                [dict(target, labels=torch.zeros_like(target["labels"])) for target in targets]
            )
            suffixes.append(["_enc"])

        num_boxes = mean_number_of_boxes(targets, decoder["pred_boxes"].device)
        matchings = match(groups, group_targets, self.costs)
        losses: dict[str, Tensor] = {}
        for group, its_targets, matching, names in zip(
            groups, group_targets, matchings, suffixes, strict=True
        ):
            terms = self._terms(group, its_targets, matching)
            for term, per_layer in terms.items():
                for name, loss in zip(names, per_layer / num_boxes, strict=True):
                    losses[f"{term}{name}"] = loss
        return losses | _errors(decoder["pred_logits"][0].detach(), targets, matchings[0])

    def _terms(
        self, group: Mapping[str, Tensor], targets: Targets, matching: Matching
    ) -> dict[str, Tensor]:
        """Weighted sums of each of K layers: (K,) per term."""
        logits, boxes = group["pred_logits"], group["pred_boxes"]  # (K, B, Q, C), (K, B, Q, 4)
        images, queries, pairs = matching
        layers = torch.arange(len(logits), device=logits.device)[:, None]  # (K, 1)
        labels = torch.cat([target["labels"] for target in targets])[pairs]  # (K, T)
        target_boxes = torch.cat([target["boxes"] for target in targets])[pairs].to(boxes.dtype)

        is_object = torch.zeros_like(logits)
        is_object[layers, images, queries, labels] = 1
        matched = boxes[layers, images, queries]  # (K, T, 4)
        focal = sigmoid_focal_loss(logits, is_object, self.costs.focal_alpha)
        giou = generalized_iou(to_corners(matched), to_corners(target_boxes))
        return {
            "loss_class": self.costs.class_weight * focal.sum((1, 2, 3)),
            "loss_box": self.costs.box_weight * (matched - target_boxes).abs().sum((1, 2)),
            "loss_giou": self.costs.giou_weight * (1 - giou).sum(1),
        }


def _stack(layers: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put layers of equal shape into one tensor; losses are computed in float32 at least."""
    stacked = {
        name: torch.stack([layer[name] for layer in layers])
        for name in ("pred_logits", "pred_boxes")
    }
    return {
        name: tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in stacked.items()
    }


def sigmoid_focal_loss(
    logits: Tensor, is_object: Tensor, alpha: float, gamma: float = 2.0
) -> Tensor:
    """Focal loss (arXiv 1708.02002) of each logit: cross entropy, less for what is easy.

    Args:
        logits: any shape.
        is_object: of the same shape, 1 for objects and 0 for background.
        alpha: weight of objects; background has 1 - alpha.
        gamma: how much less.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, is_object, reduction="none")
    p = logits.sigmoid()
    surprise = p + is_object - 2 * p * is_object  # 1 - the probability of what is true
    weight = (1 - alpha) + (2 * alpha - 1) * is_object
    return weight * surprise**gamma * cross_entropy


def mean_number_of_boxes(targets: Targets, device: torch.device) -> Tensor | int:
    """Objects of the batch, averaged over the processes that train together; at least 1."""
    number = sum(len(target["labels"]) for target in targets)
    if not dist.is_initialized():
        return max(number, 1)
    mean = torch.tensor(float(number), dtype=torch.float64, device=device)
    dist.all_reduce(mean)
    return (mean / dist.get_world_size()).clamp(min=1)


@torch.no_grad()
def _errors(logits: Tensor, targets: Targets, matching: Matching) -> dict[str, Tensor]:
    """How wrong the last layer's classes and counts are, for the log: logits (B, Q, C)."""
    images, queries, pairs = matching.images, matching.queries[0], matching.targets[0]
    labels = torch.cat([target["labels"] for target in targets])[pairs]  # (T,)
    wrong = (logits[images, queries].argmax(-1) != labels).float()
    found = (logits.amax(-1) > 0).sum(-1)  # queries that call themselves more likely than not
    number = torch.tensor([len(target["labels"]) for target in targets], device=logits.device)
    return {
        "class_error": wrong.sum() / max(len(labels), 1),
        "cardinality_error": (found - number).abs().float().mean(),
    }


def total(losses: Mapping[str, Tensor]) -> Tensor:
    """Sum the terms that are trained."""
    return torch.stack([loss for name, loss in losses.items() if name.startswith("loss_")]).sum()


def check_finite(losses: Mapping[str, float], step: int, images: Sequence[Any]) -> None:
    """Refuse a step whose losses are not numbers, before it touches the weights.

    Raises:
        NonFiniteLoss: names the terms, the step and the images.
    """
    bad = [f"{name} = {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
    if bad:
        raise NonFiniteLoss(
            f"losses must be finite, got {', '.join(bad)} in step {step}; "
            f"images of the batch by id: {', '.join(map(str, images))}"
        )
