"""`TrajectoryGrid`: layers × tokens as a live widget, which grows while a model generates."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Iterable, Mapping
from html import escape
from threading import RLock
from typing import Any, TypeGuard

import anywidget
import numpy as np
import traitlets

from nblens.colors import Scale
from nblens.errors import UserError, escaped, first_line
from nblens.jupyter.assets import script, style
from nblens.jupyter.grid.exports import EXPORTS, export
from nblens.jupyter.grid.payload import Vocabulary, encode_columns
from nblens.jupyter.grid.sheets import Site, drawn_panels, read_sites
from nblens.jupyter.stand_in import WithStandIn
from nblens.views.html import render_fragment
from nblens.views.panels import GridPanel

__all__ = ["TrajectoryGrid"]

_SCRIPTS = (
    "elements",
    "numbers",
    "grid/grid_text",
    "grid/grid_colors",
    "grid/grid_data",
    "grid/grid_layout",
    "grid/grid_elements",
    "grid/grid_theme",
    "grid/grid_draw",
    "grid/grid_card",
    "grid/grid_curves",
    "grid/grid_strip",
    "grid/grid_detail",
    "grid/grid_header",
    "grid/grid_input",
    "grid/grid_store",
    "grid/grid",
)
_FROM_PAGE = frozenset({"metric", "view", "site", "selection", "_pinned_ids", "_view_count"})
_MOST_PINNED = 64
_MOST_STATIC_CELLS = 6_000  # larger ones are a picture alone where there is no kernel: a table would be megabytes
_DPI = 110
_FROM_THE_FIRST: Mapping[tuple[str, str], int] = {}  # no panel starts later


class _RefusedError(UserError, traitlets.TraitError):
    """A value that a trait does not take: of several that the page sets at once, none is then set."""


class TrajectoryGrid(WithStandIn, anywidget.AnyWidget):
    """A grid that one can zoom, search and question, in a notebook.

    >>> grid = nblens.TrajectoryGrid(session.lens("In Warsaw you pay with the"), metric="entropy")
    >>> grid.selection = (-1, -1)  # block and token position, as a click would
    >>> grid.selection
    (11, 6)
    >>> grid.pinned = [" zloty", " euro"]  # drawn as curves over depth

    Parameters
    ----------
    *objects : Trajectory, SiteTrajectories, Comparison, TrajectoryDiff, or dicts of these
        Several become sites among which one switches; all share one scale. A comparison can be looked at as
        base, as steered, or as their difference.
    metric : {"prob", "entropy", "kl", "rank", "kl_from_base"}, optional
        What colours the cells; None: the first that there is. The last is of comparisons alone.
    layers : layer spec, optional
        Show these blocks only, such as "0-11" or "::4".
    view : {"base", "steered", "difference"}, optional
        The difference where there is one, else base.
    site : str, optional
        Which of several is shown first.
    **options
        Of every widget, such as `layout`.

    Raises
    ------
    UserError
        There is nothing to show, or a metric, view or site that is not there.
    """

    metric = traitlets.Unicode("prob").tag(sync=True)
    """what colours the cells"""
    view = traitlets.Unicode("base").tag(sync=True)
    """base, steered or difference"""
    site = traitlets.Unicode("").tag(sync=True)
    """which of several grids"""
    selection = traitlets.Any(None, allow_none=True).tag(sync=True)
    """(block, token position), or None; a negative position counts from the last token that is there when it is set"""
    pinned: traitlets.List[Any] = traitlets.List()
    """tokens that are drawn as curves over depth: texts, and ids of those whose text is that of several; any may be
    given by its id"""
    _pinned_ids = traitlets.List(traitlets.Int()).tag(sync=True)
    _n_tokens = traitlets.Int(0).tag(sync=True)
    # Made when a page asks for it: until then nothing is encoded twice, and a page that is opened late gets all of it.
    _data = traitlets.Any(None, allow_none=True).tag(sync=True, to_json=lambda _, grid: grid._everything())

    def __init__(
        self,
        *objects: Any,
        metric: str | None = None,
        layers: Any = None,
        view: str | None = None,
        site: str | None = None,
        **options: Any,
    ) -> None:
        self._lock = RLock()
        self._layers = layers
        self._sites = read_sites(objects, layers)
        self._vocabulary = Vocabulary()
        for panel in self._sheets.values():
            for ids in (panel.top_ids, panel.next_ids, panel.target_ids):
                self._vocabulary.places(ids, panel)
        self._highs: dict[str, float] = {}
        self._rescale(_FROM_THE_FIRST)
        self._esm, self._css = script(*_SCRIPTS), style("grid/grid")
        self._owns_layout = "layout" not in options
        super().__init__(
            metric=metric or next(iter(self._scales)),
            view=view or self._views[-1],
            site=site or self._sites[0].name,
            _n_tokens=self.n_tokens,
            **options,
        )
        self.on_msg(self._answer)

    @property
    def n_tokens(self) -> int:
        """Tokens of the longest trajectory shown."""
        return max(site.n_tokens for site in self._sites)

    def append(self, *objects: Any) -> None:
        """Add the tokens that come next, in the same form as the grid was made from; only these travel to the page.

        May be called from any thread.

        Raises
        ------
        UserError
            The new tokens were read at other layers or sites.
        """
        with self._lock:
            matched = self._matched(objects)
            self._replace(tuple(Site.of(old.shown._followed_by(new.shown), old.name) for old, new in matched))

    def update(self, *objects: Any) -> None:
        """Show longer trajectories of the same run; only what is new in them travels to the page.

        May be called from any thread.

        Raises
        ------
        UserError
            The trajectories were read at other layers or sites.
        """
        with self._lock:
            matched = self._matched(objects)
            for old, new in matched:
                if old.panel.layers != new.panel.layers or old.panel.top_ids.shape[-1] != new.panel.top_ids.shape[-1]:
                    raise UserError(f"{new.shown!r} does not continue {old.shown!r}: other layers or top_k")
            self._replace(tuple(new for _, new in matched))

    def set_state(self, sync_data: Mapping[str, Any]) -> None:
        """Take what the page changed: only what a reader can change there, and nothing out of range."""
        wanted = {name: value for name, value in sync_data.items() if name in _FROM_PAGE}
        try:
            super().set_state(wanted)
        except traitlets.TraitError as error:
            self.send_state(list(wanted))
            self.send({"type": "error", "text": first_line(error)})

    def __repr__(self) -> str:
        panel = self._sites[0].panel
        size = f"{panel.n_layers} layers × {self.n_tokens} tokens"
        names = ", ".join(site.name for site in self._sites)
        return escaped(f"TrajectoryGrid({size} at {names}, {panel.model})")

    def _repr_mimebundle_(self, **options: Any) -> Any:
        """The live widget, and for what cannot show it a picture, a table and a line of text."""
        made = super()._repr_mimebundle_(**options)
        data, metadata = made if isinstance(made, tuple) else (made or {}, {})
        data = {**data, "text/plain": repr(self)}
        with self._lock:
            shown = drawn_panels(self._sites)
        if self.n_tokens:
            data["image/png"] = _picture(shown, self.metric)
            if self._n_cells <= _MOST_STATIC_CELLS:
                data["text/html"] = render_fragment(shown, metric=self.metric)
        return data, metadata

    def _as_html(self) -> str:
        """A table of the cells, or a picture where they are too many for one."""
        with self._lock:
            shown = drawn_panels(self._sites)
        if self._n_cells <= _MOST_STATIC_CELLS:
            return render_fragment(shown, metric=self.metric)
        return f'<img alt="{escape(repr(self))}" src="data:image/png;base64,{_picture(shown, self.metric)}">'

    @property
    def _n_cells(self) -> int:
        return sum(panel.n_tokens * panel.n_layers for panel in self._sheets.values())

    # What is shown, and how it travels

    @property
    def _views(self) -> tuple[str, ...]:
        return max((site.views for site in self._sites), key=len)

    @property
    def _sheets(self) -> dict[tuple[str, str], GridPanel]:
        """Every panel that travels, by site and view."""
        return {(site.name, view): panel for site in self._sites for view, panel in site.sheets.items()}

    def _matched(self, objects: tuple[Any, ...]) -> list[tuple[Site, Site]]:
        new = {site.name: site for site in read_sites(objects, self._layers)}
        if list(new) != [site.name for site in self._sites]:
            raise UserError(f"this grid shows {', '.join(s.name for s in self._sites)}, not {', '.join(new)}")
        pairs = [(site, new[site.name]) for site in self._sites]
        if any(type(old.shown) is not type(site.shown) for old, site in pairs):
            raise UserError("a comparison continues as a comparison, a trajectory as a trajectory")
        return pairs

    def _replace(self, sites: tuple[Site, ...]) -> None:
        before, self._sites = self._sheets, sites
        starts = {key: _first_new(before[key], panel) for key, panel in self._sheets.items()}
        known = len(self._vocabulary)
        self._rescale(starts)
        header, data = self._parts(starts, known)
        self._n_tokens = self.n_tokens
        self.send({"type": "grow", **header}, [data])

    def _everything(self) -> dict[str, Any]:
        with self._lock:
            header, data = self._parts(_FROM_THE_FIRST)
        return {"header": header, "bytes": memoryview(data)}

    def _parts(self, starts: Mapping[tuple[str, str], int], known: int = 0) -> tuple[dict[str, Any], bytes]:
        """The tokens from each panel's start on, with the texts from place `known` of the vocabulary on."""
        parts = ((*key, panel, starts.get(key, 0)) for key, panel in self._sheets.items())
        sheets, data = encode_columns(parts, self._vocabulary)
        header = {
            "sheets": sheets,
            "vocabulary": self._vocabulary.header(known),
            "sites": [_facts(site) for site in self._sites],
            "scales": {
                name: {"high": scale.high, "logarithmic": scale.logarithmic} for name, scale in self._scales.items()
            },
        }
        return header, data

    def _rescale(self, starts: Mapping[tuple[str, str], int]) -> None:
        """One scale for every site and view; it only ever grows, by the tokens that are new."""
        for key, panel in self._sheets.items():
            for metric in panel.metrics:
                new = metric.values[:, starts.get(key, 0) :]
                new = new[np.isfinite(new)]
                if new.size:
                    top = float(np.abs(new).max() if metric.scale.signed else new.max())
                    self._highs[metric.name] = max(top, self._highs.get(metric.name, top))

    @property
    def _scales(self) -> dict[str, Scale]:
        """By metric, as far as the numbers met so far reach."""
        scales = {metric.name: metric.scale for panel in self._sheets.values() for metric in panel.metrics}
        return {name: scale.covering(np.array(self._highs.get(name, np.nan))) for name, scale in scales.items()}

    # What comes from the page or from the user

    @traitlets.validate("metric")
    def _check_metric(self, proposal: Any) -> str:
        return _one_of("metric", proposal["value"], self._scales)

    @traitlets.validate("view")
    def _check_view(self, proposal: Any) -> str:
        return _one_of("view", proposal["value"], self._views)

    @traitlets.validate("site")
    def _check_site(self, proposal: Any) -> str:
        return _one_of("site", proposal["value"], [site.name for site in self._sites])

    @traitlets.validate("selection")
    def _check_selection(self, proposal: Any) -> tuple[int, int] | None:
        value = proposal["value"]
        if value is None:
            return None
        if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(_whole, value)):
            raise _RefusedError(f"selection {value!r:.80} is not (block, token position) or None")
        blocks = {layer for site in self._sites for layer in site.panel.layers}
        layer, token = int(value[0]), int(value[1])
        layer += max(site.panel.n_blocks for site in self._sites) if layer < 0 else 0
        token += self.n_tokens if token < 0 else 0
        if layer not in blocks or not 0 <= token < self.n_tokens:
            raise _RefusedError(f"selection {(int(value[0]), int(value[1]))} is outside this grid: {self!r}")
        return layer, token

    @traitlets.validate("pinned")
    def _check_pinned(self, proposal: Any) -> list[str | int]:
        return self._pins(self._ids_of(proposal["value"]))

    @traitlets.validate("_pinned_ids")
    def _check_pinned_ids(self, proposal: Any) -> list[int]:
        return self._ids_of(proposal["value"])

    def _ids_of(self, tokens: Iterable[Any]) -> list[int]:
        found = []
        for token in tokens:
            ids = self._vocabulary.named(token) if isinstance(token, str) else [token]
            if len(ids) > 1:
                several = ", ".join(map(str, sorted(ids)))
                raise _RefusedError(f"token {token!r:.80} is several in this grid, of ids {several}; pin an id")
            token_id = ids[0] if ids else None
            if not _whole(token_id) or int(token_id) not in self._vocabulary:
                raise _RefusedError(f"token {token!r:.80} occurs nowhere in this grid, so it cannot be pinned")
            found.append(int(token_id))
        if len(found) > _MOST_PINNED:
            raise _RefusedError(f"{len(found)} tokens cannot be told apart; pin {_MOST_PINNED} at most")
        return list(dict.fromkeys(found))

    @traitlets.observe("pinned")
    def _pin(self, change: Any) -> None:
        if change["new"] != self._pins(self._pinned_ids):
            self._pinned_ids = self._ids_of(change["new"])

    @traitlets.observe("_pinned_ids")
    def _name_pins(self, change: Any) -> None:
        self.pinned = self._pins(change["new"])

    def _pins(self, ids: Iterable[int]) -> list[str | int]:
        return [self._vocabulary.pin_of(token_id) for token_id in ids]

    def _answer(self, _: Any, message: Any, buffers: Any) -> None:
        """Any script on the page can send anything: what is not understood is answered with an error."""
        kind = message.get("type") if isinstance(message, dict) else None
        if kind == "refresh":
            with self._lock:
                header, data = self._parts(_FROM_THE_FIRST)
                self.send({"type": "grow", **header}, [data])
        elif kind == "export" and message.get("format") in EXPORTS and _whole(message.get("id")):
            with self._lock:
                sites = self._sites
            try:
                text = export(sites, message["format"], self.metric)
            except Exception as error:  # whatever it is, the reader has to see it: there is no cell to print it
                self.send({"type": "error", "text": first_line(error)})
            else:
                answer = {"type": "export", "format": message["format"], "id": int(message["id"])}
                self.send(answer, [text.encode("utf-8", "replace")])
        else:
            self.send({"type": "error", "text": "the grid was sent a message that it does not know"})


def _first_new(before: GridPanel, after: GridPanel) -> int:
    """The first token that the page does not hold as it is now; what follows the last one often became known."""
    length = min(before.n_tokens, after.n_tokens)
    if not np.array_equal(before.target_ids, after.target_ids):
        return 0
    same = (before.token_ids[:length] == after.token_ids[:length]) & (
        before.next_ids[:length] == after.next_ids[:length]
    )
    same &= (before.top_ids[:, :length] == after.top_ids[:, :length]).all((0, 2))
    for one, other in zip(before.metrics, after.metrics, strict=True):
        here, there = one.values[:, :length], other.values[:, :length]
        same &= ((here == there) | (np.isnan(here) & np.isnan(there))).all(0)
    return length if same.all() else int(np.argmin(same))


def _facts(site: Site) -> dict[str, Any]:
    panel = site.panel
    reading, *others = panel.caption
    return {
        "name": site.name,
        "views": list(site.views),
        "layers": list(panel.layers),
        "k": panel.top_ids.shape[-1],
        "n_shared": panel.n_tokens,
        "reading": reading,
        "model": " · ".join(others),
        "n_blocks": panel.n_blocks,
    }


def _picture(panels: tuple[GridPanel, ...], metric: str) -> str:
    from nblens import plots

    figure = plots.trajectory_grid(panels, metric=metric)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return b64encode(buffer.getvalue()).decode("ascii")


def _one_of(name: str, value: str, allowed: Iterable[str]) -> str:
    if value not in allowed:
        raise _RefusedError(f"{name} {value!r:.80} is unknown; one of {', '.join(allowed)}")
    return value


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and abs(int(value)) < 2**53
