"""`RowGroups`: one request served in several runs, each over some of its rows, seen from outside as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nblens.engine.control import Coefficient, Control, Emit
from nblens.specs import ActivationSlice, Event, ReadoutSlice, RunFinished, RunSpec, TokensSampled

__all__ = ["RowControl", "RowGroups"]


class RowGroups:
    """Splits a request by rows and joins the events again.

    ::

        groups = RowGroups(spec, emit, control)
        for rows in ((0, 2), (1,)):
            run(*groups.start(rows))
        groups.finish()

    Events carry the rows' own numbers, a coefficient that was changed in one run stays changed in the next, and
    there is one finishing event, with the timings of all runs added up.
    """

    def __init__(self, spec: RunSpec, emit: Emit, control: Control) -> None:
        self._spec, self._emit, self._control = spec, emit, control
        self._coefficients: dict[str, Coefficient] = {}
        self._timings: dict[str, float] = defaultdict(float)

    def start(self, rows: Sequence[int]) -> tuple[RunSpec, Emit, RowControl]:
        """Give what the run over these rows is asked, where its events go, and what reaches it from outside."""
        return _part(self._spec, rows), lambda event: self._pass_on(event, rows), RowControl(self, rows)

    def finish(self) -> None:
        """Emit the one finishing event."""
        self._emit(RunFinished(self.cancelled, dict(self._timings)))

    def take_coefficients(self, rows: Sequence[int], *, first: bool) -> dict[str, Coefficient]:
        """Give what was changed since the last step; for a run's first step, since the request began."""
        new = self._control.take_coefficients()
        self._coefficients |= new
        return {name: _of_rows(value, rows) for name, value in (self._coefficients if first else new).items()}

    def agree(self, *, due: bool, sampled: Sequence[int | None]) -> bool:
        """See `Control.agree`."""
        return self._control.agree(due=due, sampled=sampled)

    @property
    def cancelled(self) -> bool:
        """Whether the request was asked to stop."""
        return self._control.cancelled

    def _pass_on(self, event: Event, rows: Sequence[int]) -> None:
        if isinstance(event, RunFinished):
            for phase, amount in event.timings.items():
                self._timings[phase] += amount
            return
        if isinstance(event, (ReadoutSlice, ActivationSlice)):
            event = replace(event, row=rows[event.row])
        elif isinstance(event, TokensSampled):
            sampled = dict(zip(rows, event.token_ids, strict=True))
            event = replace(event, token_ids=tuple(sampled.get(row) for row in range(len(self._spec.prompts))))
        self._emit(event)


class RowControl:
    """A `Control` as the run over some rows sees it."""

    def __init__(self, groups: RowGroups, rows: Sequence[int]) -> None:
        self._groups, self._rows, self._first = groups, rows, True

    def again(self) -> RowControl:
        """For another try at the same run: its first step takes everything changed since the request began."""
        self._first = True
        return self

    def agree(self, *, due: bool = False, sampled: Sequence[int | None] = ()) -> bool:
        """See `Control.agree`."""
        return self._groups.agree(due=due, sampled=sampled)

    def take_coefficients(self) -> dict[str, Coefficient]:
        """Give what the run's next step shall change."""
        taken = self._groups.take_coefficients(self._rows, first=self._first)
        self._first = False
        return taken

    @property
    def cancelled(self) -> bool:
        """Whether the request was asked to stop."""
        return self._groups.cancelled


def _part(spec: RunSpec, rows: Sequence[int]) -> RunSpec:
    generation = spec.generation
    if generation is not None:
        generation = replace(generation, seeds=_pick(generation.seeds, rows))
    capture = spec.capture
    if capture is not None:
        capture = replace(capture, positions=_pick(capture.positions, rows))
    return replace(
        spec,
        prompts=_pick(spec.prompts, rows),
        turns=_pick(spec.turns, rows),
        templates=_pick(spec.templates, rows),
        generation=generation,
        capture=capture,
        steering=tuple(replace(write, coefficients=_pick(write.coefficients, rows)) for write in spec.steering),
    )


def _pick(values: Sequence[Any], rows: Sequence[int]) -> tuple[Any, ...]:
    return tuple(values[row] for row in rows) if values else ()


def _of_rows(coefficient: Coefficient, rows: Sequence[int]) -> Coefficient:
    return [coefficient[row] for row in rows] if isinstance(coefficient, Sequence) else coefficient
