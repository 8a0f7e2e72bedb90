"""Grids that fill while a run goes on: in the cell that waits for it, or in the background."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import traitlets

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
        shown = threading.Event()
        run = _Background(reading, first, shown)
        empty = first.get()
        if isinstance(empty, BaseException):
            raise empty
        grid = cls(empty, **options)
        grid._run = run
        run.grid = grid
        shown.set()
        return grid

    def stop(self) -> None:
        """End the run, within a token after what the page shows; what was read stays."""
        self._run.stopping = True

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the run has ended; False when it took longer than `timeout` seconds."""
        self._run.thread.join(timeout)
        return not self._run.thread.is_alive()

    def close(self) -> None:
        """Stop the run, and take the widget off its page."""
        if run := getattr(self, "_run", None):
            run.stopping = True
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

    def __init__(self, reading: Reading, first: queue.SimpleQueue[Any], shown: threading.Event) -> None:
        self._reading, self._first, self._shown = reading, first, shown
        self.grid: LiveGrid | None = None
        self.stopping = False
        self.thread = threading.Thread(target=self._work, name="nblens-lens", daemon=True)
        self.thread.start()

    def _work(self) -> None:
        result, error = None, ""
        try:
            result = self._reading(self._watch)
        except Interrupted as stop:
            result, error = stop.partial, str(stop)
        except BaseException as failed:
            if self.grid is None:
                self._first.put(failed)
                return
            kind = "" if isinstance(failed, NblensError) else f"{type(failed).__name__}: "
            error = kind + first_line(failed)
        assert self.grid is not None, "a run tells what it has read before it ends"
        self.grid._finish(result, error)

    def _watch(self, partial: Any) -> bool:
        if self.grid is None:
            self._first.put(partial)
            self._shown.wait()
        else:
            self.grid.update(partial)
        return self.stopping
