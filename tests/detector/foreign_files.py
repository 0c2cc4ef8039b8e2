"""Files of other programs, with weights and without, and what is read of them."""

import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from detector.checkpoint_formats import read_checkpoint
from detector.model import DeformableDETR


def weights_of(config):
    """A state dict of one number per tensor, so that files are small and quickly written."""
    with torch.device("meta"):
        state = DeformableDETR(config).state_dict(keep_vars=True)
    numbers = {id(tensor): torch.rand(()) for tensor in state.values()}  # some are one tensor
    return {key: numbers[id(tensor)].expand(tensor.shape) for key, tensor in state.items()}


def assert_holds(path, weights):
    """The file gives these weights, and a model takes them."""
    read = read_checkpoint(path)
    assert read.state.keys() == weights.keys()
    assert all(torch.equal(read.state[key], tensor) for key, tensor in weights.items())
    assert all(type(tensor) in (torch.Tensor, nn.Parameter) for tensor in read.state.values())
    return read


def refusal(path, **options):
    """What is said of a file that cannot be used: one line that names it."""
    with pytest.raises((ValueError, OSError, ImportError)) as error:
        read_checkpoint(path, **options)
    text = str(error.value)
    assert text.startswith(str(path))
    assert "\n" not in text
    return text


# ---- what is no checkpoint -----------------------------------------------------------------------


def traced(path):
    module = torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))
    module.save(path)


def exported(path):
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), path)


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in ("r50.pth", "README.md", "a", "b"):
            archive.writestr(file, "x")


def packed(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("r50.pth"))


def onnx_model(path):
    onnx = pytest.importorskip("onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([node], "g", [value], [result])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), path)


def content(data):
    return lambda path: path.write_bytes(data)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 159000000\n"
OTHERS = {
    "web_page": (content(b"<!DOCTYPE html><html>Sign in"), "a web page: .* fetch it by a browser"),
    "web_page_late": (content(b"\n\n <html><body>quota"), "a web page"),
    "xml": (content(b"<?xml version='1.0'?><Error>AccessDenied</Error>"), "a web page"),
    "lfs": (content(LFS), "a git-lfs pointer to a file: fetch that by `git lfs pull`"),
    "empty": (content(b""), "an empty file: .*; fetch or copy it again"),
    "zeros": (content(bytes(5000)), "zeros: .*; fetch or copy it again"),
    "text": (content(b"Repository not found\n"), "a text that begins with 'Repository not found'"),
    "json": (content(b'{"images": []}'), "a text that begins with"),
    "noise": (content(b"\xf1\xf2\x03\x04" * 20), "a file of unknown kind"),
    "gzip": (content(b"\x1f\x8b\x08" + bytes(99)), "a packed file: unpack it by gunzip"),
    "tar": (packed, "a tar archive: unpack it by tar -xf"),
    "zip": (zipped, r"a zip archive of r50\.pth, README\.md, a, \.\.\.: unpack it"),
    "numpy": (lambda path: np.savez(path.open("wb"), a=np.ones(2)), r"a zip archive of a\.npy"),
    "numpy_array": (lambda path: np.save(path.open("wb"), np.ones(2)), "an array of NumPy"),
    "pickle": (content(pickle.dumps({"a": 1})), "a pickle that torch.save did not write"),
    "torch_script": (traced, r"a TorchScript archive .*give the checkpoint that it was made from"),
    "exported": (exported, r"an exported program .*give the checkpoint that it was made from"),
    "onnx": (onnx_model, "an ONNX model, which cannot be read back: give the checkpoint"),
    "image": (content(b"\x89PNG\r\n\x1a\n" + bytes(99)), "an image"),
    "hdf5": (content(b"\x89HDF\r\n\x1a\n" + bytes(99)), "an HDF5 file"),
    "folder": (lambda path: path.mkdir(), "a folder; give a file"),
    "device": (lambda path: os.mkfifo(path), "something that is no file"),
    "tensor": (lambda path: torch.save(torch.ones(2), path), "must hold a dict, got Tensor"),
    "module": (
        lambda path: torch.save(nn.Linear(2, 2), path),
        r"got an object of the class torch\.nn\.modules\.linear\.Linear: .*\(state_dict\(\)\)",
    ),
    "no_weights": (
        lambda path: torch.save({"epoch": 3, "student": {"w": torch.ones(2)}}, path),
        "a file in which no weights are known by name: epoch, student",
    ),
}  # fmt: skip
