"""The least time that a call can take, on a GPU and on a CPU."""

from dataclasses import replace

import pytest
import torch

from benchmarks.common import floors
from msda.testing import PAPER_SHAPES, Inputs, make_inputs, reference

SMALL = [(5, 7), (3, 4)]


# ---- on a GPU ------------------------------------------------------------------------------------

# 132 multiprocessors at 1.755 GHz, 3.0 TB/s.
H100 = floors.Ceilings(3.0e12, 132, 1.755e9)


def encoder_on_meta(value_dtype, weights_dtype):
    keys = 22223
    locations = torch.empty(2, keys, 8, 4, 4, 2, device="meta")
    return Inputs(
        torch.empty(2, keys, 8, 32, dtype=value_dtype, device="meta"),
        PAPER_SHAPES,
        locations,
        torch.empty(locations.shape[:-1], dtype=weights_dtype, device="meta"),
    )


@pytest.mark.parametrize(
    ("dtype", "backward", "dram_us", "l1_us"),
    [
        (torch.float32, False, 53, 98),
        (torch.float16, False, 34, 49),
        (torch.float32, True, 91, 0),
    ],
)
def test_floors_of_the_encoder(dtype, backward, dram_us, l1_us):
    """Value, output and locations are 45.5 MB each in float32, weights 22.8 MB; 5.69 M samples."""
    inputs = encoder_on_meta(dtype, dtype)
    reads = floors.Reads(touched_rows=2 * 22223 * 8, corners=4 * 5_689_088)
    floor = floors.floors(inputs, reads, H100, backward=backward)
    assert round(floor["dram_ms"] * 1e3) == dram_us
    assert round(floor["l1_ms"] * 1e3) == l1_us
    assert floor["floor_ms"] == max(floor["dram_ms"], floor["l1_ms"])


def test_rates_of_the_l1_caches():
    assert H100.l1_bytes_per_second == pytest.approx(29.65e12, rel=1e-3)


def test_reads_counted_by_hand():
    # A map of 2 x 3 pixels, one head. The middle of the map lies on a row of pixels' centres, but
    # between rows: 4 corners. (0, 0) is a corner of the map: 1. Far away: none. Twice the same: 4.
    locations = torch.tensor([[0.5, 0.5], [0.0, 0.0], [9.0, 0.5], [0.5, 0.5]])
    inputs = Inputs(
        torch.ones(1, 6, 1, 4),
        [(2, 3)],
        locations.view(1, 4, 1, 1, 1, 2),
        torch.ones(1, 4, 1, 1, 1),
    )
    # x = 0.5 * 3 - 0.5 = 1: pixels 1 and 2 of both rows; and pixel 0 of row 0.
    assert floors.count_reads(inputs) == floors.Reads(touched_rows=5, corners=9)


def test_reads_agree_with_the_gradient_of_value():
    inputs = make_inputs(SMALL, batch=2, num_queries=9, num_heads=3, head_dim=2)
    value = inputs.value.clone().requires_grad_()
    reference(replace(inputs, value=value)).sum().backward()
    touched = value.grad.ne(0).any(-1).sum().item()
    assert floors.count_reads(inputs).touched_rows == touched


# ---- on a CPU ------------------------------------------------------------------------------------


def test_floors_of_a_cpu_follow_from_its_rates(monkeypatch):
    monkeypatch.setattr(floors, "copy_rate", lambda threads: 1e9 * threads)
    monkeypatch.setattr(floors, "load_rate", lambda: 2e9)
    inputs = make_inputs([(8, 8)], num_queries=10)  # 320 samples per level and point
    reads = floors.Reads(touched_rows=100, corners=0)
    samples = 10 * 8 * 4
    forward = floors.cpu_floors(inputs, reads, 2, backward=False)
    # Rows of 32 floats, locations and weights, and the output; all once.
    assert forward["bytes"] == 100 * 128 + samples * 3 * 4 + 10 * 256 * 4
    assert forward["copy_ms"] == pytest.approx(forward["bytes"] / 2e9 * 1e3)
    # Two vectors of 16 floats for each corner, its weight and its offset.
    assert forward["load_ms"] == pytest.approx(samples * 4 * 4 / 4e9 * 1e3)
    assert forward["floor_ms"] == max(forward["copy_ms"], forward["load_ms"])
    backward = floors.cpu_floors(inputs, reads, 1, backward=True)
    assert backward["load_ms"] == pytest.approx(samples * 4 * 8 / 2e9 * 1e3)
    half = floors.slots_per_sample(
        make_inputs([(8, 8)], num_queries=1, dtype=torch.float16), backward=True
    )
    assert half == 4 * (1 + 2 + 4), "sums of 16-bit gradients are float32"
    monkeypatch.setattr(floors, "load_rate", lambda: None)
    assert "load_ms" not in floors.cpu_floors(inputs, reads, 1, backward=False)
