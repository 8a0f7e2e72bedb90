"""`SteeringBank`: the vectors of a run with coefficients that can change between two steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from nblens.model.generation import Batch
from nblens.specs import SteeringWrite
from nblens.steering.operations import OPERATIONS, REST, Direction
from nblens.steering.positions import written_columns

__all__ = ["SteeringBank", "layout_of"]

Coefficient = float | None
Coefficients = Coefficient | Sequence[Coefficient]
Columns = bool | torch.Tensor
"""of a step, which are written: all, none, or bool (rows, width, 1)"""


class SteeringBank:
    """Applies steering vectors to the activations of a batch, with a coefficient per row.

    Everything it applies sits in tensors that stay where they are and are changed in place, so a new coefficient
    needs no new hook, and a recorded step no new recording. A row whose coefficient is None, or one at which the
    operation does nothing, is bit-identical to no steering. Operations at one place are applied in the order of the
    writes.
    """

    def __init__(
        self,
        writes: Iterable[SteeringWrite],
        rows: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rows = rows
        writes = list(writes)
        self._edits = {
            (site, block): [_edit_of(group, rows, len(group[0].directions[block]), dtype, device) for group in groups]
            for (site, block), groups in _by_place(writes).items()
        }
        self._gates = {edit: _Gate(rows) for edits in self._edits.values() for edit in edits}
        self.fill(writes)

    def fill(self, writes: Iterable[SteeringWrite]) -> None:
        """Take other vectors and coefficients into the same slots; their `layout_of` must be what it was."""
        writes, self._fixed = list(writes), False
        self._coefficients = {write.name: _per_row(write.coefficients, self._rows) for write in writes}
        self._columns: dict[str, Columns] = dict.fromkeys((write.write for write in writes), False)
        for (site, block), groups in _by_place(writes).items():
            for edit, group in zip(self._edits[site, block], groups, strict=True):
                edit.fill(group, block)

    @property
    def places(self) -> list[tuple[str, int]]:
        """(site, block) pairs that are written."""
        return list(self._edits)

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
        for edit in self._gates:
            edit.set(changed)

    def begin(self, columns: range, batch: Batch, *, fixed: bool = False) -> None:
        """Find out where in the coming step each kind of position lies.

        `fixed`: a step of one column that may be recorded, in which nothing is left out that does nothing just now.
        """
        for write in self._columns:
            self._columns[write] = written_columns(write, columns, batch)
        self._fixed = fixed
        if fixed:
            for edit, gate in self._gates.items():
                gate.set(self._columns[edit.write] if edit.active else False)

    def editor(self, site: str, block: int, scale: float = 1.0) -> Callable[[torch.Tensor], torch.Tensor]:
        """The callable that a hook passes the activation through, (rows, width, d_model).

        The model multiplies what it returns with `scale` before it adds it to the residual stream.
        """
        edits = self._edits[site, block]

        def edit(hidden: torch.Tensor) -> torch.Tensor:
            for one in edits:
                if self._fixed:
                    hidden = torch.where(self._gates[one].on(hidden.device), one.apply(hidden, scale), hidden)
                    continue
                columns = self._columns[one.write]
                if columns is False or not one.active:
                    continue
                edited = one.apply(hidden, scale)
                hidden = edited if columns is True else torch.where(columns.to(hidden.device), edited, hidden)
            return hidden

        return edit


class _Gate:
    """Tells whether an edit acts on each row of a step of one column: bool (rows, 1, 1) at one address."""

    def __init__(self, rows: int) -> None:
        self._open = [False] * rows
        self._tensor = torch.zeros((rows, 1, 1), dtype=torch.bool)

    def set(self, columns: Columns) -> None:
        """Open it for the rows that are written."""
        wanted = [columns] * len(self._open) if isinstance(columns, bool) else columns.flatten().tolist()
        if wanted != self._open:
            self._open = wanted
            self._tensor.copy_(torch.tensor(wanted)[:, None, None])

    def on(self, device: torch.device) -> torch.Tensor:
        """Its tensor, which moves once to where it is needed."""
        if self._tensor.device != device:
            self._tensor = self._tensor.to(device)
        return self._tensor


class _Sum:
    """Σ coefficient · direction over the writes that add at one place, per row: (rows, 1, d_model)."""

    def __init__(self, write: str, rows: int, d_model: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.write = write
        self.active = False
        """whether any coefficient differs from 0: adding zeros would change nothing"""
        self._value = torch.zeros((rows, 1, d_model), dtype=dtype, device=device)

    def fill(self, group: list[SteeringWrite], block: int) -> None:
        """Take in the writes that it stands for."""
        self._names = [write.name for write in group]
        self._coefficients = [_per_row(write.coefficients, len(self._value)) for write in group]
        self._directions = torch.stack([torch.as_tensor(w.directions[block], dtype=torch.float32) for w in group])
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
        weights = torch.tensor([[c or 0.0 for c in row] for row in self._coefficients], dtype=torch.float32)
        self._value.copy_((weights.T @ self._directions)[:, None])
        self.active = any(map(any, self._coefficients))


class _Operation:
    """One write whose operation depends on the activation itself."""

    def __init__(self, write: SteeringWrite, rows: int, d_model: int, device: torch.device | str) -> None:
        self.write = write.write
        self.active = False
        """whether it changes any row"""
        self._operation, self._rest = OPERATIONS[write.op], REST[write.op]
        self._direction = Direction(torch.zeros(d_model, device=device))
        self._strength = torch.zeros((rows, 1, 1), dtype=torch.float32, device=device)
        self._on = torch.zeros((rows, 1, 1), dtype=torch.bool, device=device)

    def fill(self, group: list[SteeringWrite], block: int) -> None:
        """Take in the write that it stands for."""
        (write,) = group
        self._name = write.name
        self._direction.fill(torch.as_tensor(write.directions[block], dtype=torch.float32))
        self._refresh(_per_row(write.coefficients, len(self._on)))

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


def layout_of(writes: Iterable[SteeringWrite]) -> tuple[Any, ...]:
    """Describe what a bank of these does where, in order, apart from vectors and coefficients."""
    places = _by_place(writes).items()
    return tuple((place, tuple((group[0].write, group[0].op) for group in groups)) for place, groups in places)


def _by_place(writes: Iterable[SteeringWrite]) -> dict[tuple[str, int], list[list[SteeringWrite]]]:
    """Writes at each place, in order; those that add at the same positions, with no other operation between, as one."""
    places: dict[tuple[str, int], list[list[SteeringWrite]]] = {}
    for write in writes:
        for block in write.directions:
            _join(places.setdefault((write.site, block), []), write)
    return places


def _join(groups: list[list[SteeringWrite]], write: SteeringWrite) -> None:
    if write.op == "add":
        for group in reversed(groups):
            if group[0].op != "add":
                break
            if group[0].write == write.write:
                group.append(write)
                return
    groups.append([write])


def _edit_of(
    group: list[SteeringWrite], rows: int, d_model: int, dtype: torch.dtype, device: torch.device | str
) -> _Sum | _Operation:
    if group[0].op == "add":
        return _Sum(group[0].write, rows, d_model, dtype, device)
    return _Operation(group[0], rows, d_model, device)


def _per_row(coefficients: Coefficients, rows: int) -> list[Coefficient]:
    if not isinstance(coefficients, (Sequence, np.ndarray)):
        coefficients = [coefficients] * rows
    if len(coefficients) != rows:
        raise ValueError(f"{len(coefficients)} coefficients for {rows} rows")
    return [None if value is None else float(value) for value in coefficients]
