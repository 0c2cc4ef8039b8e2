"""How the work of a CPU call is split over 1 to 64 threads: counted, and the same bits."""

import math
import shutil
import subprocess
from pathlib import Path

import pytest

from msda.testing import make_fused_inputs, make_inputs, random_like_output
from tests.helpers.results import all_gradients, assert_same_bits, compute

pytestmark = pytest.mark.not_on_executor("the threads are the CPU kernels'")

# Queries, keys, heads, channels, samples of a query and head.
ENCODER = (22223, 22223, 8, 32, 16)
DECODER = (300, 22223, 8, 32, 16)
WIDE_DECODER = (900, 8400, 8, 32, 12)
ALL = {"encoder": ENCODER, "decoder": DECODER, "wide-decoder": WIDE_DECODER}
EVEN = 1.1  # the largest share over an even one


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Lines of split_of_work.cpp for a problem, as numbers."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler, to compile split_of_work.cpp")
    program = tmp_path_factory.mktemp("split") / "split_of_work"
    source = Path(__file__).with_name("split_of_work.cpp")
    subprocess.run([compiler, "-std=c++17", "-o", program, source], check=True)

    def lines(batch, sizes):
        arguments = [str(size) for size in (batch, *sizes)]
        done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
        return [[float(number) for number in line.split()] for line in done.stdout.splitlines()]

    return lines


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("batch", [1, 2, 8])
def test_rows_are_shared_evenly_by_any_number_of_threads(splits, name, batch):
    lines = splits(batch, ALL[name])
    assert len(lines) == 64
    for threads, (passes, *loops) in enumerate(lines, 1):
        forward, *backward = zip(loops[::2], loops[1::2], strict=True)
        assert forward[1] <= EVEN, threads
        if passes == 2:
            assert backward[0][1] <= EVEN, threads
        if name == "encoder":
            assert forward[0] == threads


@pytest.mark.parametrize("batch", [1, 2, 8])
def test_owners_of_the_gradient_of_value_are_shared_as_evenly_as_they_can_be(splits, batch):
    """A head, or 16 channels of it, is one thread's: the bound of a sum without atomics."""
    for threads, (passes, *loops) in enumerate(splits(batch, ENCODER), 1):
        owners = batch * 8 * (2 if passes == 2 else 1)
        at_work, share = loops[-2:]
        assert at_work == min(threads, owners)
        assert share == pytest.approx(math.ceil(owners / at_work) * at_work / owners, abs=1e-5)
        if owners >= 10 * threads or owners % at_work == 0:
            assert share <= EVEN, threads


def test_more_threads_than_heads_split_the_backward_in_two(splits):
    passes = [line[0] for line in splits(1, ENCODER)]
    assert passes[:6] == [1] * 6
    assert passes[7] == 1  # a head for each
    assert passes[15:] == [2] * 49
    passes = [line[0] for line in splits(8, ENCODER)]  # 64 heads
    assert passes[:48] == [1] * 48
    assert passes[59] == 2  # in one pass 32 threads would have two heads each, the others none
    assert passes[63] == 1


@pytest.mark.parametrize("make", [make_inputs, make_fused_inputs], ids=["plain", "fused"])
@pytest.mark.parametrize("num_points", [4, 1], ids=["16-samples", "4-samples"])
def test_the_bits_are_those_of_one_thread(make, num_points, set_threads):
    # Enough work for 64 threads with 16 samples; with 4, all heads of a query are walked together.
    shapes = [(24, 24), (12, 12), (6, 6), (3, 3)]
    inputs = make(shapes, batch=1, num_queries=2052, num_points=num_points)
    grad_output = random_like_output(inputs)
    set_threads(1)
    output, gradients = compute(inputs), all_gradients(inputs, grad_output)
    for threads in (2, 3, 5, 7, 8, 12, 16, 17, 31, 32, 48, 64):
        set_threads(threads)
        assert_same_bits(compute(inputs), output)
        for name, gradient in all_gradients(inputs, grad_output).items():
            assert_same_bits(gradient, gradients[name])
