"""`Shown`: what everything that is drawn as a grid of layers and tokens can do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

from nblens.files import replace_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from nblens.lens.html import Rendered

__all__ = ["Shown"]


class Shown:
    """A trajectory, several, or a difference: as a page, as a figure, and in a cell."""

    def to_html(self, path: str | os.PathLike[str] | None = None, *, metric: str = "prob") -> str:
        """The grids, on one scale, as one self-contained HTML page, returned and, where `path` is given, written."""
        from nblens.lens.html import render_page

        page = render_page(cast("Rendered", self), metric=metric)
        if path is not None:
            replace_file(path, page.encode())
        return page

    def plot(self, metric: str = "prob") -> Figure:
        """The grids, on one scale, as a matplotlib figure; `metric` is "prob", "entropy", "kl" or "rank"."""
        from nblens import plots

        return plots.trajectory_grid(self, metric=metric)

    def _repr_html_(self) -> str:
        from nblens.lens.html import render_fragment

        return render_fragment(cast("Rendered", self))
