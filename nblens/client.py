"""`Client`: sends a session's requests to what runs its model, and waits for them, whatever ends the waiting."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Generic, TypeVar

from nblens.backends.backend import Backend, EventStream
from nblens.errors import Interrupted
from nblens.lens.lens import LOGIT, Lens
from nblens.lens.lens_store import LensStore
from nblens.results import RunResult
from nblens.specs import Event, LensTensors, ReadoutSlice, Request, RunSpec, finished

__all__ = ["Client"]

T = TypeVar("T")

_LOOK_SECONDS = 0.1


class Client:
    """Sends requests to one backend; a request that is interrupted is waited for until it has stopped.

    Parameters
    ----------
    backend : Backend
    lenses : LensStore
        Whose translators are sent before a run needs them.
    empty : callable
        Makes the result of a run, nothing of which is there yet.
    """

    def __init__(self, backend: Backend, lenses: LensStore, empty: Callable[[RunSpec], RunResult]) -> None:
        self.backend = backend
        self._lenses, self._empty = lenses, empty
        self._placed: dict[str, Lens] = {}
        self._placing = threading.Lock()

    def renew(self, backend: Backend, empty: Callable[[RunSpec], RunResult]) -> None:
        """Go on over another backend, to which no lens has been sent."""
        self.backend, self._empty, self._placed = backend, empty, {}

    def close(self) -> None:
        """End the backend."""
        self.backend.close()

    def events(
        self, spec: Request, watch: Callable[[Event], object] = lambda event: None
    ) -> tuple[Sequence[Event], bool]:
        """Every event of a request, and whether Ctrl-C cut it short.

        `watch` sees each as it comes; what it answers with True is stopped.
        """
        return self._all(self._begun(spec), watch)

    def _all(
        self, stream: EventStream, watch: Callable[[Event], object] = lambda event: None
    ) -> tuple[Sequence[Event], bool]:
        interrupted = False
        while True:
            try:
                for event in stream:
                    if watch(event) is True:
                        stream.cancel()
                return stream.log, interrupted
            except KeyboardInterrupt:
                if interrupted:  # asked twice: do not wait for the step in progress
                    raise
                interrupted = True
                stream.cancel()
            except BaseException:  # the run's own, or the watcher's: nobody is left to take what comes
                stream.cancel()
                raise

    def run(self, spec: RunSpec, assemble: Callable[[RunResult], T], watch: Callable[[T], object] | None = None) -> T:
        """Run to the end; a run that is stopped raises `Interrupted` with what it had read."""
        result = self._empty(spec)
        if watch is None:
            events, interrupted = self.events(spec)
        else:
            onlooker = _Onlooker(self._empty(spec), assemble, watch)
            events, interrupted = self.events(replace(spec, watched=True), onlooker)
        for event in events:
            result.add(event)
        result.warn()
        if interrupted or result.cancelled:
            fed = max(len(result.sampled(row)) for row in result.rows)
            raise Interrupted(f"stopped after {fed} new tokens", assemble(result))
        return assemble(result)

    def _begun(self, spec: Request) -> EventStream:
        """Begin a request; with the lens that it reads no other thread's comes between, which might take it away."""
        if not isinstance(spec, RunSpec) or spec.lens is None or spec.lens.lens == LOGIT:
            return self.backend.stream(spec)
        with self._placing:
            self._place_lens(spec.lens.lens)
            return self.backend.stream(spec)

    def _place_lens(self, name: str) -> None:
        """Send translators to where the readout is, unless they are there; free those that the store has lost."""
        lens = self._lenses[name]
        gone = [LensTensors(other) for other in set(self._placed) - set(self._lenses)]
        new = [lens.tensors()] if self._placed.get(name) is not lens else []
        for tensors in (*gone, *new):
            self._placed.pop(tensors.name, None)
            events, interrupted = self._all(self.backend.stream(tensors))
            if interrupted or finished(events).cancelled:
                raise Interrupted("stopped before the run began")
        self._placed[name] = lens


class _Onlooker(Generic[T]):
    """Shows a run's growing result to somebody, first when there is nothing yet, then ten times a second at most."""

    def __init__(self, result: RunResult, assemble: Callable[[RunResult], T], watch: Callable[[T], object]) -> None:
        self._result, self._assemble, self._watch = result, assemble, watch
        watch(assemble(result))
        self._looked = time.monotonic()

    def __call__(self, event: Event) -> bool:
        self._result.add(event)
        if not isinstance(event, ReadoutSlice) or time.monotonic() - self._looked < _LOOK_SECONDS:
            return False
        stop = self._watch(self._assemble(self._result)) is True
        self._looked = time.monotonic()
        return stop
