"""A run of the detector that was stopped goes on as if nothing had been; so do several at once."""

import math
import os
import random
import signal
import socket
import time
from itertools import islice

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from detector import distributed, run_checkpoints
from detector.backbone import FrozenBatchNorm2d
from detector.checkpoint_formats import read_checkpoint
from detector.config import RunConfig
from tests.detector.small_runs import (
    after_batches,
    assert_same_state,
    gradients_of_a_step,
    interrupt,
    make_trainer,
    records,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- stopping and resuming -----------------------------------------------------------------------


EVERYTHING = dict(accumulate=2, ema_decay=0.8, dropout=0.1, epochs=3, horizontal_flip=0.5)


@pytest.fixture(scope="module")
def uninterrupted(shapes, tmp_path_factory):
    """State after three epochs of four steps, and the losses of each step."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    trainer = make_trainer(shapes, folder, run=RunConfig(log_every=1), **EVERYTHING)
    assert trainer.fit() == "finished"
    return trainer.state(), [record["loss"] for record in records(folder, "train")]


def test_training_depends_on_its_seed_alone(shapes, tmp_path, uninterrupted):
    torch.rand(3), random.random()
    trainer = make_trainer(shapes, tmp_path, **EVERYTHING)
    trainer.fit()
    assert_same_state(trainer.state(), uninterrupted[0])
    other = make_trainer(shapes, tmp_path, **EVERYTHING, seed=1)
    other.fit()
    name = "transformer.level_embed"
    assert not torch.equal(other.state()["model"][name], trainer.state()["model"][name])


@pytest.mark.parametrize(
    ("batches", "number"),
    [(5, signal.SIGINT), (8, signal.SIGTERM)],
    ids=["within_a_step", "at_the_end_of_an_epoch"],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    shapes, tmp_path, uninterrupted, batches, number
):
    run = RunConfig(log_every=1)
    trainer = make_trainer(shapes, tmp_path, run=run, **EVERYTHING)
    after_batches(trainer, batches, lambda: interrupt(number))
    assert trainer.fit() == number.name
    assert trainer.step == math.ceil(batches / 2)

    torch.rand(3), random.random()
    # Workers make no difference either.
    workers = 2 if batches == 5 else 0
    resumed = make_trainer(shapes, tmp_path, run=run, **EVERYTHING, num_workers=workers)
    resumed.restore(run_checkpoints.load(tmp_path / "last.pt"))
    assert resumed.fit() == "finished"
    state, losses = uninterrupted
    assert [record["loss"] for record in records(tmp_path, "train")] == losses
    assert_same_state(resumed.state(), state | {"config": resumed.config.to_dict()})


def test_time_spent_in_steps_goes_on_counting_where_a_run_is_resumed(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, epochs=2)
    after_batches(trainer, 3, interrupt)
    trainer.fit()
    before = dict(trainer.seconds)
    resumed = make_trainer(shapes, tmp_path, epochs=2)
    resumed.restore(run_checkpoints.load(tmp_path / "last.pt"))
    assert resumed.seconds == before
    resumed.fit()
    names = ("training_seconds", "processor_seconds")
    logged = [{name: one[name] for name in names} for one in records(tmp_path, "evaluation")]
    assert len(logged) == 2 and logged[1] == resumed.seconds
    for name in names:
        assert 0 < before[name] < logged[0][name] < logged[1][name]


def test_an_interrupted_evaluation_is_repeated(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, lambda model: interrupt(), epochs=1)
    assert trainer.fit() == "SIGINT"
    resumed = make_trainer(shapes, tmp_path, lambda model: {"AP": 0.5}, epochs=1)
    resumed.restore(run_checkpoints.load(tmp_path / "last.pt"))
    assert (resumed.step, resumed.epoch) == (8, 0)
    assert resumed.fit() == "finished"
    assert resumed.best == {"AP": 0.5, "epoch": 1}
    assert len(records(tmp_path, "evaluation")) == 1


def test_a_second_signal_interrupts_at_once(shapes, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # ignored, where a shell runs this in the background
    trainer = make_trainer(shapes, tmp_path)
    after_batches(trainer, 1, lambda: (interrupt(), interrupt()))
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_training_stops_and_saves_when_time_is_up(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9))
    assert trainer.fit() == "time"
    assert run_checkpoints.load(tmp_path / "last.pt")["step"] == 1


def test_a_run_cannot_be_resumed_with_another_batch_size(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    state = run_checkpoints.load(tmp_path / "last.pt")
    with pytest.raises(run_checkpoints.CheckpointError, match="8 steps per epoch, got 4"):
        make_trainer(shapes, tmp_path, batch_size=8).restore(state)


def test_a_run_cannot_be_resumed_with_another_model(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    state = run_checkpoints.load(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"does not fit the model: .*\.layers\.1\."):
        make_trainer(shapes, tmp_path, num_encoder_layers=2).restore(state)


def test_a_resumed_run_takes_new_learning_rates(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    resumed = make_trainer(shapes, tmp_path, lr=0.5, weight_decay=0.25)
    resumed.restore(run_checkpoints.load(tmp_path / "last.pt"))
    assert {group["weight_decay"] for group in resumed.optimizer.param_groups} == {0.25}
    assert resumed.optimizer.param_groups[0]["full_lr"] == 0.5


def test_the_best_epoch_and_its_moving_average_are_kept(shapes, tmp_path):
    precisions = iter([0.1, 0.3, None, 0.2])
    evaluated = []

    def evaluate(model):
        evaluated.append(model.transformer.level_embed.detach().clone())
        return {"AP": next(precisions)}

    trainer = make_trainer(shapes, tmp_path, evaluate, epochs=4, ema_decay=0.9)
    trainer.fit()
    assert trainer.best == {"AP": 0.3, "epoch": 2}
    assert not torch.equal(evaluated[-1], trainer.model.transformer.level_embed)
    assert torch.equal(evaluated[-1], trainer.average.module.transformer.level_embed)
    best = read_checkpoint(tmp_path / "best.pt")
    assert torch.equal(best.state["transformer.level_embed"], evaluated[1])
    assert best.config == trainer.config
    assert best.categories == ["disc", "square", "triangle", "cross", "ring", "diamond"]
    with pytest.raises(run_checkpoints.CheckpointError, match=r"best\.pt .* holds weights alone"):
        run_checkpoints.load(tmp_path / "best.pt")


# ---- several processes ---------------------------------------------------------------------------


def in_float64(model):
    """Without batch norm, which sees one process alone."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, FrozenBatchNorm2d(child.num_features))
    model.double().register_forward_pre_hook(
        lambda module, arguments: (arguments[0].double(), arguments[1])
    )


def run_process(rank, port, shapes, folder):
    """One of two processes: a step's gradients, then training that a signal to one of them ends."""
    torch.set_num_threads(1)
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with distributed.joined("cpu"):
        trainer = make_trainer(
            shapes, folder / "step", adapt=in_float64, batch_size=2, accumulate=2
        )
        gradients = gradients_of_a_step(trainer, list(islice(trainer.loader, 2)))
        if rank == 0:
            torch.save(gradients, folder / "gradients.pt")
        trainer = make_trainer(shapes, folder, ema_decay=0.9, batch_size=2)
        if rank == 1:
            after_batches(trainer, 3, lambda: interrupt(signal.SIGTERM))
        assert trainer.fit() == "SIGTERM"
        assert trainer.step == 3
        parameters = torch.cat([p.detach().flatten() for p in trainer.average.parameters()])
        first, second = distributed.gather(parameters)
        assert torch.equal(first, second)


def test_two_processes_train_as_one_with_the_same_total_batch(shapes, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = mp.spawn(run_process, (port, shapes, tmp_path), nprocs=2, join=False, daemon=True)
    deadline = time.monotonic() + 120
    while not both.join(timeout=10):
        assert time.monotonic() < deadline, "the processes wait for each other"

    together = torch.load(tmp_path / "gradients.pt")
    alone = make_trainer(shapes, tmp_path / "alone", adapt=in_float64, accumulate=2)
    expected = gradients_of_a_step(alone, list(islice(alone.loader, 2)))
    assert together.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.dtype == torch.float64
        torch.testing.assert_close(together[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    state = run_checkpoints.load(tmp_path / "last.pt")
    assert state["step"] == 3
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device):
    with (
        pytest.raises(SystemExit, match=rf"^error: device must .*, got '?{device}"),
        distributed.joined(device),
    ):
        pass


def test_cuda_without_an_index_is_the_device_of_this_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with distributed.joined("cuda") as device:
        assert chosen == [device] == [torch.device("cuda", 0)]
