"""One HTML page to explore where a model samples: recorded, quantised, and written as a whole."""

from __future__ import annotations

import base64
import contextlib
import ctypes
import html
import inspect
import io
import json
import os
import re
import struct
import threading
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msda import functional
from msda.reference import locations_and_weights, sum_dtype

# A location is a code from 0 to 65534, which stand for -1 to 2 across the padded map; 65535 is
# for locations farther outside or not finite. A weight is one from 0 to 65535, for 0 to 1.
_LOW, _HIGH, _STEPS, _NOWHERE = -1.0, 2.0, 65534, 65535
_MOST_PIXELS = 1280  # of the picture's longer side
_MOST_BOXES, _LEAST_SCORE = 30, 0.5  # of boxes found in the model's output
_BYTES_PER_LAYER = 1000  # of names and numbers, more than there are


def explore(
    model: nn.Module,
    image: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Any = None,
    batch_index: int = 0,
    valid_ratio: tuple[float, float] = (1.0, 1.0),
    boxes: Tensor | None = None,
    box_queries: Sequence[int] | None = None,
    box_labels: Sequence[str] | None = None,
    query: int | None = None,
    title: str | None = None,
    max_megabytes: float = 4.0,
) -> Path:
    """Write an HTML page that shows, for any layer, head and query, where a model samples.

    The model runs once, in evaluation mode and without gradients, and every call of
    :func:`msda.ms_deform_attn` and :func:`msda.ms_deform_attn_fused` in it is a layer of the page:
    those of :class:`msda.MSDeformAttn`, of any model after :func:`msda.use_msda`, and of code
    served by :mod:`msda.drop_in`. The page is one file that needs no network and no server. A query
    is picked by its number, by the arrow keys, or by pointing at the image or at a box.

    Locations are rounded to 3 / 65534 of the padded map (0.06 pixels of 1280), weights to
    1 / 65535. Samples beyond one map's width or height around the map are left out of the drawing.
    Where the queries of all layers exceed ``max_megabytes``, layers share the room, and one that
    needs more has every n-th of its queries, or every n-th row and column of each level where its
    queries are the pixels of its maps, with the smallest n that fits; the page says so. Queries of
    boxes are always there.

    Args:
        model: any module that calls the operator. Which of its modules are in training mode is
            restored after the forward, also if that fails.
        image: the picture to draw: a PIL image, the path of one, or a tensor (H, W), (1, H, W) or
            (3, H, W), uint8 or floating point from 0 to 1.
        path: of the page. A file of that name is replaced once the page is complete.
        inputs: how the model is run. None: ``model(x)``, x being the image as it is given if that
            is a floating-point tensor, else scaled to 0..1, as (1, 1 or 3, H, W) in the model's
            dtype and on its device. A tuple: ``model(*inputs)``. A mapping: ``model(**inputs)``. A
            function: ``inputs(model)``. Anything else: ``model(inputs)``.
        batch_index: of the image in the batch that the operator sees.
        valid_ratio: (x, y) share of the padded batch that the image covers, above 0, up to 1.
        boxes: (N, 4) boxes to pick from: (centre x, centre y, width, height), 0..1 across the
            image. None: if the model returns ``pred_boxes`` and ``pred_logits`` or ``logits``, as
            detectors do, up to 30 of them whose best class has a sigmoid of 0.5 or more, and at
            least the best; an empty tensor for none.
        box_queries: (N,) the query that each box comes from. Boxes belong to the layers that have
            as many queries as the last one recorded.
        box_labels: (N,) a text for each box; by default its number.
        query: the one shown first, of the last layer. By default that of the first box, or else
            the one whose samples reach the farthest within the image.
        title: of the page; by default "Where <the model's class> looks".
        max_megabytes: the most that the file may have, in 10^6 bytes.

    Returns:
        ``path``.

    Raises:
        TypeError: ``model``, ``image`` or ``inputs`` is none of the above.
        ValueError: nothing was recorded; ``image``, ``valid_ratio``, boxes or ``query`` are
            malformed; ``max_megabytes`` is too small for the image and one query of each layer.
        IndexError: ``batch_index`` is out of range.
        OSError: ``image`` cannot be read, or ``path`` cannot be written.

    Example:
        >>> from msda import MSDeformAttn
        >>> attention = MSDeformAttn(d_model=32, n_levels=2, n_heads=4, n_points=3)
        >>> query, points = torch.rand(1, 10, 32), torch.rand(1, 10, 2, 2)
        >>> inputs = (query, points, torch.rand(1, 60, 32), [(6, 8), (3, 4)])
        >>> explore(attention, torch.rand(3, 60, 80), "where.html", inputs=inputs).name
        'where.html'
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if len(valid_ratio) != 2 or not all(0 < ratio <= 1 for ratio in valid_ratio):
        raise ValueError(f"valid_ratio must be two numbers above 0, up to 1, got {valid_ratio}")
    given, picture = _read_image(image)
    with _replacing(Path(path)) as file:
        with _recorded(model, batch_index) as calls:
            output = _run(model, given, inputs)
        calls = [call for call in calls if call.weights.numel() > 0]
        if not calls:
            raise ValueError(
                "model must call msda.ms_deform_attn or msda.ms_deform_attn_fused for at least one "
                f"query, got a {type(model).__name__} that did not"
            )
        found = boxes is None
        if boxes is None:
            boxes, box_queries, box_labels = _boxes_of(output, model, batch_index)
        num_queries = calls[-1].weights.shape[0]
        marked = _check_boxes(boxes, box_queries, box_labels, None if found else num_queries)
        marked = [box for box in marked if box["query"] < num_queries]
        if query is None and marked:
            query = marked[0]["query"]
        if query is not None and not 0 <= query < num_queries:
            raise ValueError(
                f"query must be one of the {num_queries} of the last layer, got {query}"
            )
        title = f"Where {type(model).__name__} looks" if title is None else title
        page = _page(
            calls,
            picture,
            valid_ratio,
            marked,
            query,
            title or f"Where {type(model).__name__} looks",
            max_megabytes,
        )
        file.write(page)
    return Path(path)


# ---- image and model -----------------------------------------------------------------------------


def _read_image(image: Any) -> tuple[Tensor, Tensor]:
    """The image for the model, (1 or 3, H, W), and for the page, uint8."""
    if isinstance(image, str | os.PathLike):
        from PIL import Image, ImageOps, UnidentifiedImageError

        try:
            with Image.open(image) as file:
                image = ImageOps.exif_transpose(file)
        except UnidentifiedImageError:
            raise ValueError(
                f"image must be a file that Pillow can read, got {str(image)!r}"
            ) from None
    if not isinstance(image, Tensor):
        if not (hasattr(image, "convert") and hasattr(image, "tobytes")):
            raise TypeError(
                "image must be a PIL image, the path of one or a tensor, "
                f"got {type(image).__name__}"
            )
        image = image.convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        image = pixels.view(image.height, image.width, 3).permute(2, 0, 1)
    given = image.detach()
    if given.dim() == 2:
        given = given[None]
    if given.dim() != 3 or given.shape[0] not in (1, 3) or given.numel() == 0:
        raise ValueError(
            "image must have shape (H, W), (1, H, W) or (3, H, W) and pixels, "
            f"got {tuple(image.shape)}"
        )
    if given.dtype != torch.uint8 and not given.is_floating_point():
        raise ValueError(f"image must be uint8 or floating point, got {given.dtype}")
    if given.dtype == torch.uint8:
        given = given.float() / 255
    picture = given.cpu().float().nan_to_num().clamp(0, 1)
    scale = min(1, _MOST_PIXELS / max(picture.shape[1:]))
    if scale < 1:
        size = [max(1, round(side * scale)) for side in picture.shape[1:]]
        picture = F.interpolate(picture[None], size, mode="bilinear", antialias=True)[0]
    return given, (picture * 255).round().byte()


def _run(model: nn.Module, given: Tensor, inputs: Any) -> Any:
    """The output of the model in evaluation mode; modes are restored."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        with torch.no_grad():
            if inputs is None:
                like = next((p for p in model.parameters() if p.is_floating_point()), given)
                return model(given[None].to(like.device, like.dtype))
            if isinstance(inputs, tuple):
                return model(*inputs)
            if isinstance(inputs, Mapping):
                return model(**inputs)
            if callable(inputs) and not isinstance(inputs, Tensor):
                return inputs(model)
            return model(inputs)
    finally:
        for module in training:
            module.training = True


# ---- recording -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Call:
    """Where one call of the operator sampled in one image, in float32 on the CPU."""

    name: str
    locations: Tensor  # (Q, M, K, 2)
    weights: Tensor  # (Q, M, K)
    references: Tensor | None  # (Q, L or 1, 2 or 4)
    shapes: list[tuple[int, int]]
    num_points: list[int]  # of each level, K in all

    @property
    def is_grid(self) -> bool:
        """Whether the queries are the pixels of the maps, as in an encoder."""
        return len(self.weights) == sum(height * width for height, width in self.shapes)


@contextlib.contextmanager
def _recorded(model: nn.Module, batch_index: int) -> Iterator[list[_Call]]:
    """The list of calls in the block, filled at its end."""
    stack: list[tuple[str, nn.Module, Any, Any]] = []  # modules whose forward is in progress
    taken: list[tuple[str, dict[str, Any]]] = []
    thread = threading.get_ident()  # others may run other models

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            if threading.get_ident() == thread:
                stack.append((name, module, args, kwargs))

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() == thread and stack and stack[-1][1] is module:
            stack.pop()

    def observe(arguments: Mapping[str, Any]) -> None:
        if threading.get_ident() != thread:
            return
        batch = arguments["value"].shape[0]
        if not 0 <= batch_index < batch:
            raise IndexError(f"batch_index must be from 0 to {batch - 1}, got {batch_index}")
        recorded: dict[str, Any] = {
            name: item[batch_index : batch_index + 1].detach().cpu().clone()
            for name, item in arguments.items()
            if isinstance(item, Tensor) and name not in ("value", "spatial_shapes")
        }
        shapes = arguments["spatial_shapes"]
        shapes = shapes.tolist() if isinstance(shapes, Tensor) else shapes
        recorded["shapes"] = [(int(height), int(width)) for height, width in shapes]
        recorded["num_points"] = arguments["num_points"]
        recorded["acc_dtype"] = sum_dtype(arguments["value"].dtype)
        if "reference_points" not in recorded:
            points = _reference_points(
                stack, arguments["sampling_locations"], len(recorded["shapes"])
            )
            if points is not None:
                points = points[batch_index : batch_index + 1].detach().cpu().clone()
            recorded["reference_points"] = points
        taken.append((stack[-1][0] if stack else "", recorded))

    calls: list[_Call] = []
    with contextlib.ExitStack() as context:
        context.enter_context(torch.compiler.set_stance("force_eager"))  # it runs no hooks compiled
        for name, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                context.enter_context(
                    module.register_forward_pre_hook(enter(name), with_kwargs=True)
                )
                context.enter_context(module.register_forward_hook(leave, always_call=True))
        functional.observers.append(observe)
        try:
            yield calls
        finally:
            functional.observers.remove(observe)
    seen: Counter[str] = Counter()
    for name, recorded in taken:
        name = name or "attention"
        seen[name] += 1
        again = f" (call {seen[name]})" if seen[name] > 1 else ""
        calls.append(_call_of(name + again, **recorded))


def _reference_points(stack: Sequence[Any], locations: Tensor, num_levels: int) -> Tensor | None:
    """Those that the innermost module was given, if any was, in a shape that fits the call."""
    for _, module, args, kwargs in reversed(stack):
        try:
            given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        except (TypeError, ValueError):
            continue
        points = given.get("reference_points")
        if (
            isinstance(points, Tensor)
            and points.dim() == 4
            and points.shape[:2] == locations.shape[:2]
            and points.shape[2] in (1, num_levels)
            and points.shape[3] in (2, 4)
        ):
            return points
    return None


def _call_of(
    name: str,
    shapes: list[tuple[int, int]],
    num_points: Sequence[int] | None,
    acc_dtype: torch.dtype,
    reference_points: Tensor | None,
    sampling_locations: Tensor | None = None,
    attention_weights: Tensor | None = None,
    sampling_offsets: Tensor | None = None,
    attention_logits: Tensor | None = None,
) -> _Call:
    samples = attention_weights if attention_weights is not None else attention_logits
    assert samples is not None
    counts = [samples.shape[-1]] * len(shapes) if num_points is None else list(num_points)
    if sampling_offsets is not None:
        assert reference_points is not None
        locations, weights = locations_and_weights(
            shapes, counts, reference_points, sampling_offsets, samples, acc_dtype
        )
    else:
        assert sampling_locations is not None
        locations, weights = sampling_locations.flatten(3, -2), samples.flatten(3)
    return _Call(
        name,
        locations[0].float(),
        weights[0].float(),
        None if reference_points is None else reference_points[0].float(),
        shapes,
        [int(count) for count in counts],
    )


# ---- boxes ---------------------------------------------------------------------------------------


def _boxes_of(
    output: Any, model: nn.Module, batch_index: int
) -> tuple[Tensor, list[int], list[str]]:
    """The best boxes in a detector's output, their queries, and classes with scores."""

    def get(name: str) -> Any:
        return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)

    boxes, logits = get("pred_boxes"), get("pred_logits")
    logits = get("logits") if logits is None else logits
    is_detection = (
        isinstance(boxes, Tensor)
        and isinstance(logits, Tensor)
        and boxes.dim() == logits.dim() == 3
        and boxes.shape[:2] == logits.shape[:2]
        and boxes.shape[2] == 4
        and batch_index < len(boxes)
        and logits.numel() > 0
    )
    if not is_detection:
        return torch.zeros(0, 4), [], []
    scores, classes = logits[batch_index].float().cpu().sigmoid().max(-1)
    order = scores.argsort(descending=True, stable=True)[:_MOST_BOXES]
    order = order[: max(1, int((scores[order] >= _LEAST_SCORE).sum()))]
    names = getattr(getattr(model, "config", None), "id2label", None) or {}
    labels = [
        f"{names.get(label, f'class {label}')} {score:.2f}"
        for label, score in zip(classes[order].tolist(), scores[order].tolist(), strict=True)
    ]
    return boxes[batch_index].float().cpu()[order], order.tolist(), labels


def _check_boxes(
    boxes: Tensor,
    queries: Sequence[int] | None,
    labels: Sequence[str] | None,
    num_queries: int | None,
) -> list[dict[str, Any]]:
    """Boxes as the page takes them; ``num_queries`` is None where a query beyond is no error."""
    if not isinstance(boxes, Tensor) or boxes.dim() != 2 or boxes.shape[1] != 4:
        shape = tuple(boxes.shape) if isinstance(boxes, Tensor) else type(boxes).__name__
        raise ValueError(f"boxes must be a tensor of shape (N, 4), got {shape}")
    numbers = [] if queries is None else [int(number) for number in queries]
    texts = [f"box {i}" for i in range(len(boxes))] if labels is None else list(labels)
    for name, entries in (("box_queries", numbers), ("box_labels", texts)):
        if len(entries) != len(boxes):
            raise ValueError(
                f"{name} must hold one entry for each of {len(boxes)} boxes, got {len(entries)}"
            )
    for number in numbers:
        if num_queries is not None and not 0 <= number < num_queries:
            raise ValueError(
                f"box_queries must be below the {num_queries} queries of the last layer, "
                f"got {number}"
            )
    sides = boxes.detach().float().cpu().nan_to_num().tolist()
    return [
        {"box": [round(side, 5) for side in box], "query": number, "label": str(text)}
        for box, number, text in zip(sides, numbers, texts, strict=True)
    ]


# ---- the page ------------------------------------------------------------------------------------


def _page(
    calls: Sequence[_Call],
    picture: Tensor,
    valid_ratio: tuple[float, float],
    boxes: list[dict[str, Any]],
    query: int | None,
    title: str,
    max_megabytes: float,
) -> bytes:
    template = Path(__file__).with_name("explore.html").read_text(encoding="utf-8")
    source = _as_url(picture)
    last = calls[-1]
    if query is None:
        query = _farthest_reaching(last, valid_ratio)
    marked = {query, *(box["query"] for box in boxes)}

    costs = [_bytes_per_query(call) for call in calls]
    text = len(template) + len(source) + len(json.dumps([title, boxes]))
    room = int(max_megabytes * 1e6) - text - _BYTES_PER_LAYER * len(calls)
    wanted = [len(call.weights) * cost for call, cost in zip(calls, costs, strict=True)]
    layers = []
    for call, cost, share in zip(calls, costs, _shares(wanted, room), strict=True):
        has_boxes = len(call.weights) == len(last.weights)
        chosen, rule = _thin(call, share // cost, marked if has_boxes else set())
        if len(chosen) * cost > share:
            needed = (int(max_megabytes * 1e6) - room + sum(costs) * (1 + len(marked))) / 1e6
            raise ValueError(
                "max_megabytes must leave room for the image and the queries of boxes, about "
                f"{needed:.1f}, got {max_megabytes:g}"
            )
        layers.append(_encode(call, chosen, rule, has_boxes))
    data = {
        "validRatio": list(valid_ratio),
        "size": [picture.shape[2], picture.shape[1]],
        "boxes": boxes,
        "start": query,
        "layers": layers,
    }
    # No text in the data can end the element that holds it.
    content = {
        "title": html.escape(title),
        "image": source,
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda place: content[place[1]], template).encode()


def _farthest_reaching(call: _Call, valid_ratio: tuple[float, float]) -> int:
    """The query whose samples reach the farthest, those outside the image counting against it."""
    locations = call.locations.nan_to_num() / torch.tensor(valid_ratio)
    locations, weights = locations.flatten(1, 2), call.weights.nan_to_num().flatten(1)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-9)  # (Q, M * K)
    inside = (weights * ((locations >= 0) & (locations <= 1)).all(-1)).sum(1)
    mean = (weights[..., None] * locations).sum(1, keepdim=True)
    spread = (weights * (locations.clamp(-1, 2) - mean).square().sum(-1)).sum(1)
    return int((spread.nan_to_num(0, 0, 0) * inside**4).argmax())


def _bytes_per_query(call: _Call) -> int:
    """Bytes that a query takes in the page, in base64."""
    numbers = 3 * call.weights[0].numel() + 2  # and its index
    if call.references is not None:
        numbers += call.references[0].numel()
    return -(-numbers * 2 * 4 // 3)


def _shares(wanted: Sequence[int], room: int) -> list[int]:
    """Give each what it wants, or an equal part of what those that want less leave over."""
    shares = [0] * len(wanted)
    for place, i in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        shares[i] = max(0, min(wanted[i], room // (len(wanted) - place)))
        room -= shares[i]
    return shares


def _thin(call: _Call, most: int, marked: set[int]) -> tuple[Tensor, str]:
    """Indices of at most ``most`` queries, if that is possible, and the rule in words."""
    total, is_grid = len(call.weights), call.is_grid
    if total <= most:
        return torch.arange(total), ""
    wanted = torch.tensor(sorted(marked), dtype=torch.int64)
    longest = max(max(shape) for shape in call.shapes) if is_grid else total
    for step in range(2, longest + 1):
        chosen = _grid(call.shapes, step) if is_grid else torch.arange(0, total, step)
        chosen = torch.cat([chosen, wanted]).unique()
        if len(chosen) <= most:
            break
    else:
        chosen, step = torch.cat([torch.tensor([0]), wanted]).unique(), total
    ordinal = {2: "2nd", 3: "3rd"}.get(step, f"{step}th")
    rule = f"every {ordinal} " + ("row and column of each level" if is_grid else "query")
    if marked:
        rule += ", and those of the boxes" if len(marked) > 1 else ", and the first shown"
    return chosen, f"To keep the page small, {len(chosen)} of {total} queries are here: {rule}."


def _grid(shapes: Sequence[tuple[int, int]], step: int) -> Tensor:
    """Indices of every ``step``-th row and column of each level, from about half a step on."""
    indices, start = [], 0
    for height, width in shapes:
        rows, columns = (
            torch.arange(min(step // 2, (side - 1) // 2), side, step) for side in (height, width)
        )
        indices.append((start + rows[:, None] * width + columns).flatten())
        start += height * width
    return torch.cat(indices)


def _encode(call: _Call, chosen: Tensor, rule: str, has_boxes: bool) -> dict[str, Any]:
    total, heads = call.weights.shape[:2]
    references = call.references
    weights = (call.weights[chosen].nan_to_num(0, 1, 0).clamp(0, 1) * 65535).round()
    return {
        "name": call.name,
        "rule": rule,
        "total": total,
        "count": len(chosen),
        "chosen": _base64(chosen, torch.int32) if len(chosen) < total else None,
        "heads": heads,
        "shapes": call.shapes,
        "points": call.num_points,
        "isGrid": call.is_grid,
        "hasBoxes": has_boxes,
        "locations": _base64(_codes(call.locations[chosen]), torch.uint16),
        "weights": _base64(weights, torch.uint16),
        "references": None
        if references is None
        else _base64(_codes(references[chosen]), torch.uint16),
        "referenceShape": None if references is None else list(references.shape[1:]),
    }


def _codes(locations: Tensor) -> Tensor:
    codes = ((locations - _LOW) / (_HIGH - _LOW) * _STEPS).round()
    return torch.where((locations >= _LOW) & (locations <= _HIGH), codes, _NOWHERE)


def _base64(numbers: Tensor, dtype: torch.dtype) -> str:
    """Numbers as the page's typed arrays take them: little-endian, as is every machine of today."""
    array = numbers.to(torch.int32).to(dtype).contiguous()
    size = array.numel() * array.element_size()
    return base64.b64encode(ctypes.string_at(array.data_ptr(), size)).decode()


def _as_url(picture: Tensor) -> str:
    """The picture as a data URL: JPEG or PNG by Pillow, whichever is smaller, or PNG without it."""
    kind, content = "png", _png(picture)
    with contextlib.suppress(ImportError):
        from PIL import Image

        pixels = picture.permute(1, 2, 0).contiguous()
        mode, size = "RGB" if len(picture) == 3 else "L", (picture.shape[2], picture.shape[1])
        jpeg = io.BytesIO()
        raw = ctypes.string_at(pixels.data_ptr(), pixels.numel())
        Image.frombytes(mode, size, raw).save(jpeg, "JPEG", quality=88)
        if len(jpeg.getvalue()) < len(content):
            kind, content = "jpeg", jpeg.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _png(picture: Tensor) -> bytes:
    """A PNG file of a uint8 picture (1 or 3, H, W), rows stored as differences from the left."""
    channels, height, width = picture.shape
    pixels = picture.permute(1, 2, 0).to(torch.int32)
    left = F.pad(pixels, (0, 0, 1, 0))[:, :-1]
    rows = ((pixels - left) % 256).byte().flatten(1)  # (H, W * channels)
    rows = F.pad(rows, (1, 0), value=1).contiguous()  # 1: the filter of each row
    raw = ctypes.string_at(rows.data_ptr(), rows.numel())
    colour = 2 if channels == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)

    def chunk(kind: bytes, content: bytes) -> bytes:
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + content


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[io.BufferedWriter]:
    """A new file that takes the place of ``path`` at the end of the block, unless that fails."""
    new = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        file = open(new, "wb")  # noqa: SIM115  closed below, before it is renamed
    except OSError as error:
        raise OSError(f"path must be writable, got {str(path)!r}: {error.strerror}") from error
    try:
        with file:
            yield file
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
