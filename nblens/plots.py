"""Trajectories as matplotlib figures, made of plain arrays and free of pyplot's global state.

>>> trajectory_grid(trajectory, metric="entropy").savefig("grid.png")      # doctest: +SKIP
>>> token_curves(trajectory, tokens=[" Paris", " Berlin"])                # doctest: +SKIP

matplotlib is imported when a figure is made, not before. A figure shows itself in a notebook, with or without
``%matplotlib``.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.appearance import Scale, cell_values, changed_values, display_width, fit, ink, plain, visible
from nblens.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["entropy_by_layer", "token_curves", "trajectory_grid"]

_TEXT_COLUMNS = 60  # more tokens than this are drawn as colour alone
_WIDEST = 9
_SMALL = 7.0  # points
_DPI = 192
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
_LINE_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#000000")


def trajectory_grid(obj: Any, metric: str = "prob") -> Figure:
    """Layers × tokens, coloured by a metric, with the top token in each cell.

    Up to 60 tokens carry their text; longer ones are colour alone.

    Parameters
    ----------
    obj : Trajectory, TrajectoryDiff or Comparison
        A comparison becomes three grids: base, steered and their difference, which share one scale.
    metric : {"prob", "entropy", "kl", "rank"}

    Raises
    ------
    UserError
        The metric is unknown, or there is no token.
    """
    panels = _panels(obj, metric)
    n_tokens = max(trajectory.n_tokens for _, trajectory, _, _ in panels)
    if n_tokens == 0:
        raise UserError("there is no token to draw")
    height = sum(1.1 + 0.2 * trajectory.n_layers for _, trajectory, _, _ in panels)
    width = 1.6 + n_tokens * (0.55 if n_tokens <= _TEXT_COLUMNS else 0.06)
    figure = _figure(min(max(width, 4.0), 36.0), height)
    ratios = [trajectory.n_layers for _, trajectory, _, _ in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (title, trajectory, values, scale) in zip(axes, panels, strict=True):
        _draw_grid(figure, ax, title, trajectory, values, scale)
    return figure


def token_curves(
    trajectory: Any, tokens: Sequence[str | int] | None = None, *, position: int = -1, metric: str = "prob"
) -> Figure:
    """Probability or rank of chosen tokens over depth, at one position, each labelled at its line.

    Parameters
    ----------
    trajectory : Trajectory
    tokens : sequence of str or int, optional
        Texts or ids. None: the targets that the lens followed, else the last block's top tokens. A token that was
        not a target is drawn only where it is among the top k.
    position : int
        Token position; negative counts from the last.
    metric : {"prob", "rank"}

    Raises
    ------
    UserError
        A token that this trajectory does not hold, a position outside it, or an unknown metric.
    """
    if metric not in ("prob", "rank"):
        raise UserError(f"metric {metric!r} cannot be drawn as curves; one of prob, rank")
    if not -trajectory.n_tokens <= position < trajectory.n_tokens:
        raise UserError(f"position {position} is outside this trajectory of {trajectory.n_tokens} tokens")
    figure = _figure(6.4, 3.6)
    ax = figure.subplots()
    ends = []
    for number, token_id in enumerate(_token_ids(trajectory, tokens, position)):
        values = _over_depth(trajectory, token_id, position, metric)
        color = _LINE_COLORS[number % len(_LINE_COLORS)]
        ax.plot(trajectory.layers, values, color=color, marker="o", markersize=3, linewidth=1.5)
        seen = np.flatnonzero(np.isfinite(values))
        if len(seen):
            ends.append((values[seen[-1]], trajectory.token_text(token_id), color))
    if metric == "prob":
        ax.set(ylim=(-0.03, 1.03), ylabel="probability")
    else:
        _rank_axis(ax)
    _label_ends(ax, ends)
    _tidy(ax, trajectory.layers)
    fed = _drawable(fit(visible(trajectory.tokens[position]), 24))
    _title(
        ax,
        f"after {fed} (token {position % trajectory.n_tokens}) · {_origin(trajectory)}",
    )
    return figure


def entropy_by_layer(trajectory: Any) -> Figure:
    """Median entropy of the readout over depth, with the middle half of the tokens as a band, in nats."""
    if trajectory.n_tokens == 0:
        raise UserError("there is no token to draw")
    figure = _figure(6.4, 3.2)
    ax = figure.subplots()
    low, median, high = np.quantile(trajectory.entropy, (0.25, 0.5, 0.75), axis=1)
    ax.fill_between(trajectory.layers, low, high, color=_LINE_COLORS[0], alpha=0.2, linewidth=0)
    ax.plot(trajectory.layers, median, color=_LINE_COLORS[0], marker="o", markersize=3, linewidth=1.5)
    ax.set_ylabel("entropy (nats)")
    ax.set_ylim(bottom=0)
    _tidy(ax, trajectory.layers)
    _title(ax, f"median and middle half of {trajectory.n_tokens} tokens · {_origin(trajectory)}")
    return figure


def _panels(obj: Any, metric: str) -> list[tuple[str, Any, np.ndarray, Scale]]:
    """`(title, trajectory for the axes, values, scale)` of each grid."""
    if hasattr(obj, "steered"):
        base, steered = cell_values(obj.base, metric), cell_values(obj.steered, metric)
        scale = Scale.magnitude(metric, base, steered)
        diff = obj.diff
        changed = changed_values(diff, metric)
        shared = Scale.difference(metric, changed, high=scale.high)
        return [
            ("base", obj.base, base, scale),
            ("steered", obj.steered, steered, scale),
            ("steered − base", diff.other, changed, shared),
        ]
    if hasattr(obj, "other"):
        changed = changed_values(obj, metric)
        return [("", obj.other, changed, Scale.difference(metric, changed))]
    values = cell_values(obj, metric)
    return [("", obj, values, Scale.magnitude(metric, values))]


def _draw_grid(figure: Figure, ax: Axes, title: str, trajectory: Any, values: np.ndarray, scale: Scale) -> None:
    from matplotlib.colors import ListedColormap

    levels = scale.levels(values)
    with_text = trajectory.n_tokens <= _TEXT_COLUMNS
    image = ax.pcolormesh(
        np.arange(trajectory.n_tokens + 1) - 0.5,
        np.arange(trajectory.n_layers + 1) - 0.5,
        np.ma.masked_less(levels, 0),
        cmap=ListedColormap(scale.colors),
        vmin=-0.5,
        vmax=len(scale.colors) - 0.5,
        edgecolors="white" if with_text else "none",
        linewidth=0.5,
    )
    bar = figure.colorbar(image, ax=ax, pad=0.01, fraction=0.05, aspect=12, shrink=0.9)
    ticks = scale.ticks()
    bar.set_ticks([at * (len(scale.colors) - 1) for at, _ in ticks], labels=[text for _, text in ticks])
    bar.ax.tick_params(labelsize=_SMALL, length=0)
    bar.outline.set_visible(False)
    if with_text:
        _write_tokens(ax, trajectory, levels, scale)
    else:
        ax.set_xlabel("token position", fontsize=_SMALL)
    _number_blocks(ax, trajectory.layers)
    if 0 < trajectory.prompt_length < trajectory.n_tokens:
        ax.axvline(trajectory.prompt_length - 0.5, color="white", linewidth=3)
    ax.tick_params(labelsize=_SMALL, length=0)
    ax.spines[:].set_visible(False)
    _title(ax, " · ".join(filter(None, [title, scale.title, _origin(trajectory)])))


def _write_tokens(ax: Axes, trajectory: Any, levels: np.ndarray, scale: Scale) -> None:
    """The top token in each cell, the fed tokens below, what follows above."""
    texts = {
        i: _drawable(fit(visible(trajectory.token_text(i)), _WIDEST))
        for i in np.unique(np.concatenate([trajectory.top_ids[..., 0].ravel(), trajectory.next_ids])).tolist()
    }
    inks = ["#000000", *(ink(color) for color in scale.colors)]
    for (row, column), level in np.ndenumerate(levels):
        text = texts[int(trajectory.top_ids[row, column, 0])]
        style = {"color": inks[level + 1], "fontsize": _text_size(text), **_token_font()}
        ax.text(column, row, text, ha="center", va="center", clip_on=True, **style)
    places = range(trajectory.n_tokens)
    fed = [_drawable(fit(visible(token), _WIDEST)) for token in trajectory.tokens]
    ax.set_xticks(places, labels=fed, **_token_font())
    top = ax.secondary_xaxis("top")
    top.set_xticks(places, labels=[texts[i] if i >= 0 else "" for i in trajectory.next_ids.tolist()], **_token_font())
    top.tick_params(labelsize=_SMALL, length=0, labelcolor="#666666")
    top.spines[:].set_visible(False)


def _text_size(text: str) -> float:
    return _SMALL if display_width(text) <= 7 else 7 * _SMALL / display_width(text)


def _token_ids(trajectory: Any, tokens: Sequence[str | int] | None, position: int) -> list[int]:
    if tokens is None:
        return (trajectory.target_ids if len(trajectory.target_ids) else trajectory.top_ids[-1, position]).tolist()
    by_text: dict[str, int] = {}
    for token_id, text in trajectory.vocabulary.items():
        by_text.setdefault(text, token_id)
        by_text.setdefault(text.strip(), token_id)
    found = []
    for token in tokens:
        token_id = by_text.get(token) if isinstance(token, str) else int(token)
        if token_id not in trajectory.vocabulary:
            raise UserError(f"token {token!r} does not occur in this trajectory; ask the lens for it with targets=")
        found.append(token_id)
    return found


def _over_depth(trajectory: Any, token_id: int, position: int, metric: str) -> np.ndarray:
    """Probability or rank of one token by layer; NaN where the trajectory does not hold it."""
    (target,) = np.nonzero(trajectory.target_ids == token_id)
    if len(target):
        if metric == "rank":
            return trajectory.target_ranks[:, position, target[0]].astype(float)
        return np.exp(trajectory.target_logprobs[:, position, target[0]].astype(float))
    among = trajectory.top_ids[:, position] == token_id
    values = np.exp(trajectory.top_logprobs[:, position]) if metric == "prob" else 1.0 + np.arange(among.shape[1])
    return np.where(among.any(-1), np.where(among, values, 0).sum(-1), np.nan)


def _label_ends(ax: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Write each line's token beside its end, moved apart where ends are close together."""
    axes_of = ax.transData.transform
    to_axes = ax.transAxes.inverted().transform
    heights = [to_axes(axes_of((0, value)))[1] for value, _, _ in ends]
    order = np.argsort(heights)
    gap, below = 0.06, -1.0
    placed = np.zeros(len(ends))
    for i in order:
        placed[i] = below = max(heights[i], below + gap)
    placed -= max(0.0, placed.max(initial=0.0) - 1.0)
    for (_, text, color), y in zip(ends, placed, strict=True):
        label = _drawable(fit(visible(text), 20))
        ax.text(1.01, y, label, transform=ax.transAxes, va="center", fontsize=8, color=color, **_token_font())


def _rank_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_yscale("log")
    ax.invert_yaxis()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda rank, _: f"{rank:,.0f}"))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_ylabel("rank (1 is most likely)")


def _tidy(ax: Axes, layers: Sequence[int]) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel("block")
    ax.set_xlim(layers[0] - 0.3, layers[-1] + 0.3)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    ax.xaxis.label.set_size(9)
    ax.yaxis.label.set_size(9)


def _number_blocks(ax: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 16)
    places = range(len(layers) - 1, -1, -step)
    ax.set_yticks(list(places), labels=[str(layers[place]) for place in places])
    ax.set_ylabel("block", fontsize=_SMALL)


def _origin(trajectory: Any) -> str:
    return f"{plain(trajectory.site)} · {plain(trajectory.model)}"


def _title(ax: Axes, text: str) -> None:
    ax.set_title(_drawable(text), fontsize=9, loc="left", parse_math=False, family=_families("DejaVu Sans"))


def _token_font() -> dict[str, Any]:
    # a token may hold a $, which must stay one
    return {"family": _families("DejaVu Sans Mono"), "parse_math": False}


@cache
def _families(first: str) -> list[str]:
    """The font that comes with matplotlib, then those installed here that have more letters."""
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [first, *(name for name in _FALLBACK_FONTS if name in installed and name != first)]


def _drawable(text: str) -> str:
    """The text with ▯ for what no font here can draw, so that matplotlib has no glyph to warn about."""
    return "".join(c if c.isascii() or _has_glyph(c) else "▯" for c in text)


@cache
def _has_glyph(character: str) -> bool:
    return any(ord(character) in _characters(family) for family in _families("DejaVu Sans Mono"))


@cache
def _characters(family: str) -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=family))).get_charmap())


def _figure(width: float, height: float) -> Figure:
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
