"""How long a measurement will take, told before it starts, and how many controls then fit two minutes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nblens.evaluation.doses import Dose
from nblens.evaluation.measurement import Measurement
from nblens.evaluation.scorer import EncodedSamples, Scorer

__all__ = ["ENOUGH_CONTROLS", "FEW_CONTROLS", "Work", "controlled", "in_words"]

ENOUGH_CONTROLS, FEW_CONTROLS = 32, 8
"""Directions of each kind of control where nothing else is asked for; where they would take too long."""

_TOO_LONG = 120.0  # seconds
_WORTH_TELLING = 10.0
_PROBED = 2  # samples
_FEW_TOKENS = 20_000


@dataclass(frozen=True)
class Work:
    """What a measurement feeds, in tokens that go through all blocks."""

    seconds_per_token: float
    without_controls: float
    per_control: float

    def seconds(self, n_controls: int) -> float:
        """How long it takes with so many control directions."""
        return self.seconds_per_token * (self.without_controls + n_controls * self.per_control)

    @classmethod
    def of(
        cls,
        scorer: Scorer,
        how: Measurement,
        measured: EncodedSamples,
        n_controlled: int,
        neutral: Sequence[Sequence[int]],
        blocks: Sequence[int],
        choosing: Sequence[EncodedSamples] = (),
        *,
        size: tuple[int, int],
    ) -> Work:
        """Time two samples, and count the rest.

        Parameters
        ----------
        measured : EncodedSamples
            What the report is about.
        n_controlled : int
            Of these, how many each control direction is measured on.
        neutral : sequence of token ids
            Texts that side effects are measured on.
        blocks : sequence of int
            Where a vector is written, or will be chosen to be.
        choosing : sequence of EncodedSamples
            Samples that choose the block.
        size : (int, int)
            Blocks of the model, and its width.
        """
        n_blocks, _ = size
        n_settings, shares = len(how.coefficients), [(n_blocks - block) / n_blocks for block in blocks]
        share = float(np.mean(shares))
        each = _tokens(measured) / max(1, len(measured.encoded))
        counted = n_settings * share * _tokens(measured)
        counted += sum(n_settings * sum(shares) * _tokens(samples) for samples in choosing)
        counted += (1 + n_settings) * share * sum(map(len, neutral))
        per_control = 2 * share * each * n_controlled
        if counted + 2 * ENOUGH_CONTROLS * per_control < _FEW_TOKENS:  # over before it could be told
            return cls(0.0, counted, per_control)
        return cls(_probe(scorer, measured, blocks[0], n_settings, size), counted, per_control)


def controlled(how: Measurement, work: Work, n_kinds: int) -> tuple[Measurement, float]:
    """A measurement with its numbers of controls chosen where they were left open, and the seconds that it takes."""
    given = [count for count in (how.n_random, how.n_shuffles)[:n_kinds] if count is not None]
    n_open = n_kinds - len(given) if how.controls else 0
    enough = (
        FEW_CONTROLS if n_open and work.seconds(sum(given) + n_open * ENOUGH_CONTROLS) > _TOO_LONG else ENOUGH_CONTROLS
    )
    return how.with_controls(enough), work.seconds((sum(given) if how.controls else 0) + n_open * enough)


def in_words(seconds: float, what: str, *, few: bool) -> str:
    """What is told before it starts; nothing where it will be over before one has read it."""
    if seconds < _WORTH_TELLING:
        return ""
    span = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
    fewer = f"; {FEW_CONTROLS} controls of each kind instead of {ENOUGH_CONTROLS}: n_random=, n_shuffles= ask for more"
    return f"about {span}: {what}{fewer if few else ''}"


def _tokens(samples: EncodedSamples) -> int:
    return sum(len(ids) for sample in samples.encoded for ids in sample.ids)


def _probe(scorer: Scorer, samples: EncodedSamples, block: int, n_settings: int, size: tuple[int, int]) -> float:
    """Seconds per token and block share of a vector that changes nothing."""
    n_blocks, d_model = size
    few = samples.encoded[:_PROBED]
    dose = Dose({block: np.full(d_model, 1e-30, np.float32)}, tuple(float(n) for n in range(1, n_settings + 1)))
    began = time.perf_counter()
    scorer.propensities(few, [dose], "")
    tokens = sum(len(ids) for sample in few for ids in sample.ids)
    return (time.perf_counter() - began) / (n_settings * tokens * (n_blocks - block) / n_blocks)
