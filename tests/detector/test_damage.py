"""Damaged checkpoints of the detector: found before they are used, and replaced by the one before.

What stops the writing of a checkpoint is in test_training.py.
"""

import contextlib
import errno
import os
import random
import shutil
import signal
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import train

from detector import checksums, run_checkpoints, weight_files
from detector.checkpoint_formats import read_checkpoint
from detector.run_checkpoints import BEST, LAST, PREVIOUS
from tests.detector.small_runs import SMALL_RUN


def checkpoint(step=1, size=4000):
    """Noise, so that no hole meets zeros."""
    noise = torch.randn(size, generator=torch.Generator().manual_seed(step))
    return {"step": step, "optimizer": {}, "model": {"weight": noise}}


@pytest.fixture
def path(tmp_path):
    """A checkpoint of some 20 KB with one before it."""
    path = tmp_path / "run" / LAST
    for step in (1, 2):
        run_checkpoints.save(checkpoint(step), path, path.with_name(PREVIOUS))
    return path


def assert_refused(path, content):
    path.write_bytes(content)
    assert not weight_files.is_whole(path)
    with pytest.raises(run_checkpoints.CheckpointError) as error:
        run_checkpoints.load(path)
    text = str(error.value)
    assert text.startswith(f"{path} could not be read: ")
    assert text.endswith(f"{PREVIOUS} (step 1) is whole: give that instead, --resume "
                         f"{path.with_name(PREVIOUS)}")  # fmt: skip
    assert "\n" not in text


# ---- damage --------------------------------------------------------------------------------------


def places(size, step):
    """All over a file, and everywhere near its ends, where an archive has what it consists of."""
    return sorted({*range(0, size, step), *range(40), *range(size - 160, size)})


def test_any_flipped_bit_is_noticed(path):
    whole = path.read_bytes()
    for place in places(len(whole), 89):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        assert_refused(path, damaged)


@pytest.mark.parametrize("size", [16, 4096])
def test_any_hole_of_zeros_is_noticed(path, size):
    whole = path.read_bytes()
    for start in [*range(0, len(whole), 997), len(whole) - size]:
        damaged = bytearray(whole)
        damaged[start : start + size] = bytes(len(damaged[start : start + size]))
        if damaged != whole:
            assert_refused(path, damaged)


def test_any_missing_end_is_noticed(path):
    whole = path.read_bytes()
    for size in places(len(whole), 499):
        assert_refused(path, whole[:size])


@pytest.mark.parametrize("tail", [b"\0", b"\n", bytes(5000), b"PK\5\6" + bytes(18), "itself"])
def test_anything_after_the_end_is_noticed(path, tail):
    whole = path.read_bytes()
    assert_refused(path, whole + (whole if tail == "itself" else tail))


def test_a_missing_block_is_noticed(path):
    whole = path.read_bytes()
    assert_refused(path, whole[:4096] + whole[8192:])


def test_a_checkpoint_whose_checksum_was_removed_is_noticed(path):
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b""
    assert checksums.holds(open(path, "rb")) is None  # noqa: SIM115
    with pytest.raises(
        run_checkpoints.CheckpointError, match=r"checksum at its end is missing; .*prev"
    ):
        run_checkpoints.load(path)


def test_a_disk_that_cannot_be_read_any_more_is_noticed(path, monkeypatch):
    class Bad:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def read(self, size=-1):
            if self.file.tell() > 10_000:
                raise OSError(errno.EIO, "Input/output error")
            return self.file.read(min(size, 1000))

    def open_bad(name, mode):
        return Bad(open(name, mode)) if name == path else open(name, mode)

    monkeypatch.setattr(weight_files, "open", open_bad, raising=False)
    with pytest.raises(
        run_checkpoints.CheckpointError, match=r"Input/output error; .*prev.*\(step 1"
    ):
        run_checkpoints.load(path)


def test_every_program_refuses_a_damaged_file(path):
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"^{path}: is damaged: .* {PREVIOUS}|previous.pt \(step"):
        read_checkpoint(path)
    # A file that is of no run stands alone.
    other = shutil.copy(path, path.with_name("weights.pt"))
    with pytest.raises(ValueError, match=r"is damaged: .*; fetch or copy it again$"):
        read_checkpoint(other)


def test_a_copied_file_keeps_its_checksum_and_any_program_reads_it(path, tmp_path):
    copy = shutil.copy(path, tmp_path / "copy.pth")
    with open(copy, "rb") as file:
        assert checksums.holds(file)
    assert run_checkpoints.load(copy)["step"] == 2
    plain = torch.load(copy, weights_only=True)
    assert torch.equal(plain["model"]["weight"], checkpoint(2)["model"]["weight"])
    with zipfile.ZipFile(copy) as archive:
        assert archive.testzip() is None
        assert archive.comment.startswith(b"SHA-256 of all bytes before it: ")


@pytest.mark.parametrize("sizes", [[1] * 40, [3, 1, 1, 7, 0, 2, 50], [64]], ids=str)
def test_the_checksum_is_that_of_all_bytes_however_they_come(tmp_path, sizes):
    rest = bytes(range(65, 105)) + bytes(2)
    path = tmp_path / "file"
    with open(path, "wb") as file:
        sealing = checksums.SealingFile(file)
        written = 0
        for size in sizes:
            part = rest[written : written + size]
            written += sealing.write(memoryview(part))
        sealing.write(rest[written:])
        sealing.seal()
    content = path.read_bytes()
    assert content.startswith(rest[:-2])
    with open(path, "rb") as file:
        assert checksums.holds(file)


# ---- files without a checksum --------------------------------------------------------------------


def test_a_checkpoint_of_an_older_version_loads_and_says_so(tmp_path, caplog):
    path = tmp_path / LAST
    torch.save({"format": 1, **checkpoint(5)}, path)
    assert run_checkpoints.load(path)["step"] == 5
    assert f"{path} holds no checksum" in caplog.text
    assert weight_files.is_whole(path)


@pytest.mark.parametrize("ours", [True, False])
def test_damaged_contents_of_files_without_a_checksum_are_noticed_too(tmp_path, ours):
    path = tmp_path / "weights.pth"
    content = checkpoint(5)
    torch.save({"format": 1, **content} if ours else content, path)
    whole = path.read_bytes()
    middle = whole.index(content["model"]["weight"].numpy().tobytes()) + 8000
    for damaged in (
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        whole[:middle] + bytes(300) + whole[middle + 300 :],
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"is damaged: weights/data/0 in it cannot be read"):
            weight_files.read(path)
        assert not weight_files.is_whole(path)


def test_files_written_without_any_checksum_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(checkpoint(3), tmp_path / "weights.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert weight_files.read(tmp_path / "weights.pth")["step"] == 3


# ---- the one before ------------------------------------------------------------------------------


def test_the_checkpoint_before_the_last_is_kept(tmp_path):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    run_checkpoints.save(checkpoint(1), last, previous)
    assert not previous.exists()
    for step in (2, 3, 4):
        run_checkpoints.save(checkpoint(step), last, previous)
        assert run_checkpoints.load(last)["step"] == step
        assert run_checkpoints.load(previous)["step"] == step - 1
    assert sorted(os.listdir(tmp_path)) == [LAST, PREVIOUS]


def test_a_damaged_checkpoint_does_not_displace_the_one_before(path):
    path.write_bytes(path.read_bytes()[:-1])
    run_checkpoints.save(checkpoint(3), path, path.with_name(PREVIOUS))
    assert run_checkpoints.load(path)["step"] == 3
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] == 1


@pytest.mark.parametrize("links", [True, False], ids=["links", "no_links"])
@pytest.mark.parametrize("moment", ["link", "first_rename", "second_rename"])
def test_a_kill_while_the_one_before_is_kept_leaves_whole_files(path, monkeypatch, links, moment):
    renames = []

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def no_link(*_):
        raise PermissionError("Operation not permitted")

    def rename(*arguments, rename=os.replace):
        renames.append(arguments)
        if len(renames) == 1 + (moment == "second_rename"):
            kill()
        rename(*arguments)

    child = os.fork()
    if child == 0:
        if not links:
            run_checkpoints.os.link = no_link
        if moment == "link" and links:
            run_checkpoints.os.link = kill
        elif moment == "link":
            run_checkpoints.shutil.copyfile = kill
        else:
            run_checkpoints.os.replace = rename
        try:
            run_checkpoints.save(checkpoint(3), path, path.with_name(PREVIOUS))
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert run_checkpoints.load(path)["step"] == 2
    kept = run_checkpoints.load(path.with_name(PREVIOUS))["step"]
    assert kept == (2 if moment == "second_rename" else 1)
    run_checkpoints.save(checkpoint(4), path, path.with_name(PREVIOUS))
    assert run_checkpoints.load(path)["step"] == 4
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] == 2
    assert sorted(os.listdir(path.parent)) == [LAST, PREVIOUS]  # nothing is left behind


def test_a_full_disk_while_the_one_before_is_copied_costs_nothing(path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_checkpoints.os, "link", fail)
    monkeypatch.setattr(run_checkpoints.shutil, "copyfile", fail)
    with pytest.raises(
        run_checkpoints.CheckpointError, match=r"No space left .*; its last version is kept"
    ):
        run_checkpoints.save(checkpoint(3), path, path.with_name(PREVIOUS))
    assert run_checkpoints.load(path)["step"] == 2
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] == 1
    assert sorted(os.listdir(path.parent)) == [LAST, PREVIOUS]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is full")
def test_a_really_full_disk_costs_nothing_either(path, monkeypatch):
    device = Path("/dev/full")
    monkeypatch.setattr(run_checkpoints, "open", lambda _, mode: device.open(mode), raising=False)
    message = r"last\.pt could not be written \(.*No space left on device\); its last version is"
    for size in (1, 10, 4000, 1_000_000):  # one fits the buffer, and fails where that is emptied
        with pytest.raises(run_checkpoints.CheckpointError, match=message):
            run_checkpoints.save(checkpoint(3, size), path, path.with_name(PREVIOUS))
    assert run_checkpoints.load(path)["step"] == 2
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] == 1
    assert sorted(os.listdir(path.parent)) == [LAST, PREVIOUS]


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("function", ["fsync", "link", "replace", "unlink"])
def test_an_interrupt_at_any_moment_of_saving_costs_nothing(path, monkeypatch, function, number):
    """Ctrl-C, twice: before and after each call of the system."""
    calls, really = [], getattr(os, function)

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            raise KeyboardInterrupt
        result = really(*arguments, **options)
        if len(calls) == number - 1:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(run_checkpoints.os, function, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        run_checkpoints.save(checkpoint(3), path, path.with_name(PREVIOUS))
    monkeypatch.undo()
    assert run_checkpoints.load(path)["step"] in (2, 3)
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] in (1, 2)
    run_checkpoints.save(checkpoint(4), path, path.with_name(PREVIOUS))
    assert run_checkpoints.load(path)["step"] == 4
    assert run_checkpoints.load(path.with_name(PREVIOUS))["step"] in (2, 3)
    assert sorted(os.listdir(path.parent)) == [LAST, PREVIOUS]


def test_whoever_reads_while_others_write_gets_a_whole_file(tmp_path):
    last, previous = tmp_path / LAST, tmp_path / PREVIOUS
    run_checkpoints.save(checkpoint(1), last)
    stop = threading.Event()

    def write():
        step = 1
        while not stop.is_set():
            step += 1
            run_checkpoints.save(checkpoint(step), last, previous)

    writing = threading.Thread(target=write)
    writing.start()
    steps = []
    try:
        while len(steps) < 60 or steps[-1] < 10:
            steps.append(run_checkpoints.load(last)["step"])
        before = run_checkpoints.load(previous)["step"]
        assert 0 < before <= run_checkpoints.load(last)["step"]
    finally:
        stop.set()
        writing.join()
    assert steps == sorted(steps)


# ---- the programs --------------------------------------------------------------------------------


def run(*arguments):
    return train.main([*map(str, arguments), "--num-workers", "0"])


def spoil(path):
    content = bytearray(path.read_bytes())
    content[random.Random(0).randrange(len(content))] ^= 8
    path.write_bytes(content)


def test_what_is_said_of_a_damaged_checkpoint_goes_on(shapes, tmp_path, capsys):
    folder = tmp_path / "run"
    last, previous, best = folder / LAST, folder / PREVIOUS, folder / BEST
    assert run(*SMALL_RUN.split(), "--data-path", shapes, "--output", folder, "--epochs", 1) == 0
    spoil(last)
    capsys.readouterr()
    assert run("--resume", last) == 1
    output = capsys.readouterr().err
    assert output.count("\n") == 1
    advice = f"{previous} (step 8) is whole: give that instead, --resume {previous}"
    assert output.strip().endswith(advice)

    # A new run does not take the folder, and an old one goes on.
    assert run(*SMALL_RUN.split(), "--data-path", shapes, "--output", folder) == 1
    assert run("--resume", previous, "--epochs", 2) == 0
    assert run_checkpoints.load(last)["step"] == 16
    assert weight_files.is_whole(previous)

    spoil(last), spoil(previous)
    capsys.readouterr()
    assert run("--resume", last) == 1
    assert capsys.readouterr().err.strip().endswith(f"give that instead, --weights {best}")
    spoil(best)
    assert run("--resume", last) == 1
    assert capsys.readouterr().err.strip().endswith("; fetch or copy it again")


def test_a_run_whose_last_checkpoint_was_removed_is_not_overwritten(shapes, path, capsys):
    path.unlink()
    given = [*SMALL_RUN.split(), "--data-path", shapes, "--output", path.parent]
    assert run(*given) == 1
    assert f"--resume {path.with_name(PREVIOUS)}" in capsys.readouterr().err
    assert run("--resume", path) == 1
    assert "last.pt could not be read: does not exist; its folder holds previous.pt" in (
        capsys.readouterr().err
    )
