"""`SteeringPanel`: sliders for the vectors of a session, and text without and with them as it is written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import anywidget
import traitlets
from IPython import get_ipython

from nblens.errors import NblensError, UserError
from nblens.jupyter.assets import script, style
from nblens.jupyter.panel.live_text import FINAL, LiveRequest, LiveRunner, LiveText
from nblens.jupyter.panel.panel_state import PanelState, VectorRow, as_code
from nblens.jupyter.panel.panel_view import row_values, state_values, strength_curves, text_values
from nblens.jupyter.stand_in import WithStandIn
from nblens.layers import format_layers, parse_layers
from nblens.steering.steer import Steer
from nblens.text import plain, short_number

if TYPE_CHECKING:
    from nblens.results import Sweep
    from nblens.session import Session
    from nblens.steering.report import SteerabilityReport

__all__ = ["SteeringPanel"]

_SCRIPTS = (
    "elements",
    "numbers",
    "panel/steering_panel_texts",
    "panel/steering_panel_controls",
    "panel/steering_panel",
)


class SteeringPanel(WithStandIn, anywidget.AnyWidget):
    """Sliders for the steering vectors of a session, with text that follows them.

    >>> panel = nblens.SteeringPanel(prompt="The summer was", max_new_tokens=2)
    >>> panel.value = {"cheerful": -1.5}
    >>> panel.generate().wait()
    True
    >>> panel.texts
    (' quite great', ' dreary.')
    >>> panel.close()

    What is set here becomes the session's live setting when a slider is let go. Vectors that the session gets later
    appear by themselves after the cell that made them.

    Parameters
    ----------
    session : Session, optional
        None: the session-wide one.
    value : mapping, optional
        Name → coefficient; None: the live setting.
    measured : SteerabilityReport or Sweep, or several of them
        Whose strength curves the panel draws beside the vectors' sliders, instead of those of the session's own
        reports; of a sweep, one with `answers`.
    once : bool
        Generate while the page waits instead of in the background: for front ends that drop what a thread sends.
    **options
        `prompt`, `write`, `max_new_tokens`, `temperature`, `seed` and `mode` ("restart": a slider lets the text begin
        again; "continue": it goes on with the new strength), as on the panel.

    Raises
    ------
    NoModelError
        None is loaded.
    UserError
        An unknown vector, or an option that is unknown or out of range.
    """

    _esm = script(*_SCRIPTS)
    _css = style("panel/steering_panel")

    # Only this side writes traits; what a page asks for comes as a message and is checked.
    state = traitlets.Dict().tag(sync=True)
    outcome = traitlets.Dict().tag(sync=True)

    def __init__(
        self,
        session: Session | None = None,
        *,
        value: Mapping[str, float] | None = None,
        measured: SteerabilityReport | Sweep | Sequence[SteerabilityReport | Sweep] = (),
        once: bool = False,
        **options: Any,
    ) -> None:
        if session is None:
            from nblens.loading import current

            session = current()
        self._session, self._once = session, once
        self._curves = strength_curves(measured)
        self._lock = threading.RLock()
        self._state = PanelState()
        self._live: dict[str, Any] = {}
        for name, option in options.items():
            self._state = self._state.with_option(name, option)
        self._runner = LiveRunner(session, self._report, threaded=not once)
        self._last: LiveText | None = None
        self._asked: LiveRequest | None = None
        self._shell: Any = None
        self._owns_layout = True
        super().__init__()
        self.refresh()
        if value is not None:
            self.value = value
        self.on_msg(self._receive)
        if shell := get_ipython():
            shell.events.register("post_run_cell", self._after_cell)
            self._shell = shell

    @property
    def value(self) -> dict[str, float]:
        """Name → coefficient of the vectors that are on; setting it turns all others off."""
        return self._state.value

    @value.setter
    def value(self, value: Mapping[str, float]) -> None:
        with self._lock:
            self.refresh()
            self._commit(self._state.with_value(value))
            self._follow()

    @property
    def prompt(self) -> str:
        """The text that is continued."""
        return self._state.prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        with self._lock:
            self._commit(self._state.with_option("prompt", prompt))

    @property
    def texts(self) -> tuple[str, str]:
        """The last texts, without and with steering, as far as they have come."""
        return (self._last.base, self._last.steered) if self._last else ("", "")

    @property
    def code(self) -> str:
        """A cell that generates the same."""
        return as_code(self._state, self._session)

    def generate(self) -> SteeringPanel:
        """Begin a text; give the panel back, so that `panel.generate().wait()` waits for it."""
        with self._lock:
            self.refresh()
            self._submit(patient=False)
        return self

    def stop(self) -> None:
        """End the text in the making, within a token."""
        self._asked = None
        self._runner.stop()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the text is complete; False when it took longer than `timeout` seconds."""
        return self._runner.wait(timeout)

    def refresh(self) -> None:
        """Show the vectors that the session has, and its live setting where that was changed elsewhere."""
        with self._lock:
            vectors = self._session.vectors.snapshot()
            setting = {name: steer for name, steer in self._session.steer.setting.items() if name in vectors}
            old = {row.name: row for row in self._state.rows}
            rows = [old.get(n) or VectorRow(n, op=v.op) for n, v in vectors.items()]
            state = replace(self._state, rows=tuple(rows))
            if setting != self._live:
                state = _with_setting(state, setting, self._session)
                self._live = setting
            self._state = state
            self._show()

    def close(self) -> None:
        """Stop, and leave nothing behind."""
        if runner := getattr(self, "_runner", None):
            runner.close()
            self._leave_shell()
        super().close()

    def set_state(self, sync_data: Any) -> None:
        """Take no trait from a page."""

    def __repr__(self) -> str:
        setting = ", ".join(f"{name}={short_number(c)}" for name, c in self.value.items()) or "off"
        return f"SteeringPanel({setting})"

    def _repr_mimebundle_(self, **options: Any) -> Any:
        bundle = super()._repr_mimebundle_(**options)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**(data or {}), "text/plain": self._as_text(), "text/html": self._as_html()}, metadata

    def _receive(self, _: Any, content: Any, buffers: Any) -> None:
        """A page's message: any script on it may have sent this, so nothing is taken on trust."""
        try:
            with self._lock:
                if not isinstance(content, dict):
                    raise UserError("the panel takes messages that are objects")
                action = _ACTIONS.get(str(content.get("type")))
                if action is None:
                    raise UserError(f"the panel has no action {str(content.get('type'))[:60]!r}")
                action(self, content)
        except NblensError as error:
            self.send({"type": "error", "error": str(error).replace("\n", " ")})
            self._show(again=True)

    def _on_vector(self, content: dict[str, Any]) -> None:
        final = content.get("final") is not False
        field = content.get("field")
        state = self._state.with_vector(
            content.get("name"), field, content.get("value"), self._session.architecture.n_blocks
        )
        if final or field != "coefficient":
            self._commit(state)
        else:
            self._state = state
        if final or not self._once:
            self._follow()

    def _on_option(self, content: dict[str, Any]) -> None:
        self._commit(self._state.with_option(content.get("field"), content.get("value")))
        if content.get("field") == "write":
            self._follow()

    def _on_off(self, content: dict[str, Any]) -> None:
        self._commit(self._state.with_value({}))
        self._follow()

    def _on_generate(self, content: dict[str, Any]) -> None:
        self.generate()

    def _on_stop(self, content: dict[str, Any]) -> None:
        self.stop()

    def _on_code(self, content: dict[str, Any]) -> None:
        self.send({"type": "code", "code": self.code})

    def _on_hello(self, content: dict[str, Any]) -> None:
        self.refresh()
        if self._last is not None and self._last.state not in FINAL:
            self.send({"type": "text", **text_values(self._last)})

    def _commit(self, state: PanelState) -> None:
        """Take over a state that can be written, and let it steer wherever the live setting does."""
        steers = state.steers(self._session)
        for steer in steers:
            self._session.vectors.write(steer, (None,))
        self._session.steer.only([steer for steer in steers if steer.name in state.value])
        self._state, self._live = state, self._session.steer.setting
        self._show()

    def _follow(self) -> None:
        """Let the text follow a change of what steers."""
        if not self._state.prompt:
            return
        request = self._state.request(self._session)
        if self._state.mode == "continue":
            if not self._runner.busy:
                return
            if self._runner.adjust(request):
                self._asked = request
                return
        # letting go of a slider says again what its last move said
        if request != self._asked:
            self._submit(patient=True)

    def _submit(self, *, patient: bool) -> None:
        self._asked = self._state.request(self._session)
        self._runner.submit(self._asked, patient=patient)

    def _report(self, text: LiveText) -> None:
        """On the runner's thread: send it on, and keep the last one for pages that open later."""
        self._last = text
        values = text_values(text)
        self.send({"type": "text", **values})
        if text.state in FINAL:
            self.outcome = values
            self.update_stand_in()
            if text.state != "done":
                self._asked = None

    def _show(self, *, again: bool = False) -> None:
        curves = {**strength_curves([*self._session.reports.values()]), **self._curves}
        rows = [row_values(row, self._state.write, self._session, curves) for row in self._state.rows]
        values = {"rows": rows, **state_values(self._state, self._once)}
        if again:  # a page that showed something refused takes back what holds
            self.send({"type": "state", "state": values})
        self.state = values

    def _after_cell(self, *_: Any) -> None:
        if self._session.backend is not None:
            self.refresh()
            return
        self._runner.close()
        self._leave_shell()
        last = self._last or LiveText(0, 0, "")
        error = "the model was unloaded; open a new panel"
        self.outcome = text_values(replace(last, seq=last.seq + 1, state="error", error=error))

    def _leave_shell(self) -> None:
        shell, self._shell = self._shell, None
        if shell:
            shell.events.unregister("post_run_cell", self._after_cell)

    def _as_text(self) -> str:
        base, steered = self.texts
        if not (base or steered):
            return repr(self)
        return f"{self!r}\nbase    │{plain(base)}\nsteered │{plain(steered)}"

    def _as_html(self) -> str:
        cells = "".join(
            f"<tr><th style='text-align:left'>{title}</th>"
            f"<td style='text-align:left;white-space:pre-wrap'>{escape(plain(text))}</td></tr>"
            for title, text in (("prompt", self.prompt), *zip(("base", "steered"), self.texts, strict=True))
            if text
        )
        return f"<div>{escape(repr(self))}</div><table>{cells}</table>"


_ACTIONS: dict[str, Callable[[SteeringPanel, dict[str, Any]], None]] = {
    "vector": SteeringPanel._on_vector,
    "option": SteeringPanel._on_option,
    "off": SteeringPanel._on_off,
    "generate": SteeringPanel._on_generate,
    "stop": SteeringPanel._on_stop,
    "code": SteeringPanel._on_code,
    "hello": SteeringPanel._on_hello,
}


def _with_setting(state: PanelState, setting: Mapping[str, Steer], session: Session) -> PanelState:
    """The panel as the live setting has it; a write position only where all share one."""
    n_blocks = session.architecture.n_blocks
    state = state.with_value({name: steer.coefficient for name, steer in setting.items()})
    ways = {name: session.vectors.way(steer) for name, steer in setting.items()}
    for name, steer in setting.items():
        layers = "" if steer.layers is None else format_layers(parse_layers(steer.layers, n_blocks))
        state = state.with_row(replace(state.row(name), op=ways[name][1], layers=layers))
    writes = {write for write, _ in ways.values()}
    if len(writes) == 1 and any(session.vectors[name].write not in writes for name in setting):
        state = replace(state, write=writes.pop())
    return state
