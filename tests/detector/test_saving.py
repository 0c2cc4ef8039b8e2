"""Checkpoints are written whole or not at all, whatever a disk or a kill does."""

import errno
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch

from detector import run_checkpoints
from detector.config import RunConfig
from tests.detector.small_runs import after_batches, make_trainer

pytestmark = pytest.mark.usefixtures("one_thread")


def killed(work):
    """Run ``work`` in a forked process that is killed, or kills itself; whether it was."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


def checkpoint(step):
    return {"step": step, "optimizer": {}, "model": {"weight": torch.full((100_000,), float(step))}}


def assert_is_checkpoint(path, step):
    state = run_checkpoints.load(path)
    assert state["step"] == step
    assert torch.equal(state["model"]["weight"], checkpoint(step)["model"]["weight"])


class Disk:
    """A file that does something once half of the checkpoint is written."""

    def __init__(self, action, *arguments):
        self.file, self.action, self.written = open(*arguments), action, 0  # noqa: SIM115

    def write(self, data):
        if self.written + len(data) > 200_000:
            self.file.write(data[: 200_000 - self.written])
            self.file.flush()
            self.action()
        self.written += len(data)
        return self.file.write(data)

    def flush(self):
        self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.file.close()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_kill_while_saving_leaves_the_last_checkpoint(tmp_path, monkeypatch, moment):
    path = tmp_path / "last.pt"
    run_checkpoints.save(checkpoint(1), path)

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write":
        monkeypatch.setattr(run_checkpoints, "open", partial(Disk, kill), raising=False)
    else:
        monkeypatch.setattr(run_checkpoints.os, moment, kill)
    assert killed(lambda: run_checkpoints.save(checkpoint(2), path))
    monkeypatch.undo()
    assert_is_checkpoint(path, 1)
    # What was left behind is in nobody's way.
    run_checkpoints.save(checkpoint(3), path)
    assert_is_checkpoint(path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for attempt in range(8):
        run_checkpoints.save(checkpoint(0), path, previous)
        child = os.fork()
        if child == 0:
            try:
                for step in range(1, 10_000):
                    run_checkpoints.save(checkpoint(step), path, previous)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = run_checkpoints.load(path)["step"]
        assert_is_checkpoint(path, step)
        if previous.exists() and step > 0:
            before = run_checkpoints.load(previous)["step"]
            assert before in (step, step - 1)
            assert_is_checkpoint(previous, before)


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_last_checkpoint_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    run_checkpoints.save(checkpoint(1), path)
    monkeypatch.setattr(run_checkpoints, "open", partial(Disk, full), raising=False)
    message = r"last\.pt could not be written \(.*No space left on device\); its last version is"
    with pytest.raises(run_checkpoints.CheckpointError, match=message):
        run_checkpoints.save(checkpoint(2), path)
    with pytest.raises(run_checkpoints.CheckpointError, match="there is no earlier version of it"):
        run_checkpoints.save(checkpoint(2), tmp_path / "new" / "last.pt")
    monkeypatch.undo()
    assert_is_checkpoint(path, 1)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["last.pt"]


def test_training_goes_on_while_the_disk_is_full(shapes, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(shapes, tmp_path, run=RunConfig(save_minutes=1e-9), epochs=1)
    monkeypatch.setattr(run_checkpoints, "open", partial(Disk, full), raising=False)
    after_batches(trainer, 7, monkeypatch.undo)  # somebody makes room
    assert trainer.fit() == "finished"
    assert run_checkpoints.load(tmp_path / "last.pt")["step"] == 8
    assert "No space left on device" in capsys.readouterr().err


def test_a_run_that_cannot_save_its_end_fails(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path, epochs=1)
    monkeypatch.setattr(run_checkpoints, "open", partial(Disk, full), raising=False)
    with pytest.raises(run_checkpoints.CheckpointError, match=r"last\.pt could not be written"):
        trainer.fit()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    for content, message in ((b"", "could not be read"), (b"not a file of torch", "be read")):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(run_checkpoints.CheckpointError, match=rf"last\.pt .*{message}"):
            run_checkpoints.load(tmp_path / "last.pt")
    with pytest.raises(run_checkpoints.CheckpointError, match=r"missing\.pt could not be read"):
        run_checkpoints.load(tmp_path / "missing.pt")


def test_logs_that_are_not_installed_are_named(shapes, tmp_path, monkeypatch):
    for name, package in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=f"--{name} needs .* pip install {name}"):
            make_trainer(shapes, tmp_path, run=RunConfig(**{name: True}))
