"""What a steering panel is set to: values that are checked, and turned into requests and into code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from nblens.errors import UserError
from nblens.jupyter.panel.live_text import LiveRequest
from nblens.layers import format_layers, parse_layers
from nblens.steering.steer import STEER_OPS, Steer, check_coefficient, check_write

if TYPE_CHECKING:
    from nblens.session import Session

__all__ = ["MODES", "OWN", "PanelState", "VectorRow", "as_code", "slider_range"]

MODES = ("restart", "continue")
"""What a slider does to a text in the making: it begins again, or goes on with the new strength."""

OWN = "own"
"""Write position: each vector's own."""

_MOST_TOKENS = 4096
_LONGEST_PROMPT = 100_000  # characters
_LONGEST_LAYERS = 200  # characters
_USUAL_LIMIT = 2.0


@dataclass(frozen=True)
class VectorRow:
    """One vector on the panel."""

    name: str
    coefficient: float = 0.0
    on: bool = False
    layers: str = ""
    """layer spec; empty: the vector's own blocks"""
    op: str = "add"


@dataclass(frozen=True)
class PanelState:
    """Everything that a user can set on the panel."""

    rows: tuple[VectorRow, ...] = ()
    prompt: str = ""
    write: str = OWN
    max_new_tokens: int = 40
    temperature: float = 0.0
    seed: int = 0
    mode: str = "restart"

    @property
    def value(self) -> dict[str, float]:
        """Name → coefficient of the vectors that are on."""
        return {row.name: row.coefficient for row in self.rows if row.on}

    def row(self, name: Any) -> VectorRow:
        """The row of a vector."""
        for row in self.rows:
            if row.name == name:
                return row
        raise UserError(f"the panel has no vector {str(name)[:60]!r}")

    def with_row(self, row: VectorRow) -> PanelState:
        """The same with one row replaced."""
        return replace(self, rows=tuple(row if row.name == old.name else old for old in self.rows))

    def with_value(self, value: Mapping[str, float]) -> PanelState:
        """The same with these vectors on, and no other."""
        for name in value:
            self.row(name)
        rows = (
            replace(row, on=True, coefficient=check_coefficient(row.name, value[row.name]))
            if row.name in value
            else replace(row, on=False)
            for row in self.rows
        )
        return replace(self, rows=tuple(rows))

    def with_vector(self, name: Any, field: Any, value: Any, n_blocks: int) -> PanelState:
        """The same with one thing about a vector changed, as a page asked for it; moving a slider turns it on."""
        row = self.row(name)
        if field == "coefficient":
            row = replace(row, coefficient=check_coefficient(row.name, _number("coefficient", value)), on=True)
        elif field == "on":
            row = replace(row, on=_choice("on", value, (True, False)))
        elif field == "layers":
            row = replace(row, layers=_layers(value, n_blocks))
        elif field == "op":
            row = replace(row, op=_choice("op", value, tuple(STEER_OPS)))
        else:
            raise UserError(f"the panel has no field {str(field)[:60]!r}")
        return self.with_row(row)

    def with_option(self, field: Any, value: Any) -> PanelState:
        """The same with an option changed."""
        if not isinstance(field, str) or field not in _OPTIONS:
            raise UserError(f"the panel has no option {str(field)[:60]!r}")
        return replace(self, **{field: _OPTIONS[field](value)})

    def steers(self, session: Session) -> tuple[Steer, ...]:
        """Return how each vector is written, in the panel's order, those that are off included."""
        return tuple(self._steer(session, row) for row in self.rows)

    def request(self, session: Session) -> LiveRequest:
        """Return what to generate."""
        off = frozenset(row.name for row in self.rows if not row.on)
        return LiveRequest(self.prompt, self.steers(session), off, self.max_new_tokens, self.temperature, self.seed)

    def _steer(self, session: Session, row: VectorRow) -> Steer:
        vector = session.vectors[row.name]
        write = None if self.write in (OWN, vector.write) else self.write
        # the token from which an answer's label is predicted is the prompt's last where no answers are scored
        write = "last" if (write or vector.write) == "label" else write
        op = None if row.op == vector.op else row.op
        return Steer(row.name, row.coefficient, layers=row.layers or None, write=write, op=op)


def slider_range(kl_range: tuple[float, float] | None, coefficient: float) -> tuple[float, float]:
    """Ends of a slider: ±2, or further where the KL budget or the present coefficient asks for it."""
    reach = max(map(abs, kl_range)) * 1.25 if kl_range else 0.0
    limit = max(_USUAL_LIMIT, reach, abs(coefficient))
    step = 10.0 ** (math.floor(math.log10(limit)) - 1) * 5
    limit = math.ceil(limit / step - 1e-9) * step
    return -limit, limit


def as_code(state: PanelState, session: Session) -> str:
    """The cell that generates the panel's steered text again: a magic where it can say so, else Python."""
    steers = [steer for steer in state.steers(session) if steer.name in state.value]
    usual = all(steer == Steer(steer.name, steer.coefficient) for steer in steers)
    bare = state.prompt.strip() and not state.prompt.endswith("\n") and state.prompt.replace("\n", " ").isprintable()
    # without --steer the magic would follow the live setting
    return _magic(state, steers) if usual and bare and steers else _python(state, steers)


def _magic(state: PanelState, steers: Iterable[Steer]) -> str:
    line = [f"%%generate --compare --max-new-tokens {state.max_new_tokens}"]
    line += [f"--steer {s.name}={_shortest(s.coefficient)}" for s in steers]
    if state.temperature:
        line.append(f"--temperature {_shortest(state.temperature)} --seed {state.seed}")
    return " ".join(line) + "\n" + state.prompt


def _python(state: PanelState, steers: Iterable[Steer]) -> str:
    lines = ["import nblens", "", "out = nblens.current().generate(", f"    {state.prompt!r},"]
    lines.append(f"    {state.max_new_tokens},")
    written = [f"nblens.Steer({s.name!r}, {s.coefficient!r}{_beyond_defaults(s)})" for s in steers]
    lines.append(f"    steer=[{', '.join(written)}],")
    if state.temperature:
        lines.append(f"    temperature={state.temperature!r},\n    seed={state.seed},")
    return "\n".join([*lines, ")", "print(out.text)"])


def _shortest(number: float) -> str:
    """The number as one would type it, read back as the same."""
    return repr(number).removesuffix(".0")


def _beyond_defaults(steer: Steer) -> str:
    plain = Steer(steer.name, steer.coefficient)
    fields = ("layers", "write", "op")
    return "".join(f", {f}={getattr(steer, f)!r}" for f in fields if getattr(steer, f) != getattr(plain, f))


def _number(what: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(f"{what} must be a number, got {str(value)[:60]!r}")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{what} is too large a number") from None


def _choice(what: str, value: Any, choices: tuple[Any, ...]) -> Any:
    if any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        return value
    raise UserError(f"{what} must be one of {', '.join(map(str, choices))}, got {str(value)[:60]!r}")


def _text(what: str, value: Any, longest: int) -> str:
    if not isinstance(value, str):
        raise UserError(f"{what} must be text, got {type(value).__name__}")
    if len(value) > longest:
        raise UserError(f"{what} has {len(value)} characters; at most {longest}")
    return value


def _layers(value: Any, n_blocks: int) -> str:
    spec = _text("blocks", value, _LONGEST_LAYERS).strip()
    return format_layers(parse_layers(spec, n_blocks)) if spec else ""


def _within(what: str, low: float, high: float, kind: type) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        number = _number(what, value)
        if not low <= number <= high or (kind is int and number != int(number)):
            whole = "a whole number" if kind is int else "a number"
            raise UserError(f"{what} must be {whole} from {low:g} to {high:g}, got {value:g}")
        return kind(number)

    return check


def _write(value: Any) -> str:
    text = _text("write position", value, 40)
    if text == "label":
        raise UserError("write position 'label' needs scored answers; the panel has none: use last")
    return text if text == OWN else check_write(text)


_OPTIONS: dict[str, Callable[[Any], Any]] = {
    "prompt": lambda value: _text("the prompt", value, _LONGEST_PROMPT),
    "write": _write,
    "max_new_tokens": _within("max new tokens", 1, _MOST_TOKENS, int),
    "temperature": _within("temperature", 0, 100, float),
    "seed": _within("seed", 0, 2**32 - 1, int),
    "mode": lambda value: _choice("mode", value, MODES),
}
