"""The detector: backbone, transformer, heads, and what becomes of their outputs."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detector.backbone import Backbone
from detector.boxes import to_corners
from detector.config import GROUPS, ModelConfig
from detector.dense_attention import DenseTransformer
from detector.position_encoding import LearnedEmbedding, SineEmbedding
from detector.transformer import DeformableTransformer, flatten_levels
from msda import MSDeformAttn

POSITION_EMBEDDINGS = {"sine": SineEmbedding, "learned": LearnedEmbedding}


class BoxHead(nn.Module):
    """Three linear layers that predict four box logits, in float32 even under autocast."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Linear(channels, 4)]
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., 4)."""
        first, second, last = self.layers
        weight = next(first.parameters(), None)  # quantized layers have none, and take float32
        dtype = torch.float32 if weight is None else weight.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            hidden = F.relu(second(F.relu(first(hidden.to(dtype)))))
            logits = last(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class GroupNorm(nn.GroupNorm):
    """Group norm that also takes one image on a map of one pixel, with a channel per group.

    What it normalises is then 0, as in a larger batch; PyTorch's module refuses it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return torch.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


class DeformableDETR(nn.Module):
    """Deformable DETR (arXiv 2010.04159); its state dict has the original's keys and shapes.

    Under autocast the attention operator gets 16-bit values; reference points, boxes and the logits
    that are returned stay float32.

    Args:
        config: sizes and variants.
        backbone_weights: file with ImageNet weights of the backbone, see
            :class:`detector.backbone.Backbone`; empty: none.
        gradient_checkpointing: compute the activations of the transformer's layers again in the
            backward pass, which takes less memory and more time.
        attention: a subclass of :class:`msda.MSDeformAttn` to be used in its place.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        backbone_weights: str | Path = "",
        gradient_checkpointing: bool = False,
        attention: type[MSDeformAttn] = MSDeformAttn,
    ) -> None:
        super().__init__()
        self.config = config
        channels = config.hidden_dim
        backbone = Backbone(config.backbone, config.dilation, backbone_weights)
        # One module of two, because the original's keys are backbone.0.* and backbone.1.*
        self.backbone = nn.Sequential(
            backbone, POSITION_EMBEDDINGS[config.position_embedding](channels)
        )
        self.input_proj = self._input_projections(backbone.channels)
        if config.attention == "dense":
            self.transformer = DenseTransformer(config, gradient_checkpointing)
        else:
            self.transformer = DeformableTransformer(config, attention, gradient_checkpointing)
        self.query_embed = None
        if not config.two_stage:
            absolute = config.attention == "dense" and not config.reference_boxes
            self.query_embed = nn.Embedding(
                config.num_queries, channels if absolute else 2 * channels
            )
        self._add_heads()

    def _input_projections(self, backbone_channels: list[int]) -> nn.ModuleList:
        """What brings all levels to the same width: 1x1 convolutions, 3x3 for levels beyond C5."""
        if self.config.num_feature_levels == 1:
            backbone_channels = backbone_channels[-1:]
        width = self.config.hidden_dim
        convolutions = [nn.Conv2d(channels, width, 1) for channels in backbone_channels]
        in_channels = backbone_channels[-1]
        for _ in range(self.config.num_feature_levels - len(convolutions)):
            convolutions.append(nn.Conv2d(in_channels, width, 3, stride=2, padding=1))
            in_channels = width
        for convolution in convolutions:
            nn.init.xavier_uniform_(convolution.weight)
            nn.init.zeros_(convolution.bias)
        return nn.ModuleList(
            nn.Sequential(convolution, GroupNorm(GROUPS, width)) for convolution in convolutions
        )

    def _add_heads(self) -> None:
        """Heads for each decoder layer (shared without refinement) and the two-stage encoder."""
        config = self.config
        class_head = nn.Linear(config.hidden_dim, config.num_classes)
        # Focal loss wants every score to start at 1 %.
        nn.init.constant_(class_head.bias, -math.log(99))
        box_head = BoxHead(config.hidden_dim)
        if config.attention == "deformable" or config.reference_boxes:
            # Boxes start at their reference. Absolute boxes would all start alike: they keep
            # PyTorch's initialisation.
            nn.init.zeros_(box_head.layers[-1].weight)
            nn.init.zeros_(box_head.layers[-1].bias)
            if not config.two_stage:
                nn.init.constant_(box_head.layers[-1].bias[2:], -2.0)  # an eighth of the image
        num_heads = config.num_decoder_layers + config.two_stage
        if not config.box_refine:
            self.class_embed = nn.ModuleList([class_head] * num_heads)
            self.bbox_embed = nn.ModuleList([box_head] * num_heads)
            return
        self.class_embed = nn.ModuleList(copy.deepcopy(class_head) for _ in range(num_heads))
        self.bbox_embed = nn.ModuleList(copy.deepcopy(box_head) for _ in range(num_heads))
        for later in self.bbox_embed[1:]:
            nn.init.zeros_(later.layers[-1].bias)
        if config.attention == "deformable":
            # The same modules under the other names that they have in the original's state dict.
            self.transformer.decoder.bbox_embed = self.bbox_embed
            if config.two_stage:
                self.transformer.decoder.class_embed = self.class_embed

    def forward(self, images: Tensor, padding_mask: Tensor | None = None) -> dict[str, Any]:
        """Detect objects.

        Args:
            images: (B, 3, H, W) normalised, padded right and bottom to a common size.
            padding_mask: (B, H, W) bool, True = padding; None where no image is padded.

        Returns:
            ``pred_logits`` (B, Q, num_classes) before the sigmoid; ``pred_boxes`` (B, Q, 4) centre
            x, centre y, width, height, 0..1 across the image without its padding; with
            ``aux_loss`` also ``aux_outputs``, the same for each earlier decoder layer; of two-stage
            models also ``enc_outputs``, the same for each token of the encoder. Under
            ``torch.jit.trace``, which knows no such nesting, the first two alone.

        Raises:
            ValueError: images or mask have the wrong shape or dtype.
        """
        if images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
        if padding_mask is not None:
            size = (images.shape[0], *images.shape[2:])
            if padding_mask.shape != size or padding_mask.dtype != torch.bool:
                raise ValueError(
                    f"padding_mask must be bool of shape (B, H, W) = {tuple(size)}, got "
                    f"{padding_mask.dtype} of shape {tuple(padding_mask.shape)}"
                )
        body, embed_positions = self.backbone
        maps = self._project(body(images))
        masks = None
        if padding_mask is not None:
            as_image = padding_mask[:, None].to(images.dtype)
            masks = [F.interpolate(as_image, m.shape[-2:])[:, 0].bool() for m in maps]
        positions = [
            embed_positions(feature_map, mask)
            for feature_map, mask in zip(maps, masks or [None] * len(maps), strict=True)
        ]
        tokens = flatten_levels(maps, positions, masks, self.transformer.level_embed)
        query_embed = None if self.query_embed is None else self.query_embed.weight
        hidden, boxes, proposed = self.transformer(
            tokens, query_embed, self.class_embed, self.bbox_embed
        )
        layers = [
            {"pred_logits": _in_float32(head(vectors)), "pred_boxes": layer_boxes}
            for head, vectors, layer_boxes in zip(self.class_embed, hidden, boxes, strict=False)
        ]
        outputs: dict[str, Any] = layers[-1]
        if torch.jit.is_tracing():
            return outputs
        if self.config.aux_loss:
            outputs["aux_outputs"] = layers[:-1]
        if proposed is not None:
            proposed["pred_logits"] = _in_float32(proposed["pred_logits"])
            outputs["enc_outputs"] = proposed
        return outputs

    def _project(self, features: list[Tensor]) -> list[Tensor]:
        """The backbone's maps to num_feature_levels maps of hidden_dim channels."""
        if self.config.num_feature_levels == 1:
            features = features[-1:]
        maps = [
            projection(source)
            for projection, source in zip(self.input_proj, features, strict=False)
        ]
        source = features[-1]
        for projection in self.input_proj[len(maps) :]:
            source = projection(source)
            maps.append(source)
        return maps


def _in_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def build_model(
    config: ModelConfig,
    *,
    backbone_weights: str | Path = "",
    gradient_checkpointing: bool = False,
) -> DeformableDETR:
    """Make the detector that ``config`` describes, with random weights but for the backbone's."""
    return DeformableDETR(
        config, backbone_weights=backbone_weights, gradient_checkpointing=gradient_checkpointing
    )


@torch.no_grad()
def postprocess(
    outputs: dict[str, Any], original_sizes: Tensor, top: int = 100
) -> list[dict[str, Tensor]]:
    """Pick the best detections of each image; there is no suppression of overlapping boxes.

    Args:
        outputs: of the model.
        original_sizes: (B, 2) (height, width) of each image before it was resized.
        top: how many pairs of query and class to keep.

    Returns:
        For each image ``scores`` (k,) falling, ``labels`` (k,), ``boxes`` (k, 4) x0, y0, x1, y1 in
        pixels of the original image, and ``queries`` (k,), the query that each comes from.
    """
    scores = outputs["pred_logits"].sigmoid()  # (B, Q, num_classes)
    num_classes = scores.shape[-1]
    scores = scores.flatten(1)
    scores, pairs = scores.topk(min(top, scores.shape[1]))
    labels, queries = pairs % num_classes, pairs // num_classes
    boxes = to_corners(outputs["pred_boxes"]).take_along_dim(queries.unsqueeze(-1), 1)
    height, width = original_sizes.to(boxes).unbind(1)
    boxes = boxes * torch.stack([width, height, width, height], 1).unsqueeze(1)
    return [
        {"scores": scores[i], "labels": labels[i], "boxes": boxes[i], "queries": queries[i]}
        for i in range(len(scores))
    ]
