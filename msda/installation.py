"""msda.info(): the versions of this installation, its kernels, and why it runs on them."""

from __future__ import annotations

import platform
from typing import Any

import torch

from msda import ops
from msda._version import __version__

_LABELS = {
    "msda": "msda",
    "python": "Python",
    "platform": "platform",
    "torch": "torch, running",
    "torch_built_with": "torch, built with",
    "backend": "backend",
    "backend_reason": "because",
    "library": "compiled library",
    "cpu_capability": "CPU kernels in use",
    "cpu_capabilities_supported": "  this machine runs",
    "cpu_capabilities_compiled": "  compiled",
    "cpu_threads": "CPU threads",
    "cuda_architectures": "CUDA kernels for",
    "cuda_available": "CUDA device present",
    "remedy": "what this build lacks",
}


class Info(dict[str, Any]):
    """A dict that prints as a table for people."""

    def __str__(self) -> str:
        width = max(len(label) for label in _LABELS.values())
        return "\n".join(f"{_LABELS[key]:<{width}}  {_text(self[key])}" for key in self)

    __repr__ = __str__


def info() -> Info:
    """Describe this installation.

    Returns:
        A dict, printed as a table: versions, the torch built with and the torch running, the live
        backend ("native" or "reference") and why, the instruction sets compiled, supported by this
        machine and in use, and the CUDA architectures compiled. ``cpu_capability`` is None where
        MSDA_CPU_CAPABILITY names a set that cannot be used, or without the compiled library.
        ``remedy`` is there if this build lacks what its torch could use (the compiled library, or
        CUDA kernels for a torch with CUDA), comes last and ends with the command to type.

    Example:
        >>> info()["backend"]
        'native'
    """
    has_library = ops.LIBRARY is not None
    table = Info(
        msda=__version__,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        torch=torch.__version__,
        torch_built_with=ops.library_text("msda_built_with_torch") if has_library else None,
        backend=ops.BACKEND,
        backend_reason=ops.BACKEND_REASON,
        library=str(ops.LIBRARY_PATH) if has_library else None,
        cpu_capability=ops.library_text("msda_cpu_capability") if has_library else None,
        cpu_capabilities_supported=_names("msda_supported_cpu_capabilities", " "),
        cpu_capabilities_compiled=_names("msda_compiled_cpu_capabilities", " "),
        cpu_threads=torch.get_num_threads(),
        cuda_architectures=_names("msda_cuda_architectures", ","),
        cuda_available=torch.cuda.is_available(),
    )
    if ops.REMEDY is not None:
        table["remedy"] = ops.REMEDY
    return table


def _names(function: str, separator: str) -> list[str]:
    if ops.LIBRARY is None:
        return []
    return [name for name in (ops.library_text(function) or "").split(separator) if name]


def _text(entry: Any) -> str:
    if isinstance(entry, list):
        return ", ".join(entry) or "none"
    if isinstance(entry, bool):
        return "yes" if entry else "no"
    return "none" if entry is None else str(entry)
