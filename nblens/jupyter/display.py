"""How results look in a cell: what IPython's formatters are given, and short aligned tables.

A magic returns its result and the cell shows it once, as any value. A view that was asked for (`--metric`, `--plot`)
is remembered for that very object and used whenever it is displayed, so `_`, `Out` and `-o` hold the real thing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from nblens.appearance import plain, short_number
from nblens.layers import format_layers
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.difference import Comparison, TrajectoryDiff
from nblens.lens.html import render_fragment
from nblens.lens.trajectory import Trajectory

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell

    from nblens.results import Generation, Sweep
    from nblens.session import Session
    from nblens.steering.report import SteerabilityReport
    from nblens.steering.vectors import SteeringVector

__all__ = [
    "Table",
    "placement_table",
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

_views: dict[int, Mapping[str, Renderer]] = {}


@dataclass(frozen=True)
class Table:
    """A few rows under a heading, as aligned text or as simple HTML.

    The last column is never padded, so that a number that changes with the machine moves nothing else.
    """

    title: str
    columns: Sequence[str] = ()
    """a name that begins with > is set flush right"""
    rows: Sequence[Sequence[str]] = ()

    def __repr__(self) -> str:
        if not self.rows:
            return self.title
        cells = [[name.lstrip(">") for name in self.columns], *self.rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        right = [name.startswith(">") for name in self.columns]
        lines = [self.title] if self.title else []
        for row in cells:
            padded = [
                text.rjust(width) if flush else text.ljust(width)
                for text, width, flush in zip(row, widths, right, strict=True)
            ]
            lines.append("  ".join(padded).rstrip())
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
    title = (
        f"{plain(placement.model)}: {short_number(placement.n_parameters)} parameters, {placement.n_blocks} blocks, "
        f"{placement.dtype}, loaded in {placement.seconds:.1f} s"
    )
    rows = []
    for share in placement.devices:
        memory = f"{_size(share.weight_bytes)} of weights"
        if share.free_bytes is not None and share.total_bytes is not None:
            memory += f", {_size(share.free_bytes)} of {_size(share.total_bytes)} free"
        rows.append((share.device, share.parts, memory))
    return Table(title, ("device", "holds", "memory"), rows)


def vectors_table(vectors: Iterable[SteeringVector]) -> Table:
    """The steering vectors of a session."""
    rows = []
    for vector in vectors:
        norms = [vector.norms[block] for block in vector.layers]
        best = [vector.separation[block] for block in vector.layers if block in vector.separation]
        rows.append(
            (
                vector.name,
                vector.site,
                format_layers(vector.layers),
                short_number(max(norms)),
                f"{max(best):.1f}" if best else "",
                vector.write,
                f"{vector.method} of {vector.n_pairs} pairs, read {vector.read}" if vector.method else "",
            )
        )
    columns = ("vector", "site", ">blocks", ">norm", ">separation", "written at", "made by")
    return Table("" if rows else "no steering vectors; make one with %%steer NAME", columns, rows)


def vector_blocks_table(vector: SteeringVector) -> Table:
    """One steering vector, block by block."""
    rows = [
        (
            str(block),
            short_number(norm),
            f"{vector.separation[block]:.2f}" if block in vector.separation else "",
            "yes" if block in vector.layers else "",
        )
        for block, norm in vector.norms.items()
    ]
    return Table("", (">block", ">norm", ">separation", "written"), rows)


def setting_table(session: Session) -> Table:
    """What steers now."""
    rows = [
        (
            name,
            f"{'+' if steer.coefficient > 0 else ''}{short_number(steer.coefficient)}",
            _blocks_written(session, name, steer.layers),
            steer.write,
        )
        for name, steer in session.steer.setting.items()
    ]
    if rows:
        return Table("", ("steering", ">coefficient", ">blocks", "tokens"), rows)
    known = ", ".join(session.vectors) or "none yet; make one with %%steer NAME"
    return Table(f"steering is off (vectors: {known})")


def steerability_table(report: SteerabilityReport) -> Table:
    """What a steerability report says, measure by measure."""
    return Table("", ("measure", "value"), report.rows)


def _blocks_written(session: Session, name: str, layers: Any) -> str:
    return format_layers(session.vectors[name].layers) if layers is None else str(layers)


def _size(n_bytes: int) -> str:
    value = float(n_bytes)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f} {unit}"
        value /= 1024
    return f"{value:.1f} GiB"


def show_as(obj: Any, *, html: Renderer | None = None, png: Renderer | None = None) -> None:
    """Display this very object, and no other, as what `html` or `png` make of it, beside its usual text."""
    _views[id(obj)] = {HTML: html or _nothing, PNG: png or _nothing}
    weakref.finalize(obj, _views.pop, id(obj), None)


def _render(obj: Any, mime: str, default: Renderer) -> str | bytes | None:
    return _views.get(id(obj), {}).get(mime, default)(obj)


def _generation_text(generation: Generation) -> str:
    return f"{plain(generation.prompt)}│{plain(generation.text)}"


def _generation_html(generation: Generation) -> str:
    steer = ", ".join(f"{name}={short_number(c)}" for name, c in generation.steer.items() if c)
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
    rows = [[short_number(generation.coefficient), plain(generation.text)] for generation in sweep]
    if sweep.propensities is None:
        return Table("", (f">{sweep.name}", "text"), rows)
    positive, negative = (plain(answer).strip() for answer in sweep.answers)
    rows = [[c, f"{value:+.2f}", text] for (c, text), value in zip(rows, sweep.propensities, strict=True)]
    return Table("", (f">{sweep.name}", f">{positive} − {negative}", "text"), rows)


def _comparison_text(comparison: Comparison) -> str:
    if not (comparison.base_text or comparison.steered_text):
        return repr(comparison)
    return f"base    │{plain(comparison.base_text)}\nsteered │{plain(comparison.steered_text)}"


def _nothing(_: Any) -> None:
    return None


_TYPES: dict[Any, dict[str, Renderer]] = {
    Trajectory: {HTML: render_fragment, PNG: _nothing},
    TrajectoryDiff: {HTML: render_fragment, PNG: _nothing},
    Comparison: {HTML: render_fragment, PNG: _nothing, TEXT: _comparison_text},
    SiteTrajectories: {HTML: render_fragment, PNG: _nothing},
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
    "nblens.session.Session": {
        HTML: lambda session: placement_table(session)._repr_html_(),
        TEXT: lambda session: repr(placement_table(session)),
    },
}


def register(shell: InteractiveShell) -> None:
    """Teach the shell's formatters to show what nblens returns."""
    formatters = shell.display_formatter.formatters
    for cls, renderers in _TYPES.items():
        for mime, default in renderers.items():
            formatters[mime].for_type(cls, _printer(mime, default))


def unregister(shell: InteractiveShell) -> None:
    """Undo `register`."""
    formatters = shell.display_formatter.formatters
    for cls, renderers in _TYPES.items():
        for mime in renderers:
            formatters[mime].pop(cls, None)


def _printer(mime: str, default: Renderer) -> Callable[..., Any]:
    if mime == TEXT:  # the pretty printer's own way
        return lambda obj, printer, cycle: printer.text(_render(obj, mime, default))
    return lambda obj: _render(obj, mime, default)
