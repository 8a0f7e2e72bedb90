"""A process with all that it begins, known by their session, which none of them leaves.

Parents would not tell: those that lose theirs get another. A process that the user began is in the user's own session,
whenever that was.
"""

from __future__ import annotations

import os
import time

import psutil

__all__ = ["end_family", "family"]

_ROUND = 0.5  # seconds for those that were told to end, before another look


def family(session: int) -> list[psutil.Process]:
    """Every process of a session, by the number of the one that it began with, but for this one; no zombies."""
    return [process for process in psutil.process_iter() if process.pid != os.getpid() and _is_in(process, session)]


def end_family(session: int, patience: float = 5.0) -> None:
    """End every process of a session, but for this one, at once; waits until they are gone."""
    deadline = time.monotonic() + patience
    while (members := family(session)) and time.monotonic() < deadline:
        for process in members:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(members, timeout=_ROUND)


def _is_in(process: psutil.Process, session: int) -> bool:
    try:
        return os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # it has ended, or is not ours to see
        return False
