"""Other implementations: recognised, checked, called, built."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.common import peers
from benchmarks.gpu import build_peer
from tests.benchmarks.fake_peers import FILLS, KINDS, ORIGINAL, WRONG


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    """Tiny problems: threads would only wait for each other."""
    set_threads(1)


@pytest.fixture
def peer_file(tmp_path):
    def write(name, text):
        path = tmp_path / f"{name}.py"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("name", KINDS)
def test_peers_are_recognised_by_what_they_hold(name, peer_file):
    text, kind = KINDS[name]
    label, path = peers.split_label(peer_file(name, text))
    peer = peers.recognise(label, peers.load(path))
    assert (peer.name, peer.kind) == (name, kind)
    assert (peer.plain is None) == (kind == "flash")
    peers.check(peer, "cpu")


def test_the_convention_of_backward_is_found_out_once(peer_file):
    for name, fills in (("returns", False), ("fills", True)):
        peer = peers.recognise(name, peers.load(peer_file(name, KINDS[name][0])))
        peers.check(peer, "cpu")
        assert peer.plain.fills_gradients is fills


def test_a_type_error_of_a_peers_own_is_not_taken_for_another_convention():
    def backward(*arguments):
        raise TypeError("of its own")

    core = peers.CompiledCore(lambda *arguments: None, backward)
    core.fills_gradients = False
    with pytest.raises(TypeError, match="of its own"):
        core.gradients([torch.ones(1)] * 5, torch.ones(1), 1)


def test_a_wrong_peer_is_refused(peer_file):
    peer = peers.recognise("wrong", peers.load(peer_file("wrong", ORIGINAL + WRONG)))
    with pytest.raises(peers.PeerError, match=r"^output must differ by at most 1.0e-04, got "):
        peers.check(peer, "cpu")


def test_a_peer_that_fails_is_refused_with_its_words():
    def fails(inputs):
        raise RuntimeError("no kernel image is available")

    peer = peers.Peer("fails", "compiled", fails, None)
    with pytest.raises(peers.PeerError, match=r"^float32: no kernel image is available; float16: "):
        peers.check(peer, "cpu")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no_such_module_anywhere", "^not installed$"),
        ("/no/such/file.so", "^there is no file "),
        ("json", "^it holds no operator that is known here$"),
    ],
)
def test_what_is_no_peer_is_said(what, message, monkeypatch):
    monkeypatch.setattr(peers, "_try_in_another_process", lambda *arguments: None)
    with pytest.raises(peers.PeerError, match=message):
        peers.find("label", what, "cpu")


def test_a_layer_that_projects_is_no_peer():
    class MultiScaleDeformableAttention(torch.nn.Module):
        def forward(self, query, value):
            return query

    module = SimpleNamespace(MultiScaleDeformableAttention=MultiScaleDeformableAttention)
    with pytest.raises(peers.PeerError, match="projects its inputs"):
        peers.recognise("mmcv.ops", module)


def test_a_peer_that_crashes_harms_nobody(peer_file):
    crashes = peer_file("crashes", "import os\nos.kill(os.getpid(), 11)\n")
    with pytest.raises(peers.PeerError, match=r"^its process ended with status -11"):
        peers.find("crashes", crashes, "cpu")


def test_the_process_that_tries_a_peer_says_what_is_wrong(peer_file, capsys):
    peers.check_named(peer_file("right", ORIGINAL + FILLS), "cpu")
    assert capsys.readouterr().out == ""
    with pytest.raises(SystemExit) as ended:
        peers.check_named(peer_file("wrong", ORIGINAL + WRONG), "cpu")
    assert ended.value.code == 1
    assert capsys.readouterr().out.startswith("output must differ")


def test_labels_of_peers():
    assert peers.split_label("mmcv=mmcv._ext") == ("mmcv", "mmcv._ext")
    assert peers.split_label("mmcv._ext") == ("mmcv._ext", "mmcv._ext")
    library = "folder/MSDA.cpython-312-x86_64-linux-gnu.so"
    assert peers.split_label(library) == ("MSDA", library)


SOURCE = """
#include <THC/THCAtomics.cuh>
AT_ASSERTM(value.type().is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.type(), "forward", shapes.data<int64_t>());
"""
TODAY = """
#include <ATen/cuda/Atomic.cuh>
AT_ASSERTM(value.is_cuda(), "value must be a CUDA tensor");
AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), "forward", shapes.data_ptr<int64_t>());
"""


@pytest.mark.parametrize("name", build_peer.RECIPES)
def test_a_peer_is_built_from_a_copy_of_its_sources(name, tmp_path, monkeypatch, capsys):
    from torch.utils import cpp_extension

    recipe, source = build_peer.RECIPES[name], tmp_path / "source"
    for part in (*recipe.sources, "DCNv4/__init__.py"):
        (source / part).parent.mkdir(parents=True, exist_ok=True)
        (source / part).write_text(SOURCE)
    built = []

    def compile_extension(module, sources, build_directory, **options):
        assert [Path(path).read_text() for path in sources] == [TODAY] * len(sources)
        assert "-DWITH_CUDA" in options["extra_cuda_cflags"]
        (library := Path(build_directory) / f"{module}.so").touch()
        built.append(library)

    monkeypatch.setattr(cpp_extension, "load", compile_extension)
    output = tmp_path / "out"
    command = ["build-peer", name, str(source), str(output)]
    assert main(command) == 0
    said = capsys.readouterr().out.strip()
    assert said == f"--peer {name}={output / name / recipe.result}"
    assert (output / name / recipe.result).exists()
    assert built[0].parent == (output / name / recipe.result).parent
    assert (source / recipe.sources[0]).read_text() == SOURCE
    shutil.rmtree(source / "src")
    with pytest.raises(SystemExit, match=f"^the sources of {name} must hold src, got none in"):
        main(command)
