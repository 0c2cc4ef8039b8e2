"""Time the detector of examples/ on our operator against the same detector on the reference.

Deformable DETR with a ResNet-50, random weights and one image: both sides are the same model, and
only the operator inside its attention modules changes. Outputs, loss and gradients are held against
each other first. Then, in turns: a forward pass as in inference, and a forward and backward pass as
in training, with matching and losses on every decoder layer but without the optimiser's step; the
most memory that either needs; and where its time goes. With ``--output FILE`` writes what it prints
as JSON for report.py.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

import msda
import msda.modules
from benchmarks.common import timing
from benchmarks.common.accuracy import errors_of, require
from benchmarks.common.harness import Table, add_record, all_cores, keep_record, make_record
from benchmarks.common.machine import require_kernels
from detector.config import PRESETS, ModelConfig, TrainConfig
from detector.losses import SetCriterion, total
from detector.model import DeformableDETR, build_model
from msda.reference import ms_deform_attn_fused_reference

PRESET = "r50_deformable_detr"
OPERATORS = {"msda": msda.ms_deform_attn_fused, "reference": ms_deform_attn_fused_reference}
AUTOCAST = {"off": None, "bf16": torch.bfloat16}
# To try the commands; with a backbone whose norms do not learn.
QUICK_CONFIG = ModelConfig(
    num_encoder_layers=1, num_decoder_layers=1, hidden_dim=64, num_heads=4, num_queries=20
)
QUICK_SIZE = (64, 96)
NUM_OBJECTS = 8  # in the image; COCO's have 7 in the mean

# Largest relative error (in the Euclidean norm) of the outputs, and of all gradients together. The
# roundings of the operator pass through twelve layers of attention; with 16-bit activations they
# turn into roundings of those.
LIMITS = {"off": (1e-4, 1e-2), "bf16": (3e-2, 0.5)}

RANGE = "part: "  # what the names of our ranges start with in a profile
OPERATOR = "operator"
NODE = "autograd::engine::evaluate_function"  # ranges of autograd's own, in backward
# Where the time goes.
PARTS = (
    "backbone",
    "input projections",
    "encoder, operator",
    "encoder, rest",
    "decoder, operator",
    "decoder, rest",
    "heads",
    "losses",
    "other",
)

# ---- what is run ---------------------------------------------------------------------------------


def make_model(config: ModelConfig, device: str = "cpu") -> DeformableDETR:
    """Make a detector with random weights, the same ones every time.

    Unlike at the start of training, boxes depend on what attention finds, and sampling points lie
    about a pixel around their first places: those are on the edges of cells, where gradients jump
    with the last bit of a location.
    """
    torch.manual_seed(0)
    model = build_model(config)
    for module in model.modules():
        if isinstance(module, msda.MSDeformAttn):
            nn.init.normal_(module.sampling_offsets.weight, std=0.05)
            nn.init.normal_(module.attention_weights.weight, std=0.05)
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.05)
    return model.to(device)


def make_images(size: Sequence[int], batch: int = 1, device: str = "cpu") -> Tensor:
    """Random images (B, 3, H, W)."""
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, generator=random).to(device)


def make_targets(config: ModelConfig, batch: int, device: str) -> list[dict[str, Tensor]]:
    """Random objects in every image."""
    random = torch.Generator().manual_seed(2)
    targets = []
    for _ in range(batch):
        centres = 0.2 + 0.6 * torch.rand(NUM_OBJECTS, 2, generator=random)
        sizes = 0.05 + 0.3 * torch.rand(NUM_OBJECTS, 2, generator=random)
        labels = torch.randint(config.num_classes, (NUM_OBJECTS,), generator=random)
        targets.append({"labels": labels, "boxes": torch.cat([centres, sizes], 1)})
    return [{name: tensor.to(device) for name, tensor in target.items()} for target in targets]


@contextlib.contextmanager
def on(operator: Callable[..., Tensor]) -> Iterator[None]:
    """Let the attention modules call ``operator``, in a range that the profiler sees."""

    def call(*arguments: object, **options: object) -> Tensor:
        with record_function(RANGE + OPERATOR):
            return operator(*arguments, **options)

    with mock.patch.object(msda.modules, "ms_deform_attn_fused", call):
        yield


def mark(name: str, module: nn.Module) -> None:
    """Put every call of a module in a range; without a profiler that takes microseconds."""
    ranges: list[record_function] = []

    def begin(*_: object) -> None:
        ranges.append(record_function(RANGE + name).__enter__())

    def end(*_: object) -> None:
        ranges.pop().__exit__(None, None, None)

    module.register_forward_pre_hook(begin)
    module.register_forward_hook(end)


def mark_parts(model: DeformableDETR) -> None:
    """Put the parts of the model in ranges called as in ``PARTS``."""
    mark("backbone", model.backbone[0])
    for projection in model.input_proj:
        mark("input projections", projection)
    mark("encoder, rest", model.transformer.encoder)
    mark("decoder, rest", model.transformer.decoder)
    for head in {*model.class_embed, *model.bbox_embed}:
        mark("heads", head)


class Task:
    """A model with what it is given, in inference and in training."""

    def __init__(
        self, config: ModelConfig, size: Sequence[int], batch: int, device: str, amp: str
    ) -> None:
        self.model = make_model(config, device)
        mark_parts(self.model)
        self.images = make_images(size, batch, device)
        self.targets = make_targets(config, batch, device)
        self.criterion = SetCriterion(TrainConfig())
        self.device, self.amp = device, amp

    def autocast(self) -> torch.autocast:
        """Mixed precision as asked for."""
        dtype = AUTOCAST[self.amp]
        return torch.autocast(self.device, dtype, enabled=dtype is not None)

    def forward(self) -> dict:
        """Outputs of the model in inference."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            return self.model(self.images)

    def step(self) -> Tensor:
        """The loss; leaves gradients in the parameters."""
        self.model.train()
        torch.manual_seed(3)  # of dropout
        with self.autocast():
            outputs = self.model(self.images)
        with record_function(RANGE + "losses"):
            loss = total(self.criterion(outputs, self.targets))
        loss.backward()
        return loss

    def both(self) -> None:
        """As in training, but for the optimiser; gradients do not outlive the call."""
        self.step()
        self.model.zero_grad()

    def runs(self, direction: str) -> dict[str, timing.Run]:
        """A direction's call on each operator."""
        call = {"forward": self.forward, "both": self.both}[direction]

        def run_on(operator: Callable[..., Tensor]) -> timing.Run:
            def run() -> object:
                with on(operator):
                    return call()

            return run

        return {name: run_on(operator) for name, operator in OPERATORS.items()}


DIRECTIONS = ("forward", "both")


def results_of(task: Task) -> dict[str, Tensor]:
    """What two operators must agree on: outputs of the last layer, loss, all gradients in one."""
    outputs = task.forward()
    results = {name: outputs[name] for name in ("pred_logits", "pred_boxes")}
    results["loss"] = task.step().detach()
    gradients = [p.grad.flatten() for p in task.model.parameters() if p.grad is not None]
    results["gradients"] = torch.cat(gradients)
    task.model.zero_grad()
    return results


def checked(task: Task) -> dict[str, float]:
    """Relative errors of ours against the reference; refuses those beyond their limit."""
    results = {}
    for name, operator in OPERATORS.items():
        with on(operator):
            results[name] = results_of(task)
    errors = errors_of(results["msda"], results["reference"])
    of_outputs, of_gradients = LIMITS[task.amp]
    require(errors, lambda name: of_gradients if name == "gradients" else of_outputs)
    return errors


def rounds_of(
    timer: timing.Timer, runs: Mapping[str, timing.Run], rounds: int, calls: int
) -> dict[str, list[float]]:
    """Seconds of a call in each of so many rounds, in which each has its turn of ``calls``."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timer.per_call(run, calls))
    return times


def rates(seconds: Sequence[float], images: int = 1) -> tuple[float, list[float]]:
    """Images per second: of the median time, and of its quartiles from low to high."""
    spread = [images / each for each in reversed(timing.quartiles(seconds))]
    return images / timing.median(seconds), spread


# ---- where the time goes -------------------------------------------------------------------------


def seconds_by_part(events: Sequence, device: str) -> dict[str, float]:
    """Sum the time of events by part of the model, backward passes with the part they belong to.

    An event belongs to the innermost range around it. What runs in backward belongs to where its
    autograd node was made: the last event of the forward pass that has the node's number.

    Args:
        events: of a profiler.
        device: "cpu": the host's time; "cuda": that of the kernels that an event launched.
    """
    part_of: dict[int, str] = {}
    part_of_node: dict[int, str] = {}
    totals = dict.fromkeys(PARTS, 0.0)
    on_host = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    # Parents before their children.
    for event in sorted(on_host, key=lambda e: (e.time_range.start, -e.time_range.end)):
        part = part_of.get(id(event.cpu_parent), "other")
        if event.name == RANGE + OPERATOR:
            part = part.replace("rest", OPERATOR)
        elif event.name.startswith(RANGE):
            part = event.name.removeprefix(RANGE)
        elif event.name.startswith(NODE):
            part = part_of_node.get(event.sequence_nr, part)
        elif event.sequence_nr >= 0:
            part_of_node[event.sequence_nr] = part
        part_of[id(event)] = part
        own = event.self_cpu_time_total if device == "cpu" else event.self_device_time_total
        totals[part] += own * 1e-6
    return totals


def profiled(task: Task, run: timing.Run) -> dict[str, float]:
    """Seconds of each part in one call."""
    activities = [ProfilerActivity.CPU]
    if task.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with (
        timing.silent_stderr(),
        profile(activities=activities) as profiler,
        record_function(RANGE + "other"),
    ):
        run()
        if task.device == "cuda":
            torch.cuda.synchronize()
    return seconds_by_part(profiler.events(), task.device)


# ---- the run -------------------------------------------------------------------------------------

SIDES = ("reference", "msda")


def measure(task: Task, direction: str, rounds: int, calls: int) -> dict[str, Any]:
    """Speed, memory and the time of each part, of both sides in one direction."""
    runs = task.runs(direction)
    times = rounds_of(timing.make_timer(task.device), runs, rounds, calls)
    speeds = {name: rates(samples, len(task.images)) for name, samples in times.items()}
    return {
        "direction": direction,
        "images_per_second": {name: speed for name, (speed, _) in speeds.items()},
        "quartiles": {name: spread for name, (_, spread) in speeds.items()},
        "ratio": timing.median(times["reference"]) / timing.median(times["msda"]),
        "extra_bytes": {
            name: timing.peak_extra_memory(run, task.device) for name, run in runs.items()
        },
        "part_seconds": {name: profiled(task, run) for name, run in runs.items()},
    }


def print_rows(rows: Sequence[dict]) -> None:
    columns = {"direction": -11} | {f"{side}, images/s": 13 for side in SIDES} | {"ratio": 9}
    table = Table(columns | {f"{side}, extra MB": 13 for side in SIDES})
    for row in rows:
        speeds = [f"{row['images_per_second'][side]:.3g}" for side in SIDES]
        memory = [f"{row['extra_bytes'][side] / 1e6:.0f}" for side in SIDES]
        table.add(row["direction"], *speeds, f"{row['ratio']:.2f}x", *memory)


def print_parts(rows: Sequence[dict]) -> None:
    columns = {"direction": -11, "part": -20}
    table = Table(columns | {f"{side}{what}": 9 for side in SIDES for what in (", s", ", share")})
    for row in rows:
        for part in PARTS:
            cells = []
            for side in SIDES:
                by_part = row["part_seconds"][side]
                share = by_part[part] / sum(by_part.values())
                cells += [f"{by_part[part]:.3f}", f"{share:.1%}"]
            table.add(row["direction"], part, *cells)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_record(parser, rounds=3, threads=all_cores())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1333), metavar=("H", "W"))
    parser.add_argument("--batch", type=int, default=1, help="images at once (default: 1)")
    parser.add_argument("--amp", choices=AUTOCAST, default="off", help="mixed precision")


def main(options: argparse.Namespace) -> int:
    """Compare, then time both sides in both directions."""
    require_kernels(options.device)
    torch.set_num_threads(options.threads)
    config, size = PRESETS[PRESET].model, options.size
    if options.quick:
        config, size, options.rounds = QUICK_CONFIG, QUICK_SIZE, 1
    task = Task(config, size, options.batch, options.device, options.amp)
    record = make_record(
        options,
        preset=PRESET,
        device=options.device,
        size=list(size),
        batch=options.batch,
        amp=options.amp,
        threads=options.threads,
        rounds=options.rounds,
        errors=checked(task),
    )
    errors = ", ".join(f"{name} {error:.1e}" for name, error in record["errors"].items())
    print(f"relative errors against the reference operator: {errors}", flush=True)
    calls = 10 if options.device == "cuda" else 1
    record["rows"] = [measure(task, name, options.rounds, calls) for name in DIRECTIONS]
    print_rows(record["rows"])
    print_parts(record["rows"])
    keep_record(options, record)
    return 0
