"""Trajectories and steerability reports as matplotlib figures, made of plain arrays and free of pyplot's global state.

>>> one, two = session.lens(["The capital of France is", "In Warsaw you pay with the"])
>>> trajectory_grid(one, metric="entropy").savefig("grid.png")
>>> figures = token_curves(one, tokens=[" Paris", " French"]), decided_histogram([one, two], against="next")
>>> len(depth_curves({"France": one, "both": [one, two]}, metric="kl").axes)
1

Where several trajectories can be given, a dict is compared, part by part under its keys, and a list is taken
together. matplotlib is imported when a figure is made, not before. A figure shows itself in a notebook, with or
without ``%matplotlib``.
"""

from nblens.plots.bars import attribution_bars
from nblens.plots.curves import depth_curves, token_curves
from nblens.plots.decided import decided_histogram
from nblens.plots.dose_curves import dose_response, layer_sweep, strength_curve
from nblens.plots.grid import trajectory_grid

__all__ = [
    "attribution_bars",
    "decided_histogram",
    "depth_curves",
    "dose_response",
    "layer_sweep",
    "strength_curve",
    "token_curves",
    "trajectory_grid",
]
