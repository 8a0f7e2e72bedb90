"""Operations of a steering vector on an activation: add, project out, clamp, turn.

With h an activation, v the vector, u = v / ‖v‖ and λ the coefficient, each row of a batch has its own λ. The
component of h along v is h·u. Products are computed in float32 whatever the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["OPERATIONS", "REST", "Direction"]


_TINY, _LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


class Direction:
    """A vector as the operations need it.

    Parameters
    ----------
    vector : torch.Tensor
        float32 (d_model,); of a zero vector the direction is zero, and no operation changes anything.
    """

    def __init__(self, vector: torch.Tensor) -> None:
        self.vector = vector
        near, factor = _near_one(vector)
        norm: torch.Tensor = near.norm()
        self.norm: torch.Tensor = (norm / factor[0]).clamp(max=_LARGEST)
        self.unit: torch.Tensor = near / norm.clamp(min=_TINY)

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

    def part(self, hidden: torch.Tensor) -> torch.Tensor:
        """What of `hidden` lies along it, (rows, width, d_model)."""
        return self.component(hidden) * self.unit


def _near_one(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same at a size whose square float32 holds, and the power of two that it was multiplied with, (..., 1)."""
    largest = vectors.abs().amax(-1, keepdim=True)
    factor = torch.where(largest < 2**-45, 2.0**95, _reducing(largest))
    return vectors * factor, factor


def _reducing(sizes: torch.Tensor) -> torch.Tensor:
    """A power of two that brings large numbers to where they can be squared."""
    return torch.where(sizes > 2**45, 2.0**-80, 1.0)


def _ablate(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    return hidden - coefficient * direction.part(hidden)


def _ablate_add(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    return hidden - direction.part(hidden) + coefficient * direction.vector


def _clamp(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    component, bound = direction.component(hidden), coefficient * direction.norm
    beyond = torch.where(coefficient > 0, component < bound, component > bound)
    return torch.where(beyond, _ablate_add(hidden, direction, coefficient), hidden)


def _rotate(hidden: torch.Tensor, direction: Direction, coefficient: torch.Tensor) -> torch.Tensor:
    for_strength, for_length = _reducing(coefficient.abs()), _reducing(direction.norm)
    added = (coefficient * for_strength) * (direction.vector * for_length)
    before, factor = _near_one(hidden)
    turned, _ = _near_one(hidden * for_strength * for_length + added)
    after = turned.norm(dim=-1, keepdim=True)
    ratio = before.norm(dim=-1, keepdim=True) / after.clamp(min=_TINY) / factor
    # what is turned into nothing has no direction to go on in
    return torch.where(after > 0, turned * ratio, hidden)


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
