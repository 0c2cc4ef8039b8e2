"""Write the tables of the pages from committed records, or adopt new records first.

Records come from the commands, such as ``make bench``, which writes build/bench. They are adopted
where they were measured whole and at a clean commit:

    python -m benchmarks report --adopt build/bench --machine epyc-2-cores

copies them to benchmarks/results/epyc-2-cores, draws the figures beside them and writes the pages.
With ``--check`` nothing is written, and the exit status is 1 if a page does not say what the
records say.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from benchmarks.common import harness
from benchmarks.report import cpu, figures, gpu, models, reliability, speed
from benchmarks.report.tables import Block


def memory_traffic() -> ModuleType:
    """What the tests know of the CUDA kernels' accesses."""
    return importlib.import_module("tests.cuda.memory_traffic")


def traffic(page: str) -> str:
    """What the CUDA kernels ask of memory, from the budget that the tests hold them to."""
    module = memory_traffic()
    counts = json.loads(module.BUDGET.read_text())["traffic"]
    return module.markdown_table(
        {
            name: {case: of for case, of in counts[name].items() if "fused" not in case}
            for name in ("encoder-2", "decoder-300", "rf-detr")
        }
    )


def hits(page: str) -> str:
    """How often a model of L1 holds an encoder's pixels."""
    module = memory_traffic()
    return module.markdown_hits(json.loads(module.BUDGET.read_text())["hits"])


# What stands on which page.
PAGES: dict[str, dict[str, Callable[[str], str]]] = {
    "README.md": {"speed": speed.speed, "gpu": gpu.small, "reliability": reliability.small},
    "docs/benchmarks.md": {
        "operator": Block("operator", cpu.operator),
        "dtypes": Block("operator", cpu.dtypes),
        "peers": Block("peers", cpu.peers),
        "fused": Block("fused", cpu.fused),
        "capabilities": Block("capabilities", cpu.capabilities),
        "scaling": Block(
            "scaling",
            models.scaling,
            "Time and memory of dense and deformable attention over the number of tokens",
        ),
        "detector": Block("detector", models.detector),
        "parts": Block("detector", models.parts),
        "transformers": Block("transformers", models.transformers),
        "settings": Block("settings", models.settings),
        "paper": Block("paper", models.paper),
        "convergence": Block("convergence", models.convergence, "AP over epochs and over seconds"),
        "gpu": gpu.whole,
        "reliability": reliability.whole,
    },
    "docs/runtimes.md": {"runtimes": Block("runtimes", models.runtimes)},
    "docs/cuda.md": {"hits": hits, "traffic": traffic},
}


def block(name: str, page: str = "docs/benchmarks.md") -> str:
    """What one block of a page says."""
    return PAGES[page][name](page)


def pages() -> dict[Path, str]:
    """What each page must say."""
    texts = {}
    for page, blocks in PAGES.items():
        path = harness.ROOT / page
        text = path.read_text()
        for name in blocks:
            begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
            pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
            if not pattern.search(text):
                sys.exit(f"{page} must hold {begin} and {end}, got neither or one")
            made = f"{begin}\n{block(name, page)}\n{end}"
            text = pattern.sub(lambda _, made=made: made, text)
        texts[path] = text
    return texts


# ---- adopting ------------------------------------------------------------------------------------

# Options that leave out a part of what a command measures.
SELECTING = ("workload", "direction", "dtype", "threads", "model", "only", "part", "sides", "size")


def fault(path: Path) -> str | None:
    """Why a record cannot be adopted; None where it can."""
    record = json.loads(path.read_text())
    commit = record.get("machine", {}).get("commit", "unknown")
    if commit == "unknown" or commit.endswith("-dirty"):
        return f"{path.name} must be measured at a clean commit, got {commit}"
    if "command" not in record:
        return f"{path.name} must say by which command it was measured, got none"
    if record["quick"]:
        return f"{path.name} must be measured at its real sizes, got --quick"
    words = [word.partition("=")[0] for word in shlex.split(record["command"])]
    given = [name for name in SELECTING if f"--{name}" in words]
    if given:
        return f"{path.name} must be measured whole, got --{given[0]}"
    return None


def adopt(source: Path, machine: str) -> None:
    """Copy the records of a folder, with what lies beside them, to those that are committed."""
    found = sorted(source.glob("*.json"))
    if not found:
        sys.exit(f"--adopt must be a folder with records, got none in {source}")
    faults = [reason for path in found if (reason := fault(path))]
    if faults:
        sys.exit("\n".join(faults))
    target = harness.RESULTS / machine
    target.mkdir(parents=True, exist_ok=True)
    for path in found:
        for file in (path, path.with_suffix(".csv")):
            if file.exists():
                shutil.copy(file, target)
                print(f"written: {target / file.name}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if out of date")
    parser.add_argument("--adopt", type=Path, metavar="FOLDER", help="commit these records first")
    parser.add_argument("--machine", help="adopt: the folder of benchmarks/results, by machine")
    parser.add_argument("--figures", action="store_true", help="also draw the figures anew")


def main(options: argparse.Namespace) -> int:
    """Write the pages, or compare them."""
    if bool(options.adopt) != bool(options.machine):
        sys.exit("--adopt and --machine must be given together, got one of them")
    if options.adopt:
        adopt(options.adopt, options.machine)
    if options.figures or options.adopt:
        figures.draw_all()
    texts = pages()
    out_of_date = [path for path, text in texts.items() if path.read_text() != text]
    if options.check:
        for path in out_of_date:
            print(f"{path.relative_to(harness.ROOT)} does not say what the records say")
        return int(bool(out_of_date))
    for path in out_of_date:
        path.write_text(texts[path])
    return 0
