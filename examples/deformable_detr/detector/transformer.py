"""The deformable transformer: encoder, decoder, box refinement and two-stage proposals."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detector.boxes import inverse_sigmoid
from detector.config import ModelConfig
from detector.position_encoding import sine_features
from msda import MSDeformAttn

# hidden (B, Q, C) and boxes (B, Q, 4) after each decoder layer; the encoder's own outputs, if any
Decoded = tuple[list[Tensor], list[Tensor], dict[str, Tensor] | None]


@dataclass
class Tokens:
    """The pixels of all levels: L maps of C channels, flattened row by row and concatenated."""

    features: Tensor  # (B, S, C)
    positions: Tensor  # (B or 1, S, C) what is added to queries and keys
    shapes: list[tuple[int, int]]  # (height, width) of each level
    centres: Tensor  # (B, S, 2) (x, y), 0..1 across the image without its padding; float32
    padding_mask: Tensor | None  # (B, S) True = padding
    valid_ratios: Tensor | None  # (B, L, 2) what part of a map's (width, height) is image

    def on_maps(self, reference: Tensor) -> Tensor:
        """(B, Q, 2 or 4) relative to the image, to (B, Q, L or 1, 2 or 4) relative to the maps."""
        reference = reference.unsqueeze(2)
        if self.valid_ratios is None:
            return reference
        return reference * self.valid_ratios.repeat(1, 1, reference.shape[-1] // 2).unsqueeze(1)


def flatten_levels(
    maps: list[Tensor],
    positions: list[Tensor],
    padding_masks: list[Tensor] | None,
    level_embed: Tensor,
) -> Tokens:
    """Make tokens of feature maps.

    Args:
        maps: (B, C, H, W) of each level.
        positions: (B or 1, H, W, C) of each level.
        padding_masks: (B, H, W) of each level, True = padding; None where no image is padded.
        level_embed: (L, C) what tells the levels apart.
    """
    shapes = [(feature_map.shape[2], feature_map.shape[3]) for feature_map in maps]
    # 16-bit coordinates would be off by pixels.
    dtype = torch.promote_types(maps[0].dtype, torch.float32)
    centres, ratios = [], []
    for level, (height, width) in enumerate(shapes):
        y, x = (
            torch.arange(size, dtype=dtype, device=level_embed.device)[None] + 0.5
            for size in (height, width)
        )
        if padding_masks is None:
            y, x = y / height, x / width  # (1, H), (1, W)
        else:
            valid = ~padding_masks[level]
            rows = valid[:, :, 0].sum(1, keepdim=True).to(dtype)  # (B, 1)
            columns = valid[:, 0, :].sum(1, keepdim=True).to(dtype)
            y, x = y / rows, x / columns  # (B, H), (B, W)
            ratios.append(torch.cat([columns / width, rows / height], 1))
        grid = [x[:, None, :].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)]
        centres.append(torch.stack(grid, -1).flatten(1, 2))  # (B or 1, H * W, 2)
    return Tokens(
        features=torch.cat([feature_map.flatten(2) for feature_map in maps], 2).transpose(1, 2),
        positions=torch.cat(
            [
                position.flatten(1, 2) + embed
                for position, embed in zip(positions, level_embed, strict=True)
            ],
            1,
        ),
        shapes=shapes,
        centres=torch.cat(centres, 1).expand(maps[0].shape[0], -1, -1),
        padding_mask=(
            torch.cat([mask.flatten(1) for mask in padding_masks], 1) if padding_masks else None
        ),
        valid_ratios=torch.stack(ratios, 1) if ratios else None,
    )


def dense_attention(config: ModelConfig) -> nn.MultiheadAttention:
    """Attention of everything to everything, by ``scaled_dot_product_attention``."""
    return nn.MultiheadAttention(
        config.hidden_dim, config.num_heads, config.dropout, batch_first=True
    )


class FeedForward(nn.Module):
    """What the layers of encoder and decoder have in common."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.linear1 = nn.Linear(config.hidden_dim, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., C)."""
        return self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x)))))


class EncoderLayer(FeedForward):
    """Deformable self-attention of the tokens, then a feed-forward net; norms come after."""

    def __init__(self, config: ModelConfig, self_attn: nn.Module) -> None:
        super().__init__(config)
        self.self_attn = self_attn
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm2 = nn.LayerNorm(config.hidden_dim)

    def attend(self, features: Tensor, tokens: Tokens) -> Tensor:
        """Let each token look around its own place on every level."""
        return self.self_attn(
            features + tokens.positions,
            tokens.on_maps(tokens.centres),
            features,
            tokens.shapes,
            None,
            tokens.padding_mask,
        )

    def forward(self, features: Tensor, tokens: Tokens) -> Tensor:
        """(B, S, C) to (B, S, C)."""
        features = self.norm1(features + self.dropout(self.attend(features, tokens)))
        return self.norm2(features + self.feed_forward(features))


class DecoderLayer(FeedForward):
    """Self-attention of the queries, attention to the memory, then a feed-forward net."""

    def __init__(self, config: ModelConfig, cross_attn: nn.Module) -> None:
        super().__init__(config)
        self.self_attn = dense_attention(config)
        self.cross_attn = cross_attn
        # The original's numbers: norm2 follows the self-attention, norm1 the cross-attention.
        self.norm2 = nn.LayerNorm(config.hidden_dim)
        self.norm1 = nn.LayerNorm(config.hidden_dim)
        self.norm3 = nn.LayerNorm(config.hidden_dim)

    def attend(
        self, queries: Tensor, reference: Tensor | None, memory: Tensor, tokens: Tokens
    ) -> Tensor:
        """Let each query look around its reference point, or in its reference box."""
        return self.cross_attn(
            queries, tokens.on_maps(reference), memory, tokens.shapes, None, tokens.padding_mask
        )

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference: Tensor | None,
        memory: Tensor,
        tokens: Tokens,
    ) -> Tensor:
        """(B, Q, C) to (B, Q, C); ``reference`` is (B, Q, 2 or 4)."""
        placed = queries + query_pos
        attended, _ = self.self_attn(placed, placed, queries, need_weights=False)
        queries = self.norm2(queries + self.dropout(attended))
        attended = self.attend(queries + query_pos, reference, memory, tokens)
        queries = self.norm1(queries + self.dropout(attended))
        return self.norm3(queries + self.feed_forward(queries))


class Encoder(nn.Module):
    """Layers over the tokens; with ``recompute`` their activations are not kept for backward."""

    def __init__(self, layers: Iterable[nn.Module], recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.recompute = recompute

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the memory: (B, S, C)."""
        memory = tokens.features
        for layer in self.layers:
            if self.recompute and self.training:
                memory = checkpoint(layer, memory, tokens, use_reentrant=False)
            else:
                memory = layer(memory, tokens)
        return memory


class Decoder(nn.Module):
    """Layers over the queries; with ``box_refine`` each starts from the boxes of the one before."""

    def __init__(self, layers: Iterable[nn.Module], box_refine: bool, recompute: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.box_refine = box_refine
        self.recompute = recompute

    def forward(
        self,
        queries: Tensor,
        query_pos: Tensor,
        reference: Tensor | None,
        memory: Tensor,
        tokens: Tokens,
        bbox_embed: nn.ModuleList,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the hidden vectors (B, Q, C) and the boxes (B, Q, 4) after each layer."""
        hidden, boxes = [], []
        # Two-stage: the head after the last layer's is the encoder's.
        for layer, head in zip(self.layers, bbox_embed, strict=False):
            arguments = (queries, query_pos, reference, memory, tokens)
            if self.recompute and self.training:
                queries = checkpoint(layer, *arguments, use_reentrant=False)
            else:
                queries = layer(*arguments)
            hidden.append(queries)
            boxes.append(predict_boxes(head, queries, reference))
            if self.box_refine:
                reference = boxes[-1].detach()
        return hidden, boxes


def predict_boxes(head: nn.Module, hidden: Tensor, reference: Tensor | None) -> Tensor:
    """Boxes (B, Q, 4), centre form, from hidden vectors (B, Q, C).

    The head predicts logits. A reference of four numbers is added to all of them, one of two to
    the centre's; without a reference they stand for the image as a whole.
    """
    logits = head(hidden)
    if reference is not None:
        start = inverse_sigmoid(reference)
        logits = logits + F.pad(start, (0, 4 - start.shape[-1]))
    return logits.sigmoid()


class DeformableTransformer(nn.Module):
    """Encoder and decoder of Deformable DETR (arXiv 2010.04159).

    Args:
        config: the model's sizes.
        attention: the class of the attention modules.
        gradient_checkpointing: compute the layers' activations again in the backward pass.
    """

    def __init__(
        self,
        config: ModelConfig,
        attention: type[MSDeformAttn] = MSDeformAttn,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        channels = config.hidden_dim
        sizes = (channels, config.num_feature_levels, config.num_heads)
        self.num_queries = config.num_queries
        self.encoder = Encoder(
            [
                EncoderLayer(config, attention(*sizes, config.num_encoder_points))
                for _ in range(config.num_encoder_layers)
            ],
            gradient_checkpointing,
        )
        self.decoder = Decoder(
            [
                DecoderLayer(config, attention(*sizes, config.num_decoder_points))
                for _ in range(config.num_decoder_layers)
            ],
            config.box_refine,
            gradient_checkpointing,
        )
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, channels))
        self.two_stage = config.two_stage
        if config.two_stage:
            self.enc_output = nn.Linear(channels, channels)
            self.enc_output_norm = nn.LayerNorm(channels)
            self.pos_trans = nn.Linear(2 * channels, 2 * channels)
            self.pos_trans_norm = nn.LayerNorm(2 * channels)
        else:
            self.reference_points = nn.Linear(channels, 2)
        reset_transformer(self)

    def forward(
        self,
        tokens: Tokens,
        query_embed: Tensor | None,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
    ) -> Decoded:
        """Decode the tokens of a batch.

        Args:
            tokens: of the feature maps.
            query_embed: (Q, 2 * C) position and content of the queries; two-stage has none.
            class_embed: the heads, of which two-stage uses the last one on the tokens.
            bbox_embed: a head per decoder layer; two-stage has one more for the tokens.
        """
        memory = self.encoder(tokens)
        proposed = None
        if self.two_stage:
            query_pos, queries, reference, proposed = self.propose(
                memory, tokens, class_embed[-1], bbox_embed[-1]
            )
        else:
            query_pos, queries = split_queries(query_embed, tokens)
            reference = first_points(self.reference_points, query_pos, tokens)
        hidden, boxes = self.decoder(queries, query_pos, reference, memory, tokens, bbox_embed)
        return hidden, boxes, proposed

    def propose(
        self, memory: Tensor, tokens: Tokens, class_head: nn.Module, box_head: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """Make queries of the tokens that look most like an object; of all, if they are fewer.

        Every token proposes a box around itself, larger on coarser levels. Tokens of the padding,
        and those whose box is too close to the border or too large, propose with features zero and
        a box of ones.

        Returns:
            query_pos and queries (B, Q, C), reference boxes (B, Q, 4), and what all tokens
            predicted: ``pred_logits`` (B, S, classes), of which only the first class is trained,
            and ``pred_boxes`` (B, S, 4).
        """
        centres = tokens.centres
        sizes = [
            centres.new_full((height * width,), 0.05 * 2**level)
            for level, (height, width) in enumerate(tokens.shapes)
        ]
        anchors = torch.cat(
            [centres, torch.cat(sizes)[:, None].expand_as(centres)], -1
        )  # (B, S, 4)
        usable = ((anchors > 0.01) & (anchors < 0.99)).all(-1, keepdim=True)  # (B, S, 1)
        if tokens.padding_mask is not None:
            usable = usable & ~tokens.padding_mask.unsqueeze(-1)
        anchor_logits = (anchors / (1 - anchors)).log().masked_fill(~usable, torch.inf)

        features = self.enc_output_norm(self.enc_output(memory.masked_fill(~usable, 0)))
        class_logits = class_head(features)
        box_logits = box_head(features) + anchor_logits
        num_queries = min(self.num_queries, memory.shape[1])
        best = class_logits[..., 0].topk(num_queries, dim=1).indices  # (B, Q)
        reference = box_logits.gather(1, best.unsqueeze(-1).expand(-1, -1, 4)).detach().sigmoid()

        channels = memory.shape[-1]
        places = sine_features(reference * (2 * torch.pi), channels // 2)  # (B, Q, 4, C / 2)
        places = places.flatten(2).to(memory.dtype)
        query_pos, queries = self.pos_trans_norm(self.pos_trans(places)).split(channels, -1)
        proposed = {"pred_logits": class_logits, "pred_boxes": box_logits.sigmoid()}
        return query_pos, queries, reference, proposed


def split_queries(query_embed: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """(Q, 2 * C) to positions and contents, each (B, Q, C)."""
    batch = tokens.features.shape[0]
    query_pos, queries = query_embed.expand(batch, -1, -1).chunk(2, -1)
    return query_pos, queries


def first_points(layer: nn.Linear, query_pos: Tensor, tokens: Tokens) -> Tensor:
    """Reference points (B, Q, 2) of queries (B, Q, C), in float32 whatever autocast says."""
    with torch.autocast(query_pos.device.type, enabled=False):
        return layer(query_pos).to(tokens.centres.dtype).sigmoid()


def reset_transformer(transformer: nn.Module) -> None:
    """Initialise as the original does."""
    for parameter in transformer.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for module in transformer.modules():
        if isinstance(module, MSDeformAttn):
            module.reset_parameters()
    if hasattr(transformer, "reference_points"):
        nn.init.zeros_(transformer.reference_points.bias)
    nn.init.normal_(transformer.level_embed)
