"""The pages: written from records, checked against them, and how new records get there."""

import json

import pytest

from benchmarks.__main__ import main
from benchmarks.common import harness
from benchmarks.report import command as report
from benchmarks.report import cpu, reliability, speed, tables


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """Pages with markers, and no results yet."""
    (tmp_path / "docs").mkdir()
    for page, made in report.PAGES.items():
        blocks = [f"<!-- {name}:begin -->\nold\n<!-- {name}:end -->\n" for name in made]
        (tmp_path / page).write_text("between\n".join(blocks))
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(harness, "RESULTS", tmp_path / "benchmarks" / "results")
    return tmp_path


def gpu_results(folder, **changes):
    def row(direction, dtype, milliseconds):
        ours = {"cold_ms": milliseconds, "warm_ms": 0.1, "ratio": 1.0, "extra_bytes": 45_500_000}
        sides = {"msda": ours, "peer": {"ratio": 6.25}, "late": {"refused": "half"}}
        return {
            "workload": "encoder-2",
            "direction": direction,
            "dtype": dtype,
            "floor": {"over_floor": 1.5},
            "sides": sides,
        }

    machine = dict(device="Some GPU", driver="580", cuda="13.0", torch="2.11", msda="0.1.0")
    results = {
        "machine": machine | {"commit": "abc1234"},
        "command": "python -m benchmarks gpu bench",
        "quick": False,
        "ceilings": {"dram_bytes_per_second": 3.0e12},
        "rows": [row("forward", "float32", 0.1504), row("forward", "float16", 0.0041)],
    }
    harness.write_json(folder / "cuda_operator.json", results | changes)


def test_without_results_the_report_says_so_in_one_sentence(repository):
    assert main(["report", "--check"]) == 1
    assert main(["report"]) == 0
    text = (repository / "README.md").read_text()
    sentence = "No GPU figure exists yet: `make gpu` measures them."
    assert f"<!-- gpu:begin -->\n{sentence}\n<!-- gpu:end -->" in text
    assert main(["report", "--check"]) == 0


def test_the_report_writes_a_line_per_workload_and_direction(repository):
    folder = repository / "benchmarks" / "results" / "some-gpu"
    gpu_results(folder)
    tests = {"passed": 1600, "failed": 0, "skipped": 3, "not_run": []}
    machine = {"device": "Some GPU", "commit": "abc1234"}
    harness.write_json(folder / "cuda_tests.json", {"machine": machine} | tests)
    tools = {"memcheck": {"status": "clean", "errors": 0}}
    harness.write_json(folder / "cuda_sanitizer.json", {"machine": machine, "tools": tools})
    main(["report"])
    readme = (repository / "README.md").read_text()
    head = "| workload | direction | msda, ms | times the floor"
    assert f"{head} | grid_sample | extra memory, MB |" in readme
    text = (repository / "docs" / "benchmarks.md").read_text()
    assert "Some GPU, driver 580, CUDA 13.0, torch 2.11, msda 0.1.0 at abc1234" in text
    assert "`benchmarks/results/some-gpu/cuda_operator.json`" in text
    assert f"{head} | peer | extra memory, MB |" in text
    cells = "0.15 / 0.0041 | 1.5 / 1.5 | 6.2x / 6.2x | 45.5 / 45.5"
    assert f"| encoder-2 | forward | {cells} |" in text
    assert "1600 passed, 0 failed, 3 skipped." in text
    assert "memcheck clean, 0 errors." in text
    assert "between" in text
    assert main(["report", "--check"]) == 0


def test_a_trial_of_a_command_is_not_reported(repository):
    gpu_results(repository / "benchmarks" / "results" / "trial", quick=True)
    assert report.block("gpu").startswith("No GPU figure exists yet")


def test_wrong_results_of_ours_are_not_hidden(repository):
    folder = repository / "benchmarks" / "results" / "some-gpu"
    gpu_results(folder)
    results = json.loads((folder / "cuda_operator.json").read_text())
    results["rows"][1]["sides"]["msda"] = {"refused": "output must differ by at most 1, got 2"}
    harness.write_json(folder / "cuda_operator.json", results)
    text = report.block("gpu")
    assert "| encoder-2 | forward | 0.15 / - | 1.5 / - | 6.2x / - | 45.5 / - |" in text
    assert text.endswith("1 results of ours were wrong and are not shown.")


# ---- one quantity, one record --------------------------------------------------------------------


def test_times_of_the_operator_are_shown_from_its_own_record_alone():
    peers = dict(tables.records("peers"))
    assert peers, "the committed ones"
    for record in peers.values():
        assert {"msda", "grid_sample"} & set(record["rows"][0]["sides"])
        columns = cpu.peers(record)[1].columns
        assert not {"msda", "grid_sample", "torch.compile"} & set(columns)


def test_the_tables_of_the_readme_are_small():
    for name in ("speed", "gpu", "reliability"):
        lines = report.block(name, "README.md").split("\n")
        assert all(line.count("|") <= 7 for line in lines), name
    assert speed.speed("README.md").count("| encoder, forward |") == 1
    assert reliability.small("README.md").count("\n") <= 6


# ---- adopting ------------------------------------------------------------------------------------


@pytest.fixture
def measured(tmp_path):
    """A folder with a record that may be adopted; writes it with changes."""

    def write(commit="abc1234", **changes):
        record = {
            "machine": {"commit": commit, "cpu": "a", "cpu_capability": "avx2", "cores": 2}
            | {"torch": "2", "msda": "0"},
            "command": "python -m benchmarks capabilities --output build/bench/capabilities.json",
            "quick": False,
            "workload": "encoder",
            "rows": [{"direction": "forward", "capability": "avx2", "speed": 1.0}],
        }
        harness.write_json(tmp_path / "bench" / "capabilities.json", record | changes)
        return str(tmp_path / "bench")

    return write


def test_new_records_become_committed_ones_and_are_in_the_pages(repository, measured):
    main(["report"])
    assert main(["report", "--adopt", measured(), "--machine", "some-cpu"]) == 0
    copied = repository / "benchmarks" / "results" / "some-cpu" / "capabilities.json"
    assert json.loads(copied.read_text())["workload"] == "encoder"
    page = (repository / "docs" / "benchmarks.md").read_text()
    assert "msda 0 at abc1234 (`benchmarks/results/some-cpu/capabilities.json`):" in page
    assert main(["report", "--check"]) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(commit="abc1234-dirty"), "measured at a clean commit, got abc1234-dirty"),
        (dict(commit="unknown"), "measured at a clean commit, got unknown"),
        (dict(quick=True), "measured at its real sizes, got --quick"),
        (dict(command="python -m benchmarks fused --threads=1"), "measured whole, got --threads"),
    ],
)
def test_a_record_is_refused_that_is_not_whole_or_of_no_commit(
    repository, measured, changes, message
):
    with pytest.raises(SystemExit, match=rf"^capabilities.json must be {message}$"):
        main(["report", "--adopt", measured(**changes), "--machine", "some-cpu"])
    assert not (repository / "benchmarks").exists(), "nothing is copied"


def test_a_folder_without_records_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"^--adopt must be a folder with records, got none in "):
        main(["report", "--adopt", str(tmp_path), "--machine", "some-cpu"])
    with pytest.raises(SystemExit, match=r"^--adopt and --machine must be given together"):
        main(["report", "--adopt", str(tmp_path)])
