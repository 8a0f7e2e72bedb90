"""`SiteTrajectories`: one sequence read at several sites."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nblens import plots
from nblens.files import replace_file
from nblens.lens.cell_panels import panel_of
from nblens.lens.export import as_frame, as_json
from nblens.lens.shown import Shown
from nblens.lens.trajectory import Trajectory

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SiteTrajectories"]


class SiteTrajectories(Shown, dict[str, Trajectory]):
    """Trajectories of one sequence by site: a dict, with what one does to all of them at once.

    >>> both = session.lens("The capital of France is", sites=["resid_pre", "resid_post"])
    >>> both["resid_post"].top()[0][0]
    ' Paris'
    >>> len(both.to_frame())  # 2 sites × 12 blocks × 6 tokens
    144
    """

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """All sites as one JSON object, each a component of a layer; see `Trajectory.to_json`."""
        text = as_json({site: panel_of(trajectory) for site, trajectory in self.items()})
        if path is not None:
            replace_file(path, text.encode())
        return text

    def to_frame(self, *, long: bool = False) -> pd.DataFrame:
        """All sites under each other, with a first column `site`; see `Trajectory.to_frame`."""
        import pandas as pd

        frames = {site: as_frame(trajectory, long=long) for site, trajectory in self.items()}
        return pd.concat(frames, names=["site", None]).reset_index("site").reset_index(drop=True)

    def plot_depth(self, metric: str = "entropy") -> Figure:
        """A metric over depth with a curve for each site; see `Trajectory.plot_depth`."""
        return plots.depth_curves(self, metric)
