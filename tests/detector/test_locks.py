"""One run per folder of the detector: who gets it, who is told what, and what a kill leaves."""

import contextlib
import errno
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch.multiprocessing as mp
import train

from detector import distributed, locks, run_checkpoints
from detector.locks import folder_locked
from tests.detector.small_runs import SMALL_RUN


def refusal(folder):
    """What another run is told that wants the folder."""
    with pytest.raises(ValueError, match=r"must be a folder that no other run writes to") as error:
        folder_locked(folder).__enter__()
    return str(error.value)


@contextlib.contextmanager
def holder(folder, *, work="time.sleep(60)"):
    """A process that has the folder."""
    code = (
        f"import sys, time; sys.path[:0] = {sys.path!r}\n"
        "from pathlib import Path\nfrom detector.locks import folder_locked\n"
        f"with folder_locked(Path({str(folder)!r})):\n    print('has it', flush=True)\n    {work}"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"has it\n"
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    with holder(tmp_path) as other:
        said = refusal(tmp_path)
    assert f"got {tmp_path}, which belongs to process {other.pid} on {socket.gethostname()}" in said
    assert re.search(r"\(since \d{4}-\d\d-\d\d \d\d:\d\d: python -c\): wait for its end, or", said)
    assert "\n" not in said
    with folder_locked(tmp_path):
        pass


def test_a_run_in_the_same_process_is_told_too(tmp_path):
    with folder_locked(tmp_path):
        assert f"process {os.getpid()} on" in refusal(tmp_path)
        with folder_locked(tmp_path / "another"):
            pass
    with folder_locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_killed_run_leaves_its_folder_free(tmp_path, number):
    with holder(tmp_path) as other:
        other.send_signal(number)
        other.wait()
    assert (tmp_path / locks.NAME).exists()
    with folder_locked(tmp_path):
        assert f"process {os.getpid()} on" in (tmp_path / locks.NAME).read_text()
    assert os.listdir(tmp_path) == []


def test_processes_that_outlive_a_killed_run_do_not_hold_its_folder(tmp_path):
    """Those that load images are forked, and take seconds to notice."""
    work = "import os; print(os.fork() or time.sleep(60), flush=True); time.sleep(60)"
    with holder(tmp_path, work=work) as other:
        child = int(other.stdout.readline())
        try:
            assert f"process {other.pid}" in refusal(tmp_path)
            other.kill()
            other.wait()
            with folder_locked(tmp_path):
                os.kill(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_folder_that_was_made_and_not_used_is_removed(tmp_path):
    with folder_locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    with folder_locked(tmp_path / "used"):
        (tmp_path / "used" / "log.jsonl").write_text("")
    assert os.listdir(tmp_path / "used") == ["log.jsonl"]
    with folder_locked(tmp_path):
        pass
    assert tmp_path.exists()


def hold_for_moments(folder, counter):
    held, deadline = 0, time.monotonic() + 60
    while held < 100 and time.monotonic() < deadline:
        try:
            with folder_locked(folder):
                counter.value += 1
                assert counter.value == 1
                counter.value -= 1
                held += 1
        except ValueError:
            pass
    assert held == 100


def test_two_never_have_a_folder_at_once(tmp_path):
    """Each removes the file that both lock."""
    context = multiprocessing.get_context("fork")
    counter = context.Value("i", 0, lock=False)
    arguments = (tmp_path / "run", counter)
    others = [context.Process(target=hold_for_moments, args=arguments) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join()
    assert [process.exitcode for process in others] == [0, 0, 0]


@pytest.mark.parametrize("again", [False, True], ids=["removed", "made_again"])
def test_a_file_that_went_before_it_was_locked_counts_for_nothing(tmp_path, monkeypatch, again):
    """The run before removes it at its end, and another one may have begun since."""
    name, calls, lock = tmp_path / locks.NAME, [], locks.fcntl.flock

    def remove_first(descriptor, how):
        if not calls:
            name.unlink()
            if again:
                name.write_text("")
        calls.append(how)
        lock(descriptor, how)

    monkeypatch.setattr(locks.fcntl, "flock", remove_first)
    with folder_locked(tmp_path):
        assert len(calls) == 2
        assert f"process {os.getpid()} on" in refusal(tmp_path)


def test_a_folder_that_went_before_it_was_looked_at_is_made_again(tmp_path, monkeypatch):
    make, calls = os.mkdir, []

    def exists_first(path, *arguments):
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", exists_first)
    with folder_locked(tmp_path / "run"):
        assert (tmp_path / "run" / locks.NAME).exists()
    assert len(calls) == 2


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_a_file_system_without_locks_is_told_and_who_runs_here_is_found(
    tmp_path, monkeypatch, caplog, number
):
    if number is None:
        monkeypatch.setattr(locks, "fcntl", None)
    else:

        def unsupported(*_):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    with folder_locked(tmp_path):
        pass
    assert f"{tmp_path} is on a file system without locks (" in caplog.text
    assert "see to it that no other run writes there" in caplog.text

    # By what the other one wrote: it may be on another machine, or be no more.
    name = tmp_path / locks.NAME
    here = socket.gethostname()
    name.write_text(f"process {os.getppid()} on {here} (since today: python train.py)")
    assert f"which belongs to process {os.getppid()} on {here} (since today" in refusal(tmp_path)
    with holder(tmp_path / "other") as other:
        pass
    for left in (f"process {other.pid} on {here} (", "process 1 on elsewhere (", "process", ""):
        name.write_text(left)
        with folder_locked(tmp_path):
            assert f"process {os.getpid()} on {here}" in name.read_text()


def test_other_errors_of_the_file_system_are_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    message = r"^output must be a folder to write to, got .*; give another by --output$"
    for name in ("file", "file/deeper", "link", "link/deeper"):
        with pytest.raises(OSError, match=message):
            folder_locked(tmp_path / name).__enter__()

    def read_only(*_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", read_only)
    with pytest.raises(OSError, match=r"\(Read-only file system\); give another"):
        folder_locked(tmp_path).__enter__()


# ---- train.py ------------------------------------------------------------------------------------


def small_run(*arguments):
    return train.main([*map(str, arguments), "--num-workers", "0", "--max-minutes", "1e-9"])


def test_two_runs_do_not_share_a_folder(shapes, tmp_path, capsys):
    folder = tmp_path / "run"
    given = [*SMALL_RUN.split(), "--data-path", shapes, "--output", folder]
    with holder(folder) as other:
        assert small_run(*given) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: output must be a folder that no other run writes to")
        assert f"process {other.pid}" in said
    assert small_run(*given) == 0
    assert sorted(os.listdir(folder)) == ["last.pt", "log.jsonl"]
    step = run_checkpoints.load(folder / "last.pt")["step"]
    with holder(folder):
        assert small_run("--resume", folder / "last.pt") == 1
        # Elsewhere it may go on: it only reads here.
        assert small_run("--resume", folder / "last.pt", "--output", tmp_path / "new") == 0
    assert run_checkpoints.load(folder / "last.pt")["step"] == step
    assert run_checkpoints.load(tmp_path / "new" / "last.pt")["step"] == step + 1


def test_a_run_started_while_another_trains_leaves_that_alone(shapes, tmp_path):
    folder = tmp_path / "run"
    given = [*SMALL_RUN.split(), "--data-path", shapes, "--output", str(folder), "--epochs", "99"]
    command = [sys.executable, train.__file__, *given, "--num-workers", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    first = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        while first.poll() is None and not (folder / "last.pt").exists():
            time.sleep(0.05)
        second = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert second.returncode == 1
        assert f"which belongs to process {first.pid} on" in second.stderr
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    # Its loading process may still live; its folder is free all the same.
    assert small_run("--resume", folder / "last.pt", "--device", "cpu") == 0


def take_together(rank, port, folder, refused):
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.joined("cpu"):
        if refused:
            assert "which belongs to process" in refusal(folder)
            return
        with folder_locked(folder):
            assert (folder / locks.NAME).exists()
            distributed.gather(None)
        distributed.gather(None)
        assert not folder.exists()


@pytest.mark.parametrize("refused", [False, True])
def test_the_processes_of_a_run_have_its_folder_together(tmp_path, refused):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tmp_path / "run"
    with holder(folder) if refused else contextlib.nullcontext():
        both = mp.spawn(take_together, (port, folder, refused), nprocs=2, join=False, daemon=True)
        deadline = time.monotonic() + 120
        while not both.join(timeout=5):
            assert time.monotonic() < deadline, "the processes wait for each other"
