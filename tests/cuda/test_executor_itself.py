"""Kernels on the CPU behave as on a GPU, and what a GPU leaves undefined is an error."""

import subprocess
import sys

import pytest

from tests.helpers import executor

pytestmark = pytest.mark.executor


@pytest.fixture(scope="module")
def self_test():
    return executor.load().self_test


@pytest.fixture(params=["native", "ucontext"])
def make_device(request):
    def make(**options):
        return executor.load().Device(fibers=request.param, **options)

    return make


every_order = pytest.mark.parametrize("order", executor.ORDERS)


# ---- warps ---------------------------------------------------------------------------------------


@every_order
@pytest.mark.parametrize("type", ["int32", "uint32", "int64", "float32", "float64"])
@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_shuffle_reads_a_lane_of_the_own_group(make_device, self_test, order, type, width):
    sources = [(7 * lane + 3) % 64 - 16 for lane in range(32)]
    got = self_test.shuffle_index(make_device(order=order), type, sources, width)
    assert got == [100 + lane // width * width + sources[lane] % width for lane in range(32)]


@every_order
@pytest.mark.parametrize("type", ["int32", "float64"])
@pytest.mark.parametrize("lane_mask", [1, 5, 16, 31])
def test_xor_shuffle_swaps_lanes(make_device, self_test, order, type, lane_mask):
    got = self_test.shuffle_xor(make_device(order=order), type, lane_mask, 32)
    assert got == [100 + (lane ^ lane_mask) for lane in range(32)]


def test_xor_shuffle_reaches_earlier_groups_but_not_later_ones(make_device, self_test):
    got = self_test.shuffle_xor(make_device(), "float32", 8, 8)
    assert got == [100 + (lane ^ 8 if lane & 8 else lane) for lane in range(32)]


def test_warp_barrier_does_not_wait_for_lanes_that_have_exited(make_device, self_test):
    for order in executor.ORDERS:
        got = self_test.warp_barrier_after_exit(make_device(order=order))
        assert got[1::2] == [lane ^ 2 for lane in range(1, 32, 2)]


@pytest.mark.parametrize("threads", ["warp", "block"])
def test_missing_barrier_shows_in_some_order_of_lanes(make_device, self_test, threads):
    run = getattr(self_test, f"neighbours_in_{threads}")
    count = {"warp": 32, "block": 64}[threads]
    right = [(i + step) % count for i in range(count) for step in (-1, 1)]
    assert all(run(make_device(order=order), True) == right for order in executor.ORDERS)
    assert any(run(make_device(order=order), False) != right for order in executor.ORDERS)


# ---- blocks --------------------------------------------------------------------------------------


def test_shared_memory_holds_nan_at_the_start_of_each_block(make_device, self_test):
    for order in executor.ORDERS:
        found = self_test.unwritten_shared_memory(make_device(order=order), 3)
        assert found == [0xFFFFFFFF] * 6


def test_blocks_and_threads_have_three_indices(make_device, self_test):
    grid, block = [2, 3, 2], [4, 2, 3]
    device = make_device()
    numbers = self_test.indices_in_order_of_execution(device, grid, block)
    found = [tuple(numbers[i : i + 6]) for i in range(0, len(numbers), 6)]
    expected = [
        (bx, by, bz, x, y, z)
        for bz in range(2)
        for by in range(3)
        for bx in range(2)
        for z in range(3)
        for y in range(2)
        for x in range(4)
    ]
    assert found == expected
    assert (device.num_launches, device.num_blocks) == (1, 12)


def test_order_of_threads_and_blocks_is_as_asked_for(make_device, self_test):
    def indices(**options):
        return self_test.indices_in_order_of_execution(make_device(**options), [3, 1, 1], [5, 1, 1])

    def reversed_by_thread(numbers):
        return [n for i in range(len(numbers) - 6, -1, -6) for n in numbers[i : i + 6]]

    forward = indices()
    assert indices(order="reverse") == reversed_by_thread(forward)
    assert indices(order="random", seed=1) == indices(order="random", seed=1)
    assert indices(order="random", seed=1) != indices(order="random", seed=2)


def test_atomic_additions_of_all_threads_count(make_device, self_test):
    for order in executor.ORDERS:
        assert self_test.atomic_sums(make_device(order=order)) == [192, 3 * sum(range(64))]


# ---- what CUDA leaves undefined ------------------------------------------------------------------


@every_order
@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("shuffle_with_exited_lane", r"__shfl_sync \(self_test.cu:\d+, .*lane 5, which has exited"),
        ("shuffle_with_lane_past_the_end_of_the_block", "names lane 8, which has exited"),
        ("shuffle_reads_lane_that_is_not_named", "reads lane 16, which it does not name"),
        ("shuffle_is_called_by_lane_that_is_not_named", "does not name the lane that calls it, 0"),
        ("shuffle_by_a_width_of_12", "width must be a power of two up to 32, got 12"),
        ("shuffles_that_do_not_meet", "16 .* wait in __shfl_xor.* 16 .* wait in __shfl_xor"),
        ("barrier_after_exit_of_a_warp", "32 .* wait in __syncthreads .*, 32 have exited"),
        ("barriers_of_two_branches", "32 .* wait in __syncthreads .*, 32 .* wait in __syncthreads"),
        ("kernel_reads_nowhere", "thread 0 accessed memory that does not exist, at 0x1004"),
        ("barrier_against_shuffle", "1 .* wait in __shfl_sync .*, 31 .* wait in __syncthreads"),
    ],
)
def test_undefined_behaviour_is_reported(make_device, self_test, order, kernel, message):
    with pytest.raises(RuntimeError, match=message):
        getattr(self_test, kernel)(make_device(order=order))
    # And leaves nothing behind.
    assert self_test.atomic_sums(make_device(order=order)) == [192, 3 * sum(range(64))]


def test_barrier_outside_of_kernels_is_refused(make_device, self_test):
    with pytest.raises(RuntimeError, match=r"__syncthreads .* outside of a kernel"):
        self_test.barrier_outside_of_kernels(make_device())


# ---- the runtime ---------------------------------------------------------------------------------

NO_ERROR, INVALID_CONFIGURATION, LAUNCH_FAILURE = 0, 9, 719


def test_failed_launch_returns_its_error_once_and_then_as_the_last_error(make_device, self_test):
    device = make_device(launch_error=LAUNCH_FAILURE)
    errors = self_test.launch_errors(device, [1, 1, 1], [32, 1, 1])
    assert errors == [LAUNCH_FAILURE, LAUNCH_FAILURE, NO_ERROR]
    assert device.num_launches == 0


@pytest.mark.parametrize(
    ("grid", "block", "error"),
    [
        ([1, 1, 1], [1024, 1, 1], NO_ERROR),
        ([1, 1, 1], [1025, 1, 1], INVALID_CONFIGURATION),
        ([1, 1, 1], [1, 1, 65], INVALID_CONFIGURATION),
        ([0, 1, 1], [32, 1, 1], INVALID_CONFIGURATION),
        ([1, 1, 1], [32, 0, 1], INVALID_CONFIGURATION),
        ([1, 65536, 1], [1, 1, 1], INVALID_CONFIGURATION),
        ([1, 1, 65536], [1, 1, 1], INVALID_CONFIGURATION),
        ([2**31, 1, 1], [1, 1, 1], INVALID_CONFIGURATION),
    ],
)
def test_sizes_that_a_gpu_refuses_are_refused(make_device, self_test, grid, block, error):
    assert self_test.launch_errors(make_device(), grid, block)[0] == error


def test_work_on_another_stream_is_refused(make_device, self_test):
    with pytest.raises(RuntimeError, match="another stream"):
        self_test.launch_on_another_stream(make_device())


# ---- what warps ask of memory --------------------------------------------------------------------

STANDS_BY, GOES_ANOTHER_WAY = -1, -2


@pytest.fixture
def count(make_device, self_test):
    def count(*accesses, bytes=4, shared=False, barriers=False, order="forward"):
        device = make_device(counts_memory=True, order=order)
        rows = [[access(lane) for lane in range(32)] for access in accesses]
        self_test.count_accesses(device, rows, bytes, shared, barriers)
        (entry,) = device.traffic
        assert entry["array"] == ("shared memory" if shared else "array")
        assert (entry["kind"], entry["bytes"]) == ("load", bytes)
        return tuple(entry[name] for name in ("requests", "lanes", "sectors", "least_sectors"))

    return count


@every_order
@pytest.mark.parametrize(
    ("bytes", "place", "sectors", "least"),
    [
        (4, lambda lane: 4 * lane, 4, 4),
        (4, lambda lane: 4 * (31 - lane), 4, 4),
        (4, lambda lane: 4 * lane + 4, 5, 4),
        (4, lambda lane: 16 * lane, 16, 4),
        (4, lambda lane: 32 * lane, 32, 4),
        (4, lambda lane: 0, 1, 1),
        (2, lambda lane: 2 * lane, 2, 2),
        (16, lambda lane: 16 * lane, 16, 16),
        (16, lambda lane: 16 * lane + 8, 17, 16),
        (8, lambda lane: 128 * (lane // 4) + 8 * (lane % 4), 8, 8),
    ],
)
def test_sectors_of_an_access_of_a_warp(count, order, bytes, place, sectors, least):
    assert count(place, bytes=bytes, order=order) == (1, 32, sectors, least)


@every_order
@pytest.mark.parametrize(
    ("bytes", "place", "wavefronts", "least"),
    [
        (4, lambda lane: 4 * lane, 1, 1),
        (4, lambda lane: 8 * lane, 2, 1),
        (4, lambda lane: 128 * lane, 32, 1),
        (4, lambda lane: 0, 1, 1),
        (8, lambda lane: 8 * lane, 2, 2),
        (8, lambda lane: 16 * lane, 4, 2),
        (16, lambda lane: 16 * lane, 4, 4),
        (16, lambda lane: 64 * lane, 16, 4),
        (16, lambda lane: 0, 4, 4),
    ],
)
def test_wavefronts_of_an_access_to_shared_memory(count, order, bytes, place, wavefronts, least):
    assert count(place, bytes=bytes, shared=True, order=order) == (1, 32, wavefronts, least)


@every_order
@pytest.mark.parametrize("barriers", [False, True])
def test_lanes_that_stand_by_keep_their_turn(count, order, barriers):
    # Even lanes stand by, then all lanes access the next sectors, then odd lanes stand by.
    accesses = (
        lambda lane: 4 * lane if lane % 2 else STANDS_BY,
        lambda lane: 1024 + 4 * lane,
        lambda lane: STANDS_BY if lane % 2 else 2048 + 4 * lane,
        lambda lane: STANDS_BY,
    )
    got = count(*accesses, order=order, barriers=barriers)
    assert got == (3, 16 + 32 + 16, 4 + 4 + 4, 2 + 4 + 2)


@every_order
def test_lanes_that_go_another_way_are_behind_until_the_next_barrier(count, order):
    def away(lane):
        return GOES_ANOTHER_WAY if lane < 16 else 4 * lane

    def together(lane):
        return 1024 + 4 * lane

    # As lanes that leave a loop early: their next access at this place is one with the others'.
    assert count(away, together, order=order) == (2, 48, 2 + 2 + 2, 2 + 2 + 2)
    assert count(away, together, order=order, barriers=True) == (2, 48, 2 + 4, 2 + 4)


@every_order
def test_two_branches_are_two_accesses(make_device, self_test, order):
    device = make_device(counts_memory=True, order=order)
    self_test.count_in_two_branches(device)
    by_kind = {entry["kind"]: entry for entry in device.traffic}
    stores, reductions = by_kind["store"], by_kind["reduction"]
    # Of two warps.
    assert (stores["requests"], stores["lanes"], stores["sectors"]) == (4, 64, 16)
    assert (reductions["requests"], reductions["lanes"], reductions["lines"]) == (2, 64, 2)


LINE = 128


@pytest.fixture
def hits(self_test):
    """Sectors that loads found in an L1 of some lines: of one lane of a warp for each of the lines
    that are given, in this order, while the other lanes stand by.
    """

    def hits(lines, cache_lines, ways, is_hashed=False, sector=lambda i: 0):
        device = executor.load().Device(
            counts_memory=True, l1_bytes=cache_lines * LINE, l1_ways=ways, l1_is_hashed=is_hashed
        )
        places = [LINE * line + 32 * sector(i) for i, line in enumerate(lines)]
        rows = [[place] + [STANDS_BY] * 31 for place in places]
        self_test.count_accesses(device, rows, 4, False, False)
        (entry,) = device.traffic
        assert entry["sectors"] == len(lines)
        return entry["hits"]

    return hits


def test_l1_holds_the_lines_that_were_used_last(hits):
    # Four lines in one set: the fifth takes the place of the one that was not used for longest.
    assert hits([0, 1, 2, 3, 0, 1, 2, 3], 4, 4) == 4
    assert hits([0, 1, 2, 3, 4, 0], 4, 4) == 0
    assert hits([0, 1, 2, 3, 0, 4, 0, 1], 4, 4) == 2


def test_l1_holds_the_sectors_of_a_line_that_were_asked_for(hits):
    assert hits([0] * 8, 4, 4, sector=lambda i: i % 4) == 4


def test_lines_far_apart_share_a_set_unless_the_index_is_a_hash(hits):
    # Eight sets of one line: lines 8 apart are all of one set, unless hashed.
    lines = [8 * i for i in range(8)] * 2
    assert hits(lines, 8, 1) == 0
    assert hits(lines, 8, 1, is_hashed=True) == 8
    assert hits([*range(8)] * 2, 8, 1) == 8


def test_an_access_to_memory_that_is_no_array_is_an_error(make_device, self_test):
    device = make_device(counts_memory=True)
    with pytest.raises(RuntimeError, match="counts an access to memory that is no array"):
        self_test.count_accesses(device, [[1 << 30] * 32], 4, False, False)
    assert self_test.atomic_sums(make_device()) == [192, 3 * sum(range(64))]


# ---- sanitizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("kernel_reads_past_the_end", "heap-buffer-overflow"),
        ("kernel_reads_past_the_end_of_shared_memory", "index 32 out of bounds"),
        ("kernel_reads_host_memory", "use-after-poison"),
        ("host_reads_device_memory", "use-after-poison"),
        ("kernel_loads_a_vector_that_is_not_aligned", "misaligned address"),
    ],
)
def test_sanitizers_see_wrong_addresses(kernel, message):
    # Without PyTorch, which takes seconds to load.
    code = f"import _cuda_executor as m; m.self_test.{kernel}(m.Device())"
    environment = executor.sanitized_environment() | {
        "PYTHONPATH": str(executor.folder("sanitized"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert message in done.stderr
