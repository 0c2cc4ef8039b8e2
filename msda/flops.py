"""FLOPs of the operators, for :class:`torch.utils.flop_counter.FlopCounterMode`.

Import this module before the counter is made; without it the operators count as nothing::

    import msda.flops
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        model(images)
    counter.get_total_flops()

``import msda`` does not import it, because ``torch.utils.flop_counter`` imports Triton where that
is installed.

The rule: work that is done once for each sample and channel counts, and a multiply-add is 2 FLOPs,
as PyTorch counts matrix products. There are B * Q * M * K samples of D channels, with K the points
of all levels.

- Forward: 5 multiply-adds, 4 for the bilinear interpolation and 1 for the weighted sum: the factor
  of 5 in the paper's complexity (arXiv 2010.04159, appendix A.1). Nearest: 1.
- Gradient of values: 5, the same multiply-adds transposed. Nearest: 1.
- Gradients of locations and weights: 4, the products of the output's gradient with the four
  corners, from which the gradients of both follow. Nearest: 1, for the weights.

Work that is done once for each sample does not count: coordinates, the softmax, the locations of
the fused form; PyTorch's own rules leave out such steps too. Samples outside their map count like
all others, and so do multiply-adds that a kernel saves by folding weights into corners.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from msda import ops

if ops.LIBRARY is None:
    raise ImportError(
        f"msda.flops counts what the compiled library computes, but {ops.BACKEND_REASON}"
    )

FLOPS_PER_MULTIPLY_ADD = 2


def _register(name: str) -> None:
    names = ops.argument_names(name)

    @register_flop_formula(getattr(torch.ops.msda, name))
    def count(*given: Any, out_shape: Any, **named: Any) -> int:
        arguments = dict(zip(names, given, strict=False)) | named  # shapes in place of tensors
        is_fused = "attention_logits" in arguments
        weights = arguments["attention_logits" if is_fused else "attention_weights"]
        num_samples, head_dim = math.prod(weights), arguments["value"][3]
        return FLOPS_PER_MULTIPLY_ADD * _multiply_adds(arguments) * num_samples * head_dim


def _multiply_adds(arguments: Mapping[str, Any]) -> int:
    """Multiply-adds for each sample and channel."""
    nearest = arguments.get("nearest", False)  # the fused form has no such argument
    if "grad_output" not in arguments:
        return 1 if nearest else 5
    of_locations = any(
        arguments.get(flag) for flag in ("needs_locations", "needs_reference", "needs_offsets")
    )
    of_weights = bool(arguments.get("needs_weights") or arguments.get("needs_logits"))
    if nearest:
        return arguments["needs_value"] + of_weights
    return 5 * arguments["needs_value"] + 4 * (of_locations or of_weights)


for _name in (
    "ms_deform_attn",
    "_ms_deform_attn_backward",
    "ms_deform_attn_fused",
    "_ms_deform_attn_fused_backward",
):
    _register(_name)
