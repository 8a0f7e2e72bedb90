"""Steerability of one vector: dose response, side effects and controls, put together into a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nblens.evaluation.doses import Dose
from nblens.evaluation.scorer import Scorer
from nblens.model.answers import AnsweredPrompt
from nblens.steering.report import SteerabilityReport
from nblens.steering.samples import Sample, letter_of
from nblens.steering.statistics import DoseResponse, SideEffects
from nblens.steering.vectors import SteeringVector

__all__ = ["EncodedSamples", "Measurement", "measure"]

_N_CONTROL_SAMPLES = 24  # on which each of the many control directions is measured
_N_PROMPTS = 8  # that are continued to see whether text stays varied

Ids = tuple[int, ...]


@dataclass(frozen=True)
class EncodedSamples:
    """Samples, and the token ids of each."""

    samples: Sequence[Sample]
    encoded: Sequence[AnsweredPrompt]

    @property
    def letters(self) -> list[str | None]:
        """Letter of each positive answer; None where it is no letter."""
        return [letter_of(sample.positive) for sample in self.samples]


@dataclass(frozen=True)
class Measurement:
    """What is measured beside the dose response, and on what."""

    coefficients: tuple[float, ...]
    neutral: Sequence[Ids]
    """texts that steering should leave alone"""
    kl_budget: float
    n_random: int = 0
    """random directions of equal norm"""
    shuffled: Sequence[Mapping[int, np.ndarray]] = field(default_factory=tuple)
    """directions by block, made from shuffled labels"""
    linear_limit: float | None = None
    seed: int = 0

    @property
    def ends(self) -> tuple[float, float]:
        """The outermost coefficients that slopes are taken over; controls are measured there alone."""
        limit = np.inf if self.linear_limit is None else self.linear_limit * (1 + 1e-9)
        inside = [c for c in self.coefficients if abs(c) <= limit]
        return min(inside), max(inside)


def measure(
    scorer: Scorer,
    vector: SteeringVector,
    samples: EncodedSamples,
    measurement: Measurement,
    out_of_distribution: EncodedSamples | None = None,
    **known: Any,
) -> SteerabilityReport:
    """Measure a vector as it is written by default.

    Parameters
    ----------
    scorer : Scorer
    vector : SteeringVector
    samples : EncodedSamples
        Held out: the vector was not made of them.
    measurement : Measurement
    out_of_distribution : EncodedSamples, optional
        Samples of another kind.
    **known
        Further fields of the report: layer slopes, splits.
    """
    dose = Dose.of(vector, measurement.coefficients)
    encoded = [*samples.encoded, *(out_of_distribution.encoded if out_of_distribution else ())]
    (values,) = scorer.propensities(encoded, [dose], "dose response")
    coefficients = np.array(dose.coefficients)
    response = DoseResponse(coefficients, values[: len(samples.encoded)])
    other = DoseResponse(coefficients, values[len(samples.encoded) :]) if out_of_distribution else None
    fitted = response if measurement.linear_limit is None else response.within(measurement.linear_limit)
    return SteerabilityReport(
        name=vector.name,
        model=vector.model,
        site=vector.site,
        layers=vector.layers,
        read=vector.read,
        write=vector.write,
        op=vector.op,
        method=vector.method,
        norms={block: vector.norms[block] for block in vector.layers},
        dose_response=response,
        linear_limit=measurement.linear_limit,
        out_of_distribution=other,
        side_effects=_side_effects(scorer, dose, samples, measurement),
        kl_budget=measurement.kl_budget,
        **_controls(scorer, dose, samples, measurement),
        **_by_label(fitted, samples),
        **_norms(vector),
        **known,
    )


def _side_effects(scorer: Scorer, dose: Dose, samples: EncodedSamples, measurement: Measurement) -> SideEffects | None:
    if not measurement.neutral:
        return None
    prompts = [sample.prompt for sample in samples.encoded[:_N_PROMPTS]]
    return scorer.side_effects(measurement.neutral, dose, prompts, measurement.seed)


def _controls(scorer: Scorer, dose: Dose, samples: EncodedSamples, measurement: Measurement) -> dict[str, Any]:
    """Mean slope of every control direction between the outermost coefficients."""
    generator, ends = np.random.default_rng(measurement.seed), measurement.ends
    random = [dose.random(generator, ends) for _ in range(measurement.n_random)]
    shuffled = [dose.toward(directions, ends) for directions in measurement.shuffled]
    if not random and not shuffled:
        return {}
    values = scorer.propensities(samples.encoded[:_N_CONTROL_SAMPLES], [*random, *shuffled], "controls")
    slopes = np.array([DoseResponse(np.array(ends), some).mean_slope for some in values])
    return {
        "random_slopes": slopes[: len(random)] if random else None,
        "shuffled_slopes": slopes[len(random) :] if shuffled else None,
    }


def _by_label(response: DoseResponse, samples: EncodedSamples) -> dict[str, Any]:
    letters = [letter for letter in samples.letters if letter is not None]
    if len(letters) < len(samples.letters):
        return {}
    rows = {letter: [row for row, own in enumerate(letters) if own == letter] for letter in sorted(set(letters))}
    return {
        "by_label": {letter: float(response.slopes[own].mean()) for letter, own in rows.items()},
        "answer_balance": {letter: len(own) / len(letters) for letter, own in rows.items()},
    }


def _norms(vector: SteeringVector) -> dict[str, Any]:
    """Mean norm of the activations, and of the vector, over the blocks that are written."""
    if not all(block in vector.activation_norms for block in vector.layers):
        return {}
    return {
        "activation_norm": float(np.mean([vector.activation_norms[block] for block in vector.layers])),
        "vector_norm": float(np.mean([vector.norms[block] for block in vector.layers])),
    }
