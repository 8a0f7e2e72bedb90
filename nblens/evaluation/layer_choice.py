"""Choosing where a vector is written: samples in splits that serve one purpose each, and a sweep over blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nblens.errors import UserError
from nblens.evaluation.doses import Dose
from nblens.evaluation.scorer import EncodedSamples, Scorer
from nblens.steering.samples import Sample, balanced, letter_of
from nblens.steering.statistics import DoseResponse
from nblens.steering.vectors import SteeringVector

__all__ = ["LayerChoice", "Splits", "choose_layer", "split"]

_FEWEST = 8
_N_LAYER_TEXTS = 4  # neutral texts on which every block is tried


@dataclass(frozen=True)
class Splits:
    """Samples that are used for one thing each."""

    train: Sequence[Sample]
    """the vector is made of them"""
    validation: Sequence[Sample]
    """the block is chosen, and the linear range found, on them"""
    test: Sequence[Sample]
    """the report is about them"""

    @property
    def sizes(self) -> dict[str, int]:
        """How many samples each holds."""
        return {"train": len(self.train), "validation": len(self.validation), "test": len(self.test)}


def split(samples: Sequence[Sample], seed: int) -> Splits:
    """Half for training, a quarter each for validation and test, at random.

    Where answers are letters, each letter is the positive answer equally often in every part, so that neither a vector
    nor its score can be about a letter; samples that are too many are left out.

    Raises
    ------
    UserError
        There are fewer than 8 samples, or than 4 of each letter, or a letter is never the positive answer.
    """
    lettered = all(letter_of(sample.positive) for sample in samples)
    samples = list({repr(s): s for s in samples}.values())  # the same one must not stand in two splits
    kept = balanced(samples, seed)[0] if lettered else samples
    n_letters = len({letter_of(sample.positive) for sample in kept}) if lettered else 1
    fewest = max(_FEWEST, 4 * n_letters)
    if len(kept) < fewest:
        dropped = f" ({len(samples) - len(kept)} were left out to balance the letters)" if lettered else ""
        raise UserError(f"an experiment needs {fewest} samples or more for its three splits, got {len(kept)}{dropped}")
    random.Random(seed).shuffle(kept)
    by_letter: dict[str | None, list[Sample]] = {}
    for sample in kept:
        by_letter.setdefault(letter_of(sample.positive) if lettered else None, []).append(sample)
    dealt = [sample for round_of_letters in zip(*by_letter.values(), strict=True) for sample in round_of_letters]
    quarter = len(dealt) // 4 // n_letters * n_letters
    return Splits(dealt[2 * quarter :], dealt[quarter : 2 * quarter], dealt[:quarter])


@dataclass(frozen=True)
class LayerChoice:
    """Which block a vector is written at, and what spoke for it."""

    block: int
    slopes: dict[int, tuple[float, float, float]]
    """block → mean slope on the validation samples, and its confidence interval"""
    linear_limit: float | None
    """largest |λ| up to which the chosen block's curves are lines"""


def choose_layer(
    scorer: Scorer,
    vector: SteeringVector,
    validation: EncodedSamples,
    blocks: Sequence[int],
    coefficients: Sequence[float],
    neutral: Sequence[tuple[int, ...]],
    kl_budget: float,
) -> LayerChoice:
    """Write the vector at one block after another: the largest mean slope among those that stay within the KL budget.

    KL is that of the coefficients nearest to −1 and 1. Where no block stays within the budget it is the one of the
    largest slope for its KL.
    """
    doses = [Dose.of(vector, coefficients, [block]) for block in blocks]
    values = scorer.propensities(validation.encoded, doses, "layers")
    responses = {block: DoseResponse(np.array(coefficients), own) for block, own in zip(blocks, values, strict=True)}
    slopes = {block: response.mean_slope for block, response in responses.items()}
    best = max(blocks, key=slopes.__getitem__)
    if neutral and len(blocks) > 1:
        near_one = sorted({min(coefficients, key=lambda c: abs(c - unit)) for unit in (-1.0, 1.0)})
        kl = scorer.neutral_kl(
            neutral[:_N_LAYER_TEXTS], [replace(dose, coefficients=tuple(near_one)) for dose in doses], "layers, KL"
        )
        costs = {block: float(own.mean(1).max()) for block, own in zip(blocks, kl, strict=True)}
        within = [block for block in blocks if costs[block] <= kl_budget]
        by_cost = {block: slopes[block] / max(costs[block], 1e-9) for block in blocks}
        best = max(within, key=slopes.__getitem__) if within else max(blocks, key=by_cost.__getitem__)
    intervals = {block: (slopes[block], *response.ci(n_resamples=999)) for block, response in responses.items()}
    return LayerChoice(best, intervals, responses[best].linear_range())
