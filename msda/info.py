"""``python -m msda.info`` prints what ``msda.info()`` returns."""

import sys

from msda.installation import info

if __name__ == "__main__":
    print(info())
else:
    # `import msda.info` must not replace the function msda.info by this module.
    sys.modules[__name__] = info  # type: ignore[assignment]
