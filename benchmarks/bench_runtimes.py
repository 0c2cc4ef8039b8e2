"""Time the operator and the detector of examples/ in OpenVINO and ONNX Runtime, before and after.

Before: the standard operators that ``msda.onnx`` writes. After: our node, computed by the kernels.
The same weights, inputs and process; outputs are compared first, with the operator's within 1e-5,
then all rivals of a line are timed in turn. The share of the operator in the detector is what the
node takes by the runtime's own profile. A copy of all that a node reads and writes is timed beside
it: what a runtime would cost that could not hand over memory. With ``--output FILE`` writes what it
prints as JSON for report.py.

Needs the packages openvino and onnxruntime, and of csrc/runtimes what ``make executor`` builds: a
runtime without its library is left out, and named. Times are of float32.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import openvino
import torch
from bench_detector import make_images, make_model
from measure import ROOT, Run, SettledTimer, cpu_machine, median, quartiles, take_turns
from records import table_line, write_json
from torch import Tensor, nn
from workloads import CPU_WORKLOADS

import msda
import msda.onnx
import msda.openvino
from msda.testing import relative_error

sys.path.insert(0, str(ROOT / "examples" / "deformable_detr"))
from detector.config import PRESETS, ModelConfig

BUILD = Path(os.environ.get("MSDA_BUILD_DIR") or ROOT / "build" / "cmake") / "csrc" / "runtimes"
LIMIT = 1e-5  # of relative errors
WIDTHS = (-16, -22, 8, 10, 10, 8, 9, 8)
SIZES = {"detector-small": (256, 320), "detector": (800, 1333)}  # height, width


# ---- models --------------------------------------------------------------------------------------


class Operator(nn.Module):
    """One fused call, over levels of a fixed size."""

    def __init__(self, shapes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, value: Tensor, reference: Tensor, offsets: Tensor, logits: Tensor) -> Tensor:
        """(B, Q, M * D)."""
        return msda.ms_deform_attn_fused(value, self.shapes, None, reference, offsets, logits)


class Detector(nn.Module):
    """Logits and boxes of the last layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = make_model(config)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, Q, classes) and (B, Q, 4)."""
        outputs = self.model(images)
        return outputs["pred_logits"], outputs["pred_boxes"]


@dataclass(frozen=True)
class Model:
    """A model, its arguments, and what it computes here."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    outputs: list[Tensor]


def make(name: str, config: ModelConfig) -> Model:
    """A model by name: of CPU_WORKLOADS or of SIZES."""
    if name in CPU_WORKLOADS:
        workload = CPU_WORKLOADS[name]
        inputs = workload.fused(torch.float32)
        module: nn.Module = Operator(workload.spatial_shapes)
        arguments = inputs.tensors()
    else:
        module, arguments = Detector(config), (make_images(SIZES[name]),)
    with torch.no_grad():
        outputs = module.eval()(*arguments)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    return Model(module, tuple(arguments), outputs)


def export(model: Model, path: Path, as_node: str | None) -> None:
    """Write a model to a file of ONNX."""
    for noisy in ("torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.module,
            model.arguments,
            path,
            dynamo=True,
            verbose=False,
            custom_translation_table=msda.onnx.translations(as_node=as_node),
        )


# ---- runtimes ------------------------------------------------------------------------------------


class InOpenVINO:
    """A model in OpenVINO, which ``run`` and ``profile`` call."""

    def __init__(
        self, path: Path, threads: int, library: str | None, with_profile: bool = False
    ) -> None:
        core = openvino.Core()
        msda.openvino.register(core, library, num_threads=threads)
        options = {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",
            "PERF_COUNT": with_profile,
        }
        compiled = core.compile_model(core.read_model(path), "CPU", options)
        self.request = compiled.create_infer_request()

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One inference on arrays where they lie."""
        results = self.request.infer(arrays, share_inputs=True, share_outputs=True)
        return [results[i] for i in range(len(results))]

    def profile(self, arrays: list[np.ndarray]) -> dict[str, float]:
        """Seconds of each type of node in one inference."""
        self.run(arrays)
        times: dict[str, float] = {}
        for node in self.request.get_profiling_info():
            # The plugin calls an operator that it does not know Reference.
            ours = node.node_type == "Reference" and "ms_deform_attn" in node.node_name
            kind = "MSDeformAttn" if ours else node.node_type
            times[kind] = times.get(kind, 0) + node.real_time.total_seconds()
        return times


class InONNXRuntime:
    """The same in ONNX Runtime."""

    def __init__(
        self, path: Path, threads: int, library: str | None, with_profile: bool = False
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Its threads would otherwise wait busily while the next rival is timed.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_profiling = with_profile
        options.profile_file_prefix = str(path.with_suffix(""))
        if library is not None:
            options.register_custom_ops_library(library)
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.names = [argument.name for argument in self.session.get_inputs()]

    def run(self, arrays: list[np.ndarray]) -> list[np.ndarray]:
        """One inference on arrays where they lie."""
        return self.session.run(None, dict(zip(self.names, arrays, strict=True)))

    def profile(self, arrays: list[np.ndarray]) -> dict[str, float]:
        """Seconds of each type of node in one inference."""
        for _ in range(2):
            self.run(arrays)
        file = Path(self.session.end_profiling())
        times: dict[str, float] = {}
        for event in json.loads(file.read_text()):
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                kind = event["args"]["op_name"]
                times[kind] = times.get(kind, 0) + event["dur"] / 2e6
        return times


def built(name: str) -> str | None:
    """The path of a library, where it was built."""
    return next((str(path) for path in sorted(BUILD.glob(f"lib{name}.*"))), None)


@dataclass(frozen=True)
class Side:
    """A rival of a line: how a model is loaded."""

    runtime: str
    load: Callable[..., InOpenVINO | InONNXRuntime]
    as_node: str | None
    library: str | None = None


def sides() -> dict[str, Side]:
    """By name: of each runtime the standard operators first."""
    found = {"openvino": Side("openvino", InOpenVINO, None)}
    found["openvino, Python"] = Side("openvino", InOpenVINO, "msda")
    if library := built("msda_openvino"):
        found["openvino, library"] = Side("openvino", InOpenVINO, "msda", library)
    found["onnxruntime"] = Side("onnxruntime", InONNXRuntime, None)
    if library := built("msda_onnxruntime"):
        found["onnxruntime, library"] = Side("onnxruntime", InONNXRuntime, "msda", library)
    return found


# ---- a model -------------------------------------------------------------------------------------


def share_of_operator(times: dict[str, float]) -> float:
    """Of the time of all nodes, that of ours."""
    ours = sum(seconds for kind, seconds in times.items() if kind.startswith("MSDeformAttn"))
    return ours / sum(times.values())


def copy_of(model: Model) -> Run:
    """Copies all that the model reads and writes once: what a boundary of memory would cost."""
    pairs = [(one, torch.empty_like(one)) for one in (*model.arguments, *model.outputs)]
    return lambda: [target.copy_(source) for source, target in pairs]


def in_torch(model: Model) -> Run:
    def run() -> object:
        with torch.no_grad():
            return model.module(*model.arguments)

    return run


def measure(
    name: str, config: ModelConfig, threads: int, budget: float
) -> Iterator[dict[str, Any]]:
    """Lines of the table: of each runtime before and after, and of torch."""
    torch.set_num_threads(threads)
    model = make(name, config)
    arrays = [tensor.numpy() for tensor in model.arguments]
    rivals = sides()
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Run] = {"torch": in_torch(model)}
        if name in CPU_WORKLOADS:
            runs["copy"] = copy_of(model)
        errors, shares = {}, {}
        files: dict[str | None, Path] = {}
        for as_node in (None, "msda"):
            files[as_node] = Path(folder) / f"{as_node}.onnx"
            export(model, files[as_node], as_node)
        for side, rival in rivals.items():
            loaded = rival.load(files[rival.as_node], threads, rival.library)
            runs[side] = lambda loaded=loaded: loaded.run(arrays)
            outputs = [torch.from_numpy(np.array(output)) for output in loaded.run(arrays)]
            errors[side] = max(
                relative_error(output, expected)
                for output, expected in zip(outputs, model.outputs, strict=True)
            )
            assert errors[side] <= LIMIT, f"{side} must agree to {LIMIT:g}, got {errors[side]:.1e}"
            if rival.as_node is not None:
                profiled = rival.load(files[rival.as_node], threads, rival.library, True)
                shares[side] = share_of_operator(profiled.profile(arrays))
        times = take_turns(SettledTimer(), runs, cold=False, budget=budget, least=3)
    medians = {side: median(samples) for side, samples in times.items()}
    for side in runs:
        before = rivals[side].runtime if side in rivals else None
        yield {
            "model": name,
            "threads": threads,
            "side": side,
            "ms": medians[side] * 1e3,
            "quartiles_ms": [quartile * 1e3 for quartile in quartiles(times[side])],
            "ratio": medians[before] / medians[side] if before else None,
            "operator_share": shares.get(side),
            "error": errors.get(side),
        }


def print_row(row: dict[str, Any]) -> None:
    lower, upper = row["quartiles_ms"]
    cells = (
        row["model"],
        row["side"],
        str(row["threads"]),
        f"{row['ms']:.2f}",
        f"{lower:.0f}-{upper:.0f}",
        "" if row["ratio"] is None else f"{row['ratio']:.2f}x",
        "" if row["error"] is None else f"{row['error']:.0e}",
        "" if row["operator_share"] is None else f"{row['operator_share']:.0%}",
    )
    print(table_line(cells, WIDTHS), flush=True)


def main() -> int:
    names = (*CPU_WORKLOADS, *SIZES)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=names, action="append", help="default: all")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and all cores")
    parser.add_argument("--seconds", type=float, default=60, help="for each model (default: 60)")
    parser.add_argument("--quick", action="store_true", help="small models, to try the benchmark")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args()
    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]
    for name in ("msda_openvino", "msda_onnxruntime"):
        if built(name) is None:
            print(f"without lib{name}, which was not built (csrc/runtimes/CMakeLists.txt)")
    config = PRESETS["r50_deformable_detr"].model
    budget = options.seconds
    if options.quick:
        config = ModelConfig(
            backbone="tiny", hidden_dim=64, num_heads=4, num_encoder_layers=1,
            num_decoder_layers=1, feedforward_dim=96, num_queries=20, num_feature_levels=3,
        )  # fmt: skip
        CPU_WORKLOADS.update({name: one.tiny() for name, one in CPU_WORKLOADS.items()})
        SIZES.update(dict.fromkeys(SIZES, (64, 96)))
        budget = 0.1

    header = ("model", "in", "threads", "ms", "quartiles", "ratio", "error", "share")
    print(table_line(header, WIDTHS))
    rows: list[dict[str, Any]] = []
    for name in options.model or names:
        for threads in options.threads or sorted({1, os.cpu_count() or 1}):
            for row in measure(name, config, threads, budget):
                rows.append(row)
                print_row(row)
    if options.output:
        versions = {"openvino": openvino.__version__, "onnxruntime": onnxruntime.__version__}
        write_json(options.output, {"machine": cpu_machine() | versions, "rows": rows})
        print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
