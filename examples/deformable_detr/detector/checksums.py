"""Checksums in files of ``torch.save``: the comment that a zip archive may end with.

A copied file keeps it, and whatever reads such files still does. It covers every byte before it.
"""

from __future__ import annotations

import hashlib
import os
from typing import BinaryIO

_LENGTH = 2  # bytes: the length of the comment, which is the last that an archive without one holds
_PREFIX = b"SHA-256 of all bytes before it: "
_DIGITS = 2 * hashlib.sha256().digest_size
_BLOCK = 1 << 20


class SealingFile:
    """What ``torch.save`` writes to, on its way to ``file``; ``seal`` adds the checksum."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self._held = file, hashlib.sha256(), b""

    def write(self, data: bytes) -> int:
        """Write all but the last bytes, which may be what the checksum replaces."""
        view = memoryview(data).cast("B")
        if len(view) < _LENGTH:
            data = self._held + bytes(view)
            self._write(data[:-_LENGTH])
            self._held = data[-_LENGTH:]
        else:
            self._write(self._held)
            self._write(view[:-_LENGTH])
            self._held = bytes(view[-_LENGTH:])
        return len(view)

    def _write(self, data: bytes | memoryview) -> None:
        self._hash.update(data)
        self._file.write(data)

    def flush(self) -> None:
        """As of any file."""
        self._file.flush()

    def seal(self) -> None:
        """Write the checksum; nothing may follow."""
        assert self._held == bytes(_LENGTH), "torch.save must end its files without a comment"
        self._write((len(_PREFIX) + _DIGITS).to_bytes(_LENGTH, "little") + _PREFIX)
        self._file.write(self._hash.hexdigest().encode())
        self._file.flush()


def holds(file: BinaryIO) -> bool | None:
    """Whether the checksum at the end of a file is that of its bytes; None: there is none."""
    size = file.seek(0, os.SEEK_END)
    left = size - _DIGITS  # bytes to read
    if left < len(_PREFIX):
        return None
    file.seek(left - len(_PREFIX))
    if file.read(len(_PREFIX)) != _PREFIX:
        return None
    digits = file.read()
    file.seek(0)
    actual = hashlib.sha256()
    while left:
        block = file.read(min(left, _BLOCK))
        actual.update(block)
        left -= len(block)
        if not block:
            return False
    return digits == actual.hexdigest().encode()
