"""How far a vector steers: propensity curves over the coefficient, and what steering costs; plain arrays, no model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from nblens.errors import UserError

__all__ = [
    "CoefficientRange",
    "DoseResponse",
    "SideEffects",
    "above_controls",
    "distinct_ngrams",
    "n_below",
    "near_zero",
    "percentile_among",
]

_SAME = 1 + 1e-9  # −0.3 and 0.30000000000000004 are equally far from 0
_BATCH = 2_000_000  # numbers resampled at a time


@dataclass(frozen=True, repr=False, eq=False)
class DoseResponse:
    """How the propensity of each sample moves with the coefficient of a steering vector.

    >>> dose = DoseResponse([-1, 0, 1], [[-0.9, 0.0, 1.1], [0.5, 1.0, 1.5]])
    >>> dose.slopes.tolist()
    [1.0, 0.5]
    >>> dose.mean_slope, dose.anti_steerable_share, dose.monotone_share
    (0.75, 0.0, 1.0)

    The propensity p_i(λ) of sample i is log P(positive answer) − log P(negative answer) where the vector is written
    with coefficient λ, in nats (Tan et al. 2024, arXiv 2407.12404). Statistics are taken sample by sample and then
    averaged: those of the mean curve hide a vector that moves half of the samples the wrong way. A constant curve
    has slope, Spearman and R² 0, so that a sample on which the vector does nothing counts, and counts as nothing.

    Raises
    ------
    UserError
        There are fewer than two coefficients, one twice, no sample, or a number that is not finite.
    """

    coefficients: np.ndarray
    """float64 (n_coefficients,): λ, put into ascending order"""
    values: np.ndarray
    """float64 (n_samples, n_coefficients): propensities, nats"""

    def __post_init__(self) -> None:
        coefficients = _coefficients(self.coefficients)
        values = np.array(self.values, dtype=np.float64)
        if len(coefficients) < 2:
            raise UserError(f"a slope needs at least two coefficients, got {coefficients.tolist()}")
        if values.ndim != 2 or not len(values) or values.shape[1] != len(coefficients):
            raise UserError(f"propensities must be (n_samples, {len(coefficients)}), got shape {values.shape}")
        for sample, column in np.argwhere(~np.isfinite(values))[:1]:
            raise UserError(
                f"the propensity of sample {sample} at λ = {coefficients[column]:g} is {values[sample, column]}; "
                "an answer has probability 0 there: try smaller coefficients"
            )
        order = np.argsort(coefficients)
        _freeze(self, coefficients=coefficients[order], values=values[:, order])

    @property
    def n_samples(self) -> int:
        """Number of samples."""
        return len(self.values)

    @property
    def slopes(self) -> np.ndarray:
        """Least-squares slope of each sample's propensity over λ, nats per unit of λ, (n_samples,)."""
        centred = self.coefficients - self.coefficients.mean()
        slopes: np.ndarray = _deviations(self.values) @ centred / (centred @ centred)
        return slopes

    @property
    def mean_slope(self) -> float:
        """Mean of `slopes`: the steerability of arXiv 2407.12404."""
        return float(self.slopes.mean())

    @property
    def sd(self) -> float:
        """Standard deviation of `slopes` over samples (n − 1); NaN for one sample."""
        return float(self.slopes.std(ddof=1)) if self.n_samples > 1 else float("nan")

    def ci(self, level: float = 0.95, *, n_resamples: int = 9999, seed: int = 0) -> tuple[float, float]:
        """Bootstrap confidence interval of `mean_slope`, resampling samples; NaN for one sample.

        BCa (Efron 1987), and percentiles where BCa is undefined, as for equal slopes.
        """
        low, high = _bootstrap_mean(self.slopes[:, None], level, n_resamples, seed)
        return float(low[0]), float(high[0])

    @property
    def anti_steerable_share(self) -> float:
        """Share of samples whose slope is not positive, 0 to 1."""
        return float((self.slopes <= 0).mean())

    @property
    def spearman(self) -> np.ndarray:
        """Rank correlation of propensity with λ for each sample, (n_samples,); 0 where the curve is constant."""
        return _correlations(stats.rankdata(self.values, axis=1), np.arange(len(self.coefficients), dtype=float))

    @property
    def r2(self) -> np.ndarray:
        """Share of variance that each sample's own line explains, (n_samples,); 0 where the curve is constant."""
        return _correlations(self.values, self.coefficients) ** 2

    @property
    def monotone_share(self) -> float:
        """Share of steps to the next coefficient, over all samples, in which propensity rises, 0 to 1."""
        return float((np.diff(self.values, axis=1) > 0).mean())

    @property
    def mean_curve(self) -> np.ndarray:
        """Mean propensity over samples, nats, (n_coefficients,)."""
        curve: np.ndarray = self.values.mean(axis=0)
        return curve

    def mean_curve_ci(
        self, level: float = 0.95, *, n_resamples: int = 9999, seed: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bootstrap confidence interval of `mean_curve` at each λ by itself: low and high, (n_coefficients,) each."""
        low, high = _bootstrap_mean(self.values, level, n_resamples, seed)
        return low, high

    def within(self, limit: float) -> DoseResponse:
        """The same samples at |λ| ≤ limit."""
        kept = np.abs(self.coefficients) <= limit * _SAME
        if kept.sum() < 2:
            raise UserError(
                f"|λ| ≤ {limit:g} leaves {kept.sum()} of the coefficients "
                f"{', '.join(f'{c:g}' for c in self.coefficients)}; a slope needs two"
            )
        return DoseResponse(self.coefficients[kept], self.values[:, kept])

    def linear_range(self, r2: float = 0.95) -> float | None:
        """Largest |λ| up to which curves are lines: their mean R² is at least `r2` there and at every smaller one.

        Ranges of fewer than three coefficients say nothing, as two points always lie on a line. Where both signs
        were measured, a range ends with the side that was measured less far. None: no range is linear. Choose it on
        samples other than those that the slope is reported of.
        """
        low, high = self.coefficients[[0, -1]]
        reach = min(-low, high) if low < 0 < high else max(abs(low), abs(high))
        found = None
        for limit in np.unique(np.abs(self.coefficients)):
            if limit > reach * _SAME:
                break
            if (np.abs(self.coefficients) <= limit * _SAME).sum() < 3:
                continue
            if self.within(limit).r2.mean() < r2:
                break
            found = float(limit)
        return found

    def __repr__(self) -> str:
        return (
            f"DoseResponse({self.n_samples} samples × {len(self.coefficients)} coefficients, "
            f"mean slope {self.mean_slope:.3g})"
        )


class CoefficientRange(NamedTuple):
    """Coefficients around 0; an end that is capped is as far as was measured, and the range may be wider.

    >>> low, high, *capped = CoefficientRange(-0.5, 1.0, low_capped=False, high_capped=True)
    >>> low, high
    (-0.5, 1.0)
    """

    low: float
    high: float
    low_capped: bool
    high_capped: bool


@dataclass(frozen=True, eq=False)
class SideEffects:
    """Side effects of steering on text that it should leave alone, for each coefficient.

    >>> effects = SideEffects([-1, 0, 1], kl_mean=[0.5, 0, 0.2], kl_p95=[1.5, 0, 0.9])
    >>> effects.largest_coefficients(0.25)
    CoefficientRange(low=-0.5, high=1.0, low_capped=False, high_capped=True)

    Raises
    ------
    UserError
        Arrays of other shapes than (n_coefficients,), a KL that is not finite, or a number that is infinite.
    """

    coefficients: np.ndarray
    """float64 (n_coefficients,): λ, put into ascending order"""
    kl_mean: np.ndarray
    """(n_coefficients,): KL(unsteered ‖ steered) of the next token, mean over the tokens of neutral text, nats"""
    kl_p95: np.ndarray
    """(n_coefficients,): its 95th percentile over tokens, nats"""
    perplexity_ratio: np.ndarray | None = None
    """(n_coefficients,): perplexity of neutral text, steered over unsteered"""
    distinct_1: np.ndarray | None = None
    """(n_coefficients,): `distinct_ngrams` of generated text; NaN where none was generated"""
    distinct_2: np.ndarray | None = None
    """(n_coefficients,)"""

    def __post_init__(self) -> None:
        coefficients = _coefficients(self.coefficients)
        order = np.argsort(coefficients)
        arrays = {"coefficients": coefficients[order]}
        for name in ("kl_mean", "kl_p95", "perplexity_ratio", "distinct_1", "distinct_2"):
            if getattr(self, name) is None:
                continue
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != coefficients.shape:
                raise UserError(f"{name} must be ({len(coefficients)},), got shape {array.shape}")
            broken = ~np.isfinite(array) if name.startswith("kl") else np.isinf(array)
            if broken.any():
                raise UserError(f"{name} at λ = {coefficients[broken][0]:g} is {array[broken][0]}")
            arrays[name] = array[order]
        _freeze(self, **arrays)

    def largest_coefficients(self, budget: float) -> CoefficientRange:
        """The λ on both sides of 0 up to which mean KL stays within a budget.

        From 0 outward, with straight lines between the coefficients measured; at λ = 0 the KL is 0. A range ends
        where KL first leaves the budget, whatever it does beyond.

        Parameters
        ----------
        budget : float
            Nats per token of neutral text.
        """
        if not 0 <= budget < float("inf"):
            raise UserError(f"a KL budget is a number of nats from 0 up, got {budget}")
        high, high_capped = _crossing(self.coefficients, self.kl_mean, budget)
        low, low_capped = _crossing(-self.coefficients[::-1], self.kl_mean[::-1], budget)
        return CoefficientRange(-low + 0.0, high, low_capped, high_capped)  # + 0.0: no minus in front of a zero


def distinct_ngrams(token_ids: Sequence[int], n: int) -> float:
    """Distinct n-grams of a text over all of its n-grams, 0 to 1 (distinct-n, Li et al. 2016, arXiv 1510.03055).

    >>> distinct_ngrams([5, 6, 5, 6, 5], 2)
    0.5

    The longer a text, the lower: compare, or average, texts of one length. NaN for a text of fewer than n tokens.
    """
    if n < 1:
        raise UserError(f"an n-gram has at least one token, got n = {n}")
    ids = [int(i) for i in token_ids]
    ngrams = list(zip(*(ids[start:] for start in range(n)), strict=False))
    return len(set(ngrams)) / len(ngrams) if ngrams else float("nan")


def percentile_among(slope: float, slopes: np.ndarray) -> float:
    """Percentile of a slope among controls: how many of n are below it, equal ones counted half, over n + 1.

    By chance alone, where a slope is one of its controls' kind, it is above all n of them once in n + 1 times: above
    all of 12 is the 92nd percentile, and the 99th needs 99 of them.
    """
    return float(100 * (n_below(slope, slopes) + 0.5 * (slopes == slope).sum()) / (len(slopes) + 1))


def n_below(slope: float, slopes: np.ndarray) -> int:
    """Count the slopes below one."""
    return int((slopes < slope).sum())


def above_controls(slope: float, slopes: np.ndarray) -> bool:
    """Tell whether a slope is above 99 of 100 controls; of fewer than 100, above all."""
    return n_below(slope, slopes) >= 0.99 * len(slopes)


def near_zero(slopes: np.ndarray) -> bool | None:
    """Tell whether the mean is within two standard errors of 0; None for fewer than two slopes."""
    if len(slopes) < 2:
        return None
    return bool(abs(np.mean(slopes)) <= 2 * stats.sem(slopes))


def _coefficients(given: Any) -> np.ndarray:
    """One copy of the coefficients in the order given; all finite, none twice."""
    try:
        coefficients = np.array(given, dtype=np.float64) + 0.0  # −0 is 0
    except (TypeError, ValueError):
        raise UserError(f"coefficients must be a list of finite numbers, got {given!r:.80}") from None
    if coefficients.ndim != 1 or not np.isfinite(coefficients).all():
        raise UserError(f"coefficients must be a list of finite numbers, got {coefficients.tolist()}")
    distinct, counts = np.unique(coefficients, return_counts=True)
    if (counts > 1).any():
        raise UserError(f"coefficient {distinct[counts > 1][0]:g} is there twice; give each λ once")
    return coefficients


def _freeze(obj: Any, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        array.flags.writeable = False
        object.__setattr__(obj, name, array)


def _deviations(rows: np.ndarray) -> np.ndarray:
    """Each row without its mean, exactly 0 where the row is constant, as the mean of equal numbers need not be one."""
    shifted = rows - rows[:, :1]
    deviations: np.ndarray = shifted - shifted.mean(axis=1, keepdims=True)
    return deviations


def _correlations(rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Pearson correlation of each row with x, (n_rows,); 0 for a constant row."""
    deviations, centred = _deviations(rows), x - x.mean()
    largest = np.abs(deviations).max(axis=1, keepdims=True)
    unit = deviations / np.where(largest > 0, largest, 1)  # or the square of a small number would be 0
    size = np.sqrt((unit**2).sum(axis=1) * (centred @ centred))
    correlations: np.ndarray = np.clip(unit @ centred / np.where(size > 0, size, 1), -1, 1)
    return correlations


def _bootstrap_mean(samples: np.ndarray, level: float, n_resamples: int, seed: int) -> np.ndarray:
    """Low and high ends for the mean of each column of (n_samples, n), as (2, n)."""
    if not 0 < level < 1:
        raise UserError(f"a confidence level lies between 0 and 1, got {level}")
    if len(samples) < 2:
        return np.full((2, samples.shape[1]), np.nan)
    samples = samples[np.lexsort(samples.T)]  # the order in which samples were measured makes no difference
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (samples,),
            np.mean,
            axis=0,
            confidence_level=level,
            n_resamples=n_resamples,
            batch=max(1, _BATCH // samples.size),
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    percentiles = np.quantile(result.bootstrap_distribution, ((1 - level) / 2, (1 + level) / 2), axis=-1)
    interval = np.array(result.confidence_interval)
    return np.where(np.isnan(interval).any(axis=0), percentiles, interval)


def _crossing(coefficients: np.ndarray, kl: np.ndarray, budget: float) -> tuple[float, bool]:
    """Find where a curve over λ ≥ 0 first leaves the budget; the last λ, and True, where it never does."""
    beyond = coefficients > 0
    before, below = 0.0, float(kl[coefficients == 0].max(initial=0.0))
    if below > budget:
        return 0.0, False
    for after, above in zip(coefficients[beyond].tolist(), kl[beyond].tolist(), strict=True):
        if above > budget:
            return before + (after - before) * (budget - below) / (above - below), False
        before, below = after, above
    return before, True
