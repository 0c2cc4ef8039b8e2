"""One run per folder: a lock that ends with the process that holds it, however that ends."""

from __future__ import annotations

import errno
import logging
import os
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from detector import distributed

logger = logging.getLogger(__name__)

NAME = "run.lock"
# What file systems without locks answer.
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
_held: set[int] = set()  # descriptors


def _leave_to_parent() -> None:
    """A lock lives as long as any copy of its descriptor: processes that load images keep none."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)


@contextmanager
def folder_locked(folder: Path) -> Iterator[None]:
    """Within it, no other run gets the folder; one made here and left empty is removed.

    All processes of a run must call it together. The first one holds the lock: it alone writes.

    Raises:
        ValueError: another run has it; says which, in the first process. Likewise in all others.
        OSError: the folder cannot be made or written to.
    """
    descriptor, error, is_new = None, None, False
    if distributed.rank() == 0:
        is_new = not folder.exists()
        try:
            descriptor = _lock(folder)
        except (ValueError, OSError) as caught:
            error = caught
    error = distributed.gather(error)[0]
    if error:
        raise error
    try:
        yield
    finally:
        if descriptor is not None:
            _unlock(folder, descriptor)
            if is_new:
                with suppress(OSError):
                    folder.rmdir()  # empty: the run ended before it began


def _lock(folder: Path) -> int:
    """Descriptor of the locked file in ``folder``."""
    path = folder / NAME
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # the run before has just removed the folder
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
                if _locked(descriptor, path):
                    break
        except OSError as error:
            if isinstance(error, FileExistsError) and not _is_other_than_folder(error.filename):
                continue  # the run before had its folder until then, and has removed it since
            raise OSError(
                f"output must be a folder to write to, got {folder} ({error.strerror}); "
                "give another by --output"
            ) from None
    _held.add(descriptor)
    os.ftruncate(descriptor, 0)
    os.write(descriptor, _own_description().encode())
    return descriptor


def _is_other_than_folder(path: str) -> bool:
    """Whether something is there that is no folder: a file, a link to nowhere."""
    try:
        return not stat.S_ISDIR(os.lstat(path).st_mode)
    except FileNotFoundError:
        return False


def _locked(descriptor: int, path: Path) -> bool:
    """Lock a file; whether it still is the one of that name. Closes it if it does not succeed."""
    try:
        _lock_file(descriptor, path.parent)
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            return True
    except FileNotFoundError:
        pass  # the run before has removed it since it was opened
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return False


def _lock_file(descriptor: int, folder: Path) -> None:
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, "no such locks on this system")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(_refusal(folder, _description(descriptor))) from None
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        holder = _description(descriptor)
        if _is_running_here(holder):
            raise ValueError(_refusal(folder, holder)) from None
        logger.warning(
            "%s is on a file system without locks (%s): see to it that no other run writes there",
            folder,
            error.strerror,
        )


def _refusal(folder: Path, holder: str) -> str:
    return (
        f"output must be a folder that no other run writes to, got {folder}, which belongs to "
        f"{holder or 'another process'}: wait for its end, or give another folder by --output"
    )


def _own_description() -> str:
    started = time.strftime("%Y-%m-%d %H:%M")
    command = shlex.join(["python", *sys.argv])
    return f"process {os.getpid()} on {socket.gethostname()} (since {started}: {command})"


def _description(descriptor: int) -> str:
    """What the holder of a lock says of itself; nothing, if it has just got it."""
    os.lseek(descriptor, 0, os.SEEK_SET)
    return os.read(descriptor, 1000).decode(errors="replace")


def _is_running_here(holder: str) -> bool:
    """Whether a process that described itself so runs on this machine, for all that is known."""
    words = holder.split()
    if len(words) < 4 or words[3] != socket.gethostname() or words[1] == str(os.getpid()):
        return False
    return distributed.is_running(words[1])


def _unlock(folder: Path, descriptor: int) -> None:
    with suppress(OSError):
        os.unlink(folder / NAME)
    _held.discard(descriptor)
    os.close(descriptor)
