"""What all figures share: the paper they are drawn on, fonts for any token, axes over blocks, labels at lines."""

from __future__ import annotations

import io
import struct
import textwrap
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.text import fit, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nblens.views.panels import GridPanel

__all__ = [
    "LINE_COLORS",
    "SMALL",
    "clear",
    "drawable",
    "label_ends",
    "new_figure",
    "origin",
    "rank_axis",
    "text_font",
    "tidy",
    "token_font",
    "write_title",
]

SMALL = 7.0  # points
LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")
_DPI = 192
_TIED = "\u00a0· "  # a line ends behind it, and not before
_TITLE_COLUMNS, _AXIS_COLUMNS = 15, 8  # letters of a title on an inch, and beside the axes
_FALLBACK_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans Mono CJK SC",
    "WenQuanYi Zen Hei",
    "PingFang SC",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
)


def label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write `(value, label, color)` beside the end of each line, moved apart where ends are close together."""
    axes_of = ax.transData.transform
    to_axes = ax.transAxes.inverted().transform
    heights = [to_axes(axes_of((0, value)))[1] for value, _, _ in ends]
    order = np.argsort(heights)
    gap, below = 0.06, -1.0
    placed = np.zeros(len(ends))
    for i in order:
        placed[i] = below = max(heights[i], below + gap)
    placed -= max(0.0, placed.max(initial=0.0) - 1.0)
    for (_, label, color), y in zip(ends, placed, strict=True):
        style = {"va": "center", "fontsize": 8, "color": color, **token_font()}
        ax.text(1.01, y, drawable(fit(label, 24)), transform=ax.transAxes, **style)


def rank_axis(ax: Axes) -> None:
    """A logarithmic y axis with rank 1 on top."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.invert_yaxis()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("rank (1 is most likely)")


def tidy(ax: Axes, layers: Sequence[int]) -> None:
    """An x axis of blocks, and no more lines than are needed."""
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("block")
    ax.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    clear(ax)


def clear(ax: Axes) -> None:
    """No more lines than are needed, and small letters."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_fontsize(9)
    ax.yaxis.label.set_fontsize(9)


def origin(panel: GridPanel) -> str:
    """Site, lens, model and circumstances, for a title."""
    return " · ".join(map(plain, panel.caption))


def write_title(ax: Axes, text: str) -> None:
    """A small title, flush left, in as many lines as its figure's width asks for."""
    figure = ax.get_figure(root=True)
    assert figure is not None
    columns = max(20, int(figure.get_size_inches()[0] * _TITLE_COLUMNS) - _AXIS_COLUMNS)
    lines = textwrap.wrap(text.replace(" · ", _TIED), columns, break_on_hyphens=False)
    ax.set_title(drawable("\n".join(lines).replace(_TIED, " · ")), fontsize=9, loc="left", **text_font())


def token_font() -> dict[str, Any]:
    """Arguments of matplotlib's for text that comes from a token."""
    # a token may hold a $, which must stay one
    return {"family": _families("DejaVu Sans Mono"), "parse_math": False}


def text_font() -> dict[str, Any]:
    """Arguments of matplotlib's for a title or a name."""
    return {"family": _families("DejaVu Sans"), "parse_math": False}


@cache
def _families(first: str) -> list[str]:
    """The font that comes with matplotlib, then those installed here that have more letters."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [first, *(name for name in _FALLBACK_FONTS if name in installed and name != first)]


def drawable(text: str) -> str:
    """The text with ▯ for what no font here can draw, so that matplotlib has no glyph to warn about."""
    return "".join(c if c.isascii() or _has_glyph(c) else "▯" for c in text.expandtabs(4))


@cache
def _has_glyph(character: str) -> bool:
    return any(ord(character) in _characters(family) for family in _families("DejaVu Sans Mono"))


@cache
def _characters(family: str) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=family))).get_charmap())


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    return _figure_class()(figsize=(width, height), layout="constrained", dpi=_DPI)


@cache
def _figure_class() -> type[Figure]:
    from matplotlib.figure import Figure

    class ShownFigure(Figure):
        """A figure that a notebook shows although pyplot does not know it."""

        def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", bbox_inches="tight")
            png = buffer.getvalue()
            width, height = struct.unpack(">II", png[16:24])
            # shown at 96 pixels an inch, drawn finer for dense screens
            scale = 96 / self.dpi
            return png, {"width": round(width * scale), "height": round(height * scale)}

    return ShownFigure
