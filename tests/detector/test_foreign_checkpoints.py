"""Checkpoints of other programs: what is beside the weights, where they are, other formats."""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import json
import logging
import os
import pathlib
import random
import re
import sys
import types
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import train
from torch import nn

from detector.backbone import Backbone
from detector.checkpoint_formats import load_model, read_checkpoint
from detector.model import build_model
from tests.detector.foreign_files import OTHERS, assert_holds, refusal, weights_of
from tests.detector.small_models import DEFORMABLE, original_file, resnet_config

# ---- beside the weights --------------------------------------------------------------------------


# A library that is installed where the file is written, and not where it is read.
elsewhere = types.ModuleType("elsewhere")


class Colour(enum.Enum):
    RED = "red"


@dataclass
class Settings:
    lr: float = 1e-4
    nested: object = None


class DictConfig(dict):
    """A dictionary with attributes, as there are many."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.flags = {"readonly": True}


class ListConfig(list):
    pass


class SetConfig(set):
    pass


class Reduced:
    """Restored by a call of its class."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return Reduced, self.arguments, {"more": 1}


class Slotted:
    __slots__ = ("first", "second")

    def __init__(self):
        self.first, self.second = 1, [2]


class Outer:
    class Inner:
        pass


class NamedRow(collections.namedtuple("NamedRow", "x y")):
    pass


CLASSES = (Colour, Settings, DictConfig, ListConfig, SetConfig, Reduced, Slotted, Outer, NamedRow)


@pytest.fixture
def library(monkeypatch):
    """Let the classes above belong to a module that is gone after the file is written."""
    for kind in CLASSES:
        monkeypatch.setattr(kind, "__module__", "elsewhere.settings")
        monkeypatch.setattr(elsewhere, kind.__name__, kind, raising=False)
    monkeypatch.setattr(Outer.Inner, "__module__", "elsewhere.settings")
    monkeypatch.setitem(sys.modules, "elsewhere", elsewhere)
    monkeypatch.setitem(sys.modules, "elsewhere.settings", elsewhere)
    yield lambda: [sys.modules.pop(name) for name in ("elsewhere", "elsewhere.settings")]


def scheduler():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    return torch.optim.lr_scheduler.StepLR(optimizer, 3)


def optimizer_state():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, amsgrad=True)
    weight.grad = torch.ones(3)
    optimizer.step()
    return optimizer.state_dict()


class Marked(torch.Tensor):
    pass


def with_attribute():
    tensor = torch.ones(2)
    tensor.note = "mine"
    return tensor


BESIDE = {
    "posix_path": lambda: pathlib.PurePosixPath("/data/coco"),
    "own_path": lambda: pathlib.Path("exps") / "r50",
    "windows_path": lambda: pathlib.PureWindowsPath("C:/data"),
    "numpy_float": lambda: np.float64(0.438),
    "numpy_int": lambda: np.int64(49),
    "numpy_bool": lambda: np.bool_(True),
    "numpy_text": lambda: np.str_("r50"),
    "numpy_date": lambda: np.datetime64("2020-10-08"),
    "numpy_array": lambda: np.arange(6.0).reshape(2, 3),
    "numpy_fortran": lambda: np.asfortranarray(np.ones((2, 3), np.float32)),
    "numpy_objects": lambda: np.array([1, "two", None], dtype=object),
    "numpy_records": lambda: np.zeros(2, dtype=[("x", "f4"), ("y", "i8")]),
    "numpy_dtype": lambda: np.dtype("float32"),
    "numpy_random": np.random.get_state,
    "numpy_generator": lambda: np.random.default_rng(3),
    "python_random": random.getstate,
    "random_object": lambda: random.Random(3),
    "namespace": lambda: argparse.Namespace(lr=1e-4, path=pathlib.Path("x"), more=[np.int32(3)]),
    "simple_namespace": lambda: types.SimpleNamespace(a=1, b=types.SimpleNamespace(c=2)),
    "dataclass": lambda: Settings(nested=Settings(0.5, pathlib.Path("y"))),
    "enum": lambda: Colour.RED,
    "dict_class": lambda: DictConfig(model=DictConfig(depth=50), names=["a", "b"]),
    "list_class": lambda: ListConfig([1, DictConfig(a=1)]),
    "set_class": lambda: SetConfig({1, 2}),
    "reduced": lambda: Reduced("a", Reduced()),
    "slots": Slotted,
    "nested_class": Outer.Inner,
    "named_tuple": lambda: NamedRow(1, 2),
    "class_itself": lambda: Settings,
    "set": lambda: {1, "two", frozenset([3])},
    "keys": lambda: {Colour.RED: 1, pathlib.PurePosixPath("a"): 2, (1, 2): 3},
    "default_dict": lambda: collections.defaultdict(list, {"AP": [0.1, 0.2]}),
    "counter": lambda: collections.Counter("abca"),
    "deque": lambda: collections.deque([1, 2, 3], maxlen=5),
    "ordered_dict": lambda: collections.OrderedDict(a=1),
    "dates": lambda: [datetime.datetime(2020, 10, 8, tzinfo=datetime.timezone.utc)],
    "decimal": lambda: decimal.Decimal("0.1"),
    "pattern": lambda: re.compile("a+"),
    "bytes": lambda: [b"\0\xff", bytearray(b"abc")],
    "numbers": lambda: [10**30, -1, 1 + 2j, float("nan"), True, None, slice(1, 2), range(3)],
    "partial": lambda: functools.partial(Settings, lr=3),
    "logger": lambda: logging.getLogger("somebody"),
    "torch_words": lambda: [torch.Size([1]), torch.float16, torch.device("cuda:1"), torch.strided],
    "storage": lambda: torch.arange(4.0).untyped_storage(),
    "tensors": lambda: [
        torch.tensor(3, dtype=torch.bfloat16),
        torch.ones(2, dtype=torch.complex64),
    ],
    "sparse": lambda: torch.eye(3).to_sparse(),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "float8": lambda: torch.ones(2).to(torch.float8_e4m3fn),
    "uint16": lambda: torch.ones(2, dtype=torch.uint16),
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    "tensor_class": lambda: torch.ones(2).as_subclass(Marked),
    "tensor_with_attribute": with_attribute,
    "module": lambda: nn.Sequential(nn.Linear(2, 2), nn.ReLU()),
    "scheduler": scheduler,
    "optimizer": optimizer_state,
    "scaler": lambda: torch.amp.GradScaler("cpu").state_dict(),
}


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", BESIDE)
def test_whatever_is_beside_the_weights_is_in_nobodys_way(
    tmp_path, weights, library, kind, protocol
):
    path = tmp_path / "checkpoint.pth"
    content = {"before": BESIDE[kind](), "model": weights, "after": [BESIDE[kind]()]}
    torch.save(content, path, pickle_protocol=protocol)
    library()
    assert_holds(path, weights)
    # The same in the middle of the weights' own dictionary is refused by its name.
    if kind == "numpy_array":
        torch.save({"model": weights | {"query_embed.weight": BESIDE[kind]()}}, path)
        assert "query_embed.weight must be a tensor, got numpy._core." in refusal(path)


def test_files_of_old_versions_of_torch_are_read(tmp_path, weights, library):
    path = tmp_path / "checkpoint.pth"
    content = {"args": argparse.Namespace(dropout=0.3, out=pathlib.Path("x")), "model": weights}
    content["config"] = DictConfig(a=np.float32(1))
    torch.save(content, path, _use_new_zipfile_serialization=False)
    library()
    assert assert_holds(path, weights).config.model.dropout == 0.3
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "reading it failed" in refusal(path)


SETTINGS = dict(nheads=4, dropout=0.25, dilation=False, num_queries=20, lr=1e-4)
AS_SETTINGS = {
    "namespace": lambda: argparse.Namespace(**SETTINGS),
    "dict": lambda: dict(SETTINGS),
    "simple_namespace": lambda: types.SimpleNamespace(**SETTINGS),
    "object": lambda: _with(Outer(), SETTINGS),
    "dict_class": lambda: DictConfig(**SETTINGS),
    "numpy": lambda: argparse.Namespace(
        **SETTINGS | dict(nheads=np.int64(4), dropout=np.float64(0.25), dilation=np.bool_(False))
    ),
    "with_a_stranger": lambda: argparse.Namespace(**SETTINGS, backbone=Slotted()),
}


def _with(target, attributes):
    vars(target).update(attributes)
    return target


@pytest.mark.parametrize("kind", AS_SETTINGS)
def test_settings_beside_the_weights_are_found_in_any_object(tmp_path, library, kind):
    path = tmp_path / "checkpoint.pth"
    config = resnet_config("two_stage", dropout=0.25)
    torch.save({"model": weights_of(config), "args": AS_SETTINGS[kind]()}, path)
    library()
    assert read_checkpoint(path).config.model == config


# ---- where the weights are -----------------------------------------------------------------------


PLACES = {
    "alone": lambda w: w,
    "ordered": lambda w: {"model": collections.OrderedDict(w)},
    "parameters": lambda w: {"model": {key: nn.Parameter(t) for key, t in w.items()}},
    **{
        name: lambda w, name=name: {"epoch": 3, name: w}
        for name in ("model", "state_dict", "net", "model_state_dict", "module", "weights")
    },
    "model_ema": lambda w: {"model": _zeros(w), "model_ema": w},
    "ema": lambda w: {"model": _zeros(w), "ema": w, "ema_decay": 0.9},
    "ema_module": lambda w: {"model": _zeros(w), "ema": {"module": w, "updates": 5}},
    "ema_none": lambda w: {"model": w, "ema": None, "model_ema": {}},
    "ema_of_nothing": lambda w: {"model": w, "ema": {"decay": torch.tensor(0.99)}},
    "averaged": lambda w: {"ema": {"n_averaged": torch.tensor(3)} | _prefixed(w, "module.")},
    "model_state_dict_within": lambda w: {"model": {"state_dict": w, "name": "r50"}},
    "lightning": lambda w: {
        "state_dict": _prefixed(w, "model.") | {"criterion.empty_weight": torch.ones(8)},
        "hyper_parameters": DictConfig(lr=1e-4),
    },
    "dict_class": lambda w: DictConfig(model=DictConfig(**w), epoch=3),
    "object": lambda w: _with(Outer(), {"model": w, "epoch": 3}),
    "object_within": lambda w: {"model": _zeros(w), "ema": _with(Outer(), {"module": w})},
    "model_object_beside": lambda w: {"ema": nn.Linear(2, 2), "state_dict": w},
    "optimizer_before": lambda w: {"optimizer": optimizer_state(), "model": w},
    **{
        prefix: lambda w, prefix=prefix: {"model": _prefixed(w, prefix)}
        for prefix in (
            "module.",
            "_orig_mod.",
            "module.module.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "detr.",
            "module.model.",
        )
    },
    "compiled_part": lambda w: {
        key.replace("transformer.encoder.", "transformer.encoder._orig_mod."): t
        for key, t in w.items()
    },
    "compiled_layers": lambda w: {
        re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", key): t for key, t in w.items()
    },
}


def _zeros(weights):
    return {key: torch.zeros(()).expand(tensor.shape) for key, tensor in weights.items()}


def _prefixed(weights, prefix):
    return {prefix + key: tensor for key, tensor in weights.items()}


@pytest.mark.parametrize("place", PLACES)
def test_weights_are_found_wherever_others_keep_them(tmp_path, weights, place, library):
    torch.save(PLACES[place](weights), tmp_path / "checkpoint.pth")
    library()
    assert_holds(tmp_path / "checkpoint.pth", weights)


def test_weights_in_half_precision_fill_a_model(tmp_path, shallow_resnet):
    model = build_model(resnet_config(num_heads=8))
    half = {key: tensor.half() for key, tensor in model.state_dict().items()}
    torch.save({"model": half}, tmp_path / "half.pth")
    loaded, _ = load_model(tmp_path / "half.pth")
    for key, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, half[key].float()), key


def test_a_variable_that_forbids_other_unpicklers_is_no_obstacle(tmp_path, weights, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"model": weights, "path": pathlib.Path("x")}, tmp_path / "checkpoint.pth")
    assert_holds(tmp_path / "checkpoint.pth", weights)
    assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"


# ---- safetensors and transformers ----------------------------------------------------------------


def test_safetensors_of_any_name_are_read(tmp_path, weights):
    safetensors = pytest.importorskip("safetensors.torch")
    state = {key: tensor.contiguous().clone() for key, tensor in weights.items()}
    for name in ("weights.safetensors", "weights.pth"):
        safetensors.save_file(_prefixed(state, "module."), tmp_path / name)
        assert_holds(tmp_path / name, weights)
    whole = (tmp_path / name).read_bytes()
    for size in (20, len(whole) // 2):
        (tmp_path / name).write_bytes(whole[:size])
        assert "reading it failed" in refusal(tmp_path / name)


def test_a_missing_safetensors_package_is_a_sentence(tmp_path, monkeypatch):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ImportError, match=r"need the package .*: pip install safetensors"):
        read_checkpoint(path)


def test_folders_of_transformers_are_told_apart(tmp_path, weights):
    config = tmp_path / "config.json"
    config.write_text("{")
    assert "config.json must be one of transformers, but" in refusal(tmp_path)
    config.write_text(json.dumps({"model_type": "detr"}))
    assert refusal(tmp_path).endswith("config.json must be deformable_detr, got 'detr'")
    config.write_text(json.dumps({"model_type": "deformable_detr"}))
    assert "must hold model.safetensors or pytorch_model.bin beside config.json" in (
        refusal(tmp_path)
    )
    OTHERS["lfs"][0](tmp_path / "model.safetensors")
    assert refusal(tmp_path).startswith(
        f"{tmp_path}: model.safetensors in it must be a checkpoint, got a git-lfs pointer to a file"
    )


@pytest.mark.parametrize("variant", DEFORMABLE)
def test_older_folders_of_transformers_are_read(tmp_path, variant):
    from detector.checkpoint_formats import to_transformers

    weights = weights_of(resnet_config(variant))
    settings = dict(encoder_attention_heads=4, decoder_attention_heads=4, num_queries=20)
    settings |= dict(two_stage=variant == "two_stage", two_stage_num_proposals=20, dropout=0.1)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = {key: tensor.clone() for key, tensor in to_transformers(weights).items()}
    torch.save(theirs, tmp_path / "pytorch_model.bin")
    assert assert_holds(tmp_path, weights).config.model == resnet_config(variant)


# ---- the backbone --------------------------------------------------------------------------------


def test_weights_of_the_backbone_are_read_and_refused_alike(tmp_path, shallow_resnet):
    path = tmp_path / "resnet50.pth"
    state = Backbone("resnet50").body.state_dict() | {"fc.weight": torch.ones(2)}
    torch.save({"state_dict": state, "arch": np.str_("resnet50")}, path)
    loaded = Backbone("resnet50", weights=path).body.state_dict()
    assert torch.equal(loaded["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])

    for make, message in (OTHERS["web_page"], OTHERS["lfs"], OTHERS["empty"]):
        make(path)
        with pytest.raises(ValueError, match=rf"^{path}: must be a checkpoint, got {message}"):
            Backbone("resnet50", weights=path)
    torch.save({"epoch": 3, "conv1.weight": torch.ones(1)}, path)
    with pytest.raises(
        ValueError, match="must hold torchvision's weights of the net, but "
    ) as error:
        Backbone("resnet50", weights=path)
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth does not exist"):
        Backbone("resnet50", weights=tmp_path / "nothing.pth")


# ---- train.py ------------------------------------------------------------------------------------


def test_the_originals_file_is_no_run_to_go_on_with(tmp_path, weights, capsys):
    path = tmp_path / "checkpoint.pth"
    model = types.SimpleNamespace(state_dict=lambda: weights)
    original_file(path, model)
    assert train.main(["--resume", str(path), "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith(f"error: {path} must be a checkpoint of this program (format 1)")
    assert said.rstrip().endswith(f"to start anew from its weights: --weights {path}")
    assert os.listdir(tmp_path) == ["checkpoint.pth"]
