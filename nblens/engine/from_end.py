"""`FromEnd`: raw activations of tokens that count from an end which only the run knows."""

from __future__ import annotations

from collections import defaultdict

import torch

from nblens.engine.control import Emit
from nblens.specs import ActivationSlice, CaptureSpec, Event, RunFinished

__all__ = ["FromEnd"]


class FromEnd:
    """Takes every activation of a run, and emits those of the tokens that were asked for when the run has ended.

    Until then it holds what may still be one of them: of the last three tokens never more than three. All other events
    go on as they come. A row that begins anew, after a restart in smaller steps, takes its own place.
    """

    def __init__(self, capture: CaptureSpec, emit: Emit) -> None:
        self._rows, self._emit = capture.from_end, emit
        self._held: dict[tuple[int, str], dict[int, torch.Tensor]] = defaultdict(dict)
        self._n_fed: dict[tuple[int, str], int] = {}

    def __call__(self, event: Event) -> None:
        """Take in an event."""
        if isinstance(event, ActivationSlice):
            self._hold(event)
            return
        if isinstance(event, RunFinished):
            self._release()
        self._emit(event)

    def _hold(self, event: ActivationSlice) -> None:
        key = event.row, event.site
        held, end = self._held[key], event.start + event.values.shape[1]
        self._n_fed[key] = end
        for offset, position in enumerate(range(event.start, end)):
            held[position] = event.values[:, offset]
        may_hold = self._rows[event.row].may_hold
        for position in [p for p in held if p >= end or not may_hold(p, end)]:
            del held[position]
        for position in held:
            if position >= event.start:  # a view would keep the whole slice
                held[position] = held[position].clone()

    def _release(self) -> None:
        for (row, site), held in self._held.items():
            if kept := self._rows[row].of(self._n_fed[row, site]):
                values = torch.stack([held[position] for position in kept], 1)
                self._emit(ActivationSlice(row, site, 0, values, kept))
