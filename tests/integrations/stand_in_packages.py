"""Packages that stand for those whose extensions msda.drop_in provides."""

import sys

LIBRARIES = (
    "MultiScaleDeformableAttention",
    "groundingdino",
    "detrex",
    "mmcv",
    "DCNv4",
    "research",
)

# What the libraries are made of, as far as the operator goes.
WRAPPER = """
    import torch

    {import_extension}

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, start, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, start, locations, weights)
            return extension.ms_deform_attn_forward(value, shapes, start, locations, weights, step)

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, grad_output):
            gradients = extension.ms_deform_attn_backward(*ctx.saved_tensors, grad_output, ctx.step)
            grad_value, grad_locations, grad_weights = gradients
            return grad_value, None, None, grad_locations, grad_weights, None

    def multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    ):
        return "slow"
"""
RESEARCH = WRAPPER.format(import_extension="import MultiScaleDeformableAttention as extension")
GROUNDING_DINO = WRAPPER.format(
    import_extension="""
    import warnings
    try:
        from groundingdino import _C
    except:
        warnings.warn("no compiled operator")
    """
).replace("extension.ms", "_C.ms")
DETREX = (
    WRAPPER.format(import_extension="").replace("extension.ms", "_C.ms")
    + """
    try:
        from detrex import _C
    except ImportError:
        Attention = None
"""
)
MMCV_LOADER = """
    import importlib

    def load_ext(name, functions):
        extension = importlib.import_module("mmcv." + name)
        for function in functions:
            assert hasattr(extension, function), function
        return extension
"""
MMCV_OPS = """
    from ..utils.ext_loader import load_ext
    boxes = load_ext("_ext", ["nms", "roi_align_forward"])
    info = load_ext("_ext", ["get_compiler_version"])
    from .multi_scale_deform_attn import Attention
"""
MMCV = """
    import torch
    from ..utils.ext_loader import load_ext

    extension = ext_module = load_ext("_ext", ["ms_deform_attn_backward", "ms_deform_attn_forward"])

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, start, locations, weights, step):
            ctx.step = step
            ctx.save_for_backward(value, shapes, start, locations, weights)
            return extension.ms_deform_attn_forward(
                value, shapes, start, locations, weights, im2col_step=step
            )

        @staticmethod
        def backward(ctx, grad_output):
            value, shapes, start, locations, weights = ctx.saved_tensors
            gradients = [torch.full_like(t, float("nan")) for t in (value, locations, weights)]
            nothing = extension.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), *gradients, im2col_step=ctx.step
            )
            assert nothing is None
            return gradients[0], None, None, gradients[1], gradients[2], None

    def multi_scale_deformable_attn_pytorch(
        value, value_spatial_shapes, sampling_locations, attention_weights
    ):
        return "slow"
"""
FLASH = """
    import torch
    from DCNv4 import ext

    class Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value, shapes, start, packed, step, num_points):
            ctx.options = step, num_points
            ctx.save_for_backward(value, shapes, start, packed)
            return ext.flash_deform_attn_forward(
                value, shapes, start, packed, step, num_points, 8, 512
            )

        @staticmethod
        def backward(ctx, grad_output):
            grad_value, grad_packed = ext.flash_deform_attn_backward(
                *ctx.saved_tensors, grad_output.contiguous(), *ctx.options, 2, 256
            )
            return grad_value, None, None, grad_packed, None, None
"""
PACKAGES = {
    "research/attention.py": RESEARCH,
    "groundingdino/models/GroundingDINO/ms_deform_attn.py": GROUNDING_DINO,
    "detrex/layers/multi_scale_deform_attn.py": DETREX,
    "mmcv/utils/ext_loader.py": MMCV_LOADER,
    "mmcv/ops/__init__.py": MMCV_OPS,
    "mmcv/ops/multi_scale_deform_attn.py": MMCV,
    "DCNv4/functions/flash.py": FLASH,
}
USERS = {
    "research": "research.attention",
    "groundingdino": "groundingdino.models.GroundingDINO.ms_deform_attn",
    "detrex": "detrex.layers.multi_scale_deform_attn",
    "mmcv": "mmcv.ops.multi_scale_deform_attn",
}
REAL = """
    def ms_deform_attn_forward(*arguments):
        return "real"

    def ms_deform_attn_backward(*arguments):
        return "real"

    def something_else():
        return "kept"
"""


def forget():
    for name in list(sys.modules):
        if name.partition(".")[0] in LIBRARIES:
            del sys.modules[name]


def status(report):
    return {entry.module: entry.status for entry in report}
