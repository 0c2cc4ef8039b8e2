"""``python -m msda.info`` prints what ``msda.info()`` returns."""

from msda._info import info

if __name__ == "__main__":
    print(info())
