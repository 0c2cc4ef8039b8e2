"""Train the detector with deformable and with dense attention, and count epochs to fixed APs.

Four arms of one detector: deformable attention; the same with iterative refinement of boxes; dense
attention as in DETR (contents of queries start at zero, boxes are absolute); dense attention with
the boxes of the deformable model, relative to reference points. The rest is the same: backbone,
width, layers, tokens of all levels, losses, matcher, optimiser, images and their order. The dense
arms are thus stronger than DETR, whose encoder sees the coarsest map alone.

First every arm is trained for some epochs with each learning rate of ``LEARNING_RATES``, and keeps
the one with the highest AP; larger experiments may take over the rates that a smaller one chose.
With that, each seed is trained to the arm's last epoch. Learning rates
are constant after the warm-up, so that no curve depends on how long its run was meant to be. AP is
that of the validation images; where a curve passes a threshold is interpolated between epochs.

Runs are those of ``examples/deformable_detr/train.py``, several side by side, each on one thread.
An interrupted one, by Ctrl-C or ``--max-minutes``, goes on where it was when the command is given
again. Seconds are the processor's, in steps of training alone, on a GPU the clock's. Writes
convergence.json and convergence.csv; ``plots.py`` draws them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import harness

TRAIN = harness.DETECTOR / "train.py"

ARMS = {
    "deformable": ["--no-box-refine"],
    "deformable + refinement": ["--box-refine"],
    "dense": ["--attention", "dense", "--no-box-refine", "--no-reference-boxes"],
    "dense + reference points": ["--attention", "dense", "--no-box-refine"],
}
LEARNING_RATES = (2e-4, 5e-4, 1e-3)
THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
UNTIL_STOPPED = 0.25  # minutes that a run needs to end a step and save, after its time is up


@dataclass(frozen=True)
class Experiment:
    """One size of the comparison."""

    preset: str  # of the detector
    tuning_epochs: dict[str, int]  # by kind of attention
    epochs: dict[str, int]  # by arm
    seeds: Sequence[int] = (0, 1, 2)  # the first one is that of tuning
    rates: dict[str, float] | None = None  # by arm, instead of tuning


EXPERIMENTS = {
    # An hour on two cores.
    "cpu": Experiment(
        "shapes-easy",
        tuning_epochs={"deformable": 4, "dense": 14},
        epochs=dict(zip(ARMS, (8, 6, 40, 30), strict=True)),
    ),
    # An hour on one core: more and smaller objects, with the rates that "cpu" chose.
    "cpu-hard": Experiment(
        "shapes-hard",
        tuning_epochs={},
        epochs=dict(zip(ARMS, (12, 12, 30, 30), strict=True)),
        seeds=(0,),
        rates=dict(zip(ARMS, (1e-3, 1e-3, 5e-4, 5e-4), strict=True)),
    ),
    "gpu-hard": Experiment(
        "shapes-gpu-hard",
        tuning_epochs={"deformable": 8, "dense": 40},
        epochs=dict(zip(ARMS, (40, 40, 120, 120), strict=True)),
    ),
    # Minutes: to try the command, not to report.
    "trial": Experiment(
        "shapes-easy",
        tuning_epochs={"deformable": 1, "dense": 1},
        epochs=dict.fromkeys(ARMS, 2),
    ),
}


def kind(arm: str) -> str:
    """The attention of an arm."""
    return arm.split(" ")[0]


# ---- runs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """One training run, to be brought to so many epochs."""

    arm: str
    lr: float
    seed: int
    epochs: int

    def folder(self, root: Path) -> Path:
        """Where it is kept, however many epochs are asked for."""
        return root / f"{self.arm.replace(' ', '')}-lr{self.lr:g}-seed{self.seed}"

    def curve(self, root: Path) -> list[dict[str, float]]:
        """Epoch, seconds, AP and AP50 of each evaluation so far."""
        log = self.folder(root) / "log.jsonl"
        records = (
            [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        )
        # An epoch may be evaluated anew after a kill: what comes last counts.
        by_epoch = {one["epoch"]: one for one in records if one["event"] == "evaluation"}
        names = ("epoch", "training_seconds", "processor_seconds", "AP", "AP50")
        return [{name: by_epoch[epoch][name] for name in names} for epoch in sorted(by_epoch)]

    def finished(self, root: Path) -> bool:
        """Whether it was evaluated after its last epoch."""
        curve = self.curve(root)
        return bool(curve) and curve[-1]["epoch"] >= self.epochs

    def command(self, root: Path, experiment: Experiment, device: str) -> list[str]:
        """What starts it, or goes on with it."""
        folder = self.folder(root)
        last = folder / "last.pt"
        if last.exists():
            which = ["--resume", str(last)]
        else:
            rate = str(self.lr)
            which = ["--preset", experiment.preset, "--output", str(folder), *ARMS[self.arm]]
            which += ["--lr", rate, "--lr-backbone", rate, "--seed", str(self.seed)]
            which += ["--schedule", "step", "--lr-drop", "1000000"]
        return [
            *(sys.executable, str(TRAIN), *which, "--epochs", str(self.epochs)),
            *("--device", device),
        ]


class RunError(Exception):
    """A training run ended with an error."""


def train(
    training: Training, root: Path, experiment: Experiment, device: str, deadline: harness.Deadline
) -> None:
    """Bring one run to its last epoch, or as far as the time allows."""
    minutes = deadline.left() / 60 - UNTIL_STOPPED
    if training.finished(root) or minutes <= 0:
        return
    folder = training.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    command = training.command(root, experiment, device)
    if deadline.end < float("inf"):
        command += ["--max-minutes", f"{minutes:.2f}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(folder / "output.txt", "a") as output:
        status = subprocess.run(command, stdout=output, stderr=output, env=environment).returncode
    if status:
        raise RunError(f"{folder.name} ended with status {status}: see {folder / 'output.txt'}")
    curve = training.curve(root)
    if curve:
        print(
            f"{training.arm:<25} lr {training.lr:<6g} seed {training.seed}  "
            f"epoch {curve[-1]['epoch']:>3}  AP {curve[-1]['AP']:.3f}",
            flush=True,
        )


def train_all(
    trainings: Sequence[Training],
    root: Path,
    experiment: Experiment,
    device: str,
    jobs: int,
    deadline: harness.Deadline,
) -> bool:
    """Bring all runs to their ends, the longest first; whether the time was enough."""
    queue = sorted(trainings, key=lambda one: -one.epochs)
    with ThreadPoolExecutor(jobs) as pool:
        pending = [pool.submit(train, one, root, experiment, device, deadline) for one in queue]
        try:
            for one in pending:
                one.result()
        except BaseException:  # Ctrl-C reaches the runs as well; they save and end
            pool.shutdown(cancel_futures=True)
            raise
    return all(one.finished(root) for one in trainings)


# ---- what came -----------------------------------------------------------------------------------


def passes(curve: Sequence[dict[str, float]], threshold: float, axis: str) -> float | None:
    """Where on ``axis`` AP first reaches a threshold, linear between evaluations; or None."""
    before = {"AP": 0.0, axis: 0.0}
    for point in curve:
        if point["AP"] >= threshold:
            share = (threshold - before["AP"]) / (point["AP"] - before["AP"])
            return before[axis] + share * (point[axis] - before[axis])
        before = point
    return None


def best_rate(tuning: Sequence[Training], root: Path) -> tuple[float, dict[str, float]]:
    """The learning rate with the highest AP after the epochs of tuning, and the AP of each."""
    reached = {}
    for one in tuning:
        curve = one.curve(root)
        reached[one.lr] = next(point["AP"] for point in curve if point["epoch"] == one.epochs)
    best = max(reached, key=lambda lr: reached[lr])
    return best, {f"{lr:g}": ap for lr, ap in reached.items()}


def spread(values: Iterable[float | None]) -> dict[str, float] | None:
    """Median, least and most of what the seeds gave; None where one of them never came so far."""
    values = list(values)
    if not values or None in values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summarise(arm: str, runs: Sequence[dict[str, Any]], axis: str) -> dict[str, Any]:
    """Epochs and seconds to each threshold over the seeds."""
    summary = {}
    for threshold in THRESHOLDS:
        by_epoch = [passes(run["curve"], threshold, "epoch") for run in runs]
        by_second = [passes(run["curve"], threshold, axis) for run in runs]
        summary[f"{threshold:g}"] = {
            "epochs": spread(by_epoch),
            "seconds": spread(by_second),
            "reached": sum(value is not None for value in by_epoch),
        }
    return summary


def describe(trainings: Iterable[Training], root: Path) -> Iterator[dict[str, Any]]:
    for one in trainings:  # which may have been trained for longer before
        curve = [point for point in one.curve(root) if point["epoch"] <= one.epochs]
        yield {"seed": one.seed, "curve": curve}


def write_csv(path: Path, results: dict[str, Any]) -> None:
    """Every point of every curve, tuning included."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arm", "lr", "seed", "epoch", "seconds", "AP", "AP50"])
        for name, arm in results["arms"].items():
            for run in [*arm["runs"], *arm["tuning_runs"]]:
                for point in run["curve"]:
                    seconds = f"{point[results['seconds']]:.1f}"
                    shares = [f"{point[key]:.4f}" for key in ("AP", "AP50")]
                    lr = run.get("lr", arm["lr"])
                    writer.writerow(
                        [name, f"{lr:g}", run["seed"], point["epoch"], seconds, *shares]
                    )


def print_summary(results: dict[str, Any]) -> None:
    seeds = len(results["experiment"]["seeds"])
    for what, digits in (("epochs", 1), ("seconds", 0)):
        print(f"\n{what} to a validation AP: median (least to most) of {seeds} seeds", end="")
        columns = {"": -26, "lr": 8}
        table = harness.Table(columns | {f"AP {threshold:g}": 18 for threshold in THRESHOLDS})
        for name, arm in results["arms"].items():
            reached = arm["thresholds"].values()
            table.add(
                name, f"{arm['lr']:g}", *(reading(one, what, digits, seeds) for one in reached)
            )


def reading(entry: dict[str, Any], what: str, digits: int, seeds: int) -> str:
    """One threshold of one arm in a table."""
    if entry[what] is None:
        return f"{entry['reached']} of {seeds} seeds" if entry["reached"] else "not reached"
    middle, least, most = (f"{entry[what][key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{middle} ({least}-{most})"


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    harness.add_record(parser)
    parser.add_argument("--preset", choices=EXPERIMENTS, default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--runs", type=Path, help="folder of the runs (default: out/convergence/PRESET)"
    )
    parser.add_argument(
        "--jobs", type=int, default=0, help="runs side by side (default: one a core; on a GPU 1)"
    )
    parser.add_argument("--device", default="cpu", help="(default: cpu)")
    parser.add_argument(
        "--max-minutes", type=float, default=0, help="stop after so long; 0: no limit"
    )


def main(options: argparse.Namespace) -> int:
    """Run what is missing, then write what came; 3 where the time was not enough."""
    preset = "trial" if options.quick else options.preset
    experiment = EXPERIMENTS[preset]
    root = options.runs or harness.ROOT / "out" / "convergence" / preset
    on_gpu = options.device.startswith("cuda")
    jobs = options.jobs or (1 if on_gpu else harness.all_cores())
    deadline = harness.Deadline(options.max_minutes or float("inf"))
    axis = "training_seconds" if on_gpu else "processor_seconds"
    started = time.monotonic()

    def bring(trainings: Iterable[Training]) -> bool:
        return train_all(list(trainings), root, experiment, options.device, jobs, deadline)

    try:
        tuning = tuning_of(experiment)
        if not bring(one for arm in tuning.values() for one in arm):
            return unfinished(root)
        rates = rates_of(experiment, tuning, root)
        final = {
            arm: [
                Training(arm, rates[arm][0], seed, experiment.epochs[arm])
                for seed in experiment.seeds
            ]
            for arm in ARMS
        }
        if not bring(one for arm in final.values() for one in arm):
            return unfinished(root)
    except KeyboardInterrupt:
        print()
        return unfinished(root)
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    arms = {}
    for arm in ARMS:
        runs = list(describe(final[arm], root))
        others = [one for one in tuning[arm] if one.lr != rates[arm][0]]
        arms[arm] = {
            "lr": rates[arm][0],
            "tuning": rates[arm][1],
            "runs": runs,
            "tuning_runs": [
                {"lr": one.lr, **described}
                for one, described in zip(others, describe(others, root), strict=True)
            ],
            "thresholds": summarise(arm, runs, axis),
        }
    last = [run["curve"][-1] for arm in arms.values() for run in arm["runs"] + arm["tuning_runs"]]
    record = harness.make_record(
        options,
        preset=preset,
        experiment=asdict(experiment),
        thresholds=list(THRESHOLDS),
        seconds=axis,
        total_seconds=sum(point[axis] for point in last),
        arms=arms,
    )
    print_summary(record)
    print(
        f"\n{len(last)} runs took {record['total_seconds'] / 60:.0f} minutes of training in all, "
        f"{jobs} side by side; this command {(time.monotonic() - started) / 60:.0f} minutes."
    )
    harness.keep_record(options, record)
    if options.output:
        write_csv(options.output.with_suffix(".csv"), record)
    return 0


def tuning_of(experiment: Experiment) -> dict[str, list[Training]]:
    """By arm, a run with each learning rate; none where the rates are given."""
    if experiment.rates is not None:
        return {arm: [] for arm in ARMS}
    seed, epochs = experiment.seeds[0], experiment.tuning_epochs
    return {
        arm: [Training(arm, lr, seed, epochs[kind(arm)]) for lr in LEARNING_RATES] for arm in ARMS
    }


def rates_of(
    experiment: Experiment, tuning: dict[str, list[Training]], root: Path
) -> dict[str, tuple[float, dict[str, float]]]:
    """By arm its learning rate, and what each that was tried came to."""
    if experiment.rates is not None:
        return {arm: (lr, {}) for arm, lr in experiment.rates.items()}
    return {arm: best_rate(tuning[arm], root) for arm in ARMS}


def unfinished(root: Path) -> int:
    print(f"Not finished. The runs are kept in {root}: the same command goes on with them.")
    return 3
