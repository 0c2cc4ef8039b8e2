"""Reading files of weights: what kind a file is, whether it is whole, and what it holds.

Nothing in a file is run. One that is of no use is described in a sentence: what it is instead, and
what to do.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import stat
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from detector import checksums, safe_pickle

logger = logging.getLogger(__name__)

SEALED = "sealed"  # entry of checkpoints that end with a checksum
_OURS = ("last.pt", "previous.pt", "best.pt")  # in which a damaged one may have a substitute


class Damaged(ValueError):
    """The file is not what was written."""


def read(path: Path, option: str = "") -> dict[str, Any]:
    """Read a file that ``torch.save`` or safetensors wrote, to the CPU.

    Objects of other classes than those of tensors and plain data come as
    :class:`detector.safe_pickle.Unknown`.

    Args:
        path: of the file.
        option: the one that the path was given by, for advice.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: it is damaged or something else; says what, but not its name.
        ImportError: it takes a package that is not installed.
    """
    _check_is_file(path, option)
    try:
        with _open(path) as file:
            content, sealed = _contents(file, path)
        content = _as_dict(content)
    except ValueError as error:
        advice = _substitute(path, option)
        if advice is None:
            if not isinstance(error, Damaged):
                raise
            advice = "; fetch or copy it again"
        raise ValueError(f"{error}{advice}") from error
    if isinstance(content.get("format"), int) and not sealed:
        logger.warning(
            "%s holds no checksum, as older versions wrote it: damage is not always noticed", path
        )
    return content


def _check_is_file(path: Path, option: str) -> None:
    if path.is_dir():
        inside = _checkpoints_in(path)
        advice = "give a file"
        if inside:
            advice += " in it: " + " or ".join(f"{option} {file}".strip() for file in inside)
        raise ValueError(f"must be a checkpoint, got a folder; {advice}")
    if str(path).startswith(("http:", "https:")):
        raise FileNotFoundError(f"{path} is an address: download it first, and give the file")
    if not path.exists():
        beside = _checkpoints_in(path.parent)
        advice = "check the name" if path.parent.exists() else "nor does its folder"
        if beside:
            advice = f"its folder holds {', '.join(file.name for file in beside)}"
        raise FileNotFoundError(f"{path} does not exist; {advice}")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("must be a checkpoint, got something that is no file")


def _checkpoints_in(folder: Path, most: int = 4) -> list[Path]:
    endings = (".pt", ".pth", ".safetensors")
    try:
        found = [file for file in folder.iterdir() if file.suffix in endings and file.is_file()]
    except OSError:
        return []
    return sorted(found)[:most]


def _open(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except PermissionError:
        raise PermissionError(
            f"{path} may not be read by this user: chmod u+r {path}, or ask its owner"
        ) from None


def is_whole(path: Path) -> bool:
    """Whether there is such a file of ``torch.save``, undamaged for all that its checksums tell."""
    try:
        with open(path, "rb") as file:
            sealed = checksums.holds(file)
            if sealed is None:
                file.seek(0)
                _contents(file, path)
            return sealed is not False
    except (OSError, ValueError):
        return False


def _substitute(path: Path, option: str) -> str | None:
    """Advice for a bad file of a run: another in its folder that is whole."""
    for name in _OURS:
        other = path.with_name(name)
        if path.name in _OURS and name != path.name and is_whole(other):
            with open(other, "rb") as file:
                content, _ = _contents(file, other)
            if option == "--resume" and "optimizer" not in content:
                option = "--weights"
            step = f" (step {content['step']})" if "step" in content else ""
            given = f", {option} {other}" if option else ""
            return f"; {other}{step} is whole: give that instead{given}"
    return None


# ---- contents ------------------------------------------------------------------------------------


def _contents(file: BinaryIO, path: Path) -> tuple[Any, bool | None]:
    """What a file holds, and whether its checksum says so; None: it has none."""
    try:
        start, sealed = file.read(512), checksums.holds(file)
    except OSError as error:  # of the disk: it could be opened
        raise Damaged(f"must be a checkpoint, but reading it failed: {error}") from error
    if not start.strip(b"\0"):
        kind = "zeros" if start else "an empty file"
        raise Damaged(f"must be a checkpoint, got {kind}: what it held is lost")
    if start[5:9] == b"\0\0\0{":  # the length of a header, eight bytes, and the header, JSON
        load_file = safetensors().load_file
        return _from(load_file, path), None
    if sealed is False:
        raise Damaged("is damaged: its bytes do not give the checksum at its end")
    if start.startswith(b"PK\3\4"):
        _check_archive(file, check_records=sealed is None)
    elif not start.startswith(_LEGACY):
        raise ValueError(f"must be a checkpoint, got {_kind_of(start, path)}")
    file.seek(0)
    content = _from(_unpickle, file)
    if sealed is None and isinstance(content, dict) and content.get(SEALED):
        raise Damaged("is damaged: the checksum at its end is missing")
    return content, sealed


def _as_dict(content: Any) -> dict[str, Any]:
    """The entries of a dictionary of any class, or the attributes of an object with weights."""
    if isinstance(content, safe_pickle.Unknown):
        entries = safe_pickle.entries_of(content)
        if entries and "_modules" not in entries:
            return entries
        raise ValueError(
            f"must hold a dict, got an object of the class {content.origin}: write the dictionary "
            "of its weights (state_dict()) with the program that it is from"
        )
    if not isinstance(content, dict):
        raise ValueError(f"must hold a dict, got {type(content).__name__}")
    return content


def _unpickle(file: BinaryIO) -> Any:
    # Torch's own unpickler is not meant by the variable: ours runs nothing either.
    forced = os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    try:
        return torch.load(file, map_location="cpu", pickle_module=safe_pickle, weights_only=False)
    finally:
        if forced is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = forced


def _from(read: Any, source: Any) -> Any:
    try:
        return read(source)
    except safe_pickle.Refused as error:
        raise ValueError(
            f"must be a checkpoint, but {error}: nothing of it was run, and it is not read; write "
            "the dictionary of its weights (state_dict()) with the program that it is from"
        ) from error
    except Exception as error:  # they raise many kinds for a damaged file
        cause = str(error).partition("\n")[0]
        raise Damaged(f"must be a checkpoint, but reading it failed: {cause}") from error


def safetensors() -> ModuleType:
    """The package, if it is installed."""
    try:
        import safetensors.torch  # comes with transformers
    except ImportError:
        raise ImportError(
            "files of transformers need the package safetensors: pip install safetensors"
        ) from None
    return safetensors.torch


# ---- archives ------------------------------------------------------------------------------------


def _check_archive(file: BinaryIO, check_records: bool) -> None:
    """Refuse zip archives that ``torch.save`` did not write whole."""
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        size = os.fstat(file.fileno()).st_size
        raise Damaged(
            "must be a checkpoint, but reading it failed: what ends such a file is missing or "
            f"damaged (it has {size:,} bytes)"
        ) from None
    names = archive.namelist()
    folders = {name.partition("/")[0] for name in names}
    if any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(
            "must be a checkpoint, got a TorchScript archive (of torch.jit.save), which holds a "
            "program: give the checkpoint that it was made from"
        )
    if any(re.search(r"archive_format$|serialized_exported_program", name) for name in names):
        raise ValueError(
            "must be a checkpoint, got an exported program (of torch.export.save): give the "
            "checkpoint that it was made from"
        )
    if not any(f"{folder}/data.pkl" in names for folder in folders):
        raise ValueError(
            f"must be a checkpoint, got a zip archive of {', '.join(names[:3]) or 'nothing'}"
            f"{', ...' if len(names) > 3 else ''}: unpack it, and give the checkpoint in it"
        )
    if check_records:
        _check_records(archive)


def _check_records(archive: zipfile.ZipFile) -> None:
    """Hold each record against its checksum, which torch itself does not look at."""
    for record in archive.infolist():
        if record.CRC == 0:  # it was written without
            continue
        try:
            with archive.open(record) as content:
                while content.read(1 << 20):
                    pass
        except Exception as error:  # zipfile raises many kinds for a damaged file
            cause = str(error).partition("\n")[0]
            raise Damaged(
                f"is damaged: {record.filename} in it cannot be read ({cause})"
            ) from error


# ---- what is no checkpoint -----------------------------------------------------------------------

# What files of torch.save started with before version 1.6.
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_KINDS = [
    (b"version https://git-lfs", "a git-lfs pointer to a file: fetch that by `git lfs pull`"),
    (b"\x1f\x8b", "a packed file: unpack it by gunzip or tar -xf"),
    (b"BZh", "a packed file: unpack it by bunzip2 or tar -xf"),
    (b"\xfd7zXZ", "a packed file: unpack it by unxz or tar -xf"),
    (b"(\xb5/\xfd", "a packed file: unpack it by unzstd or tar -xf"),
    (b"7z\xbc\xaf", "a packed archive: unpack it"),
    (b"Rar!", "a packed archive: unpack it"),
    (b"PK", "an empty archive: fetch it again"),
    (b"\x89HDF", "an HDF5 file, as of Keras: only files of PyTorch can be read"),
    (b"\x93NUMPY", "an array of NumPy"),
    (b"\x89PNG", "an image"),
    (b"\xff\xd8\xff", "an image"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"\x80", "a pickle that torch.save did not write: write its weights by torch.save"),
]


def _kind_of(start: bytes, path: Path) -> str:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        return (
            "a web page: its address gives one in place of the file, mostly because it wants a "
            "login or a click; fetch it by a browser"
        )
    for beginning, kind in _KINDS:
        if start.startswith(beginning):
            return kind
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it by tar -xf"
    # Fields of a protocol buffer: the version, then who made it or the graph.
    if path.suffix == ".onnx" or (start[0] == 8 and start[2:3] in (b"\x12", b"\x3a", b"\x1a")):
        return "an ONNX model, which cannot be read back: give the checkpoint that it was made from"
    shown = start[:60].decode(errors="replace").partition("\n")[0]
    if shown.isprintable():
        return f"a text that begins with {shown!r}"
    return f"a file of unknown kind, which begins with {start[:8]!r}"


# ---- state dicts ---------------------------------------------------------------------------------


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, str]:
    """Why a state dict cannot be loaded in place of ``own``: a reason for each key that misfits."""
    problems = {key: f"{key} is missing" for key in own if key not in given}
    problems |= {key: f"{key} is unexpected" for key in given if key not in own}
    for key in (key for key in own if key in given):
        if not isinstance(given[key], Tensor):
            problems[key] = f"{key} must be a tensor, got {type(given[key]).__name__}"
        elif given[key].shape != own[key].shape:
            shapes = tuple(own[key].shape), tuple(given[key].shape)
            problems[key] = f"{key} must have shape {shapes[0]}, got {shapes[1]}"
    return problems


def shortened(texts: Collection[Any], joint: str = ", ", most: int = 4) -> str:
    """The first of them in one line, and how many more there are."""
    shown = joint.join(str(text) for text in itertools.islice(texts, most))
    return shown + (f" and {len(texts) - most} more" if len(texts) > most else "")
