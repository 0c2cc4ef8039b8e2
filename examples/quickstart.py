"""Train one Deformable DETR encoder layer on a photograph, time it, and draw where it looks.

The layer learns to paint hidden blocks of the photo from what surrounds them. Then it is compared
with plain PyTorch and timed at the paper's scale, and its sampling points are drawn over the photo,
as in figure 6 of the paper (arXiv 2010.04159); those of every query, in a page beside the picture.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

import msda
from msda.plot import explore
from msda.reference import ms_deform_attn_fused_reference
from msda.testing import pixel_centres, relative_error

matplotlib.use("Agg")

CHANNELS, HEADS, POINTS, STRIDES = 256, 8, 4, (8, 16, 32, 64)
SAMPLES = (HEADS, len(STRIDES), POINTS)
TRAIN_SHORT_SIDE = 320  # pixels: training sees a small copy of the photo
CELL = STRIDES[0]  # pixels: side of what one query of the finest level stands for
BLOCK, HIDDEN = 6, 0.2  # side of a hidden block in cells; share of the photo hidden in a step
ROUNDS = 3  # timings; the median is printed

QUERIES = ((0.33, 0.22), (0.33, 0.63), (0.62, 0.45), (0.9, 0.6))  # (x, y): roof, wall, lake, tree
COLOURS = np.array(["#ffd400", "#ff7f2a", "#e8388a", "#5b2be0"])  # of levels: light to dark
POINT_AREA = 500  # in square points, of a sample with weight 1

# Allowed relative error of output and of gradients. float32 gradients differ by more than rounding:
# ReLU and bilinear interpolation have kinks, and a number that rounding puts on the other side of
# one has another gradient. In float64 that is too rare to matter.
TOLERANCES = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-2)}


class ReferenceAttention(msda.MSDeformAttn):
    """The same module and parameters, with its core in plain PyTorch."""

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes):
        """See :class:`msda.MSDeformAttn`."""
        output = ms_deform_attn_fused_reference(
            self.value_proj(input_flatten).unflatten(-1, (HEADS, -1)),  # (B, S, M, D)
            input_spatial_shapes,
            None,
            reference_points,
            self.sampling_offsets(query).unflatten(-1, (*SAMPLES, 2)),  # (B, Q, M, L, P, 2)
            self.attention_weights(query).unflatten(-1, SAMPLES),  # (B, Q, M, L, P)
        )
        return self.output_proj(output)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each added and then normalised; no dropout."""

    def __init__(self, attention: type[msda.MSDeformAttn] = msda.MSDeformAttn) -> None:
        super().__init__()
        self.attention = attention(CHANNELS, len(STRIDES), HEADS, POINTS)
        self.norm1, self.norm2 = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.ffn = nn.Sequential(nn.Linear(CHANNELS, 1024), nn.ReLU(), nn.Linear(1024, CHANNELS))

    def forward(self, features, position, reference_points, shapes, chosen=slice(None)):
        """Update features (1, S, C), or only the ``chosen`` ones: (1, Q, C)."""
        query = (features + position)[:, chosen]
        attended = self.attention(query, reference_points[:, chosen], features, shapes)
        x = self.norm1(features[:, chosen] + attended)
        return self.norm2(x + self.ffn(x))


class Model(nn.Module):
    """A convolutional stem, one encoder layer, and a head that names the colour of a cell."""

    def __init__(self) -> None:
        super().__init__()
        widths = [4, 32, 64] + [CHANNELS] * len(STRIDES)  # 4: red, green, blue, hidden or not
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), nn.GroupNorm(8, o), nn.ReLU())
            for i, o in pairwise(widths)
        )
        self.level_embedding = nn.Parameter(torch.randn(len(STRIDES), CHANNELS))
        self.layer = EncoderLayer()
        self.head = nn.Linear(CHANNELS, 3)
        # As the paper initialises it, every point lies exactly on a pixel: on a kink, where the
        # gradient is a matter of convention. Nudge the points off it.
        nn.init.normal_(self.layer.attention.sampling_offsets.weight, std=0.02)

    def pyramid(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]]]:
        """From image (1, 4, H, W), what the layer takes: features, position, references, shapes."""
        maps = [image]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        maps = maps[-len(STRIDES) :]
        shapes = [(level.shape[2], level.shape[3]) for level in maps]
        features = torch.cat([level.flatten(2).mT for level in maps], 1)  # (1, S, C)
        centres = pixel_centres(shapes)  # (S, 2)
        level_sizes = torch.tensor([height * width for height, width in shapes])
        position = sine_embedding(centres) + self.level_embedding.repeat_interleave(level_sizes, 0)
        return features, position[None], centres[None, :, None], shapes  # levels share references

    def forward(self, image: Tensor, cells: Tensor | slice) -> Tensor:
        """Colours (1, Q, 3) of the cells chosen, from image (1, 4, H, W)."""
        return self.head(self.layer(*self.pyramid(image), cells))


def sine_embedding(centres: Tensor) -> Tensor:
    """DETR's position embedding (S, C) of points (S, 2); y fills the first half."""
    frequency = 10000 ** (-torch.arange(0, CHANNELS // 2, 2) / (CHANNELS // 2))  # (C / 4,)
    angle = 2 * math.pi * centres.flip(1)[:, :, None] * frequency  # (S, 2, C / 4)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)


def load_photo(path: Path | None) -> Image.Image:
    """Read a photo: a file, or one that comes with scikit-learn."""
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            sys.exit("The default photo comes with scikit-learn: pip install scikit-learn")
        return Image.fromarray(load_sample_image("china.jpg"))
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no image that Pillow can read"
        sys.exit(f"Cannot read the image {path}: {reason}.")


def resize(photo: Image.Image, short_side: int, multiple: int = 1) -> Image.Image:
    """Scale the photo to a short side, but a long side of at most 1333 for a short one of 800."""
    scale = min(short_side / min(photo.size), short_side * 1333 / 800 / max(photo.size))
    size = [max(1, round(side * scale / multiple)) * multiple for side in photo.size]
    return photo.resize(size, Image.Resampling.BICUBIC)


def to_tensor(photo: Image.Image) -> Tensor:
    """Red, green, blue from -2 to 2: (1, 3, H, W)."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] * (4 / 255) - 2


def hide(image: Tensor, corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Grey out blocks of cells: the image, with a channel that says where, and a mask (h, w)."""
    hidden = torch.zeros(image.shape[2] // CELL, image.shape[3] // CELL)
    for x, y in corners:
        hidden[y : y + BLOCK, x : x + BLOCK] = 1
    pixels = hidden.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[None, None]
    return torch.cat([image * (1 - pixels), pixels], 1), hidden.bool()


def train(model: Model, image: Tensor, steps: int) -> None:
    """Teach the model the mean colours of hidden cells, and print how far off it is."""
    colours = F.avg_pool2d(image, CELL)[0]  # (3, h, w)
    guess = (colours - colours.mean((1, 2), keepdim=True)).abs().mean().item()
    print(f"  the mean colour of the photo is off by {guess / 4 * 255:.1f} of 255")
    free = torch.tensor([max(1, colours.shape[axis] - BLOCK + 1) for axis in (2, 1)])
    blocks = max(1, round(HIDDEN * colours[0].numel() / BLOCK**2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1, pct_start=0.1)
    start, errors = time.perf_counter(), []
    for step in range(1, steps + 1):
        masked, hidden = hide(image, (torch.rand(blocks, 2) * free).long().tolist())
        predicted = model(masked, hidden.flatten().nonzero()[:, 0])  # only what the loss reads
        loss = (predicted[0] - colours[:, hidden].T).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors.append(loss.item() / 4 * 255)
        if step % 20 == 0 or step == steps:
            error, seconds = np.mean(errors[-20:]), time.perf_counter() - start
            print(f"  step {step} of {steps}: off by {error:.1f} ({seconds:.0f} s)", flush=True)


def run(module: nn.Module, arguments: tuple) -> tuple[dict[str, Tensor], list[float]]:
    """Output and gradients by name; seconds of the forward, and of forward and backward."""
    first = arguments[0].clone().requires_grad_()
    random = torch.Generator().manual_seed(0)
    grad_output = torch.randn(first.shape, generator=random).to(first)
    module.zero_grad()
    start = time.perf_counter()
    output = module(first, *arguments[1:])
    middle = time.perf_counter()
    output.backward(grad_output)
    seconds = [middle - start, time.perf_counter() - start]
    gradients = {f"gradient of {name}": w.grad for name, w in module.named_parameters()}
    return {"output": output, "gradient of the input": first.grad, **gradients}, seconds


def compare(layer: EncoderLayer, pyramid: tuple, rounds: int) -> None:
    """Assert that layer and attention agree with plain PyTorch; then time both sides in turns."""
    features, position, reference_points, shapes = pyramid
    twin = EncoderLayer(ReferenceAttention).to(features)
    twin.load_state_dict(layer.state_dict())
    attention_takes = (features + position, reference_points, features, shapes)
    for name, ours, reference, takes in (
        ("attention", layer.attention, twin.attention, attention_takes),
        ("layer", layer, twin, pyramid),
    ):
        actual, expected = run(ours, takes)[0], run(reference, takes)[0]  # and warm-up
        worst = [0.0, 0.0]  # output, gradients
        for key, tensor in expected.items():
            kind, error = key != "output", relative_error(actual[key], tensor)
            allowed = TOLERANCES[tensor.dtype][kind]
            assert error <= allowed, f"{name}: {key} must agree to {allowed:g}, got {error:.1e}"
            worst[kind] = max(worst[kind], error)
        differ = f"output differs by {worst[0]:.0e}, gradients by {worst[1]:.0e}"
        print(f"  {name}: {differ}", flush=True)
        if rounds:
            times = [[run(side, takes)[1] for side in (ours, reference)] for _ in range(rounds)]
            for index, what in enumerate(("forward", "forward + backward")):
                x, y = np.median(times, 0)[:, index]
                text = f"  {name}, {what}: {x:.3f} s, plain PyTorch {y:.3f} s"
                print(f"{text}, ratio {y / x:.2f}", flush=True)


def blocks_of(image: Tensor) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Cells (x, y) of the queries that are drawn, and corners of the hidden blocks around them."""
    height, width = image.shape[2] // CELL, image.shape[3] // CELL
    centres = [(int(x * width), int(y * height)) for x, y in QUERIES]
    return centres, [(max(0, x - BLOCK // 2), max(0, y - BLOCK // 2)) for x, y in centres]


def draw(model: Model, photo: Image.Image, image: Tensor, title: str, output: Path) -> None:
    """Draw where a few hidden queries look, one panel each, over the photo painted by the model."""
    height, width = image.shape[2] // CELL, image.shape[3] // CELL
    centres, corners = blocks_of(image)
    masked, hidden = hide(image, corners)
    chosen = [y * width + x for x, y in centres]
    with torch.no_grad():
        painted = model(masked, slice(height * width))[0].unflatten(0, (height, width)) / 4 + 0.5
        features, position, reference_points, shapes = model.pyramid(masked)
        query, attention = (features + position)[0, chosen], model.layer.attention
        offsets = attention.sampling_offsets(query).unflatten(1, (*SAMPLES, 2))  # (Q, M, L, P, 2)
        weights = attention.attention_weights(query).unflatten(1, (HEADS, -1)).softmax(-1)
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]  # (L, 1, 2)
    points = reference_points[0, chosen, :, None, None] + offsets / sizes  # 0..1 across the photo
    points = points.flatten(1, 3) * torch.tensor([width, height])  # (Q, M * L * P, 2), in cells
    areas = weights.flatten(1) * POINT_AREA  # (Q, M * L * P)
    colours = COLOURS[np.indices(SAMPLES)[1].ravel()]  # (M * L * P,)
    painted = torch.cat([painted.clamp(0, 1), hidden[..., None]], -1)  # (h, w, 4): opaque if hidden

    figure, panels = plt.subplots(2, 2, figsize=(12, 12 * height / width + 1.5))
    edge = {"edgecolors": "black", "linewidths": 0.5}
    for panel, (x, y), point, area in zip(panels.flat, centres, points, areas, strict=True):
        for picture in (photo, painted):
            panel.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
        panel.axhspan(0, height, color="white", alpha=0.35)  # fade the photo
        for corner in corners:
            panel.add_patch(plt.Rectangle(corner, BLOCK, BLOCK, fill=False, lw=1))
        order = area.argsort(descending=True)  # small ones on top
        panel.scatter(*point[order].T, s=area[order], c=colours[order], **edge)
        for colour, thickness in (("white", 5), ("black", 2)):
            panel.plot(x + 0.5, y + 0.5, "+", color=colour, ms=13 + thickness, mew=thickness)
        panel.set(xlim=(0, width), ylim=(height, 0))
        panel.axis("off")
    keys = [plt.scatter([], [], marker="+", s=150, linewidths=2, color="black", label="query")]
    for colour, stride in zip(COLOURS, STRIDES, strict=True):
        keys.append(plt.scatter([], [], s=80, color=colour, label=f"stride {stride}", **edge))
    for weight in (0.02, 0.1, 0.5):
        area, label = weight * POINT_AREA, f"weight {weight}"
        keys.append(plt.scatter([], [], s=area, color="white", label=label, **edge))
    figure.legend(handles=keys, loc="lower center", ncols=len(keys), frameon=False)
    figure.suptitle(title)
    inch = 1 / figure.get_figheight()
    figure.subplots_adjust(0.01, 0.6 * inch, 0.99, 1 - 0.75 * inch, wspace=0.02, hspace=0.03)
    figure.savefig(output, format="png", dpi=100)


def write_page(model: Model, photo: Image.Image, image: Tensor, path: Path) -> None:
    """Let people explore all queries, in the photo as the layer sees it, with the same blocks."""
    size = torch.tensor([image.shape[3] / CELL, image.shape[2] / CELL])
    centres, corners = blocks_of(image)
    masked, _ = hide(image, corners)
    seen, boxes = photo.copy(), []
    for corner in corners:
        start = torch.tensor(corner) / size
        end = ((torch.tensor(corner) + BLOCK) / size).clamp(max=1)
        x0, y0, x1, y1 = (torch.cat([start, end]) * torch.tensor(photo.size * 2)).int().tolist()
        seen.paste("grey", (x0, y0, x1, y1))
        boxes.append(torch.cat([(start + end) / 2, end - start]))
    explore(
        model,
        seen,
        path,
        inputs=(masked, slice(None)),
        boxes=torch.stack(boxes),
        box_queries=[y * (image.shape[3] // CELL) + x for x, y in centres],
        box_labels=[f"hidden block {i + 1}" for i in range(len(centres))],
        title="Where one encoder layer looks to paint hidden blocks",
    )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option, default = parser.add_argument, "default: %(default)s"
    picture = Path("out/quickstart.png")
    option("--image", type=Path, metavar="PATH", help="a photo; default: one of scikit-learn's")
    option(
        "--output",
        type=Path,
        metavar="PATH",
        default=picture,
        help=f"PNG to write, and .html; {default}",
    )
    option("--seed", type=int, default=0, help=f"of weights and hidden blocks; {default}")
    option("--steps", type=int, default=200, help=f"training steps; {default}")
    option("--short-side", type=int, default=800, help=f"pixels of the timed photo; {default}")
    arguments = parser.parse_args()
    if arguments.output.suffix == ".html":
        parser.error("--output must be the PNG, got the name of the page that is written beside it")
    if arguments.steps < 0 or arguments.short_side < 64:
        parser.error("--steps must be at least 0 and --short-side at least 64")
    return arguments


def main() -> None:
    """Train, compare, time, draw."""
    arguments = parse_arguments()
    original = load_photo(arguments.image)
    try:  # before the work, not after it
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.open("ab").close()
    except OSError as error:
        sys.exit(f"Cannot write the picture {arguments.output}: {error.strerror}.")
    small = resize(original, min(arguments.short_side, TRAIN_SHORT_SIDE), CELL)
    photo = resize(original, arguments.short_side)

    torch.manual_seed(arguments.seed)
    model, image = Model(), to_tensor(small)
    backend, threads = msda.info()["backend"], torch.get_num_threads()
    print(f"msda {msda.__version__} ({backend}), torch {torch.__version__}, {threads} threads")
    print("Training to paint hidden blocks of the photo: {} x {} pixels".format(*small.size))
    train(model, image, arguments.steps)

    for picture, dtype, rounds in ((small, torch.float64, 0), (photo, torch.float32, ROUNDS)):
        with torch.no_grad():
            *tensors, shapes = model.pyramid(F.pad(to_tensor(picture), (0, 0, 0, 0, 0, 1)))
        allowed = "output {:g}, gradients {:g}".format(*TOLERANCES[dtype])
        print("Comparing with plain PyTorch: {} x {} pixels,".format(*picture.size), end=" ")
        print(f"{tensors[0].shape[1]} queries, {str(dtype)[6:]}")
        print(f"  allowed differences: {allowed}", flush=True)
        pyramid = (*(tensor.to(dtype) for tensor in tensors), shapes)
        compare(copy.deepcopy(model.layer).to(dtype), pyramid, rounds)

    steps = arguments.steps
    trained = f"after {steps} training steps on this photo" if steps else "untrained"
    title = f"Where four queries of one encoder layer look, {trained}"
    title += "\nFramed blocks were hidden from the layer, which painted them; each query is in one"
    draw(model, photo, image, title, arguments.output)
    page = arguments.output.with_suffix(".html")
    write_page(model, photo, image, page)
    print(f"Every query, to explore in a browser, is in {page}")
    print(f"The picture is in {arguments.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
