"""Readouts of one sequence as a panel: what its grid shows in HTML, in figures and in widgets."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from nblens.colors import Scale
from nblens.lens.cells import METRICS, Cells
from nblens.views.panels import GridPanel, Metric

__all__ = ["panel_of"]

# A thin space: what stands under a grid has wide word spacing, which it is exempt from.
_NOTES = {"entropy": "H\u2009{:.2f}", "kl": "KL\u2009{:.2f}", "rank": "next\u2009#{:.0f}"}
_SHARED = {field.name for field in fields(GridPanel)} & {field.name for field in fields(Cells)} - {"circumstances"}


def panel_of(cells: Cells, title: str = "", text: str = "") -> GridPanel:
    """The panel of a sequence, in which cells that agree with the last block are marked."""
    top = cells.top_ids[..., 0]
    same: dict[str, Any] = {name: getattr(cells, name) for name in _SHARED}
    return GridPanel(
        title=title,
        metrics=tuple(_metric(cells, name) for name in METRICS),
        marked=top == top[-1],
        mark_means="as in the last block",
        text=text,
        characters=cells.characters,
        circumstances=cells.circumstances.facts,
        **same,
    )


def _metric(cells: Cells, name: str) -> Metric:
    values = np.asarray(cells.metric(name), dtype=float)
    if name == "rank":
        values = np.where(values < 1, np.nan, values)
    return Metric(name, values, Scale.magnitude(name), _NOTES.get(name, ""))
