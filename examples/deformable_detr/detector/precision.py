"""Mixed precision: which of it there is, and where it is slow."""

from __future__ import annotations

import logging

import torch

logger = logging.getLogger(__name__)

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# What x86 processors call their instructions for it.
_INSTRUCTIONS = {"bf16": ("avx512_bf16", "amx_bf16"), "fp16": ("avx512_fp16", "amx_fp16")}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """The context in which a model runs with mixed precision ``amp``, of ``AUTOCAST``."""
    dtype = AUTOCAST[amp]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def warn_if_slow(device: torch.device, amp: str) -> None:
    """Say so where the processor has no instructions for ``amp``, and computes it by detours."""
    if device.type != "cpu" or amp == "off":
        return
    # Older versions of torch cannot tell, and names of other processors are others.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    known = capabilities.get("architecture") == "x86_64"
    if known and not any(capabilities.get(name) for name in _INSTRUCTIONS[amp]):
        logger.warning(
            "this processor has no instructions for %s: --amp off is faster than --amp %s", amp, amp
        )
