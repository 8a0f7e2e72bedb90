"""Trajectories as static HTML: a table and a stylesheet, no script, the same bytes for the same numbers.

>>> trajectory = session.lens("The capital of France is")
>>> render_page(trajectory)[:15], render_fragment(trajectory, metric="kl")[:4]
('<!doctype html>', '<div')

Text from the model is data: each piece goes through `visible` (or `plain`) and `escape`. End tags of rows
and cells are left out, as HTML allows, because a grid of 80 blocks × 500 tokens is mostly markup.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

import numpy as np

from nblens.colors import DIFFERENCE_COLORS, MAGNITUDE_COLORS, Scale, cell_values, changed_values, ink
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.difference import Comparison, TrajectoryDiff
from nblens.lens.trajectory import Trajectory
from nblens.text import changed_words, display_width, fit, percent, plain, short_number, visible

__all__ = ["MAX_CELLS", "render_fragment", "render_page", "render_texts"]

MAX_CELLS = 40_000
"""Cells in one grid; of a longer trajectory the last tokens are shown."""

_NARROWEST, _WIDEST = 2, 9
_TOOLTIP_COLUMNS = 32
_ROOMY = 10_000  # cells up to which a tooltip lists five tokens instead of three
# Between a name and its value in a tooltip: the line under the grid shows the same text with wide word spacing,
# which a thin space is exempt from.
_THIN = "\u2009"

Rendered = Trajectory | TrajectoryDiff | Comparison | SiteTrajectories


def render_fragment(obj: Rendered, *, metric: str = "prob") -> str:
    """One self-contained `<div>`, for a notebook output or a page of one's own.

    Parameters
    ----------
    obj : Trajectory, TrajectoryDiff, Comparison or SiteTrajectories
    metric : {"prob", "entropy", "kl", "rank"}
        What colours the cells.

    Raises
    ------
    UserError
        The metric is unknown.
    """
    if isinstance(obj, Comparison):
        return _comparison(obj, metric)
    if isinstance(obj, SiteTrajectories):
        return _sites(obj, metric)
    if isinstance(obj, TrajectoryDiff):
        grid = _diff_grid(obj, metric, ("base", "other"), _column_widths(obj.other))
    else:
        grid = _trajectory_grid(obj, metric, _column_widths(obj))
    return _document([grid.scale], [_table(grid)])


def render_page(obj: Rendered, *, metric: str = "prob") -> str:
    """A whole HTML document around `render_fragment`, light or dark as the reader's system is."""
    if isinstance(obj, SiteTrajectories):
        trajectory = next(iter(obj.values()))
    else:
        trajectory = obj if isinstance(obj, Trajectory) else obj.base
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(f'{type(obj).__name__} of {plain(trajectory.model)}, nblens')}</title>"
        "<style>:root{color-scheme:light dark}body{margin:24px}</style></head>\n"
        f"<body>{render_fragment(obj, metric=metric)}</body></html>\n"
    )


def render_texts(comparison: Comparison) -> str:
    """Only the texts of a comparison, side by side, with changed words marked."""
    return _document([], [_texts(comparison)])


def _comparison(comparison: Comparison, metric: str) -> str:
    base, steered = comparison.base, comparison.steered
    scale = Scale.magnitude(metric, cell_values(base, metric), cell_values(steered, metric))
    widths = _column_widths(base, steered)
    diff = comparison.diff
    shared = Scale.difference(metric, changed_values(diff, metric), high=scale.high)
    parts = [_texts(comparison)] if comparison.base_text or comparison.steered_text else []
    parts += [
        _table(_trajectory_grid(base, metric, widths, scale, "base")),
        _table(_trajectory_grid(steered, metric, widths, scale, "steered")),
        _table(_diff_grid(diff, metric, ("base", "steered"), widths, shared, "steered − base")),
    ]
    return _document([scale, shared], parts)


def _sites(by_site: SiteTrajectories, metric: str) -> str:
    trajectories = by_site.values()
    scale = Scale.magnitude(metric, *(cell_values(trajectory, metric) for trajectory in trajectories))
    widths = _column_widths(*trajectories)
    tables = [_table(_trajectory_grid(trajectory, metric, widths, scale)) for trajectory in trajectories]
    return _document([scale], tables)


def _document(scales: list[Scale], parts: list[str]) -> str:
    rules = "".join(_level_rules(scale.signed) for scale in scales)
    return f'<div class="nblens-grid"><style>\n{_stylesheet()}{rules}</style>\n{"".join(parts)}</div>'


@lru_cache(maxsize=1)
def _stylesheet() -> str:
    return Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


@lru_cache(maxsize=2)
def _level_rules(signed: bool) -> str:
    """The legend's bar and a class for each colour level: `a0`… magnitudes, `d0`… differences."""
    letter, colors = ("d", DIFFERENCE_COLORS) if signed else ("a", MAGNITUDE_COLORS)
    bar = f".nblens-grid .bar-{letter}{{background:linear-gradient(90deg,{','.join(colors[::3])})}}\n"
    return bar + "".join(
        f".nblens-grid .{letter}{level}{{background-color:{color};color:{ink(color)}}}\n"
        for level, color in enumerate(colors)
    )


@dataclass(frozen=True)
class _Grid:
    """One table, whatever it was made from."""

    title: str
    scale: Scale
    trajectory: Trajectory
    """gives the axes and the tokens in the cells"""
    values: np.ndarray
    """(n_layers, n_tokens), NaN where there is none"""
    marked: np.ndarray
    """bool (n_layers, n_tokens)"""
    mark_means: str
    widths: list[int]
    """columns of text by token"""
    describe: Callable[[int, int], list[str]]
    """row, column → lines of the tooltip, escaped"""


def _trajectory_grid(
    trajectory: Trajectory, metric: str, widths: list[int], scale: Scale | None = None, title: str = ""
) -> _Grid:
    values = cell_values(trajectory, metric)
    top = trajectory.top_ids[..., 0]
    ranked = _Ranked(trajectory)
    k = 5 if values.size <= _ROOMY else 3

    def describe(row: int, column: int) -> list[str]:
        entropy, kl = trajectory.entropy[row, column], trajectory.kl_to_final[row, column]
        rank = trajectory.next_rank[row, column]
        follows = f" next{_THIN}#{rank}" if rank > 0 else ""
        numbers = [f"{name}{_THIN}{value:.2f}" for name, value in (("H", entropy), ("KL", kl)) if not np.isnan(value)]
        facts = f"{' '.join(numbers)}{follows}".strip()
        return [*ranked(row, column, k), *([facts] if facts else [])]

    scale = scale or Scale.magnitude(metric, values)
    return _Grid(title, scale, trajectory, values, top == top[-1], "as in the last block", widths, describe)


def _diff_grid(
    diff: TrajectoryDiff,
    metric: str,
    names: tuple[str, str],
    widths: list[int],
    scale: Scale | None = None,
    title: str = "",
) -> _Grid:
    values = changed_values(diff, metric)
    sides = [(name, _Ranked(side)) for name, side in zip(names, (diff.base, diff.other), strict=True)]

    def describe(row: int, column: int) -> list[str]:
        value = float(values[row, column])
        lines = [f"{name} " + " ".join(ranked(row, column, 2)) for name, ranked in sides]
        return lines if np.isnan(value) else [*lines, f"Δ{metric}{_THIN}{'+' * (value > 0)}{short_number(value)}"]

    scale = scale or Scale.difference(metric, values)
    return _Grid(title, scale, diff.other, values, diff.top1_changed, "token differs from base", widths, describe)


class _Ranked:
    """The top tokens of a cell as `·Paris 97.1%`, escaped; texts are made once per token id."""

    def __init__(self, trajectory: Trajectory) -> None:
        self.ids = trajectory.top_ids
        self.probabilities = np.exp(trajectory.top_logprobs)
        used = np.unique(self.ids).tolist()
        self.texts = {i: _tooltip_text(trajectory.token_text(i)) + _THIN for i in used}

    def __call__(self, row: int, column: int, k: int) -> list[str]:
        ids, probabilities = self.ids[row, column, :k].tolist(), self.probabilities[row, column, :k].tolist()
        return [self.texts[i] + percent(p) for i, p in zip(ids, probabilities, strict=True)]


def _table(grid: _Grid) -> str:
    trajectory = grid.trajectory
    first = max(0, trajectory.n_tokens - MAX_CELLS // max(1, trajectory.n_layers))
    columns = range(first, trajectory.n_tokens)
    note = f'<div class="note">tokens 0–{first - 1} are not shown</div>' if first else ""
    label = escape(f"{grid.title} {grid.scale.title}".strip())
    return (
        f'<div class="view">{_head(grid)}{note}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="t">{_axes_and_body(grid, columns)}</table></div></div>\n'
    )


def _head(grid: _Grid) -> str:
    trajectory, scale = grid.trajectory, grid.scale
    size = f"{trajectory.n_layers} layers × {trajectory.n_tokens} tokens"
    facts = [plain(trajectory.reading), plain(trajectory.model), size]
    title = f"<b>{escape(grid.title)}</b>" if grid.title else ""
    # spaces between the parts are for where stylesheets are taken out: an untrusted notebook, a code host
    ticks = " ".join(f"<i>{text}</i>" for _, text in scale.ticks())
    letter = "d" if scale.signed else "a"
    return (
        f'<div class="head">{title}<b>{escape(scale.title)}</b>'
        + "".join(f" <span>{escape(fact)}</span>" for fact in facts if fact)
        + f' <span><i class="key m"></i>{escape(grid.mark_means)}</span>'
        + f' <span class="scale"><span class="bar bar-{letter}"></span>'
        + f'<span class="ticks">{ticks}</span></span></div>'
    )


def _axes_and_body(grid: _Grid, columns: range) -> str:
    trajectory = grid.trajectory
    split = trajectory.prompt_length if columns.start < trajectory.prompt_length < trajectory.n_tokens else -1
    # the gap before the first generated token is a border, which takes its room from the cell
    widths = "".join(f'<col class="w{grid.widths[column] + (column == split)}">' for column in columns)
    follows = [(trajectory.token_text(i) if i >= 0 else "", i) for i in trajectory.next_ids.tolist()]
    fed = list(zip(trajectory.tokens, trajectory.token_ids.tolist(), strict=True))
    return (
        f'<colgroup><col class="w0">{widths}</colgroup>\n'
        f"<thead>{_part_labels(columns, split)}{_token_row('next', follows, columns, split)}"
        f"<tbody>{''.join(_body_rows(grid, columns, split))}"
        f"<tfoot>{_token_row('token', fed, columns, split)}{_position_row(columns, split)}"
    )


def _body_rows(grid: _Grid, columns: range, split: int) -> Iterator[str]:
    trajectory = grid.trajectory
    top = trajectory.top_ids[..., 0]
    texts = {i: _cell_text(trajectory.token_text(i)) for i in np.unique(top).tolist()}
    letter = "d" if grid.scale.signed else "a"
    colors = ["", *(f"{letter}{level}" for level in range(len(grid.scale.colors)))]
    levels = (grid.scale.levels(grid.values) + 1).tolist()
    for row in reversed(range(trajectory.n_layers)):
        layer = trajectory.layers[row]
        cells = [f"<tr><th>{layer:d}"]
        for column in columns:
            kind = colors[levels[row][column]] + " m" * bool(grid.marked[row, column]) + " g" * (column == split)
            lines = "\n".join([f"block{_THIN}{layer:d} token{_THIN}{column}", *grid.describe(row, column)])
            cells.append(f'<td class="{kind}" title="{lines}">{texts[int(top[row, column])]}')
        yield "".join(cells) + "\n"


def _column_widths(*trajectories: Trajectory) -> list[int]:
    """Columns of text that each token's cells need, over all the trajectories, within bounds."""
    widths = [_NARROWEST] * max(trajectory.n_tokens for trajectory in trajectories)
    for trajectory in trajectories:
        follows = np.where(trajectory.next_ids < 0, trajectory.token_ids, trajectory.next_ids)
        ids = np.concatenate([trajectory.top_ids[..., 0], [trajectory.token_ids, follows]])
        wide = {i: display_width(visible(trajectory.token_text(i))) for i in np.unique(ids).tolist()}
        for column in range(trajectory.n_tokens):
            widest = max(wide[i] for i in ids[:, column].tolist())
            widths[column] = min(max(widest, widths[column]), _WIDEST)
    return widths


def _part_labels(columns: range, split: int) -> str:
    if split < 0:
        return ""
    spans = ((split - columns.start, "", "prompt"), (columns.stop - split, ' class="g"', "generated"))
    return '<tr class="parts"><th>' + "".join(
        f'<th{kind} colspan="{n}"><span class="part">{name}</span>' for n, kind, name in spans
    )


def _token_row(label: str, tokens: list[tuple[str, int]], columns: range, split: int) -> str:
    cells = []
    for column in columns:
        text, token_id = tokens[column]
        kind = ' class="g"' if column == split else ""
        title = f' title="{_tooltip_text(text)} (id {token_id}), token {column}"' if token_id >= 0 else ""
        cells.append(f"<th{kind}{title}>{_cell_text(text) if token_id >= 0 else ''}")
    return f"<tr><th>{label}{''.join(cells)}\n"


def _position_row(columns: range, split: int) -> str:
    cells = (f"<th{' class=g' if c == split else ''}>{c if c % 5 == 0 else ''}" for c in columns)
    return f'<tr class="pos"><th>{"".join(cells)}\n'


def _cell_text(token: str) -> str:
    return escape(fit(visible(token), _WIDEST))


def _tooltip_text(token: str) -> str:
    return escape(fit(visible(token), _TOOLTIP_COLUMNS))


def _texts(comparison: Comparison) -> str:
    """The new texts side by side; words that only one of them has are marked."""
    sides = changed_words(plain(comparison.base_text), plain(comparison.steered_text))
    names = ("base", "steered")
    boxes = (f"<div><b>{name}</b><p>{_marked(side)}</p></div>" for name, side in zip(names, sides, strict=True))
    return f'<div class="texts">{"".join(boxes)}</div>\n'


def _marked(parts: list[tuple[str, bool]]) -> str:
    return "".join(f"<mark>{escape(text)}</mark>" if changed else escape(text) for text, changed in parts)
