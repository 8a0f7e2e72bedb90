"""Grids that fill while a run goes on: in the cell that waits for it, or in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import traitlets

from nblens.background import BackgroundThread
from nblens.errors import Interrupted, NblensError, first_line
from nblens.jupyter.cell_widgets import belongs_to_cell
from nblens.jupyter.grid.sheets import read_sites
from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid

__all__ = ["GrowingGrid", "LiveGrid", "Reading"]

Reading = Callable[[Callable[[Any], object]], Any]
"""A request that calls its `watch` with what has been read so far, and returns the whole."""


class GrowingGrid:
    """Shows a grid as soon as there is something to see, and keeps up with the run.

    >>> growing = GrowingGrid(metric="prob")
    >>> growing.complete(session.lens("The summer was", generate=8, watch=growing.watch)).n_tokens
    11
    """

    def __init__(self, *, metric: str) -> None:
        self._metric = metric
        self._grid: TrajectoryGrid | None = None

    def watch(self, partial: Any) -> None:
        """Show what has been read so far."""
        if self._grid is not None:
            self._grid.update(partial)
        elif any(site.n_tokens for site in read_sites([partial])):
            self._grid = self._shown(partial)

    def complete(self, result: Any) -> TrajectoryGrid:
        """The grid, with everything on it and on the page."""
        if self._grid is None:
            self._grid = self._shown(result)
        else:
            self._grid.update(result)
        return self._grid

    def _shown(self, partial: Any) -> TrajectoryGrid:
        grid = TrajectoryGrid(partial, metric=self._metric)
        belongs_to_cell(grid)
        grid.show_widget()
        return grid


class LiveGrid(TrajectoryGrid):
    """A grid over a run in the background.

    >>> grid = LiveGrid.over(lambda watch: session.lens("The summer was", generate=20, watch=watch))
    >>> grid.wait(60)  # or grid.stop()
    True
    >>> grid.result.n_tokens  # what was read: as `session.lens` would have returned it
    23
    """

    _running = traitlets.Bool(True).tag(sync=True)
    result: Any = None
    """what the run returned, or what there is of a run that was stopped; None before"""

    @classmethod
    def over(cls, reading: Reading, **options: Any) -> LiveGrid:
        """Begin the run, and give its grid back at once.

        Raises
        ------
        NblensError
            The request was refused.
        """
        first: queue.SimpleQueue[Any] = queue.SimpleQueue()
        run = _Background(reading, first)
        try:
            empty = first.get()
            if isinstance(empty, BaseException):
                run.stop()
                run.thread.join()
                raise empty
            grid = cls(empty, **options)
        except BaseException:  # an option that is refused, Ctrl-C: nobody will see what is read
            run.stop()
            raise
        grid._run = run
        run.grid = grid
        run.shown.set()
        return grid

    def stop(self) -> None:
        """End the run, within a token after what the page shows; what was read stays."""
        self._run.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended; False when it took longer than `timeout` seconds."""
        self._run.thread.join(timeout)
        return not self._run.thread.is_alive()

    def close(self) -> None:
        """Stop the run, and take the widget off its page."""
        if run := getattr(self, "_run", None):
            run.stop()
        super().close()

    def _answer(self, widget: Any, message: Any, buffers: Any) -> None:
        if isinstance(message, dict) and message.get("type") == "stop":
            self.stop()
        else:
            super()._answer(widget, message, buffers)

    def _finish(self, result: Any, error: str) -> None:
        """On the run's thread: what came of it."""
        if result is not None:
            self.result = result
            self.update(result)
        if error:
            self.send({"type": "error", "text": error})
        self._running = False
        self.update_stand_in()


class _Background:
    """A run on a thread of its own; its first, empty result goes to whoever makes the grid."""

    def __init__(self, reading: Reading, first: queue.SimpleQueue[Any]) -> None:
        self._reading, self._first = reading, first
        self.grid: LiveGrid | None = None
        self.shown = threading.Event()
        """set once there is a grid, or will be none"""
        self._stopping = False
        self.thread = BackgroundThread(self._work, "nblens-lens", self.stop)
        self.thread.start()

    def stop(self) -> None:
        """Have the run end with what it has read."""
        self._stopping = True
        self.shown.set()

    def _work(self) -> None:
        result, error = None, ""
        try:
            result = self._reading(self._watch)
            self._begin(result)
        except Interrupted as stop:
            result, error = stop.partial, str(stop)
            self._begin(stop)
        except BaseException as failed:
            kind = "" if isinstance(failed, NblensError) else f"{type(failed).__name__}: "
            error = kind + first_line(failed)
            self._begin(failed)
        if self.grid is not None:
            self.grid._finish(result, error)

    def _watch(self, partial: Any) -> bool:
        if self.grid is None:
            self._begin(partial)
        else:
            self.grid.update(partial)
        return self._stopping

    def _begin(self, first: Any) -> None:
        """Hand over what a grid is made of, or why there is none; once, and then wait for it."""
        if not self.shown.is_set():
            self._first.put(first)
            self.shown.wait()
