"""Every rule of the table of arguments holds in the operators, their fakes and the reference.

The table stands in csrc/arguments.h and in msda/checks.py. Each bad tensor is put in each place of
each operator and must end in the same sentence, whoever checks it.
"""

import os
import subprocess
import sys

import pytest
import torch

import msda
import msda.numpy
from msda import checks, dtypes, ops
from msda.testing import TOLERANCES
from tests.operator.operator_calls import OPERATORS, call_operator, good_arguments, refusal

pytestmark = [
    pytest.mark.skipif(ops.LIBRARY is None, reason="the compiled library is missing"),
    pytest.mark.not_on_executor("arguments are checked before a kernel is chosen"),
]


def test_both_tables_are_the_same():
    assert ops.library_text("msda_arguments") == checks.describe_arguments()


def test_no_list_lacks_a_dtype():
    assert set(TOLERANCES) == set(checks.FLOATS)
    assert set(dtypes.FLOATS) <= set(msda.numpy.DTYPES)


# ---- calls ---------------------------------------------------------------------------------------


def call_checks(name, arguments):
    """What the fake kernels and the reference are checked by."""
    checks.check_arguments(**arguments)


def call_function(name, arguments):
    """The public function, with or without the compiled operator behind it."""
    arguments = dict(arguments)
    shapes = arguments.pop("spatial_shapes_tensor")
    arguments |= dict(spatial_shapes=shapes, num_points=arguments["num_points"] or None)
    arguments.pop("nearest", None)
    return getattr(msda, name)(**arguments)


def call_reference(name, arguments, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ops, "BACKEND", "reference")
        patch.setattr(ops, "BACKEND_REASON", "MSDA_BACKEND=reference")
        return call_function(name, arguments)


# ---- what is refused -----------------------------------------------------------------------------


def strided_nested(tensor):
    return torch.nested.nested_tensor([torch.zeros(3, 2), torch.zeros(2, 2)])


def jagged(tensor):
    parts = [torch.zeros(3, 2), torch.zeros(2, 2)]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def quantised(tensor):
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.quint8)


def with_storage_of(tensor, num_bytes):
    tensor = tensor.clone()
    tensor.untyped_storage().resize_(num_bytes)
    return tensor


def past_the_end(tensor):
    """Strides that leave the storage, which only shrank after the view was made."""
    owner = torch.zeros(4 * tensor.numel(), dtype=tensor.dtype)
    view = owner.as_strided(tensor.shape, [2 * stride for stride in tensor.stride()], 3)
    owner.untyped_storage().resize_(tensor.nbytes)
    return view


def cut_behind_an_offset(tensor):
    view = torch.cat([tensor[:1], tensor])[1:]
    view.untyped_storage().resize_(tensor[:1].nbytes + tensor.nbytes - 1)
    return view


def longer(axis):
    return lambda tensor: torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis)


LONGER = {f"longer_{axis}": longer(axis) for axis in range(6)}
BAD = {
    "none": lambda tensor: None,
    "meta": lambda tensor: tensor.to("meta"),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "int16": lambda tensor: tensor.to(torch.int16),
    "float8": lambda tensor: tensor.to(torch.float8_e5m2),
    "quantised": quantised,
    "sparse": lambda tensor: tensor.to_sparse(),
    "csr": lambda tensor: torch.eye(3).to_sparse_csr(),
    "mkldnn": lambda tensor: torch.zeros(2, 3, 4, 5).to_mkldnn(),
    "nested": strided_nested,
    "jagged": jagged,
    "scalar": lambda tensor: tensor.flatten()[0],
    "flat": lambda tensor: tensor.flatten() if tensor.dim() > 1 else tensor[None],
    "deeper": lambda tensor: tensor[..., None],
    "freed": lambda tensor: with_storage_of(tensor, 0),
    "shortened": lambda tensor: with_storage_of(tensor, tensor.nbytes - 1),
    "past_the_end": past_the_end,
    "cut_behind_an_offset": cut_behind_an_offset,
    **LONGER,
}
OPTIONAL = ("spatial_shapes_tensor", "level_start_index", "padding_mask", "output")


def places(name, ragged):
    arguments = good_arguments(name, ragged)
    return [key for key, argument in arguments.items() if isinstance(argument, torch.Tensor)]


ALL_PLACES = [
    pytest.param(name, ragged, place, id=f"{name}{'-ragged' if ragged else ''}-{place}")
    for name in OPERATORS
    for ragged in (False, True)
    for place in (places(name, ragged) if ops.LIBRARY is not None else [])
]


def is_possible(kind, name, place, tensor):
    if kind == "none":
        return place not in OPTIONAL
    if kind.startswith("longer"):
        has_any_length = place == "value" and kind == "longer_3" and "backward" not in name
        return int(kind[-1]) < tensor.dim() and not has_any_length
    return True


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ragged", "place"), ALL_PLACES)
def test_a_bad_tensor_is_refused_in_the_same_words_by_all(name, ragged, place, monkeypatch, capfd):
    argument = place.removesuffix("_tensor")
    for kind, spoil in BAD.items():
        arguments = good_arguments(name, ragged)
        if not is_possible(kind, name, place, arguments[place]):
            continue
        arguments[place] = spoil(arguments[place])
        said = refusal(call_operator, name, arguments)
        assert said is not None, kind
        # Others are held against the device of value, and against the longer axis of a tensor.
        is_measure = kind.startswith("longer") or (kind, place) == ("meta", "value")
        start = "" if is_measure else f"{argument} "
        assert said.startswith(start) and " must " in said and ", got " in said, (kind, said)
        assert said == refusal(call_checks, name, arguments), kind
        if "backward" not in name:
            assert said == refusal(call_function, name, arguments), kind
            assert said == refusal(call_reference, name, arguments, monkeypatch), kind
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "ragged", "place"), ALL_PLACES)
def test_the_fakes_refuse_in_the_same_words(name, ragged, place):
    if place == "spatial_shapes_tensor":
        pytest.skip("its numbers, which a tensor without data has not, are what others must fit")
    # Nothing of storages, which do not exist for tensors without data.
    for kind in ("complex", "int16", "float8", "scalar", "flat", "deeper", *LONGER):
        arguments = good_arguments(name, ragged)
        arguments |= dict(spatial_shapes=[3, 4, 2, 2], spatial_shapes_tensor=None)
        if not is_possible(kind, name, place, arguments[place]):
            continue
        arguments[place] = BAD[kind](arguments[place])
        said = refusal(call_operator, name, arguments)
        assert said is not None, kind
        on_meta = {
            key: argument.to("meta") if isinstance(argument, torch.Tensor) else argument
            for key, argument in arguments.items()
        }
        assert refusal(call_operator, name, on_meta) == said, kind


@pytest.mark.parametrize("name", OPERATORS)
def test_one_tensor_on_meta_among_others_is_refused_however_it_is_dispatched(name):
    for place in places(name, False):
        arguments = good_arguments(name, device="meta")
        arguments[place] = good_arguments(name)[place]
        said = refusal(call_operator, name, arguments)
        if place in ("spatial_shapes_tensor", "level_start_index"):
            assert said is None  # they may stay on the host
        elif place == "value":
            assert (
                " must be on the CPU or on the device of value (cpu), got a tensor on meta" in said
            )
        else:
            assert said.startswith(f"{place} must be on the device of value (meta), got")


# ---- what is computed right ----------------------------------------------------------------------


def misaligned(tensor):
    bytes_ = torch.zeros(tensor.nbytes + 1, dtype=torch.uint8)
    storage = bytes_.untyped_storage()[1:]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape).copy_(tensor)


SAME = {
    "transposed": lambda tensor: tensor.transpose(0, -1).contiguous().transpose(0, -1),
    "every_other": lambda tensor: tensor.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda tensor: tensor[None].expand(3, *tensor.shape)[1],
    "shifted": lambda tensor: torch.cat([tensor[:1], tensor])[1:],
    "misaligned": misaligned,
    "negative": lambda tensor: torch._neg_view(-tensor) if tensor.is_floating_point() else tensor,
    "inference": lambda tensor: _in_inference_mode(tensor),
    "parameter": lambda tensor: torch.nn.Parameter(tensor, requires_grad=False),
}


def _in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


@pytest.mark.parametrize("kind", SAME)
@pytest.mark.parametrize("name", OPERATORS)
def test_the_same_numbers_in_another_form_give_the_same_result(name, kind):
    expected = call_operator(name, good_arguments(name))
    for place in places(name, False):
        arguments = good_arguments(name)
        arguments[place] = SAME[kind](arguments[place])
        actual = call_operator(name, arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["ms_deform_attn", "ms_deform_attn_fused"])
def test_zero_tensors_are_zeros(name):
    arguments = good_arguments(name)
    arguments["value"] = torch._efficientzerotensor(arguments["value"].shape)
    assert (call_operator(name, arguments) == 0).all()


# ---- sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(
    "shapes",
    [
        [],
        [3, 4, 2],
        [3, 4, 2, 3],
        [-3, -4, 2, 2],
        [3, 4, 0, 2],
        [2**62, 4, 2, 2],
        [2**32, 2**32, 2, 2],
        [2**24 + 1, 1, 2, 2],
    ],
    ids=str,
)
def test_bad_sizes_are_refused_in_the_same_words_by_all(name, shapes):
    as_ints = good_arguments(name) | dict(spatial_shapes=shapes, spatial_shapes_tensor=None)
    said = refusal(call_operator, name, as_ints)
    assert said.startswith("spatial_shapes must ")
    assert refusal(call_checks, name, as_ints) == said
    if len(shapes) % 2 == 0:
        numbers = torch.tensor(shapes, dtype=torch.int64).view(-1, 2)
        as_tensor = good_arguments(name) | dict(spatial_shapes_tensor=numbers)
        assert refusal(call_operator, name, as_tensor) == said
        assert refusal(call_checks, name, as_tensor) == said


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("counts", [[3], [3, -1], [1, 1], [2**63 - 1, 2**63 - 1], [0, 0]], ids=str)
def test_bad_counts_of_points_are_refused_in_the_same_words_by_all(name, counts):
    arguments = good_arguments(name, ragged=True) | dict(num_points=counts)
    said = refusal(call_operator, name, arguments)
    assert said.startswith("num_points must ")
    assert refusal(call_checks, name, arguments) == said


@pytest.mark.parametrize("name", OPERATORS)
def test_shapes_given_twice_are_refused(name):
    arguments = good_arguments(name) | dict(spatial_shapes=[3, 4, 2, 2])
    said = refusal(call_operator, name, arguments)
    assert said == "spatial_shapes must be given as numbers or as a tensor, got both"
    assert refusal(call_checks, name, arguments) == said


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_start_index_is_refused_in_the_same_words_by_all(name):
    for start in ([0, 11], [1, 12], [0, -12]):
        arguments = good_arguments(name) | dict(level_start_index=torch.tensor(start))
        said = refusal(call_operator, name, arguments)
        assert said.startswith("level_start_index must be the running sum of height * width, ")
        assert refusal(call_checks, name, arguments) == said


# ---- memory --------------------------------------------------------------------------------------


HUGE = 1 << 40


def test_a_copy_that_does_not_fit_into_memory_says_of_what_and_how_much():
    arguments = good_arguments("ms_deform_attn")
    arguments["value"] = torch.zeros(1).expand(2, 16, 3, HUGE)
    said = refusal(call_operator, "ms_deform_attn", arguments)
    assert said.startswith(
        f"value must fit into memory once more, without gaps, got (2, 16, 3, {HUGE}) of float32 on "
        "cpu, 422212.5 GB: "
    )
    assert "DefaultCPUAllocator: can't allocate memory" in said  # programs look for these words


def test_an_output_that_does_not_fit_into_memory_says_how_much():
    # No points, so that all inputs are empty.
    value = torch.zeros(1, 1, 1, 1)
    locations = torch.zeros(1, HUGE, 1, 1, 0, 2)
    arguments = [value, [1, 1], None, None, locations, locations[..., 0], [], False]
    with pytest.raises(RuntimeError) as caught:
        torch.ops.msda.ms_deform_attn(*arguments)
    start = f"output must fit into memory, got (1, {HUGE}, 1) of float32 on cpu, 4398.0 GB: "
    assert str(caught.value).startswith(start)


# With little more than what is there already, the calls want it for their scratch space.
OUT_OF_SCRATCH_SPACE = """
import resource, torch, msda
torch.set_num_threads(1)
value, locations = torch.zeros(1, 5000, 1, 4096), torch.rand(1, 5000, 1, 1, 8, 2)
msda.ms_deform_attn(value[:, :1], [(1, 1)], None, locations[:, :1], locations[:, :1, ..., 0])
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
limit = used + 5000 * 4096 * 4 + 2**24  # the output, but not a head's pixels once more
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    msda.ms_deform_attn(value, [(50, 100)], None, locations, locations[..., 0])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
def test_scratch_space_that_does_not_fit_into_memory_says_how_much():
    command = [sys.executable, "-c", OUT_OF_SCRATCH_SPACE]
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    start = "the scratch space of the CPU kernels must fit into memory, got 81.9 MB for each thread"
    assert process.stdout.startswith(start), (process.stdout, process.stderr)


def test_a_gradient_that_does_not_fit_into_memory_says_how_much():
    # One number, which is also each of the gradients that come in.
    value = torch.zeros(1, 1, 1, 1)
    locations = torch.zeros(1, HUGE, 1, 1, 0, 2)
    grad_output = torch.zeros(1).expand(1, HUGE, 1)
    arguments = [value, [1, 1], None, None, locations, locations[..., 0], [], False]
    with pytest.raises(RuntimeError, match=r"^grad_output must fit into memory once more, .* GB: "):
        torch.ops.msda._ms_deform_attn_backward(grad_output, *arguments, True, True, True)
