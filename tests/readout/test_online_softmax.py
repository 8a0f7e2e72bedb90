"""The top-k by groups of columns, against `torch.topk`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nblens.readout.online_softmax import top_of_rows


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    columns=st.integers(1, 1500),
    k=st.integers(1, 12),
    spread=st.sampled_from([1, 3, 1000]),
    missing=st.sampled_from([0.0, 0.5, 0.99, 1.0]),
)
def test_the_largest_are_found_among_ties_and_missing_entries(seed, columns, k, spread, missing):
    generator, k = torch.Generator().manual_seed(seed), min(k, columns)
    tile = torch.randint(-spread, spread + 1, (2, 3, columns), generator=generator).float()
    tile[torch.rand(tile.shape, generator=generator) < missing] = -torch.inf
    values, places = top_of_rows(tile, k)
    assert torch.equal(values, tile.topk(k).values)
    assert torch.equal(tile.gather(-1, places), values)
    assert all(len(set(row.tolist())) == k for row in places.flatten(0, 1))


@pytest.mark.parametrize("column", [0, 63, 64, 1279, 1280, 1299])
def test_the_largest_is_found_wherever_it_is(column):
    tile = torch.zeros(1, 1300)  # 20 groups of 64 and 20 columns more
    tile[0, column] = 1.0
    assert top_of_rows(tile, 3)[1][0, 0] == column
