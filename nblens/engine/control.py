"""`Control`: what reaches a run from outside, between two of its steps."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence

__all__ = ["Coefficients", "Control"]

Coefficients = Mapping[str, float | Sequence[float | None] | None]
"""vector → coefficient, for all rows or one per row; None: not steered"""


class Control:
    """What reaches a run from outside, read by its loop between two steps.

    Where several ranks run one model, all of them must go on, stop, and change coefficients at the same step: what
    they read here changes in `agree` alone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._coefficients: dict[str, float | Sequence[float | None] | None] = {}
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

    def take_coefficients(self) -> dict[str, float | Sequence[float | None] | None]:
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
