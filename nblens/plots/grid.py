"""Layers × tokens as a figure: one grid, or several under each other on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.colors import Scale, cell_values, changed_values, ink
from nblens.errors import UserError
from nblens.plots.canvas import SMALL, drawable, new_figure, origin, token_font, write_title
from nblens.text import display_width, fit, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["trajectory_grid"]

_TEXT_COLUMNS = 60  # more tokens than this are drawn as colour alone
_WIDEST = 9


def trajectory_grid(obj: Any, metric: str = "prob") -> Figure:
    """Layers × tokens, coloured by a metric, with the top token in each cell.

    Up to 60 tokens carry their text; longer ones are colour alone.

    Parameters
    ----------
    obj : Trajectory, TrajectoryDiff, Comparison or dict of Trajectory
        A comparison becomes three grids: base, steered and their difference, which share one scale. A dict, such
        as the trajectories of several sites, becomes a grid for each on one scale.
    metric : {"prob", "entropy", "kl", "rank"}

    Raises
    ------
    UserError
        The metric is unknown, or there is no token.
    """
    panels = _panels(obj, metric)
    n_tokens = max((trajectory.n_tokens for _, trajectory, _, _ in panels), default=0)
    if n_tokens == 0:
        raise UserError("there is no token to draw")
    height = sum(1.1 + 0.2 * trajectory.n_layers for _, trajectory, _, _ in panels)
    width = 1.6 + n_tokens * (0.55 if n_tokens <= _TEXT_COLUMNS else 0.06)
    figure = new_figure(min(max(width, 4.0), 36.0), height)
    ratios = [trajectory.n_layers for _, trajectory, _, _ in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=ratios)[:, 0]
    for ax, (title, trajectory, values, scale) in zip(axes, panels, strict=True):
        _draw_grid(figure, ax, title, trajectory, values, scale)
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
    named = obj if isinstance(obj, Mapping) else {"": obj}
    values = {name: cell_values(trajectory, metric) for name, trajectory in named.items()}
    scale = Scale.magnitude(metric, *values.values())
    # a site is its own title: the origin of its grid says it
    return [("" if name == t.site else str(name), t, values[name], scale) for name, t in named.items()]


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
    bar.ax.tick_params(labelsize=SMALL, length=0)
    bar.outline.set_visible(False)
    if with_text:
        _write_tokens(ax, trajectory, levels, scale)
    else:
        ax.set_xlabel("token position", fontsize=SMALL)
    _number_blocks(ax, trajectory.layers)
    if 0 < trajectory.prompt_length < trajectory.n_tokens:
        ax.axvline(trajectory.prompt_length - 0.5, color="white", linewidth=3)
    ax.tick_params(labelsize=SMALL, length=0)
    ax.spines[:].set_visible(False)
    write_title(ax, " · ".join(filter(None, [title, scale.title, origin(trajectory)])))


def _write_tokens(ax: Axes, trajectory: Any, levels: np.ndarray, scale: Scale) -> None:
    """The top token in each cell, the fed tokens below, what follows above."""
    texts = {
        i: drawable(fit(visible(trajectory.token_text(i)), _WIDEST))
        for i in np.unique(np.concatenate([trajectory.top_ids[..., 0].ravel(), trajectory.next_ids])).tolist()
    }
    inks = ["#000000", *(ink(color) for color in scale.colors)]
    for (row, column), level in np.ndenumerate(levels):
        text = texts[int(trajectory.top_ids[row, column, 0])]
        style = {"color": inks[level + 1], "fontsize": _text_size(text), **token_font()}
        ax.text(column, row, text, ha="center", va="center", clip_on=True, **style)
    places = range(trajectory.n_tokens)
    fed = [drawable(fit(visible(token), _WIDEST)) for token in trajectory.tokens]
    ax.set_xticks(places, labels=fed, **token_font())
    top = ax.secondary_xaxis("top")
    top.set_xticks(places, labels=[texts[i] if i >= 0 else "" for i in trajectory.next_ids.tolist()], **token_font())
    top.tick_params(labelsize=SMALL, length=0, labelcolor="#666666")
    top.spines[:].set_visible(False)


def _text_size(text: str) -> float:
    return SMALL if display_width(text) <= 7 else 7 * SMALL / display_width(text)


def _number_blocks(ax: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 16)
    places = range(len(layers) - 1, -1, -step)
    ax.set_yticks(list(places), labels=[str(layers[place]) for place in places])
    ax.set_ylabel("block", fontsize=SMALL)
