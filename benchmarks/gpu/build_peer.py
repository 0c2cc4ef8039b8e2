"""Compile a peer's CUDA sources, which today's torch no longer takes as they are.

Given a checkout, the sources are copied, names that torch has changed since are replaced, and the
result is built for the present GPU; TORCH_CUDA_ARCH_LIST, such as 9.0, names another, and then no
GPU is needed. DCNv4 takes minutes.

    python -m benchmarks build-peer original Deformable-DETR/models/ops out/peers
    python -m benchmarks build-peer DCNv4 DCNv4/DCNv4_op out/peers

Each prints what to hand to the benchmarks. Others need no build: msda-triton's is a package of
Python, mmcv's an installed one.

    make gpu GPU_OPTIONS="--peer original=out/peers/original/MultiScaleDeformableAttention.so
        --peer DCNv4=out/peers/DCNv4/DCNv4/__init__.py
        --peer msda-triton=msda-triton/src/msda_triton/__init__.py --peer mmcv=mmcv._ext"

(all in one line).
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Recipe:
    """How to build a peer from its sources."""

    module: str  # the compiled one
    sources: tuple[str, ...]
    copied: tuple[str, ...]  # folders
    result: str  # what names the peer, within the copy


RECIPES = {
    "original": Recipe(
        "MultiScaleDeformableAttention",
        ("src/vision.cpp", "src/cpu/ms_deform_attn_cpu.cpp", "src/cuda/ms_deform_attn_cuda.cu"),
        ("src",),
        "MultiScaleDeformableAttention.so",
    ),
    "DCNv4": Recipe(
        "ext",
        ("src/vision.cpp", "src/cuda/dcnv4_cuda.cu", "src/cuda/flash_deform_attn_cuda.cu"),
        ("src", "DCNv4"),
        "DCNv4/__init__.py",
    ),
}

# Of names that torch had when these were written, what it has today.
REPLACEMENTS = {
    r"<THC/THCAtomics\.cuh>": "<ATen/cuda/Atomic.cuh>",
    r"\.type\(\)\.is_cuda\(\)": ".is_cuda()",
    r"\.type\(\)": ".scalar_type()",
    r"\.data<(\w+)>\(\)": r".data_ptr<\1>()",
}
# As their own setup scripts have them.
NVCC_FLAGS = [
    "-O3",
    "-DCUDA_HAS_FP16=1",
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]


def build(name: str, source: Path, output: Path) -> Path:
    """Build a peer of RECIPES from its sources; what names it.

    Raises:
        SystemExit: a source is not where it should be.
    """
    recipe = RECIPES[name]
    for part in (*recipe.copied, *recipe.sources):
        if not (source / part).exists():
            sys.exit(f"the sources of {name} must hold {part}, got none in {source}")
    folder = output / name
    for part in recipe.copied:
        shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    for path in folder.rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            text = path.read_text()
            for old, new in REPLACEMENTS.items():
                text = re.sub(old, new, text)
            path.write_text(text)
    target = folder / recipe.result
    from torch.utils.cpp_extension import load as compile_extension

    compile_extension(
        recipe.module,
        [str(folder / part) for part in recipe.sources],
        extra_include_paths=[str(folder / "src")],
        extra_cflags=["-O3", "-DWITH_CUDA"],
        extra_cuda_cflags=["-DWITH_CUDA", *NVCC_FLAGS],
        build_directory=str(target.parent),
        with_cuda=True,
        verbose=True,
    )
    return target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("peer", choices=RECIPES)
    parser.add_argument("source", type=Path, help="the folder that holds its src")
    parser.add_argument("output", type=Path, help="where to, in a folder of its name")


def main(options: argparse.Namespace) -> int:
    """Build it and print what names it."""
    target = build(options.peer, options.source, options.output)
    print(f"--peer {options.peer}={target}")
    return 0
