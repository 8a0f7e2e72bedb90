"""How well each block tells the two sides of contrast pairs apart, by directions that have not seen the pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from scipy.special import stdtrit

from nblens.steering.estimators import ESTIMATORS

__all__ = ["FEWEST_TO_JUDGE", "Judges", "best_block", "interval", "separation"]

FEWEST_TO_JUDGE = 4
"""With fewer contrast pairs no block is judged."""

_MOST_JUDGES = 64  # whose activations are kept
_MOST_REFITS = 16  # pairs of which each is left out in turn where that asks for a fit


@dataclass(frozen=True)
class Judges:
    """The pairs by which blocks are judged."""

    method: str
    n_pairs: int
    pairs: Sequence[int]
    """indices of those that judge"""
    one_by_one: bool
    """each is left out of the direction that it judges; False: all of them are"""

    @classmethod
    def of(cls, method: str, n_pairs: int) -> Self:
        """Leave out one after the other where that is cheap, else hold back a quarter; at most 64 of them judge.

        A mean without one of its pairs follows from the sum; other methods have to be fitted anew.
        """
        if n_pairs < FEWEST_TO_JUDGE:
            return cls(method, n_pairs, (), one_by_one=True)
        if method == "mean_diff" or n_pairs <= _MOST_REFITS:
            return cls(method, n_pairs, range(0, n_pairs, -(-n_pairs // _MOST_JUDGES)), one_by_one=True)
        return cls(method, n_pairs, range(3, n_pairs, 4)[:_MOST_JUDGES], one_by_one=False)

    def projections(self, positive: torch.Tensor, negative: torch.Tensor, directions: np.ndarray) -> torch.Tensor:
        """Differences of the judging pairs along the unit directions that have not seen them.

        Parameters
        ----------
        positive, negative : torch.Tensor
            Activations of their sides, (n_blocks, n_judges, d_model).
        directions : numpy.ndarray
            (n_blocks, d_model), of all pairs where each is left out alone, else of those that do not judge.

        Returns
        -------
        torch.Tensor
            float64 (n_blocks, n_judges).
        """
        differences, found = positive.double() - negative.double(), torch.from_numpy(directions).double()[:, None]
        axes: torch.Tensor = found
        if self.one_by_one and self.method == "mean_diff":
            axes = self.n_pairs * found - differences
        elif self.one_by_one and self.pairs:
            axes = torch.stack([self._without(place, positive, negative) for place in range(self.n_pairs)], 1)
        projections: torch.Tensor = (differences * axes).sum(-1)
        lengths: torch.Tensor = torch.linalg.vector_norm(axes, dim=-1)
        return projections / lengths.clamp(min=1e-300)

    def _without(self, place: int, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
        """The direction of all pairs but one, float64 (n_blocks, d_model)."""
        n_blocks, n_pairs, d_model = positive.shape
        others = [other for other in range(n_pairs) if other != place]
        estimator = ESTIMATORS[self.method](n_blocks, d_model)
        estimator.add(positive[:, others], negative[:, others])
        return torch.from_numpy(estimator.directions()).double()


def separation(projections: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """How far apart each block holds the sides of pairs, and the standard error of that, float32 (n_blocks,) each.

    The mean of the differences between a pair's sides in their own standard deviations (Cohen's d_z), with its
    large-sample error sqrt(1/n + d² / 2(n − 1)). NaN where there are no projections.
    """
    n = projections.shape[1]
    if not n:
        return np.full(len(projections), np.nan, np.float32), np.full(len(projections), np.nan, np.float32)
    d = projections.mean(1) / projections.std(1).clamp(min=1e-12)
    return d.float().numpy(), (1 / n + d**2 / (2 * (n - 1))).sqrt().float().numpy()


def interval(distance: float, error: float, n_judges: int) -> tuple[float, float]:
    """The 95 % confidence interval of a separation, by Student's t."""
    reach = float(stdtrit(n_judges - 1, 0.975)) * error
    return distance - reach, distance + reach


def best_block(distances: np.ndarray, errors: np.ndarray) -> int:
    """The block to write at by default: among a third and three quarters of the depth, one that tells pairs apart best.

    Separation alone would often choose an end: the first blocks can tell two texts apart by their words, and the
    last ones by the next word alone, which they then push at every position. Of blocks that are within one standard
    error of the best (Breiman et al. 1984) it is the last: the fewer blocks come after it, the straighter is what a
    coefficient does. Where nothing was judged it is the middle block.
    """
    n_blocks = len(distances)
    first, last = n_blocks // 3, 3 * n_blocks // 4
    window = distances[first : last + 1]
    if np.isnan(window).all():
        return n_blocks // 2
    best = int(np.nanargmax(window))
    alike = np.flatnonzero(window >= window[best] - errors[first + best])
    return first + int(alike[-1])
