"""Time deformable attention against dense attention over images of growing size.

The tokens are all pixels of the pyramid of a square image (strides 8, 16, 32, 64), each of them a
query. The layer is one attention module: MSDeformAttn against PyTorch's MultiheadAttention, whose
scaled_dot_product_attention must run by flash attention. The encoder is the detector's: six layers,
each with a feed-forward net. "both" is a forward and a backward call as in training, with the
gradients of features and parameters. Each side is first compared with its definition.

A point whose time, taken on by the square of the tokens (dense) or by the tokens (msda) from the
size before, would not fit in ``--seconds``, or whose memory would not fit in what is free, is not
measured. Its value is computed by a law fitted to the measured points and marked so. FLOPs are
counted by torch.utils.flop_counter: 2 for a multiply-add, in matrix products and, by the rule of
msda.flops, in the sampling. What flash attention computes again in backward does not count.

Prints a table, fitted exponents and where the curves cross.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import msda
import msda.flops  # tells the counter about our operators
from benchmarks.common import harness, timing
from benchmarks.common.accuracy import errors_of, require
from benchmarks.common.machine import require_kernels
from detector.config import ModelConfig
from detector.dense_attention import DenseTransformer
from detector.transformer import DeformableTransformer, Encoder, Tokens, flatten_levels
from msda.reference import ms_deform_attn_fused_reference
from msda.testing import TOLERANCES, available_memory

ATTENTIONS = ("dense", "msda")
PARTS = ("layer", "encoder")
DIRECTIONS = ("forward", "both")
STRIDES = (8, 16, 32, 64)
SIDES = (32, 64, 128, 256, 384, 512, 640, 800, 1024, 1280, 1536, 2048)
SMALLEST_IMAGE = 256  # below, a call takes what it takes to make one: nothing is fitted there
CONFIG = ModelConfig(dropout=0.0)  # the paper's: 256 channels, 8 heads, 4 points, 6 layers
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}

# Powers of the number of tokens. A dense layer has projections and products of all pairs.
TIME_POWERS = {"dense": (1, 2), "msda": (1,)}
MEMORY_POWERS = (1,)  # flash attention keeps no weights
FREE_SHARE = 0.6  # of the free memory may be used

# ---- what is timed -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """What is timed in one series of rows."""

    part: str
    direction: str


def make_encoder(name: str) -> Encoder:
    """The detector's encoder with one of the two attentions, initialised as the paper's.

    A new MSDeformAttn samples one pattern around every query. The weights of its offsets and logits
    are drawn such that unit normal features move samples by some 2.5 pixels.
    """
    transformer = {"dense": DenseTransformer, "msda": DeformableTransformer}[name]
    encoder = transformer(CONFIG).encoder
    for module in encoder.modules():
        if isinstance(module, msda.MSDeformAttn):
            scale = (2 * CONFIG.hidden_dim) ** -0.5  # features and positions are added
            nn.init.normal_(module.sampling_offsets.weight, std=2.5 * scale)
            nn.init.normal_(module.attention_weights.weight, std=scale)
    return encoder


def shapes_of(side: int) -> list[tuple[int, int]]:
    """(height, width) of each level for an image of ``side`` x ``side`` pixels."""
    return [(math.ceil(side / stride),) * 2 for stride in STRIDES]


def tokens_of(side: int) -> int:
    """How many tokens S such an image has."""
    return sum(height * width for height, width in shapes_of(side))


def make_tokens(side: int, dtype: torch.dtype) -> Tokens:
    """Normal features and positions of one image, on torch's present default device."""
    channels, shapes = CONFIG.hidden_dim, shapes_of(side)
    maps = [torch.randn(1, channels, *shape, dtype=dtype) for shape in shapes]
    positions = [torch.randn(1, *shape, channels, dtype=dtype) for shape in shapes]
    tokens = flatten_levels(maps, positions, None, maps[0].new_zeros(len(shapes), channels))
    return replace(tokens, features=tokens.features.contiguous())


def part_of(part: str, encoder: Encoder) -> tuple[nn.Module, Callable[[Tokens], Tensor]]:
    """The module that is timed, and its call."""
    if part == "encoder":
        return encoder, encoder
    layer = encoder.layers[0]
    return layer.self_attn, lambda tokens: layer.attend(tokens.features, tokens)


def with_leaf(tokens: Tokens) -> Tokens:
    """The same tokens, of whose features a gradient is wanted."""
    return replace(tokens, features=tokens.features.detach().clone().requires_grad_())


def call_of(case: Case, encoder: Encoder, tokens: Tokens) -> timing.Run:
    """One call to time; "both" returns the gradients of the features and of the parameters."""
    module, compute = part_of(case.part, encoder)
    if case.direction == "forward":
        return torch.no_grad()(lambda: compute(tokens))
    tokens = with_leaf(tokens)
    inputs = [tokens.features, *module.parameters()]
    grad_output = torch.randn_like(tokens.features)
    return lambda: torch.autograd.grad(compute(tokens), inputs, grad_output)


# ---- correctness ---------------------------------------------------------------------------------


def dense_by_definition(attention: nn.MultiheadAttention, tokens: Tokens) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V over all tokens, between the module's projections; in float64."""
    features, placed = tokens.features.double(), (tokens.features + tokens.positions).double()
    weights, biases = attention.in_proj_weight.double(), attention.in_proj_bias.double()
    query, key, value = (
        nn.functional.linear(given, weight, bias)
        .unflatten(-1, (attention.num_heads, -1))
        .transpose(1, 2)  # (1, M, S, D)
        for given, weight, bias in zip(
            (placed, placed, features), weights.chunk(3), biases.chunk(3), strict=True
        )
    )
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    output = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    project = attention.out_proj
    return nn.functional.linear(output, project.weight.double(), project.bias.double())


def msda_by_definition(attention: msda.MSDeformAttn, tokens: Tokens) -> Tensor:
    """The module around the reference."""
    placed = tokens.features + tokens.positions
    sizes = (attention.n_heads, attention.n_levels, attention.n_points)
    output = ms_deform_attn_fused_reference(
        attention.value_proj(tokens.features).unflatten(-1, (attention.n_heads, -1)),
        tokens.shapes,
        None,
        tokens.on_maps(tokens.centres),
        attention.sampling_offsets(placed).unflatten(-1, (*sizes, 2)),
        attention.attention_weights(placed).unflatten(-1, sizes),
    )
    return attention.output_proj(output)


DEFINITIONS: dict[str, Callable[[Any, Tokens], Tensor]] = {
    "dense": dense_by_definition,
    "msda": msda_by_definition,
}


def check(name: str, encoder: Encoder, tokens: Tokens) -> None:
    """Refuse an attention whose layer has another output or gradient than its definition."""
    tokens = with_leaf(tokens)
    attention, compute = part_of("layer", encoder)
    grad_output, results = torch.randn_like(tokens.features), []
    for output in (compute(tokens), DEFINITIONS[name](attention, tokens)):
        (gradient,) = torch.autograd.grad(output, tokens.features, grad_output.to(output.dtype))
        results.append({"output": output.detach(), "gradient": gradient})
    tolerance = TOLERANCES[tokens.features.dtype]
    # A rounding in each of the projections, and the one of the attention. Where rounding moves a
    # sample across a cell edge, its gradient is the other cell's.
    limits = {"output": 5 * tolerance, "gradient": max(2e-3, 10 * tolerance)}
    require(errors_of(*results), limits.__getitem__, name)


# ---- FLOPs ---------------------------------------------------------------------------------------


@functools.cache
def encoder_without_data(name: str) -> Encoder:
    """An encoder to count with."""
    with torch.device("meta"):
        return make_encoder(name)


def flops_of(case: Case, name: str, side: int) -> int:
    """What a call computes, counted on tensors without data."""
    backward = case.direction == "both"
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), torch.set_grad_enabled(backward):
        _, compute = part_of(case.part, encoder_without_data(name))
        tokens = with_leaf(make_tokens(side, torch.float32))
        with FlopCounterMode(display=False) as counter:
            output = compute(tokens)
            if backward:
                output.backward(output)
    return counter.get_total_flops()


# ---- fits ----------------------------------------------------------------------------------------


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float | None:
    """The slope of log values over log sizes by least squares; None for less than two points."""
    if len(sizes) < 2:
        return None
    logs = [[math.log(number) for number in numbers] for numbers in (sizes, values)]
    return statistics.linear_regression(*logs).slope


def law(sizes: Sequence[float], values: Sequence[float], powers: Sequence[int]) -> dict[int, float]:
    """Fit a sum of powers: its coefficients, none negative, of least relative squared error."""

    def fit(powers: Sequence[int]) -> dict[int, float]:
        rows = [[size**power / value for power in powers] for size, value in zip_of(sizes, values)]
        matrix = torch.tensor(rows, dtype=torch.float64)
        found = torch.linalg.lstsq(matrix, matrix.new_ones(len(rows), 1)).solution
        return dict(zip(powers, found.flatten().tolist(), strict=True))

    if len(sizes) >= len(powers):
        fitted = fit(powers)
        if min(fitted.values()) >= 0:
            return fitted

    def error(fitted: dict[int, float]) -> float:
        squares = [(at(fitted, size) / value - 1) ** 2 for size, value in zip_of(sizes, values)]
        return round(sum(squares), 12)

    # Of equals, as for a single point, the lowest power: no more than dense attention takes.
    return min((fit([power]) for power in powers), key=error)


def zip_of(sizes: Sequence[float], values: Sequence[float]) -> Iterator[tuple[float, float]]:
    return zip(sizes, values, strict=True)


def at(fitted: dict[int, float], size: float) -> float:
    """The value of a law."""
    return sum(factor * size**power for power, factor in fitted.items())


def crossover(
    sizes: Sequence[float], dense: Sequence[float], ours: Sequence[float]
) -> float | None:
    """Where ours begins to be the faster one for good, on straight lines between logarithms.

    None where it is so from the first size on; infinite where it is not so at the last.
    """
    gains = [math.log(slow / fast) for slow, fast in zip(dense, ours, strict=True)]
    if gains[-1] <= 0:
        return math.inf
    for index in range(len(gains) - 2, -1, -1):
        if gains[index] <= 0:
            share = -gains[index] / (gains[index + 1] - gains[index])
            before, after = math.log(sizes[index]), math.log(sizes[index + 1])
            return math.exp(before + share * (after - before))
    return None


def measured_points(rows: list[dict], name: str, quantity: str) -> tuple[list[int], list[float]]:
    """Tokens and values of what was measured in one series of rows, of images that are no toys.

    Of smaller ones where there are no others.
    """
    points = [
        (row["side"], row["tokens"], row["attentions"][name][quantity])
        for row in rows
        if row["attentions"][name]["computed"] is None
    ]
    chosen = [point for point in points if point[0] >= SMALLEST_IMAGE] or points
    return [tokens for _, tokens, _ in chosen], [value for _, _, value in chosen]


def fits_of(case: Case, rows: list[dict]) -> list[dict[str, Any]]:
    """The exponents of one series of rows, over all fitted points and over the larger half."""
    fits = []
    for name in ATTENTIONS:
        for quantity, powers in (("ms", TIME_POWERS[name]), ("extra_bytes", MEMORY_POWERS)):
            sizes, values = measured_points(rows, name, quantity)
            half = len(sizes) // 2
            fits.append(
                {
                    "part": case.part,
                    "direction": case.direction,
                    "attention": name,
                    "quantity": quantity,
                    "tokens": sizes,
                    "exponent": exponent(sizes, values),
                    "half": len(sizes) - half,
                    "half_exponent": exponent(sizes[half:], values[half:]),
                    "law": law(sizes, values, powers) if sizes else {},
                }
            )
    return fits


def crossover_of(case: Case, rows: list[dict]) -> dict[str, Any]:
    """Where the two times of one series of rows cross, in tokens and pixels of the image's side."""
    whole = [
        row
        for row in rows
        if all(entry["computed"] is None for entry in row["attentions"].values())
    ]
    found: dict[str, Any] = {"part": case.part, "direction": case.direction}
    if not whole:
        return found | {"tokens": None, "side": None, "where": "nothing was measured"}
    sizes = [row["tokens"] for row in whole]
    times = [[row["attentions"][name]["ms"] for row in whole] for name in ATTENTIONS]
    tokens = crossover(sizes, *times)
    if tokens is None:
        where = f"below the smallest size measured, {whole[0]['side']} pixels"
    elif math.isinf(tokens):
        where = f"beyond the largest size measured, {whole[-1]['side']} pixels"
        tokens = None
    else:
        side = math.sqrt(tokens / sum(stride**-2 for stride in STRIDES))
        return found | {"tokens": tokens, "side": side, "where": f"at about {side:.0f} pixels"}
    return found | {"tokens": None, "side": None, "where": where}


# ---- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What all rows of a run share."""

    device: str
    dtype: torch.dtype
    timer: timing.Timer
    encoders: dict[str, Encoder]
    budget: float  # seconds that one point may take


def free_memory(device: str) -> float:
    """Bytes that a call may still use."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else available_memory()
    return FREE_SHARE * free


def refusal(setup: Setup, rows: list[dict], name: str, tokens: int) -> str | None:
    """Why a point is not measured, judged by the one before; None where it is."""
    if not rows or rows[-1]["side"] < SMALLEST_IMAGE:
        return None
    last = rows[-1]["attentions"][name]
    if last["computed"] is not None:
        return last["computed"]
    growth = tokens / rows[-1]["tokens"]
    # One call for the memory, which is the warm-up too, and one that is timed.
    needed = 2 * last["ms"] * 1e-3 * growth ** max(TIME_POWERS[name])
    if needed > setup.budget:
        return f"time: two calls would take more than {setup.budget:g} s"
    memory, free = last["extra_bytes"] * growth, free_memory(setup.device)
    if memory > free:
        return f"memory: {memory / 1e9:.1f} GB would be needed, {free / 1e9:.1f} GB may be used"
    return None


def computed(rows: list[dict], name: str, tokens: int, reason: str) -> dict[str, Any]:
    """What the measured points say about one that is not."""
    values = {
        quantity: at(law(*measured_points(rows, name, quantity), powers), tokens)
        for quantity, powers in (("ms", TIME_POWERS[name]), ("extra_bytes", MEMORY_POWERS))
    }
    return values | {"computed": reason}


def measure_row(setup: Setup, case: Case, side: int, rows: list[dict]) -> dict[str, Any]:
    """One line of the table; ``rows`` are those of the same case and smaller sizes."""
    tokens_count = tokens_of(side)
    memory_of = functools.partial(timing.peak_extra_memory, device=setup.device)
    results: dict[str, dict[str, Any]] = {}
    short, long = {}, {}
    with torch.device(setup.device):
        tokens = make_tokens(side, setup.dtype)
    for name in ATTENTIONS:
        reason = refusal(setup, rows, name, tokens_count)
        if reason is None:
            run = call_of(case, setup.encoders[name], tokens)
            extra: list[int] = []
            try:
                taken = timing.seconds(lambda: extra.append(memory_of(run)))  # noqa: B023
            except torch.OutOfMemoryError as error:
                reason = f"memory: {error}"
            else:
                (short if taken < setup.budget / 30 else long)[name] = run
                results[name] = {"extra_bytes": extra[0], "computed": None}
        if reason is not None:
            if not rows:
                raise SystemExit(f"the first of sides must fit, got {side}: {reason}")
            results[name] = computed(rows, name, tokens_count, reason)
    # Only short calls take turns: those for which it takes little to be repeated and to wait.
    times = timing.take_turns(setup.timer, short, budget=setup.budget / 15) if short else {}
    times |= {name: [setup.timer.per_call(run, 1)] for name, run in long.items()}
    for name, samples in times.items():
        results[name] |= timing.summary(samples)
    for name in ATTENTIONS:
        results[name]["flops"] = flops_of(case, name, side)
    return {
        "part": case.part,
        "direction": case.direction,
        "side": side,
        "tokens": tokens_count,
        "ratio": results["dense"]["ms"] / results["msda"]["ms"],
        "attentions": results,
    }


# ---- printing ------------------------------------------------------------------------------------

COLUMNS = {
    "part": -9,
    "direction": -10,
    "side": 6,
    "tokens": 8,
    "dense, ms": 14,
    "msda, ms": 12,
    "ratio": 9,
    "dense, MB": 11,
    "msda, MB": 10,
    "dense, GFLOP": 11,
    "msda, GFLOP": 10,
}


def add_row(table: harness.Table, row: dict[str, Any]) -> None:
    by_name = row["attentions"]
    mark = {name: "" if one["computed"] is None else "~" for name, one in by_name.items()}

    def cells(quantity: str, unit: float, form: str) -> list[str]:
        return [f"{mark[name]}{by_name[name][quantity] / unit:{form}}" for name in ATTENTIONS]

    table.add(
        *(row[name] for name in ("part", "direction", "side", "tokens")),
        *cells("ms", 1, ".3f"),
        f"{max(mark.values())}{row['ratio']:.1f}x",
        *cells("extra_bytes", 1e6, ".1f"),
        *(f"{by_name[name]['flops'] / 1e9:.2f}" for name in ATTENTIONS),
    )


def print_ending(results: dict[str, Any]) -> None:
    print("\nratio: time of dense attention over ours. ~: computed, not measured, because of")
    reasons = {
        f"  {row['part']}, {row['direction']}, {name}: {one['computed']}"
        for row in results["rows"]
        for name, one in row["attentions"].items()
        if one["computed"] is not None
    }
    print("\n".join(sorted(reasons)) or "  (nothing)")
    print("\nexponents of the number of tokens, over the measured points (over the larger half):")
    for fit in results["fits"]:
        if fit["exponent"] is None:
            continue
        half = fit["half_exponent"]
        more = "" if half is None else f" ({half:.2f}, {fit['half']} points)"
        what = f"{fit['part']}, {fit['direction']}, {fit['attention']}, {NAMES[fit['quantity']]}:"
        print(f"  {what:<34}{fit['exponent']:.2f}, {len(fit['tokens'])} points{more}")
    print("\nmsda is the faster one from where on:")
    for found in results["crossovers"]:
        print(f"  {found['part']}, {found['direction']}: {found['where']}")


NAMES = {"ms": "time", "extra_bytes": "memory"}

# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser, seconds=60.0, threads=harness.all_cores())
    parser.add_argument("--sides", type=int, nargs="+", default=SIDES, help="of images, in pixels")
    harness.add_choice(parser, "part", PARTS)
    harness.add_choice(parser, "direction", DIRECTIONS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")


def main(options: argparse.Namespace) -> int:
    """Measure every size, then fit what was measured."""
    if options.device == "cuda" and options.dtype == "float32":
        sys.exit("--dtype must be of 16 bits on cuda, as flash attention is, got float32")
    require_kernels(options.device)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.quick:
        options.sides, options.seconds = (32, 64), 0.01

    dtype, device = DTYPES[options.dtype], options.device
    encoders = {name: make_encoder(name).to(device, dtype) for name in ATTENTIONS}
    setup = Setup(device, dtype, timing.make_timer(device), encoders, options.seconds)
    record = harness.make_record(
        options, dtype=options.dtype, threads=options.threads, rows=[], fits=[], crossovers=[]
    )
    harness.print_machine(record)
    table = harness.Table(COLUMNS)
    sides = sorted(options.sides)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for side in [side for side in sides if side <= SMALLEST_IMAGE] or sides[:1]:
            with torch.device(device):
                tokens = make_tokens(side, dtype)
            for name, encoder in encoders.items():
                check(name, encoder, tokens)
        for part in options.part or PARTS:
            for direction in options.direction or DIRECTIONS:
                case, rows = Case(part, direction), []
                for side in sides:
                    rows.append(measure_row(setup, case, side, rows))
                    add_row(table, rows[-1])
                record["rows"] += rows
                record["fits"] += fits_of(case, rows)
                record["crossovers"].append(crossover_of(case, rows))
                if options.output:
                    harness.write_json(options.output, record)
    print_ending(record)
    harness.keep_record(options, record)
    return 0
