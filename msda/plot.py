"""Pictures of where attention looks: sampling points recorded, drawn, or explored in a page."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from msda.explore import explore
from msda.forms import core_observers
from msda.modules import MSDeformAttn
from msda.patching import attention_layers
from msda.reference import SpatialShapes, locations_and_weights, sum_dtype

if TYPE_CHECKING:  # matplotlib is needed to draw, not to record
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["SamplingRecord", "add_legend", "capture_sampling", "draw_sampling", "explore"]

_PANEL_INCHES = 6.0  # the longer side of a panel
_MOST_ASPECT = 16  # of a panel; images one pixel wide leave margins in theirs
_FADED = 0.65  # opacity of the image, on white
# Diameters in shares of the panel's longer side. A dot's area is proportional to its weight.
_DOT_OF_WEIGHT_1, _CROSS = 0.075, 0.045
_WEIGHTS_OF_LEGEND = (0.02, 0.1, 0.5)


@dataclass(frozen=True, eq=False)
class SamplingRecord:
    """Where one call of an attention layer sampled, and with what weights.

    Letters as in :func:`msda.ms_deform_attn`. Tensors are detached, on the device of the module;
    locations and weights are float32, or float64 in a float64 module, as inside the operator. What
    another model computes in 16 bits is recorded as it is, in float32.

    Attributes:
        name: of the module, as in ``model.named_modules()``.
        sampling_locations: (B, Q, M, L, P, 2) last axis (x, y), 0..1 across the padded map; may lie
            outside. (B, Q, M, K, 2) where levels differ in their number of points.
        attention_weights: (B, Q, M, L, P) after the softmax over L * P. (B, Q, M, K) where levels
            differ in their number of points.
        reference_points: (B, Q, L or 1, 2 or 4) as the module was given them; None where it has no
            argument of that name.
        spatial_shapes: (height, width) of each level.
        num_points: where levels differ, one count per level, K in all; else None.
    """

    name: str
    sampling_locations: Tensor
    attention_weights: Tensor
    reference_points: Tensor | None
    spatial_shapes: tuple[tuple[int, int], ...]
    num_points: tuple[int, ...] | None = None


@contextlib.contextmanager
def capture_sampling(model: nn.Module) -> Iterator[list[SamplingRecord]]:
    """Record every call of every attention layer in a model, without changing its code.

    Layers are each :class:`msda.MSDeformAttn`, and those of any model after
    :func:`msda.use_msda`.

    Works through forward hooks, which are removed at the end of the block, also after an exception.
    Records come in the order of the calls, over as many forwards as there are, with or without
    gradients or autocast; blocks may be nested. A forward that activation checkpointing repeats in
    the backward is recorded again. Shapes given as a CUDA tensor are read back to the host.

    A record is as large as its locations and weights: 34 MB for an encoder layer of the paper's
    model at 800 x 1333. To record some layers only, pass those instead of the model.

    Compiled code runs no hooks; so everything under ``torch.compile`` runs eagerly within the
    block, and compiled as before after it.

    Args:
        model: the module whose attention modules are recorded; may be one itself.

    Yields:
        The list that grows by one :class:`SamplingRecord` per call.

    Raises:
        ValueError: ``model`` contains no such layer.

    Example:
        >>> attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> query, points = torch.rand(1, 10, 32), torch.rand(1, 10, 2, 2)
        >>> with capture_sampling(attention) as samples:
        ...     output = attention(query, points, torch.rand(1, 60, 32), [(6, 8), (3, 4)])
        >>> samples[0].sampling_locations.shape
        torch.Size([1, 10, 4, 2, 3, 2])
    """
    modules = [item for item in model.named_modules() if isinstance(item[1], MSDeformAttn)]
    layers = list(attention_layers(model))
    if not modules and not layers:
        raise ValueError(
            "model must contain an msda.MSDeformAttn or attention patched by "
            f"msda.use_msda, got a {type(model).__name__} without"
        )
    samples: list[SamplingRecord] = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for name, module in modules:
            for handle in _record_calls(name, module, samples):
                stack.enter_context(handle)
        for name, layer in layers:
            for handle in _record_cores(name, layer, samples):
                stack.enter_context(handle)
        yield samples


def draw_sampling(
    image: Any,
    samples: SamplingRecord | Sequence[SamplingRecord],
    *,
    query: int | Sequence[int],
    boxes: Tensor | None = None,
    titles: Sequence[str] | None = None,
    batch_index: int = 0,
    valid_ratio: tuple[float, float] = (1.0, 1.0),
    axes: Sequence[Axes] | None = None,
) -> Figure:
    """Draw the sampling points of queries over the image, as in figure 6 of arXiv 2010.04159.

    There is a panel for each record and query. A dot is a sample, of any head: its colour tells the
    level, from light (the first) to dark, and its area is proportional to the attention weight. A
    cross marks the query's reference point, if known. What lies outside the image is not shown.

    Args:
        image: a PIL image or an array (H, W) or (H, W, 3): what ``Axes.imshow`` takes.
        samples: one record of :func:`capture_sampling`, or several.
        query: index, or indices, on the Q axis of every record.
        boxes: (number of queries, 4) a box to draw for each query: (centre x, centre y, width,
            height), 0..1 across the image.
        titles: one text per panel, all queries of the first record first. By default the name of
            the module and the index of the query.
        batch_index: of the image in the batch.
        valid_ratio: (x, y) share of the padded batch that the image covers, above 0, up to 1.
        axes: where to draw instead of in a new figure: one per panel. No legend is added then.

    Returns:
        The figure, bound to no window: ``figure.savefig("sampling.png")``.

    Raises:
        ImportError: matplotlib is missing.
        IndexError: ``query`` or ``batch_index`` is out of range.
        ValueError: ``samples`` or ``query`` is empty; ``boxes``, ``titles`` or ``axes`` do not fit
            them.

    Example:
        >>> figure = draw_sampling(image, samples[-1], query=[3, 8])  # doctest: +SKIP
    """
    _require_matplotlib()
    records = [samples] if isinstance(samples, SamplingRecord) else list(samples)
    queries = [query] if isinstance(query, int) else list(query)
    panels = [(record, index) for record in records for index in range(len(queries))]
    if not panels:
        raise ValueError(
            "samples and query must not be empty, "
            f"got {len(records)} records and {len(queries)} queries"
        )
    if boxes is not None and boxes.shape != (len(queries), 4):
        raise ValueError(f"boxes must have shape ({len(queries)}, 4), got {tuple(boxes.shape)}")
    if titles is None:
        titles = [f"{r.name or 'attention'}, query {queries[index]}" for r, index in panels]
    for name, given in (("titles", titles), ("axes", axes)):
        if given is not None and len(given) != len(panels):
            raise ValueError(
                f"{name} must hold one entry per record and query, {len(panels)}, got {len(given)}"
            )

    width, height = image.shape[1::-1] if hasattr(image, "shape") else image.size
    size = torch.tensor([width, height])
    is_new = axes is None
    if axes is None:
        columns = len(queries)
        if len(records) == 1 and columns > 3:
            columns = math.ceil(math.sqrt(columns))
        axes = _new_axes(len(panels), columns, height / width)
    for place, title, (record, index) in zip(axes, titles, panels, strict=True):
        place.imshow(image, extent=(0, width, height, 0), cmap="gray", alpha=_FADED)
        place.set_axis_off()
        place.set_title(title, fontsize=10)
        scale = size / torch.tensor(valid_ratio)
        _draw_samples(place, record, batch_index, queries[index], scale)
        if boxes is not None:
            _draw_box(place, boxes[index].cpu() * size.repeat(2))
        place.set(xlim=(0, width), ylim=(height, 0))
    if is_new:
        add_legend(axes, records[0], boxes=boxes is not None)
    return _figure_of(axes[0])


def add_legend(axes: Sequence[Axes], record: SamplingRecord, *, boxes: bool = False) -> None:
    """Explain what :func:`draw_sampling` drew, below the panels of a figure.

    Args:
        axes: panels of one size, in a figure made with ``layout="constrained"``; one is enough.
        record: any of those drawn.
        boxes: whether boxes were drawn too.

    Raises:
        ImportError: matplotlib is missing.
    """
    _require_matplotlib()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    figure, side = _figure_of(axes[0]), _side_in_points(axes[0])
    keys: list[Line2D | Patch] = []

    def add_key(marker: str, colour: Any, size: float, label: str, edge: float = 0.5) -> None:
        look: dict[str, Any] = {"marker": marker, "color": colour, "markersize": size}
        look |= {"markeredgecolor": "black", "markeredgewidth": edge, "linestyle": "none"}
        keys.append(Line2D([], [], label=label, **look))

    add_key("+", "black", 13, "reference point", edge=2)
    if boxes:
        keys.append(Patch(fill=False, edgecolor="black", linewidth=1.5, label="predicted box"))
    colours = _level_colours(len(record.spatial_shapes))
    for colour, (height, width) in zip(colours, record.spatial_shapes, strict=True):
        add_key("o", colour, 9, f"level {height} x {width}")
    for weight in _WEIGHTS_OF_LEGEND:
        add_key("o", "white", math.sqrt(weight) * _DOT_OF_WEIGHT_1 * side, f"weight {weight}")
    rows = math.ceil(len(keys) * 1.75 / figure.get_figwidth())  # inches that an entry takes
    columns = math.ceil(len(keys) / rows)
    figure.legend(handles=keys, loc="outside lower center", ncols=columns, frameon=False)


# ---- recording -----------------------------------------------------------------------------------


def _record_calls(
    name: str, module: MSDeformAttn, samples: list[SamplingRecord]
) -> list[RemovableHandle]:
    """Hooks that append a record to ``samples`` after each call of the module."""
    signature = inspect.signature(module.forward)
    latest: dict[str, Tensor] = {}  # what the two layers gave in the call in progress

    def keep_offsets(layer: nn.Module, arguments: Any, output: Tensor) -> None:
        latest["offsets"] = output

    def keep_logits(layer: nn.Module, arguments: Any, output: Tensor) -> None:
        latest["logits"] = output

    @torch.no_grad()
    def append(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
        arguments = signature.bind(*args, **kwargs).arguments
        reference_points = arguments["reference_points"]
        shapes = arguments["input_spatial_shapes"]
        if isinstance(shapes, Tensor):
            shapes = shapes.tolist()
        offsets, logits = latest.pop("offsets"), latest.pop("logits")
        locations, weights = locations_and_weights(
            shapes,
            module.points_per_level,
            reference_points,
            offsets.unflatten(-1, (module.n_heads, -1, 2)),
            logits.unflatten(-1, (module.n_heads, -1)),
            sum_dtype(offsets.dtype),
        )  # (B, Q, M, K, 2), (B, Q, M, K)
        ragged = not isinstance(module.n_points, int)
        sample_axes = (-1,) if ragged else (module.n_levels, -1)
        samples.append(
            SamplingRecord(
                name,
                locations.unflatten(3, sample_axes),
                weights.unflatten(3, sample_axes),
                reference_points.detach().clone(),
                tuple((height, width) for height, width in shapes),
                tuple(module.points_per_level) if ragged else None,
            )
        )

    return [
        module.sampling_offsets.register_forward_hook(keep_offsets),
        module.attention_weights.register_forward_hook(keep_logits),
        module.register_forward_hook(append, with_kwargs=True),
    ]


def _record_cores(
    name: str, layer: nn.Module, samples: list[SamplingRecord]
) -> list[RemovableHandle]:
    """The same for a layer whose core :func:`msda.use_msda` replaced."""
    signature = inspect.signature(layer.forward)
    latest: list[tuple[Any, ...]] = []  # what the core got in the call in progress

    def observe(
        shapes: SpatialShapes, locations: Tensor, weights: Tensor, counts: Sequence[int] | None
    ) -> None:
        latest.append((shapes, locations.detach(), weights.detach(), counts))

    def begin(_: nn.Module, args: Any) -> None:
        core_observers.set((*core_observers.get(), observe))

    def append(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        core_observers.set(tuple(other for other in core_observers.get() if other is not observe))
        calls = latest.copy()
        latest.clear()
        if output is None:  # the forward raised an error
            return
        reference_points = signature.bind(*args, **kwargs).arguments.get("reference_points")
        for shapes, locations, weights, counts in calls:
            dtype = sum_dtype(locations.dtype)
            samples.append(
                SamplingRecord(
                    name,
                    locations.to(dtype, copy=True),
                    weights.to(dtype, copy=True),
                    None if reference_points is None else reference_points.detach().clone(),
                    tuple((int(height), int(width)) for height, width in shapes),
                    None if counts is None else tuple(counts),
                )
            )

    return [
        layer.register_forward_pre_hook(begin),
        layer.register_forward_hook(append, with_kwargs=True, always_call=True),
    ]


# ---- drawing -------------------------------------------------------------------------------------


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("msda.plot draws with matplotlib: pip install matplotlib") from error


def _figure_of(axes: Axes) -> Figure:
    figure = axes.get_figure(root=True)
    assert figure is not None
    return figure


def _new_axes(count: int, columns: int, aspect: float) -> list[Axes]:
    """Panels of a new figure, their height ``aspect`` times their width."""
    from matplotlib.figure import Figure

    aspect = min(max(aspect, 1 / _MOST_ASPECT), _MOST_ASPECT)
    rows, width = math.ceil(count / columns), _PANEL_INCHES / max(aspect, 1)
    size = (columns * width, rows * (width * aspect + 0.3) + 0.6)  # with titles and legend
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in axes[count:]:
        unused.remove()
    return axes[:count]


def _side_in_points(axes: Axes) -> float:
    """The longer side of the axes in points, 1/72 inch, the unit of matplotlib's markers."""
    extent = axes.get_window_extent()
    return max(extent.width, extent.height) * 72 / _figure_of(axes).dpi


def _level_colours(num_levels: int) -> list[Any]:
    """Yellow, orange, pink, purple: ordered by lightness, which colour blindness leaves alone."""
    from matplotlib import colormaps

    return [colormaps["plasma"](x) for x in torch.linspace(0.93, 0.1, num_levels).tolist()]


def _draw_samples(
    axes: Axes, record: SamplingRecord, batch_index: int, query: int, scale: Tensor
) -> None:
    """Draw one query's samples and reference point; ``scale`` turns locations into pixels."""
    locations = record.sampling_locations[batch_index, query].flatten(1, -2)  # (M, K, 2)
    weights = record.attention_weights[batch_index, query].flatten(1)  # (M, K)
    (num_heads, num_samples), num_levels = weights.shape, len(record.spatial_shapes)
    counts = record.num_points or (num_samples // num_levels,) * num_levels
    levels = torch.arange(num_levels).repeat_interleave(torch.tensor(counts)).repeat(num_heads)
    order = weights.flatten().cpu().argsort(descending=True)  # small dots on top of large ones

    points = (locations.flatten(0, 1).cpu() * scale)[order]  # (M * K, 2)
    diameters = weights.flatten().cpu()[order].sqrt() * _DOT_OF_WEIGHT_1 * _side_in_points(axes)
    colours = _level_colours(num_levels)
    x, y = points.T.tolist()
    axes.scatter(
        x,
        y,
        s=diameters.square().tolist(),
        c=[colours[level] for level in levels[order]],
        edgecolors="black",
        linewidths=0.5,
        zorder=2,
    )
    if record.reference_points is None:
        return
    x, y = (record.reference_points[batch_index, query, 0, :2].cpu() * scale).tolist()
    length = _CROSS * _side_in_points(axes)
    for colour, thickness in (("white", 0.3), ("black", 0.12)):
        axes.plot(x, y, "+", color=colour, ms=length * (1 + thickness), mew=length * thickness)


def _draw_box(axes: Axes, box: Tensor) -> None:
    """Draw a box (centre x, centre y, width, height) in pixels."""
    from matplotlib.patches import Rectangle

    centre_x, centre_y, width, height = box.tolist()
    corner = (centre_x - width / 2, centre_y - height / 2)
    for colour, thickness in (("white", 3.5), ("black", 1.5)):
        axes.add_patch(Rectangle(corner, width, height, fill=False, ec=colour, lw=thickness))
