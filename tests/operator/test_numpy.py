"""The C interface through NumPy: bits and refusals of the operator, with and without torch."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import msda
import msda.numpy as arrays
from msda import checks
from msda.testing import FusedInputs, make_fused_inputs, make_inputs
from tests.helpers.cases import awkward_sizes, every_dtype, every_form
from tests.helpers.processes import run_python
from tests.helpers.results import compute
from tests.operator.operator_calls import SHAPES, call_operator, good_arguments, refusal

pytestmark = pytest.mark.not_on_executor("the C interface is the CPU's")

ROOT = Path(__file__).resolve().parents[2]
SIZES = dict(batch=2, num_queries=7, num_heads=3, head_dim=5, num_points=2)


def as_array(tensor):
    if tensor.dtype == torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def as_tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def compute_arrays(inputs, change=lambda array: array, **options):
    value, *others = [change(as_array(tensor)) for tensor in inputs.tensors()]
    options = {"num_points": inputs.num_points} | options
    if isinstance(inputs, FusedInputs):
        if inputs.padding_mask is not None:
            options["padding_mask"] = change(inputs.padding_mask.numpy())
        return arrays.ms_deform_attn_fused(value, inputs.spatial_shapes, None, *others, **options)
    return arrays.ms_deform_attn(value, inputs.spatial_shapes, None, *others, **options)


def assert_same(output, expected):
    assert output.dtype == as_array(expected).dtype
    torch.testing.assert_close(as_tensor(output), expected, rtol=0, atol=0)


# ---- what is computed ----------------------------------------------------------------------------


@awkward_sizes
@every_form
def test_every_form_has_the_bits_of_the_operator(make, sizes):
    inputs = make(**sizes)
    assert_same(compute_arrays(inputs), compute(inputs))


@every_dtype
@every_form
def test_every_dtype_has_the_bits_of_the_operator(make, dtype):
    inputs = make(SHAPES, dtype=dtype, **SIZES)
    assert_same(compute_arrays(inputs), compute(inputs))


def test_nearest_has_the_bits_of_the_operator():
    inputs = make_inputs(SHAPES, **SIZES)
    output = compute_arrays(inputs, interpolation="nearest")
    assert_same(output, compute(inputs, interpolation="nearest"))


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
def test_any_number_of_threads_has_the_same_bits(threads):
    inputs = make_fused_inputs([(40, 30), (9, 7)], padding=True, batch=2, num_queries=501)
    assert_same(compute_arrays(inputs, num_threads=threads), compute(inputs))


CHANGES = {
    "transposed": lambda array: np.ascontiguousarray(array.T).T,
    "every_other": lambda array: np.repeat(array, 2, -1)[..., ::2],
    "backwards": lambda array: np.ascontiguousarray(array[..., ::-1])[..., ::-1],
    "broadcast": lambda array: np.broadcast_to(array, (3, *array.shape))[1],
    "read_only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
    "misaligned": lambda array: _misaligned(array),
}


def _misaligned(array):
    bytes_ = np.zeros(array.nbytes + 1, np.uint8)
    shifted = bytes_[1:].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_same_numbers_in_another_form_give_the_same_result(change):
    inputs = make_fused_inputs(SHAPES, padding=True, **SIZES)
    assert_same(compute_arrays(inputs, change), compute(inputs))


def test_a_result_is_written_where_it_is_wanted():
    inputs = make_inputs(SHAPES, **SIZES)
    output = np.full((2, 7, 15), np.nan, np.float32)
    assert compute_arrays(inputs, output=output) is output
    assert_same(output, compute(inputs))


@pytest.mark.parametrize("empty", ["batch", "num_queries", "num_points"])
def test_empty_calls_are_empty_or_zero(empty):
    inputs = make_inputs(SHAPES, **SIZES | {empty: 0})
    assert_same(compute_arrays(inputs), compute(inputs))


def test_shapes_and_start_index_may_be_arrays():
    inputs = make_inputs(SHAPES, **SIZES)
    value, *others = [as_array(tensor) for tensor in inputs.tensors()]
    for dtype in (np.int32, np.int64):
        shapes, starts = np.array(SHAPES, dtype), np.array([0, 12], dtype)
        assert_same(arrays.ms_deform_attn(value, shapes, starts, *others), compute(inputs))


# ---- what is refused -----------------------------------------------------------------------------


def test_the_table_of_arguments_is_that_of_the_operator():
    assert arrays.arguments() == checks.describe_arguments()


def call_arrays(name, arguments):
    arguments = {
        key: entry.numpy() if isinstance(entry, torch.Tensor) else entry
        for key, entry in arguments.items()
    }
    arguments["spatial_shapes"] = arguments.pop("spatial_shapes_tensor")
    arguments["num_points"] = arguments["num_points"] or None
    nearest = arguments.pop("nearest", False)
    assert not nearest
    getattr(arrays, name)(**arguments)


BAD = {
    "int16": lambda tensor: tensor.to(torch.int16),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "scalar": lambda tensor: tensor.flatten()[0],
    "flat": lambda tensor: tensor.flatten() if tensor.dim() > 1 else tensor[None],
    "deeper": lambda tensor: tensor[..., None],
    **{
        f"longer_{axis}": lambda tensor, axis=axis: torch.cat(
            [tensor, tensor.narrow(axis, 0, 1)], axis
        )
        for axis in range(6)
    },
}


@pytest.mark.parametrize("ragged", [False, True], ids=["even", "ragged"])
@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_a_bad_array_is_refused_in_the_words_of_the_operator(name, ragged):
    good = good_arguments(name, ragged)
    for place in [key for key, entry in good.items() if isinstance(entry, torch.Tensor)]:
        for kind, spoil in BAD.items():
            longer = kind.startswith("longer")
            if longer and (int(kind[-1]) >= good[place].dim() or kind == "longer_3" == place):
                continue
            arguments = dict(good)
            arguments[place] = spoil(good[place])
            said = refusal(call_operator, name, arguments)
            assert refusal(call_arrays, name, arguments) == said, (place, kind)


@pytest.mark.parametrize(
    "shapes", [[[3, 4], [2, 3]], [[-3, -4], [2, 2]], [[2**62, 4], [2, 2]], [[2**24 + 1, 1], [2, 2]]]
)
def test_bad_sizes_are_refused_in_the_words_of_the_operator(shapes):
    arguments = good_arguments("ms_deform_attn") | {"spatial_shapes_tensor": torch.tensor(shapes)}
    said = refusal(call_operator, "ms_deform_attn", arguments)
    assert said.startswith("spatial_shapes must ")
    assert refusal(call_arrays, "ms_deform_attn", arguments) == said


@pytest.mark.parametrize("counts", [[3], [3, -1], [1, 1]])
def test_bad_counts_of_points_are_refused_in_the_words_of_the_operator(counts):
    arguments = good_arguments("ms_deform_attn", ragged=True) | {"num_points": counts}
    said = refusal(call_operator, "ms_deform_attn", arguments)
    assert said.startswith("num_points must ")
    assert refusal(call_arrays, "ms_deform_attn", arguments) == said


def swapped(array):
    return array.astype(array.dtype.newbyteorder())


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (dict(value=[1.0]), TypeError, "value must be an array, got list"),
        (dict(interpolation="cubic"), ValueError, "interpolation must be one of "),
        (dict(spatial_shapes=[3, 4]), ValueError, r"spatial_shapes must be a sequence of \(height"),
        (dict(spatial_shapes=[(3.0, 4)]), ValueError, r"spatial_shapes must be a sequence of \("),
        (dict(level_start_index=[0.5, 1]), TypeError, "level_start_index must be a sequence of"),
        (dict(level_start_index=[0, 11]), RuntimeError, "level_start_index must be the running"),
        (dict(num_points=[]), RuntimeError, r"num_points must hold one count per level, got \(\)"),
        (dict(num_points=[1.5, 2]), TypeError, "num_points must be a sequence of ints"),
        (dict(num_threads=-1), RuntimeError, "num_threads must not be negative, got -1"),
        (dict(output=np.zeros((2, 7, 14), "f4")), RuntimeError, "output must have shape"),
        (dict(output=np.zeros((2, 7, 15))), RuntimeError, "output must have the dtype of value"),
        (dict(output=np.zeros((2, 7, 30), "f4")[..., ::2]), RuntimeError, "output must be contig"),
        (dict(output=np.broadcast_to(np.float32(0), (2, 7, 15))), ValueError, "output must be wr"),
        (dict(value="swapped"), RuntimeError, "value must have a dtype of .* in native order"),
    ],
)
def test_wrong_calls_are_refused(change, error, says):
    inputs = make_inputs(SHAPES, **SIZES)
    value, locations, weights = [tensor.numpy() for tensor in inputs.tensors()]
    given = dict(
        value=value, spatial_shapes=SHAPES, level_start_index=None,
        sampling_locations=locations, attention_weights=weights,
    )  # fmt: skip
    if change.get("value") == "swapped":
        change = dict(value=swapped(value))
    with pytest.raises(error, match=f"^{says}"):
        arrays.ms_deform_attn(**given | change)


def test_a_copy_that_does_not_fit_into_memory_says_of_what():
    value = np.broadcast_to(np.float32(0), (2, 16, 3, 1 << 40))
    points, weights = np.zeros((2, 0, 3, 2, 2, 2), "f4"), np.zeros((2, 0, 3, 2, 2), "f4")
    with pytest.raises(MemoryError, match=r"^value must fit into memory once more, without gaps, "):
        arrays.ms_deform_attn(value, SHAPES, None, points, weights)


# ---- the library ---------------------------------------------------------------------------------

C_PROGRAM = r"""
#include <stdio.h>
#include "msda.h"
int main(void) {
  float ones[6 * 4], centre[2] = {0.5f, 0.5f}, weight = 1, result[4];
  for (int i = 0; i < 24; ++i) ones[i] = 1;
  int64_t shape[2] = {2, 3};
  const int64_t sizes[5][6] = {
      {1, 6, 1, 4}, {1, 2}, {1, 1, 1, 1, 1, 2}, {1, 1, 1, 1, 1}, {1, 1, 4}};
  msda_tensor value = {ones, sizes[0], NULL, 4, MSDA_FLOAT32};
  msda_tensor shapes = {shape, sizes[1], NULL, 2, MSDA_INT64};
  msda_tensor locations = {centre, sizes[2], NULL, 6, MSDA_FLOAT32};
  msda_tensor weights = {&weight, sizes[3], NULL, 5, MSDA_FLOAT32};
  msda_tensor output = {result, sizes[4], NULL, 3, MSDA_FLOAT32};
  int failed = msda_ms_deform_attn(&value, &shapes, NULL, &locations, &weights, &output, NULL);
  printf("%d %g %s\n", failed, result[0] + result[3], msda_version());
  failed = msda_ms_deform_attn(NULL, &shapes, NULL, &locations, &weights, &output, NULL);
  printf("%d %s\n", failed, msda_last_error());
  value.dtype = 99;
  failed = msda_ms_deform_attn(&value, &shapes, NULL, &locations, &weights, &output, NULL);
  printf("%d %s\n", failed, msda_last_error());
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
def test_a_c_program_calls_the_library(tmp_path):
    source, program = tmp_path / "call.c", tmp_path / "call"
    source.write_text(C_PROGRAM)
    library = arrays.LIBRARY_PATH
    strict = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    command = ["cc", *strict, source, f"-I{ROOT / 'csrc'}", library, f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*command, "-o", program], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    assert lines[0] == f"0 2 {msda.__version__}"
    assert lines[1] == "1 value must be given, got null"
    assert lines[2] == (
        "1 value must be float32, float64, float16 or bfloat16, got a dtype of number 99"
    )


def test_a_loop_of_the_callers_does_all_the_work_in_any_order():
    """What runtimes hand over: here one that goes backwards, and says how much it was given."""
    task_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    loop_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, task_type, ctypes.c_void_p)
    counts = []

    @loop_type
    def loop(pool, num_tasks, task, state):
        counts.append(num_tasks)
        for index in reversed(range(num_tasks)):
            task(state, index)

    inputs = make_inputs([(40, 30)], batch=1, num_queries=901, num_heads=8, head_dim=32)
    kept = []
    value, locations, weights = [tensor.numpy() for tensor in inputs.tensors()]
    output = np.full((1, 901, 256), np.nan, np.float32)
    given = [value, np.array([(40, 30)]), None, locations, weights, output]
    options = arrays._Options(num_threads=5, loop=ctypes.cast(loop, ctypes.c_void_p))
    call = arrays.LIBRARY.msda_ms_deform_attn
    assert call(*[arrays._tensor(array, "", kept) for array in given], options) == 0
    assert counts == [5]
    assert_same(output, compute(inputs))


def test_arrays_need_no_torch(tmp_path):
    script = """
import sys
sys.modules["torch"] = None
try:
    import msda
except ImportError as error:
    sys.exit(f"import failed: {error}")
"""
    # A module that is None raises ModuleNotFoundError with its name, as one that is not installed.
    script += """
import numpy as np, msda.numpy
shapes, value = [(2, 3)], np.ones((1, 6, 1, 4), "f4")
locations, weights = np.full((1, 1, 1, 1, 1, 2), 0.5, "f4"), np.ones((1, 1, 1, 1, 1), "f4")
print(msda.numpy.ms_deform_attn(value, shapes, None, locations, weights).sum(), msda.__version__)
for name in ("MSDeformAttn", "other"):
    try:
        getattr(msda, name)
    except (ImportError, AttributeError) as error:
        print(error)
print([name for name in sys.modules if name.startswith("torch.")])
"""
    done = run_python("-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:4] == [
        f"4.0 {msda.__version__}",
        "msda.MSDeformAttn needs torch >= 2.10, which is not installed",
        "module 'msda' has no attribute 'other'",
        "[]",
    ]


def test_a_missing_library_is_named(tmp_path):
    package = tmp_path / "msda"
    shutil.copytree(ROOT / "msda", package, ignore=shutil.ignore_patterns("libmsda_cpu*"))
    done = run_python("-c", "import msda.numpy", path=tmp_path)
    assert "ImportError: msda.numpy needs libmsda_cpu" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="ldd is Linux's")
def test_the_library_needs_no_torch():
    linked = subprocess.run(["ldd", arrays.LIBRARY_PATH], capture_output=True, text=True).stdout
    assert "libc.so" in linked
    assert "torch" not in linked and "python" not in linked
