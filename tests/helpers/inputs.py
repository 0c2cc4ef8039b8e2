"""Inputs in another layout or precision, or with other points."""

import types
from dataclasses import replace

import torch

from msda.testing import FusedInputs, map_tensors


def in_float64(inputs):
    exact = map_tensors(inputs, lambda tensor: tensor.detach().double().cpu())
    mask = getattr(exact, "padding_mask", None)
    return exact if mask is None else replace(exact, padding_mask=mask.cpu())


def off_by_one_byte(tensor):
    """A copy that begins one byte past an address aligned to its elements."""
    data = torch.empty(tensor.nbytes + 1, dtype=torch.uint8, device=tensor.device)
    data[1:] = tensor.contiguous().view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        shifted = torch.frombuffer(data.numpy(), dtype=tensor.dtype, offset=1)
    else:
        integer, size = f"<i{tensor.element_size()}", (tensor.numel(),)
        place = dict(data=(data.data_ptr() + 1, False), typestr=integer, shape=size, version=2)
        owner = types.SimpleNamespace(data=data, __cuda_array_interface__=place)
        shifted = torch.as_tensor(owner, device=tensor.device).view(tensor.dtype)
    assert shifted.data_ptr() % tensor.element_size() == 1
    return shifted.view(tensor.shape)


def to_pixels(inputs):
    """Points (B, Q, M, K, 2) as given, and the ``origin`` and ``step`` that make pixels of them.

    All in float64; the pixel coordinates are origin + step * points.
    """
    shapes, num_levels = inputs.spatial_shapes, len(inputs.spatial_shapes)
    fused = isinstance(inputs, FusedInputs)
    given = inputs.sampling_offsets if fused else inputs.sampling_locations
    ragged = inputs.num_points is not None
    counts = inputs.num_points if ragged else [given.shape[4]] * num_levels
    levels = torch.tensor(
        [level for level, count in enumerate(counts) for _ in range(count)]
    ).long()
    size = torch.tensor([(width, height) for height, width in shapes]).double()[levels]  # (K, 2)
    points = given.double().cpu().flatten(3, -2)
    if not fused:
        return points, torch.tensor(-0.5).double(), size
    reference = inputs.reference_points.double().cpu().expand(-1, -1, num_levels, -1)
    reference = reference[:, :, levels].unsqueeze(2)  # (B, Q, 1, K, 2 or 4)
    origin, step = reference[..., :2] * size - 0.5, torch.ones(()).double()
    if reference.shape[-1] == 4:
        count_of_sample = torch.tensor(counts).double()[levels].unsqueeze(-1)
        step = reference[..., 2:] * size / (2 * count_of_sample)
    return points, origin, step


def with_points(inputs, points):
    """A copy of ``inputs`` with these points, of any shape and dtype, in place of its own."""
    fused = isinstance(inputs, FusedInputs)
    name = "sampling_offsets" if fused else "sampling_locations"
    given = getattr(inputs, name)
    return replace(inputs, **{name: points.reshape(given.shape).to(given)})


def off_edges(inputs, margin=0.01):
    """Move each sample ``margin`` of a pixel away from the cell edges.

    There the derivative of bilinear interpolation jumps, and the nearest pixel changes: two right
    answers may differ in the last bit of a coordinate and by far in the result.
    """
    points, origin, step = to_pixels(inputs)
    pixel = origin + step * points
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(margin, 1 - margin)
    return with_points(inputs, (pixel - origin) / step)
