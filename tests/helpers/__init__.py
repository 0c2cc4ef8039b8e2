"""What the tests of several subjects share: inputs, results, cases, and the CUDA executor."""

import pytest

# So that an assertion here that fails shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.helpers")
