"""Train the detector on handwritten digits pasted on photographs, evaluate it and draw its work.

    python demo.py

Takes some minutes on two CPU cores; interrupted, it goes on where it was. Writes checkpoints,
``log.jsonl``, ``evaluation.json`` and ``predictions.png``: true boxes, found boxes, and where the
last decoder layer looks, as in figure 6 of the paper. The exit status is 1 if AP50 ends below what
the demo is held to.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import evaluate
import train

from detector.checkpoint_formats import load_model
from detector.data import build_dataset
from detector.drawing import picture_sheet

REQUIRED_AP50 = 0.60
NUM_PICTURES = 8


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, evaluate, draw; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("out/demo"), help="folder")
    folder = parser.parse_args(arguments).output

    begun = folder / "last.pt"
    run = ["--resume", str(begun)] if begun.exists() else ["--preset", "digits"]
    status = train.main([*run, "--output", str(folder)])
    if status:
        return status
    best, report = folder / "best.pt", folder / "evaluation.json"
    status = evaluate.main([str(best), "--json", str(report), "--num-workers", "0"])
    if status:
        return status

    model, checkpoint = load_model(best)
    dataset = build_dataset(checkpoint.config.data, "val")
    picture = folder / "predictions.png"
    picture_sheet(model, dataset, range(NUM_PICTURES), "cpu").savefig(picture)

    ap50 = json.loads(report.read_text())["AP50"]
    holds = ap50 >= REQUIRED_AP50
    print(
        f"\nAP50 on validation images: {ap50:.3f}, "
        f"{'as' if holds else 'BELOW what is'} required: {REQUIRED_AP50:.2f}\n"
        f"{picture}: true boxes, predictions, sampling points"
    )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
