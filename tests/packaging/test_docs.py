"""What the README and the pages of docs show runs as it stands there, and installs what is ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import msda

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "examples" / "deformable_detr" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = ("benchmarks", "compatibility", "cuda", "releasing")
WITHOUT_CODE = [ROOT / "docs" / f"{name}.md" for name in NAMES]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def code_of(page):
    """Everything that a page shows in Python, at the line where the page has it."""
    text, lines = page.read_text(), []
    for block in BLOCK.finditer(text):
        line = text[: block.start(1)].count("\n")
        lines += [""] * (line - len(lines)) + block.group(1).splitlines()
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page not in WITHOUT_CODE],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch):
    code = code_of(page)
    assert code, "a page shows how to use what it is about"
    # As somebody who pastes it, in a folder of their own; the detector is imported from its own,
    # and the package is the one under test, whichever is installed.
    folders = [ROOT / "examples" / "deformable_detr", Path(msda.__file__).parents[1]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, folders)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    program = f"exec(compile({code!r}, {str(page)!r}, 'exec'))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page):
    for target in LINK.findall(page.read_text()):
        assert (page.parent / target).exists(), target


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
