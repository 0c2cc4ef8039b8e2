"""Multi-scale deformable attention (arXiv 2010.04159): one operator for CPU and CUDA."""

from msda._info import info
from msda._version import __version__
from msda.forms import register_core
from msda.functional import ms_deform_attn, ms_deform_attn_fused
from msda.modules import MSDeformAttn
from msda.patching import report, undo, use_msda

__all__ = [
    "MSDeformAttn",
    "__version__",
    "info",
    "ms_deform_attn",
    "ms_deform_attn_fused",
    "register_core",
    "report",
    "undo",
    "use_msda",
]
