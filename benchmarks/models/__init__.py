"""Whole models: detectors, runtimes, training, dense attention over growing images."""

import sys

from benchmarks.common.harness import DETECTOR

# The detector of examples/ is no package that is installed.
if str(DETECTOR) not in sys.path:
    sys.path.insert(0, str(DETECTOR))
