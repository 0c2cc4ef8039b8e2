"""The real sizes by name, and the locations that they sample."""

import pytest
import torch

from benchmarks import workloads
from benchmarks.common import floors
from msda.testing import make_inputs


@pytest.mark.parametrize("locations", ["initial", "clustered"])
@pytest.mark.parametrize("num_points", [4, [3, 6, 3]])
def test_locations_differ_between_queries_and_lie_mostly_on_the_map(locations, num_points):
    shapes = [(40, 60), (20, 30), (10, 15)]
    inputs = make_inputs(shapes, locations=locations, num_points=num_points)
    points = inputs.sampling_locations.flatten(3, -2)  # (B, Q, M, K, 2)
    assert points.shape == (1, 3150, 8, 12, 2)
    inside = ((points > 0) & (points < 1)).all(-1).float().mean().item()
    assert 0.7 < inside < 1
    assert points.std(1).min() > 0.02, "queries look at different places"
    again = make_inputs(shapes, locations=locations, num_points=num_points)
    assert torch.equal(again.sampling_locations, inputs.sampling_locations)


def test_unknown_locations_are_refused():
    with pytest.raises(ValueError, match=r"locations must be one of uniform, .* got 'far'"):
        make_inputs([(4, 4)], locations="far")
    with pytest.raises(ValueError, match="num_queries must be None for initial locations, got one"):
        make_inputs([(4, 4)], locations="initial", num_queries=3)


def test_clustered_locations_share_more_rows_than_uniform_ones():
    shapes = [(100, 167), (50, 84)]
    touched = {}
    for locations in ("uniform", "clustered"):
        inputs = make_inputs(shapes, locations=locations, num_queries=900)
        touched[locations] = floors.count_reads(inputs).touched_rows
    assert touched["clustered"] < 0.8 * touched["uniform"]


def test_every_workload_is_real_and_shrinks():
    for workload in workloads.GPU_WORKLOADS.values():
        assert workload.source
        tiny = workload.tiny()
        inputs = tiny.plain(torch.float32)
        assert inputs.value.shape[2:] == (
            workload.sizes.get("num_heads", 8),
            workload.sizes.get("head_dim", 32),
        )
        if workload.has_fused:
            assert tiny.fused(torch.float16).value.dtype == torch.float16
