"""What a grid saves for a reader who asks for it on the page: the text of a file."""

from __future__ import annotations

import json
from typing import Any

from nblens.lens.difference import Comparison
from nblens.lens.trajectory import Trajectory

__all__ = ["EXPORTS", "export"]

EXPORTS = ("html", "json")


def export(shown: Any, kind: str, metric: str) -> str:
    """A page, or JSON as of `Trajectory.to_json`; of a comparison, and of other sequences, each by its name."""
    if kind == "html":
        return shown.to_html(metric=metric)
    if isinstance(shown, Comparison):
        sides = {"base": shown.base, "steered": shown.steered}
        return json.dumps({name: json.loads(side.to_json()) for name, side in sides.items()}) + "\n"
    if isinstance(shown, Trajectory) or len({(t.tokens, t.layers) for t in shown.values()}) == 1:
        return shown.to_json()
    return json.dumps({name: json.loads(trajectory.to_json()) for name, trajectory in shown.items()}) + "\n"
