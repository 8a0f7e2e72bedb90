"""`Measurement`: how a vector's steerability is measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypedDict

from nblens.errors import UserError
from nblens.model.chats import Chat
from nblens.options import UnexpectedKeywordError, listed
from nblens.steering.steer import check_coefficient

__all__ = ["Measurement", "MeasurementOptions", "chosen"]

_MOST_COEFFICIENTS = 10_000


@dataclass(frozen=True)
class Measurement:
    """How steerability is measured: under which coefficients, on which texts, beside which controls.

    >>> quick = nblens.Measurement([-1, 0, 1], controls=False)
    >>> report = session.steerability("cheerful", [nblens.Sample("I am", " glad", " sad")], measurement=quick)
    >>> report.dose_response.coefficients.tolist(), report.random_slopes
    ([-1.0, 0.0, 1.0], None)

    `Session.steerability` and `Session.steering_experiment` take one, or its fields by keyword, or both: keywords
    then stand for fields of their own.

    Parameters
    ----------
    coefficients : sequence of float
        Two or more, each once; at first those of the steerability curves of arXiv 2407.12404 and arXiv 2604.06483.
    controls : bool
        Measure random directions of equal norm, too, and vectors made in the same way of pairs with shuffled labels:
        each between the outermost coefficients, on at most 24 samples.
    neutral : sequence of str, optional
        Texts that steering should leave alone; None: `session.neutral_texts`; empty: nothing is said of side effects.
        Their first half stands as a prompt, KL and perplexity are those of the second.
    kl_budget : float
        Mean KL(unsteered ‖ steered) on neutral text, nats per token, that a coefficient may cost.
    n_random, n_shuffles : int
        How many controls of each kind. None: 32, or 8 where the measurement would take more than two minutes.
    chat : bool or mapping
        Send prompts as a user's turn through the chat template; a mapping: with these of its options.
    seed : int
        Of splits, controls and sampled text.
    progress : bool
        Show bars when it takes more than two seconds.

    Raises
    ------
    UserError
        A number is out of range, or there are fewer than two coefficients, or one of them twice.
    """

    coefficients: Sequence[float] = (-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5)
    controls: bool = True
    neutral: Sequence[str] | None = None
    kl_budget: float = 0.5
    n_random: int | None = None
    n_shuffles: int | None = None
    chat: Chat = False
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        for what, number in (("n_random", self.n_random), ("n_shuffles", self.n_shuffles), ("seed", self.seed)):
            if (number is not None or what == "seed") and (not isinstance(number, Integral) or number < 0):
                raise UserError(f"{what} must be a whole number, 0 or more; got {number!r}")
        if not isinstance(self.kl_budget, Real) or not 0 <= self.kl_budget < math.inf:
            raise UserError(f"a KL budget is a number of nats from 0 up, got {self.kl_budget!r}")
        if isinstance(self.neutral, str):
            raise UserError("neutral must be a list of texts; got one text")
        if self.neutral is not None:
            object.__setattr__(self, "neutral", tuple(listed("neutral", self.neutral)))
        if isinstance(self.coefficients, (int, float, str)):
            raise UserError(f"a slope needs two coefficients or more, got {self.coefficients!r}")
        given = tuple(listed("coefficients", self.coefficients, _MOST_COEFFICIENTS))
        if len(set(given)) < 2:
            raise UserError(f"a slope needs two coefficients or more, got {given!r}")
        coefficients = tuple(check_coefficient("a measured vector", c) for c in given)
        if twice := [c for c in coefficients if coefficients.count(c) > 1]:
            raise UserError(f"coefficient {twice[0]:g} is there twice; give each λ once")
        object.__setattr__(self, "coefficients", coefficients)

    def with_controls(self, count: int) -> Measurement:
        """The same with so many controls of each kind where nothing else was asked for."""
        n_random = count if self.n_random is None else self.n_random
        return replace(self, n_random=n_random, n_shuffles=count if self.n_shuffles is None else self.n_shuffles)

    def ends(self, linear_limit: float | None) -> tuple[float, float]:
        """The outermost coefficients that slopes are taken over; controls are measured there alone."""
        limit = math.inf if linear_limit is None else linear_limit * (1 + 1e-9)
        inside = [c for c in self.coefficients if abs(c) <= limit]
        return min(inside), max(inside)


class MeasurementOptions(TypedDict, total=False):
    """Fields of a `Measurement` as keywords."""

    controls: bool
    neutral: Sequence[str] | None
    kl_budget: float
    n_random: int | None
    n_shuffles: int | None
    chat: Chat
    seed: int
    progress: bool


def chosen(
    method: str, measurement: Measurement | None, coefficients: Sequence[float] | None, options: Mapping[str, Any]
) -> Measurement:
    """A measurement, or the usual one, with what a method's keywords say instead."""
    if measurement is not None and not isinstance(measurement, Measurement):
        raise UserError(f"measurement must be a nblens.Measurement, got {measurement!r}")
    known = {field.name for field in fields(Measurement)}
    if unknown := sorted(set(options) - known):
        raise UnexpectedKeywordError(method, unknown[0])
    given = dict(options) if coefficients is None else {**options, "coefficients": coefficients}
    return replace(measurement or Measurement(), **given)
