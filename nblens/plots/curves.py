"""Curves over depth: chosen tokens at one position, and metrics over many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.colors import TITLES, cell_values
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
    figure = new_figure(6.4, 3.6)
    ax = figure.subplots()
    ends = []
    for number, token_id in enumerate(_token_ids(trajectory, tokens, position)):
        values = _over_depth(trajectory, token_id, position, metric)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        ax.plot(trajectory.layers, values, color=color, marker="o", markersize=3, linewidth=1.5)
        seen = np.flatnonzero(np.isfinite(values))
        if len(seen):
            ends.append((values[seen[-1]], visible(trajectory.token_text(token_id)), color))
    if metric == "prob":
        ax.set(ylim=(-0.03, 1.03), ylabel="probability")
    else:
        rank_axis(ax)
    label_ends(ax, ends)
    tidy(ax, trajectory.layers)
    fed = drawable(fit(visible(trajectory.tokens[position]), 24))
    write_title(ax, f"after {fed} (token {position % trajectory.n_tokens}) · {origin(trajectory)}")
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
    for number, (name, trajectories) in enumerate(named.items()):
        layers, values = trajectories[0].layers, _by_token(trajectories, metric)
        color = LINE_COLORS[number % len(LINE_COLORS)]
        if len(named) == 1 and values.shape[1] <= _SINGLE_LINES:
            ax.plot(layers, values, color=color, alpha=0.18, linewidth=0.6)
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75), axis=1)
        ax.fill_between(layers, low, high, color=color, alpha=0.18, linewidth=0)
        ax.plot(layers, median, color=color, marker="o", markersize=3, linewidth=1.6, clip_on=False)
        ends.append((median[-1], plain(name), color))
        counts.append(values.shape[1])
    _metric_axis(ax, metric)
    label_ends(ax, [end for end in ends if end[1]])
    everything = [trajectory for trajectories in named.values() for trajectory in trajectories]
    tidy(ax, sorted({layer for trajectory in everything for layer in trajectory.layers}))
    tokens = f"{min(counts)}–{max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}"
    origins = list(dict.fromkeys(origin(trajectory) for trajectory in everything))
    shared = f" · {origins[0]}" if len(origins) == 1 else f" · {plain(everything[0].model)}"
    write_title(ax, f"median and middle half of {tokens} tokens{shared}")
    return figure


def _by_token(trajectories: Sequence[Any], metric: str) -> np.ndarray:
    """All tokens that have the metric, side by side, (n_layers, n)."""
    values = np.concatenate([cell_values(trajectory, metric) for trajectory in trajectories], axis=1)
    values = values[:, np.isfinite(values).all(0)]
    if values.shape[1] == 0:
        raise UserError("there is no token to draw")
    return values


def _metric_axis(ax: Axes, metric: str) -> None:
    if metric == "rank":
        rank_axis(ax)
    elif metric == "prob":
        ax.set_ylim(-0.03, 1.03)
    else:
        ax.set_ylim(bottom=0)
    ax.set_ylabel(TITLES[metric])


def _token_ids(trajectory: Any, tokens: Sequence[str | int] | None, position: int) -> list[int]:
    if tokens is None:
        followed = np.isfinite(trajectory.target_logprobs[:, position]).all(0)
        return (trajectory.target_ids[followed] if followed.any() else trajectory.top_ids[-1, position]).tolist()
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
    if len(target) and metric == "prob" and np.isfinite(trajectory.target_logprobs[:, position, target[0]]).all():
        return np.exp(trajectory.target_logprobs[:, position, target[0]].astype(float))
    if len(target) and metric == "rank" and (trajectory.target_ranks[:, position, target[0]] > 0).all():
        return trajectory.target_ranks[:, position, target[0]].astype(float)
    among = trajectory.top_ids[:, position] == token_id
    values = np.exp(trajectory.top_logprobs[:, position]) if metric == "prob" else 1.0 + np.arange(among.shape[1])
    return np.where(among.any(-1), np.where(among, values, 0).sum(-1), np.nan)
