"""Small runs of training: options of train.py, trainers, and what tests do to them half-way."""

import json
import os
import signal

import torch

from detector import distributed
from detector.config import PRESETS, RunConfig
from detector.data import build_datasets
from detector.data.loading import make_loader
from detector.model import build_model
from detector.training import Trainer

# Options of train.py for a run of seconds.
SMALL_RUN = (
    "--preset shapes-easy --hidden-dim 32 --num-heads 2 --num-encoder-layers 1 "
    "--feedforward-dim 32 --num-queries 10 --batch-size 4 --log-every 1 --device cpu"
)
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
        rank=distributed.rank(),
        world_size=distributed.count(),
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
