"""`Dose`: one vector at several coefficients; many of them become the settings of one scoring request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nblens.specs import SteeringWrite
from nblens.steering.vectors import SteeringVector

__all__ = ["Dose", "settings_of"]


@dataclass(frozen=True)
class Dose:
    """A direction per block, written in one way at several coefficients."""

    directions: Mapping[int, np.ndarray]
    """block → float32 (d_model,)"""
    coefficients: tuple[float, ...]
    site: str = "resid_post"
    write: str = "all"
    op: str = "add"

    @classmethod
    def of(cls, vector: SteeringVector, coefficients: Sequence[float], layers: Sequence[int] | None = None) -> Dose:
        """A vector as it is written by default, at its own blocks or at others."""
        blocks = vector.layers if layers is None else layers
        directions = {block: vector.directions[block] for block in blocks}
        return cls(directions, tuple(coefficients), vector.site, vector.write, vector.op)

    @classmethod
    def written(cls, write: SteeringWrite) -> Dose:
        """A vector as a run writes it in rows that are all steered."""
        coefficients = tuple(c for c in write.coefficients if c is not None)
        return cls(write.directions, coefficients, write.site, write.write, write.op)

    def named(self, name: str) -> SteeringWrite:
        """The dose as one write of a vector of this name, a row for each coefficient."""
        return SteeringWrite(name, self.site, self.directions, self.coefficients, self.write, self.op)

    def toward(self, directions: Mapping[int, np.ndarray], coefficients: Sequence[float]) -> Dose:
        """Other directions, written in the same way."""
        return replace(self, directions=directions, coefficients=tuple(coefficients))

    def random(self, generator: np.random.Generator, coefficients: Sequence[float]) -> Dose:
        """Directions drawn at random, as long as these at every block."""
        drawn = {}
        for block, own in self.directions.items():
            direction = generator.standard_normal(len(own))
            length = np.linalg.norm(own) / np.linalg.norm(direction)
            drawn[block] = (direction * length).astype(np.float32)
        return self.toward(drawn, coefficients)


def settings_of(doses: Sequence[Dose], *, unsteered: int = 0) -> tuple[int, tuple[SteeringWrite, ...]]:
    """How many settings doses make, dose after dose after some without steering, and what is written in each."""
    n_settings = unsteered + sum(len(dose.coefficients) for dose in doses)
    writes, place = [], unsteered
    for number, dose in enumerate(doses):
        coefficients: list[float | None] = [None] * n_settings
        coefficients[place : place + len(dose.coefficients)] = dose.coefficients
        place += len(dose.coefficients)
        writes.append(replace(dose.named(f"{number}"), coefficients=tuple(coefficients)))
    return n_settings, tuple(writes)
