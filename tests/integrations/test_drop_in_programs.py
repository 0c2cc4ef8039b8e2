"""`python -m msda.drop_in` runs a program with the operator in place, and what it spawns."""

import json
import multiprocessing.spawn
import pickle
import re
import subprocess
import sys

import pytest

from tests.integrations.stand_in_packages import REAL, status

SCRIPT = """
    import json
    import multiprocessing
    import sys

    import MultiScaleDeformableAttention as MSDA  # in a spawned process, too

    class Result:
        def __init__(self):
            self.name = MSDA.ms_deform_attn_forward.__module__

    if __name__ == "__main__":
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            spawned = pool.apply_async(Result).get(timeout=240).name
        print(json.dumps([sys.argv, sys.path[0], __file__, spawned, __spec__]))
        sys.exit(7)
"""


def run(*arguments, cwd):
    command = [sys.executable, "-m", "msda.drop_in", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


def test_a_script_runs_as_with_python_and_so_do_the_processes_it_spawns(write):
    folder = write({"programs/train.py": SCRIPT})
    done = run("--report", "programs/train.py", "--report", "-m", "x y", cwd=folder)
    assert done.returncode == 7, done.stderr
    assert json.loads(done.stdout) == [
        ["programs/train.py", "--report", "-m", "x y"],
        str(folder / "programs"),
        str(folder / "programs" / "train.py"),
        "msda.drop_in",
        None,
    ]
    assert done.stderr.splitlines()[0].startswith(
        "MultiScaleDeformableAttention  provided    used 0 times"
    )


@pytest.fixture
def as_main(monkeypatch):
    """What a program changes in its process is undone."""
    spawn = multiprocessing.spawn
    monkeypatch.setattr(spawn, "get_preparation_data", spawn.get_preparation_data)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    for name in ("__main__", "__mp_main__"):
        monkeypatch.setitem(sys.modules, name, sys.modules["__main__"])


@pytest.mark.parametrize("name", ["research.module", "research"])
def test_a_module_runs_as_with_python_and_keeps_its_error(drop_in, write, as_main, capsys, name):
    program = """
        import sys
        from . import __name__ as package
        import MultiScaleDeformableAttention
        print([__name__, __spec__.name, package, __file__, sys.argv])
        raise ValueError("as it came")
    """
    file = "research/module.py" if "." in name else "research/__main__.py"
    path = write({file: program}) / file
    with pytest.raises(ValueError, match="as it came") as raised:
        drop_in.main(["--overwrite", "-m", name, "--overwrite", "x"])
    assert raised.traceback[-1].path == path
    spec_name = file.removesuffix(".py").replace("/", ".")
    expected = ["__main__", spec_name, "research", str(path), [str(path), "--overwrite", "x"]]
    assert capsys.readouterr().out == f"{expected}\n"
    with pytest.raises(ModuleNotFoundError, match=r"is named 'research\.absent'"):
        drop_in.main(["-m", "research.absent"])


def test_without_a_program_it_loads_the_extensions_and_prints_the_report(drop_in, write, capsys):
    write({"detrex/_C.py": REAL, "groundingdino/_C.py": "import no_such_module"})
    assert drop_in.main([]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[1].startswith(
        "groundingdino._C               provided    used 0 times; importing"
    )
    assert "no_such_module" in printed[1]
    assert re.match(r"detrex\._C +left alone  .*_C\.py is loaded$", printed[2])


def test_a_program_that_is_not_there_is_refused(drop_in, capsys):
    for arguments, message in (
        (["nothing.py"], "the program must be a Python file, got 'nothing.py'"),
        (["-m"], "-m must be followed by the name of a module"),
        (["--replace", "x.py"], "unrecognized arguments: --replace"),
    ):
        with pytest.raises(SystemExit) as end:
            drop_in.main(arguments)
        assert end.value.code == 2
        assert message in capsys.readouterr().err


def test_spawned_processes_install_first_of_all_and_as_their_parent_did(drop_in, write, as_main):
    write({"detrex/_C.py": REAL})
    drop_in._install_in_spawned_processes(overwrite=True)
    first, *_ = multiprocessing.spawn.get_preparation_data("a process").values()
    pickle.loads(pickle.dumps(first))
    assert "MultiScaleDeformableAttention" in sys.modules
    assert status(drop_in.report())["detrex._C"] == "on import"
