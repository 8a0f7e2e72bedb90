"""`Steerability`: what was measured of one vector and its controls, and the statistics that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nblens.circumstances import Circumstances
from nblens.errors import UserError
from nblens.steering.statistics import (
    CoefficientRange,
    DoseResponse,
    SideEffects,
    above_controls,
    near_zero,
    percentile_among,
)

__all__ = ["Steerability"]

_NUMBERS = ("linear_limit", "kl_budget", "activation_norm", "vector_norm")
_CONTROLS = ("random_slopes", "shuffled_slopes")


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class Steerability:
    """Measurements of one vector, with its side effects and controls; `SteerabilityReport` shows and saves them."""

    name: str
    """of the steering vector"""
    model: str
    circumstances: Circumstances = field(default_factory=Circumstances)
    """revision and dtype of the model, and what was done with its chat template"""
    site: str
    layers: tuple[int, ...]
    """blocks that were written"""
    read: str
    """position at which the vector was measured"""
    write: str
    """positions to which it was added"""
    op: str = "add"
    method: str
    """how the vector was made"""
    norms: Mapping[int, float]
    """block → Euclidean norm of what λ = 1 adds there"""
    dose_response: DoseResponse
    """of samples like those that the vector was made of, though none of them"""
    linear_limit: float | None = None
    """largest |λ| that slopes are taken over, chosen on other samples; None: all that were measured"""
    out_of_distribution: DoseResponse | None = None
    """of samples of another kind"""
    side_effects: SideEffects | None = None
    kl_budget: float | None = None
    """nats per token of neutral text that steering may cost"""
    random_slopes: np.ndarray | None = None
    """(n_random,): mean slope of each random direction of equal norm"""
    shuffled_slopes: np.ndarray | None = None
    """(n_shuffles,): mean slope of each vector made from pairs with shuffled labels"""
    layer_slopes: Mapping[int, tuple[float, float, float]] = field(default_factory=dict)
    """block → mean slope of the vector written there alone, and its confidence interval, on validation samples"""
    chosen_layer: int | None = None
    """the block of `layer_slopes` that was chosen"""
    by_label: Mapping[str, float] = field(default_factory=dict)
    """label → mean slope of the samples whose positive answer bears it; a position bias shows as a difference"""
    answer_balance: Mapping[str, float] = field(default_factory=dict)
    """label → share of the samples whose positive answer bears it, 0 to 1"""
    activation_norm: float | None = None
    """E‖h‖, mean Euclidean norm of a token's unsteered activation at the blocks that are written, over the tokens of
    the contrast pairs where the vector was read, which need not be those where it is written"""
    vector_norm: float | None = None
    """‖v‖, what λ = 1 adds at these blocks, in the mean over them"""
    splits: Mapping[str, int] = field(default_factory=dict)
    """how many samples each split holds"""

    def __post_init__(self) -> None:
        for name in _CONTROLS:
            object.__setattr__(self, name, _control(name, getattr(self, name)))
        for name in _NUMBERS:
            object.__setattr__(self, name, _number(getattr(self, name)))
        object.__setattr__(self, "layers", tuple(self.layers))
        intervals = {block: tuple(interval) for block, interval in self.layer_slopes.items()}
        object.__setattr__(self, "layer_slopes", intervals)
        if self.chosen_layer is not None and self.chosen_layer not in intervals:
            raise UserError(f"chosen layer {self.chosen_layer} is not among the layers measured: {sorted(intervals)}")
        # a limit or a budget that makes no sense is refused here, and not when the report is shown
        _ = self.fitted, self.fitted_out_of_distribution, self.largest_coefficients

    @property
    def n_samples(self) -> int:
        """Number of samples in distribution."""
        return self.dose_response.n_samples

    @property
    def fitted(self) -> DoseResponse:
        """The dose response within `linear_limit`: all of its statistics are those of this part."""
        return self._fitted(self.dose_response)

    @property
    def fitted_out_of_distribution(self) -> DoseResponse | None:
        """The dose response out of distribution within `linear_limit`."""
        return None if self.out_of_distribution is None else self._fitted(self.out_of_distribution)

    @property
    def scale_free_slope(self) -> float | None:
        """Mean slope × E‖h‖ / ‖v‖: nats for a push as large as an activation that was read, whatever the norm of v."""
        if not self.activation_norm or not self.vector_norm:
            return None
        return self.fitted.mean_slope * self.activation_norm / self.vector_norm

    @property
    def random_percentile(self) -> float | None:
        """Percentile of the mean slope among those of random directions, 0 to 100: see `percentile_among`.

        Of n directions it is at most 100 n / (n + 1), where the vector's slope is above all.
        """
        return None if self.random_slopes is None else percentile_among(self.fitted.mean_slope, self.random_slopes)

    @property
    def above_random(self) -> bool | None:
        """True where the mean slope is above those of 99 % of the random directions, of fewer than 100 above all.

        How much that says depends on their number: a direction of their own kind would be above all n of them once in
        n + 1 times, so that it takes 99 to be surprised at 1 %.
        """
        return self._above(self.random_slopes)

    @property
    def above_shuffled(self) -> bool | None:
        """True where it is above those of vectors made from shuffled labels, as for `above_random`."""
        return self._above(self.shuffled_slopes)

    @property
    def random_near_zero(self) -> bool | None:
        """True where random directions steer nowhere on average: their mean is within two standard errors of 0."""
        return None if self.random_slopes is None else near_zero(self.random_slopes)

    @property
    def shuffled_near_zero(self) -> bool | None:
        """True where vectors from shuffled labels steer nowhere on average, as for `random_near_zero`."""
        return None if self.shuffled_slopes is None else near_zero(self.shuffled_slopes)

    @property
    def largest_coefficients(self) -> CoefficientRange | None:
        """The λ on both sides of 0 that stay within `kl_budget`; None where side effects or budget are missing."""
        if self.side_effects is None or self.kl_budget is None:
            return None
        return self.side_effects.largest_coefficients(self.kl_budget)

    def _fitted(self, response: DoseResponse) -> DoseResponse:
        return response if self.linear_limit is None else response.within(self.linear_limit)

    def _above(self, slopes: np.ndarray | None) -> bool | None:
        return None if slopes is None else above_controls(self.fitted.mean_slope, slopes)


def _control(name: str, given: Any) -> np.ndarray | None:
    """Slopes as float64 (n,); None where there is none."""
    if given is None:
        return None
    slopes = np.array(given, dtype=np.float64)
    if slopes.ndim != 1 or not np.isfinite(slopes).all():
        raise UserError(f"{name} must be a list of finite numbers, got {slopes.tolist()}")
    slopes.flags.writeable = False
    return slopes if len(slopes) else None


def _number(given: Any) -> float | None:
    """A number that was measured; NaN is none."""
    return None if given is None or np.isnan(given) else float(given)
