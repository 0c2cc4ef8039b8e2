"""Where a pixel of a feature map is, as a vector."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def sine_features(x: Tensor, num_features: int) -> Tensor:
    """(...) to (..., num_features): sine and cosine in turn, of ever slower multiples of x."""
    exponents = torch.arange(0, num_features, 2, dtype=x.dtype, device=x.device) / num_features
    angles = x[..., None] / 10000**exponents
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


class SineEmbedding(nn.Module):
    """Sine features of the row, then of the column, each 0..2 pi across the image.

    Args:
        num_features: channels C, half of them for each axis.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor, padding_mask: Tensor | None) -> Tensor:
        """Embed the pixels of one level.

        Args:
            features: (B, C, H, W) of which only size, dtype and device matter.
            padding_mask: (B, H, W) True = padding; None where no image is padded.

        Returns:
            (B or 1, H, W, C) in the dtype of ``features``, computed in float32 at least.
        """
        height, width = features.shape[-2:]
        dtype = torch.promote_types(features.dtype, torch.float32)
        if padding_mask is None:
            y = torch.arange(1, height + 1, dtype=dtype, device=features.device).view(1, -1, 1)
            x = torch.arange(1, width + 1, dtype=dtype, device=features.device).view(1, 1, -1)
        else:
            valid = (~padding_mask).to(dtype)
            y, x = valid.cumsum(1), valid.cumsum(2)  # (B, H, W), counted from 1
        # The last entry is the number of rows (columns) that are not padding.
        y = (y - 0.5) / (y[:, -1:, :] + 1e-6) * (2 * math.pi)
        x = (x - 0.5) / (x[:, :, -1:] + 1e-6) * (2 * math.pi)
        y, x = (
            sine_features(axis, self.num_features // 2).expand(-1, height, width, -1)
            for axis in (y, x)
        )
        return torch.cat([y, x], -1).to(features.dtype)


class LearnedEmbedding(nn.Module):
    """One trained vector for each column and one for each row, side by side.

    Args:
        num_features: channels C, half of them for each axis.
    """

    max_size = 50  # the original's

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.row_embed = nn.Embedding(self.max_size, num_features // 2)
        self.col_embed = nn.Embedding(self.max_size, num_features // 2)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, features: Tensor, padding_mask: Tensor | None) -> Tensor:
        """As :meth:`SineEmbedding.forward`; the padding does not matter."""
        height, width = features.shape[-2:]
        if max(height, width) > self.max_size:
            raise ValueError(
                f"position_embedding must be 'sine' for feature maps above {self.max_size} x "
                f"{self.max_size}, got 'learned' and a map of {height} x {width}"
            )
        x = self.col_embed.weight[:width].expand(height, -1, -1)
        y = self.row_embed.weight[:height, None].expand(-1, width, -1)
        return torch.cat([x, y], -1)[None].to(features.dtype)
