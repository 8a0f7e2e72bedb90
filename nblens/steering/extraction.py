"""Reading each text of an extraction, and judging the directions that come of it."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch

from nblens.errors import UserError, shown
from nblens.model.generation import Batch
from nblens.specs import ExtractionSpec, Span

__all__ = [
    "WITH_SPECIAL",
    "Read",
    "Separation",
    "SpanReader",
    "best_block",
    "check_read",
    "data_hash",
    "dominant_token",
    "held_back",
    "mean_positions",
    "read_name",
    "read_span",
    "read_words",
    "shuffle_signs",
    "takes_special",
]

Read = str | int | slice | tuple[int, int]
"""Read position in a text: "last", "label", "mean", an index, or a span; a mean may end in "+special"."""

READ_POSITIONS = ("last", "label", "mean")

WITH_SPECIAL = "+special"
"""Ends a read position whose mean takes in special tokens and a text's first."""

FEWEST_TO_JUDGE = 8
"""With fewer contrast pairs, none is held back."""

_MOST_OF_MANY, _MOST_OF_TWO = 0.5, 0.8  # of a mean's norm that one token may carry

_SPAN = re.compile(r"\s*(-?\d+)\s*-\s*(-?\d+)\s*")


def read_span(read: Read, length: int, label: int | None = None) -> Span:
    """The positions of a text that are read: from a first up to, not including, a last.

    >>> read_span("3-7", 20), read_span((3, 8), 20), read_span(-2, 20), read_span("mean", 20)
    ((3, 8), (3, 8), (18, 19), (0, 20))

    A mean leaves some of these out, unless its name ends in "+special": see `mean_positions`.

    Parameters
    ----------
    read : {"last", "label", "mean"}, int, slice, (int, int) or str
        The last token, the label, the mean over a text, the token at an absolute index (negative: from the end),
        or the mean over a span: a slice or (start, stop) as Python counts, or text such as "3-7" with both ends.
    length : int
        Tokens of the text.
    label : int, optional
        Where its label stands.

    Raises
    ------
    UserError
        The position is unknown, or outside the text.
    """
    check_read(read)
    read = _without_ending(read)
    if isinstance(read, str) and read in READ_POSITIONS:
        if read == "label" and label is None:
            raise UserError("this text has no label to read")
        return {"last": (length - 1, length), "mean": (0, length), "label": (label or 0, (label or 0) + 1)}[read]
    if isinstance(read, Integral) and not isinstance(read, bool):
        return _index(int(read), length)
    ends = _ends(read)
    start, stop = (None if end is None else _end(end, length, read) for end in ends)
    start, stop = 0 if start is None else start, length if stop is None else stop
    if start >= stop:
        raise UserError(f"read span {read_name(read)} holds no token of a text of {length} tokens")
    return start, stop


def check_read(read: Read) -> None:
    """Raise `UserError` unless it is one of the forms of a read position, whatever the text."""
    mean = _without_ending(read)
    if mean != read and mean != "mean" and not _SPAN.fullmatch(mean):
        raise _unknown(read)
    if mean not in READ_POSITIONS and not (isinstance(mean, Integral) and not isinstance(mean, bool)):
        _ends(mean)


def takes_special(read: Read) -> bool:
    """Tell whether a mean takes in special tokens and a text's first."""
    return isinstance(read, str) and read.endswith(WITH_SPECIAL)


def mean_positions(ids: Sequence[int], span: Span, left_out: Collection[int] | None) -> list[int]:
    """The positions of a span that its mean is taken over.

    Special tokens and a text's first one are where a model's attention goes that has nothing to look at. Their
    activations can be a hundred times as long as those of all others, and a mean that took them in would be theirs:
    they are left out, but for a span of one token, which is no mean.

    Parameters
    ----------
    ids : sequence of int
        The text's tokens.
    span : (int, int)
        From a first up to, not including, a last.
    left_out : collection of int, optional
        Ids of special tokens. None: nothing is left out.
    """
    positions = range(*span)
    if left_out is None or len(positions) == 1:
        return list(positions)
    return [position for position in positions if position and ids[position] not in left_out]


def read_words(read: str) -> str:
    """A read position as a report calls it, with what its mean leaves out.

    >>> read_words("mean"), read_words("3-7+special"), read_words("last")
    ('mean without special and first tokens', '3-7 with special tokens', 'last')
    """
    mean = _without_ending(read)
    span = _SPAN.fullmatch(mean)
    if mean != "mean" and (span is None or span[1] == span[2]):
        return read
    return f"{mean} with special tokens" if takes_special(read) else f"{mean} without special and first tokens"


def read_name(read: Read) -> str:
    """A read position as text, in a form that can be given again.

    >>> read_name((3, 8)), read_name(slice(-3, None)), read_name(-1)
    ('3-7', '-3--1', '-1')
    """
    if isinstance(read, str) or not isinstance(read, (slice, tuple, list)):
        return str(read)
    start, stop = _ends(read)
    return f"{start or 0}-{-1 if stop is None else stop - 1}"


def _without_ending(read: Any) -> Any:
    return read.removesuffix(WITH_SPECIAL) if isinstance(read, str) else read


def _unknown(read: Any) -> UserError:
    known = ", ".join(READ_POSITIONS)
    return UserError(f"read position {shown(read)} is unknown; one of {known}, an index, or a span such as 3-7")


def _index(index: int, length: int) -> Span:
    if not -length <= index < length:
        raise UserError(f"read position {index} is outside a text of {length} tokens")
    return index % length, index % length + 1


def _end(end: int, length: int, read: Read) -> int:
    place = end + length if end < 0 else end
    if not 0 <= place <= length:
        raise UserError(f"read span {read_name(read)} is outside a text of {length} tokens")
    return place


def _ends(read: Any) -> tuple[int | None, int | None]:
    """Start and stop as Python counts; None: the text's own end."""
    if isinstance(read, str) and (match := _SPAN.fullmatch(read)):
        return int(match[1]), int(match[2]) + 1 or None
    if isinstance(read, slice) and read.step in (None, 1):
        ends: tuple[Any, ...] = (read.start, read.stop)
    elif isinstance(read, (tuple, list)) and len(read) == 2:
        ends = tuple(read)
    else:
        ends = (read,)
    whole = [end is None or (isinstance(end, Integral) and not isinstance(end, bool)) for end in ends]
    if len(ends) != 2 or not all(whole):
        raise _unknown(read)
    return ends[0], ends[1]


class SpanReader:
    """Collects one activation per row and block: the mean over a span of its tokens, added up over the steps of a run.

    What is summed up stays on the device of its block until it is asked for.

    Parameters
    ----------
    n_blocks : int
        How many blocks are read.
    batch : Batch
        The texts.
    spans : sequence of (int, int)
        Positions of each text, counted from its own first token.
    left_out : collection of int, optional
        See `mean_positions`.
    """

    def __init__(
        self, n_blocks: int, batch: Batch, spans: Sequence[Span], left_out: Collection[int] | None = None
    ) -> None:
        self._weights = torch.zeros(batch.rows, batch.width, dtype=torch.float32)
        rows = batch.input_ids.tolist()
        for row, span in enumerate(spans):
            first = batch.width - batch.lengths[row]
            positions = mean_positions(rows[row][first:], span, left_out)
            self._weights[row, [first + position for position in positions]] = 1 / max(len(positions), 1)
        self._n_blocks = n_blocks
        self._sums: dict[int, torch.Tensor] = {}
        self._lengths: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
        self._columns = slice(0)
        self._placed: dict[torch.device, torch.Tensor] = {}
        self._gaps = False
        used = self._weights.any(0).nonzero()[:, 0]
        self._n_tokens = (self._weights > 0).sum(1)
        self._first = batch.first_columns
        self.last_column = int(used[-1])
        """no later column is read"""

    def begin(self, columns: range) -> None:
        """Say which columns the coming step feeds."""
        part = self._weights[:, columns.start : columns.stop]
        used = part.any(0).nonzero()[:, 0]
        start = int(used[0]) if len(used) else 0
        self._columns = slice(start, int(used[-1]) + 1) if len(used) else slice(0)
        self._start = columns.start + start
        part = part[:, self._columns]
        self._placed = {torch.device("cpu"): part}
        self._gaps = not part.all()

    def writer(self, index: int) -> Callable[[torch.Tensor], None]:
        """The callable that a hook gives the activation of the block at an index to."""

        def write(hidden: torch.Tensor) -> None:
            if self._columns.stop == 0:
                return
            hidden = hidden[:, self._columns].float()
            weights = self._placed.get(hidden.device)
            if weights is None:
                weights = self._placed[hidden.device] = self._placed[torch.device("cpu")].to(hidden.device)
            if hidden.shape[1] == 1:
                read = torch.where(weights != 0, hidden[:, 0] * weights, 0.0)
            else:
                if self._gaps:
                    # what stands outside of the span, padding above all, need not be a number
                    hidden = hidden.masked_fill((weights == 0)[:, :, None], 0.0)
                read = torch.bmm(weights[:, None], hidden)[:, 0]
            before = self._sums.get(index)
            self._sums[index] = read if before is None else before + read
            self._measure(index, hidden, weights)

        return write

    def _measure(self, index: int, hidden: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep each row's mean length of a token, and its longest token."""
        lengths = torch.where(weights != 0, torch.linalg.vector_norm(hidden, dim=-1) * weights, 0.0)
        total, (longest, place) = lengths.sum(1), lengths.max(1)
        place = place + self._start
        if (before := self._lengths.get(index)) is not None:
            total, earlier = total + before[0], before[1] >= longest
            longest, place = torch.where(earlier, before[1], longest), torch.where(earlier, before[2], place)
        self._lengths[index] = total, longest, place

    def states(self) -> torch.Tensor:
        """float32 (n_blocks, rows, d_model) on the CPU."""
        return torch.stack([self._sums[index].cpu() for index in range(self._n_blocks)])

    def lengths(self) -> torch.Tensor:
        """Mean Euclidean norm of the tokens of each row, and the position of one that carries it: -1 where none does.

        float32 (n_blocks, rows, 2) on the CPU. A token carries a mean where it is longer than all others together; of
        two tokens one always is, and has to be four times as long as the other.
        """
        of_blocks = []
        for index in range(self._n_blocks):
            total, longest, place = (part.cpu() for part in self._lengths[index])
            share = torch.where(self._n_tokens == 2, _MOST_OF_TWO, _MOST_OF_MANY)
            carries = (self._n_tokens > 1) & (longest > share * total)
            of_blocks.append(torch.stack([total, torch.where(carries, place - self._first, -1).float()], -1))
        return torch.stack(of_blocks)


def dominant_token(ids: Iterable[int]) -> int:
    """The most frequent token, -1 where there is none."""
    return next((token for token, _ in Counter(ids).most_common(1)), -1)


@dataclass(frozen=True)
class Separation:
    """How well directions tell held-back pairs apart."""

    positive: torch.Tensor
    """(n_blocks, n_pairs, d_model)"""
    negative: torch.Tensor

    def of(self, directions: np.ndarray) -> np.ndarray:
        """d′ per block: distance of the two sides' mean projections in pooled standard deviations, (n_blocks,)."""
        axis = torch.from_numpy(directions)
        positive = torch.einsum("bnd,bd->bn", self.positive, axis)
        negative = torch.einsum("bnd,bd->bn", self.negative, axis)
        if positive.shape[1] < 2:
            return (positive - negative).sign().mean(1).numpy()
        spread = ((positive.var(1) + negative.var(1)) / 2).sqrt()
        return ((positive.mean(1) - negative.mean(1)) / spread.clamp(min=1e-12)).numpy()


def data_hash(spec: ExtractionSpec) -> str:
    """SHA-256 of the pairs' token ids."""
    return hashlib.sha256(json.dumps([spec.positive, spec.negative]).encode()).hexdigest()


def shuffle_signs(n_pairs: int, n_shuffles: int, seed: int) -> np.ndarray:
    """Draw the pairs that a shuffling swaps, each with probability 1/2: int8 (n_shuffles, n_pairs), −1 there."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (n_shuffles, n_pairs))


def held_back(n_pairs: int) -> Sequence[int]:
    """Indices of the pairs that judge the blocks: every fourth, at most 64; all of them when there are too few."""
    return range(n_pairs) if n_pairs < FEWEST_TO_JUDGE else range(3, n_pairs, 4)[:64]


def best_block(separation: np.ndarray, n_pairs: int) -> int:
    """The block to write at by default: the one of the middle third that tells held-back pairs apart best.

    Separation alone would often choose an end: the first blocks can tell two texts apart by their words, and the
    last ones by the next word alone, which they then push at every position. Too few pairs to hold any back make
    every block look perfect; then it is the middle block.
    """
    n_blocks = len(separation)
    if n_pairs < FEWEST_TO_JUDGE:
        return n_blocks // 2
    first, last = n_blocks // 3, max(n_blocks // 3, 2 * n_blocks // 3 - 1)
    return first + int(np.argmax(separation[first : last + 1]))
