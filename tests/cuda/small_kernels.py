"""Machine code of the small kernels of sass/rounds.cu, and of others written by hand."""

from pathlib import Path

from tests.cuda.machine_code.kernel import Kernel
from tests.cuda.machine_code.listing import Flow, read_listing
from tests.cuda.machine_code.tools import demangle, read_resources

SASS = Path(__file__).parent / "sass"
KINDS = ("plain", "rolled", "switch", "add", "shuffle", "spill")


def read_kernels(arch, edit=lambda text: text):
    """The small kernels of one architecture by kind, read from their listing after an edit."""
    text = edit((SASS / f"rounds.{arch}.sass").read_text())
    listings = read_listing(text)
    resources = read_resources(text)
    names = demangle(listings)
    return {
        names[symbol].rpartition(" ")[2].rstrip(">"): Kernel(
            names[symbol], arch, *resources[symbol], listings[symbol]
        )
        for symbol in listings
    }


def listing(body):
    """A listing of one kernel from lines of instructions and labels."""
    lines = ['\t.section\t.text.kernel,"ax",@progbits', "kernel:"]
    address = 0
    for line in body.strip().splitlines():
        if line.strip().endswith(":"):
            lines.append(line.strip())
        else:
            lines.append(f"        /*{address:04x}*/  {line.strip()} ;")
            address += 16
    return read_listing("\n".join(lines))["kernel"]


def loops(body):
    """For each loop: the indices of its first instruction and of all, smallest loop first."""
    return [(loop.head, sorted(loop.instructions)) for loop in Flow(listing(body)).loops()]
