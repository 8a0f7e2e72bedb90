"""What a steering panel shows of its state: plain values for its page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import UserError
from nblens.jupyter.panel.live_text import FINAL, LiveText
from nblens.jupyter.panel.panel_state import MODES, OWN, PanelState, VectorRow, slider_range
from nblens.layers import format_layers
from nblens.steering.steer import STEER_OPS, WRITE_POSITIONS
from nblens.text import changed_words, visible

if TYPE_CHECKING:
    from nblens.session import Session

__all__ = ["row_values", "state_values", "strength_curves", "text_values"]

Curve = Mapping[str, Any]


def row_values(row: VectorRow, write: str, session: Session, curves: Mapping[str, Curve]) -> dict[str, Any]:
    """One vector's row: what is set, where its slider ends, and what was measured of it."""
    vector = session.vectors[row.name]
    # a budget was measured of the vector as it is written by default, and says nothing of other ways
    measured = not row.layers and row.op == vector.op and write in (OWN, vector.write)
    budget = vector.kl_range if measured else None
    low, high = slider_range(vector.kl_range, row.coefficient)
    return {
        **asdict(row),
        "own_layers": format_layers(vector.layers),
        "low": low,
        "high": high,
        "budget": None if budget is None else list(budget),
        "curve": curves.get(row.name) if measured else None,
    }


def state_values(state: PanelState, once: bool) -> dict[str, Any]:
    """Everything beside the rows, with what there is to choose from."""
    fields = ("prompt", "write", "max_new_tokens", "temperature", "seed", "mode")
    # an answer's label stands where answers are scored; here none are
    writes = [OWN, *(write for write in WRITE_POSITIONS if write != "label")]
    return {
        **{field: getattr(state, field) for field in fields},
        "writes": writes if state.write in writes else [*writes, state.write],
        "ops": dict(STEER_OPS),
        "modes": list(MODES),
        "once": once,
    }


def text_values(text: LiveText) -> dict[str, Any]:
    """How far a generation has come, with the two texts in parts that the page marks or leaves."""
    return {**asdict(text), "parts": changed_words(text.base, text.steered, growing=text.state not in FINAL)}


def strength_curves(measured: Any) -> dict[str, Curve]:
    """Vector name → how far it moves answers over the coefficient, of reports or of sweeps with answers.

    Raises
    ------
    UserError
        A sweep without answers, or something else.
    """
    # a sweep is a list itself
    several = measured if type(measured) in (list, tuple) else [measured]
    return dict(map(_strength_curve, several))


def _strength_curve(measured: Any) -> tuple[str, Curve]:
    if hasattr(measured, "dose_response"):
        response = measured.dose_response
        return measured.name, _curve(response.coefficients, response.mean_curve, "propensity")
    if getattr(measured, "propensities", None) is not None:
        positive, negative = map(visible, measured.answers)
        label = f"log P({positive}) − log P({negative})"
        return measured.name, _curve(measured.coefficients, measured.propensities, label)
    raise UserError(f"measured takes a SteerabilityReport or a Sweep with answers, got {type(measured).__name__}")


def _curve(coefficients: Any, values: Any, label: str) -> Curve:
    x, y = np.asarray(coefficients, dtype=float), np.asarray(values, dtype=float)
    order = np.argsort(x)
    return {"x": x[order].tolist(), "y": y[order].tolist(), "label": label}
