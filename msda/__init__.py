"""Multi-scale deformable attention (arXiv 2010.04159): one operator for CPU and CUDA."""

from msda._info import info
from msda._version import __version__
from msda.functional import ms_deform_attn, ms_deform_attn_fused
from msda.modules import MSDeformAttn

__all__ = ["MSDeformAttn", "__version__", "info", "ms_deform_attn", "ms_deform_attn_fused"]
