"""What only the CUDA kernels promise, run on the CPU: lanes, splits, levels, memory, launches.

What the operator promises on any device is tested in tests/operator, and there on the CUDA executor
too: with the kernels in the place of the compiled operator, each test in some order of threads.
Outputs and gradients hold NaN before, and the gradient of value is computed in both ways, by atomic
additions and by sorting.
"""

import functools
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from msda.testing import (
    TOLERANCES,
    FusedInputs,
    Inputs,
    gradient_names,
    make_fused_inputs,
    make_inputs,
    random_like_output,
    relative_error,
)
from tests.helpers import executor
from tests.helpers.cases import SHAPES, SIZES, every_dtype, every_form, sixteen_bits
from tests.helpers.inputs import off_edges
from tests.helpers.results import assert_close, assert_same_bits, compute_exactly, exact_gradients

pytestmark = pytest.mark.executor

some_forms = pytest.mark.parametrize(
    "make",
    [make_inputs, functools.partial(make_fused_inputs, reference_size=4, padding=True)],
    ids=["plain", "boxes"],
)


def compute_all(inputs, device=None, **options):
    """Output and gradients, that of value twice."""
    device = device or executor.make_device()
    output = executor.forward(inputs, device, **options)
    grad_output, names = random_like_output(inputs), gradient_names(inputs)
    results = executor.backward(inputs, grad_output, names, device, output=output, **options)
    results["summed"] = results.pop("value")
    results["gathered"] = executor.gather(inputs, grad_output, device, **options)
    return results | {"output": output}


def compute_all_exactly(inputs):
    gradients = exact_gradients(inputs, random_like_output(inputs))
    gradients["summed"] = gradients["gathered"] = gradients.pop("value")
    return gradients | {"output": compute_exactly(inputs)}


def assert_all_close(inputs, actual, expected):
    for name, tensor in actual.items():
        assert tensor.isfinite().all(), name
        assert tensor.shape == expected[name].shape
        # So few numbers that one rounding may count for more than it does in the mean.
        is_logits = name == "attention_logits"
        limit = 2 * max(TOLERANCES[tensor.dtype], is_logits * TOLERANCES[inputs.value.dtype])
        assert relative_error(tensor, expected[name]) <= limit, name


def every_subset(names):
    return itertools.chain(*(itertools.combinations(names, n) for n in range(len(names) + 1)))


def assert_all_same_bits(actual, expected):
    for name, tensor in actual.items():
        if name != "summed":  # by atomic additions, in any order
            assert_same_bits(tensor, expected[name])


# ---- against the reference -----------------------------------------------------------------------


@every_dtype
@some_forms
@pytest.mark.parametrize("capability", executor.CAPABILITIES, ids="sm_{}".format)
@pytest.mark.parametrize(
    ("heads", "head_dim"),
    [(16, 16), (8, 32), (4, 64), (3, 16), (3, 32), (3, 64), (2, 48), (1, 72), (1, 256)],
    ids=str,
)
def test_every_layout_of_lanes_matches_reference_in_every_order(
    make, heads, head_dim, capability, dtype
):
    sizes = dict(batch=2, num_queries=5, num_heads=heads, head_dim=head_dim, num_points=3)
    inputs = off_edges(make([(4, 6), (3, 2)], **sizes, dtype=dtype))
    results = [
        compute_all(inputs, executor.make_device(order=order, compute_capability=capability))
        for order in executor.ORDERS
    ]
    expected = compute_all_exactly(inputs)
    for result in results:
        assert_all_close(inputs, result, expected)
        assert_all_same_bits(result, results[0])


@every_dtype
@every_form
@pytest.mark.parametrize("head_dim", [16, 20])
def test_every_subset_of_gradients_has_the_bits_of_all_together(make, head_dim, dtype):
    inputs = make(SHAPES, **SIZES | {"head_dim": head_dim}, dtype=dtype)
    output, grad_output = executor.forward(inputs), random_like_output(inputs)
    names = gradient_names(inputs)
    for order in executor.ORDERS:
        gpu = executor.make_device(order=order)
        together = executor.backward(inputs, grad_output, names, gpu, output=output)
        for wanted in every_subset(names):
            some = executor.backward(inputs, grad_output, wanted, gpu, output=output)
            assert some.keys() == set(wanted)
            for name in wanted:
                assert_same_bits(some[name], together[name])


def test_a_backward_of_which_nothing_is_wanted_launches_nothing():
    inputs = make_fused_inputs(SHAPES, **SIZES)
    gpu = executor.make_device()
    executor.backward(
        inputs, random_like_output(inputs), [], gpu, output=random_like_output(inputs)
    )
    assert gpu.num_launches == 0


@every_form
def test_results_without_samples_are_zero(make):
    results = compute_all(make(SHAPES, **SIZES | {"num_points": 0}))
    assert results["output"].shape == (2, 13, 60)
    for name, tensor in results.items():
        assert tensor.eq(0).all(), name


@sixteen_bits
def test_every_16_bit_number_is_read_and_rounded_right(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(1, 1, 1, -1)
    # Times 3/2, one number in two lies half-way between two others.
    for factor in (1.0, 1.5, 1.25, 0.1, 2.0**-10, 3e4):
        weights = torch.full((1, 1, 1, 1, 1), factor)
        inputs = Inputs(numbers, [(1, 1)], torch.full((1, 1, 1, 1, 1, 2), 0.5), weights)
        expected = (numbers.float() * factor).to(dtype).flatten(2)
        assert_same_bits(executor.forward(inputs)[:, 0], expected[:, 0])


# ---- which thread does what ----------------------------------------------------------------------


@some_forms
@pytest.mark.parametrize("head_dim", [16, 20])
@pytest.mark.parametrize("num_queries", [None, 200], ids=["pyramid", "row"])
def test_results_do_not_depend_on_the_size_of_the_gpu(make, num_queries, head_dim):
    # For a small GPU this is a large problem: tiles of 8 x 8 pixels, or of 64 queries. For a large
    # one it is small.
    sizes = dict(batch=2, num_queries=num_queries, num_heads=4, head_dim=head_dim, num_points=2)
    inputs = off_edges(make([(11, 9), (3, 10), (1, 5)], **sizes))
    # How many sub-warps share the work does change the order of a sum.
    small, other, large = (
        compute_all(inputs, executor.make_device(num_multiprocessors=count), split=1)
        for count in (1, 3, 132)
    )
    assert_all_close(inputs, small, compute_all_exactly(inputs))
    assert_all_same_bits(other, small)
    assert_all_same_bits(large, small)
    for tile_heads in (1, 2, 4):
        gpu = executor.make_device(num_multiprocessors=1)
        assert_all_same_bits(compute_all(inputs, gpu, split=1, tile_heads=tile_heads), small)


@every_dtype
@some_forms
@pytest.mark.parametrize("head_dim", [16, 20])
def test_samples_of_a_query_may_be_split_among_sub_warps(make, head_dim, dtype):
    sizes = dict(batch=2, num_queries=3, num_heads=2, head_dim=head_dim, num_points=[5, 1, 8])
    inputs = off_edges(make(SHAPES, **sizes, dtype=dtype))
    expected = compute_all_exactly(inputs)
    # Two lanes hold 16 channels of 16 bits, and a warp 16 such pairs.
    splits = (1, 2, 4, 16) if head_dim * dtype.itemsize == 32 else (1, 2, 4)
    orders = zip(executor.ORDERS, itertools.cycle(executor.CAPABILITIES), strict=False)
    for split, (order, capability) in itertools.product(splits, orders):
        gpu = executor.make_device(order=order, compute_capability=capability)
        assert_all_close(inputs, compute_all(inputs, gpu, split=split), expected)


@pytest.mark.parametrize(
    ("dtype", "num_points", "splits"),
    [
        # In float32 a round moves twice as much as in 16 bits, so that fewer warps are enough, and
        # has 8 samples of a query and head, in 16 bits 4: no part is without a round.
        (torch.float32, 8, {4: 1, 32: 2, 132: 2}),
        (torch.float32, 4, {4: 1, 32: 1, 132: 1}),
        (torch.float16, 8, {4: 1, 8: 2, 16: 4, 132: 4}),
        (torch.float16, 6, {4: 1, 8: 2, 16: 2, 132: 2}),
    ],
    ids=str,
)
def test_samples_are_split_until_there_are_warps_enough(dtype, num_points, splits):
    sizes = dict(num_queries=64, num_heads=8, num_points=num_points, dtype=dtype)
    inputs = make_inputs(SHAPES[:2], **sizes)
    unsplit = 64 * 8 * 32 * dtype.itemsize // 16 // 128  # lanes of 16 bytes, blocks of 128
    for multiprocessors, split in splits.items():
        gpu = executor.make_device(num_multiprocessors=multiprocessors)
        executor.forward(inputs, gpu)
        assert gpu.num_blocks == split * unsplit, multiprocessors


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_warps_beyond_the_map_do_nothing(direction):
    # Tiles of 8 x 8 pixels over 8 x 9: of the second, one pixel of each row is on the map. Two
    # warps, with four pixels of one head each, serve a row.
    inputs = make_inputs([(8, 9)], num_heads=8, num_points=16, locations="local")
    gpu = executor.make_device(num_multiprocessors=1, counts_memory=True)
    if direction == "forward":
        executor.forward(inputs, gpu)
    else:
        executor.backward(inputs, random_like_output(inputs), ["value"], gpu)
    (places,) = (
        entry
        for entry in gpu.traffic
        if (entry["array"], entry["kind"], entry["bytes"]) == ("shared memory", "store", 8)
    )
    live_warps, rounds = 8 * (8 * 2 + 8 * 1), 2
    assert places["requests"] == live_warps * rounds


def test_no_block_works_for_two_images():
    # A block has room for many queries, but not for those of the next image: it would read the
    # wrong value.
    for num_queries in (1, 3, 33):
        inputs = off_edges(make_inputs(SHAPES, **SIZES | {"num_queries": num_queries}))
        expected = compute_all(inputs)
        for image in range(inputs.value.shape[0]):
            poisoned = torch.full_like(inputs.value, math.nan)
            poisoned[image] = inputs.value[image]
            results = compute_all(replace(inputs, value=poisoned))
            for name in results:
                assert_same_bits(results[name][image], expected[name][image])


@every_dtype
@pytest.mark.parametrize("head_dim", [16, 20])
def test_samples_outside_leave_nothing_of_earlier_ones_in_the_softmax(head_dim, dtype):
    # The shared memory for a sample held others before: one that wrote nothing there would have
    # the gradient of an earlier one.
    sizes = dict(batch=2, num_queries=40, num_heads=4, head_dim=head_dim, num_points=3)
    inputs = off_edges(make_fused_inputs(SHAPES, **sizes, dtype=dtype))
    inputs.sampling_offsets[:, 1::2, :, :, 1::2] = 1e4
    results = compute_all(inputs, executor.make_device(num_multiprocessors=1))
    assert_all_close(inputs, results, compute_all_exactly(inputs))


# ---- levels --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@every_form
def test_shapes_on_the_device_give_the_same_bits(make, dtype):
    for shapes in (SHAPES, [(2, 3)] * 18):
        inputs = off_edges(make(shapes, **SIZES))
        assert_all_same_bits(compute_all(inputs, device_shapes=dtype), compute_all(inputs))


@some_forms
@pytest.mark.parametrize("device_shapes", ["", "int64"], ids=["host", "device"])
@pytest.mark.parametrize("num_levels", [15, 16, 17, 33])
def test_any_number_of_levels_is_accepted(make, num_levels, device_shapes):
    shapes = [(1 + level % 4, 1 + level % 3) for level in range(num_levels)]
    num_points = [level % 3 for level in range(num_levels)]
    inputs = off_edges(make(shapes, **SIZES | {"num_points": num_points}))
    results = compute_all(inputs, device_shapes=device_shapes)
    assert_all_close(inputs, results, compute_all_exactly(inputs))


@pytest.mark.parametrize("dtype", ["int64", "int32"])
@pytest.mark.parametrize(
    "shapes",
    [
        [(6, 9), (3, 5), (2, 3)],
        [(6, 9), (3, 5), (1, 2)],
        [(6, 9), (3, 5), (2, 0)],
        [(6, 9), (-3, -5), (2, 2)],
        [(2**31 - 1, 2**31 - 1), (3, 5), (2, 2)],
        [(2**30, 4), (3, 5), (2, 2)],
    ],
    ids=str,
)
def test_shapes_on_the_device_that_do_not_cover_value_are_refused(shapes, dtype):
    # The host does not see them: the kernel that reads them stops.
    inputs = replace(make_inputs(SHAPES, **SIZES), spatial_shapes=shapes)
    with pytest.raises(RuntimeError, match=r"spatial_shapes must .*cover the S keys of value"):
        executor.forward(inputs, device_shapes=dtype)


# ---- memory --------------------------------------------------------------------------------------


@every_dtype
@some_forms
@pytest.mark.parametrize("head_dim", [16, 24])
def test_arrays_need_not_be_aligned_to_vectors(make, head_dim, dtype):
    inputs = off_edges(make(SHAPES, **SIZES | {"head_dim": head_dim}, dtype=dtype))
    expected = compute_all_exactly(inputs)
    for array in ("value", "output", "weights", "grad_output", "grad_value"):
        assert_all_close(inputs, compute_all(inputs, misaligned={array}), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("head_dim", "width"), [(32, 2048), (264, 256)], ids=["32", "264"])
def test_offsets_into_value_have_64_bits(head_dim, width, dtype):
    # The second level of image 0, and all of image 1, lie beyond 2^31 elements. The last pixel of
    # each large level and the second levels are a small problem of their own.
    shapes, heads = [(4096, width), (2, 2)], 8
    sizes = dict(batch=2, num_heads=heads, head_dim=head_dim, num_points=1, dtype=dtype)
    small = off_edges(make_inputs([(1, 1), (2, 2)], **sizes, num_queries=3), 0.2)
    small.sampling_locations[:, :, :, 0] = 0.5
    keys = sum(height * width for height, width in shapes)
    first = keys - small.value.shape[1]
    assert (first + 1) * heads * head_dim >= 2**31
    try:  # What is not touched of a large array takes no memory, if the system plays along.
        zeros = np.zeros((2, keys, heads, head_dim), {2: np.uint16, 4: np.float32}[dtype.itemsize])
        np.zeros(zeros.shape, np.float32)
    except MemoryError:
        pytest.skip("needs 18 GB of memory, though it hardly touches it")
    value = torch.from_numpy(zeros).view(dtype)
    value[:, first:] = small.value
    locations = small.sampling_locations.clone()
    locations[:, :, :, 0] = torch.tensor([1 - 0.5 / width, 1 - 0.5 / 4096])
    large = replace(small, value=value, spatial_shapes=shapes, sampling_locations=locations)

    assert_close(executor.forward(large, in_place={"value"}), compute_exactly(small))
    grad_output = random_like_output(small)
    gradients = executor.backward(
        large, grad_output, ["value", "attention_weights"], in_place={"value", "grad_value"}
    )
    expected = exact_gradients(small, grad_output)
    assert_close(gradients["value"][:, first:], expected["value"])
    assert gradients["value"][:, :5].eq(0).all()
    assert_close(gradients["attention_weights"], expected["attention_weights"])


def test_offsets_into_the_padding_mask_have_64_bits():
    # Image 2 begins at 2^31.
    side, images = 2**15, 3
    try:
        value = np.zeros((images, side * side, 1, 1), np.uint16)
        padding = np.zeros((images, side * side), np.bool_)
    except MemoryError:
        pytest.skip("needs 10 GB of memory, though it hardly touches it")
    inputs = FusedInputs(
        value=torch.from_numpy(value).view(torch.bfloat16),
        spatial_shapes=[(side, side)],
        reference_points=torch.full((images, 1, 1, 2), 1 - 0.5 / side),
        sampling_offsets=torch.zeros(images, 1, 1, 1, 1, 2),
        attention_logits=torch.zeros(images, 1, 1, 1, 1),
        padding_mask=torch.from_numpy(padding),
    )
    inputs.value[:, -1] = 1
    inputs.padding_mask[2, -1] = True
    output = executor.forward(inputs, in_place={"value", "padding_mask"})
    assert output.flatten().tolist() == [1, 1, 0]


@every_dtype
@some_forms
def test_sanitized_kernels_stay_within_their_arrays(make, dtype):
    # The next test runs this one under sanitizers.
    def run(order, misaligned=(), device_shapes="", capability=75, **sizes):
        inputs = make(SHAPES, batch=2, num_queries=7, **sizes, dtype=dtype)
        points = inputs.tensors()[-2]
        points.view(-1)[:6] = torch.tensor([math.nan, 0, math.inf, 1e30, -1e30, 2.0**31])
        options = dict(misaligned=set(misaligned), device_shapes=device_shapes)
        gpu = executor.make_device(order=order, compute_capability=capability)
        results = compute_all(inputs, gpu, **options)
        for name, tensor in results.items():
            assert tensor.isfinite().all(), name

    run("forward", num_heads=8, head_dim=32, num_points=3)
    run("reverse", num_heads=16, head_dim=16, num_points=3)
    run("reverse", num_heads=8, head_dim=32, num_points=3, capability=90)
    run("reverse", num_heads=2, head_dim=19, num_points=1)
    run("random", num_heads=1, head_dim=72, num_points=2, device_shapes="int64")
    run("random", num_heads=1, head_dim=72, num_points=2, capability=90)
    for array in ("value", "output", "grad_output", "grad_value"):
        run("forward", num_heads=3, head_dim=16, num_points=[2, 0, 5], misaligned=[array])


@every_dtype
@some_forms
def test_sanitized_kernels_touch_no_gradient_that_is_not_wanted(make, dtype):
    # And compute nothing with the null pointer that stands for it.
    for head_dim in (16, 20):
        sizes = SIZES | {"num_queries": 3, "head_dim": head_dim, "num_points": 2}
        inputs = make([(3, 4), (2, 2)], **sizes, dtype=dtype)
        output, grad_output = executor.forward(inputs), random_like_output(inputs)
        for wanted in every_subset(gradient_names(inputs)):
            executor.backward(inputs, grad_output, wanted, output=output)


def test_kernels_pass_the_sanitizers():
    # Buffers have exactly the size of their arrays: reading one byte more is an error, as is a
    # misaligned vector, a number too large for its integer, or a pointer to the host's memory.
    command = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__, "-k", "sanitized"]
    done = subprocess.run(
        [sys.executable, *command],
        env=executor.sanitized_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-8000:]


# ---- launches ------------------------------------------------------------------------------------


def test_a_call_is_one_launch():
    inputs = make_fused_inputs(SHAPES, **SIZES)
    gpu = executor.make_device()
    output = executor.forward(inputs, gpu)
    assert gpu.num_launches == 1
    grad_output = random_like_output(inputs)
    names = ["value", "sampling_offsets", "attention_logits"]
    executor.backward(inputs, grad_output, names, gpu, output=output)
    assert gpu.num_launches == 2
    executor.backward(inputs, grad_output, gradient_names(inputs), gpu, output=output)
    assert gpu.num_launches == 4  # and one for the reference points


NO_KERNEL_IMAGE, LAUNCH_FAILURE = 209, 719


@pytest.mark.parametrize("error", [NO_KERNEL_IMAGE, LAUNCH_FAILURE], ids=["image", "failure"])
def test_failed_launches_raise_and_leave_no_error_behind(error):
    message = {NO_KERNEL_IMAGE: "no kernel image", LAUNCH_FAILURE: "unspecified launch failure"}
    inputs = make_fused_inputs(SHAPES, **SIZES)
    output, grad_output = executor.forward(inputs), random_like_output(inputs)
    calls = [
        lambda gpu: executor.forward(inputs, gpu, device_shapes="int64"),
        lambda gpu: executor.backward(
            inputs, grad_output, gradient_names(inputs), gpu, output=output, device_shapes="int64"
        ),
        lambda gpu: executor.gather(inputs, grad_output, gpu, device_shapes="int64"),
    ]
    for run in calls:
        good = executor.make_device()
        run(good)
        for launches in range(good.num_launches):
            gpu = executor.make_device(launch_error=error, launches_before_error=launches)
            with pytest.raises(RuntimeError, match=f"launch a CUDA kernel: {message[error]}"):
                run(gpu)
            assert gpu.last_error == 0
            assert gpu.num_launches == launches


def empty_inputs(*, keys=1, heads=1, head_dim=1, queries=1, samples=1):
    return Inputs(
        torch.empty(0, keys, heads, head_dim),
        [(1, 1)],
        torch.empty(0, queries, heads, samples, 2),
        torch.empty(0, queries, heads, samples),
        [samples],
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (empty_inputs(keys=2**31), "value must hold fewer than 2.31 keys on CUDA, got 2147483648"),
        (empty_inputs(heads=2**20, head_dim=2**8), "value must hold fewer than 2.28 channels"),
        (empty_inputs(samples=2**30), "the points must be fewer than 2.30"),
        (replace(empty_inputs(), spatial_shapes=[(1, 2**28)]), "less than 2.28 wide on CUDA, got"),
    ],
    ids=["keys", "channels", "samples", "width"],
)
def test_problems_too_large_for_the_kernels_are_refused(inputs, message):
    with pytest.raises(RuntimeError, match=message):
        executor.forward(inputs)
    with pytest.raises(RuntimeError, match=message):
        executor.backward(inputs, random_like_output(inputs), ["value"])


SORTED = dict(batch=2, queries=3, heads=8, samples=4, shape=(5, 7), shapes_on_device=False)


def test_what_is_sorted_for_a_deterministic_gradient():
    sort_sizes = executor.load().sort_sizes
    assert sort_sizes(**SORTED) == (2 * 3 * 8 * 4, 2 * 8 * 6 * 8)
    assert sort_sizes(**SORTED | {"shapes_on_device": True}) == (2 * 3 * 8 * 4, 2 * 8 * 4 * 35)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (dict(queries=2**25), "the points must be fewer than 2.31 .* on CUDA, got 2147483648"),
        (dict(shape=(2**13 - 1, 2**14 - 1)), "value must have fewer than 2.31 cells .*, got 2147"),
        (dict(shape=(2**12, 2**13), shapes_on_device=True), "than 2.31 cells .*, got 2147483648"),
    ],
    ids=["samples", "cells", "device"],
)
def test_problems_too_large_to_sort_are_refused(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        executor.load().sort_sizes(**SORTED | sizes)
