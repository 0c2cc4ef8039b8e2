"""The training loop: one process or many, mixed precision, interrupted and resumed at will.

Everything that a step depends on is a function of the configuration and the step's number, or is
kept in ``Trainer.state``: order and augmentation of the images follow from (seed, epoch) and the
learning rate from the step, so that a resumed run goes on exactly as if it had not been stopped.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from detector import distributed, run_checkpoints
from detector.checkpoint_formats import load_into
from detector.config import Config, RunConfig, TrainConfig
from detector.data.loading import Batch, start_epoch
from detector.logs import Log
from detector.losses import SetCriterion, check_finite, total
from detector.model import DeformableDETR
from detector.precision import autocast, warn_if_slow


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters by learning rate: the backbone and what places sampling points learn slower.

    A backbone whose learning rate is 0 is frozen: it gets no gradients either.
    """
    points = ("sampling_offsets", "reference_points")
    groups: dict[str, list[nn.Parameter]] = {"base": [], "backbone": [], "points": []}
    for name, parameter in model.named_parameters():
        if name.startswith("backbone.0."):
            parameter.requires_grad_(parameter.requires_grad and config.lr_backbone > 0)
        if parameter.requires_grad:
            kind = "base"
            if name.startswith("backbone.0."):
                kind = "backbone"
            elif any(part in name for part in points):
                kind = "points"
            groups[kind].append(parameter)
    rates = {
        "base": config.lr,
        "backbone": config.lr_backbone,
        "points": config.lr * config.lr_points_factor,
    }
    return [
        {"name": kind, "params": group, "full_lr": rates[kind]}
        for kind, group in groups.items()
        if group
    ]


def learning_rate_factor(step: int, steps_per_epoch: int, config: TrainConfig) -> float:
    """Share of the full learning rate in this step, the first being 0."""
    if config.schedule == "step":
        factor = 0.1 ** (step // (config.lr_drop * steps_per_epoch))
    else:
        factor = 0.5 + 0.5 * math.cos(math.pi * step / (config.epochs * steps_per_epoch))
    return factor * min(1.0, (step + 1) / max(config.warmup_steps, 1))


class Trainer:
    """Trains a model, and saves ``last.pt``, ``previous.pt`` and ``best.pt`` in a folder.

    Args:
        model: with the weights to start from, on the CPU.
        loader: of the training set, see :func:`detector.data.loading.make_loader`; the set's
            ``categories`` and ``category_ids`` go into the checkpoints.
        evaluate: called with the model (or its moving average) after an epoch; gives numbers, of
            which "AP" says which epoch is best. None: nothing is evaluated.
        config: what to do.
        run: how to run it.
        folder: of checkpoints and log.
        device: to train on.
    """

    def __init__(
        self,
        model: DeformableDETR,
        loader: DataLoader[Batch],
        evaluate: Callable[[nn.Module], dict[str, Any]] | None,
        config: Config,
        run: RunConfig,
        folder: Path,
        device: torch.device,
    ) -> None:
        self.config, self.run, self.folder, self.device = config, run, folder, device
        self.loader, self.evaluate = loader, evaluate
        self.dataset: Any = loader.dataset
        self.model = model.to(device)
        self.criterion = SetCriterion(config.train)
        self.average: AveragedModel | None = None
        if config.train.ema_decay > 0:
            average = get_ema_multi_avg_fn(config.train.ema_decay)
            self.average = AveragedModel(self.model, multi_avg_fn=average).requires_grad_(False)
        groups = parameter_groups(self.model, config.train)
        self.optimizer = torch.optim.AdamW(
            groups, config.train.lr, weight_decay=config.train.weight_decay, fused=True
        )
        warn_if_slow(device, config.train.amp)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.amp == "fp16")
        if config.train.compile:
            self.model.compile()  # in place: names of parameters stay
        self.network: nn.Module = self.model
        if distributed.count() > 1:
            self.network = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                # Without auxiliary losses the heads of earlier layers have none.
                find_unused_parameters=not config.model.aux_loss,
            )
        # After the weights, which are the same everywhere: dropout is not.
        torch.manual_seed(config.train.seed + distributed.rank())
        random.seed(config.train.seed + distributed.rank())

        self.step = 0  # steps of the optimiser so far
        self.epoch = 0  # epochs finished, evaluation included
        self.best: dict[str, float] = {}
        # Spent in steps so far: by the clock, and by this process on the processor.
        self.seconds = {"training_seconds": 0.0, "processor_seconds": 0.0}
        # Batches that fill no step are left out.
        self.steps_per_epoch = len(loader) // config.train.accumulate
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"accumulate must be at most the number of batches of an epoch, {len(loader)}, "
                f"got {config.train.accumulate}"
            )
        self.log = Log(folder, config, run) if distributed.rank() == 0 else None

    def describe(self) -> str:
        """One line: what is trained on what."""
        number = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        return (
            f"{number / 1e6:.2f} M parameters, {len(self.dataset)} images, "
            f"{self.steps_per_epoch} steps per epoch, {distributed.count()} x {self.device}; "
            f"results in {self.folder}"
        )

    # ---- state -----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on; every process must ask for it together."""
        return {
            **self._weights(self.model),
            "ema": self.average.module.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": distributed.gather(run_checkpoints.random_state()),
            "epoch": self.epoch,
            "step": self.step,
            "steps_per_epoch": self.steps_per_epoch,
            "seconds": dict(self.seconds),
            "best": self.best,
        }

    def _weights(self, model: nn.Module) -> dict[str, Any]:
        """What prediction needs."""
        return {
            "model": model.state_dict(),
            "config": self.config.to_dict(),
            "categories": list(self.dataset.categories),
            "category_ids": list(self.dataset.category_ids),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; learning rates and weight decay stay those of the configuration.

        Raises:
            CheckpointError: it was written with another total batch or number of training images,
                so that there is no place in the epoch to go on from.
            ValueError: it belongs to another model.
        """
        if state["steps_per_epoch"] != self.steps_per_epoch:
            raise run_checkpoints.CheckpointError(
                "a run must be resumed with its number of training images and total batch size: "
                f"{state['steps_per_epoch']} steps per epoch, got {self.steps_per_epoch}; "
                "--weights starts anew from a checkpoint"
            )
        load_into(self.model, state["model"])
        if self.average:
            # A run that had no average starts it from its weights.
            self.average.module.load_state_dict(state["ema"] or state["model"])
            self.average.n_averaged.fill_(state["step"])
        kept = [
            {name: group[name] for name in ("full_lr", "weight_decay")}
            for group in self.optimizer.param_groups
        ]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, settings in zip(self.optimizer.param_groups, kept, strict=True):
            group.update(settings)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step, self.best = state["epoch"], state["step"], state["best"]
        self.seconds = dict(state["seconds"])
        if len(state["random"]) == distributed.count():  # else they all draw anew
            run_checkpoints.restore_random_state(state["random"][distributed.rank()])

    def save(self) -> None:
        """Write ``last.pt``; the one before it becomes ``previous.pt``."""
        state = self.state()
        self._saved_at = time.monotonic()
        if distributed.rank() == 0:
            run_checkpoints.save(
                state, self.folder / run_checkpoints.LAST, self.folder / run_checkpoints.PREVIOUS
            )

    def _save_if_possible(self) -> None:
        """As ``save``, but a full disk does not end the run: the next time may do."""
        try:
            self.save()
        except run_checkpoints.CheckpointError as error:
            tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)

    # ---- the loop --------------------------------------------------------------------------------

    def fit(self) -> str:
        """Train to the last epoch, or until time is up or a signal comes; the state is saved.

        Returns:
            Why it ended: "finished", "time", or the name of a signal.
        """
        self._started = self._saved_at = time.monotonic()
        epochs = self.config.train.epochs
        with distributed.StopSignals() as self.signals, self._progress_bar() as self.bar:
            if self.log:
                self.log.record(
                    "start",
                    self.step,
                    config=self.config.to_dict(),
                    device=str(self.device),
                    processes=distributed.count(),
                    torch=torch.__version__,
                )
            while self.epoch < epochs:
                reason = self._train_epoch()
                if reason:
                    self.save()
                    return reason
                last = self.epoch + 1 == epochs
                if self.evaluate and (last or (self.epoch + 1) % self.config.train.eval_every == 0):
                    self._save_if_possible()
                    try:
                        self._evaluate()
                    except KeyboardInterrupt:  # nothing to save: it is evaluated on resuming
                        return (self.signals.received or signal.SIGINT).name
                self.epoch += 1
                if self.epoch < epochs:
                    self._save_if_possible()
            self.save()
        return "finished"

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.train.epochs * self.steps_per_epoch,
            initial=self.step,
            unit="step",
            disable=distributed.rank() != 0,
            dynamic_ncols=True,
            mininterval=0.2 if sys.stderr.isatty() else 30,
        )

    def _train_epoch(self) -> str | None:
        """Train from wherever the epoch stands to its end, or to a reason to stop."""
        done = self.step - self.epoch * self.steps_per_epoch
        accumulate = self.config.train.accumulate
        start_epoch(self.loader, self.epoch, first_batch=done * accumulate)
        with distributed.signals_held_back():
            batches = iter(self.loader)  # starts the processes that load
        meter = _Meter()
        for _ in range(done, self.steps_per_epoch):
            started, busy = time.perf_counter(), time.process_time()
            meter.add(self._train_step(itertools.islice(batches, accumulate)))
            self.seconds["training_seconds"] += time.perf_counter() - started
            self.seconds["processor_seconds"] += time.process_time() - busy
            self._report(meter)
            reason = self._reason_to_stop()
            if reason:
                return reason
        return None

    def _train_step(self, batches: Iterable[Batch]) -> dict[str, float]:
        """One step of the optimiser; the mean of the losses over its batches, and their size."""
        config = self.config.train
        self.network.train()
        factor = learning_rate_factor(self.step, self.steps_per_epoch, config)
        for group in self.optimizer.param_groups:
            group["lr"] = group["full_lr"] * factor

        sums: dict[str, float] = defaultdict(float)
        for number, batch in enumerate(batches, start=1):
            with self._gradients_are_shared(number == config.accumulate):
                losses = self._losses(batch.to(self.device))
                # To the host at once: every copy waits for the device.
                numbers = torch.stack([loss.detach() for loss in losses.values()]).tolist()
                values = dict(zip(losses, numbers, strict=True))
                images = [self.dataset.id_of(int(target["image_id"])) for target in batch.targets]
                check_finite(values, self.step + 1, images)
                self.scaler.scale(total(losses) / config.accumulate).backward()
            for name, value in values.items():
                sums[name] += value / config.accumulate
            sums["images"] += len(images) * distributed.count()
        sums["loss"] = sum(value for name, value in sums.items() if name.startswith("loss_"))
        sums["gradient_norm"] = self._update(images)
        self.step += 1
        return sums

    def _gradients_are_shared(self, shared: bool) -> contextlib.AbstractContextManager[None]:
        """Within it, backward averages the gradients of the processes, or only sums up its own."""
        if shared or not isinstance(self.network, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.network.no_sync()

    def _losses(self, batch: Batch) -> dict[str, Tensor]:
        with autocast(self.device, self.config.train.amp):
            outputs = self.network(batch.images, batch.padding_mask)
        return self.criterion(outputs, batch.targets)

    def _update(self, images: Sequence[Any]) -> float:
        """Step the optimiser; return the norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.config.train.clip_norm or math.inf
        norm = nn.utils.clip_grad_norm_(parameters, limit).item()
        # With fp16 this happens as a matter of course; the scaler leaves the step out.
        if not self.scaler.is_enabled():
            check_finite({"gradient_norm": norm}, self.step + 1, images)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update_parameters(self.model)
        return norm

    def _reason_to_stop(self) -> str | None:
        """Why to stop after this step, if so; saves the state when it is time to."""
        now = time.monotonic()
        minutes, since_saved = (now - self._started) / 60, (now - self._saved_at) / 60
        number, time_is_up, save = distributed.largest_of(
            [
                int(self.signals.received or 0),
                int(0 < self.run.max_minutes <= minutes),
                int(since_saved >= self.run.save_minutes),
            ],
            self.device,
        )
        if number:
            return signal.Signals(number).name
        if time_is_up:
            return "time"
        if save:
            self._save_if_possible()
        return None

    def _evaluate(self) -> None:
        """Evaluate the model, or its moving average; write ``best.pt`` if it is the best so far."""
        model = self.average.module if self.average else self.model
        self.signals.at_once = True
        metrics = self.evaluate(model)
        self.signals.at_once = False
        if self.log is None:
            return
        epoch = self.epoch + 1
        self.log.record("evaluation", self.step, epoch=epoch, **self.seconds, **metrics)
        shares = [f"{name} {v:.3f}" for name, v in metrics.items() if isinstance(v, float)]
        tqdm.write(f"epoch {epoch}: {', '.join(shares)}", file=sys.stderr)
        # None: no object to be found.
        if metrics["AP"] is not None and metrics["AP"] > self.best.get("AP", -math.inf):
            self.best = {"AP": metrics["AP"], "epoch": epoch}
            try:
                weights = self._weights(model) | {"best": self.best}
                run_checkpoints.save(weights, self.folder / run_checkpoints.BEST)
            except run_checkpoints.CheckpointError as error:
                tqdm.write(f"warning: {error}; training goes on", file=sys.stderr)

    def _report(self, meter: _Meter) -> None:
        """Move the progress bar on, and log the means since the last record."""
        if self.log is None:
            return
        means = meter.means()
        shown = {"epoch": self.epoch + 1, "loss": f"{means['loss']:.3f}"}
        self.bar.set_postfix(
            shown | {"images/s": f"{means['images_per_second']:.1f}"}, refresh=False
        )
        self.bar.update()
        end_of_epoch = self.step == (self.epoch + 1) * self.steps_per_epoch
        if self.step % self.run.log_every == 0 or end_of_epoch:
            means |= {f"lr_{group['name']}": group["lr"] for group in self.optimizer.param_groups}
            means["unreadable_images"] = self.dataset.num_bad_images
            if self.device.type == "cuda":
                means["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            self.log.record("train", self.step, epoch=self.epoch + 1, **means)
            meter.reset()


class _Meter:
    """Means of what the steps report, and the images they see per second."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._steps, self._started = 0, time.perf_counter()

    def add(self, values: dict[str, float]) -> None:
        self._steps += 1
        for name, value in values.items():
            self._sums[name] += value

    def means(self) -> dict[str, float]:
        seconds = time.perf_counter() - self._started
        means = {name: value / self._steps for name, value in self._sums.items()}
        images = self._sums["images"]
        del means["images"]
        return means | {"images_per_second": images / seconds}
