"""`Shown`: what everything that is drawn as a grid of layers and tokens can do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

from nblens import plots
from nblens.files import replace_file
from nblens.views.html import render_fragment, render_page
from nblens.views.panels import GridPanel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Shown"]


class Shown:
    """A trajectory, several, or a difference: as a page, as a figure, and in a cell.

    A subclass makes its panels, and says how it is cut and continued for a live grid.
    """

    def to_html(self, path: str | os.PathLike[str] | None = None, *, metric: str | None = None) -> str:
        """The grids, on one scale, as one self-contained HTML page, returned and, where `path` is given, written.

        `metric` colours the cells, as in `plot`.
        """
        page = render_page(self, metric=metric)
        if path is not None:
            replace_file(path, page.encode())
        return page

    def plot(self, metric: str | None = None) -> Figure:
        """The grids, on one scale, as a matplotlib figure.

        `metric` is "prob" (None), "entropy", "kl", "rank", or of a comparison "kl_from_base".
        """
        return plots.trajectory_grid(self, metric=metric)

    def _repr_html_(self) -> str:
        return render_fragment(self)

    def _panels(self) -> tuple[GridPanel, ...]:
        """What is drawn, under each other; `panels_of` puts it on one scale."""
        raise NotImplementedError

    def _at_layers(self, layers: Any) -> Self:
        """The same over some of its layers, as of a layer spec."""
        raise NotImplementedError

    def _followed_by(self, more: Self) -> Self:
        """The same with the tokens that come next."""
        raise NotImplementedError
