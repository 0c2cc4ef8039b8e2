"""FLOPs of the operators, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Import this module before the counter is made; without it the operators count as nothing::

    import msda.flops
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(images)
    counter.get_total_flops()

``import msda`` does not import it, because ``torch.utils.flop_counter`` imports Triton where that
is installed.

The rule: what is done once for each sample and channel counts, and a multiply-add is 2 FLOPs, as
PyTorch counts matrix products. There are B * Q * M * K samples of D channels, with K the points of
all levels.

- Forward: 5 multiply-adds, 4 for the bilinear interpolation and 1 for the weighted sum: the factor
  of 5 in the paper's complexity (arXiv 2010.04159, appendix A.1). Nearest: 1.
- Gradient of values: 5, the same multiply-adds transposed. Nearest: 1.
- Gradients of locations and weights: 4, the products of the output's gradient with the four
  corners, from which the gradients of both follow. Nearest: 1, for the weights.

What is done once for each sample is left out: coordinates, the softmax and where the fused form
gets its locations from; PyTorch's own rules leave out such steps too. Samples outside their map
count like all others, and so does what a kernel saves by folding weights into corners.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.utils.flop_counter import register_flop_formula

from msda import ops

if ops.LIBRARY is None:
    raise ImportError(
        f"msda.flops counts what the compiled library computes, but {ops.BACKEND_REASON}"
    )

FLOPS_PER_MULTIPLY_ADD = 2
Shape = Sequence[int]


def _flops(value: Shape, weights: Shape, multiply_adds: int) -> int:
    """FLOPs of so many multiply-adds for each sample and channel; values (B, S, M, D)."""
    return FLOPS_PER_MULTIPLY_ADD * multiply_adds * math.prod(weights) * value[3]


def _forward_multiply_adds(nearest: bool) -> int:
    return 1 if nearest else 5


def _backward_multiply_adds(
    nearest: bool, needs_value: bool, needs_locations: bool, needs_weights: bool
) -> int:
    if nearest:
        return needs_value + needs_weights
    return 5 * needs_value + 4 * (needs_locations or needs_weights)


@register_flop_formula(torch.ops.msda.ms_deform_attn)
def _forward(
    value: Shape,
    spatial_shapes: Shape,
    spatial_shapes_tensor: Shape | None,
    level_start_index: Shape | None,
    sampling_locations: Shape,
    attention_weights: Shape,
    num_points: Shape,
    nearest: bool,
    *,
    out_shape: Shape,
) -> int:
    return _flops(value, attention_weights, _forward_multiply_adds(nearest))


@register_flop_formula(torch.ops.msda._ms_deform_attn_backward)
def _backward(
    grad_output: Shape,
    value: Shape,
    spatial_shapes: Shape,
    spatial_shapes_tensor: Shape | None,
    level_start_index: Shape | None,
    sampling_locations: Shape,
    attention_weights: Shape,
    num_points: Shape,
    nearest: bool,
    needs_value: bool,
    needs_locations: bool,
    needs_weights: bool,
    deterministic: bool = False,
    *,
    out_shape: Sequence[Shape],
) -> int:
    multiply_adds = _backward_multiply_adds(nearest, needs_value, needs_locations, needs_weights)
    return _flops(value, attention_weights, multiply_adds)


@register_flop_formula(torch.ops.msda.ms_deform_attn_fused)
def _fused_forward(
    value: Shape,
    spatial_shapes: Shape,
    spatial_shapes_tensor: Shape | None,
    level_start_index: Shape | None,
    reference_points: Shape,
    sampling_offsets: Shape,
    attention_logits: Shape,
    num_points: Shape,
    padding_mask: Shape | None,
    *,
    out_shape: Shape,
) -> int:
    return _flops(value, attention_logits, _forward_multiply_adds(nearest=False))


@register_flop_formula(torch.ops.msda._ms_deform_attn_fused_backward)
def _fused_backward(
    grad_output: Shape,
    output: Shape,
    value: Shape,
    spatial_shapes: Shape,
    spatial_shapes_tensor: Shape | None,
    level_start_index: Shape | None,
    reference_points: Shape,
    sampling_offsets: Shape,
    attention_logits: Shape,
    num_points: Shape,
    padding_mask: Shape | None,
    needs_value: bool,
    needs_reference: bool,
    needs_offsets: bool,
    needs_logits: bool,
    deterministic: bool = False,
    *,
    out_shape: Sequence[Shape],
) -> int:
    needs_locations = needs_reference or needs_offsets
    multiply_adds = _backward_multiply_adds(False, needs_value, needs_locations, needs_logits)
    return _flops(value, attention_logits, multiply_adds)
