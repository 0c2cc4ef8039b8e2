"""The dense arm of the comparison: every query attends to every token of every level."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detector.config import ModelConfig
from detector.transformer import (
    Decoded,
    Decoder,
    DecoderLayer,
    Encoder,
    EncoderLayer,
    Tokens,
    dense_attention,
    first_points,
    reset_transformer,
    split_queries,
)


class DenseEncoderLayer(EncoderLayer):
    """The encoder's layer with dense self-attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, dense_attention(config))

    def attend(self, features: Tensor, tokens: Tokens) -> Tensor:
        """Let each token look at all tokens."""
        placed = features + tokens.positions
        return self.self_attn(
            placed, placed, features, key_padding_mask=tokens.padding_mask, need_weights=False
        )[0]


class DenseDecoderLayer(DecoderLayer):
    """The decoder's layer with dense attention to the memory; the reference is not looked at."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, dense_attention(config))

    def attend(
        self, queries: Tensor, reference: Tensor | None, memory: Tensor, tokens: Tokens
    ) -> Tensor:
        """Let each query look at all tokens."""
        return self.cross_attn(
            queries,
            memory + tokens.positions,
            memory,
            key_padding_mask=tokens.padding_mask,
            need_weights=False,
        )[0]


class DenseTransformer(nn.Module):
    """Encoder and decoder with the sizes of :class:`DeformableTransformer` and dense attention.

    With ``reference_boxes`` all but the attention is as in the deformable model: queries have a
    learned position and content, boxes are predicted relative to reference points, and may be
    refined from layer to layer. Without, queries and boxes are DETR's (arXiv 2005.12872): contents
    start at zero, boxes are absolute.

    Args:
        config: the model's sizes.
        gradient_checkpointing: compute the layers' activations again in the backward pass.
    """

    def __init__(self, config: ModelConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder(
            [DenseEncoderLayer(config) for _ in range(config.num_encoder_layers)],
            gradient_checkpointing,
        )
        self.decoder = Decoder(
            [DenseDecoderLayer(config) for _ in range(config.num_decoder_layers)],
            config.box_refine,
            gradient_checkpointing,
        )
        self.level_embed = nn.Parameter(torch.empty(config.num_feature_levels, config.hidden_dim))
        self.reference_boxes = config.reference_boxes
        if config.reference_boxes:
            self.reference_points = nn.Linear(config.hidden_dim, 2)
        reset_transformer(self)

    def forward(
        self,
        tokens: Tokens,
        query_embed: Tensor,
        class_embed: nn.ModuleList,
        bbox_embed: nn.ModuleList,
    ) -> Decoded:
        """As :meth:`DeformableTransformer.forward`; DETR's ``query_embed`` is (Q, C)."""
        memory = self.encoder(tokens)
        if self.reference_boxes:
            query_pos, queries = split_queries(query_embed, tokens)
            reference = first_points(self.reference_points, query_pos, tokens)
        else:
            query_pos = query_embed.expand(tokens.features.shape[0], -1, -1)
            queries, reference = torch.zeros_like(query_pos), None
        hidden, boxes = self.decoder(queries, query_pos, reference, memory, tokens, bbox_embed)
        return hidden, boxes, None
