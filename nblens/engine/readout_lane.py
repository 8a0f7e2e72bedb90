"""`ReadoutLane`: readouts that run beside the steps which go on, on a thread and a CUDA stream of their own.

A readout is large matrix products, a decoding step reads weights: on a GPU the two share it well. Where blocks lie on
several devices, the first ones take up the next step of a prompt while the last one reads out. What is read comes to
the CPU by copies that only this lane's thread waits for.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch

__all__ = ["ReadoutLane"]


class ReadoutLane:
    """Runs one readout at a time, in the order given; as a context manager it waits for the last on every exit.

    Parameters
    ----------
    device : torch.device
        Where the readout computes. On a CPU there is no stream, and the thread takes turns with the caller's.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="nblens-readout")
        self._last: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._pool.shutdown(wait=True)

    def start(self, work: Callable[[], None]) -> None:
        """Run `work` once the one before is done, whose error is raised here, and what was computed so far is there.

        Two are never under way: each holds a copy of activations.
        """
        self.wait()
        ready = None
        if self._stream is not None:
            ready = torch.cuda.current_stream(self._stream.device).record_event()
        try:
            self._last = self._pool.submit(self._run, work, ready)
        except RuntimeError:  # the main thread has ended, and a thread of the user's reads on: pools take nothing more
            self._run(work, ready)

    def wait(self) -> None:
        """Wait for what was started; raises what it raised."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    @torch.no_grad()
    def _run(self, work: Callable[[], None], ready: torch.cuda.Event | None) -> None:
        if self._stream is None or ready is None:
            work()
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            work()
            self._stream.synchronize()  # before the memory that it read is given back
