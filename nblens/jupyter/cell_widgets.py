"""Widgets that a magic or a result put into a cell's output: they end when the cell runs again.

The new output takes the place of the old one, but no front end tells the kernel so: without this, each run of a cell
would leave a widget with all its data behind. A widget that the user made stays until its own `close`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

__all__ = ["belongs_to_cell", "register", "unregister"]

_shown: dict[str, list[Any]] = {}
"""cell id → widgets in its output"""
_running: list[str | None] = [None]
"""id of the cell that runs, or ran last; None where the front end gives none"""


def belongs_to_cell(widget: Any) -> None:
    """Close the widget when the cell that runs now runs again."""
    if (cell := _running[0]) is not None:
        _shown.setdefault(cell, []).append(widget)


def register(shell: InteractiveShell) -> None:
    """Watch which cell runs."""
    shell.events.register("pre_run_cell", _begin)


def unregister(shell: InteractiveShell) -> None:
    """Watch no more; what is on the page stays."""
    if _begin in shell.events.callbacks["pre_run_cell"]:
        shell.events.unregister("pre_run_cell", _begin)
    _shown.clear()


def _begin(info: Any) -> None:
    _running[0] = info.cell_id
    for widget in _shown.pop(info.cell_id, ()):
        widget.close()
