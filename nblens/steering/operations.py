"""Operations of a steering vector on an activation: add, project out, clamp, turn.

With h an activation, v the vector, u = v / ‖v‖ and λ the coefficient, each row of a batch has its own λ. The
component of h along v is h·u. Products are computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["OPERATIONS", "REST", "Direction"]


class Direction:
    """A vector as the operations need it.

    Parameters
    ----------
    vector : torch.Tensor
        float32 (d_model,); of a zero vector the direction is zero, and no operation changes anything.
    """

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector
        self.norm: torch.Tensor = vector.norm()
        self.unit: torch.Tensor = vector / self.norm.clamp(min=torch.finfo(torch.float32).tiny)

    def fill(self, vector: torch.Tensor) -> None:
        """Stand for another vector of the same length, in the same tensors."""
        other = Direction(vector)
        for name in ("vector", "norm", "unit"):
            getattr(self, name).copy_(getattr(other, name))

    def to(self, device: torch.device) -> Direction:
        """The same on another device."""
        return Direction(self.vector.to(device))

    def component(self, hidden: torch.Tensor) -> torch.Tensor:
        """Length of `hidden` along it, (rows, width, 1)."""
        return (hidden @ self.unit)[..., None]


def _ablate(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    return hidden - coefficient * direction.component(hidden) * direction.unit


def _ablate_add(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    return hidden + (coefficient * direction.norm - direction.component(hidden)) * direction.unit


def _clamp(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    component, bound = direction.component(hidden), coefficient * direction.norm
    kept = torch.where(coefficient > 0, component.maximum(bound), component.minimum(bound))
    return hidden + (kept - component) * direction.unit


def _rotate(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    turned = hidden + coefficient * direction.vector
    before: torch.Tensor = hidden.norm(dim=-1, keepdim=True)
    after: torch.Tensor = turned.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return turned * (before / after)


OPERATIONS: dict[str, Callable[[torch.Tensor, Direction, torch.Tensor], torch.Tensor]] = {
    "ablate": _ablate,
    "ablate_add": _ablate_add,
    "clamp": _clamp,
    "rotate": _rotate,
}
"""By the names of `STEER_OPS`, all but `add`: float32 (rows, width, d_model), a direction, and the
coefficients (rows, 1, 1), to what the model shall go on with."""

REST = {"add": 0.0, "ablate": 0.0, "ablate_add": None, "clamp": 0.0, "rotate": 0.0}
"""The coefficient that leaves an activation as it is, to the bit; None where every number changes it."""
