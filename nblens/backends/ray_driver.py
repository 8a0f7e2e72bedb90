"""The process that drives Ray: it begins ranks, sends them requests, and passes on what they answer.

Ray ends the process that it runs in, from C++, when it loses a helper of its own. The process of a session has to
outlive that, so there is this one between: `driver_process.DriverProcess` begins it, sends orders on its standard
input, pickled, and gets answers on its standard output. It ends with the process that began it.
"""

from __future__ import annotations

import logging
import os
import pickle
import queue
import shutil
import socket
import threading
import time
from contextlib import suppress
from typing import Any, BinaryIO

import psutil
import ray

from nblens.backends.process_family import end_family
from nblens.backends.ray_ranks import RayRanks
from nblens.errors import NblensError, UserError, first_line

__all__ = ["main"]

_AT_ONCE = ("steer", "cancel", "end")
_HELPERS = ("gcs_server", "raylet")
_LOOK = 0.3  # seconds between two looks at them


def main() -> None:
    """Do what is ordered until there is nobody to order it."""
    parent = os.getppid()
    orders, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints is no answer
    driver = Driver(answers)
    threading.Thread(target=_watch_parent, args=(parent, driver), daemon=True).start()
    threading.Thread(target=_listen, args=(orders, driver), daemon=True).start()
    driver.say("ready")
    driver.serve()


class Driver:
    """Serves orders one after the other, on the thread that made it: those that Ray begins end with that thread."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._lock = threading.Lock()
        self._orders: queue.SimpleQueue[tuple[str, tuple[Any, ...]]] = queue.SimpleQueue()
        self._ranks: RayRanks | None = None
        self._folder: str | None = None
        """of a cluster of our own"""

    def say(self, kind: str, what: Any = None) -> None:
        """Send a message."""
        message = pickle.dumps((kind, what), protocol=5)
        with self._lock:
            self._answers.write(message)
            self._answers.flush()

    def take(self, name: str, args: tuple[Any, ...]) -> None:
        """Take an order; those that cannot wait are followed here."""
        if name not in _AT_ONCE:
            self._orders.put((name, args))
            return
        with suppress(ray.exceptions.RayError):  # a rank that died is found by those who wait for it
            getattr(self, name)(*args)

    def serve(self) -> None:
        """Follow orders, and answer each."""
        while True:
            name, args = self._orders.get()
            try:
                self.say("done", getattr(self, name)(*args))
            except NblensError as error:
                self.say("failed", error)
            except Exception as error:
                self.say("lost", f"Ray failed: {type(error).__name__}: {first_line(error)}")

    def reach(self, address: str) -> None:
        """Try whether anybody listens where a cluster is said to be."""
        host, _, port = address.rpartition("://")[2].rpartition(":")
        if not port.isdecimal():  # "auto"
            return
        try:
            socket.create_connection((host.strip("[]"), int(port))).close()
        except (OSError, OverflowError) as error:
            raise UserError(f"{first_line(error)}") from error

    def connect(self, address: str, own: dict[str, Any] | None) -> str:
        """Reach a cluster, or begin one of our own with these options; its address."""
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **(own or {}))
        except Exception as error:
            raise UserError(first_line(error)) from error
        if own is not None:
            self._folder = os.path.dirname(own["_temp_dir"])
            threading.Thread(target=self._watch, args=(_helpers(),), daemon=True).start()
        found: str = ray.get_runtime_context().gcs_address
        return found

    def reserve(self, size: int, together: bool) -> bool:
        """Ask the cluster for room; whether it has some now."""
        self._ranks = RayRanks(size, together=together, lost=lambda why: self.say("lost", why))
        return self._ranks.has_room()

    def wait_for_room(self) -> None:
        """See `RayRanks.wait_for_room`."""
        self.ranks.wait_for_room()

    def start(self, kind: bytes | None) -> None:
        """See `RayRanks.start`."""
        self.ranks.start(kind)

    def ask(self, method: str, packed: bytes) -> list[bytes]:
        """See `RayRanks.ask`."""
        return self.ranks.ask(method, packed, self._say_news)

    def run(self, number: int, packed: bytes) -> None:
        """See `RayRanks.run`."""
        try:
            self.ranks.run(number, packed, lambda events: self.say("events", events))
        finally:
            self._say_news(self.ranks.news())

    def steer(self, number: int, version: int, coefficients: Any) -> None:
        """See `RayRanks.steer`."""
        self.ranks.steer(number, version, coefficients)

    def cancel(self, number: int) -> None:
        """See `RayRanks.cancel`."""
        self.say("heard")
        self.ranks.cancel(number)

    def end(self) -> None:
        """End the ranks, and this process."""
        if self._folder is None:  # else all that there is of the cluster ends with this process
            if self._ranks is not None:
                self._ranks.end()
            ray.shutdown()
        self.finish()

    def finish(self) -> None:
        """End this process with all that it began."""
        end_family(os.getpid())
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)

    @property
    def ranks(self) -> RayRanks:
        """The ranks, for which there is room."""
        assert self._ranks is not None  # `reserve` comes first
        return self._ranks

    def _say_news(self, news: list[bytes]) -> None:
        if news:
            self.say("news", news)

    def _watch(self, helpers: dict[psutil.Process, str]) -> None:
        """Say which of Ray's helpers died, before Ray itself finds out and ends this process."""
        while True:
            for process, name in helpers.items():
                if not _lives(process):
                    self.say("lost", f"Ray's {name} on this machine died (process {process.pid})")
                    return
            time.sleep(_LOOK)


def _helpers() -> dict[psutil.Process, str]:
    """The processes without which a cluster of our own is none."""
    names = {process: process.name() for process in psutil.Process().children()}
    return {process: name for process, name in names.items() if name in _HELPERS}


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _listen(orders: BinaryIO, driver: Driver) -> None:
    try:
        while True:
            driver.take(*pickle.load(orders))
    finally:  # nobody is there any more
        driver.finish()


def _watch_parent(parent: int, driver: Driver) -> None:
    """Notice the end of the process that began this one, also where a child of it holds the pipe."""
    while os.getppid() == parent:
        time.sleep(1.0)
    driver.finish()
