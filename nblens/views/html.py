"""Panels as static HTML: a table each and a stylesheet, no script, the same bytes for the same numbers.

>>> trajectory = session.lens("The capital of France is")
>>> render_page(trajectory)[:15], render_fragment(trajectory, metric="kl")[:4]
('<!doctype html>', '<div')

Text from the model is data: each piece goes through `visible` (or `plain`) and `escape`. End tags of rows
and cells are left out, as HTML allows, because a grid of 80 blocks × 500 tokens is mostly markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nblens.colors import DIFFERENCE_COLORS, MAGNITUDE_COLORS, Scale, ink
from nblens.text import changed_words, display_width, fit, percent, plain, short_number, visible
from nblens.views.panels import GridPanel, Metric, panels_of, with_metric

__all__ = ["MAX_CELLS", "render_fragment", "render_page", "render_texts"]

MAX_CELLS = 40_000
"""Cells in one grid; of a longer one the last tokens are shown."""

_NARROWEST, _WIDEST = 2, 9
_TOOLTIP_COLUMNS = 32
_ROOMY = 10_000  # cells up to which a tooltip lists five tokens instead of three
# Between a name and its value in a tooltip: the line under the grid shows the same text with wide word spacing,
# which a thin space is exempt from.
_THIN = "\u2009"


def render_fragment(obj: Any, *, metric: str | None = None) -> str:
    """One self-contained `<div>`, for a notebook output or a page of one's own.

    Parameters
    ----------
    obj : Trajectory, TrajectoryDiff, Comparison, SiteTrajectories or another whose panels can be told
    metric : str, optional
        What colours the cells, such as "entropy"; None: the first metric of each panel. Panels that have no such metric
        are left out.

    Raises
    ------
    UserError
        The metric is unknown.
    """
    return _fragment(panels_of(obj), metric)


def _fragment(panels: Sequence[GridPanel], metric: str | None) -> str:
    widths = _column_widths(panels)
    drawn = with_metric(panels, metric)
    texts = [_texts(panel.sides) for panel in panels if any(side.text for side in panel.sides)]
    tables = [_table(panel, shown, widths) for panel, shown in drawn]
    return _document([shown.scale for _, shown in drawn], texts + tables)


def render_page(obj: Any, *, metric: str | None = None, name: str = "") -> str:
    """A whole HTML document around `render_fragment`, light or dark as the reader's system is.

    Its title says what `obj` is, or `name` instead, and of which model.
    """
    panels = panels_of(obj)
    model = next((plain(panel.model) for panel in panels), "")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(f'{name or type(obj).__name__} of {model}, nblens')}</title>"
        "<style>:root{color-scheme:light dark}body{margin:24px}</style></head>\n"
        f"<body>{_fragment(panels, metric)}</body></html>\n"
    )


def render_texts(obj: Any) -> str:
    """Only the texts of a comparison, side by side, with changed words marked."""
    return _document([], [_texts(panel.sides) for panel in panels_of(obj) if panel.sides])


def _document(scales: Iterable[Scale], parts: list[str]) -> str:
    rules = "".join(_level_rules(signed) for signed in dict.fromkeys(scale.signed for scale in scales))
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


def _table(panel: GridPanel, metric: Metric, widths: list[int]) -> str:
    first = max(0, panel.n_tokens - MAX_CELLS // max(1, panel.n_layers))
    columns = range(first, panel.n_tokens)
    note = f'<div class="note">tokens 0–{first - 1} are not shown</div>' if first else ""
    label = escape(f"{panel.title} {metric.scale.title}".strip())
    return (
        f'<div class="view">{_head(panel, metric.scale)}{note}'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
        f'<table class="t">{_axes_and_body(panel, metric, widths, columns)}</table></div></div>\n'
    )


def _head(panel: GridPanel, scale: Scale) -> str:
    facts = [*map(plain, panel.caption), f"{panel.n_layers} layers × {panel.n_tokens} tokens"]
    title = f"<b>{escape(panel.title)}</b>" if panel.title else ""
    # spaces between the parts are for where stylesheets are taken out: an untrusted notebook, a code host
    ticks = " ".join(f"<i>{text}</i>" for _, text in scale.ticks())
    letter = "d" if scale.signed else "a"
    return (
        f'<div class="head">{title}<b>{escape(scale.title)}</b>'
        + "".join(f" <span>{escape(fact)}</span>" for fact in facts)
        + f' <span><i class="key m"></i>{escape(panel.mark_means)}</span>'
        + f' <span class="scale"><span class="bar bar-{letter}"></span>'
        + f'<span class="ticks">{ticks}</span></span></div>'
    )


def _axes_and_body(panel: GridPanel, metric: Metric, widths: list[int], columns: range) -> str:
    split = panel.prompt_length if columns.start < panel.prompt_length < panel.n_tokens else -1
    # the gap before the first generated token is a border, which takes its room from the cell
    wide = "".join(f'<col class="w{widths[column] + (column == split)}">' for column in columns)
    characters = [panel.character_at(column) for column in range(panel.n_tokens + 1)]
    next_ids = panel.next_ids.tolist()
    follows = list(
        zip([panel.token_text(i) if i >= 0 else "" for i in next_ids], next_ids, characters[1:], strict=True)
    )
    fed = list(zip(panel.tokens, panel.token_ids.tolist(), characters[:-1], strict=True))
    return (
        f'<colgroup><col class="w0">{wide}</colgroup>\n'
        f"<thead>{_part_labels(columns, split)}{_token_row('next', follows, columns, split)}"
        f"<tbody>{''.join(_body_rows(panel, metric, columns, split))}"
        f"<tfoot>{_token_row('token', fed, columns, split)}{_position_row(columns, split)}"
    )


def _body_rows(panel: GridPanel, metric: Metric, columns: range, split: int) -> Iterator[str]:
    top = panel.top_ids[..., 0]
    texts = {i: _cell_text(panel.token_text(i)) for i in np.unique(top).tolist()}
    letter = "d" if metric.scale.signed else "a"
    colors = ["", *(f"{letter}{level}" for level in range(len(metric.scale.colors)))]
    levels = (metric.scale.levels(metric.values) + 1).tolist()
    describe = _describe_change(panel, metric) if panel.sides else _describe_cell(panel)
    for row in reversed(range(panel.n_layers)):
        layer = panel.layers[row]
        cells = [f"<tr><th>{layer:d}"]
        for column in columns:
            kind = colors[levels[row][column]] + " m" * bool(panel.marked[row, column]) + " g" * (column == split)
            lines = "\n".join([f"block{_THIN}{layer:d} token{_THIN}{column}", *describe(row, column)])
            cells.append(f'<td class="{kind}" title="{lines}">{texts[int(top[row, column])]}')
        yield "".join(cells) + "\n"


_Describe = Callable[[int, int], list[str]]
"""Row and column to the lines of a tooltip, escaped."""


def _describe_cell(panel: GridPanel) -> _Describe:
    """The likeliest tokens under each other, then the numbers of the cell that there are."""
    ranked = _Ranked(panel)
    k = 5 if panel.n_layers * panel.n_tokens <= _ROOMY else 3
    notes = [(escape(metric.note), metric.values.tolist()) for metric in panel.metrics if metric.note]

    def describe(row: int, column: int) -> list[str]:
        found = [(note, values[row][column]) for note, values in notes]
        numbers = [note.format(value) for note, value in found if not math.isnan(value)]
        return [*ranked(row, column, k), *([" ".join(numbers)] if numbers else [])]

    return describe


def _describe_change(panel: GridPanel, metric: Metric) -> _Describe:
    """The likeliest tokens of both sides, then the change."""
    sides = [(escape(side.title), _Ranked(side)) for side in panel.sides]

    def describe(row: int, column: int) -> list[str]:
        value = float(metric.values[row, column])
        lines = [f"{name} " + " ".join(ranked(row, column, 2)) for name, ranked in sides]
        signed = metric.scale.signed
        change = f"{'Δ' * signed}{metric.name}{_THIN}{'+' * (signed and value > 0)}{short_number(value)}"
        return lines if np.isnan(value) else [*lines, change]

    return describe


class _Ranked:
    """The top tokens of a cell as `·Paris 97.1%`, escaped; texts are made once per token id."""

    def __init__(self, panel: GridPanel) -> None:
        self.ids = panel.top_ids
        self.probabilities = np.exp(panel.top_logprobs)
        used = np.unique(self.ids).tolist()
        self.texts = {i: escape(panel.token_name(i, _fitted)) + _THIN for i in used}

    def __call__(self, row: int, column: int, k: int) -> list[str]:
        ids, probabilities = self.ids[row, column, :k].tolist(), self.probabilities[row, column, :k].tolist()
        return [self.texts[i] + percent(p) for i, p in zip(ids, probabilities, strict=True)]


def _column_widths(panels: Iterable[GridPanel]) -> list[int]:
    """Columns of text that each token's cells need, over all the panels, within bounds."""
    widths: list[int] = []
    for panel in panels:
        widths += [_NARROWEST] * (panel.n_tokens - len(widths))
        follows = np.where(panel.next_ids < 0, panel.token_ids, panel.next_ids)
        ids = np.concatenate([panel.top_ids[..., 0], [panel.token_ids, follows]])
        wide = {i: display_width(visible(panel.token_text(i))) for i in np.unique(ids).tolist()}
        for column in range(panel.n_tokens):
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


def _token_row(label: str, tokens: list[tuple[str, int, str]], columns: range, split: int) -> str:
    cells = []
    for column in columns:
        text, token_id, character = tokens[column]
        part = f" of {_tooltip_text(character)}" if character else ""
        kind = ' class="g"' if column == split else ""
        title = f' title="{_tooltip_text(text)}{part} (id {token_id}), token {column}"' if token_id >= 0 else ""
        cells.append(f"<th{kind}{title}>{_cell_text(text) if token_id >= 0 else ''}")
    return f"<tr><th>{label}{''.join(cells)}\n"


def _position_row(columns: range, split: int) -> str:
    cells = (f"<th{' class=g' if c == split else ''}>{c if c % 5 == 0 else ''}" for c in columns)
    return f'<tr class="pos"><th>{"".join(cells)}\n'


def _cell_text(token: str) -> str:
    return escape(fit(visible(token), _WIDEST))


def _tooltip_text(token: str) -> str:
    return escape(_fitted(token))


def _fitted(token: str) -> str:
    return fit(visible(token), _TOOLTIP_COLUMNS)


def _texts(sides: Sequence[GridPanel]) -> str:
    """What the two sides of a comparison wrote, beside each other; words that only one of them has are marked."""
    titles = [escape(side.title) for side in sides]
    one, other = (plain(side.text) for side in sides)
    texts = map(_marked, changed_words(one, other))
    boxes = (f"<div><b>{title}</b><p>{text}</p></div>" for title, text in zip(titles, texts, strict=True))
    return f'<div class="texts">{"".join(boxes)}</div>\n'


def _marked(parts: list[tuple[str, bool]]) -> str:
    return "".join(f"<mark>{escape(text)}</mark>" if changed else escape(text) for text, changed in parts)
