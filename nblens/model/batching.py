"""`Batching`: how a model may be fed without changing what it computes; `packed`: how many items fit a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

__all__ = ["Batching", "packed"]


@dataclass(frozen=True)
class Batching:
    """What may be done with prompts without changing what the model makes of them.

    Most decoders allow everything. A state-space model carries padding along in its state.
    """

    rows: Literal["padded", "equal", "alone"] = "padded"
    """which prompts may share a batch: any, padded on the left; those of equal length; none"""
    stepwise: bool = True
    """a prompt may be fed in several steps"""
    positions: bool = True
    """positions, counted from 0, may be given; else the model counts its own"""

    @property
    def masked(self) -> bool:
        """Whether the model is told where padding is; without padding some state-space models take no mask."""
        return self.rows == "padded"

    def groups(self, prompts: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """Row numbers that may be fed together; by length, the shortest first, where not all may."""
        if self.rows == "padded":
            return [tuple(range(len(prompts)))]
        if self.rows == "alone":
            return [(row,) for row in range(len(prompts))]
        by_length: dict[int, list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            by_length[len(prompt)].append(row)
        return [tuple(by_length[length]) for length in sorted(by_length)]

    def fewest(self, rows: int, width: int) -> int:
        """The fewest tokens, over all rows, that one step over prompts of some width may hold."""
        return rows if self.stepwise else rows * width


def packed(lengths: Sequence[int], tokens: int, *, rows: int = 1, most: int | None = None) -> Iterator[range]:
    """Cut a sequence of items into runs of neighbours that fit into one padded batch each; an item too long is alone.

    >>> list(packed([3, 3, 4, 9], 8))
    [range(0, 2), range(2, 3), range(3, 4)]

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each item's longest row.
    tokens : int
        Most tokens of a batch, padding counted.
    rows : int
        Of an item.
    most : int, optional
        Items of a batch.
    """
    start = width = 0
    for number, length in enumerate(lengths):
        count, width = number - start, max(width, length)
        if count and ((count + 1) * rows * width > tokens or count == most):
            yield range(start, number)
            start, width = number, length
    if lengths:
        yield range(start, len(lengths))
