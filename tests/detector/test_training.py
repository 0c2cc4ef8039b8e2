"""Training the detector: settings, learning, stopping and resuming, saving, several processes."""

import dataclasses
import errno
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from itertools import islice

import pytest
import torch
import torch.multiprocessing as mp
import train
from torch import nn

from detector import processes, saving
from detector.backbone import FrozenBatchNorm2d
from detector.checkpoints import read_checkpoint
from detector.config import (
    PRESETS,
    Config,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    parse_command_line,
)
from detector.data import build_datasets
from detector.data.loading import make_loader
from detector.losses import NonFiniteLoss
from detector.model import build_model
from detector.training import Trainer, learning_rate_factor, parameter_groups
from tests.detector.small_runs import SMALL_RUN

SMALL = PRESETS["shapes-easy"].replace(
    dataset="coco",
    num_classes=6,
    hidden_dim=32,
    num_heads=2,
    num_encoder_layers=1,
    feedforward_dim=32,
    num_queries=10,
    batch_size=4,
    epochs=2,
    warmup_steps=3,
    num_workers=0,
)


@pytest.fixture(autouse=True)
def one_thread(set_threads):
    set_threads(1)


def make_trainer(
    shapes,
    folder,
    evaluate=lambda model: {"AP": 0.0},
    run=None,
    adapt=lambda model: None,
    **changes,
):
    config = SMALL.replace(data_path=shapes, **changes)
    train_set, _ = build_datasets(config.data, seed=config.train.seed)
    loader = make_loader(
        train_set,
        config.train.batch_size,
        num_workers=config.data.num_workers,
        seed=config.train.seed,
        rank=processes.rank(),
        world_size=processes.count(),
    )
    torch.manual_seed(config.train.seed)
    model = build_model(config.model)
    adapt(model)
    run = run or RunConfig()
    return Trainer(model, loader, evaluate, config, run, folder, torch.device("cpu"))


def after_batches(trainer, number, action):
    """Call ``action`` in the middle of batch ``number``, counted from 1."""
    calls = []

    def hook(*_):
        calls.append(1)
        if len(calls) == number:
            action()

    trainer.model.transformer.register_forward_pre_hook(hook)


def gradients_of_a_step(trainer, batches):
    """What the optimiser would get, by the names of the parameters; it gets nothing."""
    taken = {}

    def take(images):
        named = trainer.model.named_parameters()
        taken.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        trainer.optimizer.zero_grad()
        return 0.0

    trainer._update = take
    trainer._train_step(batches)
    return taken


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def records(folder, event):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record for record in lines if record["event"] == event]


def assert_same_state(actual, expected):
    """Equal to the last bit, whatever is nested in whatever; but for how long it took."""
    assert type(actual) is type(expected)
    if isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for key in actual.keys() - {"seconds"}:
            assert_same_state(actual[key], expected[key])
    elif isinstance(actual, (list, tuple)):
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert_same_state(one, other)
    elif isinstance(actual, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


# ---- configuration -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(epochs=0), "epochs must be at least 1, got 0"),
        (lambda: TrainConfig(lr=math.nan), "lr must be above 0, got nan"),
        (lambda: TrainConfig(amp="half"), "amp must be one of off, bf16, fp16, got 'half'"),
        (lambda: ModelConfig(num_heads="8"), "num_heads must be of type int, got '8'"),
        (lambda: ModelConfig(dropout=1.5), "dropout must be at most 1, got 1.5"),
        (lambda: ModelConfig(two_stage=True), "box_refine must be set where two_stage is"),
        (lambda: ModelConfig(hidden_dim=100), "hidden_dim must be a multiple of 8"),
        (lambda: ModelConfig(backbone="vgg"), "backbone must be resnet50, .*, got 'vgg'"),
        (lambda: DataConfig(short_sides=[480.5]), "short_sides must be of type int, got 480.5"),
        (lambda: Config.from_dict({"model": {"heads": 8}}), "known settings only, got model.heads"),
        (lambda: Config().replace(speed=3), "known settings only, got speed"),
    ],
)
def test_a_wrong_setting_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_being_saved(preset):
    as_saved = json.loads(json.dumps(PRESETS[preset].to_dict()))
    assert Config.from_dict(as_saved) == PRESETS[preset]


def test_the_original_configurations_differ_as_the_paper_says():
    original = PRESETS["r50_deformable_detr"]
    assert original == Config()
    name = "r50_deformable_detr"
    assert {
        key.removeprefix(name): [
            (field.name, getattr(preset.model, field.name))
            for field in dataclasses.fields(preset.model)
            if getattr(preset.model, field.name) != getattr(original.model, field.name)
        ]
        for key, preset in PRESETS.items()
        if key.startswith(f"{name}_")
    } == {
        "_single_scale": [("num_feature_levels", 1)],
        "_single_scale_dc5": [("dilation", True), ("num_feature_levels", 1)],
        "_plus_iterative_bbox_refinement": [("box_refine", True)],
        "_plus_plus_two_stage": [("box_refine", True), ("two_stage", True)],
    }


def test_the_command_line_changes_what_it_is_given():
    line = "--preset digits --lr 3e-4 --no-box-refine --short-sides 64 96 --max-minutes 2"
    command = parse_command_line(line.split())
    assert command.preset == "digits"
    assert command.changes == {"lr": 3e-4, "box_refine": False, "short_sides": [64, 96]}
    assert command.run == RunConfig(max_minutes=2.0)
    command = parse_command_line(["--preset", "digits", "--data-path", "mine"])
    assert command.changes == {"data_path": "mine", "dataset": "coco"}


def test_help_names_every_setting_and_the_defaults_of_the_preset(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(["--preset", "shapes-easy", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for section in (RunConfig, ModelConfig, DataConfig, TrainConfig):
        for field in dataclasses.fields(section):
            shown = f"--{field.name.replace('_', '-')}" in text
            assert shown == (field.name != "num_classes"), field.name
    assert "channels of the transformer (default: 64)" in text


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--preset coco", "invalid choice: 'coco'"),
        ("--preset digits --resume x.pt", "resume must come without preset"),
        ("--weights x.pt --resume x.pt", "resume and weights must not both be given"),
        ("--max-minutes -1", "max_minutes must be at least 0, got -1.0"),
    ],
)
def test_a_wrong_command_line_is_refused(line, message, capsys):
    with pytest.raises(SystemExit):
        parse_command_line(line.split())
    assert message in capsys.readouterr().err


# ---- optimisation --------------------------------------------------------------------------------


def test_parameter_groups_are_those_of_the_original():
    model = build_model(ModelConfig())
    groups = parameter_groups(model, TrainConfig())
    counted = {
        group["name"]: (len(group["params"]), sum(p.numel() for p in group["params"]))
        for group in groups
    }
    assert counted == {
        "base": (230, 15824735),
        "backbone": (42, 23232512),
        "points": (26, 790018),
    }
    rates = {group["name"]: group["full_lr"] for group in groups}
    assert rates == pytest.approx({"base": 2e-4, "backbone": 2e-5, "points": 2e-5})
    frozen = parameter_groups(model, TrainConfig(lr_backbone=0))
    assert [group["name"] for group in frozen] == ["base", "points"]
    assert not any(parameter.requires_grad for parameter in model.backbone[0].parameters())


def test_learning_rate_rises_then_falls_by_steps_or_a_cosine():
    step = TrainConfig(epochs=3, schedule="step", lr_drop=2, warmup_steps=4)
    factors = [learning_rate_factor(i, 4, step) for i in range(12)]
    assert factors == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 5, *[0.1] * 4])
    cosine = TrainConfig(epochs=3, schedule="cosine")
    factors = [learning_rate_factor(i, 4, cosine) for i in (0, 3, 6, 9, 12)]
    assert factors == pytest.approx([1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0])


def test_the_detector_overfits_32_images(shapes, tmp_path):
    easy = dataclasses.asdict(PRESETS["shapes-easy"].model)
    trainer = make_trainer(
        shapes,
        tmp_path,
        run=RunConfig(log_every=4),
        **(easy | {"num_classes": 6}),
        epochs=15,
        batch_size=8,
        lr=2e-3,
        lr_backbone=2e-3,
        horizontal_flip=0.0,
        warmup_steps=10,
    )
    assert trainer.fit() == "finished"
    losses = [record["loss"] for record in records(tmp_path, "train")]
    assert len(losses) == 15
    # With three seeds it fell to .35, .37 and .39 of the first.
    assert losses[-1] < 0.45 * losses[0]


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(shapes, tmp_path, amp):
    trainer = make_trainer(shapes, tmp_path, amp=amp, epochs=1, accumulate=4)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    assert trainer.fit() == "finished"
    assert trainer.scaler.is_enabled() == (amp == "fp16")
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all()
        moved = (parameter - before[name]).abs().max() > 0
        assert moved or name.endswith("in_proj_bias"), name


def test_accumulated_gradients_are_those_of_the_mean_loss(shapes, tmp_path):
    alone = make_trainer(shapes, tmp_path)
    first, second, *_ = alone.loader
    expected = [gradients_of_a_step(alone, [batch]) for batch in (first, second)]
    together = gradients_of_a_step(make_trainer(shapes, tmp_path, accumulate=2), [first, second])
    assert together.keys() == expected[0].keys()
    for name, gradient in together.items():
        mean = (expected[0][name] + expected[1][name]) / 2
        torch.testing.assert_close(gradient, mean, msg=name)


def test_a_loss_that_is_no_number_stops_before_the_weights_change(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path)
    head = trainer.model.bbox_embed[1].layers[-1]

    def spoil():
        head.bias.data.fill_(math.nan)
        trainer.before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    after_batches(trainer, 3, spoil)
    with pytest.raises(
        NonFiniteLoss, match=r"loss_box = nan, .* in step 3; images .* by id: \d+, \d+"
    ):
        trainer.fit()
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(
            parameter, trainer.before[name], rtol=0, atol=0, equal_nan=True, msg=name
        )


def test_a_gradient_that_is_no_number_stops_before_the_weights_change(shapes, tmp_path):
    trainer = make_trainer(shapes, tmp_path)
    weight = trainer.model.bbox_embed[0].layers[0].weight
    before = weight.detach().clone()
    weight.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLoss, match=r"gradient_norm = (nan|inf) in step 1;"):
        trainer.fit()
    assert torch.equal(weight, before)


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
    resumed.restore(saving.load(tmp_path / "last.pt"))
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
    resumed.restore(saving.load(tmp_path / "last.pt"))
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
    resumed.restore(saving.load(tmp_path / "last.pt"))
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
    assert saving.load(tmp_path / "last.pt")["step"] == 1


def test_a_run_cannot_be_resumed_with_another_batch_size(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    state = saving.load(tmp_path / "last.pt")
    with pytest.raises(saving.CheckpointError, match="8 steps per epoch, got 4"):
        make_trainer(shapes, tmp_path, batch_size=8).restore(state)


def test_a_run_cannot_be_resumed_with_another_model(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    state = saving.load(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"does not fit the model: .*\.layers\.1\."):
        make_trainer(shapes, tmp_path, num_encoder_layers=2).restore(state)


def test_a_resumed_run_takes_new_learning_rates(shapes, tmp_path):
    make_trainer(shapes, tmp_path, run=RunConfig(max_minutes=1e-9)).fit()
    resumed = make_trainer(shapes, tmp_path, lr=0.5, weight_decay=0.25)
    resumed.restore(saving.load(tmp_path / "last.pt"))
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
    with pytest.raises(saving.CheckpointError, match=r"best\.pt .* holds weights alone"):
        saving.load(tmp_path / "best.pt")


# ---- saving --------------------------------------------------------------------------------------


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
    state = saving.load(path)
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
    saving.save(checkpoint(1), path)

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "write":
        monkeypatch.setattr(saving, "open", partial(Disk, kill), raising=False)
    else:
        monkeypatch.setattr(saving.os, moment, kill)
    assert killed(lambda: saving.save(checkpoint(2), path))
    monkeypatch.undo()
    assert_is_checkpoint(path, 1)
    # What was left behind is in nobody's way.
    saving.save(checkpoint(3), path)
    assert_is_checkpoint(path, 3)
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_kill_at_any_moment_leaves_whole_checkpoints(tmp_path):
    path, previous = tmp_path / "last.pt", tmp_path / "previous.pt"
    for attempt in range(8):
        saving.save(checkpoint(0), path, previous)
        child = os.fork()
        if child == 0:
            try:
                for step in range(1, 10_000):
                    saving.save(checkpoint(step), path, previous)
            finally:
                os._exit(1)
        time.sleep(0.05 + 0.007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        step = saving.load(path)["step"]
        assert_is_checkpoint(path, step)
        if previous.exists() and step > 0:
            before = saving.load(previous)["step"]
            assert before in (step, step - 1)
            assert_is_checkpoint(previous, before)


def full():
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_the_last_checkpoint_and_is_named(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    saving.save(checkpoint(1), path)
    monkeypatch.setattr(saving, "open", partial(Disk, full), raising=False)
    message = r"last\.pt could not be written \(.*No space left on device\); its last version is"
    with pytest.raises(saving.CheckpointError, match=message):
        saving.save(checkpoint(2), path)
    with pytest.raises(saving.CheckpointError, match="there is no earlier version of it"):
        saving.save(checkpoint(2), tmp_path / "new" / "last.pt")
    monkeypatch.undo()
    assert_is_checkpoint(path, 1)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["last.pt"]


def test_training_goes_on_while_the_disk_is_full(shapes, tmp_path, monkeypatch, capsys):
    trainer = make_trainer(shapes, tmp_path, run=RunConfig(save_minutes=1e-9), epochs=1)
    monkeypatch.setattr(saving, "open", partial(Disk, full), raising=False)
    after_batches(trainer, 7, monkeypatch.undo)  # somebody makes room
    assert trainer.fit() == "finished"
    assert saving.load(tmp_path / "last.pt")["step"] == 8
    assert "No space left on device" in capsys.readouterr().err


def test_a_run_that_cannot_save_its_end_fails(shapes, tmp_path, monkeypatch):
    trainer = make_trainer(shapes, tmp_path, epochs=1)
    monkeypatch.setattr(saving, "open", partial(Disk, full), raising=False)
    with pytest.raises(saving.CheckpointError, match=r"last\.pt could not be written"):
        trainer.fit()


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    for content, message in ((b"", "could not be read"), (b"not a file of torch", "be read")):
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(saving.CheckpointError, match=rf"last\.pt .*{message}"):
            saving.load(tmp_path / "last.pt")
    with pytest.raises(saving.CheckpointError, match=r"missing\.pt could not be read"):
        saving.load(tmp_path / "missing.pt")


def test_logs_that_are_not_installed_are_named(shapes, tmp_path, monkeypatch):
    for name, package in (("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=f"--{name} needs .* pip install {name}"):
            make_trainer(shapes, tmp_path, run=RunConfig(**{name: True}))


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
    with processes.joined("cpu"):
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
        first, second = processes.gather(parameters)
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
    state = saving.load(tmp_path / "last.pt")
    assert state["step"] == 3
    assert len(state["random"]) == 2
    assert not torch.equal(state["random"][0]["torch"], state["random"][1]["torch"])


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused_in_a_sentence(device):
    with (
        pytest.raises(SystemExit, match=rf"^error: device must .*, got '?{device}"),
        processes.joined(device),
    ):
        pass


def test_cuda_without_an_index_is_the_device_of_this_process(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    with processes.joined("cuda") as device:
        assert chosen == [device] == [torch.device("cuda", 0)]


# ---- the command line ----------------------------------------------------------------------------


def test_the_program_trains_stops_resumes_and_fine_tunes(shapes, tmp_path, capsys):
    folder, program = tmp_path / "run", [sys.executable, train.__file__]
    given = [*SMALL_RUN.split(), "--data-path", shapes, "--output", str(folder), "--epochs", "200"]
    running = subprocess.Popen(
        [*program, *given, "--num-workers", "1"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    while running.poll() is None and not (folder / "log.jsonl").exists():
        time.sleep(0.05)
    # As `timeout` does, and a terminal with Ctrl-C: to the processes that load images, too.
    os.killpg(running.pid, signal.SIGTERM)
    _, output = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, output
    assert "Traceback" not in output
    last = folder / "last.pt"
    assert not (folder / "run.lock").exists()
    assert (
        f"Stopped (SIGTERM) and saved. To go on: python {train.__file__} --resume {last}" in output
    )

    # The rest in this process, to save the time of starting.
    assert train.main(given) == 1
    assert f"go on with that one by --resume {last}" in capsys.readouterr().err
    more = ["--resume", str(last), "--num-workers", "0", "--log-every", "1"]
    assert train.main([*more, "--max-minutes", "1e-9"]) == 0
    assert "Stopped (time) and saved." in capsys.readouterr().err
    # Warm-up has hardly begun, so a shorter run is as good as any other.
    steps = records(folder, "train")[-1]["step"]
    epochs = math.ceil(steps / 8)
    assert train.main([*more, "--epochs", str(epochs)]) == 0
    assert f"weights in {folder}/best.pt" in capsys.readouterr().err
    assert [record["step"] for record in records(folder, "train")] == [*range(1, 8 * epochs + 1)]
    evaluation = records(folder, "evaluation")[-1]
    assert evaluation["step"] == 8 * epochs
    assert 0 <= evaluation["AP"] <= evaluation["AP50"] <= 1

    tuned = tmp_path / "tuned"
    start = ["--weights", str(folder / "best.pt"), "--reset-classes", "--output", str(tuned)]
    data = ["--data-path", shapes, "--num-workers", "0", "--short-sides", "64"]
    assert train.main([*start, *data, "--max-minutes", "1e-9"]) == 0
    assert saving.load(tuned / "last.pt")["config"]["model"]["hidden_dim"] == 32


def test_a_pretrained_backbone_must_be_asked_for(shapes, tmp_path, capsys):
    given = ["--data-path", shapes, "--output", str(tmp_path), "--device", "cpu"]
    assert train.main(given) == 1
    assert "backbone_weights must be given for resnet50" in capsys.readouterr().err


def test_missing_data_is_a_sentence(tmp_path, capsys):
    given = ["--data-path", str(tmp_path / "nowhere"), "--output", str(tmp_path / "out")]
    assert train.main([*given, "--device", "cpu"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
