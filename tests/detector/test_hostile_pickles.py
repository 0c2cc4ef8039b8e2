"""Checkpoints that try to run something run nothing."""

import builtins
import contextlib
import io
import os
import pathlib
import pickle
import subprocess

import pytest
import torch
from torch import nn

from detector import run_checkpoints, safe_pickle
from tests.detector.foreign_files import refusal


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def raw(*parts):
    """A pickle put together by hand, of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


def text(value):
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def tuple_of(*parts):
    return b"(" + b"".join(parts) + b"t"


FOLDER = "made_by_an_attack"
CODE = f"import os; os.mkdir({FOLDER!r})"
CALLS = {
    "mkdir": lambda: Call(os.mkdir, FOLDER),
    "system": lambda: Call(os.system, f"mkdir {FOLDER}"),
    "exec": lambda: Call(exec, CODE),
    "eval": lambda: Call(eval, f"__import__('os').mkdir({FOLDER!r})"),
    "compile": lambda: Call(builtins.compile, CODE, "x", "exec"),
    "import": lambda: Call(builtins.__import__, "antigravity"),
    "open": lambda: Call(open, FOLDER, "w"),
    "popen": lambda: Call(subprocess.Popen, ["mkdir", FOLDER]),
    "check_output": lambda: Call(subprocess.check_output, ["mkdir", FOLDER]),
    "torch_load": lambda: Call(torch.load, FOLDER),
    "torch_hub": lambda: Call(torch.hub.load, "somebody/something", "model"),
    "load_from_bytes": lambda: Call(
        torch.storage._load_from_bytes, pickle.dumps(Call(os.mkdir, FOLDER))
    ),
    "pathlib": lambda: Call(pathlib.Path.mkdir, pathlib.Path(FOLDER)),
    "own_function": lambda: Call(made_by_a_library),
}


def made_by_a_library():
    os.mkdir(FOLDER)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", CALLS)
def test_a_call_in_a_checkpoint_is_refused_and_not_run(
    tmp_path, monkeypatch, weights, kind, legacy
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pth"
    content = {"format": 1, "optimizer": {}, "model": weights, "epoch": CALLS[kind]()}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    before = sorted(os.listdir())
    said = refusal(path)
    assert sorted(os.listdir()) == before
    assert "nothing of it was run" in said or "reading it failed" in said
    with pytest.raises(run_checkpoints.CheckpointError):
        run_checkpoints.load(path)
    assert sorted(os.listdir()) == before


RAW = {
    "system": raw(name("posix", "system"), tuple_of(text(f"mkdir {FOLDER}")), b"R"),
    "new": raw(name("subprocess", "Popen"), tuple_of(text("ls")), b"\x81", text("x"), b"b"),
    "partial": raw(
        name("functools", "partial"), tuple_of(name("os", "mkdir"), text(FOLDER)), b"R)R"
    ),
    "python_2": raw(name("__builtin__", "eval"), tuple_of(text("1")), b"R"),
    "dotted": raw(name("torch", "os.mkdir"), tuple_of(text(FOLDER)), b"R"),
    "of_what_is_known": raw(
        name("builtins", "getattr"),
        tuple_of(name("collections", "OrderedDict"), text("__init__")),
        b"R",
    ),
    "new_by_a_detour": raw(
        name("copyreg", "__newobj__"), tuple_of(name("builtins", "getattr")), b"R"
    ),
    "attributes_of_a_stand_in": raw(
        name("os", "mkdir"), tuple_of(b"N", b"}" + text("harmless") + b"\x88s"), b"b",
        tuple_of(text(FOLDER)), b"R",
    ),
    "attributes_of_what_is_known": raw(
        name("torch._utils", "_rebuild_tensor_v2"),
        tuple_of(b"N", b"}" + text("_function") + name("os", "mkdir") + b"s"), b"b",
        tuple_of(text(FOLDER)), b"R",
    ),
    "state": raw(
        name("torch._utils", "_rebuild_tensor"), b"}" + text("__code__") + b"Ns", b"b", b"0N"
    ),
    "encoding": raw(name("_codecs", "encode"), tuple_of(text("a"), text("rot13")), b"R"),
    "extension": raw(b"\x82\x01"),
}  # fmt: skip


@pytest.mark.parametrize("kind", RAW)
def test_pickles_made_by_hand_run_nothing(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    harmless = {name: dict(vars(kind)) for name, kind in _known_classes().items()}
    with contextlib.suppress(Exception):
        made = safe_pickle.load(io.BytesIO(RAW[kind]))
        assert isinstance(made, (safe_pickle.Unknown, type(None)))
    assert os.listdir() == []
    assert {name: dict(vars(kind)) for name, kind in _known_classes().items()} == harmless
    assert vars(torch._utils._rebuild_tensor) == vars(torch._utils._rebuild_tensor_v2) == {}
    # What the next file asks for is judged as ever.
    with pytest.raises(safe_pickle.Refused, match=r"call of os\.mkdir, which may do anything"):
        safe_pickle.load(io.BytesIO(raw(name("os", "mkdir"), tuple_of(text(FOLDER)), b"R")))


def _known_classes():
    return {kind.__name__: kind for kind in (torch.Tensor, nn.Parameter, torch.UntypedStorage)}
