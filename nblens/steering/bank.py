"""`SteeringBank`: the vectors of a run with coefficients that can change between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch

from nblens.model.generation import Batch
from nblens.specs import SteeringWrite
from nblens.steering.operations import OPERATIONS, REST, Direction
from nblens.steering.positions import written_columns

__all__ = ["SteeringBank"]

Coefficient = float | None
Coefficients = Coefficient | Sequence[Coefficient]
Columns = bool | torch.Tensor
"""of a step, which are written: all, none, or bool (rows, width, 1)"""


class SteeringBank:
    """Applies steering vectors to the activations of a batch, with a coefficient per row.

    Everything it applies sits in tensors that live as long as the run and are changed in place, so a new coefficient
    needs no new hook. A row whose coefficient is None, or one at which the operation does nothing, is bit-identical
    to no steering. Operations at one place are applied in the order of the writes.
    """

    def __init__(
        self,
        writes: Iterable[SteeringWrite],
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rows = rows
        self._places: dict[tuple[str, int], list[_Sum | _Operation]] = {}
        self._coefficients: dict[str, list[Coefficient]] = {}
        self._columns: dict[str, Columns] = {}
        for write in writes:
            coefficients = _per_row(write.coefficients, rows)
            self._coefficients[write.name] = coefficients
            self._columns[write.write] = False
            for block, direction in write.directions.items():
                edits = self._places.setdefault((write.site, block), [])
                vector = torch.as_tensor(direction, dtype=torch.float32, device=device)
                _add_to(edits, write, vector, coefficients, dtype)

    @property
    def places(self) -> list[tuple[str, int]]:
        """(site, block) pairs that are written."""
        return list(self._places)

    @property
    def coefficients(self) -> dict[str, list[Coefficient]]:
        """Present coefficient of every row, by vector."""
        return {name: list(values) for name, values in self._coefficients.items()}

    def set(self, coefficients: Mapping[str, Coefficients]) -> None:
        """Change coefficients; names that this run does not carry are left aside. Call between two steps."""
        changed = {
            name: _per_row(value, self._rows) for name, value in coefficients.items() if name in self._coefficients
        }
        self._coefficients |= changed
        for edit in (edit for edits in self._places.values() for edit in edits):
            edit.set(changed)

    def begin(self, columns: range, batch: Batch) -> None:
        """Find out where in the coming step each kind of position lies."""
        for write in self._columns:
            self._columns[write] = written_columns(write, columns, batch)

    def editor(self, site: str, block: int, scale: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
        """The callable that a hook passes the activation through, (rows, width, d_model).

        The model multiplies what it returns with `scale` before it adds it to the residual stream.
        """
        edits, all_columns = self._places[site, block], self._columns

        def edit(hidden: torch.Tensor) -> torch.Tensor:
            for one in edits:
                columns = all_columns[one.write]
                if columns is False or not one.active:
                    continue
                edited = one.apply(hidden, scale)
                hidden = edited if columns is True else torch.where(columns.to(hidden.device), edited, hidden)
            return hidden

        return edit


class _Sum:
    """Σ coefficient · direction over the writes that add at one place, per row: (rows, 1, d_model)."""

    def __init__(self, write: str, rows: int, d_model: int, dtype: torch.dtype, device: torch.device) -> None:
        self.write = write
        self.active = False
        """whether any coefficient differs from 0: adding zeros would change nothing"""
        self._names: list[str] = []
        self._coefficients: list[list[Coefficient]] = []
        self._directions = torch.empty((0, d_model), dtype=torch.float32, device=device)
        self._value = torch.zeros((rows, 1, d_model), dtype=dtype, device=device)

    def add(self, name: str, vector: torch.Tensor, coefficients: list[Coefficient]) -> None:
        """Take in one more write."""
        self._names.append(name)
        self._coefficients.append(coefficients)
        self._directions = torch.cat([self._directions, vector[None]])
        self._refresh()

    def set(self, changed: Mapping[str, list[Coefficient]]) -> None:
        """Change the coefficients of writes by name."""
        if not changed.keys().isdisjoint(self._names):
            pairs = zip(self._names, self._coefficients, strict=True)
            self._coefficients = [changed.get(name, before) for name, before in pairs]
            self._refresh()

    def apply(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        """Add the sum to every column."""
        if self._value.device != hidden.device:
            self._value = self._value.to(hidden.device)
        return hidden + (self._value if scale == 1.0 else self._value / scale)

    def _refresh(self) -> None:
        weights = torch.tensor(
            [[c or 0.0 for c in row] for row in self._coefficients], dtype=torch.float32, device=self._directions.device
        )
        self._value.copy_((weights.T @ self._directions)[:, None])
        self.active = any(map(any, self._coefficients))


class _Operation:
    """One write whose operation depends on the activation itself."""

    def __init__(self, write: SteeringWrite, vector: torch.Tensor, coefficients: list[Coefficient]) -> None:
        self.write = write.write
        self.active = False
        """whether it changes any row"""
        self._name, self._operation, self._rest = write.name, OPERATIONS[write.op], REST[write.op]
        self._direction = Direction(vector)
        self._strength = torch.zeros((len(coefficients), 1, 1), dtype=torch.float32, device=vector.device)
        self._on = torch.zeros((len(coefficients), 1, 1), dtype=torch.bool, device=vector.device)
        self._refresh(coefficients)

    def set(self, changed: Mapping[str, list[Coefficient]]) -> None:
        """Change the coefficients, where its name is among them."""
        if self._name in changed:
            self._refresh(changed[self._name])

    def apply(self, hidden: torch.Tensor, scale: float) -> torch.Tensor:
        """Apply it to every column of the rows that it is on for."""
        if self._strength.device != hidden.device:
            self._direction = self._direction.to(hidden.device)
            self._strength, self._on = self._strength.to(hidden.device), self._on.to(hidden.device)
        edited = self._operation(hidden.float() * scale, self._direction, self._strength) / scale
        return torch.where(self._on, edited.to(hidden.dtype), hidden)

    def _refresh(self, coefficients: list[Coefficient]) -> None:
        on = [c is not None and c != self._rest for c in coefficients]
        self._on.copy_(torch.tensor(on)[:, None, None])
        self._strength.copy_(torch.tensor([c or 0.0 for c in coefficients])[:, None, None])
        self.active = any(on)


def _add_to(
    edits: list[_Sum | _Operation],
    write: SteeringWrite,
    vector: torch.Tensor,
    coefficients: list[Coefficient],
    dtype: torch.dtype,
) -> None:
    """Append a write, or take it into a sum from which no other operation parts it."""
    if write.op != "add":
        edits.append(_Operation(write, vector, coefficients))
        return
    for edit in reversed(edits):
        if isinstance(edit, _Operation):
            break
        if edit.write == write.write:
            edit.add(write.name, vector, coefficients)
            return
    edits.append(_Sum(write.write, len(coefficients), len(vector), dtype, vector.device))
    edits[-1].add(write.name, vector, coefficients)


def _per_row(coefficients: Coefficients, rows: int) -> list[Coefficient]:
    if np.ndim(coefficients) == 0:
        coefficients = [coefficients] * rows
    if len(coefficients) != rows:
        raise ValueError(f"{len(coefficients)} coefficients for {rows} rows")
    return [None if value is None else float(value) for value in coefficients]
