"""The one command: its names and options, records, printed tables, time limits."""

import argparse
import importlib
import json

import pytest

from benchmarks.__main__ import COMMANDS, main
from benchmarks.common import harness


def test_help_explains_each_name_in_a_line(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert any(line.split()[:1] == [name] and line.endswith(text) for line in lines), name


@pytest.mark.parametrize("name", COMMANDS)
def test_every_name_has_options(name, capsys):
    module = COMMANDS[name][0]
    if name in ("runtimes", "transformers"):  # the first in a process of its own alone
        return
    parser = argparse.ArgumentParser()
    importlib.import_module(f"benchmarks.{module}").add_arguments(parser)
    with pytest.raises(SystemExit):
        main([name, "--help"])
    out = capsys.readouterr().out
    assert out.startswith(f"usage: python -m benchmarks {name} ")


def test_a_record_says_how_and_on_what_it_was_measured():
    options = argparse.Namespace(command="python -m benchmarks some", quick=True, device="cpu")
    record = harness.make_record(options, "numpy", rows=[1])
    assert record["machine"].keys() >= {"cpu", "cores", "torch", "msda", "commit", "date", "numpy"}
    del record["machine"]
    assert record == {"command": "python -m benchmarks some", "quick": True, "rows": [1]}


def test_columns_are_as_wide_as_told_or_as_their_headings(capsys):
    table = harness.Table({"ab": -4, "c": 3, "longer": 2})
    table.add("x", 1, "2")
    assert capsys.readouterr().out == "\nab    c  longer\nx     1       2\n"


def test_results_replace_earlier_ones_whole(tmp_path):
    path = tmp_path / "new folder" / "results.json"
    harness.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        harness.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["results.json"]


def test_a_deadline_counts_down():
    assert harness.Deadline(1).allows(59)
    assert not harness.Deadline(1).allows(61)
    assert harness.Deadline(0).left() == 0
