"""Measure msda, and write what was measured into the pages."""

from __future__ import annotations

import argparse
import sys

from benchmarks.common import harness

# By name: the module, and what it does.
COMMANDS = {
    "operator": ("cpu.operator", "the operator on a CPU against the grid_sample core"),
    "fused": ("cpu.fused", "the fused form against the unfused one; the cost of a call"),
    "capabilities": ("cpu.capabilities", "a CPU's instruction sets against each other"),
    "peers": ("cpu.peers", "other implementations on a CPU"),
    "scaling": ("models.scaling", "deformable against dense attention over growing images"),
    "detector": ("models.detector", "the detector of examples/ on our operator and the reference"),
    "transformers": ("models.transformers", "models of transformers before and after use_msda"),
    "runtimes": ("models.runtimes", "OpenVINO and ONNX Runtime before and after our node"),
    "settings": ("models.settings", "precision, huge pages and waiting threads in programs"),
    "paper": ("models.paper", "parameters, multiply-adds and speed of the published models"),
    "convergence": ("models.convergence", "training with deformable and with dense attention"),
    "gpu": ("gpu.command", "everything on a CUDA device: build, test, bench, micro, orders, ..."),
    "build-peer": ("gpu.build_peer", "compile a peer's CUDA sources"),
    "check": ("cpu.check", "fail where a ratio is lower than the committed one"),
    "report": ("report.command", "write the pages from committed records, or adopt new ones"),
}


def main(arguments: list[str]) -> int:
    """Run the command that is named first."""
    lines = (f"  {name:<14}{line}" for name, (_, line) in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="NAME is one of:\n" + "\n".join(lines) + "\n\nNAME --help: its options.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=COMMANDS, metavar="NAME")
    name = parser.parse_args(arguments[:1]).name
    return harness.run(name, f"benchmarks.{COMMANDS[name][0]}", arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
