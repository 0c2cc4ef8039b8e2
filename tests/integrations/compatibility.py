"""Run models of other libraries, as published, before and after the line for each: ``make compat``.

Makes a fresh virtual environment with the libraries, installs the wheel of the running Python's
torch there, tries each model in a process of its own and writes docs/compatibility.md. Models have
random weights and small sizes. In float64 the outputs and the gradients of all parameters are
compared before and after, and our calls counted; in float32 both are timed in turn. The torch that
the libraries' torchvision wants comes with CUDA libraries: expect some seven gigabytes.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import venv
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "compatibility.md"
TORCH = ("torch==2.14.1", "torchvision==0.29.1")
# Installed one after the other, so that one that fails takes no other with it.
REQUIREMENTS = (
    ("transformers==5.23.0",),
    ("timm==1.0.31",),
    ("kornia==0.9.0",),
    ("ultralytics==8.4.190",),
    ("rfdetr==1.11.2",),
    ("mmcv-lite==2.1.0", "mmengine==0.10.7", "mmdet==3.3.0"),
    ("kernels==0.17.2",),
)
LIMIT = 1e-9  # relative norm in float64; a wrong sample shows in the first digits
ROUNDS = 5
KERNEL = "MultiScaleDeformableAttention"


@dataclass(frozen=True)
class Case:
    """A model of a library, and the line that puts ours into it.

    Attributes:
        model: what it is, for the page.
        packages: what it is made of, whose versions the page gives.
        line: for the page.
        make: the model, and what runs it on a batch of images.
        put: the line itself.
        take: takes it back.
        calls: how often ours ran since.
        size: of the images, height and width.
    """

    model: str
    packages: tuple[str, ...]
    line: str
    make: Callable[[], tuple[Any, Callable[[Any, Any], Any]]]
    put: Callable[[Any], object]
    take: Callable[[Any], object]
    calls: Callable[[Any], int]
    size: tuple[int, int] = (256, 320)


# ---- the models ----------------------------------------------------------------------------------


def deformable_detr(timm_backbone: bool = False):
    import transformers

    backbone = transformers.ResNetConfig(
        depths=[1, 1, 1, 1], out_features=["stage2", "stage3", "stage4"]
    )
    if timm_backbone:
        backbone = transformers.TimmBackboneConfig(
            backbone="resnet18", out_indices=[2, 3, 4], use_pretrained_backbone=False
        )
    config = transformers.DeformableDetrConfig(
        backbone_config=backbone, encoder_layers=2, decoder_layers=2
    )
    return transformers.DeformableDetrForObjectDetection(config), pixel_values


def rt_detr_v2(method: str = "default"):
    import transformers

    config = transformers.RTDetrV2Config(decoder_layers=2, decoder_method=method)
    return transformers.RTDetrV2ForObjectDetection(config), pixel_values


def mask2former():
    import transformers

    backbone = transformers.SwinConfig(
        depths=[1, 1, 1, 1], out_features=["stage1", "stage2", "stage3", "stage4"]
    )
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, encoder_layers=2, decoder_layers=2
    )
    return transformers.Mask2FormerForUniversalSegmentation(config), pixel_values


def pixel_values(model, images):
    return dict(model(pixel_values=images))


def kornia_rt_detr():
    from kornia.models.rt_detr import RTDETR, RTDETRConfig

    return RTDETR.from_config(RTDETRConfig("resnet18d", num_classes=80)), lambda m, x: m(x)


def ultralytics_rt_detr():
    from ultralytics.nn.tasks import RTDETRDetectionModel

    model = RTDETRDetectionModel("rtdetr-resnet50.yaml", verbose=False)
    return model, lambda m, x: m(x)


def rf_detr(exported: bool = False):
    from rfdetr.config import RFDETRNanoConfig
    from rfdetr.models.lwdetr import build_model_from_config
    from rfdetr.utilities.tensors import nested_tensor_from_tensor_list

    model = build_model_from_config(RFDETRNanoConfig(pretrain_weights=None, device="cpu"))
    if not exported:
        return model, lambda m, x: m(nested_tensor_from_tensor_list(list(x)))
    model.export()
    return model, lambda m, x: m(x)


def mmdet_deformable_detr():
    import msda.drop_in  # first of all: mmcv-lite cannot be imported without it
    from mmdet.registry import MODELS  # isort: skip
    from mmdet.structures import DetDataSample  # isort: skip
    from mmdet.utils import register_all_modules  # isort: skip
    from mmengine.config import Config  # isort: skip

    register_all_modules()
    folder = Path(sys.modules["mmdet"].__file__).parent / ".mim" / "configs" / "deformable_detr"
    config = Config.fromfile(folder / "deformable-detr_r50_16xb2-50e_coco.py").model
    config.backbone.init_cfg = None
    config.encoder.num_layers = config.decoder.num_layers = 2

    def run(model, images):
        size = tuple(images.shape[-2:])
        sample = DetDataSample(metainfo=dict(batch_input_shape=size, img_shape=size))
        return model(images, [sample] * len(images), mode="tensor")

    model = MODELS.build(config)
    msda.drop_in.uninstall()  # the function of mmcv that a CPU runs is its own again
    return model, run


# ---- the lines -----------------------------------------------------------------------------------


def use_msda(model):
    import msda

    msda.use_msda(model)


def undo(model):
    import msda

    msda.undo(model)


def reported(model):
    import msda

    return sum(entry.calls for entry in msda.report(model))


def drop_in(model):
    import msda.drop_in

    msda.drop_in.install()


def uninstall(model):
    import msda.drop_in

    msda.drop_in.uninstall()


def provided(model):
    import msda.drop_in

    return sum(entry.calls for entry in msda.drop_in.report())


def kernelize(model):
    import kernels

    from msda.integrations import kernels as ours

    if not isinstance(ours.ms_deform_attn, Counted):
        ours.ms_deform_attn = Counted(ours.ms_deform_attn)
    layer = kernels.LocalLayerRepository(ours.REPOSITORY, layer_name=KERNEL)
    for module in model.modules():
        if type(module).__name__ == KERNEL and not hasattr(type(module), "kernel_layer_name"):
            # transformers does it by itself where it accepts the version of kernels.
            kernels.replace_kernel_forward_from_hub(type(module), KERNEL)
    with kernels.use_kernel_mapping({KERNEL: {"cpu": layer}}):
        kernels.kernelize(model, mode=kernels.Mode.TRAINING, device="cpu", use_fallback=False)


def unkernelize(model):
    for module in model.modules():
        vars(module).pop("forward", None)


def counted(model):
    from msda.integrations import kernels as ours

    return ours.ms_deform_attn.calls


class Counted:
    """A function that counts its calls."""

    def __init__(self, ours):
        self.ours, self.calls = ours, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        return self.ours(*args, **kwargs)


USE_MSDA = (use_msda, undo, reported)
DROP_IN = (drop_in, uninstall, provided)
KERNELIZE = (kernelize, unkernelize, counted)
LINE = "`msda.use_msda(model)`"
CASES = {
    "transformers": Case("Deformable DETR", ("transformers",), LINE, deformable_detr, *USE_MSDA),
    "timm": Case(
        "Deformable DETR on a backbone of timm",
        ("transformers", "timm"),
        LINE,
        functools.partial(deformable_detr, timm_backbone=True),
        *USE_MSDA,
    ),
    "rt_detr_v2": Case("RT-DETRv2", ("transformers",), LINE, rt_detr_v2, *USE_MSDA),
    "rt_detr_v2_discrete": Case(
        "RT-DETRv2, 'discrete'",
        ("transformers",),
        LINE,
        functools.partial(rt_detr_v2, "discrete"),
        *USE_MSDA,
    ),
    "mask2former": Case("Mask2Former", ("transformers",), LINE, mask2former, *USE_MSDA),
    "kernels": Case(
        "Deformable DETR of transformers",
        ("kernels", "transformers"),
        "[`kernelize`](libraries.md#kernelize)",
        deformable_detr,
        *KERNELIZE,
    ),
    "kornia": Case("RT-DETR", ("kornia",), LINE, kornia_rt_detr, *USE_MSDA),
    "ultralytics": Case("RT-DETR", ("ultralytics",), LINE, ultralytics_rt_detr, *USE_MSDA),
    "rfdetr": Case("RF-DETR nano", ("rfdetr",), LINE, rf_detr, *USE_MSDA, (384, 384)),
    "rfdetr_exported": Case(
        "RF-DETR nano after `export()`",
        ("rfdetr",),
        LINE,
        functools.partial(rf_detr, exported=True),
        *USE_MSDA,
        (384, 384),
    ),
    "mmdet": Case(
        "Deformable DETR",
        ("mmdet", "mmcv-lite"),
        "`import msda.drop_in`",
        mmdet_deformable_detr,
        *DROP_IN,
    ),
    "mmdet_use_msda": Case(
        "Deformable DETR",
        ("mmdet", "mmcv-lite"),
        "`import msda.drop_in`, " + LINE,
        mmdet_deformable_detr,
        *USE_MSDA,
    ),
}


# ---- one trial -----------------------------------------------------------------------------------


def tensors(output: Any) -> Iterator[Any]:
    """All differentiable tensors in the output of a model."""
    import torch

    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from tensors(list(output.values()))
    elif isinstance(output, list | tuple):
        for part in output:
            yield from tensors(part)


def results(model: Any, forward: Callable[[Any, Any], Any], images: Any) -> tuple[Any, Any]:
    """Outputs, and the gradients of all parameters, each in one vector."""
    import torch

    outputs = list(tensors(forward(model, images)))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = sum(output.square().mean() for output in outputs)
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    flat = [torch.cat([x.detach().flatten() for x in part]) for part in (outputs, gradients)]
    return flat[0], flat[1]


def trial(case: Case) -> dict[str, Any]:
    """Compare and time a model before and after."""
    import torch

    import msda

    assert msda.info()["backend"] == "native", msda.info()["backend_reason"]
    torch.manual_seed(0)
    model, forward = case.make()
    model.eval()  # no dropout, no statistics of the batch; gradients all the same
    for name, module in model.named_modules():
        if name.endswith("sampling_offsets"):  # as if trained: queries look at different places
            torch.nn.init.normal_(module.weight, std=0.02)
    images = torch.rand(1, 3, *case.size, dtype=torch.float64)
    single = copy.deepcopy(model).float()
    model.double()

    wanted = results(model, forward, images)
    case.put(model)
    before = case.calls(model)
    ours = results(model, forward, images)
    calls = case.calls(model) - before
    case.take(model)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, wanted, strict=True)]
    assert calls > 0, "ours must run, got no call"
    assert max(errors) <= LIMIT, f"outputs and gradients must agree to {LIMIT:g}, got {errors}"

    images = images.float()
    times: dict[str, list[float]] = {"before": [], "after": []}
    for _ in range(ROUNDS):
        for side, switch in (("before", case.take), ("after", case.put)):
            switch(single)
            with torch.no_grad():
                forward(single, images)  # warm
                start = time.perf_counter()
                forward(single, images)
                times[side].append(time.perf_counter() - start)
    medians = {side: statistics.median(samples) for side, samples in times.items()}
    return {"errors": errors, "calls": calls, "ratio": medians["before"] / medians["after"]}


# ---- all of them ---------------------------------------------------------------------------------


def install(folder: Path) -> dict[str, str]:
    """Make the environment; why each package is missing that could not be installed."""
    from tests.packaging.try_versions import build_wheel

    if not (folder / "bin" / "python").exists():
        venv.create(folder, with_pip=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, *TORCH, "numpy"], check=True)
    missing = {}
    for packages in REQUIREMENTS:
        print("installing", *packages, flush=True)
        done = subprocess.run([*pip, *TORCH, *packages], capture_output=True, text=True)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = (errors or done.stderr.splitlines())[-1].removeprefix("ERROR: ")
            missing |= {package.partition("==")[0]: reason for package in packages}
    with tempfile.TemporaryDirectory() as scratch:
        wheel = build_wheel(Path(scratch))
        subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    return missing


def try_all(python: Path, names: list[str], missing: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What came of each case: of one that fails, the last line of its traceback."""
    outcomes = {}
    for name in names:
        print(f"== {name}", flush=True)
        absent = [package for package in CASES[name].packages if package in missing]
        if absent:
            outcomes[name] = {"failed": f"not installed: {missing[absent[0]]}"}
            continue
        command = [str(python), str(Path(__file__).resolve()), "--trial", name]
        with tempfile.TemporaryDirectory() as scratch:
            done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, text=True)
        last = (done.stdout.splitlines() or ["ended without a word"])[-1]
        outcomes[name] = json.loads(last) if done.returncode == 0 else {"failed": last}
        print(outcomes[name], flush=True)
    return outcomes


TEXT = """# Compatibility

Models as their libraries publish them, before and after the line of
[find your library](libraries.md): written by `make compat`, which installs what is named here into
a fresh environment.

Tried on {date}: msda {msda}, torch {torch}, torchvision {torchvision}, Python {python}, {machine}.

{rows}

Random weights, one image, sampling offsets spread as if trained. "Equal to" is the relative norm of
the difference in float64, over all outputs and over the gradients of all parameters. "Calls" is how
often ours ran in that forward. "Times faster" is the time of the whole model's forward before over
after, in float32, in turns in one process, backbone and all else included that the line does not
touch: what one run of a machine with other work said, so that 0.9 to 1.1 is "the same".

timm has no attention of this kind; it is here as a backbone.
"""


def page(outcomes: dict[str, dict[str, Any]], about: dict[str, str]) -> str:
    """The text of docs/compatibility.md."""
    rows = [
        "| library | model | line | equal to: outputs, gradients | calls | times faster |",
        "|---|---|---|---|---|---|",
    ]
    failures = []
    for name, case in CASES.items():
        if name not in outcomes:
            continue
        outcome = outcomes[name]
        library = ", ".join(
            f"{package} {about.get(package, '')}".strip() for package in case.packages
        )
        cells = [library, case.model, case.line]
        if "failed" in outcome:
            cells += ["not tried", "", ""]
            failures.append(f"- {library}, {case.model}: {outcome['failed']}")
        else:
            errors = ", ".join(f"{error:.0e}" for error in outcome["errors"])
            cells += [errors, str(outcome["calls"]), f"{outcome['ratio']:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    text = TEXT.format(rows="\n".join(rows), **about)
    if failures:
        text += "\nNot tried, and why:\n\n" + "\n".join(failures) + "\n"
    return text


def versions(python: Path) -> dict[str, str]:
    """Of the packages in the environment."""
    names = ["msda", "torch", "torchvision", *{p for c in CASES.values() for p in c.packages}]
    program = (
        "import importlib.metadata as m, json, sys\n"
        "found = {d.metadata['Name']: d.version for d in m.distributions()}\n"
        "print(json.dumps({n: found[n] for n in sys.argv[1:] if n in found}))"
    )
    done = subprocess.run(
        [str(python), "-c", program, *names], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> int:
    """The exit status is 0 if all models agree."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trial", choices=CASES, help="try one in this environment, print JSON")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "compat")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    if options.trial:
        warnings.simplefilter("ignore")
        try:
            print(json.dumps(trial(CASES[options.trial])))
        except Exception as error:
            import traceback

            traceback.print_exc()
            print(" ".join(f"{type(error).__name__}: {error}".split())[:300])
            return 1
        return 0
    python = options.environment / "bin" / "python"
    missing = install(options.environment)
    found = options.environment / "outcomes.json"  # kept, so that --case renews some rows
    outcomes = json.loads(found.read_text()) if options.case and found.exists() else {}
    outcomes |= try_all(python, options.case or list(CASES), missing)
    found.write_text(json.dumps(outcomes))
    about = versions(python) | {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU",
    }
    options.output.write_text(page(outcomes, about))
    return 0 if not any("failed" in outcome for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
