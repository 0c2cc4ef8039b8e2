"""The comparison of convergence: runs, tuning, thresholds, interruption, tables and picture."""

import csv
import json
from types import SimpleNamespace

import pytest

from benchmarks.__main__ import main
from benchmarks.common import harness
from benchmarks.models import convergence as bench
from benchmarks.report import command as report
from benchmarks.report import figures

APS = {  # AP after each epoch, by arm and learning rate
    "deformable": {2e-4: 0.02, 5e-4: 0.04, 1e-3: 0.03},
    "deformable + refinement": {2e-4: 0.02, 5e-4: 0.03, 1e-3: 0.05},
    "dense": {2e-4: 0.006, 5e-4: 0.007, 1e-3: 0.0},
    "dense + reference points": {2e-4: 0.012, 5e-4: 0.011, 1e-3: 0.0},
}


@pytest.fixture
def command(monkeypatch, tmp_path):
    """Run the command with a stand-in for training, which adds epochs to the log of a run."""
    started = []

    def run(call, **streams):
        started.append(call)
        training = state["training"](call)
        folder = training.folder(tmp_path / "runs")
        gain = APS[training.arm][training.lr] * (1 + 0.1 * training.seed)
        done = [point["epoch"] for point in training.curve(tmp_path / "runs")]
        epochs = int(call[call.index("--epochs") + 1])
        with open(folder / "log.jsonl", "a") as log:
            for epoch in range(len(done) + 1, epochs + 1):
                point = {"event": "evaluation", "epoch": epoch, "AP": gain * epoch, "AP50": 0.5}
                point |= {"training_seconds": 20.0 * epoch, "processor_seconds": 10.0 * epoch}
                log.write(json.dumps(point) + "\n")
        (folder / "last.pt").touch()
        assert ("--resume" in call) == bool(done)
        return type("Done", (), {"returncode": state["status"]})

    def training_of(call):
        folder = next(part for part in call if "-seed" in part).removesuffix("/last.pt")
        for arm in bench.ARMS:
            for lr in bench.LEARNING_RATES:
                for seed in (0, 1, 2):
                    one = bench.Training(arm, lr, seed, 0)
                    if folder.endswith("/" + one.folder(tmp_path).name):
                        return one
        raise AssertionError(f"no run has this folder: {folder}")

    experiment = bench.Experiment(
        "shapes-easy",
        {"deformable": 4, "dense": 14},
        dict(zip(bench.ARMS, (12, 12, 26, 26), strict=True)),
    )
    monkeypatch.setitem(bench.EXPERIMENTS, "cpu", experiment)
    state = {"training": training_of, "status": 0, "started": started}
    monkeypatch.setattr(bench, "subprocess", SimpleNamespace(run=run))

    def convergence(*arguments):
        output = tmp_path / "some-cpu" / "convergence.json"
        where = [f"--runs={tmp_path / 'runs'}", f"--output={output}"]
        return main(["convergence", *where, "--jobs=1", *arguments])

    convergence.state = state
    return convergence


def test_each_arm_trains_all_seeds_with_its_best_learning_rate(command, tmp_path, capsys):
    assert command() == 0
    results = json.loads((tmp_path / "some-cpu" / "convergence.json").read_text())
    rates = {name: arm["lr"] for name, arm in results["arms"].items()}
    assert rates == {
        "deformable": 5e-4,
        "deformable + refinement": 1e-3,
        "dense": 5e-4,
        "dense + reference points": 2e-4,
    }
    epochs = bench.EXPERIMENTS["cpu"].epochs
    for name, arm in results["arms"].items():
        assert [run["seed"] for run in arm["runs"]] == [0, 1, 2]
        assert all(len(run["curve"]) == epochs[name] for run in arm["runs"])
        assert len(arm["tuning_runs"]) == 2

    entry = results["arms"]["deformable"]["thresholds"]["0.1"]
    # The seeds gain 0.04, 0.044 and 0.048 an epoch.
    assert entry["epochs"]["median"] == pytest.approx(0.1 / 0.044)
    assert entry["epochs"]["max"] == pytest.approx(2.5)
    assert entry["seconds"]["min"] == pytest.approx(10 * 0.1 / 0.048)
    assert results["arms"]["deformable"]["thresholds"]["0.3"]["reached"] == 3
    dense = results["arms"]["dense"]["thresholds"]
    # 26 epochs of 0.007, 0.0077 and 0.0084.
    assert [one["reached"] for one in dense.values()] == [3, 3, 2, 0]
    assert dense["0.2"]["epochs"] is dense["0.3"]["epochs"] is None
    assert "deformable 0.0005 1.1 (1.0-1.2)" in " ".join(capsys.readouterr().out.split())

    rows = list(csv.DictReader((tmp_path / "some-cpu" / "convergence.csv").open()))
    every = [run for arm in results["arms"].values() for run in arm["runs"] + arm["tuning_runs"]]
    assert len(rows) == sum(len(run["curve"]) for run in every)


def test_runs_are_gone_on_with_and_finished_ones_left_alone(command):
    command()
    started = command.state["started"]
    resumed = [call for call in started if "--resume" in call]
    assert len(started) == len(bench.ARMS) * (3 + 3)
    assert len(resumed) == len(bench.ARMS), "the run that won the tuning becomes the first seed"
    started.clear()
    assert command() == 0
    assert started == []


def test_without_time_nothing_is_started_and_the_status_says_so(command, capsys):
    assert command("--max-minutes=0.01") == 3
    assert command.state["started"] == []
    assert "the same command goes on with them" in capsys.readouterr().out


def test_a_run_that_fails_ends_the_command_and_is_named(command, capsys):
    command.state["status"] = 1
    assert command() == 1
    assert "ended with status 1: see" in capsys.readouterr().err


def test_curves_differ_in_attention_alone(command):
    command("--quick")
    by_arm = {}
    for call in command.state["started"]:
        if "--preset" in call:
            training = command.state["training"](call)
            varied = ("--lr", "--lr-backbone", "--seed", "--output", "--epochs")
            ignored = {call.index(option) + 1 for option in varied}
            by_arm.setdefault(training.arm, set()).add(
                tuple(part for place, part in enumerate(call) if place not in ignored)
            )
    assert by_arm.keys() == bench.ARMS.keys()
    base = {arm: set(calls.pop()) - set(bench.ARMS[arm]) for arm, calls in by_arm.items()}
    assert all(not calls for calls in by_arm.values()), "one form of call for an arm"
    assert len({frozenset(parts) for parts in base.values()}) == 1


def point(epoch, ap):
    return {"epoch": epoch, "AP": ap, "seconds": 3.0 * epoch}


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.1, 0.5), (0.2, 1.0), (0.3, 2.5), (0.45, None)]
)
def test_thresholds_are_passed_between_epochs(threshold, expected):
    # AP falls once: what counts is when it first gets there.
    curve = [point(1, 0.2), point(2, 0.15), point(3, 0.45 - 1e-9), point(4, 0.3)]
    found = bench.passes(curve, threshold, "epoch")
    assert found == (None if expected is None else pytest.approx(expected))
    if expected is not None:
        assert bench.passes(curve, threshold, "seconds") == pytest.approx(3 * expected)


def test_report_and_picture_show_what_came(command, monkeypatch, tmp_path):
    command()
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    text = report.block("convergence")
    assert "| deformable | 0.0005 | 1.1, 1.0 to 1.2 (11, 10 to 12 s) |" in text
    assert "(`some-cpu/convergence.json`):" in text
    assert "| 2 of 3 seeds | not reached |" in text
    figures.draw_all()
    picture = tmp_path / "some-cpu" / "convergence.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "some-cpu" / "convergence.json").read_text())
    harness.write_json(tmp_path / "other" / "convergence.json", results)
    text = report.block("convergence")
    assert text.count("learning rate |") == 2
    assert "(../some-cpu/convergence.png)" in text
