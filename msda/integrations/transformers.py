"""The names under which Hugging Face transformers models were served first; see `msda.patching`."""

from msda.patching import undo, use_msda

__all__ = ["undo", "use_msda"]
