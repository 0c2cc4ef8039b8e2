"""What a run leaves to read: JSON lines, and TensorBoard or Weights & Biases on demand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tqdm import tqdm

from detector.config import Config, RunConfig


class Log:
    """Writes records to ``log.jsonl`` in a folder, one JSON object per line, after what is there.

    Args:
        folder: of the run.
        config: logged with the runs of Weights & Biases.
        run: says which other logs are wanted.

    Raises:
        ModuleNotFoundError: a log is wanted whose package is not installed.
    """

    def __init__(self, folder: Path, config: Config, run: RunConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self._writers = []
        if run.tensorboard:
            self._writers.append(_tensorboard(folder))
        if run.wandb:
            self._writers.append(_wandb(folder, config))

    def record(self, event: str, step: int, **values: Any) -> None:
        """Write one record; numbers go to the other logs, under ``event/name``."""
        values = {name: None if value != value else value for name, value in values.items()}
        line = json.dumps({"event": event, "step": step, **values})
        try:
            with open(self.path, "a") as file:
                file.write(line + "\n")
        except OSError as error:
            # A full disk is no reason to stop training: what is lost can be seen on the screen.
            tqdm.write(f"{self.path} could not be written ({error}); lost: {line}")
        numbers = {
            f"{event}/{name}": value
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for write in self._writers:
            write(numbers, step)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ModuleNotFoundError(
            "--tensorboard needs a package: pip install tensorboard"
        ) from error
    writer = SummaryWriter(str(folder))

    def write(numbers: dict[str, float], step: int) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)
        writer.flush()

    return write


def _wandb(folder: Path, config: Config) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ModuleNotFoundError("--wandb needs a package: pip install wandb") from error
    # The same name on resuming: the curves go on in the same run.
    name = folder.resolve().name
    run = wandb.init(dir=folder, name=name, config=config.to_dict())
    return run.log
