"""A process that ends what a Ray cluster of our own leaves behind when the process that began it is killed.

Ray's workers end by themselves, but some of its helpers look for the cluster for another minute.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Collection

import psutil

__all__ = ["Watchdog", "descendants"]

_GRACE = 4.0  # seconds in which processes end by themselves


def descendants() -> set[psutil.Process]:
    """Every process that this one has begun, and those have begun."""
    return set(psutil.Process().children(recursive=True))


class Watchdog:
    """Ends processes a few seconds after this process is no more, or after `release`, if they are still there."""

    def __init__(self, processes: Collection[psutil.Process]) -> None:
        known = [f"{process.pid}:{process.create_time()}" for process in processes if process.is_running()]
        # its pipe closes with this process, however that ends
        self._watcher = subprocess.Popen(
            [sys.executable, "-m", __name__, *known], stdin=subprocess.PIPE, start_new_session=True
        )

    def release(self) -> None:
        """Let what was watched end now."""
        assert self._watcher.stdin is not None  # a pipe
        self._watcher.stdin.close()
        threading.Thread(target=self._watcher.wait, daemon=True).start()  # nobody else takes note of its end


def _main(arguments: list[str]) -> None:
    sys.stdin.read()
    time.sleep(_GRACE)
    for argument in arguments:
        pid, created = argument.split(":")
        try:
            process = psutil.Process(int(pid))
            if process.create_time() == float(created):  # else the number went to another process
                process.kill()
        except psutil.NoSuchProcess:
            continue


if __name__ == "__main__":
    _main(sys.argv[1:])
