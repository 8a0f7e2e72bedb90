"""What one picture is made of: a dict is compared under its keys, a list is taken together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nblens.errors import UserError

__all__ = ["pools"]


def pools(obj: Any) -> dict[str, list[Any]]:
    """Trajectories by name; the name of a single one, or of a single list, is empty.

    Raises
    ------
    UserError
        Something in it is no trajectory, a list is empty, or a list holds trajectories of different layers.
    """
    if hasattr(obj, "steered"):
        obj = {"base": obj.base, "steered": obj.steered}
    named = obj if isinstance(obj, Mapping) else {"": obj}
    if not named:
        raise UserError("there is no trajectory to draw")
    return {str(name): _together(value) for name, value in named.items()}


def _together(value: Any) -> list[Any]:
    trajectories = list(value) if isinstance(value, (list, tuple)) else [value]
    if not trajectories:
        raise UserError("there is no trajectory to draw")
    for trajectory in trajectories:
        if not hasattr(trajectory, "top_ids"):
            raise UserError(f"give a trajectory, or a list or dict of them; got {type(trajectory).__name__}")
    if len({trajectory.layers for trajectory in trajectories}) > 1:
        raise UserError(
            "trajectories of different layers cannot be taken together; name them in a dict to compare them"
        )
    return trajectories
