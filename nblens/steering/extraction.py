"""Contrast pairs → a direction per block, from one pass over the texts.

Statistics are kept as they stream by: memory does not grow with the number of pairs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import torch

from nblens.errors import UserError
from nblens.model.generation import Batch
from nblens.specs import ExtractionSpec

__all__ = ["METHODS", "MeanDifference", "PositionReader", "Separation", "best_block", "data_hash", "read_weights"]

METHODS = {"mean_diff": "mean of positive minus mean of negative activations"}
"""How a direction is computed from contrast pairs."""

READ_POSITIONS = ("last", "mean")

FEWEST_TO_JUDGE = 8
"""With fewer contrast pairs, none is held back."""


def read_weights(batch: Batch, read: str | int) -> torch.Tensor:
    """Weights of the columns of a left-padded batch whose sum is the activation read, float32 (rows, width).

    Parameters
    ----------
    read : {"last", "mean"} or int
        The last token, the mean over all tokens, or the token at an absolute index (negative: from the end).

    Raises
    ------
    UserError
        The position is unknown, or outside one of the texts.
    """
    weights = torch.zeros(batch.input_ids.shape, dtype=torch.float32)
    for row, length in enumerate(batch.lengths):
        first = batch.width - length
        if read == "mean":
            weights[row, first:] = 1 / length
            continue
        index = -1 if read == "last" else read
        if not isinstance(index, Integral):
            raise UserError(f"read position {read!r} is unknown; one of {', '.join(READ_POSITIONS)} or an index")
        if not -length <= index < length:
            raise UserError(f"read position {index} is outside a text of {length} tokens")
        weights[row, first + index % length] = 1.0
    return weights


class PositionReader:
    """Collects one activation per row and block: the weighted sum over columns, added up over the steps of a run."""

    def __init__(self, n_blocks: int, weights: torch.Tensor, d_model: int) -> None:
        self._weights = weights
        self._columns = range(0)
        self.states = torch.zeros(n_blocks, len(weights), d_model, dtype=torch.float32)
        """float32 (n_blocks, rows, d_model) on the CPU"""

    def begin(self, columns: range) -> None:
        """Say which columns the coming step feeds."""
        self._columns = columns

    def writer(self, block: int) -> Callable[[torch.Tensor], None]:
        """The callable that a hook gives a block's activation to."""

        def write(hidden: torch.Tensor) -> None:
            weights = self._weights[:, self._columns.start : self._columns.stop]
            used = weights.any(0).nonzero()[:, 0]
            if len(used):
                picked = hidden[:, used.to(hidden.device)].float().cpu()
                self.states[block] += torch.einsum("rw,rwd->rd", weights[:, used], picked)

        return write


class MeanDifference:
    """Mean of positive minus mean of negative activations, as they stream by.

    Contrastive activation addition (Rimsky et al. 2023, arXiv 2312.06681).
    """

    def __init__(self, n_blocks: int, d_model: int) -> None:
        self._sum = torch.zeros(n_blocks, d_model, dtype=torch.float64)
        self.count = 0

    def add(self, positive: torch.Tensor, negative: torch.Tensor) -> None:
        """Take in a batch of pairs, (n_blocks, n, d_model) each."""
        self._sum += (positive.double() - negative.double()).sum(1)
        self.count += positive.shape[1]

    def directions(self) -> np.ndarray:
        """float32 (n_blocks, d_model)."""
        return (self._sum / max(self.count, 1)).float().numpy()


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
