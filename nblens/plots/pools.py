"""What one picture is made of: a dict is compared under its keys, a list is taken together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nblens.errors import UserError
from nblens.views.panels import GridPanel, panels_of

__all__ = ["pools"]


def pools(obj: Any) -> dict[str, list[GridPanel]]:
    """Panels by name, both runs of a comparison apart; the name of a single one, or of a single list, is empty.

    Raises
    ------
    UserError
        Something in it is no trajectory, a list is empty, or a list holds trajectories of different layers.
    """
    named = obj if isinstance(obj, Mapping) else {"": obj}
    pooled: dict[str, list[GridPanel]] = {}
    for name, value in named.items():
        panels = [panel for panel in panels_of(value) if not panel.sides]
        if not panels:
            raise UserError("there is no trajectory to draw")
        for panel in panels:
            pooled.setdefault(" ".join(filter(None, [str(name), panel.title])), []).append(panel)
    if not pooled:
        raise UserError("there is no trajectory to draw")
    if any(len({panel.layers for panel in panels}) > 1 for panels in pooled.values()):
        raise UserError(
            "trajectories of different layers cannot be taken together; name them in a dict to compare them"
        )
    return pooled
