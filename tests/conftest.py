"""What the tests share: fixtures, awkward sizes, and the calls that they compare."""

import functools
import types
from dataclasses import fields, replace

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F

import msda
from msda.reference import ms_deform_attn_fused_reference, ms_deform_attn_reference
from msda.testing import (
    PAPER_SHAPES,
    TOLERANCES,
    FusedInputs,
    Inputs,
    make_fused_inputs,
    make_inputs,
    map_tensors,
    relative_error,
)


def pytest_report_header():
    about = msda.info()
    cuda = ";".join(about["cuda_architectures"]) or "none"
    return (
        f"msda {about['msda']}: {about['backend']} backend ({about['backend_reason']}), "
        f"CPU kernels: {about['cpu_capability']}, CUDA kernels: {cuda}"
    )


# ---- fixtures ------------------------------------------------------------------------------------


def skip_without_cuda():
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    if not msda.info()["cuda_architectures"]:
        pytest.skip("msda was built without CUDA kernels")


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        skip_without_cuda()
    return request.param


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def deterministic():
    """torch.use_deterministic_algorithms(True), under which new tensors also hold NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def poisoned_allocations(deterministic):
    """Newly allocated tensors hold NaN, so that an element nobody wrote shows."""


@pytest.fixture(scope="session")
def encoder():
    """The encoder of the paper: inputs, grad_output, and float64 output and gradients."""
    # As they come, cell edges included: fractions are exact enough to fall into the right cell.
    inputs = make_inputs(PAPER_SHAPES, locations="local")
    grad_output = random_like_output(inputs)
    exact = leaves_of(in_float64(inputs), names_of(inputs))
    output = call(REFERENCE, exact)
    output.backward(grad_output.double())
    gradients = {name: getattr(exact, name).grad for name in names_of(inputs)}
    return inputs, grad_output, output.detach(), gradients


# ---- sizes and forms that tests are repeated over ------------------------------------------------


def _sizes(spatial_shapes, **sizes):
    return dict(spatial_shapes=spatial_shapes, **sizes)


_AWKWARD = {
    "all_ones": _sizes([(1, 1)], batch=1, num_queries=1, num_heads=1, head_dim=1, num_points=1),
    "level_of_one_pixel": _sizes(
        [(5, 7), (1, 1), (3, 2)], batch=2, num_queries=11, num_heads=3, head_dim=8, num_points=2
    ),
    "maps_one_pixel_thin": _sizes(
        [(1, 13), (11, 1)], batch=2, num_queries=9, num_heads=1, head_dim=16, num_points=4
    ),
    "batch_of_seven": _sizes(
        [(9, 4), (6, 5), (4, 4), (2, 3), (1, 2)],
        batch=7,
        num_queries=5,
        num_heads=3,
        head_dim=3,
        num_points=3,
    ),
    "one_query": _sizes(
        [(6, 8), (3, 4)], batch=1, num_queries=1, num_heads=8, head_dim=32, num_points=4
    ),
    "sixteen_heads": _sizes(
        [(6, 8)], batch=2, num_queries=37, num_heads=16, head_dim=16, num_points=2
    ),
    "forty_samples": _sizes(
        [(8, 6), (7, 5), (4, 4), (3, 2), (1, 1)],
        batch=1,
        num_queries=19,
        num_heads=2,
        head_dim=64,
        num_points=8,
    ),
    "ragged": _sizes(
        [(8, 6), (4, 3), (2, 2)],
        batch=2,
        num_queries=17,
        num_heads=3,
        head_dim=30,
        num_points=[3, 6, 3],
    ),
    "ragged_with_empty_level": _sizes(
        [(4, 5), (3, 3), (2, 6)],
        batch=2,
        num_queries=18,
        num_heads=2,
        head_dim=8,
        num_points=[3, 0, 2],
    ),
    **{
        f"head_dim_{head_dim}": _sizes(
            [(5, 4), (2, 3)],
            batch=2,
            num_queries=6,
            num_heads=2,
            head_dim=head_dim,
            num_points=3,
        )
        for head_dim in (1, 3, 8, 16, 30, 32, 64, 71, 130)
    },
}
awkward_sizes = pytest.mark.parametrize("sizes", _AWKWARD.values(), ids=_AWKWARD.keys())

_FORMS = {
    "plain": make_inputs,
    "points": make_fused_inputs,
    "boxes": functools.partial(make_fused_inputs, reference_size=4, padding=True),
    "shared_point": functools.partial(make_fused_inputs, shared_reference=True, padding=True),
    "shared_box": functools.partial(make_fused_inputs, shared_reference=True, reference_size=4),
}
every_form = pytest.mark.parametrize("make", _FORMS.values(), ids=_FORMS.keys())

every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype)[6:])
sixteen_bits = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"]
)


@st.composite
def any_sizes(draw):
    num_levels = draw(st.integers(1, 4))
    side = st.integers(1, 7)
    if draw(st.booleans()):
        num_points = draw(st.lists(st.integers(0, 5), min_size=num_levels, max_size=num_levels))
    else:
        num_points = draw(st.integers(1, 6))
    if isinstance(num_points, list) and sum(num_points) == 0:
        num_points[0] = 1
    return dict(
        spatial_shapes=[(draw(side), draw(side)) for _ in range(num_levels)],
        batch=draw(st.integers(1, 3)),
        num_queries=draw(st.integers(1, 20)),
        num_heads=draw(st.integers(1, 5)),
        head_dim=draw(st.integers(1, 140)),
        num_points=num_points,
        dtype=draw(st.sampled_from(list(TOLERANCES))),
        seed=draw(st.integers(0, 1000)),
    )


# ---- calls ---------------------------------------------------------------------------------------

OPERATOR = {Inputs: msda.ms_deform_attn, FusedInputs: msda.ms_deform_attn_fused}
REFERENCE = {Inputs: ms_deform_attn_reference, FusedInputs: ms_deform_attn_fused_reference}


def call(functions, inputs, *, start_index=None, **options):
    """Call the plain or the fused one of ``functions``, whichever ``inputs`` are for."""
    value, *others = inputs.tensors()
    arguments = (value, inputs.spatial_shapes, start_index, *others)
    if isinstance(inputs, FusedInputs):
        options = {"padding_mask": inputs.padding_mask} | options
    return functions[type(inputs)](*arguments, **{"num_points": inputs.num_points} | options)


def compute(inputs, **options):
    return call(OPERATOR, inputs, **options)


def compute_exactly(inputs, **options):
    """The float64 reference, on the CPU."""
    return call(REFERENCE, in_float64(inputs), **options)


def compute_gradients(functions, inputs, grad_output, names, **options):
    """Gradients by the arguments called ``names``, no other one requiring any."""
    inputs = leaves_of(inputs, names)
    call(functions, inputs, **options).backward(grad_output)
    return {name: getattr(inputs, name).grad for name in names}


def exact_gradients(inputs, grad_output, **options):
    exact_grad_output = grad_output.double().cpu()
    names = names_of(inputs)
    return compute_gradients(REFERENCE, in_float64(inputs), exact_grad_output, names, **options)


def assert_close(actual, expected, tolerance=None, scale=1):
    """Relative error below the tolerance of ``actual``'s dtype; ``scale`` needs a reason."""
    limit = scale * (TOLERANCES[actual.dtype] if tolerance is None else tolerance)
    assert actual.shape == expected.shape
    assert relative_error(actual, expected) <= limit


def gradient_tolerance(inputs, name):
    """The tolerance of the gradient's dtype; for logits also that of the output's."""
    # CUDA takes the softmax's gradient from the output, which was rounded to the dtype of value.
    dtypes = [getattr(inputs, name).dtype]
    if name == "attention_logits":
        dtypes.append(inputs.value.dtype)
    return max(TOLERANCES[dtype] for dtype in dtypes)


def assert_gradients_close(inputs, actual, expected, scale=1):
    for name, gradient in actual.items():
        assert gradient.isfinite().all(), f"grad_{name}"
        assert gradient.shape == expected[name].shape
        error, limit = relative_error(gradient, expected[name]), gradient_tolerance(inputs, name)
        assert error <= scale * limit, f"grad_{name}"


def assert_same_bits(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def plain_pytorch(inputs):
    """Bilinear attention as it is written without this package, all in the dtype of the inputs."""
    value, locations, weights = inputs.tensors()  # (B, S, M, D), (B, Q, M, L, P, 2), (.., L, P)
    sizes = [height * width for height, width in inputs.spatial_shapes]
    output = 0
    for level, (pixels, shape) in enumerate(
        zip(value.split(sizes, dim=1), inputs.spatial_shapes, strict=True)
    ):
        maps = pixels.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, shape)  # (B * M, D, H, W)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * M, Q, P, 2)
        sampled = F.grid_sample(maps, grid, align_corners=False)  # (B * M, D, Q, P)
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * M, Q, P)
        output = output + torch.einsum("ndqp,nqp->nqd", sampled, weight)
    output = output.unflatten(0, (-1, value.shape[2]))  # (B, M, Q, D)
    return output.transpose(1, 2).flatten(2)


PLAIN_PYTORCH = {Inputs: lambda *tensors, num_points: plain_pytorch(Inputs(*_drop(tensors)))}


def _drop(arguments):
    """(value, shapes, start index, locations, weights) without the start index."""
    return arguments[:2] + arguments[3:]


# ---- inputs --------------------------------------------------------------------------------------


def names_of(inputs):
    """The arguments that have gradients."""
    entries = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
    return [
        name
        for name, entry in entries.items()
        if isinstance(entry, torch.Tensor) and entry.is_floating_point()
    ]


def leaves_of(inputs, names):
    """A copy of ``inputs`` in which the arguments called ``names`` require a gradient."""
    tensors = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in names}
    return replace(inputs, **tensors)


def off_by_one_byte(tensor):
    """A copy that begins one byte past an address aligned to its elements."""
    data = torch.empty(tensor.nbytes + 1, dtype=torch.uint8, device=tensor.device)
    data[1:] = tensor.contiguous().view(-1).view(torch.uint8)
    if tensor.device.type == "cpu":
        shifted = torch.frombuffer(data.numpy(), dtype=tensor.dtype, offset=1)
    else:
        integer, size = f"<i{tensor.element_size()}", (tensor.numel(),)
        place = dict(data=(data.data_ptr() + 1, False), typestr=integer, shape=size, version=2)
        owner = types.SimpleNamespace(data=data, __cuda_array_interface__=place)
        shifted = torch.as_tensor(owner, device=tensor.device).view(tensor.dtype)
    assert shifted.data_ptr() % tensor.element_size() == 1
    return shifted.view(tensor.shape)


def in_float64(inputs):
    exact = map_tensors(inputs, lambda tensor: tensor.detach().double().cpu())
    mask = getattr(exact, "padding_mask", None)
    return exact if mask is None else replace(exact, padding_mask=mask.cpu())


def random_like_output(inputs, seed=7):
    """Random numbers in the shape, dtype and place of the output."""
    value, points = inputs.value, inputs.tensors()[-1]
    size = (value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    random = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=random).to(value.device, value.dtype)


def to_pixels(inputs):
    """Points (B, Q, M, K, 2) as given, and the ``origin`` and ``step`` that make pixels of them.

    All in float64; the pixel coordinates are origin + step * points.
    """
    shapes, num_levels = inputs.spatial_shapes, len(inputs.spatial_shapes)
    fused = isinstance(inputs, FusedInputs)
    given = inputs.sampling_offsets if fused else inputs.sampling_locations
    ragged = inputs.num_points is not None
    counts = inputs.num_points if ragged else [given.shape[4]] * num_levels
    levels = torch.tensor(
        [level for level, count in enumerate(counts) for _ in range(count)]
    ).long()
    size = torch.tensor([(width, height) for height, width in shapes]).double()[levels]  # (K, 2)
    points = given.double().cpu().flatten(3, -2)
    if not fused:
        return points, torch.tensor(-0.5).double(), size
    reference = inputs.reference_points.double().cpu().expand(-1, -1, num_levels, -1)
    reference = reference[:, :, levels].unsqueeze(2)  # (B, Q, 1, K, 2 or 4)
    origin, step = reference[..., :2] * size - 0.5, torch.ones(()).double()
    if reference.shape[-1] == 4:
        count_of_sample = torch.tensor(counts).double()[levels].unsqueeze(-1)
        step = reference[..., 2:] * size / (2 * count_of_sample)
    return points, origin, step


def with_points(inputs, points):
    """A copy of ``inputs`` with these points, of any shape and dtype, in place of its own."""
    fused = isinstance(inputs, FusedInputs)
    name = "sampling_offsets" if fused else "sampling_locations"
    given = getattr(inputs, name)
    return replace(inputs, **{name: points.reshape(given.shape).to(given)})


def off_edges(inputs, margin=0.01):
    """Move each sample ``margin`` of a pixel away from the cell edges.

    There the derivative of bilinear interpolation jumps, and the nearest pixel changes: two right
    answers may differ in the last bit of a coordinate and by far in the result.
    """
    points, origin, step = to_pixels(inputs)
    pixel = origin + step * points
    pixel = pixel.floor() + (pixel - pixel.floor()).clamp(margin, 1 - margin)
    return with_points(inputs, (pixel - origin) / step)
