"""Checkpoints, written so that a kill or a full disk at any moment loses nothing saved before."""

from __future__ import annotations

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import torch

FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or training cannot go on from it."""


def save(checkpoint: dict[str, Any], path: Path) -> None:
    """Write ``checkpoint`` to ``path`` whole, or leave what was there.

    The bytes go to another file of the same folder, and reach the disk before it takes the name:
    a rename within a folder happens entirely or not at all.

    Raises:
        CheckpointError: the file cannot be written, for instance because the disk is full; what
            was written of it is removed.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, **checkpoint}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        # torch.save turns a write that fails into a RuntimeError; its context is the cause.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        kept = "its last version is kept" if path.exists() else "there is no earlier version of it"
        raise CheckpointError(f"{path} could not be written ({cause}); {kept}") from error


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; Windows cannot open folders, and has no need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that training can go on from, to the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it holds weights alone.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise CheckpointError(f"{path} could not be read: {error}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path} must be a checkpoint of this program (format {FORMAT})")
    if "optimizer" not in checkpoint:
        raise CheckpointError(
            f"{path} must hold the state of training to resume from, but holds weights alone; "
            "--weights starts anew from it"
        )
    return checkpoint


def random_state() -> dict[str, Any]:
    """The state of every generator that training draws from, of this process."""
    return {
        "python": random.getstate(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Go on drawing where ``random_state`` was taken."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
