"""Convert checkpoints between this program, the original and the transformers library.

python examples/deformable_detr/convert.py r50_deformable_detr.pth folder --to transformers
python examples/deformable_detr/convert.py folder weights.pt --to ours
python examples/deformable_detr/convert.py out/digits/best.pt weights.pt --to ours    weights alone
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detector.checkpoint_formats import (
    load_into,
    read_checkpoint,
    save_original,
    save_ours,
    save_transformers,
)
from detector.model import build_model
from detector.run_checkpoints import CheckpointError


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="file of ours or of the original, or folder of transformers"
    )
    parser.add_argument("target", type=Path, help="file to write, or folder for transformers")
    parser.add_argument("--to", required=True, choices=("ours", "original", "transformers"))
    parser.add_argument(
        "--timm",
        action="store_true",
        help="to transformers: name the backbone as timm does, as the models on its hub; "
        "needed for dilation",
    )
    options = parser.parse_args(arguments)
    try:
        checkpoint = read_checkpoint(options.source)
        load_into(build_model(checkpoint.config.model), checkpoint.state)  # refuses what misfits
        if options.to == "ours":
            save_ours(options.target, checkpoint)
        elif options.to == "original":
            save_original(options.target, checkpoint)
        else:
            save_transformers(options.target, checkpoint, options.timm)
    except (ValueError, OSError, ImportError, CheckpointError) as error:
        sys.exit(f"convert.py: {error}")
    print(f"{options.target}: {checkpoint.config.model}")


if __name__ == "__main__":
    main()
