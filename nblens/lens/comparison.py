"""`Comparison`: a steered run beside its base."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Self

from nblens.lens.cell_panels import panel_of
from nblens.lens.shown import Shown
from nblens.lens.trajectory import Trajectory, TrajectoryDiff
from nblens.views.panels import GridPanel

__all__ = ["Comparison"]


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

    @property
    def diff(self) -> TrajectoryDiff:
        """`steered - base`."""
        return self.base.diff(self.steered)

    def __repr__(self) -> str:
        return f"Comparison(base={self.base!r}, steered={self.steered!r}, diff={self.diff!r})"

    def _panels(self) -> tuple[GridPanel, ...]:
        sides = panel_of(self.base, "base", self.base_text), panel_of(self.steered, "steered", self.steered_text)
        return *sides, self.diff._panel("steered − base", sides)

    def _at_layers(self, layers: Any) -> Self:
        return replace(self, base=self.base._at_layers(layers), steered=self.steered._at_layers(layers))

    def _followed_by(self, more: Self) -> Self:
        base, steered = self.base._followed_by(more.base), self.steered._followed_by(more.steered)
        return replace(self, base=base, steered=steered)
