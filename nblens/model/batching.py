"""`Batching`: how a model may be fed without changing what it computes; `packed`: how many items fit a batch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from nblens.errors import UserError
from nblens.model.leftovers import Leftovers

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
    longest: int | None = None
    """most tokens of a text whose positions are coded as those of short ones; None: however long. A longer text is fed
    in one step, apart from shorter ones: what was cached of it before would not fit"""
    varies: bool = False
    """beyond `longest` each length has a code of its own"""
    leftovers: Leftovers = field(default_factory=Leftovers, compare=False)
    """what the model keeps from one request to the next, outside its cache: put back before each"""

    @property
    def masked(self) -> bool:
        """Whether the model is told where padding is; without padding some state-space models take no mask."""
        return self.rows == "padded"

    def groups(self, prompts: Sequence[Sequence[int]], *, equal: bool = False) -> list[tuple[int, ...]]:
        """Row numbers that may be fed together; by length, the shortest first, where not all may.

        `equal`: only prompts of one length, whatever the model allows.
        """
        if self.rows == "alone":
            return [(row,) for row in range(len(prompts))]
        alike: dict[tuple[bool, int], list[int]] = defaultdict(list)
        for row, prompt in enumerate(prompts):
            length, long = len(prompt), self._is_long(len(prompt))
            unpadded = equal or self.rows == "equal" or (long and self.varies)
            alike[long, length if unpadded else 0].append(row)
        return [tuple(alike[kind]) for kind in sorted(alike)]

    def at_once(self, width: int) -> bool:
        """Whether a prompt so long must be fed in one step."""
        return not self.stepwise or self._is_long(width)

    def fewest(self, rows: int, width: int) -> int:
        """The fewest tokens, over all rows, that one step over prompts of some width may hold."""
        return rows * width if self.at_once(width) else rows

    def _is_long(self, length: int) -> bool:
        return self.longest is not None and length > self.longest

    def check_growth(self, length: int, new_tokens: int) -> None:
        """Raise `UserError` where a text cannot go on for so long over what is cached of it."""
        if self.longest is None or not self._is_long(length + new_tokens - 1):  # the last token is not fed
            return
        if not self._is_long(length):
            raise UserError(
                f"a text of {length} tokens with {new_tokens} new ones passes {self.longest} tokens, beyond which this "
                f"model codes all positions anew; generate at most {self.longest - length + 1}"
            )
        if self.varies and new_tokens > 1:
            raise UserError(
                f"beyond {self.longest} tokens this model codes all positions anew at each length: a text of {length} "
                "tokens can be read, or go on for one token; shorten it to generate more"
            )


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
