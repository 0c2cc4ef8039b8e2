"""What the pages show runs as it stands there, names what exists, and installs what is ours."""

import importlib
import inspect
import os
import pkgutil
import pydoc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import msda

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "deformable_detr" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
NOT_RUN = re.compile(r'^```python (?!title="Not run by the tests: \w).*$', re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")

# Modules for the package's own use: what is public in them has its name elsewhere. msda.info is the
# function.
INTERNAL = {
    "checks",
    "dtypes",
    "explore",
    "forms",
    "functional",
    "info",
    "installation",
    "integrations",
    "modules",
    "ops",
    "patching",
    "testing",
    "torch-universal",
}


def documented():
    """What the API page describes, by full name."""
    page = (ROOT / "docs" / "api.md").read_text()
    # Of the module msda.info, which runs by python -m, the function takes the place.
    return re.findall(r"^::: (\S+)$", page.replace("msda.info.info", "msda.info"), re.MULTILINE)


# ---- Python --------------------------------------------------------------------------------------


def code_of(page):
    """Everything that a page shows in Python, at the line where the page has it."""
    text, lines = page.read_text(), []
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        lines += [""] * (line - len(lines)) + block.group(1).splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if BLOCK.search(page.read_text())],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    # As somebody who pastes it, in a folder of their own; the detector is imported from its own,
    # and the package is the one under test, whichever is installed.
    folders = [ROOT / "examples" / "deformable_detr", Path(msda.__file__).parents[1]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = f"exec(compile({code_of(page)!r}, {str(page)!r}, 'exec'))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


@every_page
def test_python_that_does_not_run_says_why(page):
    assert not NOT_RUN.findall(page.read_text())


def test_little_python_does_not_run():
    assert sum(page.read_text().count("```python title") for page in PAGES) <= 2


EXAMPLES = """
import doctest, pydoc, sys
import numpy as np
import torch
import msda


class Checker(doctest.OutputChecker):
    def check_output(self, want, got, flags):
        return not want or super().check_output(want, got, flags)  # what tools say on the way


failed = 0
for name in sys.argv[1:]:
    item = pydoc.locate(name)
    names = vars(sys.modules[item.__module__]) | {"np": np, "torch": torch, "msda": msda}
    for example in doctest.DocTestFinder(recurse=False).find(item, name, globs=names):
        failed += doctest.DocTestRunner(Checker()).run(example).failed
sys.exit(failed)
"""


def test_examples_of_docstrings_run(tmp_path, monkeypatch):
    pytest.importorskip("openvino")
    pytest.importorskip("onnxscript")
    pytest.importorskip("kernels")
    monkeypatch.setenv("PYTHONPATH", str(Path(msda.__file__).parents[1]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    names = [name for name in documented() if callable(pydoc.locate(name))]
    run = subprocess.run(
        [sys.executable, "-c", EXAMPLES, *names], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


# ---- what pages name -----------------------------------------------------------------------------

PYTHON = re.compile(r"^```python.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"^```.*?\n(.*?)^```$|`([^`\n]+)`", re.DOTALL | re.MULTILINE)
FOLDERS = (".ci", ".github", "benchmarks", "csrc", "docs", "examples", "msda", "tests")
SOURCES = (".cmake", ".cpp", ".cu", ".cuh", ".h", ".map", ".md", ".py", ".sass", ".toml", ".yml")
BUILT = ("msda/include", "msda/libmsda")  # in an installed package
FILES = [
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*"), *(path for name in FOLDERS for path in (ROOT / name).rglob("*"))]
]


def in_code(page):
    """What a page shows as code, of other languages than Python."""
    text = PYTHON.sub("", page.read_text())
    return [block or span for block, span in CODE.findall(text)]


def paths_named(page):
    """Words that must be paths of this repository, or ends of some."""
    words = [word for code in in_code(page) for word in re.findall(r"[\w./{},*-]+", code)]
    for word in (word.rstrip(".,") for word in words):
        is_ours = "/" in word and word.split("/")[0] in FOLDERS
        if (is_ours and not word.startswith(BUILT)) or word.endswith(SOURCES):
            yield word.rstrip("/")


def exists(word):
    """Whether a path, or the end of one, is there; with {a,b} and * as a shell has them."""
    choice = re.search(r"\{([^}]*)\}", word)
    if choice:
        parts = choice[1].split(",")
        return all(exists(word.replace(choice[0], part, 1)) for part in parts)
    end = re.compile(rf"(.*/)?{re.escape(word).replace(chr(92) + '*', '[^/]*')}")
    return any(end.fullmatch(path) for path in FILES)


@every_page
def test_paths_that_a_page_names_exist(page):
    missing = {word for word in paths_named(page) if not exists(word)}
    assert not missing


def test_a_path_that_is_not_there_is_noticed():
    for word in ("csrc/cpu/forward.cpp", "forward.cpp", "cpu/{forward,backward}.cpp", "csrc/*.h"):
        assert exists(word), word
    for word in ("csrc/forward.cpp", "orward.cpp", "cpu/{forward,sideways}.cpp", "csrc/*.cuh"):
        assert not exists(word), word


@every_page
def test_make_has_the_targets_that_a_page_names(page):
    targets = set(
        re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)[1].split()
    )
    named = {name for code in in_code(page) for name in re.findall(r"\bmake ([a-z][\w-]*)", code)}
    assert named <= targets


@every_page
def test_benchmarks_has_the_names_that_a_page_mentions(page):
    named = {
        name for code in in_code(page) for name in re.findall(r"-m benchmarks ([a-z][\w-]*)", code)
    }
    if named:
        listed = (ROOT / "benchmarks" / "__main__.py").read_text()
        assert named <= set(re.findall(r'^    "([\w-]+)": \(', listed, re.MULTILINE))


@every_page
def test_names_of_msda_that_a_page_mentions_exist(page):
    named = {
        name for code in in_code(page) for name in re.findall(r"(?<![\w./-])msda(?:\.\w+)+", code)
    }
    missing = {name for name in named if not name.endswith(SOURCES) and pydoc.locate(name) is None}
    assert not missing


@every_page
def test_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


# ---- the API reference ---------------------------------------------------------------------------


def public_names():
    """What users may import, by full name."""
    for module in [
        "msda",
        *(found.name for found in pkgutil.walk_packages(msda.__path__, "msda.")),
    ]:
        last = module.split(".")[-1]
        if last.startswith(("_", "libmsda")) or last in INTERNAL:
            continue
        contents = importlib.import_module(module)
        names = getattr(contents, "__all__", None) or [
            name
            for name, item in vars(contents).items()
            if not name.startswith("_")
            and (inspect.isclass(item) or inspect.isfunction(item))
            and item.__module__ == module
        ]
        yield from (f"{module}.{name}" for name in names if name != "__version__")
        if not names:
            yield module


def test_the_api_page_has_every_public_name():
    pytest.importorskip("openvino")
    page = (ROOT / "docs" / "api.md").read_text()
    items = [pydoc.locate(name) for name in documented()]
    missing = set()
    for name in public_names():
        item = pydoc.locate(name)
        # Of a module without options the page has whatever has a docstring.
        module = re.escape(name.rpartition(".")[0])
        is_shown = re.search(rf"^::: {module}\n$", page, re.MULTILINE) and item.__doc__
        if not is_shown and not any(item is x for x in items):
            missing.add(name)
    assert not missing


@pytest.mark.parametrize("name", documented())
def test_what_the_api_page_names_exists(name):
    assert pydoc.locate(name) is not None


# ---- what installs -------------------------------------------------------------------------------

# On the package index the name is somebody else's. A path, a file or an address may end in it.
FROM_THE_INDEX = re.compile(
    r"(?:pip|uv|pipx) .*\binstall\b.*[ '\"=]msda(?! @)(?:\[|==|[ '\"`).,;]|$)"
)


def sources():
    """All files that tell people something."""
    folders = ["msda", "docs", "examples", "benchmarks", "tests", "csrc", ".ci", ".github"]
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [path for path in ROOT.glob("*") if path.suffix in (".md", ".py", ".toml", ".txt")]
    kinds = (".md", ".py", ".toml", ".txt", ".cpp", ".h", ".cmake", ".yml", "")
    return [path for path in files if path.is_file() and path.suffix in kinds]


def test_the_search_knows_what_installs_from_the_index():
    for command in ("msda", "msda[plot]", "'msda[plot]'", "-U msda==0.1.0", "torch msda`, then"):
        assert FROM_THE_INDEX.search(f"python -m pip install {command}"), command
    for command in ("./msda", "../msda[examples]", "msda-0.1.0-py3-none-any.whl"):
        assert not FROM_THE_INDEX.search(f"pip install {command}"), command
    assert not FROM_THE_INDEX.search("pip install 'msda @ git+https://example.org/msda.git'")


def test_nothing_tells_people_to_install_the_name_from_an_index():
    for path in sources():
        if path != Path(__file__):
            for line in path.read_text().splitlines():
                assert not FROM_THE_INDEX.search(line), f"{path.relative_to(ROOT)}: {line}"
