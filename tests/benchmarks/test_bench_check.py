"""The guard over ratios: verdicts, attempts, and what is committed."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.common.harness import write_json
from benchmarks.cpu import check as bench_check


@pytest.fixture
def check(monkeypatch, tmp_path, set_threads):
    """Run the guard on ratios that are made up; ``measured`` gives those of each attempt."""
    set_threads(1)
    measured = {"fast": [10.0], "slow": [1.0]}
    monkeypatch.setattr(bench_check, "COMMITTED", tmp_path / "check.json")
    monkeypatch.setattr(bench_check, "PAIRS", {name: lambda name=name: name for name in measured})
    attempts = {name: iter(()) for name in measured}

    def measure(name, budget):
        return next(attempts[name])

    monkeypatch.setattr(bench_check, "measure", measure)

    def run(*arguments):
        attempts.update({name: iter(ratios) for name, ratios in measured.items()})
        return main(["check", *arguments])

    run.measured, run.path = measured, tmp_path / "check.json"
    return run


def test_guard_fails_where_a_ratio_is_lower_in_every_attempt(check, capsys):
    assert check() == 0, "nothing to hold it against"
    assert "measured, not judged" in capsys.readouterr().out
    assert check("--write") == 0
    assert check() == 0
    check.measured["fast"] = [5.9, 5.0, 6.1]  # at least 6.0, in one of three attempts
    assert check() == 0
    check.measured["fast"] = [5.9, 5.0, 5.9]
    assert check() == 1
    out = capsys.readouterr().out
    assert "1 of 2 ratios must be at least 60% of the committed one" in out
    assert "WORSE" in out
    check.measured["fast"] = [7.9, 7.9, 7.9]
    assert check("--thorough") == 1, "with half the margin"


def test_guard_keeps_the_ratios_of_other_instruction_sets(check):
    write_json(check.path, {"sse9": {"machine": {}, "ratios": {"fast": 3.0}}})
    check("--write")
    written = json.loads(check.path.read_text())
    assert written["sse9"]["ratios"] == {"fast": 3.0}
    (other,) = written.keys() - {"sse9"}
    assert written[other]["ratios"] == {"fast": 10.0, "slow": 1.0}


def test_committed_ratios_are_of_the_pairs_there_are():
    committed = json.loads(bench_check.COMMITTED.read_text())
    for entry in committed.values():
        assert entry["ratios"].keys() == bench_check.PAIRS.keys()
        assert all(ratio > 0 for ratio in entry["ratios"].values())


def test_a_slower_call_lowers_its_ratio(monkeypatch, set_threads):
    set_threads(1)
    monkeypatch.setattr(bench_check, "SHAPES", [(12, 20), (6, 10)])
    pair = bench_check.PAIRS["encoder, forward"]()
    ratio = bench_check.measure(pair, 0.3)

    def slower():
        for _ in range(3):  # a ratio of a third, whatever disturbs the clock
            pair.baseline()
        return pair.ours()

    worse = bench_check.measure(bench_check.Pair(slower, pair.baseline), 0.3)
    assert worse < 1 < ratio
