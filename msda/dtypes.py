"""The floating-point dtypes of the operators: the one list in Python, which needs no torch.

``csrc/dtypes.h`` says what a new one needs. Every tensor of numbers may have any of them; sums and
coordinates are float32, or float64 where ``value`` is float64.
"""

FLOATS = ("float32", "float64", "float16", "bfloat16")


def listed(names: tuple[str, ...]) -> str:
    """'float32, float64, float16 or bfloat16'."""
    return f"{', '.join(names[:-1])} or {names[-1]}"
