"""What a grid shows, from the objects that it is made of: named sites, each with the panels of one of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from nblens.errors import UserError
from nblens.lens.shown import Shown
from nblens.views.panels import GridPanel, panels_of

__all__ = ["BASE", "DIFFERENCE", "STEERED", "Site", "drawn_panels", "named_panels", "read_sites"]

BASE, STEERED, DIFFERENCE = "base", "steered", "difference"


@dataclass(frozen=True)
class Site:
    """One grid among which the reader can switch: a panel, or two of the same prompt and what differs."""

    name: str
    shown: Shown
    panel: GridPanel
    """what is looked at first: the difference where there is one"""

    @classmethod
    def of(cls, shown: Shown, name: str = "") -> Site:
        """The last of an object's panels; a difference tells of both its sides."""
        panel = shown._panels()[-1]
        return cls(name or panel.site, shown, panel)

    @cached_property
    def sheets(self) -> dict[str, GridPanel]:
        """The panels that travel, by view; the page draws the difference from both."""
        if not self.panel.sides:
            return {BASE: self.panel}
        base, steered = self.panel.sides
        return {BASE: base, STEERED: _beside_base(steered, self.panel)}

    @property
    def views(self) -> tuple[str, ...]:
        """What can be looked at."""
        return (BASE, STEERED, DIFFERENCE) if self.panel.sides else (BASE,)

    @property
    def n_tokens(self) -> int:
        """Columns of the longest panel."""
        return max(panel.n_tokens for panel in self.sheets.values())


def read_sites(objects: Iterable[Any], layers: Any = None) -> tuple[Site, ...]:
    """Sites of one object or several, by their names; `layers` leaves out the other blocks.

    Raises
    ------
    UserError
        There is nothing to show, or something that has no panels.
    """
    sites: dict[str, Site] = {}
    for obj in objects:
        for name, one in obj.items() if isinstance(obj, Mapping) else [("", obj)]:
            site = _site(str(name), one, layers)
            unique = site.name
            while unique in sites:
                unique = f"{site.name} ({len(sites) + 1})"
            sites[unique] = replace(site, name=unique)
    if not sites:
        raise UserError("there is nothing to show; give a trajectory, a comparison or several of them")
    return tuple(sites.values())


def _site(name: str, obj: Any, layers: Any) -> Site:
    if not isinstance(obj, Shown):
        raise UserError(f"a grid shows trajectories, comparisons and differences, not {type(obj).__name__}")
    site = Site.of(obj if layers is None else obj._at_layers(layers), name)
    if len({(panel.layers, panel.top_ids.shape[-1]) for panel in site.sheets.values()}) > 1:
        raise UserError("the two sides of a comparison were read at different layers or with different top_k")
    return site


def _beside_base(steered: GridPanel, difference: GridPanel) -> GridPanel:
    """A panel with what was read of it beside the other: of all its tokens, NaN where the two share none."""
    room = ((0, 0), (0, steered.n_tokens - difference.n_tokens))

    def placed(values: np.ndarray) -> np.ndarray:
        return np.pad(values, room, constant_values=np.nan)

    own = {metric.name for metric in steered.metrics}
    more = (replace(m, values=placed(m.values)) for m in difference.metrics if m.name not in own)
    known = difference.base_logprob
    return replace(steered, metrics=(*steered.metrics, *more), base_logprob=None if known is None else placed(known))


def named_panels(sites: tuple[Site, ...]) -> dict[str, GridPanel]:
    """Every panel that travels, by what tells it from the others: its site, its view, or both."""
    if len(sites) == 1:
        return sites[0].sheets
    return {
        f"{site.name} {view}" if site.panel.sides else site.name: panel
        for site in sites
        for view, panel in site.sheets.items()
    }


def drawn_panels(sites: tuple[Site, ...]) -> tuple[GridPanel, ...]:
    """What stands for the grid where no page can show it; of several sites without their differences."""
    if len(sites) > 1:
        return panels_of({site.name: list(site.sheets.values()) for site in sites})
    panel = sites[0].panel
    sides = tuple(replace(side, text="") for side in panel.sides)  # the grid has no place for them either
    return panels_of([*sides, replace(panel, sides=sides)])
