"""`DriverProcess`: the process that drives Ray, seen from the one of a session, which outlives what becomes of it."""

from __future__ import annotations

import json
import os
import pickle
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

from nblens.backends.process_family import end_family
from nblens.errors import WorkerError

__all__ = ["DriverProcess"]

_BEGIN = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from nblens.backends.ray_driver import main; main()"
_PATIENCE = 0.1  # seconds of one wait: an interrupt is answered
_READY = 120.0  # seconds for the process to import what it needs
_HEARD = 10.0  # seconds for it to take note of a request to stop
_END = 5.0  # seconds for it to end by itself
_LAST_WORDS = 1.0  # seconds for it to end after it has closed its output
_TAIL = 4096  # bytes of what it wrote that are looked through for a reason
_LOG_HEADER = re.compile(r"^\[[^\]]*\]( \([^)]*\))? \S+:\d+: ")


class DriverProcess:
    """Begins the process, sends it orders, and takes what it answers.

    Nothing here waits for it in a way that Ctrl-C would not end, and whatever ends it is an error with a reason.

    Parameters
    ----------
    environment : mapping of str to str
        Variables for it and for all that it begins, beside those of this process.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.lost: str | None = None
        """why it is no more"""
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._unheard: float | None = None
        self._inbox: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, json.dumps([*map(str, sys.path)])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **environment},
            start_new_session=True,  # by which its family is known; Ctrl-C in a terminal is not for it
        )
        for work in (self._read, self._write):
            threading.Thread(target=work, name="nblens-driver", daemon=True).start()

    def wait_until_ready(self) -> None:
        """Wait until it has begun."""
        self._wait("ready", _READY)

    def call(
        self,
        name: str,
        *args: Any,
        patience: float | None = None,
        on: Mapping[str, Callable[[Any], object]] | None = None,
    ) -> Any:
        """Order something, and wait for the answer.

        Parameters
        ----------
        name, *args
            A method of `ray_driver.Driver`.
        patience : float, optional
            Seconds. None: for ever.
        on : mapping of str to callable, optional
            What takes that which comes before the answer, by its kind.

        Raises
        ------
        TimeoutError
            It took longer than that.
        WorkerError
            The process is no more.
        """
        self.tell(name, *args)
        return self._wait("done", patience, on)

    def tell(self, name: str, *args: Any) -> None:
        """Order something without waiting."""
        if name == "cancel":
            self._unheard = self._unheard or time.monotonic()
        self._outbox.put((name, args))

    def end(self, reason: str, *, gently: bool = True) -> None:
        """End it with all that it began; when this returns they are gone."""
        self.lost = self.lost or reason
        with self._lock:
            if self._ended.is_set():
                return
            if gently and self._process.poll() is None:
                self.tell("end")
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_END)
            self._process.kill()
            end_family(self._process.pid)
            self._process.wait()
            self._outbox.put(None)
            self._ended.set()

    def _wait(self, kind: str, patience: float | None, on: Mapping[str, Callable[[Any], object]] | None = None) -> Any:
        began = time.monotonic()
        while True:
            try:
                said, what = self._inbox.get(timeout=_PATIENCE)
            except queue.Empty:
                said, what = "nothing", None
            if said == kind:
                return what
            if said == "failed":
                raise what
            if on and said in on:
                on[said](what)
            elif self.lost is not None and said in ("nothing", "gone"):
                raise WorkerError(self.lost)
            elif patience is not None and time.monotonic() - began > patience:
                raise TimeoutError
            elif self._unheard is not None and time.monotonic() - self._unheard > _HEARD:
                self.end("the process that drives Ray does not answer", gently=False)

    def _read(self) -> None:
        """Take what it says, on a thread of its own, until it ends."""
        assert self._process.stdout is not None  # a pipe
        with suppress(Exception), self._process.stdout as stdout:  # whatever it is, nothing more can be read
            while True:
                self._take(*pickle.load(stdout))
        with self._said:
            if self.lost is None:
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LAST_WORDS)
                self._process.kill()  # what cannot be read any more is not waited for
                self.lost = self._how_it_ended()
        self.end(self.lost, gently=False)
        self._inbox.put(("gone", None))

    def _take(self, kind: str, what: Any) -> None:
        if kind == "heard":
            self._unheard = None
        elif kind == "lost":
            self.lost = self.lost or what
            threading.Thread(target=self.end, args=(what,), daemon=True).start()
            self._inbox.put(("gone", None))
        else:
            self._inbox.put((kind, what))

    def _write(self) -> None:
        """Send what is ordered, on a thread of its own: no interrupt comes between the bytes of an order."""
        assert self._process.stdin is not None  # a pipe
        with suppress(OSError), self._process.stdin as stdin:
            while (order := self._outbox.get()) is not None:
                stdin.write(pickle.dumps(order, protocol=5))
                stdin.flush()

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - _TAIL))
        lines = self._said.read().decode(errors="replace").split("\n")
        last = next((_LOG_HEADER.sub("", line).strip() for line in reversed(lines) if line.strip()), "")
        return f"the process that drives Ray ended ({how}){': ' if last else ''}{last:.200}"
