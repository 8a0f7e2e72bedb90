"""Scales and colours of numbers: the same in HTML, in figures and in widgets.

>>> scale = Scale.magnitude("prob", np.array([0.0, 0.5, 1.0]))
>>> scale.levels(np.array([0.0, 0.5, 1.0, np.nan])).tolist()
[0, 32, 63, -1]
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nblens.text import short_number

__all__ = [
    "DIFFERENCE_COLORS",
    "MAGNITUDE_COLORS",
    "TITLES",
    "Scale",
    "contrast",
    "ink",
]

TITLES = {
    "prob": "probability of the top token",
    "entropy": "entropy (nats)",
    "kl": "KL to the last block (nats)",
    "rank": "rank of the token that follows",
    "kl_from_base": "KL(base ‖ steered) (nats)",
}
"""What each metric is, in words."""

_VIRIDIS = """
440154 46075a 470d60 471365 48186a 481d6f 482374 482878 472d7b 46327e 453781 443b84 424086 404588 3e4989
3d4e8a 3a538b 38588c 365c8d 34608d 32648e 31688e 2f6c8e 2d708e 2c738e 2a778e 297b8e 277f8e 26828e 24868e
238a8d 218e8d 20928c 1f968b 1f9a8a 1f9e89 1fa187 21a585 23a983 26ad81 2ab07f 2fb47c 35b779 3bbb75 42be71
4ac16d 52c569 5ac864 65cb5e 6ece58 77d153 81d34d 8bd646 95d840 a0da39 aadc32 b5de2b c0df25 cae11f d5e21a
dfe318 eae51a f4e61e fde725
"""
_BLUE_WHITE_ORANGE = ("#1a4f9c", "#6ea6dc", "#f7f7f7", "#f5a55a", "#b84600")


def _hex(color: np.ndarray) -> str:
    return "#" + "".join(f"{round(255 * channel):02x}" for channel in color)


def _rgb(color: str) -> np.ndarray:
    return np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def _between(stops: tuple[str, ...], n: int) -> tuple[str, ...]:
    channels = np.array([_rgb(stop) for stop in stops]).T
    at = np.linspace(0, len(stops) - 1, n)
    return tuple(_hex(color) for color in np.transpose([np.interp(at, range(len(stops)), c) for c in channels]))


MAGNITUDE_COLORS = tuple("#" + code for code in _VIRIDIS.split())
"""Viridis in 64 levels, low to high."""
DIFFERENCE_COLORS = _between(_BLUE_WHITE_ORANGE, 63)
"""Blue–white–orange; an odd count, so that zero has a level of its own in the middle."""


def contrast(one: str, other: str) -> float:
    """WCAG 2 contrast ratio of two colours, 1 to 21."""
    low, high = sorted(_luminance(_rgb(color)) for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def _luminance(color: np.ndarray) -> float:
    linear = np.where(color <= 0.04045, color / 12.92, ((color + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))


def ink(background: str) -> str:
    """Black or white, whichever reads better on a colour; never below a contrast of 4.58."""
    return max("#000000", "#ffffff", key=lambda color: contrast(color, background))


@dataclass(frozen=True)
class Scale:
    """From numbers to colour levels, with what a legend needs.

    `high` is the largest magnitude shown. A logarithmic scale is for ranks: it starts at 1, its bright
    end; where signed it is linear around 0. A fixed scale ends at `high` whatever the values are.
    """

    title: str
    high: float = 1.0
    signed: bool = False
    logarithmic: bool = False
    fixed: bool = False

    @classmethod
    def magnitude(cls, metric: str, *values: np.ndarray) -> Scale:
        """A scale for a metric that covers all the values."""
        scale = cls(TITLES[metric], logarithmic=metric == "rank", fixed=metric == "prob")
        return scale.covering(*values)

    @classmethod
    def difference(cls, metric: str, *values: np.ndarray, high: float | None = None) -> Scale:
        """A scale around zero; give `high` of a magnitude scale to share its units."""
        scale = cls(f"change of {TITLES[metric]}", signed=True, logarithmic=metric == "rank")
        return scale.covering(*values) if high is None else replace(scale, high=high)

    def covering(self, *values: np.ndarray) -> Scale:
        """The same scale, up to the largest of all the values, rounded up to two digits, a rank to a power of ten."""
        if self.fixed:
            return self
        found = np.concatenate([np.zeros(0), *map(np.ravel, values)])
        found = found[np.isfinite(found)]
        top = float((np.abs(found) if self.signed else found).max(initial=0.0))
        if self.logarithmic and not self.signed:
            return replace(self, high=10.0 ** max(1, math.ceil(math.log10(max(top, 1)))))
        if top == 0:
            return replace(self, high=1.0)
        unit = 10.0 ** (math.floor(math.log10(top)) - 1)
        return replace(self, high=math.ceil(round(top / unit, 6)) * unit)

    @property
    def colors(self) -> tuple[str, ...]:
        """The colours of levels 0, 1, …"""
        return DIFFERENCE_COLORS if self.signed else MAGNITUDE_COLORS

    def positions(self, values: Any) -> np.ndarray:
        """Places on the scale from 0 to 1; NaN where a value is NaN."""
        at: np.ndarray = np.minimum(np.abs(np.asarray(values, dtype=float)), self.high)
        if self.signed:
            part = np.log1p(at) / np.log1p(self.high) if self.logarithmic else at / self.high
            at = 0.5 + 0.5 * np.sign(values) * part
        elif self.logarithmic:
            at = 1 - np.log(np.maximum(at, 1)) / np.log(self.high)
        else:
            at = at / self.high
        return at

    def levels(self, values: np.ndarray) -> np.ndarray:
        """Indices into `colors`; -1 where a value is NaN."""
        at = self.positions(values)
        return np.where(np.isnan(at), -1, np.rint(np.nan_to_num(at) * (len(self.colors) - 1))).astype(int)

    def ticks(self) -> list[tuple[float, str]]:
        """Evenly spaced positions, ascending, and their numbers, for a legend."""
        if self.signed:
            values = [-self.high, 0, self.high]
        elif self.logarithmic:
            values = [10**i for i in range(round(np.log10(self.high)), -1, -1)]
        else:
            values = [0, self.high / 2, self.high]
        sign = "+" if self.signed else ""
        return [(float(self.positions(v)), (sign if v > 0 else "") + short_number(v)) for v in values]
