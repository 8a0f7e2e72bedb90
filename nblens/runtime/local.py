"""`LocalBackend`: the engine in this process, on a thread of its own."""

from __future__ import annotations

import queue
import threading
from typing import Self

from nblens.errors import WorkerError
from nblens.runtime.backend import Coefficients, Control
from nblens.runtime.engine import Engine
from nblens.specs import Event, ExtractionFinished, ExtractionSpec, RunFinished, RunSpec

__all__ = ["LocalBackend"]


class LocalBackend:
    """One worker thread that owns the model; callers wait for it and can be interrupted while they wait."""

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._running: _Request | None = None
        self._thread = threading.Thread(target=self._work, name="nblens-worker", daemon=True)
        self._thread.start()

    def stream(self, spec: RunSpec | ExtractionSpec) -> _Request:
        """See `Backend.stream`."""
        if self._engine is None or not self._thread.is_alive():
            raise WorkerError("the model was unloaded; load one with nblens.load() or %load_sharded")
        request = _Request(spec)
        self._requests.put(request)
        return request

    def steer(self, coefficients: Coefficients) -> None:
        """See `Backend.steer`."""
        if request := self._running:
            request.steer(coefficients)

    def cancel(self) -> None:
        """See `Backend.cancel`."""
        if request := self._running:
            request.cancel()

    def close(self) -> None:
        """See `Backend.close`."""
        self._requests.put(None)
        self.cancel()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        self._engine = None

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            self._running = request
            try:
                self._engine.run(request.spec, request.events.put, request.control)
            except BaseException as error:
                request.events.put(error)
            finally:
                self._running = None
                del request  # an idle worker must not keep the last request's tensors alive


class _Request:
    """One request and the events that came of it so far."""

    def __init__(self, spec: RunSpec | ExtractionSpec) -> None:
        self.spec = spec
        self.control = Control()
        self.events: queue.SimpleQueue[Event | BaseException] = queue.SimpleQueue()
        self._ended = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        event = self.events.get()
        self._ended = isinstance(event, (RunFinished, ExtractionFinished, BaseException))
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        self.control.cancel()

    def steer(self, coefficients: Coefficients) -> None:
        self.control.steer(coefficients)
