"""IPython's functions that write into a cell's output, with the types that IPython leaves out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from IPython import display as untyped

__all__ = ["display", "publish_display_data", "update_display"]


class _Display(Protocol):
    def __call__(self, *objects: object, raw: bool = False, display_id: str | None = None) -> object: ...


class _UpdateDisplay(Protocol):
    def __call__(self, shown: object, /, *, raw: bool = False, display_id: str) -> None: ...


display: _Display = untyped.display
publish_display_data: Callable[[Mapping[str, Any], Mapping[str, Any]], None] = untyped.publish_display_data
update_display: _UpdateDisplay = untyped.update_display
