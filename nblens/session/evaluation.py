"""The whole steering experiment, and the measurement of a vector that is there, on a session."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError
from nblens.evaluation.layer_choice import choose_layer, split
from nblens.evaluation.measurement import EncodedSamples, Measurement, measure
from nblens.evaluation.scorer import Scorer
from nblens.layers import parse_layers
from nblens.specs import check_coefficient
from nblens.steering.report import SteerabilityReport
from nblens.steering.samples import as_samples
from nblens.steering.vector_store import check_op
from nblens.steering.vectors import SteeringVector

if TYPE_CHECKING:
    from nblens.session.steering import SteeringRequests

__all__ = ["Evaluation"]

_LONGEST_NEUTRAL = 128  # tokens of a neutral text that are scored
_FEWEST_NEUTRAL = 4


@dataclass(frozen=True)
class Evaluation:
    """Options that a measurement and an experiment have in common, bound to a session."""

    session: SteeringRequests
    coefficients: Sequence[float]
    neutral: Sequence[str] | None
    """None: the session's own"""
    kl_budget: float
    n_random: int
    n_shuffles: int
    chat: bool
    seed: int
    progress: bool

    def __post_init__(self) -> None:
        for what, number in (("n_random", self.n_random), ("n_shuffles", self.n_shuffles), ("seed", self.seed)):
            if not isinstance(number, Integral) or number < 0:
                raise UserError(f"{what} must be a whole number, 0 or more; got {number!r}")
        if not isinstance(self.kl_budget, Real) or not 0 <= self.kl_budget < float("inf"):
            raise UserError(f"a KL budget is a number of nats from 0 up, got {self.kl_budget!r}")

    def measure(
        self,
        vector: SteeringVector,
        samples: Any,
        *,
        pairs: Any = None,
        out_of_distribution: Any = None,
        linear_limit: float | None = None,
        **known: Any,
    ) -> SteerabilityReport:
        """Measure a vector as it is written by default."""
        check_op(vector.name, vector.site, vector.op)
        shuffled = []
        if pairs is not None and self.n_shuffles:
            shuffled = self.session.shuffled_directions(
                vector, pairs, self.n_shuffles, chat=self.chat, seed=self.seed, progress=self.progress
            )
        measurement = Measurement(
            self._checked_coefficients(vector.name),
            self.neutral_ids(),
            self.kl_budget,
            self.n_random,
            shuffled,
            linear_limit,
            self.seed,
        )
        other = None if out_of_distribution is None else self.encode(out_of_distribution)
        return measure(self.scorer, vector, self.encode(samples), measurement, other, **known)

    def experiment(
        self,
        name: str,
        samples: Any,
        *,
        layers: Any,
        write: str,
        op: str,
        normalise: bool,
        out_of_distribution: Any,
        **extraction: Any,
    ) -> tuple[SteeringVector, SteerabilityReport]:
        """Make a vector on one split of the samples, choose its block on a second, measure it on a third."""
        check_op(name, extraction["site"], op)
        coefficients, neutral = self._checked_coefficients(name), self.neutral_ids()
        blocks = parse_layers(layers, self.session.architecture.n_blocks)
        splits = split(as_samples(samples), self.seed)
        vector = self.session.new_vector(name, splits.train, chat=self.chat, progress=self.progress, **extraction)
        vector = replace(vector.normalized() if normalise else vector, write=write, op=op)
        choice = choose_layer(
            self.scorer,
            vector,
            self.encode(splits.validation),
            blocks,
            coefficients,
            neutral,
            self.kl_budget,
        )
        vector = vector.at((choice.block,))
        report = self.measure(
            vector,
            splits.test,
            pairs=splits.train,
            out_of_distribution=out_of_distribution,
            linear_limit=choice.linear_limit,
            layer_slopes=choice.slopes,
            chosen_layer=choice.block,
            splits=splits.sizes,
        )
        return vector, report

    @property
    def scorer(self) -> Scorer:
        """What runs the model."""
        return Scorer(self.session.events, self.progress, self.session.build.context)

    def encode(self, samples: Any) -> EncodedSamples:
        """Samples with their token ids."""
        samples = as_samples(samples)
        return EncodedSamples(samples, self.session.build.answers(samples, chat=self.chat))

    def neutral_ids(self) -> list[tuple[int, ...]]:
        """Token ids of the neutral texts, cut to a moderate length."""
        texts = self.session.neutral_texts if self.neutral is None else self.neutral
        if isinstance(texts, str):
            raise UserError("neutral must be a list of texts; got one text")
        ids = [self.session.build.text_ids(text, longest=_LONGEST_NEUTRAL) for text in texts]
        if short := [text for text, own in zip(texts, ids, strict=True) if len(own) < _FEWEST_NEUTRAL]:
            raise UserError(f"a neutral text needs {_FEWEST_NEUTRAL} tokens or more, got {short[0]!r}")
        return ids

    def _checked_coefficients(self, name: str) -> tuple[float, ...]:
        if isinstance(self.coefficients, (int, float, str)) or len(set(self.coefficients)) < 2:
            raise UserError(f"a slope needs two coefficients or more, got {self.coefficients!r}")
        coefficients = tuple(check_coefficient(name, c) for c in self.coefficients)
        if twice := [c for c in coefficients if coefficients.count(c) > 1]:
            raise UserError(f"coefficient {twice[0]:g} is there twice; give each λ once")
        return coefficients
