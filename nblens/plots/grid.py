"""Layers × tokens as a figure: one grid, or several under each other on one scale."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.colors import Scale, ink
from nblens.errors import UserError
from nblens.plots.canvas import SMALL, drawable, new_figure, origin, token_font, write_title
from nblens.text import display_width, fit, visible
from nblens.views.panels import GridPanel, Metric, panels_of, with_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["trajectory_grid"]

_TEXT_COLUMNS = 60  # more tokens than this are drawn as colour alone
_WIDEST = 9


def trajectory_grid(obj: Any, metric: str | None = None) -> Figure:
    """Layers × tokens, coloured by a metric, with the top token in each cell.

    Up to 60 tokens carry their text; longer ones are colour alone.

    Parameters
    ----------
    obj : Trajectory, TrajectoryDiff, Comparison, or list or dict of these
        A comparison becomes three grids: base, steered and their difference, which share one scale. A dict, such
        as the trajectories of several sites, becomes a grid for each on one scale.
    metric : {"prob", "entropy", "kl", "rank", "kl_from_base"}, optional
        None: the first that there is. The last is one of a comparison's difference, which then is drawn alone.

    Raises
    ------
    UserError
        The metric is unknown, or there is no token.
    """
    drawn = with_metric(panels_of(obj), metric)
    panels = [panel for panel, _ in drawn]
    n_tokens = max((panel.n_tokens for panel in panels), default=0)
    if n_tokens == 0:
        raise UserError("there is no token to draw")
    height = sum(1.1 + 0.2 * panel.n_layers for panel in panels)
    width = 1.6 + n_tokens * (0.55 if n_tokens <= _TEXT_COLUMNS else 0.06)
    figure = new_figure(min(max(width, 4.0), 36.0), height)
    ratios = [panel.n_layers for panel in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (panel, shown) in zip(axes, drawn, strict=True):
        _draw_grid(figure, ax, panel, shown)
    return figure


def _draw_grid(figure: Figure, ax: Axes, panel: GridPanel, metric: Metric) -> None:
    from matplotlib.colors import ListedColormap

    scale = metric.scale
    levels = scale.levels(metric.values)
    with_text = panel.n_tokens <= _TEXT_COLUMNS
    image = ax.pcolormesh(
        np.arange(panel.n_tokens + 1) - 0.5,
        np.arange(panel.n_layers + 1) - 0.5,
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
    bar.ax.tick_params(labelsize=SMALL, length=0)
    bar.outline.set_visible(False)
    if with_text:
        _write_tokens(ax, panel, levels, scale)
    else:
        ax.set_xlabel("token position", fontsize=SMALL)
    _number_blocks(ax, panel.layers)
    if 0 < panel.prompt_length < panel.n_tokens:
        ax.axvline(panel.prompt_length - 0.5, color="white", linewidth=3)
    ax.tick_params(labelsize=SMALL, length=0)
    ax.spines[:].set_visible(False)
    write_title(ax, " · ".join(filter(None, [panel.title, scale.title, origin(panel)])))


def _write_tokens(ax: Axes, panel: GridPanel, levels: np.ndarray, scale: Scale) -> None:
    """The top token in each cell, the fed tokens below, what follows above."""
    texts = {
        i: drawable(fit(visible(panel.token_text(i)), _WIDEST))
        for i in np.unique(np.concatenate([panel.top_ids[..., 0].ravel(), panel.next_ids])).tolist()
    }
    inks = ["#000000", *(ink(color) for color in scale.colors)]
    for (row, column), level in np.ndenumerate(levels):
        text = texts[int(panel.top_ids[row, column, 0])]
        style = {"color": inks[level + 1], "fontsize": _text_size(text), **token_font()}
        ax.text(column, row, text, ha="center", va="center", clip_on=True, **style)
    places = range(panel.n_tokens)
    fed = [drawable(fit(visible(token), _WIDEST)) for token in panel.tokens]
    ax.set_xticks(places, labels=fed, **token_font())
    top = ax.secondary_xaxis("top")
    top.set_xticks(places, labels=[texts[i] if i >= 0 else "" for i in panel.next_ids.tolist()], **token_font())
    top.tick_params(labelsize=SMALL, length=0, labelcolor="#666666")
    top.spines[:].set_visible(False)


def _text_size(text: str) -> float:
    return SMALL if display_width(text) <= 7 else 7 * SMALL / display_width(text)


def _number_blocks(ax: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 16)
    places = range(len(layers) - 1, -1, -step)
    ax.set_yticks(list(places), labels=[str(layers[place]) for place in places])
    ax.set_ylabel("block", fontsize=SMALL)
