"""`SteerabilityReport`: what a steering vector does, what it costs, and how it compares with controls."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.circumstances import Circumstances
from nblens.errors import FileFormatError
from nblens.files import expanded, read_whole, replace_file
from nblens.records import RecordFormat, sound_content
from nblens.steering.statistics import DoseResponse, SideEffects
from nblens.steering.steerability import Steerability
from nblens.steering.summary import summary_rows
from nblens.text import display_width

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SteerabilityReport"]

_FORMAT = RecordFormat("nblens.steerability", 1, "a steerability report", most_bytes=2**28)
_TEXTS = ("name", "model", "site", "read", "write", "op", "method")
_SPLITS = {"dose_response": "in distribution", "out_of_distribution": "out of distribution"}


class SteerabilityReport(Steerability):
    """Steerability of one vector (Tan et al. 2024, arXiv 2407.12404) with its side effects and controls.

    >>> from nblens.demo import corpus
    >>> samples = corpus.behavior_samples("mood", "heldout", 4)
    >>> report = session.steerability("cheerful", samples, n_random=2, neutral=[])
    >>> report.n_samples, report.above_random
    (4, True)
    >>> SteerabilityReport.load(report.save("cheerful.json")).fitted.mean_slope == report.fitted.mean_slope
    True

    Every slope is taken over the coefficients within `linear_limit`, those of the controls too. Slopes of the layers
    are over all coefficients: the limit was found after one of them was chosen. Fields and statistics are those of
    `Steerability`.
    """

    @property
    def rows(self) -> list[tuple[str, str]]:
        """Rows of a table of this report: measure, value."""
        return summary_rows(self)

    def to_frame(self) -> pd.DataFrame:
        """Return a pandas data frame with one row per propensity: sample, coefficient, propensity, split.

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
        """Return everything as strict JSON and, where `path` is given, write it in one step.

        Fields bear the names that they have here; a number that is not finite is null. `statistics` holds what
        follows from them, for other tools, and is not read back.
        """
        header = {"format": _FORMAT.name, "version": _FORMAT.version}
        text = json.dumps({**header, **self._plain(), "statistics": _jsonable(self._statistics())}, allow_nan=False)
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
        _FORMAT.check(content if isinstance(content, dict) else {}, source)
        return cls._from_plain(content, source)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to safetensors where the name ends in `.safetensors`, else by `to_json`."""
        if _is_safetensors(path):
            return _FORMAT.save(path, self._plain(), {})
        self.to_json(path)
        return expanded(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SteerabilityReport:
        """Read a file that `save` or `to_json` wrote; raises as `from_json` does."""
        if _is_safetensors(path):
            plain, _ = _FORMAT.load(path)
            return cls._from_plain(plain, path)
        return cls.from_json(read_whole(path).decode(errors="replace"), str(path))

    def plot(self) -> Figure:
        """Draw propensity over λ, and what it costs; see `nblens.plots.dose_response`."""
        from nblens import plots

        return plots.dose_response(self)

    def plot_layers(self) -> Figure:
        """Draw the mean slope by block; see `nblens.plots.layer_sweep`."""
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

    def _plain(self) -> dict[str, Any]:
        return {f.name: _jsonable(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def _from_plain(cls, content: Mapping[str, Any], source: str | os.PathLike[str]) -> SteerabilityReport:
        with sound_content(source):
            known = {"circumstances": {}, **content}  # files of 0.1 have none
            return cls(**_parsed({f.name: known[f.name] for f in fields(cls)}))


def _is_safetensors(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".safetensors"


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
        "circumstances": Circumstances.of_plain(content["circumstances"]),
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
