"""What a notebook shows in the place of a widget when no kernel keeps the widget alive.

JupyterLab never falls back to the other forms of a widget's output: once the kernel is gone, "Error displaying widget"
stands there. So a widget is followed by an output of its own, a picture or a table, and a stylesheet shows one of the
two: that output while the widget is not on the page, the widget while it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import traitlets
from IPython import get_ipython

from nblens.jupyter.cell_output import display, publish_display_data, update_display

__all__ = ["WithStandIn", "behind_pages"]

_STYLE = (
    "<style>"
    'body:has([data-nblens="{key}"]) .{key},'
    '.jp-OutputArea-child:has([data-nblens="{key}"])+.jp-OutputArea-child:has(.{key}),'
    '.jp-OutputArea-child:not(:has([data-nblens="{key}"])):has(+.jp-OutputArea-child .{key})'
    "{{display:none}}</style>"
)


def behind_pages() -> bool:
    """Tell whether cells are run by a kernel, whose pages can show widgets; a terminal's cannot."""
    return getattr(get_ipython(), "kernel", None) is not None


if TYPE_CHECKING:

    class _Widget(traitlets.HasTraits):
        """What is used here of the ipywidgets.DOMWidget that a subclass is, too."""

        layout: Any

        def close(self) -> None: ...
else:
    _Widget = traitlets.HasTraits


class WithStandIn(_Widget):
    """A widget that is followed by an output which stays when it is gone.

    A subclass says in `_as_html` and `_as_text` what that output holds; its page marks the widget's element with
    `data-nblens`, set to `_stand_in`.
    """

    _stand_in = traitlets.Unicode().tag(sync=True)
    _owns_layout = False
    """whether it made its layout, which is a widget too; not before it is made itself"""

    @traitlets.default("_stand_in")
    def _new_key(self) -> str:
        return f"nblens-{uuid4().hex}"

    def close(self) -> None:
        """Take the widget off its page; nothing of it stays behind."""
        layout = self.layout if self._owns_layout else None
        super().close()
        if layout is not None:
            layout.close()

    def _as_text(self) -> str:
        return repr(self)

    def _as_html(self) -> str:
        raise NotImplementedError

    def _ipython_display_(self) -> None:
        """The widget and its stand-in."""
        if not behind_pages():
            raise NotImplementedError  # IPython then shows the widget's text
        self.show_widget()
        display(self.stand_in(), raw=True, display_id=self._stand_in)

    def show_widget(self) -> None:
        """Publish the widget itself, in no other form."""
        widget: Any = super()
        made = widget._repr_mimebundle_()
        data, metadata = made if isinstance(made, tuple) else (made, {})
        publish_display_data({**data, "text/plain": ""}, metadata)

    def stand_in(self) -> dict[str, Any]:
        """The output that belongs behind it."""
        html = f'{_STYLE.format(key=self._stand_in)}<div class="{self._stand_in}">{self._as_html()}</div>'
        return {"text/plain": self._as_text(), "text/html": html}

    def update_stand_in(self) -> None:
        """Change that output wherever `display` has put it; may be called from any thread."""
        if behind_pages():
            update_display(self.stand_in(), raw=True, display_id=self._stand_in)
