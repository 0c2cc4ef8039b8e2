"""Check an installed msda in seconds: ``python tests/packaging/check_installed.py``.

It needs torch and msda, and no pytest.

It tells whether the compiled operator of the *installed* package loads on the running torch,
computes what the reference computes, and compiles.
"""

import sys
import tempfile
import warnings
from pathlib import Path

import torch

import msda
from msda.plot import explore
from msda.testing import (
    OPERATOR,
    REFERENCE,
    TOLERANCES,
    call,
    leaves,
    make_fused_inputs,
    relative_error,
)


def results(inputs, functions):
    """Output and gradients."""
    inputs = leaves(inputs)
    output = call(functions, inputs)
    gradients = torch.autograd.grad(output.square().sum(), inputs.tensors())
    return output, *gradients


def main() -> int:
    """Run the checks; the exit status is 0 if all hold."""
    warnings.filterwarnings("error", module="msda")
    print(msda.info())
    assert msda.info()["backend"] == "native", "the compiled library is not live"

    shapes = [(9, 7), (4, 3)]
    inputs = make_fused_inputs(shapes, batch=2, num_queries=11, num_heads=4, head_dim=24)
    for actual, expected in zip(results(inputs, OPERATOR), results(inputs, REFERENCE), strict=True):
        assert relative_error(actual, expected) < 2 * TOLERANCES[torch.float32]

    module = msda.MSDeformAttn(d_model=96, n_levels=2, n_heads=4)
    query, features = torch.rand(2, 11, 96), torch.rand(2, 75, 96)
    arguments = (query, inputs.reference_points, features, shapes)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), module(*arguments))
    compiled(*arguments).sum().backward()

    with tempfile.TemporaryDirectory() as folder:
        page = explore(module, torch.rand(8, 8), Path(folder) / "page.html", inputs=arguments)
        assert page.stat().st_size > 10000

    try:
        msda.ms_deform_attn(inputs.value, [(9, 7)], None, query, query)
    except RuntimeError as error:
        assert "must" in str(error) and "got" in str(error), str(error)
    else:
        raise AssertionError("a wrong shape was accepted")
    print("smoke test passed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
