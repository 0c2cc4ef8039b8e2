"""Pictures for people: labelled boxes, sampling points, and where a query looks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

import msda
from detector.boxes import to_centres, to_corners
from detector.data.coco import CocoDetection
from detector.data.transforms import denormalise
from detector.model import DeformableDETR, postprocess
from msda.plot import SamplingRecord, add_legend, capture_sampling, draw_sampling

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of a picture

# Of classes, in turn: those of Okabe and Ito, which colour-blind people can tell apart, that black
# text is legible on.
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#d55e00", "#cc79a7")
SMALLEST_PICTURE = 640  # pixels of the longer side; smaller images are enlarged, for the labels
HEAT = {"black": "#000004", "mid": "#bc3754", "white": "#fcffa4"}  # the ends of "inferno"
PANEL_INCHES = 3.2  # of a sheet


def name_of(label: int, categories: Sequence[str] | None) -> str:
    """What a class is called, or its number where nobody knows."""
    return f"class {label}" if categories is None else categories[label]


def describe(
    detected: dict[str, Tensor], positions: Sequence[int], categories: Sequence[str] | None
) -> list[str]:
    """Name and score of some detections."""
    labels, scores = detected["labels"].tolist(), detected["scores"].tolist()
    return [f"{name_of(labels[i], categories)} {scores[i]:.2f}" for i in positions]


def draw_boxes(
    image: Image.Image,
    boxes: Tensor,
    labels: Sequence[int],
    texts: Sequence[str],
    font_share: float = 1 / 45,
) -> Image.Image:
    """Draw boxes with texts that do not hide each other, as far as there is room.

    Args:
        image: RGB.
        boxes: (N, 4) x0, y0, x1, y1 in pixels, the most important first.
        labels: class of each box, which gives its colour.
        texts: what to write at each box.
        font_share: size of the font, as a share of the longer side.

    Returns:
        A copy with the boxes, enlarged if it is small.
    """
    scale = max(1.0, SMALLEST_PICTURE / max(image.size))
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    picture = image.resize(size, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(picture)
    font = ImageFont.load_default(max(size) * font_share)
    line = max(2, round(font.size / 8))
    corners: list[Box] = [tuple(box) for box in (boxes.cpu() * scale).tolist()]
    colours = [COLOURS[label % len(COLOURS)] for label in labels]
    for (x0, y0, x1, y1), colour in reversed(list(zip(corners, colours, strict=True))):
        box = (x0, y0, max(x0, x1), max(y0, y1))
        draw.rectangle(box, outline="black", width=line + 2)
        draw.rectangle(box, outline=colour, width=line)
    places: list[Box] = []
    for box, text in zip(corners, texts, strict=True):
        text_size = (draw.textlength(text, font) + 6, sum(font.getmetrics()) + 2)
        places.append(_place_text(text_size, box, size, places))
    for place, colour, text in reversed(list(zip(places, colours, texts, strict=True))):
        draw.rectangle(place, fill=colour, outline="black")
        draw.text((place[0] + 3, place[1] + 1), text, "black", font)
    return picture


def draw_detections(
    image: Image.Image,
    detected: dict[str, Tensor],
    positions: Sequence[int],
    categories: Sequence[str] | None,
    **options: float,
) -> Image.Image:
    """Draw some detections with names and scores; ``options`` are those of :func:`draw_boxes`."""
    labels = detected["labels"][list(positions)].tolist()
    texts = describe(detected, positions, categories)
    return draw_boxes(image, detected["boxes"][list(positions)], labels, texts, **options)


def _place_text(
    text_size: tuple[float, float], box: Box, size: tuple[int, int], taken: Sequence[Box]
) -> Box:
    """Inside the picture and on no other text: at a corner of the box, else down its left side."""
    width, height = text_size
    x0, y0, x1, y1 = box
    right = x1 - width
    corners = [(x0, y0 - height), (x0, y0), (x0, y1), (x0, y1 - height)]
    corners += [(right, y) for _, y in corners]
    further_down = [(x0, y0 + i * height) for i in range(1, int(size[1] / height))]
    places = []
    for x, y in corners + further_down:
        x, y = max(0, min(x, size[0] - width - 1)), max(0, min(y, size[1] - height - 1))
        places.append((x, y, x + width, y + height))
    free = [place for place in places if not any(_overlap(place, other) for other in taken)]
    return (free or places)[0]


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def attention_map(record: SamplingRecord, query: int, size: tuple[int, int]) -> Tensor:
    """Where one query of the first image looks: the attention that falls on each pixel.

    Each level's weights are added to the pixels that the samples are interpolated from, and divided
    by the pixels' area; the densities of all heads and levels are summed up.

    Args:
        record: of :func:`msda.plot.capture_sampling`.
        query: its index.
        size: (width, height) of the result.

    Returns:
        (H, W) float32: where all attention falls into the image, its mean is the number of heads.
    """
    areas = [height * width for height, width in record.spatial_shapes]
    num_heads = record.attention_weights.shape[2]
    # What a sample takes from a pixel is the gradient of the output by that pixel.
    value = torch.zeros(1, sum(areas), num_heads, 1, requires_grad=True)
    with torch.enable_grad():
        output = msda.ms_deform_attn(
            value,
            record.spatial_shapes,
            None,
            record.sampling_locations[:1, query : query + 1].float().cpu(),
            record.attention_weights[:1, query : query + 1].float().cpu(),
            num_points=record.num_points,
        )
    (taken,) = torch.autograd.grad(output.sum(), value)
    density = torch.zeros(size[1], size[0])
    for shape, level in zip(record.spatial_shapes, taken.sum((0, 2, 3)).split(areas), strict=True):
        level_map = level.view(1, 1, *shape) * (shape[0] * shape[1])
        density += F.interpolate(level_map, density.shape, mode="bilinear")[0, 0]
    return density


def draw_attention(image: Image.Image, record: SamplingRecord, query: int) -> Image.Image:
    """Lay :func:`attention_map` over the image in grey: from nothing over red to light yellow."""
    density = attention_map(record, query, image.size)
    # The root, because a few pixels on which samples crowd would leave the others dark.
    heat = (density / density.max().clamp(min=1e-9)).sqrt()
    levels = Image.fromarray(heat.mul(255).byte().numpy())
    colours = ImageOps.colorize(levels, **HEAT)
    opacity = levels.point(lambda level: min(170, 3 * level))
    return Image.composite(colours, image.convert("L").convert("RGB"), opacity)


def arrange(pictures: Sequence[Image.Image]) -> Image.Image:
    """Put pictures of one size in a row, more than three in a grid."""
    columns = len(pictures) if len(pictures) <= 3 else math.ceil(math.sqrt(len(pictures)))
    gap, (width, height) = 8, pictures[0].size
    size = (columns * (width + gap) - gap, -(-len(pictures) // columns) * (height + gap) - gap)
    sheet = Image.new("RGB", size, "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


@torch.no_grad()
def detect(
    model: DeformableDETR, image: Tensor, original_size: Tensor, points: bool = False
) -> tuple[dict[str, Tensor], SamplingRecord | None]:
    """Detect objects in one image.

    Args:
        model: in evaluation mode.
        image: (3, H, W) normalised, on the model's device.
        original_size: (2,) (height, width) that boxes shall refer to.
        points: whether to record the sampling points, which needs deformable attention.

    Returns:
        What :func:`detector.model.postprocess` gives, on the CPU, and the record of the last
        decoder layer.
    """
    with contextlib.ExitStack() as stack:
        samples = []
        if points:
            last_layer = model.transformer.decoder.layers[-1]
            samples = stack.enter_context(capture_sampling(last_layer))
        outputs = model(image[None])
    detected = postprocess(outputs, original_size[None])[0]
    detected = {name: tensor.cpu() for name, tensor in detected.items()}
    return detected, samples[0] if points else None


def best_queries(detected: dict[str, Tensor], count: int) -> list[int]:
    """Positions in ``detected`` of the best detection of each of the ``count`` best queries."""
    first: dict[int, int] = {}
    for position, query in enumerate(detected["queries"].tolist()):
        first.setdefault(query, position)
    return list(first.values())[:count]


def draw_detection_points(
    image: Image.Image,
    record: SamplingRecord,
    detected: dict[str, Tensor],
    positions: Sequence[int],
    categories: Sequence[str] | None,
    axes: Sequence | None = None,
) -> Figure:
    """Draw the sampling points behind some detections; see :func:`msda.plot.draw_sampling`."""
    chosen = list(positions)
    return draw_sampling(
        image,
        record,
        query=detected["queries"][chosen].tolist(),
        boxes=to_centres(detected["boxes"][chosen]) / torch.tensor(image.size * 2),
        titles=describe(detected, chosen, categories),
        axes=axes,
    )


def picture_sheet(
    model: DeformableDETR,
    dataset: CocoDetection,
    indices: Sequence[int],
    device: torch.device | str,
    threshold: float = 0.3,
) -> Figure:
    """Draw a sheet of images: ground truth, predictions, sampling points of the best detection.

    Args:
        model: any arm; without deformable attention there are no sampling points.
        dataset: of validation.
        indices: of the images, one column each.
        device: that the model is on.
        threshold: least score of a prediction that is drawn.

    Returns:
        A matplotlib figure to be saved.
    """
    from matplotlib.figure import Figure

    was_training = model.training
    model.eval()
    points = model.config.attention == "deformable"
    rows = ["ground truth", f"predictions (score >= {threshold:g})"]
    rows += ["sampling points of the best"] if points else []
    size = (PANEL_INCHES * len(indices), (PANEL_INCHES + 0.1) * len(rows) + 0.6)
    figure = Figure(size, dpi=150, layout="constrained")
    axes = figure.subplots(len(rows), len(indices), squeeze=False)
    for place, title in zip(axes[:, 0], rows, strict=True):
        place.text(
            -0.03, 0.5, title, rotation=90, ha="right", va="center", transform=place.transAxes
        )
    for place in axes.flat:
        place.set_axis_off()

    categories, font_share = dataset.categories, 1 / 24
    for index, column in zip(indices, axes.T, strict=True):
        image, target = dataset[index]
        picture = denormalise(image)
        boxes = to_corners(target["boxes"]) * torch.tensor(picture.size * 2)
        labels = target["labels"].tolist()
        names = [categories[label] for label in labels]
        column[0].imshow(draw_boxes(picture, boxes, labels, names, font_share))
        detected, record = detect(model, image.to(device), target["size"], points)
        kept = (detected["scores"] >= threshold).nonzero()[:, 0].tolist()
        column[1].imshow(
            draw_detections(picture, detected, kept, categories, font_share=font_share)
        )
        if record is not None:
            draw_detection_points(picture, record, detected, [0], categories, column[2:])
    if record is not None:
        add_legend(axes[2], record, boxes=True)
    model.train(was_training)
    return figure
