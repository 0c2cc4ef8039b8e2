"""What the detector's programs set for a CPU: how threads wait, and mixed precision."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import evaluate
import predict
import pytest
import torch
import train
from PIL import Image

from detector import precision, threads
from tests.detector.small_runs import SMALL_RUN

EXAMPLE = Path(train.__file__).parent
PROGRAMS = ("train", "evaluate", "predict", "demo")


@pytest.fixture
def before_torch(monkeypatch):
    """As in a program that has just begun, on a machine in use to some part."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is removed afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "sys", types.SimpleNamespace(modules={}))
    return lambda share: monkeypatch.setattr(threads, "share_in_use", lambda: share)


@pytest.mark.parametrize(("share", "spins"), [(0.0, "10000"), (0.1, "10000"), (0.9, "1000")])
def test_threads_spin_more_shortly_where_others_are_at_work(before_torch, share, spins):
    before_torch(share)
    threads.set_spinning()
    assert os.environ["GOMP_SPINCOUNT"] == spins


@pytest.mark.parametrize("name", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_has_set_stays(before_torch, monkeypatch, name):
    before_torch(0.9)
    monkeypatch.setenv(name, "7")
    threads.set_spinning()
    other = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} - {name}
    assert os.environ[name] == "7"
    assert other.isdisjoint(os.environ)


def test_nothing_is_set_that_torch_would_not_read(before_torch):
    threads.sys.modules["torch"] = torch
    before_torch(0.9)
    threads.set_spinning()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_use_by_others_is_that_of_this_process_own_processors(monkeypatch):
    ticks = iter(
        [
            "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 100 0 50 800 10 0 0 0 5 0\ncpu1 0 0 0 0 0 0 0 0 0 0\n",
            "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 103 1 51 811 14 0 0 0 9 0\ncpu1 0 0 0 20 0 0 0 0 0 0\n",
        ]
    )

    class File:
        def __enter__(self):
            return iter(next(ticks).splitlines())

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(threads, "open", lambda path: File(), raising=False)
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda _: {0})
    assert threads.share_in_use() == pytest.approx(5 / 20)


def test_a_system_that_does_not_tell_counts_as_idle(monkeypatch):
    def missing(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(threads, "open", missing, raising=False)
    assert threads.share_in_use() == 0.0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP tells it there")
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_sets_it_before_torch_reads_it(program):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP_", "OMP_"))}
    code = f"import sys; sys.path.insert(0, {str(EXAMPLE)!r}); import {program}, os; "
    code += "print(os.environ['GOMP_SPINCOUNT'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    spins = done.stdout.strip()
    assert spins in ("10000", "1000")
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


# ---- mixed precision -----------------------------------------------------------------------------


@pytest.fixture
def trained(shapes, tmp_path):
    """A checkpoint after a few steps."""
    folder = tmp_path / "run"
    given = [*SMALL_RUN.split(), "--data-path", shapes, "--output", str(folder)]
    assert train.main([*given, "--epochs", "1", "--amp", "bf16", "--num-workers", "0"]) == 0
    return folder / "best.pt"


def test_programs_run_in_mixed_precision_where_they_are_told(
    trained, shapes, tmp_path, monkeypatch
):
    seen = []
    forward = torch.nn.Linear.forward

    def record(module, hidden):
        output = forward(module, hidden)
        seen.append(output.dtype)
        return output

    monkeypatch.setattr(torch.nn.Linear, "forward", record)
    image = tmp_path / "image.png"
    Image.new("RGB", (96, 96), "grey").save(image)
    evaluation = [str(trained), "--num-workers", "0"]
    prediction = [str(image), "--checkpoint", str(trained), "--show-points", "--attention-map"]
    for amp, dtypes in (("off", {torch.float32}), ("bf16", {torch.float32, torch.bfloat16})):
        more = ["--device", "cpu", "--amp", amp]
        for program, arguments in (
            (evaluate, evaluation),
            (predict, [*prediction, "--output", str(tmp_path / amp)]),
        ):
            seen.clear()
            assert program.main([*arguments, *more]) == 0
            assert set(seen) == dtypes
        assert json.loads((tmp_path / amp / "predictions.json").read_text())["images"]
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    ("capabilities", "amp", "warns"),
    [
        ({"architecture": "x86_64", "avx512_bf16": True}, "bf16", False),
        ({"architecture": "x86_64", "amx_bf16": True}, "bf16", False),
        ({"architecture": "x86_64", "avx512_bf16": False, "avx512_f": True}, "bf16", True),
        ({"architecture": "x86_64", "avx512_bf16": True}, "fp16", True),
        ({"architecture": "x86_64"}, "off", False),
        ({"architecture": "aarch64"}, "bf16", False),
        ({}, "bf16", False),
    ],
)
def test_a_processor_without_the_instructions_is_told(
    monkeypatch, caplog, capabilities, amp, warns
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    precision.warn_if_slow(torch.device("cpu"), amp)
    assert (f"no instructions for {amp}: --amp off is faster" in caplog.text) == warns
    caplog.clear()
    precision.warn_if_slow(torch.device("cuda"), amp)
    assert not caplog.text
