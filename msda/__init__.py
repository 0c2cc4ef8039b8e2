"""Multi-scale deformable attention (arXiv 2010.04159): one operator for CPU and CUDA."""

from msda._version import __version__

try:
    from msda.forms import register_core
    from msda.functional import ms_deform_attn, ms_deform_attn_fused
    from msda.installation import info
    from msda.modules import MSDeformAttn
    from msda.patching import report, undo, use_msda
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise

    # Without torch there are only msda.numpy and msda.openvino.
    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(f"msda.{name} needs torch >= 2.10, which is not installed")
        raise AttributeError(f"module 'msda' has no attribute {name!r}")


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
