"""What a grid saves for a reader who asks for it on the page: the text of a file."""

from __future__ import annotations

import json

from nblens.jupyter.grid.sheets import Site, drawn_panels, named_panels
from nblens.lens.export import as_json
from nblens.views.html import render_page

__all__ = ["EXPORTS", "export"]

EXPORTS = ("html", "json")


def export(sites: tuple[Site, ...], kind: str, metric: str) -> str:
    """A page, or JSON as of `Trajectory.to_json`; of a comparison, and of other sequences, each by its name."""
    if kind == "html":
        name = "SiteTrajectories" if len(sites) > 1 else type(sites[0].shown).__name__
        return render_page(drawn_panels(sites), metric=metric, name=name)
    panels = named_panels(sites)
    if len(panels) == 1:
        return as_json({panel.site: panel for panel in panels.values()})
    if len(sites) > 1 and len({(panel.tokens, panel.layers) for panel in panels.values()}) == 1:
        return as_json(panels)
    return json.dumps({name: json.loads(as_json({panel.site: panel})) for name, panel in panels.items()}) + "\n"
