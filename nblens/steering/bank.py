"""`SteeringBank`: the vectors of a run with coefficients that can change between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nblens.model.generation import Batch
from nblens.specs import SteeringWrite

__all__ = ["SteeringBank"]

Coefficients = float | Sequence[float]


@dataclass
class _Delta:
    """What is added to one activation at one kind of position: Σ coefficient · direction, per row."""

    write: str
    names: list[str]
    coefficients: list[list[float]]
    """per write, one per row"""
    directions: torch.Tensor
    """float32 (n_writes, d_model)"""
    value: torch.Tensor
    """(rows, 1, d_model), in the model's dtype; updated in place"""
    active: bool = False
    """whether any coefficient differs from 0: adding zeros would change nothing"""


@dataclass
class _Place:
    """The deltas of one site of one block."""

    deltas: list[_Delta] = field(default_factory=list)


class SteeringBank:
    """Adds steering vectors to the activations of a batch, with a coefficient per row.

    Everything it adds sits in tensors that live as long as the run and are changed in place, so a new coefficient
    needs no new hook. A row whose coefficients are 0 gets zeros added: bit-identical to no steering.
    """

    def __init__(
        self,
        writes: Iterable[SteeringWrite],
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rows = rows
        self._places: dict[tuple[str, int], _Place] = {}
        self._coefficients: dict[str, list[float]] = {}
        self._columns: dict[str, slice | None] = {}
        for write in writes:
            self._coefficients[write.name] = _per_row(write.coefficients, rows)
            for block, direction in write.directions.items():
                self._add(write, block, torch.as_tensor(direction, dtype=torch.float32, device=device), dtype)
        for place in self._places.values():
            for delta in place.deltas:
                self._refresh(delta)

    @property
    def places(self) -> list[tuple[str, int]]:
        """(site, block) pairs that are written."""
        return list(self._places)

    @property
    def coefficients(self) -> dict[str, list[float]]:
        """Present coefficient of every row, by vector."""
        return {name: list(values) for name, values in self._coefficients.items()}

    def set(self, coefficients: Mapping[str, Coefficients]) -> None:
        """Change coefficients; names that this run does not carry are left aside. Call between two steps."""
        changed = {
            name: _per_row(value, self._rows) for name, value in coefficients.items() if name in self._coefficients
        }
        self._coefficients |= changed
        self._update(changed)

    def begin(self, phase: str, columns: range, batch: Batch) -> None:
        """Find out where in the coming step each kind of position lies."""
        everywhere = slice(0, len(columns))
        last = batch.width - 1 - columns.start
        in_prompt = phase == "prompt"
        self._columns = {
            "all": everywhere,
            "prompt": everywhere if in_prompt else None,
            "generated": None if in_prompt else everywhere,
            # prompts are padded on the left: the last prompt token is in the same column of every row
            "last": slice(last, last + 1) if in_prompt and last < len(columns) else None,
        }
        self._width = len(columns)

    def editor(self, site: str, block: int, scale: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
        """The callable that a hook passes the activation through, (rows, width, d_model).

        The model multiplies what it returns with `scale` before it adds it to the residual stream.
        """
        deltas = self._places[site, block].deltas

        def edit(hidden: torch.Tensor) -> torch.Tensor:
            for delta in deltas:
                columns = self._columns[delta.write]
                if columns is None or not delta.active:
                    continue
                if delta.value.device != hidden.device:
                    delta.value = delta.value.to(hidden.device)
                value = delta.value if scale == 1.0 else delta.value / scale
                if columns.stop - columns.start == self._width:
                    hidden = hidden + value
                else:
                    hidden = hidden.clone()
                    hidden[:, columns] += value
            return hidden

        return edit

    def _add(self, write: SteeringWrite, block: int, direction: torch.Tensor, dtype: torch.dtype) -> None:
        place = self._places.setdefault((write.site, block), _Place())
        for delta in place.deltas:
            if delta.write == write.write:
                delta.names.append(write.name)
                delta.coefficients.append(_per_row(write.coefficients, self._rows))
                delta.directions = torch.cat([delta.directions, direction[None]])
                return
        value = torch.zeros((self._rows, 1, len(direction)), dtype=dtype, device=direction.device)
        place.deltas.append(
            _Delta(write.write, [write.name], [_per_row(write.coefficients, self._rows)], direction[None], value)
        )

    def _update(self, changed: Mapping[str, list[float]]) -> None:
        for delta in (delta for place in self._places.values() for delta in place.deltas):
            if changed.keys().isdisjoint(delta.names):
                continue
            delta.coefficients = [
                changed.get(name, old) for name, old in zip(delta.names, delta.coefficients, strict=True)
            ]
            self._refresh(delta)

    def _refresh(self, delta: _Delta) -> None:
        weights = torch.tensor(delta.coefficients, dtype=torch.float32, device=delta.directions.device)
        delta.value.copy_((weights.T @ delta.directions)[:, None])
        delta.active = any(map(any, delta.coefficients))


def _per_row(coefficients: Coefficients, rows: int) -> list[float]:
    if np.ndim(coefficients) == 0:
        return [float(coefficients)] * rows
    if len(coefficients) != rows:
        raise ValueError(f"{len(coefficients)} coefficients for {rows} rows")
    return [float(value) for value in coefficients]
