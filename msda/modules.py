"""The attention module of Deformable DETR."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from msda.functional import as_ints, check_tensor, ms_deform_attn_fused
from msda.reference import SpatialShapes


def _positive_ints(name: str, numbers: Iterable[Any], given: object) -> list[int]:
    """The numbers as Python ints; ``given`` is what the caller wrote."""
    try:
        ints = as_ints(numbers, name)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {given!r}") from None
    if min(ints, default=1) <= 0:
        raise ValueError(f"{name} must be positive, got {given}")
    return ints


class MSDeformAttn(nn.Module):
    """Multi-scale deformable attention (arXiv 2010.04159, section 4.1).

    Constructor, parameter names and shapes, initialisation and ``forward`` are those of the
    original implementation, so its checkpoints load and its callers work. Each query predicts, for
    every head, level and point, an offset from its reference point and an attention logit;
    :func:`msda.ms_deform_attn_fused` does the rest.

    Under autocast the four projections run in the autocast dtype, while sampling coordinates,
    softmax and sums stay float32 inside the kernel.

    Args:
        d_model: channels C of query, input and output; a multiple of ``n_heads``.
        n_levels: levels L of the feature pyramid.
        n_heads: attention heads M.
        n_points: points P sampled per head and level, or one count per level.

    Raises:
        TypeError: an argument is no int (NumPy's are).
        ValueError: an argument is not positive, ``d_model`` is no multiple of ``n_heads``, or
            ``n_points`` is a sequence whose length is not ``n_levels``.

    Example:
        >>> attention = MSDeformAttn(d_model=256, n_levels=2, n_heads=8, n_points=4)
        >>> features = torch.rand(1, 32 * 48 + 16 * 24, 256)
        >>> query, reference_points = torch.rand(1, 100, 256), torch.rand(1, 100, 2, 2)
        >>> attention(query, reference_points, features, [(32, 48), (16, 24)]).shape
        torch.Size([1, 100, 256])
    """

    def __init__(
        self,
        d_model: int = 256,
        n_levels: int = 4,
        n_heads: int = 8,
        n_points: int | Sequence[int] = 4,
    ) -> None:
        super().__init__()
        (d_model,) = _positive_ints("d_model", [d_model], d_model)
        (n_levels,) = _positive_ints("n_levels", [n_levels], n_levels)
        (n_heads,) = _positive_ints("n_heads", [n_heads], n_heads)
        if d_model % n_heads != 0:
            raise ValueError(
                f"d_model must be a multiple of n_heads, got d_model={d_model}, n_heads={n_heads}"
            )
        if isinstance(n_points, Iterable):
            n_points = self.points_per_level = _positive_ints("n_points", n_points, n_points)
            if len(n_points) != n_levels:
                raise ValueError(
                    f"n_points must hold one count per level (n_levels={n_levels}), got {n_points}"
                )
        else:
            (n_points,) = _positive_ints("n_points", [n_points], n_points)
            self.points_per_level = [n_points] * n_levels
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points

        num_samples = n_heads * sum(self.points_per_level)
        self.sampling_offsets = nn.Linear(d_model, num_samples * 2)
        self.attention_weights = nn.Linear(d_model, num_samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the paper does (appendix A.4): head m looks along angle 2 pi m / M.

        The offset of point p is p + 1 pixels long in the larger of its two coordinates, on every
        level; attention starts uniform.
        """
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        direction = torch.stack([angles.cos(), angles.sin()], -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.tensor([p + 1.0 for count in self.points_per_level for p in range(count)])
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            offsets = direction[:, None, :] * distance[None, :, None]  # (M, K, 2)
            self.sampling_offsets.bias.copy_(offsets.flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | Sequence[int] | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from each query to points sampled around its reference points.

        Args:
            query: (B, Q, C) queries, positional embedding included.
            reference_points: (B, Q, L, 2) points (x, y), or (B, Q, L, 4) boxes (centre x, centre y,
                width, height), 0..1 across the padded image; L may be 1 where all levels share
                them.
            input_flatten: (B, S, C) feature maps, flattened and concatenated.
            input_spatial_shapes: (L, 2) rows (height, width): int pairs, or an integer tensor. A
                CUDA tensor is not read on the host.
            input_level_start_index: (L,) first row of each level in S; may be None.
            input_padding_mask: (B, S) bool, True = padding: reads as zero.

        Returns:
            (B, Q, C) attended features, after the output projection.

        Raises:
            TypeError: an argument that must be a tensor is none.
            ValueError: channels or reference points do not fit the module.
            RuntimeError: as :func:`msda.ms_deform_attn_fused`.
        """
        for name, tensor in (("query", query), ("input_flatten", input_flatten)):
            check_tensor(tensor, name)
            if tensor.dim() != 3 or tensor.shape[-1] != self.d_model:
                raise ValueError(
                    f"{name} must have shape (B, length, {self.d_model}), got {tuple(tensor.shape)}"
                )
        check_tensor(reference_points, "reference_points")
        if reference_points.dim() != 4 or reference_points.shape[-1] not in (2, 4):
            raise ValueError(
                "reference_points must have shape (B, Q, L, 2 or 4), "
                f"got {tuple(reference_points.shape)}"
            )
        ragged = not isinstance(self.n_points, int)
        sample_axes = (-1,) if ragged else (self.n_levels, self.n_points)

        value = self.value_proj(input_flatten).unflatten(-1, (self.n_heads, -1))  # (B, S, M, D)
        offsets = self.sampling_offsets(query).unflatten(-1, (self.n_heads, *sample_axes, 2))
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, *sample_axes))
        output = ms_deform_attn_fused(
            value,
            input_spatial_shapes,
            input_level_start_index,
            reference_points,
            offsets,  # (B, Q, M, L, P, 2), or (B, Q, M, K, 2) where n_points is a list
            logits,  # (B, Q, M, L, P), or (B, Q, M, K)
            num_points=self.points_per_level if ragged else None,
            padding_mask=input_padding_mask,
        )
        return self.output_proj(output)  # (B, Q, C)

    def __prepare_scriptable__(self) -> nn.Module:
        """Refuse ``torch.jit.script``, which has no types for sizes given in several ways."""
        raise NotImplementedError(
            "MSDeformAttn must be traced (torch.jit.trace), exported (torch.export) or compiled "
            "(torch.compile), got torch.jit.script"
        )

    def extra_repr(self) -> str:
        """Constructor arguments, for ``print``."""
        return (
            f"d_model={self.d_model}, n_levels={self.n_levels}, "
            f"n_heads={self.n_heads}, n_points={self.n_points}"
        )
