"""Inputs, calls and tolerances shared by tests, benchmarks and examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from msda.functional import ms_deform_attn, ms_deform_attn_fused
from msda.reference import (
    ms_deform_attn_fused_reference,
    ms_deform_attn_reference,
    sum_dtype,
)

# Encoder of Deformable DETR R50 at 800 x 1333: strides 8, 16, 32, 64 (S = 22 223).
PAPER_SHAPES = [(100, 167), (50, 84), (25, 42), (13, 21)]

# Largest relative error (in the Euclidean norm) against the float64 reference. float32 and float64:
# a dozen roundings of the dtype's epsilon along a sum of some 64 terms. 16 bits: one rounding of
# the result, at most half an epsilon and 0.3 of one in the mean, and as much again for a gradient
# that passed through a 16-bit output.
TOLERANCES = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}


@dataclass
class Inputs:
    """Arguments of :func:`msda.ms_deform_attn`."""

    value: Tensor  # (B, S, M, D)
    spatial_shapes: list[tuple[int, int]]
    sampling_locations: Tensor  # (B, Q, M, L, P, 2), or (B, Q, M, K, 2) with num_points
    attention_weights: Tensor  # (B, Q, M, L, P), or (B, Q, M, K)
    num_points: list[int] | None = None

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.value, self.sampling_locations, self.attention_weights


@dataclass
class FusedInputs:
    """Arguments of :func:`msda.ms_deform_attn_fused`."""

    value: Tensor  # (B, S, M, D)
    spatial_shapes: list[tuple[int, int]]
    reference_points: Tensor  # (B, Q, L or 1, 2 or 4)
    sampling_offsets: Tensor  # (B, Q, M, L, P, 2), or (B, Q, M, K, 2) with num_points
    attention_logits: Tensor  # (B, Q, M, L, P), or (B, Q, M, K)
    num_points: list[int] | None = None
    padding_mask: Tensor | None = None  # (B, S)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.value, self.reference_points, self.sampling_offsets, self.attention_logits


AnyInputs = TypeVar("AnyInputs", Inputs, FusedInputs)


def gradient_names(inputs: Inputs | FusedInputs) -> list[str]:
    """The arguments that have gradients: the names of the floating-point tensors."""
    entries = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return [
        name
        for name, entry in entries.items()
        if isinstance(entry, Tensor) and entry.is_floating_point()
    ]


def map_tensors(inputs: AnyInputs, change: Callable[[Tensor], Tensor]) -> AnyInputs:
    """A copy of ``inputs`` with ``change`` applied to its floating-point tensors."""
    changed: dict[str, Any] = {
        name: change(getattr(inputs, name)) for name in gradient_names(inputs)
    }
    return replace(inputs, **changed)


def leaves(inputs: AnyInputs, names: Iterable[str] | None = None) -> AnyInputs:
    """A copy of ``inputs`` in which some tensors are leaves that require a gradient.

    ``names`` are those tensors; None: all that have a gradient.
    """
    chosen: dict[str, Any] = {
        name: getattr(inputs, name).detach().clone().requires_grad_()
        for name in (gradient_names(inputs) if names is None else names)
    }
    return replace(inputs, **chosen)


# The plain and the fused one of what call() takes.
Functions = Mapping[type, Callable[..., Tensor]]
OPERATOR: Functions = {Inputs: ms_deform_attn, FusedInputs: ms_deform_attn_fused}
REFERENCE: Functions = {
    Inputs: ms_deform_attn_reference,
    FusedInputs: ms_deform_attn_fused_reference,
}


def call(
    functions: Functions,
    inputs: Inputs | FusedInputs,
    *,
    start_index: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Call the plain or the fused one of ``functions``, whichever ``inputs`` are for.

    Args:
        functions: ``OPERATOR``, ``REFERENCE``, or what stands in for them.
        start_index: level_start_index.
        options: other keyword arguments; num_points and the padding mask are those of ``inputs``.

    Returns:
        output (B, Q, M * D).
    """
    value, *others = inputs.tensors()
    given: dict[str, Any] = {"num_points": inputs.num_points}
    if isinstance(inputs, FusedInputs):
        given["padding_mask"] = inputs.padding_mask
    function = functions[type(inputs)]
    return function(value, inputs.spatial_shapes, start_index, *others, **given | options)


def ours(inputs: Inputs | FusedInputs, **options: Any) -> Tensor:
    """The operator, plain or fused."""
    return call(OPERATOR, inputs, **options)


def reference(inputs: Inputs | FusedInputs, **options: Any) -> Tensor:
    """The definition in plain PyTorch, plain or fused."""
    return call(REFERENCE, inputs, **options)


def random_like_output(inputs: Inputs | FusedInputs, seed: int = 7) -> Tensor:
    """Random numbers in the shape, dtype and place of the output: (B, Q, M * D)."""
    value, points = inputs.value, inputs.tensors()[-1]
    size = (value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    random = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=random).to(value.device, value.dtype)


def grid_sample_core(inputs: Inputs) -> Tensor:
    """The operator by one ``grid_sample`` per level: the fallback of every detection library.

    Unlike ``msda.reference`` it guards against nothing (NaN, far-away locations) and computes
    everything in the dtype of value. (B, Q, M * D).
    """
    value, weights = inputs.value, inputs.attention_weights
    batch, _, num_heads, head_dim = value.shape
    num_queries = weights.shape[1]
    grids = 2 * inputs.sampling_locations.to(value.dtype) - 1
    counts = inputs.num_points
    by_level = grids.split(counts, 3) if counts else grids.unbind(3)  # L of (B, Q, M, P, 2)
    maps = value.split([height * width for height, width in inputs.spatial_shapes], dim=1)
    samples = []
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        image = maps[level].permute(0, 2, 3, 1).reshape(-1, head_dim, height, width)
        grid = by_level[level].transpose(1, 2).flatten(0, 1)  # (B * M, Q, P, 2)
        samples.append(F.grid_sample(image, grid, align_corners=False))
    weight = weights.to(value.dtype).transpose(1, 2).reshape(batch * num_heads, 1, num_queries, -1)
    output = (torch.cat(samples, -1) * weight).sum(-1)  # (B * M, D, Q)
    return output.view(batch, num_heads * head_dim, num_queries).transpose(1, 2).contiguous()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over that of ``expected``, computed in float64."""
    if actual.device != expected.device:
        actual, expected = actual.cpu(), expected.cpu()
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.norm().item()
    return (actual - expected).norm().item() / (scale if scale > 0 else 1.0)


def devices() -> list[str]:
    """The devices this machine can test: always "cpu", and "cuda" where there is one."""
    return ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


def pixel_centres(shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Normalised (x, y) of every pixel of a pyramid, in the order of ``value``: (S, 2)."""
    centres = []
    for height, width in shapes:
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height,
            (torch.arange(width) + 0.5) / width,
            indexing="ij",
        )
        centres.append(torch.stack([x, y], -1).view(-1, 2))
    return torch.cat(centres)


# The distributions of sampling locations: see make_inputs.
LOCATIONS = ("uniform", "local", "initial", "clustered")


def _local_locations(
    shapes: Sequence[tuple[int, int]], counts: Sequence[int], offsets: Tensor
) -> Tensor:
    """Each query's own pixel plus offsets (B, S, M, K, 2) in pixels of each point's level."""
    pixels = torch.tensor(
        [(w, h) for (h, w), count in zip(shapes, counts, strict=True) for _ in range(count)]
    )
    return pixel_centres(shapes)[None, :, None, None] + offsets / pixels


def _initial_offsets(counts: Sequence[int], num_heads: int) -> Tensor:
    """Offsets of an untrained module, (M, K, 2): a direction per head, 1, 2, ... pixels long."""
    angle = torch.arange(num_heads) * (2 * math.pi / num_heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction = direction / direction.abs().amax(-1, keepdim=True)
    length = torch.cat([torch.arange(count) + 1.0 for count in counts])
    return direction[:, None] * length[:, None]


def _clustered_locations(near: Tensor, size: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Locations (B, Q, M, K, 2) on 24 objects: each query's points on the one next to ``near``.

    Centres are uniform over the map, sides from a twentieth to two fifths of it.
    """
    centres = torch.rand(24, 2, generator=random)
    sides = 0.05 * 8 ** torch.rand(24, 2, generator=random)
    chosen = torch.cdist(near, centres).argmin(-1)  # (B or 1, Q)
    spread = torch.randn(*size, 2, generator=random) / 4
    return centres[chosen][:, :, None, None] + spread * sides[chosen][:, :, None, None]


def make_inputs(
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    num_queries: int | None = None,
    num_heads: int = 8,
    head_dim: int = 32,
    num_points: int | Sequence[int] = 4,
    dtype: torch.dtype = torch.float32,
    point_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    locations: str = "uniform",
    seed: int = 0,
) -> Inputs:
    """Make random arguments for :func:`msda.ms_deform_attn`.

    Args:
        num_queries: number of queries; None: one per pixel of the pyramid, as in an encoder.
        num_points: points per level, or one count per level.
        dtype: of value.
        point_dtype: of locations and weights; None: float32, or float64 for float64 values.
        locations: "uniform": over the map and 5 % beyond each edge; "local": the query's own pixel
            plus normal offsets of 2.5 pixels on each level; "initial": the same with the offsets
            of an untrained module and normal noise of half a pixel (both need
            ``num_queries=None``); "clustered": as trained models do, most queries on few objects.
    """
    if locations not in LOCATIONS:
        raise ValueError(f"locations must be one of {', '.join(LOCATIONS)}, got {locations!r}")
    shapes = [(height, width) for height, width in spatial_shapes]
    num_keys = sum(height * width for height, width in shapes)
    uniform = isinstance(num_points, int)
    counts = [num_points] * len(shapes) if isinstance(num_points, int) else list(num_points)
    queries = num_keys if num_queries is None else num_queries
    random = torch.Generator().manual_seed(seed)
    if point_dtype is None:
        point_dtype = sum_dtype(dtype)

    value = torch.randn(batch, num_keys, num_heads, head_dim, generator=random)
    size = (batch, queries, num_heads, sum(counts))
    if locations in ("local", "initial"):
        if num_queries is not None:
            raise ValueError(f"num_queries must be None for {locations} locations, got one")
        offset = torch.randn(*size, 2, generator=random) * 2.5
        if locations == "initial":
            offset = offset / 5 + _initial_offsets(counts, num_heads)
        location = _local_locations(shapes, counts, offset)
    elif locations == "clustered":
        if num_queries is None:
            near = pixel_centres(shapes)[None]
        else:
            near = torch.rand(batch, queries, 2, generator=random)
        location = _clustered_locations(near, size, random)
    else:
        location = torch.rand(*size, 2, generator=random) * 1.1 - 0.05
    weight = torch.randn(size, generator=random).softmax(-1)
    if uniform:
        location = location.unflatten(3, (len(shapes), counts[0]))
        weight = weight.unflatten(3, (len(shapes), counts[0]))
    return Inputs(
        value=value.to(device, dtype),
        spatial_shapes=shapes,
        sampling_locations=location.to(device, point_dtype),
        attention_weights=weight.to(device, point_dtype),
        num_points=None if uniform else counts,
    )


def make_fused_inputs(
    spatial_shapes: Sequence[tuple[int, int]],
    *,
    batch: int = 1,
    num_queries: int | None = None,
    num_heads: int = 8,
    head_dim: int = 32,
    num_points: int | Sequence[int] = 4,
    dtype: torch.dtype = torch.float32,
    point_dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    reference_size: int = 2,
    shared_reference: bool = False,
    padding: bool = False,
    seed: int = 0,
) -> FusedInputs:
    """Make random arguments for :func:`msda.ms_deform_attn_fused`.

    Args:
        num_queries: number of queries with uniform reference points; None: one per pixel, which is
            its reference point, as in an encoder.
        reference_size: 2 for points, 4 for boxes.
        shared_reference: one reference for all levels, shape (B, Q, 1, 2 or 4).
        padding: mask about a fifth of the keys.

    The other arguments are those of :func:`make_inputs`.
    """
    plain = make_inputs(
        spatial_shapes,
        batch=batch,
        num_queries=num_queries,
        num_heads=num_heads,
        head_dim=head_dim,
        num_points=num_points,
        dtype=dtype,
        point_dtype=point_dtype,
        device=device,
        seed=seed,
    )
    random = torch.Generator().manual_seed(seed + 1)
    point_dtype = plain.sampling_locations.dtype
    queries, num_keys = plain.sampling_locations.shape[1], plain.value.shape[1]
    levels = 1 if shared_reference else len(plain.spatial_shapes)
    if num_queries is None:
        centre = pixel_centres(spatial_shapes)[None, :, None].expand(batch, -1, levels, -1)
    else:
        centre = torch.rand(batch, queries, levels, 2, generator=random)
    box = torch.rand(batch, queries, levels, 2, generator=random) * 0.5 + 0.05
    reference = centre if reference_size == 2 else torch.cat([centre, box], -1)
    offsets = torch.randn(plain.sampling_locations.shape, generator=random) * 2.5
    logits = torch.randn(plain.attention_weights.shape, generator=random)
    mask = torch.rand(batch, num_keys, generator=random) < 0.2
    return FusedInputs(
        value=plain.value,
        spatial_shapes=plain.spatial_shapes,
        reference_points=reference.to(device, sum_dtype(point_dtype)),
        sampling_offsets=offsets.to(device, point_dtype),
        attention_logits=logits.to(device, point_dtype),
        num_points=plain.num_points,
        padding_mask=mask.to(device) if padding else None,
    )


def available_memory() -> float:
    """Bytes of memory that are free for use on this machine; infinite if unknown."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return math.inf
