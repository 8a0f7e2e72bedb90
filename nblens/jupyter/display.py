"""How results look in a cell: what IPython's formatters are given, and short aligned tables.

A magic returns its result and the cell shows it once, as any value: what has layers and tokens as a live grid, with a
table behind it for where there is no kernel. A view that was asked for (`--metric`, `--plot`, `--static`) is remembered
for that very object and used whenever it is displayed, so `_`, `Out` and `-o` hold the real thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nblens.errors import escaped
from nblens.jupyter.cell_widgets import belongs_to_cell
from nblens.jupyter.stand_in import behind_pages
from nblens.layers import format_layers
from nblens.lens.comparison import Comparison
from nblens.lens.shown import Shown
from nblens.text import aligned, byte_size, plain, short_number, visible
from nblens.views.html import render_fragment

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid
    from nblens.planning.plan import Plan
    from nblens.results import Generation, Sweep
    from nblens.session import Session
    from nblens.steering.report import SteerabilityReport
    from nblens.steering.vectors import SteeringVector

__all__ = [
    "Table",
    "placement_table",
    "plan_table",
    "register",
    "setting_table",
    "show_as",
    "steerability_table",
    "sweep_table",
    "unregister",
    "vector_blocks_table",
    "vectors_table",
]

HTML, PNG, TEXT = "text/html", "image/png", "text/plain"
Renderer = Callable[[Any], str | bytes | None]


@dataclass
class _View:
    """How one object is displayed, where that is not the usual way."""

    html: Renderer | None = None
    png: Renderer | None = None
    metric: str | None = None
    static: bool = False
    grid: TrajectoryGrid | None = None
    """on the page already; it waits for the output that stands in for it"""


_views: dict[int, _View] = {}


@dataclass(frozen=True)
class Table:
    """A few rows under a heading, as aligned text or as simple HTML.

    The last column is never padded, so that a number that changes with the machine moves nothing else. Texts are
    plain ones: what files and models bring can neither hide nor reorder anything, nor act on a terminal.
    """

    title: str
    columns: Sequence[str] = ()
    """a name that begins with > is set flush right"""
    rows: Sequence[Sequence[str]] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", plain(self.title))
        object.__setattr__(self, "columns", [plain(name) for name in self.columns])
        object.__setattr__(self, "rows", [[plain(text) for text in row] for row in self.rows])

    def __repr__(self) -> str:
        if not self.rows:
            return self.title
        lines = [self.title] if self.title else []
        lines += aligned(self.columns, self.rows)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        title = f"<div>{escape(self.title)}</div>" if self.title else ""
        if not self.rows:
            return title
        aligns = ["right" if name.startswith(">") else "left" for name in self.columns]
        head = "".join(
            f'<th style="text-align:{align}">{escape(name.lstrip(">"))}</th>'
            for name, align in zip(self.columns, aligns, strict=True)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f'<td style="text-align:{align}">{escape(text)}</td>' for text, align in zip(row, aligns, strict=True)
            )
            + "</tr>"
            for row in self.rows
        )
        return f'{title}<table style="margin:0"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def placement_table(session: Session) -> Table:
    """What sits where, and how much memory is left."""
    if session.backend is None:
        return Table(f"{session.placement.model} was unloaded")
    placement = session.placement
    name = plain(placement.model) + (f" at {placement.revision[:7]}" if placement.revision else "")
    title = (
        f"{name}: {short_number(placement.n_parameters)} parameters, {placement.n_blocks} blocks, "
        f"{placement.dtype}, loaded in {placement.seconds:.1f} s"
    )
    rows = []
    for share in placement.devices:
        memory = f"{byte_size(share.weight_bytes)} of weights"
        if share.free_bytes is not None and share.total_bytes is not None:
            memory += f", {byte_size(share.free_bytes)} of {byte_size(share.total_bytes)} free"
        rows.append((share.device, share.parts, memory))
    return Table(title, ("device", "holds", "memory"), rows)


def plan_table(plan: Plan) -> Table:
    """What each device would hold, and whether it fits."""
    return Table(f"{plan.title}; {plan.verdict}", plan.columns, plan.rows)


def vectors_table(session: Session) -> Table:
    """The steering vectors of a session, and how strongly each steers now."""
    rows, setting = [], session.steer.setting
    for vector in session.vectors.values():
        norms = [vector.norms[block] for block in vector.layers]
        judged = [(vector.separation[block], block) for block in vector.layers if block in vector.separation]
        rows.append(
            (
                vector.name,
                vector.site,
                format_layers(vector.layers),
                short_number(max(norms)),
                vector.separation_words(max(judged)[1]) if judged else "",
                vector.write,
                _signed(setting[vector.name].coefficient) if vector.name in setting else "off",
                escaped(
                    f"{vector.method} of {vector.n_pairs} {'pair' if vector.n_pairs == 1 else 'pairs'}, "
                    f"read {vector.read}"
                )
                if vector.method
                else "",
            )
        )
    columns = ("vector", "site", ">blocks", ">norm", ">separation", "written at", ">now", "made by")
    return Table("" if rows else "no steering vectors; make one with %%steer NAME", columns, rows)


def vector_blocks_table(vector: SteeringVector) -> Table:
    """One steering vector, block by block."""
    rows = [
        (
            str(block),
            short_number(norm),
            vector.separation_words(block),
            "yes" if block in vector.layers else "",
        )
        for block, norm in vector.norms.items()
    ]
    return Table("", (">block", ">norm", ">separation", "written"), rows)


def setting_table(session: Session) -> Table:
    """What steers now."""
    setting, vectors = session.steer.setting, session.vectors.snapshot()
    rows = [
        (name, _signed(steer.coefficient), _blocks_written(vectors[name], steer.layers), vectors.way(steer)[0])
        for name, steer in setting.items()
        if name in vectors
    ]
    if rows:
        return Table("", ("steering", ">coefficient", ">blocks", "tokens"), rows)
    known = ", ".join(vectors) or "none yet; make one with %%steer NAME"
    return Table(f"steering is off (vectors: {known})")


def steerability_table(report: SteerabilityReport) -> Table:
    """What a steerability report says, measure by measure."""
    return Table("", ("measure", "value"), report.rows)


def _blocks_written(vector: SteeringVector, layers: Any) -> str:
    return format_layers(vector.layers) if layers is None else str(layers)


def _signed(coefficient: float) -> str:
    return f"{'+' if coefficient > 0 else ''}{short_number(coefficient)}"


def show_as(obj: Any, **view: Any) -> None:
    """Display this very object, and no other, in a view of its own.

    Parameters
    ----------
    html, png : callable, optional
        Makes the output of the object; its usual text stands beside it.
    metric : str, optional
        What colours a grid's cells; None: the first metric that there is.
    static : bool
        A table instead of a live grid.
    grid : TrajectoryGrid
        The one that shows it already.
    """
    _views[id(obj)] = _View(**view)
    weakref.finalize(obj, _views.pop, id(obj), None)


def _as_grid(obj: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A live grid and what stands in for it; where no page can show one, the same as a table."""
    view = _views.get(id(obj)) or _View()
    if view.html:
        return {HTML: view.html(obj)}, {}
    if view.png:
        picture = view.png(obj)
        data, size = picture if isinstance(picture, tuple) else (picture, dict[str, Any]())
        return {PNG: data}, {PNG: size}
    if view.static or not behind_pages():
        return {HTML: render_fragment(obj, metric=view.metric)}, {}
    grid, view.grid = view.grid, None
    if grid is None:
        from nblens.jupyter.grid.trajectory_grid import TrajectoryGrid

        grid = TrajectoryGrid(obj, metric=view.metric)
        belongs_to_cell(grid)
        grid.show_widget()
    return {HTML: grid.stand_in()[HTML]}, {}


def _generation_text(generation: Generation) -> str:
    return f"{plain(generation.prompt)}│{plain(generation.text)}"


def _generation_html(generation: Generation) -> str:
    acting = [s for s in generation.steers if s.coefficient or s.op == "ablate_add"]
    steer = ", ".join(f"{s.name}={short_number(s.coefficient)}" for s in acting)
    notes = [f"steered by {steer}"] if steer else []
    notes += ["stopped"] if generation.interrupted else []
    soft = "color:var(--jp-content-font-color2,color-mix(in srgb,CanvasText 65%,Canvas))"
    note = f'<div style="{soft};font-size:11px">{escape("; ".join(notes))}</div>' if notes else ""
    return (
        '<div style="max-width:75ch;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.5">'
        f'<span style="{soft}">{escape(plain(generation.prompt))}</span>{escape(plain(generation.text))}</div>{note}'
    )


def sweep_table(sweep: Sweep) -> Table:
    """A sweep's texts under their coefficients, with propensities where there are some."""
    texts = [plain(generation.text) for generation in sweep]
    rows = [[short_number(c), text] for c, text in zip(sweep.coefficients, texts, strict=True)]
    if sweep.propensities is None or sweep.answers is None:
        return Table("", (f">{sweep.name}", "text"), rows)
    positive, negative = map(visible, sweep.answers)
    rows = [[c, f"{value:+.2f}", text] for (c, text), value in zip(rows, sweep.propensities, strict=True)]
    return Table("", (f">{sweep.name}", f">{positive} − {negative}", "text"), rows)


def _comparison_text(comparison: Comparison) -> str:
    if not (comparison.base_text or comparison.steered_text):
        return repr(comparison)
    return f"base    │{plain(comparison.base_text)}\nsteered │{plain(comparison.steered_text)}"


def _nothing(_: Any) -> None:
    return None


_TYPES: dict[Any, dict[str, Renderer]] = {
    Comparison: {TEXT: _comparison_text},
    # named, not imported: torch is loaded with the first model, not with the extension
    "nblens.results.Generation": {HTML: _generation_html, TEXT: _generation_text},
    "nblens.results.Sweep": {
        HTML: lambda sweep: sweep_table(sweep)._repr_html_(),
        TEXT: lambda sweep: repr(sweep_table(sweep)),
    },
    "nblens.steering.report.SteerabilityReport": {
        HTML: lambda report: steerability_table(report)._repr_html_(),
        PNG: _nothing,
    },
    "nblens.planning.plan.Plan": {
        HTML: lambda plan: plan_table(plan)._repr_html_(),
        TEXT: repr,
    },
    "nblens.session.Session": {
        HTML: lambda session: placement_table(session)._repr_html_(),
        TEXT: lambda session: repr(placement_table(session)),
    },
}


def register(shell: InteractiveShell) -> None:
    """Teach the shell's formatters to show what nblens returns."""
    for formatter, cls, render in _registered(shell):
        formatter.for_type(cls, render)


def unregister(shell: InteractiveShell) -> None:
    """Undo `register`."""
    for formatter, cls, _ in _registered(shell):
        formatter.pop(cls, None)


def _registered(shell: InteractiveShell) -> Iterator[tuple[Any, Any, Callable[..., Any]]]:
    """Every formatter, type and renderer that belong together."""
    display: Any = shell.display_formatter
    for cls, renderers in _TYPES.items():
        for mime, render in renderers.items():
            yield display.formatters[mime], cls, _printer(mime, render)
    yield display.mimebundle_formatter, Shown, _as_grid
    for mime in (HTML, PNG):  # what the classes would make themselves
        yield display.formatters[mime], Shown, _nothing


def _printer(mime: str, render: Renderer) -> Callable[..., Any]:
    if mime == TEXT:  # the pretty printer's own way
        return lambda obj, printer, cycle: printer.text(render(obj))
    return render
