"""The public API as a user's typed code sees it: checked by mypy, never run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, assert_type

import numpy as np
import torch

import nblens

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
    trajectory = session.lens("The capital of France is", layers="::4", targets=["Paris"])
    assert_type(trajectory, nblens.Trajectory)
    assert_type(trajectory.top(-1, -1), list[tuple[str, float]])
    assert_type(trajectory.layers, tuple[int, ...])
    assert_type(trajectory.n_tokens, int)
    assert_type(trajectory.to_json(Path("lens.json")), str)
    assert_type(trajectory.save("lens.safetensors"), Path)
    assert_type(nblens.Trajectory.load("lens.safetensors"), nblens.Trajectory)
    by_site = session.lens("The capital of France is", sites=["attn_out", "mlp_out"])
    assert_type(by_site, nblens.SiteTrajectories)
    assert_type(by_site["attn_out"], nblens.Trajectory)
    parts = session.attribute("The capital of France is", ["Paris"])
    assert_type(parts, nblens.Attribution)
    figures: list[Figure] = [trajectory.plot("kl"), parts.plot(), trajectory.plot_decided(against="next")]
    both = session.compare("The summer was", steer={"cheerful": 1.5}, generate=8)
    assert_type(both, nblens.Comparison)
    assert_type(both.diff, nblens.TrajectoryDiff)
    states = session.capture("The capital of France is", layers=[0, -1])
    values: np.ndarray = trajectory.metric("entropy") + both.diff.metric("entropy")
    return float(values.mean()) + len(figures) + states.shape[0]


def shapes(session: nblens.Session, texts: list[str], ids: list[int], either: str | list[str]) -> None:
    """What comes back follows from one prompt or several, and from one site or several."""
    several = ["resid_pre", "resid_post"]
    assert_type(session.lens(ids, site="attn_out", max_new_tokens=4, top_p=0.9), nblens.Trajectory)
    assert_type(session.lens(texts, sites="attn_out", seed=range(5)), list[nblens.Trajectory])
    assert_type(session.lens([ids, ids], watch=print), list[nblens.Trajectory])
    assert_type(session.lens("The", sites=("attn_out",), steer={"cheerful": 1.5}), nblens.SiteTrajectories)
    assert_type(session.lens(texts, sites=several, generate=4), list[nblens.SiteTrajectories])
    assert_type(session.lens(either), nblens.Trajectory | list[nblens.Trajectory])
    assert_type(session.generate("The"), nblens.Generation)
    assert_type(session.generate(ids, 8, lens={"layers": "::4"}, stop_strings=["."], top_k=40), nblens.Generation)
    assert_type(session.generate(texts, max_new_tokens=8, temperature=0.7), list[nblens.Generation])
    assert_type(session.capture("The", site="mlp_out"), torch.Tensor)
    assert_type(session.capture(texts, positions="last", max_new_tokens=2, top_k=40), list[torch.Tensor])
    assert_type(session.capture("The", sites=several, layers=0), dict[str, torch.Tensor])
    assert_type(session.capture(texts, sites=several), list[dict[str, torch.Tensor]])
    assert_type(session.capture(texts, sites=several, to=Path("states.safetensors")), Path)
    assert_type(session.compare("The", sites="mlp_out", max_new_tokens=4, repetition_penalty=1.2), nblens.Comparison)
    assert_type(session.placement, nblens.Placement)
    assert_type(session.placement.devices, tuple[nblens.DeviceShare, ...])
    assert_type(session.vectors, nblens.VectorStore)
    assert_type(session.lenses, nblens.LensStore)
    assert_type(session.steer, nblens.LiveSteering)
    assert_type(session.reports, dict[str, nblens.SteerabilityReport])


def mistakes(session: nblens.Session) -> None:
    """What a checker must refuse: each line would be an unused ignore otherwise."""
    session.lens("The", layer=3)  # type: ignore[call-overload]
    session.generate("The", temperature="high")  # type: ignore[call-overload]
    session.capture("The", metrics=())  # type: ignore[call-overload]
    session.compare("The", top_q=0.5)  # type: ignore[call-arg]
    session.steerability("cheerful", [], budget=0.5)  # type: ignore[call-arg]
    nblens.Measurement(kl_budget="much")  # type: ignore[arg-type]


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
    out = session.generate("The summer was", 8, steer={"cheerful": -1.5}, top_p=0.9, temperature=0.8)
    assert_type(out.trajectory, nblens.Trajectory | None)
    sweep = session.sweep("The summer was", "cheerful", [-1, 0, 1], answers=(" lovely", " awful"))
    assert_type(sweep, nblens.Sweep)
    assert_type(sweep[0], nblens.Generation)
    how = nblens.Measurement([-1, 0, 1], n_random=8, neutral=["The harbour lies on the northern side."])
    report = session.steering_experiment("mood", "samples.jsonl", measurement=how, layers="4-7", seed=3)
    assert_type(report, nblens.SteerabilityReport)
    assert_type(report.fitted, nblens.DoseResponse)
    assert_type(report.side_effects, nblens.SideEffects | None)
    assert_type(report.largest_coefficients, nblens.CoefficientRange | None)
    assert_type(nblens.SteerabilityReport.load("report.json"), nblens.SteerabilityReport)
    assert_type(session.steerability("mood", "samples.jsonl", (-1, 1), n_shuffles=0), nblens.SteerabilityReport)
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
