"""The attention of other libraries written out in plain PyTorch, pixel by pixel."""

import torch


def pixels(maps, x, y):
    """Pixels (B, Q, M, P, D) of maps (B, M, D, H, W) at whole x and y (B, Q, M, P) inside them."""
    b = torch.arange(maps.shape[0]).view(-1, 1, 1, 1)
    m = torch.arange(maps.shape[1]).view(1, 1, -1, 1)
    return maps.permute(0, 1, 3, 4, 2)[b, m, y.long(), x.long()]


def bilinear(maps, locations):
    """Each of the four pixels around a location counts by its closeness, those outside as zero."""
    height, width = maps.shape[-2:]
    x, y = locations[..., 0] * width - 0.5, locations[..., 1] * height - 0.5
    total = 0
    for corner_y in (y.detach().floor(), y.detach().floor() + 1):
        for corner_x in (x.detach().floor(), x.detach().floor() + 1):
            inside = (corner_x >= 0) & (corner_x < width) & (corner_y >= 0) & (corner_y < height)
            closeness = (1 - (x - corner_x).abs()) * (1 - (y - corner_y).abs()) * inside
            pixel = pixels(maps, corner_x.clamp(0, width - 1), corner_y.clamp(0, height - 1))
            total = total + closeness.unsqueeze(-1) * pixel
    return total


def discrete(maps, locations, clamp_by_height=False):
    height, width = maps.shape[-2:]
    x = (locations[..., 0] * width + 0.5).trunc()
    y = (locations[..., 1] * height + 0.5).trunc()
    x = x.clamp(0, (height if clamp_by_height else width) - 1)
    return pixels(maps, x.detach(), y.clamp(0, height - 1).detach())


def attend(levels, locations, weights, sample=bilinear):
    """(B, Q, M * D) from a list of (B, M, D, H, W), and lists of (B, Q, M, P, 2), (B, Q, M, P)."""
    parts = zip(levels, locations, weights, strict=True)
    output = sum((sample(m, at) * weight.unsqueeze(-1)).sum(3) for m, at, weight in parts)
    return output.flatten(2)


def as_maps(value, shapes):
    """(B, S, M, D) -> a list of (B, M, D, H, W)."""
    sizes = [height * width for height, width in shapes]
    levels = value.permute(0, 2, 3, 1).split(sizes, dim=-1)
    return [level.unflatten(-1, shape) for level, shape in zip(levels, shapes, strict=True)]
