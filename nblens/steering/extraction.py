"""Reading each text of an extraction."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch

from nblens.model.generation import Batch
from nblens.specs import ExtractionSpec, Span
from nblens.steering.read_positions import mean_positions

__all__ = [
    "SpanReader",
    "data_hash",
    "dominant_token",
    "shuffle_signs",
]

_MOST_OF_MANY, _MOST_OF_TWO = 0.5, 0.8  # of a mean's norm that one token may carry


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


def data_hash(spec: ExtractionSpec) -> str:
    """SHA-256 of the pairs' token ids."""
    return hashlib.sha256(json.dumps([spec.positive, spec.negative]).encode()).hexdigest()


def shuffle_signs(n_pairs: int, n_shuffles: int, seed: int) -> np.ndarray:
    """Draw the pairs that a shuffling swaps, each with probability 1/2: int8 (n_shuffles, n_pairs), −1 there."""
    return np.random.default_rng(seed).choice(np.array([-1, 1], dtype=np.int8), (n_shuffles, n_pairs))
