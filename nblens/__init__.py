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
    UnknownNameError,
    UnsupportedModelError,
    UserError,
    VectorMismatchError,
    WorkerError,
)

if TYPE_CHECKING:
    from nblens.circumstances import Circumstances, SteeredBy
    from nblens.evaluation.measurement import Measurement
    from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
    from nblens.jupyter.panel.steering_panel import SteeringPanel
    from nblens.lens.attribution import Attribution
    from nblens.lens.by_site import SiteTrajectories
    from nblens.lens.comparison import Comparison
    from nblens.lens.lens import Lens
    from nblens.lens.lens_store import LensStore
    from nblens.lens.trajectory import Trajectory, TrajectoryDiff
    from nblens.loading import attach, current, load
    from nblens.model.placement import DeviceShare, Placement
    from nblens.planning.plan import DevicePlan, Plan, Proposal
    from nblens.planning.planner import plan
    from nblens.results import Generation, Sweep
    from nblens.session import Session
    from nblens.steering.live_steering import LiveSteering
    from nblens.steering.report import SteerabilityReport
    from nblens.steering.samples import Sample
    from nblens.steering.statistics import CoefficientRange, DoseResponse, SideEffects
    from nblens.steering.steer import Steer
    from nblens.steering.vector_store import VectorStore
    from nblens.steering.vectors import SteeringVector

__version__ = "0.1.0"

# Loaded on first use: `import nblens` must not pull in torch, transformers or IPython.
_LAZY = {
    "Attribution": "nblens.lens.attribution",
    "Circumstances": "nblens.circumstances",
    "CoefficientRange": "nblens.steering.statistics",
    "Comparison": "nblens.lens.comparison",
    "DevicePlan": "nblens.planning.plan",
    "DeviceShare": "nblens.model.placement",
    "DoseResponse": "nblens.steering.statistics",
    "Generation": "nblens.results",
    "Lens": "nblens.lens.lens",
    "LensStore": "nblens.lens.lens_store",
    "LiveSteering": "nblens.steering.live_steering",
    "Measurement": "nblens.evaluation.measurement",
    "Placement": "nblens.model.placement",
    "Plan": "nblens.planning.plan",
    "Proposal": "nblens.planning.plan",
    "Sample": "nblens.steering.samples",
    "Session": "nblens.session",
    "SideEffects": "nblens.steering.statistics",
    "SiteTrajectories": "nblens.lens.by_site",
    "Steer": "nblens.steering.steer",
    "SteerabilityReport": "nblens.steering.report",
    "SteeredBy": "nblens.circumstances",
    "SteeringPanel": "nblens.jupyter.panel.steering_panel",
    "SteeringVector": "nblens.steering.vectors",
    "Sweep": "nblens.results",
    "Trajectory": "nblens.lens.trajectory",
    "TrajectoryDiff": "nblens.lens.trajectory",
    "TrajectoryGrid": "nblens.jupyter.grid.trajectory_grid",
    "VectorStore": "nblens.steering.vector_store",
    "attach": "nblens.loading",
    "current": "nblens.loading",
    "load": "nblens.loading",
    "plan": "nblens.planning.planner",
}

__all__ = [
    "Attribution",
    "Circumstances",
    "CoefficientRange",
    "Comparison",
    "DeviceMemoryError",
    "DevicePlan",
    "DeviceShare",
    "DoesNotFitError",
    "DoseResponse",
    "FileFormatError",
    "Generation",
    "Interrupted",
    "Lens",
    "LensStore",
    "LiveSteering",
    "Measurement",
    "NblensError",
    "NoModelError",
    "NumericalError",
    "Placement",
    "Plan",
    "Proposal",
    "Sample",
    "Session",
    "SideEffects",
    "SiteTrajectories",
    "Steer",
    "SteerabilityReport",
    "SteeredBy",
    "SteeringPanel",
    "SteeringVector",
    "Sweep",
    "Trajectory",
    "TrajectoryDiff",
    "TrajectoryGrid",
    "UnknownNameError",
    "UnsupportedModelError",
    "UserError",
    "VectorMismatchError",
    "VectorStore",
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
