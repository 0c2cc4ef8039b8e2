"""One Deformable DETR encoder layer on a photograph: train it, check it, time it, see where it looks.

The layer learns to paint hidden blocks of the photo from what surrounds them. Then it is compared
with plain PyTorch and timed at the paper's scale, and its sampling points are drawn over the photo,
as in figure 6 of the paper (arXiv 2010.04159).
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import msda
from msda.reference import ms_deform_attn_fused_reference
from msda.testing import pixel_centres, relative_error

matplotlib.use("Agg")

CHANNELS, HEADS, POINTS = 256, 8, 4
STRIDES = (8, 16, 32, 64)
SAMPLES = (HEADS, len(STRIDES), POINTS)
CELL = STRIDES[0]  # pixels: one query of the finest level
TRAIN_SHORT_SIDE = 320  # pixels: training sees a small copy of the photo
BLOCK = 6  # cells: side of a hidden block
HIDDEN = 0.2  # share of the photo hidden in a training step

QUERIES = ((0.33, 0.22), (0.33, 0.63), (0.62, 0.45), (0.9, 0.6))  # (x, y): roof, wall, lake, tree
COLOURS = np.array(["#ffd400", "#ff7f2a", "#e8388a", "#5b2be0"])  # of levels: light to dark
POINT_AREA = 500  # in square points, of a sample with weight 1

# Allowed relative error of output and of gradients. In float64, rounding is all there is. In float32
# gradients differ more: ReLU and bilinear interpolation have kinks, and a number that rounding puts
# on the other side of one has another gradient.
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 1e-2)}


class ReferenceAttention(msda.MSDeformAttn):
    """The same module and parameters, with its core in plain PyTorch."""

    def forward(self, query, reference_points, input_flatten, input_spatial_shapes):
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
            for i, o in zip(widths[:-1], widths[1:], strict=True)
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
        levels = torch.tensor([l for l, (h, w) in enumerate(shapes) for _ in range(h * w)])
        position = sine_embedding(centres) + self.level_embedding[levels]  # (S, C)
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
    """The photo to work on: a file, or one that comes with scikit-learn."""
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            sys.exit("The default photo comes with scikit-learn: pip install scikit-learn pillow")
        return Image.fromarray(load_sample_image("china.jpg"))
    try:
        return Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no image that Pillow can read"
        sys.exit(f"Cannot read the image {path}: {reason}.")


def resize(photo: Image.Image, short_side: int, multiple: int = 1) -> Image.Image:
    """The photo in the paper's proportions: at most 1333 pixels long for a short side of 800."""
    scale = min(short_side / min(photo.size), short_side * 1333 / 800 / max(photo.size))
    size = [max(1, round(side * scale / multiple)) * multiple for side in photo.size]
    return photo.resize(size, Image.Resampling.BICUBIC)


def to_tensor(photo: Image.Image) -> Tensor:
    """Red, green, blue from -2 to 2: (1, 3, H, W)."""
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)[None] * (4 / 255) - 2


def hide(image: Tensor, corners: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Grey out blocks of cells: image with a fourth channel that says where, and that mask (h, w)."""
    hidden = torch.zeros(image.shape[2] // CELL, image.shape[3] // CELL)
    for x, y in corners:
        hidden[y : y + BLOCK, x : x + BLOCK] = 1
    pixels = hidden.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)[None, None]
    return torch.cat([image * (1 - pixels), pixels], 1), hidden.bool()


def train(model: Model, image: Tensor, steps: int) -> None:
    """Teach the model the mean colours of hidden cells, and print how far off it is."""
    colours = F.avg_pool2d(image, CELL)[0]  # (3, h, w)
    guess = (colours - colours.mean((1, 2), keepdim=True)).abs().mean().item()
    print(f"  the photo's mean colour is off by {guess / 4 * 255:.1f} of 255")
    free = [max(1, colours.shape[axis] - BLOCK + 1) for axis in (2, 1)]  # corners in x and y
    blocks = max(1, round(HIDDEN * colours[0].numel() / BLOCK**2))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps + 1, pct_start=0.1)
    start, errors = time.perf_counter(), []
    for step in range(1, steps + 1):
        corners = (torch.rand(blocks, 2) * torch.tensor(free)).long().tolist()
        masked, hidden = hide(image, corners)
        predicted = model(masked, hidden.flatten().nonzero()[:, 0])  # only what the loss reads
        loss = (predicted[0] - colours[:, hidden].T).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        errors = errors[-19:] + [loss.item() / 4 * 255]
        if step % 20 == 0 or step == steps:
            seconds = time.perf_counter() - start
            off = f"off by {statistics.mean(errors):.1f} of 255"
            print(f"  step {step} of {steps}: {off} ({seconds:.0f} s)", flush=True)


def run(
    module: nn.Module, call: Callable, features: Tensor
) -> tuple[dict[str, Tensor], list[float]]:
    """Output and gradients by name; seconds of the forward, and of forward and backward."""
    features = features.clone().requires_grad_()
    random = torch.Generator().manual_seed(0)
    grad_output = torch.randn(features.shape, generator=random).to(features)
    module.zero_grad()
    start = time.perf_counter()
    output = call(module, features)
    middle = time.perf_counter()
    output.backward(grad_output)
    seconds = [middle - start, time.perf_counter() - start]
    gradients = {f"gradient of {name}": w.grad for name, w in module.named_parameters()}
    return {"output": output, "gradient of input": features.grad, **gradients}, seconds


def compare(layer: EncoderLayer, pyramid: tuple, rounds: int) -> None:
    """Assert that the layer agrees with plain PyTorch; then time both, in turns."""
    features, position, reference_points, shapes = pyramid
    twin = EncoderLayer(ReferenceAttention).to(features.dtype)
    twin.load_state_dict(layer.state_dict())
    cases = {
        "attention": (
            layer.attention,
            twin.attention,
            lambda module, x: module(x + position, reference_points, x, shapes),
        ),
        "layer": (layer, twin, lambda module, x: module(x, position, reference_points, shapes)),
    }
    for name, (ours, theirs, call) in cases.items():
        actual, expected = run(ours, call, features)[0], run(theirs, call, features)[0]  # warm-up
        worst = [0.0, 0.0]
        for key, tensor in expected.items():
            error, kind = relative_error(actual[key], tensor), key != "output"
            allowed = TOLERANCES[features.dtype][kind]
            assert error <= allowed, f"{name}: {key} must agree to {allowed:g}, got {error:.1e}"
            worst[kind] = max(worst[kind], error)
        print(
            f"  {name}: output differs by {worst[0]:.0e}, gradients by {worst[1]:.0e}", flush=True
        )
        turns = [[run(side, call, features)[1] for side in (ours, theirs)] for _ in range(rounds)]
        if turns:
            fast, slow = np.median(turns, 0)
            for what, x, y in zip(("forward", "forward + backward"), fast, slow, strict=True):
                print(
                    f"  {name}, {what}: {x:.3f} s, PyTorch {y:.3f} s: {y / x:.2f}x faster",
                    flush=True,
                )


def draw(model: Model, photo: Image.Image, image: Tensor, title: str, output: Path) -> None:
    """Draw where a few hidden queries look, one panel each, over the photo painted by the model."""
    height, width = image.shape[2] // CELL, image.shape[3] // CELL
    centres = [(int(x * width), int(y * height)) for x, y in QUERIES]  # in cells
    corners = [(max(0, x - BLOCK // 2), max(0, y - BLOCK // 2)) for x, y in centres]
    masked, hidden = hide(image, corners)
    chosen = [y * width + x for x, y in centres]
    with torch.no_grad():
        painted = model(masked, slice(height * width))[0].unflatten(0, (height, width)) / 4 + 0.5
        features, position, reference_points, shapes = model.pyramid(masked)
        query, attention = (features + position)[0, chosen], model.layer.attention
        offsets = attention.sampling_offsets(query).unflatten(1, (*SAMPLES, 2))  # (Q, M, L, P, 2)
        weights = (
            attention.attention_weights(query).unflatten(1, (HEADS, -1)).softmax(-1).flatten(1)
        )
    sizes = torch.tensor([(w, h) for h, w in shapes])[:, None]  # (L, 1, 2)
    points = (reference_points[0, chosen, :, None, None] + offsets / sizes).flatten(1, 3)  # 0..1
    points = points * torch.tensor([width, height])  # (Q, M * L * P, 2), in cells
    colours = COLOURS[np.indices(SAMPLES)[1].ravel()]  # (M * L * P,)
    painted = torch.cat([painted.clamp(0, 1), hidden[..., None]], -1)  # (h, w, 4): opaque if hidden

    figure, panels = plt.subplots(2, 2, figsize=(12, 12 * height / width + 1))
    for panel, (x, y), point, weight in zip(panels.flat, centres, points, weights, strict=True):
        for picture in (photo, painted):
            panel.imshow(picture, extent=(0, width, height, 0), interpolation="nearest")
        panel.axhspan(0, height, color="white", alpha=0.35)  # fade the photo
        for corner in corners:
            panel.add_patch(plt.Rectangle(corner, BLOCK, BLOCK, fill=False, color="white", lw=1.5))
        order = weight.argsort(descending=True)  # small ones on top
        area, edge = weight[order] * POINT_AREA, dict(edgecolors="black", linewidths=0.5)
        panel.scatter(*point[order].T, s=area, c=colours[order], **edge)
        for colour, size in (("white", 5), ("black", 2)):
            panel.plot(x + 0.5, y + 0.5, "+", color=colour, ms=13 + size, mew=size)
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
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(output, format="png", dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    option = parser.add_argument
    option("--image", type=Path, metavar="PATH", help="a photo; default: one from scikit-learn")
    option(
        "--output",
        type=Path,
        metavar="PATH",
        default=Path("out/quickstart.png"),
        help="the picture (PNG); default: %(default)s",
    )
    for name, default, text in (
        ("seed", 0, "of weights and hidden blocks"),
        ("steps", 200, "training steps"),
        ("rounds", 5, "timed repeats"),
        ("short-side", 800, "pixels of the timed photo's short side, at least 64"),
    ):
        option(
            f"--{name}", type=int, metavar="N", default=default, help=f"{text}; default: {default}"
        )
    args = parser.parse_args()
    if args.steps < 0 or args.rounds < 1 or args.short_side < 64:
        parser.error("--steps must be at least 0, --rounds at least 1, --short-side at least 64")
    original = load_photo(args.image)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.open("ab").close()
    except OSError as error:
        sys.exit(f"Cannot write the picture {args.output}: {error.strerror}.")

    torch.manual_seed(args.seed)
    model = Model()
    small = resize(original, min(args.short_side, TRAIN_SHORT_SIDE), CELL)
    image = to_tensor(small)
    print("Training to paint hidden blocks of the photo, {} x {} pixels".format(*small.size))
    train(model, image, args.steps)

    photo = resize(original, args.short_side)
    for picture, dtype, rounds in ((small, torch.float64, 0), (photo, torch.float32, args.rounds)):
        with torch.no_grad():
            *tensors, shapes = model.pyramid(F.pad(to_tensor(picture), (0, 0, 0, 0, 0, 1)))
        size, keys = "{} x {}".format(*picture.size), tensors[0].shape[1]
        allowed = "output {:g}, gradients {:g}".format(*TOLERANCES[dtype])
        print(f"msda and plain PyTorch in {str(dtype)[6:]}, {size} pixels (allowed: {allowed})")
        print(f"  levels {shapes}, {keys} queries", flush=True)
        layer = copy.deepcopy(model.layer).to(dtype)
        compare(layer, (*(tensor.to(dtype) for tensor in tensors), shapes), rounds)

    trained = f"after {args.steps} training steps on this photo" if args.steps else "untrained"
    title = (
        f"Where four queries of one encoder layer look, {trained}\n"
        "Framed blocks were hidden from the layer, which painted them; each query is in one"
    )
    draw(model, photo, image, title, args.output)
    print(f"The picture is in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(130)
