"""What the CUDA kernels ask of memory stays within its budget, and the gate can fail."""

import copy
import json

import numpy as np
import pytest
import torch

from msda.testing import make_inputs, random_like_output
from tests.cuda import memory_traffic
from tests.cuda.memory_traffic import BUDGET, WORKLOADS, measure, over_budget
from tests.helpers import executor

pytestmark = pytest.mark.executor

budget = json.loads(BUDGET.read_text())


# ---- the counts ----------------------------------------------------------------------------------


def rows_of_warps(inputs, queries_per_warp):
    """(query groups, heads, samples, corners) sets of keys that the queries of a warp read."""
    (locations,) = inputs.sampling_locations.double().numpy()  # (Q, M, L, P, 2)
    queries, heads, levels, points, _ = locations.shape
    rows = np.full((queries, heads, levels, points, 4), -1)
    start = 0
    for level, (height, width) in enumerate(inputs.spatial_shapes):
        x = locations[:, :, level, :, 0] * width - 0.5
        y = locations[:, :, level, :, 1] * height - 0.5
        counts = (x > -1) & (x < width) & (y > -1) & (y < height)
        for corner in range(4):
            column = np.floor(x) + corner % 2
            row = np.floor(y) + corner // 2
            inside = counts & (column >= 0) & (column < width) & (row >= 0) & (row < height)
            rows[:, :, level, :, corner][inside] = (start + row * width + column)[inside]
        start += height * width
    grouped = rows.reshape(queries // queries_per_warp, queries_per_warp, heads, -1)
    return [
        set(grouped[group, :, head, i].tolist()) - {-1}
        for group in range(grouped.shape[0])
        for head in range(heads)
        for i in range(grouped.shape[3])
    ]


@pytest.mark.parametrize(
    ("dtype", "capability", "words"),
    [(torch.float32, 75, 1), (torch.float32, 90, 4)],
    ids=["sm_75", "sm_90"],
)
@pytest.mark.parametrize("order", executor.ORDERS)
def test_counts_of_pixels_and_reductions_are_those_of_the_locations(
    order, dtype, capability, words
):
    # 32 channels in float32 are a line of value, which eight lanes read: a warp serves four
    # neighbouring queries of one head, and each of their corners is a request of its own.
    inputs = make_inputs([(9, 7), (4, 5)], num_queries=32, num_heads=8, num_points=2, dtype=dtype)
    device = executor.make_device(order=order, counts_memory=True, compute_capability=capability)
    executor.backward(inputs, random_like_output(inputs), ["value"], device, split=1)
    warps = [rows for rows in rows_of_warps(inputs, 4) if rows]
    by_access = {(entry["array"], entry["kind"]): entry for entry in device.traffic}
    pixels, reductions = by_access["value", "load"], by_access["grad_value", "reduction"]
    lines = sum(len(rows) for rows in warps)
    assert (pixels["requests"], pixels["lines"]) == (len(warps), lines)
    assert (pixels["sectors"], pixels["least_sectors"]) == (4 * lines, 4 * lines)
    assert reductions["requests"] == 4 // words * len(warps)
    assert reductions["bytes"] == 4 * words
    assert reductions["lanes"] * words == pixels["lanes"] * 4


def test_kernels_of_bfloat16_ask_for_what_those_of_float16_do():
    for name in ("decoder-300", "head-dim-24"):
        workload = WORKLOADS[name].scaled(1000)
        for direction in ("forward", "backward"):
            counts = [
                memory_traffic.count(workload, dtype, direction, "sm_90")
                for dtype in (torch.float16, torch.bfloat16)
            ]
            assert counts[0] == counts[1]


# ---- the gate ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traffic():
    executor.load()
    return measure(WORKLOADS, budget["samples"])


def test_kernels_are_within_the_budget(traffic):
    assert not list(over_budget(traffic, budget))


def test_budget_has_nothing_that_is_not_counted(traffic):
    assert budget["traffic"].keys() == traffic.keys()
    for name, cases in traffic.items():
        assert budget["traffic"][name].keys() == cases.keys()


def test_file_of_the_budget_is_as_it_would_be_written():
    assert memory_traffic.format_budget(budget) == BUDGET.read_text()


WORKLOAD, CASE = "decoder-300", "backward, float32, sm_75"


@pytest.mark.parametrize(
    ("name", "count", "message"),
    [
        ("outputs", "sectors", "outputs: sectors of a sample must be at most"),
        ("pixels", "requests", "pixels: requests of a sample must be at most"),
        ("shared memory", "sectors", "shared memory: wavefronts of a sample must be at most"),
    ],
)
def test_more_than_the_margin_is_over_the_budget(name, count, message):
    counted = {WORKLOAD: copy.deepcopy(budget["traffic"][WORKLOAD])}
    counts = counted[WORKLOAD][CASE][name]
    counts[count] *= 1 + budget["margin"] / 2
    assert not list(over_budget(counted, budget))
    counts[count] *= 1 + budget["margin"]
    (wrong,) = over_budget(counted, budget)
    assert wrong.startswith(f"{WORKLOAD}, {CASE}: {message}")


def test_what_must_fill_its_sectors_must_do_so_even_if_the_budget_says_less():
    recorded = copy.deepcopy(budget)
    recorded["full"] = {"decoder-*, backward*": {"reductions": 1.05}}
    counts = recorded["traffic"][WORKLOAD][CASE]["reductions"]
    counts["sectors"] = 2 * counts["least"]
    counted = {WORKLOAD: copy.deepcopy(recorded["traffic"][WORKLOAD])}
    wrong = [text for text in over_budget(counted, recorded) if CASE in text]
    assert len(wrong) == 1
    assert "reductions must take at most 1.05 times the sectors that their bytes fill" in wrong[0]


def test_a_class_that_appears_or_disappears_must_be_looked_at():
    counted = {WORKLOAD: copy.deepcopy(budget["traffic"][WORKLOAD])}
    counted[WORKLOAD][CASE]["scratch"] = counted[WORKLOAD][CASE].pop("outputs")
    wrong = list(over_budget(counted, budget))
    assert len(wrong) == 2
    assert all("must be in the budget and in the code, got one of them" in text for text in wrong)


def test_an_array_without_a_class_is_an_error():
    with pytest.raises(KeyError, match="must have a class of store"):
        memory_traffic.class_of("points", "store")


def test_command_line_says_what_is_over(capsys, tmp_path, monkeypatch):
    executor.load()
    lower = copy.deepcopy(budget)
    lower["traffic"][WORKLOAD][CASE]["pixels"]["sectors"] /= 2
    path = tmp_path / "budget.json"
    path.write_text(memory_traffic.format_budget(lower))
    monkeypatch.setattr(memory_traffic, "BUDGET", path)
    assert memory_traffic.main(["check", "--workload", WORKLOAD]) == 1
    assert f"{WORKLOAD}, {CASE}: pixels: sectors of a sample must" in capsys.readouterr().out
    assert memory_traffic.main(["update", "--workload", WORKLOAD]) == 0
    assert path.read_text() == BUDGET.read_text()
