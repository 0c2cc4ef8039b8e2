"""The entry that `kernels` loads from this repository; `msda` itself must be installed."""

from msda.integrations import kernels as layers

__all__ = ["layers"]
