"""Curves over depth: chosen tokens at one position, and metrics over many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.colors import Scale
from nblens.errors import UserError
from nblens.plots.canvas import (
    LINE_COLORS,
    drawable,
    label_ends,
    new_figure,
    origin,
    rank_axis,
    tidy,
    write_title,
)
from nblens.plots.pools import pools
from nblens.text import fit, plain, visible
from nblens.views.panels import GridPanel, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["depth_curves", "token_curves"]

_SINGLE_LINES = 100  # more tokens than this have no line of their own behind the band


def token_curves(
    trajectory: Any, tokens: Sequence[str | int] | None = None, *, position: int = -1, metric: str = "prob"
) -> Figure:
    """Probability or rank of chosen tokens over depth, at one position, each labelled at its line.

    Parameters
    ----------
    trajectory : Trajectory
    tokens : sequence of str or int, optional
        Texts, each that of one token as it is, with its space, which a target may lack; or ids. None: the targets that
        the lens followed, else the last block's top tokens. A token that was not a target is drawn only where it is
        among the top k.
    position : int
        Token position; negative counts from the last.
    metric : {"prob", "rank"}

    Raises
    ------
    UserError
        A token that this trajectory does not hold, a text of several, a position outside it, or an unknown metric.
    """
    if metric not in ("prob", "rank"):
        raise UserError(f"metric {metric!r} cannot be drawn as curves; one of prob, rank")
    (panel,) = panels_of(trajectory)
    if not isinstance(position, Integral) or not -panel.n_tokens <= position < panel.n_tokens:
        raise UserError(f"position {position!r} is outside this trajectory of {panel.n_tokens} tokens")
    figure = new_figure(6.4, 3.6)
    ax = figure.subplots()
    ends = []
    for number, token_id in enumerate(_token_ids(panel, tokens, position)):
        values = _over_depth(panel, token_id, position, metric)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        ax.plot(panel.layers, values, color=color, marker="o", markersize=3, linewidth=1.5)
        seen = np.flatnonzero(np.isfinite(values))
        if len(seen):
            ends.append((values[seen[-1]], panel.token_name(token_id, _short), color))
    if metric == "prob":
        ax.set(ylim=(-0.03, 1.03), ylabel="probability")
    else:
        rank_axis(ax)
    label_ends(ax, ends)
    tidy(ax, panel.layers)
    fed = drawable(fit(visible(panel.tokens[position]), 24))
    write_title(ax, f"after {fed} (token {position % panel.n_tokens}) · {origin(panel)}")
    return figure


def depth_curves(obj: Any, metric: str = "entropy") -> Figure:
    """A metric over depth: the median over tokens, with the middle half of them as a band.

    Behind a single curve there is a thin line for each token, where there are not too many.

    Parameters
    ----------
    obj : Trajectory, Comparison, list or dict of these
        A list is taken together; a dict, such as ``{"logit": one, "tuned": [two, three]}`` or the trajectories of
        several sites, becomes a curve for each key, labelled at its end.
    metric : {"prob", "entropy", "kl", "rank"}

    Raises
    ------
    UserError
        The metric is unknown, there is no token, or a list holds trajectories of different layers.
    """
    named = pools(obj)
    figure = new_figure(6.4, 3.4)
    ax = figure.subplots()
    ends, counts = [], []
    for number, (name, panels) in enumerate(named.items()):
        layers, values = panels[0].layers, _by_token(panels, metric)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        if len(named) == 1 and values.shape[1] <= _SINGLE_LINES:
            ax.plot(layers, values, color=color, alpha=0.18, linewidth=0.6)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
        ax.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(layers, median, color=color, marker="o", markersize=3, linewidth=1.6, clip_on=False)
        ends.append((median[-1], plain(name), color))
        counts.append(values.shape[1])
    everything = [panel for panels in named.values() for panel in panels]
    _metric_axis(ax, everything[0].metric(metric).scale)
    label_ends(ax, [end for end in ends if end[1]])
    tidy(ax, sorted({layer for panel in everything for layer in panel.layers}))
    tokens = f"{min(counts)}–{max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
    origins = list(dict.fromkeys(map(origin, everything)))
    shared = origins[0] if len(origins) == 1 else plain(everything[0].model)
    write_title(ax, f"median and middle half of {tokens} tokens · {shared}")
    return figure


def _by_token(panels: Sequence[GridPanel], metric: str) -> np.ndarray:
    """All tokens that have the metric, side by side, (n_layers, n)."""
    values = np.concatenate([panel.metric(metric).values for panel in panels], axis=1)
    values = values[:, np.isfinite(values).all(0)]
    if values.shape[1] == 0:
        raise UserError("there is no token to draw")
    return values


def _metric_axis(ax: Axes, scale: Scale) -> None:
    if scale.logarithmic:
        rank_axis(ax)
    elif scale.fixed:
        ax.set_ylim(-0.03 * scale.high, 1.03 * scale.high)
    elif not scale.signed:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(scale.title)


def _token_ids(panel: GridPanel, tokens: Sequence[str | int] | None, position: int) -> list[int]:
    if tokens is None:
        followed = np.isfinite(panel.target_logprobs[:, position]).all(0)
        ids = panel.target_ids[followed] if followed.any() else panel.top_ids[-1, position]
        return [int(token_id) for token_id in ids]
    return [_token_id(panel, token) for token in ([tokens] if isinstance(tokens, str) else tokens)]


def _token_id(panel: GridPanel, token: str | int) -> int:
    """The one token of an id or a text."""
    if not isinstance(token, str):
        found = [int(token)] if isinstance(token, Integral) and int(token) in panel.vocabulary else []
    else:
        found = _named(panel, token)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"token {token!r} is several here, of ids {', '.join(map(str, sorted(found)))}; give an id")
    alike = isinstance(token, str) and next((text for text in panel.vocabulary.values() if text.strip() == token), None)
    hint = f"{alike!r} does, which is another" if alike else "ask the lens for it with targets="
    raise UserError(f"token {token!r} does not occur in this trajectory; {hint}")


def _named(panel: GridPanel, token: str) -> list[int]:
    """Ids of a text: as it stands, but for a target, which may be called as the lens was asked for it."""
    targets = {token_id: panel.token_text(token_id) for token_id in panel.target_ids.tolist()}
    for texts, named in ((targets, token), (targets, f" {token}"), (panel.vocabulary, token)):
        if found := [int(token_id) for token_id, text in texts.items() if text == named]:
            return found
    return []


def _short(token: str) -> str:
    return fit(visible(token), 16)


def _over_depth(panel: GridPanel, token_id: int, position: int, metric: str) -> np.ndarray:
    """Probability or rank of one token by layer; NaN where the panel does not hold it."""
    (target,) = np.nonzero(panel.target_ids == token_id)
    if len(target):
        logprobs = panel.target_logprobs[:, position, target[0]].astype(float)
        ranks = panel.target_ranks[:, position, target[0]].astype(float)
        if metric == "prob" and np.isfinite(logprobs).all():
            return np.asarray(np.exp(logprobs))
        if metric == "rank" and (ranks > 0).all():
            return ranks
    among = panel.top_ids[:, position] == token_id
    values = np.exp(panel.top_logprobs[:, position]) if metric == "prob" else 1.0 + np.arange(among.shape[1])
    return np.where(among.any(-1), np.where(among, values, 0).sum(-1), np.nan)
