"""What the site needs beside the pages of this folder; MkDocs calls it (see mkdocs.yml).

Some pages lie elsewhere in the repository: README.md is the front page. Links between them are
written as paths of files, so that they work where the repository is read; here they become links of
the site. A link to a file of which the site has no page becomes its text.
"""

import posixpath
import re
from pathlib import Path

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples/deformable_detr/README.md": "detector.md",
}
PICTURES = "benchmarks/results"
CODE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!\w+:|#)([^)#]+)(#[^)]*)?\)")
ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([\w.]+)`")
OURS = re.compile(ROLE.pattern.replace("~?(", "~?((?!torch)"))


def on_files(files, config):
    """Add the pages and pictures that lie outside of this folder."""
    pictures = [path.relative_to(ROOT).as_posix() for path in (ROOT / PICTURES).rglob("*.png")]
    for source, target in (PAGES | {path: path for path in pictures}).items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Point links to where the site has what they lead to."""
    source = Path(page.file.abs_src_path).relative_to(ROOT)
    parts = CODE.split(markdown)
    parts[::2] = [point_links(text, source, page.file.src_uri) for text in parts[::2]]
    return "".join(parts)


def point_links(text, source, page):
    """``text`` of the file ``source``, which is ``page`` of the site; both relative paths."""

    def point(match):
        is_picture, label, target, anchor = match.groups()
        path = posixpath.normpath((source.parent / target).as_posix())
        there = path[5:] if path.startswith("docs/") else PAGES.get(path)
        if is_picture and there is None:
            there = path
        if there is not None:
            there = posixpath.relpath(there, posixpath.dirname(page) or ".")
            return f"{is_picture}[{label}]({there}{anchor or ''})"
        return label if (ROOT / path).exists() else match[0]  # which the strict build refuses

    return LINK.sub(point, text)


class Docstrings(griffe.Extension):
    """Makes Markdown of the roles, blocks and examples in docstrings."""

    def on_instance(self, *, obj, **others):
        """Of each object that has a docstring."""
        if obj.docstring:
            text = ROLE.sub(r"`\1`", OURS.sub(r"[`\1`][\1]", obj.docstring.value))
            text = text.replace("::\n\n", ":\n\n").replace("Example:\n", "Examples:\n")
            obj.docstring.value = text
