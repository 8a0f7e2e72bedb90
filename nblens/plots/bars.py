"""What each block adds to a logit, as bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.plots.canvas import LINE_COLORS, drawable, new_figure, text_font, tidy, token_font
from nblens.text import fit, plain, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["attribution_bars"]

_NAMES = {"attn_out": "attention", "mlp_out": "MLP"}


def attribution_bars(attribution: Any, position: int = -1) -> Figure:
    """Bars over the blocks for one token position, attention and MLP side by side, a panel per target.

    Parameters
    ----------
    attribution : Attribution
        Parts of logits.
    position : int
        Token position; negative counts from the last.
    """
    n_targets = len(attribution.target_ids)
    figure = new_figure(6.4, 2.8 if n_targets == 1 else 0.9 + 1.6 * n_targets)
    axes = figure.subplots(n_targets, 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    for target, ax in enumerate(axes):
        _draw_panel(ax, attribution, position, target, labelled=target == 0)
    for ax in axes[:-1]:
        ax.set_xlabel("")
    fed = visible(attribution.tokens[position])
    place = position % len(attribution.tokens)
    facts = map(plain, (attribution.model, *attribution.circumstances.facts))
    title = " · ".join((f"what each block adds to a logit after {fed} (token {place})", *facts))
    figure.suptitle(drawable(title), **{"x": 0.01, "ha": "left", "fontsize": 9, **text_font()})
    return figure


def _draw_panel(ax: Axes, attribution: Any, position: int, target: int, *, labelled: bool) -> None:
    layers = np.array(attribution.layers)
    tidy(ax, attribution.layers)
    width = 0.4 * min(np.diff(layers), default=1)
    for side, (site, values) in enumerate(attribution.contributions.items()):
        color = LINE_COLORS[side]
        bars = values[:, position, target]
        ax.bar(layers + (side - 0.5) * width, bars, width, color=color)
        if labelled:
            ax.text(1.01, 0.9 - 0.14 * side, _NAMES.get(site, site), transform=ax.transAxes, color=color, fontsize=8)
    ax.axhline(0, color="#333333", linewidth=0.6)
    ax.set_xlim(layers[0] - 2 * width, layers[-1] + 2 * width)
    ax.set_xticks(layers[:: -(-len(layers) // 16)])
    ax.set_ylabel("logit")
    embedding, logit = attribution.embedding[position, target], attribution.logits[position, target]
    name = drawable(attribution.target_name(target, lambda text: fit(visible(text), 20)))
    ax.set_title(name, loc="left", fontsize=8, **token_font())
    note = f"embedding {embedding:.1f} · logit {logit:.1f}".replace("-", "\N{MINUS SIGN}")
    ax.set_title(note, loc="right", fontsize=8, color="#666666")
