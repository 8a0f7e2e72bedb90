"""What a session needs of whatever runs its model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self

from nblens.engine.control import Coefficients
from nblens.specs import Event, Request

__all__ = ["Backend", "EventStream"]


class EventStream(Protocol):
    """The events of one request; iteration ends after one of `FINISHED`.

    A `KeyboardInterrupt` while waiting leaves the stream usable: cancel, then go on iterating to the end.
    """

    @property
    def log(self) -> Sequence[Event]:
        """Every event so far, also one that an interrupt took from the caller's hands."""

    def __iter__(self) -> Self:
        """Return itself."""

    def __next__(self) -> Event:
        """Wait for the next event; raises what the run raised."""

    def cancel(self) -> None:
        """Ask this request to stop before its next step; what it has read still comes."""

    def steer(self, coefficients: Coefficients) -> None:
        """Change coefficients of this request before its next step; the latest value of a name wins."""


class Backend(Protocol):
    """Runs requests, one at a time, in the order they came."""

    def stream(self, spec: Request) -> EventStream:
        """Start a request."""

    def steer(self, coefficients: Coefficients) -> None:
        """Change coefficients of the run in progress; without one, do nothing."""

    def cancel(self) -> None:
        """Stop the run in progress; without one, do nothing."""

    def close(self) -> None:
        """Stop everything and free the model."""
