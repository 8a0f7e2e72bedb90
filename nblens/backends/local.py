"""`LocalBackend`: the engine in this process, on a thread of its own."""

from __future__ import annotations

import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Protocol, Self

from nblens.background import BackgroundThread, hold_foreign_daemon
from nblens.engine.control import Coefficients, Control
from nblens.errors import WorkerError
from nblens.specs import FINISHED, Event, Request, RunFinished

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["LocalBackend", "turn_of"]

_PATIENCE = 0.1  # seconds
_UNLOADED = "the model was unloaded; load one with nblens.load() or %load_sharded"
_ENDING = "the interpreter is ending, and runs no model any more"

_turns: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()
os.register_at_fork(after_in_child=_turns.clear)  # whoever held one is not there


def turn_of(model: PreTrainedModel) -> threading.Lock:
    """Give the lock of whoever runs a model: sessions that share it hook into the same modules.

    A model and what wraps it (peft, torch.compile) share the embedding.
    """
    shared: nn.Module = model
    with suppress(NotImplementedError, AttributeError):
        shared = model.get_input_embeddings() or model
    return _turns.setdefault(shared, threading.Lock())


class Runs(Protocol):
    """What serves one request after the other: an `Engine`, or what stands for several of them."""

    def run(self, spec: Request, emit: Callable[[Event], None], control: Control) -> None:
        """Serve a request; events go to `emit`, the finishing one last."""


class LocalBackend:
    """One worker thread that owns the model; callers wait for it and can be interrupted while they wait.

    Parameters
    ----------
    engine : Runs
    new_control : callable
        Makes what reaches the next request from outside.
    turn : threading.Lock, optional
        Held while a request is served; None: nobody else runs the model.
    """

    def __init__(
        self, engine: Runs, new_control: Callable[[], Control] = Control, turn: threading.Lock | None = None
    ) -> None:
        self._engine: Runs | None = engine
        self._new_control = new_control
        self._turn = turn or threading.Lock()
        self._requests: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._running: _Request | None = None
        self._lock = threading.Lock()
        self._refusal = ""
        self._begun = False
        self._process = os.getpid()
        # started with the first request: until then an interrupt that ends loading leaves no thread, and no model in it
        self._thread = BackgroundThread(self._work, "nblens-worker", lambda: self._end(_ENDING))

    def stream(self, spec: Request) -> _Request:
        """See `Backend.stream`."""
        hold_foreign_daemon()
        if os.getpid() != self._process:  # before the lock, which a thread that is not here may hold
            raise WorkerError(
                f"this session belongs to process {self._process}, of which this one is a fork, without the thread "
                'that runs the model; load the model here, best in a process that multiprocessing starts by "spawn"'
            )
        with self._lock:
            if not (self._refusal or self._begun):
                self._begun = True
                self._thread.start()
            if self._refusal or not self._thread.is_alive():
                raise WorkerError(self._refusal or _UNLOADED)
            request = _Request(spec, self._new_control())
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
        if os.getpid() == self._process:  # a fork has no thread to end
            self._end(_UNLOADED)
            if self._begun and threading.current_thread() is not self._thread:
                self._thread.join()
        self._engine = None

    def _end(self, refusal: str) -> None:
        """Take no more requests, and stop the one in progress."""
        with self._lock:
            self._refusal = self._refusal or refusal
            while not self._requests.empty():
                if (request := self._requests.get()) is not None:
                    request.cancel()
            self._requests.put(None)
        self.cancel()

    def _work(self) -> None:
        while (request := self._requests.get()) is not None:
            if request.start():
                self._running = request
                if self._refusal:
                    request.cancel()
                try:
                    with self._own_turn(request) as came:
                        assert self._engine is not None  # it goes when this thread has nothing left to serve
                        if came:
                            self._engine.run(request.spec, request.put, request.control)
                except BaseException as error:
                    request.put(error)
                finally:
                    self._running = None
            del request  # an idle worker must not keep the last request's tensors alive

    @contextmanager
    def _own_turn(self, request: _Request) -> Iterator[bool]:
        """Wait until nobody else runs the model; False where the request was cancelled meanwhile."""
        while not (came := self._turn.acquire(timeout=_PATIENCE)):
            if request.control.cancelled:
                request.put(RunFinished(True, {}))
                break
        try:
            yield came
        finally:
            if came:
                self._turn.release()


class _Request:
    """One request and the events that came of it so far."""

    def __init__(self, spec: Request, control: Control) -> None:
        self.spec, self.control = spec, control
        # what came, the last one perhaps an error: an interrupt may take it from the caller's hands, never from here
        self._came: list[Event | BaseException] = []
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._next = 0
        self._lock = threading.Lock()
        self._started = False

    @property
    def log(self) -> list[Event]:
        """Every event so far; an error, which iteration raises, is none."""
        return [event for event in self._came if not isinstance(event, BaseException)]

    def put(self, event: Event | BaseException) -> None:
        """Hand an event to the caller."""
        self._came.append(event)
        self._wake.put(None)

    def start(self) -> bool:
        """Begin, unless it was cancelled while it waited for its turn."""
        with self._lock:
            self._started = not self.control.cancelled
            return self._started

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        while self._next >= len(self._came):
            if self._came and isinstance(self._came[-1], (*FINISHED, BaseException)):
                raise StopIteration
            # not for ever: a Ctrl-C that comes just before the wait would not end it
            with suppress(queue.Empty):
                self._wake.get(timeout=_PATIENCE)
        hold_foreign_daemon()
        event = self._came[self._next]
        self._next += 1
        if isinstance(event, BaseException):
            raise event
        return event

    def cancel(self) -> None:
        """Stop it; one that has not begun ends at once."""
        with self._lock:
            again = self.control.cancelled
            self.control.cancel()
            if not self._started and not again:
                self.put(RunFinished(True, {}))

    def steer(self, coefficients: Coefficients) -> None:
        """Leave coefficients for its next step."""
        self.control.steer(coefficients)
