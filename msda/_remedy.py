"""How to mend an installation on this machine: sentences that end with the command to type."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 10)
# nvcc is on the package index from here on, and the build brings it along.
FIRST_CUDA_WITH_PACKAGES = 13


def remedy(has_library: bool, has_cuda_kernels: bool) -> str | None:
    """How to get the parts that this build lacks and its torch could use; None if it lacks none.

    Args:
        has_library: whether the compiled library is loaded.
        has_cuda_kernels: whether it has CUDA kernels.
    """
    cuda = torch.version.cuda
    if torch_is_too_old():
        return f"for torch >= 2.10: {shlex.quote(sys.executable)} -m pip install -U torch"
    if has_library and (has_cuda_kernels or cuda is None):
        return None
    command = build_command("MSDA_CUDA=1 " if cuda else "")
    if cuda is None:
        return f"to compile the library: {command}"
    kernels = "to compile the CUDA kernels"
    if int(cuda.split(".")[0]) < FIRST_CUDA_WITH_PACKAGES and not _has_nvcc():
        kernels += f", once NVIDIA's toolkit for CUDA {cuda} is installed"
    return f"{kernels}: {command}"


def torch_is_too_old() -> bool:
    """Whether the running torch is older than what the compiled library loads under."""
    return tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH


def build_command(variables: str) -> str:
    """The command that builds msda anew from where this one came from, for the running Python."""
    pip = f"{variables}{shlex.quote(sys.executable)} -m pip install --force-reinstall --no-deps"
    if (PACKAGE.parent / "setup.py").exists():
        return f"{pip} -e {shlex.quote(str(PACKAGE.parent))}"
    url, commit = _came_from()
    if commit:
        return f"{pip} --no-cache-dir {shlex.quote(f'git+{url}@{commit}')}"
    if url and not url.endswith(".whl"):
        return f"{pip} {shlex.quote(url)}"
    return f"cd a_checkout_of_msda && {pip} ."


def _came_from() -> tuple[str, str]:
    """The address that pip installed this package from, and the commit if that is a repository."""
    for address in PACKAGE.parent.glob("*.dist-info/direct_url.json"):
        # By its files: pyproject.toml decides on the distribution's name.
        if "msda/__init__.py," in address.with_name("RECORD").read_text():
            record = json.loads(address.read_text())
            return record["url"], record.get("vcs_info", {}).get("commit_id", "")
    return "", ""


def _has_nvcc() -> bool:
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return any(shutil.which(place) for place in places if place)
