"""Train Deformable DETR on COCO, on data in its layout, or on generated data.

    python train.py --preset digits
    python train.py --data-path /data/coco --backbone-weights resnet50-0676ba61.pth
    torchrun --nproc-per-node 8 train.py --data-path /data/coco --batch-size 4 ...
    python train.py --resume out/digits/last.pt
    python train.py --data-path /data/mine --check-data

``python train.py --help`` lists all settings, those of a preset with ``--preset NAME --help``.
"""

from __future__ import annotations

import dataclasses
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import detector.threads  # noqa: F401, before torch, which reads what it sets

# isort: split

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from detector import distributed, fine_tuning, locks, run_checkpoints
from detector.checkpoint_formats import load_into, read_checkpoint
from detector.config import PRESETS, CommandLine, Config, parse_command_line
from detector.data import DataError, build_datasets
from detector.data.check import check_data
from detector.data.loading import make_loader
from detector.evaluation import evaluate
from detector.losses import NonFiniteLoss
from detector.model import build_model
from detector.training import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; return the exit status."""
    command = parse_command_line(arguments)
    logging.basicConfig(format="%(message)s")
    if command.run.check_data:
        return _check_data(command)
    with (
        distributed.joined(command.run.device) as device,
        logging_redirect_tqdm(),
        ExitStack() as until_the_end,
    ):
        try:
            trainer = prepare(command, device, until_the_end)
        except (ValueError, OSError, ImportError, run_checkpoints.CheckpointError) as error:
            return _fail(error)
        last, epochs = trainer.folder / run_checkpoints.LAST, trainer.config.train.epochs
        if trainer.epoch >= epochs:
            _say(
                f"{command.run.resume} is of a run that is finished, {trainer.epoch} epochs. "
                f"To go on: --resume {command.run.resume} --epochs N, with N above {trainer.epoch}"
            )
            return 0
        _say(trainer.describe())
        if not trainer.evaluate:
            _say("There is no split val: nothing is validated, and no epoch is the best.")
        try:
            reason = trainer.fit()
        except (run_checkpoints.CheckpointError, NonFiniteLoss, DataError) as error:
            return _fail(error)
        except KeyboardInterrupt:
            _say(f"\nStopped at once. The last state saved, if any, is {last}.")
            return 128 + signal.SIGINT
        if reason == "finished":  # and all processes are here
            trainer.dataset.merge_findings()
        for line in trainer.dataset.image_findings().lines():
            _say(f"Training data: {line}")
        if reason == "finished":
            best = trainer.best
            if not trainer.evaluate:
                _say(f"Nothing was validated; weights of the last epoch in {last}")
            if best:
                _say(
                    f"Best: AP {best['AP']:.3f} after epoch {best['epoch']}; "
                    f"weights in {trainer.folder / run_checkpoints.BEST}"
                )
            return 0
        _say(f"Stopped ({reason}) and saved. To go on: python {sys.argv[0]} --resume {last}")
        return 0 if reason == "time" else 128 + signal.Signals[reason]


def prepare(command: CommandLine, device: torch.device, until_the_end: ExitStack) -> Trainer:
    """Make data, model and trainer; pick up the state of an interrupted run.

    The folder of the run is kept from others until ``until_the_end``.
    """
    run = command.run
    if run.resume and not Path(run.resume).is_file():
        run_checkpoints.load(Path(run.resume))  # says what it is instead
    folder = Path(
        run.output or (Path(run.resume).parent if run.resume else f"out/{command.preset}")
    )
    until_the_end.enter_context(locks.folder_locked(folder))
    # Only now: another run may have written it to its end.
    checkpoint = run_checkpoints.load(Path(run.resume)) if run.resume else None
    config = Config.from_dict(checkpoint["config"]) if checkpoint else PRESETS[command.preset]
    weights = read_checkpoint(run.weights, "--weights") if run.weights else None
    if weights:
        config = dataclasses.replace(config, model=weights.config.model)
    config = config.replace(**command.changes)
    if not checkpoint:
        for name in (run_checkpoints.LAST, run_checkpoints.PREVIOUS):
            if (folder / name).exists():
                raise ValueError(
                    f"output must not hold another run, got {folder}: go on with that one by "
                    f"--resume {folder / name}, or give another --output"
                )

    if weights and not run.reset_classes and "label_ids" not in command.changes:
        config = fine_tuning.with_labels_of(weights, run.weights, config)
    train_set, val_set = build_datasets(config.data, seed=config.train.seed)
    if checkpoint:
        fine_tuning.check_classes(checkpoint, run.resume, train_set)
    elif weights and not run.reset_classes:
        fine_tuning.check_weights(weights, run.weights, config, train_set)
    else:
        config = config.replace(num_classes=train_set.num_classes)
    shared = dict(
        batch_size=config.train.batch_size,
        num_workers=config.data.num_workers,
        rank=distributed.rank(),
        world_size=distributed.count(),
        pin_memory=device.type == "cuda",
    )
    loader = make_loader(train_set, seed=config.train.seed, **shared)
    evaluation = None
    if val_set:
        val_loader = make_loader(val_set, **shared)
        evaluation = partial(evaluate, loader=val_loader, dataset=val_set, device=device)

    from_scratch = config.model.backbone == "tiny" or run.backbone_weights == "random"
    if not (from_scratch or checkpoint or run.weights or run.backbone_weights):
        raise ValueError(
            f"backbone_weights must be given for {config.model.backbone}, whose batch norms are "
            "frozen: a file with ImageNet weights, or 'random' if speed is all that matters"
        )
    torch.manual_seed(config.train.seed)
    model = build_model(
        config.model,
        backbone_weights=None if from_scratch else run.backbone_weights or None,
        gradient_checkpointing=config.train.gradient_checkpointing,
    )
    if weights:
        load_into(model, weights.state, run.reset_classes)
    trainer = Trainer(
        model,
        loader,
        evaluation,
        config,
        run,
        folder,
        device,
    )
    if checkpoint:
        trainer.restore(checkpoint)
    return trainer


def _check_data(command: CommandLine) -> int:
    """Show the data that a run would take; return the exit status."""
    try:
        resumed = run_checkpoints.load(Path(command.run.resume)) if command.run.resume else None
        config = Config.from_dict(resumed["config"]) if resumed else PRESETS[command.preset]
        config = config.replace(**command.changes)
    except (ValueError, run_checkpoints.CheckpointError) as error:
        return _fail(error)
    return check_data(config.data, Path(command.run.output or f"out/{command.preset}"))


def _say(text: str) -> None:
    if distributed.rank() == 0:
        print(text, file=sys.stderr)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
