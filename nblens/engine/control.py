"""`Control`: what reaches a run from outside, between two of its steps; `Listening`: the observer that heeds it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from nblens.model.generation import Batch, Observer, Phase
from nblens.specs import Event

__all__ = ["Coefficient", "Coefficients", "Control", "Emit", "Listening", "LoopControl"]

Coefficient = float | Sequence[float | None] | None
"""for all rows, or one per row; None: not steered"""

Coefficients = Mapping[str, Coefficient]
"""vector → coefficient"""

Emit = Callable[[Event], None]
"""takes the events of a request, the finishing one last"""


class LoopControl(Protocol):
    """What a loop reads between two steps: a `Control`, or what stands between it and a run over some of its rows."""

    def agree(self, *, due: bool = False, sampled: Sequence[int | None] = ()) -> bool:
        """See `Control.agree`."""

    def take_coefficients(self) -> Coefficients:
        """Give what changed since the last step."""

    @property
    def cancelled(self) -> bool:
        """Whether the run was asked to stop."""


class Control:
    """What reaches a run from outside, read by its loop between two steps.

    Where several ranks run one model, all of them must go on, stop, and change coefficients at the same step: what
    they read here changes in `agree` alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coefficients: dict[str, Coefficient] = {}
        self._cancelled = threading.Event()

    def agree(self, *, due: bool = False, sampled: Sequence[int | None] = ()) -> bool:
        """Settle with the other ranks what is the case at the coming step; every loop calls it before each step.

        Parameters
        ----------
        due : bool
            This rank's clock says that it is time to read out.
        sampled : sequence of int or None
            The tokens that came of the step before, which must be the same everywhere.

        Returns
        -------
        bool
            Whether it is time to read out, on any rank.
        """
        return due

    def steer(self, coefficients: Coefficients) -> None:
        """Leave coefficients for the next step; the latest value of a name wins."""
        with self._lock:
            self._coefficients.update(coefficients)

    def take_coefficients(self) -> dict[str, Coefficient]:
        """Empty the mailbox."""
        with self._lock:
            taken, self._coefficients = self._coefficients, {}
        return taken

    def cancel(self) -> None:
        """Ask the run to stop before its next step."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether the run was asked to stop."""
        return self._cancelled.is_set()


class Listening(Observer):
    """Stops a pass that was asked to stop."""

    def __init__(self, control: LoopControl) -> None:
        self._control = control

    def before(self, phase: Phase, columns: range, batch: Batch) -> bool:
        """See `Observer.before`."""
        self._control.agree()
        return not self._control.cancelled
