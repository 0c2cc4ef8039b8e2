"""Look at data before it is trained on.

    python -m detector.data /data/mine
    python -m detector.data /data/mine --box-format relative-xywh --output look

Prints what is in the splits train, val and test, what was dropped, clipped or odd, and draws
samples with their boxes. ``train.py --check-data`` does the same with the settings of a run.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from detector.config import DataConfig, add_data_options
from detector.data.check import SPLITS, check_data

OPTIONS = ("exif", "white_level", "max_pixels", "box_format")


def main() -> int:
    """Check as the command line says; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m detector.data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="folder, see --data-path of train.py")
    parser.add_argument("--split", nargs="+", default=SPLITS, metavar="NAME", help="only these")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("out/check"),
        metavar="FOLDER",
        help="of the pictures; default: %(default)s",
    )
    add_data_options(parser, OPTIONS)
    options = parser.parse_args()
    given = {name: value for name, value in vars(options).items() if name in OPTIONS}
    try:
        config = DataConfig(data_path=str(options.data), **given)
    except ValueError as error:
        parser.error(str(error))
    return check_data(config, options.output, options.split)


if __name__ == "__main__":
    sys.exit(main())
