"""nblens: a large language model made visible and steerable from a notebook.

>>> import nblens
>>> session = nblens.load()  # the built-in model
>>> session.lens("The capital of France is").top()[0][0]
' Paris'

In Jupyter: ``%load_ext nblens``, then ``%load_sharded``, ``%%lens``, ``%steer``, ``%%generate``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nblens.errors import (
    DeviceMemoryError,
    DoesNotFitError,
    FileFormatError,
    Interrupted,
    NblensError,
    NoModelError,
    NumericalError,
    UnsupportedModelError,
    UserError,
    VectorMismatchError,
    WorkerError,
)

if TYPE_CHECKING:
    from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
    from nblens.jupyter.panel.steering_panel import SteeringPanel
    from nblens.lens.attribution import Attribution
    from nblens.lens.comparison import Comparison
    from nblens.lens.lens import Lens
    from nblens.lens.trajectory import Trajectory, TrajectoryDiff
    from nblens.loading import attach, current, load
    from nblens.planning.plan import Plan
    from nblens.planning.planner import plan
    from nblens.results import Generation
    from nblens.session import Session
    from nblens.specs import Steer
    from nblens.steering.samples import Sample
    from nblens.steering.vectors import SteeringVector

__version__ = "0.1.0"

# Loaded on first use: `import nblens` must not pull in torch, transformers or IPython.
_LAZY = {
    "Attribution": "nblens.lens.attribution",
    "Comparison": "nblens.lens.comparison",
    "Generation": "nblens.results",
    "Lens": "nblens.lens.lens",
    "Plan": "nblens.planning.plan",
    "Sample": "nblens.steering.samples",
    "Session": "nblens.session",
    "Steer": "nblens.specs",
    "SteeringVector": "nblens.steering.vectors",
    "SteeringPanel": "nblens.jupyter.panel.steering_panel",
    "Trajectory": "nblens.lens.trajectory",
    "TrajectoryDiff": "nblens.lens.trajectory",
    "TrajectoryGrid": "nblens.jupyter.grid.trajectory_grid",
    "attach": "nblens.loading",
    "current": "nblens.loading",
    "load": "nblens.loading",
    "plan": "nblens.planning.planner",
}

__all__ = [
    "Attribution",
    "Comparison",
    "DeviceMemoryError",
    "DoesNotFitError",
    "FileFormatError",
    "Generation",
    "Interrupted",
    "Lens",
    "NblensError",
    "NoModelError",
    "NumericalError",
    "Plan",
    "Sample",
    "Session",
    "Steer",
    "SteeringPanel",
    "SteeringVector",
    "Trajectory",
    "TrajectoryDiff",
    "TrajectoryGrid",
    "UnsupportedModelError",
    "UserError",
    "VectorMismatchError",
    "WorkerError",
    "attach",
    "current",
    "load",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'nblens' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def load_ipython_extension(ipython: Any) -> None:
    """Register the magics: what ``%load_ext nblens`` calls."""
    from nblens.jupyter.magics.magics import load_ipython_extension

    load_ipython_extension(ipython)


def unload_ipython_extension(ipython: Any) -> None:
    """Remove the magics and free the model: what ``%unload_ext nblens`` calls."""
    from nblens.jupyter.magics.magics import unload_ipython_extension

    unload_ipython_extension(ipython)
