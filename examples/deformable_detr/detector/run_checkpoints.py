"""Checkpoints of a run: a kill or a full disk at any moment loses nothing that was saved before."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
from pathlib import Path
from typing import Any

import torch

from detector import checksums, distributed, weight_files

FORMAT = 1
LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"  # in the folder of a run


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or training cannot go on from it."""


# ---- writing -------------------------------------------------------------------------------------


def save(checkpoint: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint of this program; see :func:`write`."""
    write({"format": FORMAT, weight_files.SEALED: True, **checkpoint}, path, previous)


def write(content: dict[str, Any], path: Path, previous: Path | None = None) -> None:
    """Write a file of ``torch.save`` whole, or leave what was there.

    The bytes go to another file of the same folder, and reach the disk before it takes the name:
    a rename within a folder happens entirely or not at all. The file ends with a checksum.

    Args:
        content: to be saved.
        path: of the file; its folder is made.
        previous: another name in the same folder, under which what ``path`` is so far is kept
            unless it is damaged.

    Raises:
        CheckpointError: the file cannot be written, for instance because the disk is full; what
            was written of it is removed.
    """
    unfinished = _unfinished(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_what_others_left(path.parent)
        with open(unfinished, "wb") as file:
            sealing = checksums.SealingFile(file)
            torch.save(content, sealing)
            sealing.seal()
            os.fsync(file.fileno())
        if previous is not None and weight_files.is_whole(path):
            _keep(path, previous)
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


def _unfinished(path: Path) -> Path:
    """Where this process writes what becomes ``path``."""
    return path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.unfinished")


def _remove_what_others_left(folder: Path) -> None:
    """Remove what processes of this machine that are no more had begun to write."""
    name = re.compile(rf".+\.{re.escape(socket.gethostname())}\.(\d+)\.unfinished")
    with contextlib.suppress(OSError):  # somebody else's, in a folder of all
        for file in folder.iterdir():
            match = name.fullmatch(file.name)
            if match and not distributed.is_running(match[1]):
                file.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Give the file ``path`` another name, too; at any moment both names are of whole files."""
    unfinished = _unfinished(previous)
    try:
        try:
            os.link(path, unfinished)
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(path, unfinished)
            with open(unfinished, "rb+") as file:
                os.fsync(file.fileno())
        os.replace(unfinished, previous)
    finally:
        # A rename does nothing where both names are of the same file, as a kill can leave them.
        unfinished.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk; Windows cannot open folders, and has no need to."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading -------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint that training can go on from, to the CPU.

    Raises:
        CheckpointError: there is no such file, it is damaged, it is another program's, or it holds
            weights alone; says what to type.
    """
    try:
        checkpoint = weight_files.read(path, "--resume")
    except (OSError, ValueError, ImportError) as error:
        cause = str(error).removeprefix(f"{path} ")
        raise CheckpointError(f"{path} could not be read: {cause}") from error
    if checkpoint.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a checkpoint of this program (format {FORMAT}) to go on from, but is "
            f"of another one or another version; to start anew from its weights: --weights {path}"
        )
    if "optimizer" not in checkpoint:
        last = path.with_name(LAST)
        goes_on = f"--resume {last} goes on, " if path.name == BEST and last.exists() else ""
        raise CheckpointError(
            f"{path} must hold the state of training to resume from, but holds weights alone; "
            f"{goes_on}--weights {path} starts anew from it"
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
