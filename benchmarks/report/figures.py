"""The figures, drawn from committed records and written beside them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import harness

if TYPE_CHECKING:  # matplotlib is needed to draw, not to import this file
    from matplotlib.axes import Axes

# ---- the look of all figures ---------------------------------------------------------------------

# Okabe and Ito's colours: those who are colour-blind can tell them apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PINK = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#666666"  # of what helps to read

STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.titlesize": 11,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
}


@dataclass(frozen=True)
class Look:
    """How one curve is drawn, the same in every figure."""

    label: str
    colour: str
    marker: str  # tells curves apart without colour


@contextlib.contextmanager
def drawn(path: Path, rows: int, columns: int, size: tuple[float, float]) -> Iterator[Any]:
    """A figure in our style and its (rows, columns) axes, to draw on; written as PNG at the end.

    The bytes depend on what is drawn alone.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(dict(STYLE)):
        figure = Figure(figsize=size, layout="constrained")
        yield figure, figure.subplots(rows, columns, squeeze=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150, metadata={"Software": None})


# ---- attention over growing images ---------------------------------------------------------------

ATTENTIONS = {"dense": Look("dense attention", RED, "s"), "msda": Look("MSDeformAttn", BLUE, "o")}
PANELS = {
    ("layer", "forward"): "one layer, forward",
    ("layer", "both"): "one layer, forward + backward",
    ("encoder", "both"): "encoder of 6 layers, forward + backward",
}
CHANNELS, HEADS = 256, 8
SHOWN_FROM = 256  # pixels, where curves of complexity begin
# The paper's complexity (section 4.1) for as many queries as tokens S.
COMPLEXITY: dict[str, tuple[str, Callable[[float], float]]] = {
    "dense": ("O(S C² + S² C)", lambda size: size * CHANNELS**2 + size**2 * CHANNELS),
    "msda": ("O(S C²)", lambda size: size * CHANNELS**2),
}


def scaling_figure(results: dict[str, Any], path: Path) -> None:
    """Draw time and memory against the number of tokens, from a record of scaling.

    Measured points are filled, computed ones hollow. Dashed lines are the paper's complexity, drawn
    through the point of the smallest image of 256 pixels or more.

    Raises:
        ValueError: none of the panels' rows is among the results.
    """
    panels = {}
    for (part, direction), title in PANELS.items():
        rows = [
            row for row in results["rows"] if row["part"] == part and row["direction"] == direction
        ]
        if rows:
            panels[part, direction] = (title, rows)
    if not panels:
        raise ValueError(f"results must hold rows of {list(PANELS)}, got none")
    crossovers = {(one["part"], one["direction"]): one for one in results["crossovers"]}
    with drawn(path, 2, len(panels), (max(8, 0.8 + 3.6 * len(panels)), 7)) as (figure, axes):
        for column, (case, (title, rows)) in enumerate(panels.items()):
            time_axes, memory_axes = axes[:, column]
            _draw_curves(time_axes, rows, "ms", 1)
            _draw_complexity(time_axes, rows)
            _mark_crossover(time_axes, crossovers.get(case))
            _add_sides(time_axes, rows, f"{title}\nimage side, pixels")
            _draw_curves(memory_axes, rows, "extra_bytes", 1e6)
            _draw_weights(memory_axes, rows, results["dtype"])
            _add_sides(memory_axes, rows, "")
            memory_axes.set_xlabel("tokens S, pixels of all levels")
        axes[0, 0].set_ylabel("time, ms")
        axes[1, 0].set_ylabel("peak extra memory, MB")
        keys: dict[str, Any] = {}
        for place in axes.flat:  # not every panel has computed points
            handles, labels = place.get_legend_handles_labels()
            keys |= dict(zip(labels, handles, strict=True))
        figure.legend(keys.values(), keys, loc="outside lower center", ncols=3)
        machine = results["machine"]
        where = machine.get("device") or f"{machine['cpu']}, threads: {results['threads']}"
        figure.suptitle(
            "Self-attention over all pixels of an image's feature pyramid\n"
            f"({where}, {results['dtype']}, torch {machine['torch']})"
        )


def _draw_curves(axes: Axes, rows: Sequence[dict], quantity: str, unit: float) -> None:
    """A curve for each attention: solid over what was measured, dotted on to what was computed."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for name, look in ATTENTIONS.items():
        points = [
            (
                row["tokens"],
                row["attentions"][name][quantity] / unit,
                row["attentions"][name]["computed"],
            )
            for row in rows
        ]
        measured = [(x, y) for x, y, reason in points if reason is None]
        further = [(x, y) for x, y, reason in points if reason is not None]
        style = {"color": look.colour, "marker": look.marker}
        axes.plot(*zip(*measured, strict=True), **style, label=look.label)
        if further:
            axes.plot(*zip(measured[-1], *further, strict=True), ":", color=look.colour)
            style |= {"linestyle": "none", "markerfacecolor": "white"}
            axes.plot(*zip(*further, strict=True), **style, label=f"{look.label}, computed")


def _large(rows: Sequence[dict]) -> Sequence[dict]:
    """Rows of images that are no toys; all where there are none."""
    return [row for row in rows if row["side"] >= SHOWN_FROM] or rows


def _draw_complexity(axes: Axes, rows: Sequence[dict]) -> None:
    rows = _large(rows)
    sizes = [row["tokens"] for row in rows]
    middle = sizes[len(sizes) // 2]
    for name, (label, formula) in COMPLEXITY.items():
        scale = rows[0]["attentions"][name]["ms"] / formula(sizes[0])
        times = [scale * formula(size) for size in sizes]
        axes.plot(sizes, times, "--", color=GREY, lw=1, zorder=3, label="complexity in the paper")
        above = name == "dense"
        axes.annotate(
            label,
            (middle, scale * formula(middle)),
            xytext=(-8, 6) if above else (2, -16),
            textcoords="offset points",
            ha="right" if above else "left",
            color=GREY,
        )


def _draw_weights(axes: Axes, rows: Sequence[dict], dtype: str) -> None:
    """What one layer's attention weights would take, which flash attention does not keep."""
    sizes = [row["tokens"] for row in _large(rows)]
    item = 4 if dtype == "float32" else 2
    megabytes = [HEADS * size**2 * item / 1e6 for size in sizes]
    label = f"one layer's S x S weights, {HEADS} heads: not kept"
    axes.plot(sizes, megabytes, "-.", color=GREY, lw=1, label=label)


def _mark_crossover(axes: Axes, found: dict | None) -> None:
    if found is None or found["tokens"] is None:
        return
    axes.axvline(found["tokens"], color=BLACK, lw=0.8, ls=(0, (1, 2)))
    axes.annotate(
        f"equal at S = {found['tokens']:.0f},\nan image of {found['side']:.0f} pixels",
        (found["tokens"], 0.03),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
    )


def _add_sides(axes: Axes, rows: Sequence[dict], title: str) -> None:
    """A second axis on top: the side of the image in pixels, of the powers of two."""
    shown = [row for row in rows if row["side"].bit_count() == 1] or rows
    top = axes.secondary_xaxis("top")
    top.set_xticks([row["tokens"] for row in shown], [str(row["side"]) for row in shown])
    top.minorticks_off()
    top.set_xlabel(title)


# ---- convergence ---------------------------------------------------------------------------------

ARMS = {
    "deformable + refinement": Look("deformable + refinement", SKY, "^"),
    "deformable": Look("deformable", BLUE, "o"),
    "dense + reference points": Look("dense + reference points", ORANGE, "D"),
    "dense": Look("dense", RED, "s"),
}


def convergence_figure(results: dict[str, Any], path: Path) -> None:
    """Draw validation AP against epochs and against seconds, from a record of convergence.

    A line is the mean of the seeds, the band behind it reaches from the least to the most.
    """
    clock = "processor" if results["seconds"] == "processor_seconds" else "GPU"
    axes_of = {"epoch": "epochs", results["seconds"]: f"{clock} time in training, minutes"}
    with drawn(path, 1, 2, (9, 4.4)) as (figure, panels):
        for axes, (axis, label) in zip(panels[0], axes_of.items(), strict=True):
            unit = 1 if axis == "epoch" else 60
            for name, look in ARMS.items():
                arm = results["arms"][name]
                curves = [run["curve"] for run in arm["runs"]]
                mean_at = [
                    sum(curve[i][axis] for curve in curves) / len(curves) / unit
                    for i in range(len(curves[0]))
                ]
                shares = [[curve[i]["AP"] for curve in curves] for i in range(len(curves[0]))]
                least, most = [min(one) for one in shares], [max(one) for one in shares]
                axes.fill_between(mean_at, least, most, color=look.colour, alpha=0.2, lw=0)
                means = [sum(one) / len(one) for one in shares]
                label_of = f"{look.label}, learning rate {arm['lr']:g}"
                axes.plot(
                    mean_at, means, color=look.colour, marker=look.marker, ms=3.5, label=label_of
                )
            for threshold in results["thresholds"]:
                axes.axhline(threshold, color=GREY, lw=0.8, ls=(0, (1, 2)))
            axes.set_xlabel(label)
            axes.set_xlim(left=0)
            axes.set_ylim(bottom=0)
        panels[0][0].set_ylabel("AP of the validation images")
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2)
        seeds = len(next(iter(results["arms"].values()))["runs"])
        figure.suptitle(
            f"One detector, two kinds of attention ({results['experiment']['preset']}; "
            + ("one seed" if seeds == 1 else f"mean of {seeds} seeds, least to most shaded")
            + ")\ndotted: the thresholds of the table"
        )


# ---- all -----------------------------------------------------------------------------------------

FIGURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "scaling": scaling_figure,
    "convergence": convergence_figure,
}


def draw_all() -> None:
    """Draw the figure of every committed record that has one."""
    for name, draw in FIGURES.items():
        for path in sorted(harness.RESULTS.glob(f"*/{name}.json")):
            draw(harness.read_record(path), path.with_suffix(".png"))
            print(f"written: {path.with_suffix('.png')}")
