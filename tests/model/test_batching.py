"""`packed`: neighbours that fit into one padded batch."""

import pytest

from nblens.model.batching import packed


@pytest.mark.parametrize(
    ("lengths", "options", "expected"),
    [
        ([], {}, []),
        ([5, 5, 5], {"tokens": 10}, [[0, 1], [2]]),
        ([1, 4, 1, 1], {"tokens": 8}, [[0, 1], [2, 3]]),  # a short item takes the width of the longest beside it
        ([4, 1, 9, 1], {"tokens": 8}, [[0, 1], [2], [3]]),  # what is too long is fed alone
        ([3, 3, 3], {"tokens": 12, "rows": 2}, [[0, 1], [2]]),
        ([3, 3, 3], {"tokens": 5, "rows": 2}, [[0], [1], [2]]),
        ([1, 1, 1, 1, 1], {"tokens": 100, "most": 2}, [[0, 1], [2, 3], [4]]),
    ],
)
def test_batches_hold_as_many_neighbours_as_fit(lengths, options, expected):
    assert [list(batch) for batch in packed(lengths, **{"tokens": 8, **options})] == expected
