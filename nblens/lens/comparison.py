"""`Comparison`: a steered run beside its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from nblens.lens.cell_panels import panel_of
from nblens.lens.shown import Shown
from nblens.lens.trajectory import Trajectory, TrajectoryDiff
from nblens.views.panels import GridPanel

__all__ = ["BESIDE_BASE", "Comparison"]

BESIDE_BASE = ("base_logprob", "kl_from_base")
"""Fields that are read of one run beside the other, while both run."""


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Shown):
    """The same prompt without and with steering: two rows of one batch.

    >>> both = session.compare("The summer was", steer={"cheerful": -1.5}, generate=1)
    >>> both.base_text, both.steered_text
    (' quite', ' dreary')
    >>> both.base.top()[0][0], both.steered.top()[0][0]
    (' quite', ' dreary')
    """

    base: Trajectory
    steered: Trajectory
    base_text: str = ""
    """new text without steering; empty where nothing was generated"""
    steered_text: str = ""
    base_logprob: np.ndarray | None = None
    """float32 (n_layers, n_tokens of `steered`), nats: of the token that `steered` puts first, in `base`; NaN where
    `base` has no such token. None: not read, as where a model takes no two rows at once"""
    kl_from_base: np.ndarray | None = None
    """float32 (n_layers, n_tokens of `steered`), nats: KL(base ‖ steered) over the whole vocabulary; None: not read"""

    @property
    def diff(self) -> TrajectoryDiff:
        """`steered - base`."""
        return TrajectoryDiff.between(self.base, self.steered, self.base_logprob, self.kl_from_base)

    def __repr__(self) -> str:
        return f"Comparison(base={self.base!r}, steered={self.steered!r}, diff={self.diff!r})"

    def _panels(self) -> tuple[GridPanel, ...]:
        sides = panel_of(self.base, "base", self.base_text), panel_of(self.steered, "steered", self.steered_text)
        return *sides, self.diff._panel("steered − base", sides)

    def _at_layers(self, layers: Any) -> Self:
        rows = self.steered._rows_of(layers)
        beside: dict[str, Any] = {name: getattr(self, name) for name in BESIDE_BASE}
        beside = {name: None if array is None else array[rows] for name, array in beside.items()}
        return replace(self, base=self.base._at_layers(layers), steered=self.steered._at_layers(layers), **beside)

    def _followed_by(self, more: Self) -> Self:
        base, steered = self.base._followed_by(more.base), self.steered._followed_by(more.steered)
        beside: dict[str, Any] = {name: _joined(getattr(self, name), getattr(more, name)) for name in BESIDE_BASE}
        return replace(self, base=base, steered=steered, **beside)


def _joined(one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
    """What is known of all tokens, or nothing."""
    return None if one is None or other is None else np.concatenate([one, other], axis=1)
