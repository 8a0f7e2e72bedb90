"""The public API as a user's typed code sees it: checked by mypy, never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import numpy as np
import torch

import nblens
from nblens.lens.by_site import SiteTrajectories
from nblens.results import Sweep
from nblens.steering.report import SteerabilityReport
from nblens.steering.statistics import CoefficientRange, DoseResponse

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def load(name: str) -> nblens.Session:
    """Plan first, then load; a refusal carries its plan."""
    plan = nblens.plan(name, max_memory={0: "80GiB", "cpu": "200GiB"}, tp=2, context=8192)
    assert_type(plan, nblens.Plan)
    assert_type(plan.fits, bool | None)
    assert_type([device.left_bytes for device in plan.devices], list[int | None])
    try:
        return nblens.load(name, dtype=torch.bfloat16, tp=2)
    except nblens.DoesNotFitError as error:
        print(error.plan)
        return nblens.load()


def read(session: nblens.Session) -> float:
    """Everything that is read."""
    trajectory: nblens.Trajectory = session.lens("The capital of France is", layers="::4", targets=["Paris"])
    assert_type(trajectory.top(-1, -1), list[tuple[str, float]])
    assert_type(trajectory.layers, tuple[int, ...])
    assert_type(trajectory.n_tokens, int)
    assert_type(trajectory.to_json(Path("lens.json")), str)
    assert_type(trajectory.save("lens.safetensors"), Path)
    assert_type(nblens.Trajectory.load("lens.safetensors"), nblens.Trajectory)
    by_site: SiteTrajectories = session.lens("The capital of France is", sites=["attn_out", "mlp_out"])
    assert_type(by_site["attn_out"], nblens.Trajectory)
    parts = session.attribute("The capital of France is", ["Paris"])
    assert_type(parts, nblens.Attribution)
    figures: list[Figure] = [trajectory.plot("kl"), parts.plot(), trajectory.plot_decided(against="next")]
    both = session.compare("The summer was", steer={"cheerful": 1.5}, generate=8)
    assert_type(both, nblens.Comparison)
    assert_type(both.diff, nblens.TrajectoryDiff)
    states: torch.Tensor = session.capture("The capital of France is", layers=[0, -1])
    values: np.ndarray = trajectory.metric("entropy") + both.diff.metric("entropy")
    return float(values.mean()) + len(figures) + states.shape[0]


def steer(session: nblens.Session) -> float | None:
    """Everything that steers."""
    pairs = [("so glad", "so sad"), nblens.Sample("I am", " glad", " sad")]
    vector = session.extract("cheerful", pairs, method="logistic", read="last")
    assert_type(vector, nblens.SteeringVector)
    mixed = (vector - 0.5 * session.vectors["cheerful"]).normalized().at((3, 4))
    assert_type(mixed, nblens.SteeringVector)
    session.vectors["mixed"] = mixed
    session.steer([nblens.Steer("mixed", 1.0, op="ablate", write="4-9")])
    assert_type(session.steer.setting, dict[str, nblens.Steer])
    session.steer.off()
    out: nblens.Generation = session.generate("The summer was", 8, steer={"cheerful": -1.5}, top_p=0.9, temperature=0.8)
    assert_type(out.trajectory, nblens.Trajectory | None)
    sweep = session.sweep("The summer was", "cheerful", [-1, 0, 1], answers=(" lovely", " awful"))
    assert_type(sweep, Sweep)
    assert_type(sweep[0], nblens.Generation)
    report = session.steering_experiment("mood", "samples.jsonl", layers="4-7")
    assert_type(report, SteerabilityReport)
    assert_type(report.fitted, DoseResponse)
    assert_type(report.largest_coefficients, CoefficientRange | None)
    return report.scale_free_slope


def fit(session: nblens.Session) -> nblens.Lens:
    """Lenses, and what a stopped run leaves."""
    try:
        lens = session.fit_lens(["one text", "another text"], steps=10)
    except nblens.Interrupted as stopped:
        return nblens.Lens.load("tuned.safetensors") if stopped.partial is None else stopped.partial
    assert_type(lens, nblens.Lens)
    assert_type(lens.translate(torch.zeros(3, lens.d_model), depth=2), torch.Tensor)
    return session.lenses[lens.name]


def show(session: nblens.Session) -> tuple[str, str]:
    """Widgets."""
    grid = nblens.TrajectoryGrid(session.lens("The capital of France is"), metric="entropy")
    grid.selection = (-1, -1)
    panel = nblens.SteeringPanel(session, prompt="The summer was")
    assert_type(panel.generate().wait(10), bool)
    return panel.texts
