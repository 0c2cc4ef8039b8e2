"""What was measured on and with: processor or GPU, versions, commit."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

import msda
from benchmarks.common.harness import ROOT


def require_kernels(device: str = "cpu") -> None:
    """Refuse to time the PyTorch reference in the name of the kernels."""
    about = msda.info()
    if about["backend"] != "native":
        sys.exit(f"the backend must be native, got {about['backend']}: {about['backend_reason']}")
    if device == "cuda" and not about["cuda_architectures"]:
        sys.exit("msda must be built with CUDA kernels, got none: python -m benchmarks gpu build")


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it fails or is missing."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of this checkout, marked where files differ from it; MSDA_COMMIT where given."""
    named = os.environ.get("MSDA_COMMIT")
    return named or output_of("git", "describe", "--always", "--dirty") or "unknown"


def cpu_name() -> str:
    """The model of the processor, with its numbers: virtual machines give many the same name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line.split(":", 1) for line in cpuinfo.read_text().splitlines() if ":" in line]
        fields = {name.strip(): text.strip() for name, text in reversed(lines)}
        if "model name" in fields and "model" in fields:
            numbers = f"family {fields.get('cpu family')}, model {fields['model']}"
            return f"{fields['model name']} ({numbers})"
    return platform.processor() or platform.machine()


def describe_machine(device: str = "cpu", *packages: str) -> dict[str, object]:
    """What figures of a device were measured on and with: torch, msda and these packages."""
    about = gpu_name() if device.startswith("cuda") else {}
    return about | {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "msda": msda.__version__,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "cpu_capability": msda.info()["cpu_capability"],
        "python": platform.python_version(),
        **versions("torch", *packages),
    }


def versions(*packages: str) -> dict[str, str]:
    """The version of each package."""
    modules = {name: importlib.import_module(name) for name in packages}
    return {name: getattr(module, "__version__", "?") for name, module in modules.items()}


def gpu_name() -> dict[str, object]:
    """The present GPU, with what decides its speed, and what drives it."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "driver": (output_of(*query).splitlines() or ["unknown"])[0],
        "cuda": torch.version.cuda,
        "cuda_architectures": msda.info()["cuda_architectures"],
    }
