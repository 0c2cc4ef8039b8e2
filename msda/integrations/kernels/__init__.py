"""A layer for ``kernelize`` of Hugging Face's `kernels` package, and the repository it comes from.

This folder is a kernel repository for every device: `kernels` loads it from the disk, nothing from
its hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from msda.functional import ms_deform_attn

__all__ = ["REPOSITORY", "MultiScaleDeformableAttention"]

REPOSITORY = Path(__file__).parent
"""The folder to give to ``kernels.LocalLayerRepository``."""


class MultiScaleDeformableAttention(nn.Module):
    """The core of multi-scale deformable attention, as transformers names and calls it.

    It has no parameters and no state: ``kernelize`` puts its ``forward`` in place of that of
    the layers which the library calls "MultiScaleDeformableAttention".

    Example:
        >>> from kernels import LocalLayerRepository, Mode, kernelize, use_kernel_mapping
        >>> from msda.integrations.kernels import REPOSITORY
        >>> name = "MultiScaleDeformableAttention"
        >>> layer = LocalLayerRepository(REPOSITORY, layer_name=name)
        >>> with use_kernel_mapping({name: {"cpu": layer, "cuda": layer}}):
        ...     kernelize(model, mode=Mode.TRAINING)  # doctest: +SKIP
    """

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int,
    ) -> Tensor:
        """Compute :func:`msda.ms_deform_attn`.

        Args:
            value: (B, S, M, D) in any of the four dtypes.
            value_spatial_shapes: (L, 2) rows (height, width); not read, the list below says it.
            value_spatial_shapes_list: the same as pairs of ints.
            level_start_index: (L,) not read: it follows from the shapes.
            sampling_locations: (B, Q, M, L, P, 2) last axis (x, y), 0..1.
            attention_weights: (B, Q, M, L, P) after the softmax.
            im2col_step: accepted and ignored.

        Returns:
            (B, Q, M * D) in the dtype of ``value``, differentiable.

        Raises:
            RuntimeError: as :func:`msda.ms_deform_attn`.
        """
        return ms_deform_attn(
            value, value_spatial_shapes_list, None, sampling_locations, attention_weights
        )
