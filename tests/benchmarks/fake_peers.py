"""Sources of peers of every kind, made from the reference."""

ORIGINAL = """
import torch
from msda.reference import ms_deform_attn_reference

def ms_deform_attn_forward(value, shapes, start, locations, weights, im2col_step):
    assert shapes.dtype == start.dtype == torch.int64 and value.shape[0] % im2col_step == 0
    return ms_deform_attn_reference(value, shapes, start, locations, weights)

def _gradients(value, shapes, start, locations, weights, grad_output):
    tensors = [t.detach().requires_grad_() for t in (value, locations, weights)]
    with torch.enable_grad():
        output = ms_deform_attn_reference(tensors[0], shapes, start, *tensors[1:])
        return torch.autograd.grad(output, tensors, grad_output)
"""
RETURNS = """
def ms_deform_attn_backward(value, shapes, start, loc, attn, grad_output, im2col_step):
    return list(_gradients(value, shapes, start, loc, attn, grad_output))
"""
FILLS = """
def ms_deform_attn_backward(value, value_spatial_shapes, value_level_start_index,
                            sampling_locations, attention_weights, grad_output, grad_value,
                            grad_sampling_loc, grad_attn_weight, im2col_step):
    given = (value, value_spatial_shapes, value_level_start_index, sampling_locations,
             attention_weights, grad_output)
    for result, gradient in zip((grad_value, grad_sampling_loc, grad_attn_weight),
                                _gradients(*given)):
        result.add_(gradient)  # as atomics do
"""
# Swaps x and y.
WRONG = (
    RETURNS
    + """
_right = ms_deform_attn_forward
def ms_deform_attn_forward(value, shapes, start, locations, weights, im2col_step):
    return _right(value, shapes, start, locations.flip(-1), weights, im2col_step)
"""
)
TRITON = """
from msda.reference import ms_deform_attn_reference

def triton_multiscale_deformable_attention(img, img_shapes, sampling_points, attention_weights,
                                           padding_mode, align_corners):
    assert padding_mode == "zeros" and not align_corners
    output = ms_deform_attn_reference(img, img_shapes, None, sampling_points, attention_weights)
    return output.unflatten(-1, (img.shape[2], -1))
"""
LAYER = """
from torch import nn
from msda.reference import ms_deform_attn_reference

class MultiScaleDeformableAttention(nn.Module):
    def forward(self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index,
                sampling_locations, attention_weights, im2col_step):
        assert all(isinstance(height, int) for height, _ in value_spatial_shapes_list)
        return ms_deform_attn_reference(value, value_spatial_shapes_list, level_start_index,
                                        sampling_locations, attention_weights)
"""
FLASH = """
from msda.reference import ms_deform_attn_reference

class FlashDeformAttnFunction:
    @staticmethod
    def apply(value, shapes, start, locations_and_logits, im2col_step, K=8):
        levels = shapes.shape[0]
        locations, logits = locations_and_logits.split([2 * levels * K, levels * K], -1)
        weights = logits.softmax(-1).unflatten(-1, (levels, K))
        locations = locations.unflatten(-1, (levels, K, 2))
        return ms_deform_attn_reference(value, shapes, start, locations, weights)
"""
KINDS = {
    "returns": (ORIGINAL + RETURNS, "compiled"),
    "fills": (ORIGINAL + FILLS, "compiled"),
    "triton": (TRITON, "Triton"),
    "layer": (LAYER, "layer"),
    "flash": (FLASH, "flash"),
}
