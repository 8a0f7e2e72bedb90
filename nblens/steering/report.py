"""`SteerabilityReport`: what a steering vector does, what it costs, and how it compares with controls."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import FileFormatError, UserError
from nblens.files import replace_file
from nblens.steering.statistics import CoefficientRange, DoseResponse, SideEffects, near_zero, percentile_among
from nblens.steering.summary import summary_rows
from nblens.text import display_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SteerabilityReport"]

_FORMAT = "nblens.steerability"
_VERSION = 1
_TEXTS = ("name", "model", "site", "read", "write", "op", "method")
_NUMBERS = ("linear_limit", "kl_budget", "activation_norm", "vector_norm")
_CONTROLS = ("random_slopes", "shuffled_slopes")
_SPLITS = {"dose_response": "in distribution", "out_of_distribution": "out of distribution"}


@dataclass(frozen=True, repr=False, eq=False, kw_only=True)
class SteerabilityReport:
    """Steerability of one vector (Tan et al. 2024, arXiv 2407.12404) with its side effects and controls.

    >>> from nblens.demo import corpus
    >>> samples = corpus.behavior_samples("mood", "heldout", 4)
    >>> report = session.steerability("cheerful", samples, n_random=2, neutral=[])
    >>> report.n_samples, report.above_random
    (4, True)
    >>> text = report.to_json("cheerful.json")
    >>> SteerabilityReport.load("cheerful.json").fitted.mean_slope == report.fitted.mean_slope
    True

    Every slope is taken over the coefficients within `linear_limit`, those of the controls too. Slopes of the layers
    are over all coefficients: the limit was found after one of them was chosen.
    """

    name: str
    """of the steering vector"""
    model: str
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
    """E‖h‖, mean Euclidean norm of the unsteered activations that the vector is added to"""
    vector_norm: float | None = None
    """‖v‖, what λ = 1 adds to them"""
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
        return self._fitted(self.out_of_distribution)

    @property
    def scale_free_slope(self) -> float | None:
        """Mean slope × E‖h‖ / ‖v‖: nats for a push as large as an activation, whatever the vector's norm."""
        if not self.activation_norm or not self.vector_norm:
            return None
        return self.fitted.mean_slope * self.activation_norm / self.vector_norm

    @property
    def random_percentile(self) -> float | None:
        """Percentage of random directions whose mean slope is below the vector's, 0 to 100."""
        return None if self.random_slopes is None else percentile_among(self.fitted.mean_slope, self.random_slopes)

    @property
    def above_random(self) -> bool | None:
        """Whether the mean slope is above the 99th percentile of those of random directions."""
        return self._above(self.random_slopes)

    @property
    def above_shuffled(self) -> bool | None:
        """Whether it is above the 99th percentile of those of vectors made from shuffled labels."""
        return self._above(self.shuffled_slopes)

    def _above(self, slopes: np.ndarray | None) -> bool | None:
        return None if slopes is None else bool(self.fitted.mean_slope > np.percentile(slopes, 99))

    @property
    def random_near_zero(self) -> bool | None:
        """Whether random directions steer nowhere on average: their mean is within two standard errors of 0."""
        return None if self.random_slopes is None else near_zero(self.random_slopes)

    @property
    def shuffled_near_zero(self) -> bool | None:
        """Whether vectors from shuffled labels steer nowhere on average, as for `random_near_zero`."""
        return None if self.shuffled_slopes is None else near_zero(self.shuffled_slopes)

    @property
    def largest_coefficients(self) -> CoefficientRange | None:
        """The λ on both sides of 0 that stay within `kl_budget`; None where side effects or budget are missing."""
        if self.side_effects is None or self.kl_budget is None:
            return None
        return self.side_effects.largest_coefficients(self.kl_budget)

    @property
    def rows(self) -> list[tuple[str, str]]:
        """What a table of this report says: measure, value."""
        return summary_rows(self)

    def to_frame(self) -> pd.DataFrame:
        """A pandas data frame with one row per propensity: sample, coefficient, propensity, split.

        Every coefficient that was measured is there. Splits are "in distribution" and "out of distribution", and
        samples are counted from 0 in each.
        """
        import pandas as pd

        parts = []
        for name, split in _SPLITS.items():
            if (response := getattr(self, name)) is not None:
                sample, column = np.indices(response.values.shape).reshape(2, -1)
                coefficient, propensity = response.coefficients[column], response.values.ravel()
                columns = {"sample": sample, "coefficient": coefficient, "propensity": propensity, "split": split}
                parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Everything as strict JSON, returned and, where `path` is given, written in one step.

        Fields bear the names that they have here; a number that is not finite is null. `statistics` holds what
        follows from them, for other tools, and is not read back.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        content = {"format": _FORMAT, "version": _VERSION, **given, "statistics": self._statistics()}
        text = json.dumps(_jsonable(content), allow_nan=False)
        if path is not None:
            replace_file(path, text.encode())
        return text

    @classmethod
    def from_json(cls, text: str, source: str = "this text") -> SteerabilityReport:
        """Read what `to_json` gave.

        Raises
        ------
        FileFormatError
            The text is damaged, or is not a steerability report; `source` is how the message names it.
        """
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{source} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT or content.get("version") != _VERSION:
            raise FileFormatError(f"{source} is not a steerability report of version {_VERSION}")
        try:
            return cls(**_parsed({f.name: content[f.name] for f in fields(cls)}))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FileFormatError(f"{source} is damaged: {error!r}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteerabilityReport:
        """Read a file that `to_json` wrote; raises as `from_json` does."""
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        return cls.from_json(content.decode(errors="replace"), str(path))

    def plot(self) -> Figure:
        """Propensity over λ, and what it costs; see `nblens.plots.dose_response`."""
        from nblens import plots

        return plots.dose_response(self)

    def plot_layers(self) -> Figure:
        """Mean slope by block; see `nblens.plots.layer_sweep`."""
        from nblens import plots

        return plots.layer_sweep(self)

    def __repr__(self) -> str:
        rows = self.rows
        width = max(display_width(label) for label, _ in rows)
        return "\n".join(f"{label}{' ' * (width - display_width(label))}  {text}" for label, text in rows)

    def _statistics(self) -> dict[str, Any]:
        derived = ("n_samples", "scale_free_slope", "random_percentile", "above_random", "random_near_zero",
                   "above_shuffled", "shuffled_near_zero", "largest_coefficients")  # fmt: skip
        other = self.fitted_out_of_distribution
        return {
            "in_distribution": _described(self.fitted),
            "out_of_distribution": None if other is None else _described(other),
            **{name: getattr(self, name) for name in derived},
        }

    def _fitted(self, response: DoseResponse | None) -> Any:
        return response if response is None or self.linear_limit is None else response.within(self.linear_limit)


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


def _described(response: DoseResponse) -> dict[str, Any]:
    return {
        "mean_slope": response.mean_slope,
        "sd": response.sd,
        "ci_95": response.ci(),
        "anti_steerable_share": response.anti_steerable_share,
        "mean_spearman": response.spearman.mean(),
        "mean_r2": response.r2.mean(),
        "monotone_share": response.monotone_share,
        "slopes": response.slopes,
    }


def _jsonable(value: Any) -> Any:
    """Values made of what JSON knows; numbers that are not finite are null, keys are text."""
    if is_dataclass(value):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _jsonable(value.tolist())
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def _parsed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a report from those of its JSON."""
    if wrong := [name for name in _TEXTS if not isinstance(content[name], str)]:
        raise ValueError(f"{wrong[0]} must be text, got {content[wrong[0]]!r}")
    response, other, effects = (content[name] for name in (*_SPLITS, "side_effects"))
    return {
        **content,
        "layers": tuple(int(block) for block in content["layers"]),
        "norms": {int(block): _measured(norm) for block, norm in content["norms"].items()},
        "dose_response": DoseResponse(**response),
        "out_of_distribution": None if other is None else DoseResponse(**other),
        "side_effects": None if effects is None else SideEffects(**effects),
        "layer_slopes": {int(block): tuple(map(_measured, s)) for block, s in content["layer_slopes"].items()},
        **{name: {k: _measured(v) for k, v in content[name].items()} for name in ("by_label", "answer_balance")},
        "splits": {name: int(count) for name, count in content["splits"].items()},
    }


def _measured(number: float | None) -> float:
    return float("nan") if number is None else float(number)
