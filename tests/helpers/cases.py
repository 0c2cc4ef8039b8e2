"""Sizes, forms and dtypes that tests are repeated over."""

import functools

import hypothesis.strategies as st
import pytest
import torch

from msda.testing import TOLERANCES, make_fused_inputs, make_inputs

# Small, and of sizes that are not told apart by chance.
SHAPES = [(6, 9), (3, 5), (2, 2)]
SIZES = dict(batch=2, num_queries=13, num_heads=3, head_dim=20, num_points=3)


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
