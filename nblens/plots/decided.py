"""At which block tokens are decided, as a histogram."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import UserError
from nblens.plots.canvas import LINE_COLORS, drawable, new_figure, text_font, tidy
from nblens.plots.pools import pools
from nblens.text import plain
from nblens.views.panels import GridPanel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["decided_histogram"]

_MEANS = {
    "final": "the last block's",
    "next": "the one that follows",
    "target": "the target",
}
_GREY = "#9a9a9a"


def decided_histogram(obj: Any, *, against: str = "final", position: int | None = None) -> Figure:
    """Share of tokens by the block from which their top token stays the right one, with the median marked.

    Parameters
    ----------
    obj : Trajectory, Comparison, list or dict of these
        A list is taken together; a dict becomes a histogram for each key, under each other on one scale.
    against : {"final", "next", "target"}
        Which token is the right one, as in `Trajectory.decided_at`. Tokens that the last block gets wrong stand
        apart, under "never".
    position : int, optional
        Look at this position of each trajectory alone, such as -1 for the answers to many prompts.

    Raises
    ------
    UserError
        `against` is unknown, there is no target or no token, a position is outside its trajectory, or a list holds
        trajectories of different layers.
    """
    named = pools(obj)
    decided = {name: _blocks(panels, against, position) for name, panels in named.items()}
    everything = [panel for panels in named.values() for panel in panels]
    layers = sorted({layer for panel in everything for layer in panel.layers})
    figure = new_figure(6.4, 2.8 if len(named) == 1 else 0.9 + 1.4 * len(named))
    axes = figure.subplots(len(named), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for number, (ax, (name, blocks)) in enumerate(zip(axes, decided.items(), strict=True)):
        color = LINE_COLORS[number % len(LINE_COLORS)]
        _draw_shares(ax, blocks, layers, color, never=against != "final")
        _name_panel(ax, name, blocks, color)
    for ax in axes[:-1]:
        ax.set_xlabel("")
    title = f"block from which the top token stays {_MEANS[against]} · {plain(everything[0].model)}"
    figure.suptitle(drawable(title), **{"x": 0.01, "ha": "left", "fontsize": 9, **text_font()})
    return figure


def _blocks(panels: list[GridPanel], against: str, position: int | None) -> np.ndarray:
    """One block a token, -1 for never."""
    found = []
    for panel in panels:
        n_tokens = panel.n_tokens
        if position is not None and not (isinstance(position, Integral) and -n_tokens <= position < n_tokens):
            raise UserError(f"position {position!r} is outside a trajectory of {n_tokens} tokens")
        looked_at = slice(None) if position is None else [position]
        blocks, following = panel.decided_at(against)[looked_at], panel.next_ids[looked_at]
        found.append(blocks[following >= 0] if against == "next" else blocks)
    blocks = np.concatenate(found)
    if not len(blocks):
        raise UserError("there is no token to draw")
    return blocks


def _draw_shares(ax: Axes, blocks: np.ndarray, layers: list[int], color: str, *, never: bool) -> None:
    from matplotlib.ticker import PercentFormatter

    tidy(ax, layers)
    width = 0.85 * min(np.diff(layers), default=1)
    ax.bar(layers, [(blocks == layer).mean() for layer in layers], width, color=color)
    right = layers[-1] + 0.7 * width
    if never:
        place = layers[-1] + max(1.8 * width, 0.06 * (layers[-1] - layers[0]))  # its name clears the last block's
        right = place + 0.7 * width
        ax.bar([place], [(blocks < 0).mean()], width, color=_GREY)
        ax.text(place, -0.03, "never", transform=ax.get_xaxis_transform(), ha="center", va="top", fontsize=8)
    ax.set_xlim(layers[0] - 0.7 * width, right)
    ax.set_xticks(layers[:: -(-len(layers) // 16)])
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    ax.set_ylabel("share of tokens")


def _name_panel(ax: Axes, name: str, blocks: np.ndarray, color: str) -> None:
    """Above the bars: the panel's name, how many tokens, and their median, for which never is later than any block."""
    median = np.median(np.where(blocks < 0, np.inf, blocks))
    if np.isfinite(median):
        ax.axvline(median, color="#333333", linewidth=0.8, linestyle=(0, (3, 2)))
    middle = f"block {median:g}" if np.isfinite(median) else "never"
    facts = [plain(name), f"{len(blocks)} token{'s' * (len(blocks) != 1)}", f"median: {middle}"]
    ax.set_title(drawable(" · ".join(filter(None, facts))), loc="left", fontsize=8, color=color, **text_font())
