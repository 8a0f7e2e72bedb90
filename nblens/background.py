"""Threads of ours, which end before the interpreter does.

A daemon thread that comes back from torch into an interpreter that is gone aborts the process; one that is no daemon
keeps it alive for as long as the model writes. So each is asked to end, and waited for.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Callable

__all__ = ["BackgroundThread", "hold_foreign_daemon"]

_PATIENCE = 30.0  # seconds: more than a step of the largest model takes

_ending = threading.Event()
_started: weakref.WeakSet[BackgroundThread] = weakref.WeakSet()


class BackgroundThread(threading.Thread):
    """A daemon thread that is asked to end when the interpreter does, and waited for.

    The user's own threads come first: the interpreter waits for those that are no daemons, whatever they ask of us.

    Parameters
    ----------
    work : callable
        What the thread does.
    name : str
    end : callable
        Asks the work to end soon, without waiting; called on the main thread.
    """

    def __init__(self, work: Callable[[], object], name: str, end: Callable[[], object]) -> None:
        super().__init__(target=work, name=name, daemon=True)
        self.end = end

    def start(self) -> None:
        """Begin."""
        _started.add(self)
        # what is registered last comes first: before Ray, which may be imported later, takes its cluster away
        atexit.unregister(_at_exit)
        atexit.register(_at_exit)
        super().start()


def hold_foreign_daemon() -> None:
    """Let a daemon thread of the user's go no further once the interpreter is ending: what it needs is being taken."""
    thread = threading.current_thread()
    if _ending.is_set() and thread.daemon and not isinstance(thread, BackgroundThread):
        threading.Event().wait()


def _at_exit() -> None:
    _ending.set()
    _end_all()


def _end_all() -> None:
    """Have every thread end; one may start another while it is asked to."""
    deadline = time.monotonic() + _PATIENCE
    while (alive := _alive()) and time.monotonic() < deadline:
        for thread in alive:
            thread.end()
        for thread in alive:
            thread.join(max(0.0, deadline - time.monotonic()))


def _alive() -> list[BackgroundThread]:
    return [thread for thread in tuple(_started) if thread.is_alive()]
