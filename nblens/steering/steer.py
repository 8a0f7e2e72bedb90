"""`Steer`: one steering vector at work, and what its parts may be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from nblens.errors import UserError, escaped
from nblens.specs import Turn

__all__ = [
    "ROLES",
    "STEER_OPS",
    "WRITE_POSITIONS",
    "Steer",
    "check_coefficient",
    "check_write",
    "is_turn",
    "turns_written",
    "write_range",
]

WRITE_POSITIONS = ("all", "prompt", "generated", "label", "last")
"""Where a vector is written: every token, the prompt's, the generated ones, the one from which an answer's label is
predicted, or the prompt's last. Beside these names, a range of absolute positions such as "4-9", and in conversations
one of `ROLES` or a message's number such as "turn:-1"."""

ROLES = ("system", "user", "assistant", "tool", "developer")
"""Whose messages a vector is written or read at: their content, and for the assistant what is generated, too."""

STEER_OPS = {
    "add": "h + λv",
    "ablate": "takes λ times the component along v out of h; 1 removes it",
    "ablate_add": "sets the component along v to λ‖v‖",
    "clamp": "keeps the component along v at λ‖v‖ or above where λ > 0, at λ‖v‖ or below where λ < 0",
    "rotate": "h + λv at the length of h",
}
"""What is done with a vector v of coefficient λ to an activation h."""

_TURN = re.compile(r"turn:(-?\d+)")
_RANGE = re.compile(r"(\d+)(-(\d*))?")

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, repr=False)
class Steer:
    """One steering vector at work: which, how strongly, where.

    >>> nblens.Steer("cheerful", 1.5)
    Steer('cheerful', 1.5)
    >>> nblens.Steer("cheerful", -1, layers="5-6", write=(4, 10))
    Steer('cheerful', -1.0, layers='5-6', write='4-9')

    What is left out is the vector's own, as in `{"cheerful": 1.5}`.

    Parameters
    ----------
    name : str
        A name in `session.vectors`.
    coefficient : float
        The strength λ multiplied onto the vector; negative values push the other way.
    layers : int, slice, str or sequence of int, optional
        Blocks to write at. None: the vector's own choice.
    write : {"all", "prompt", "generated", "label", "last"}, slice, (int, int) or str, optional
        Token positions to write at; ranges are of absolute positions, as text ("4-9") with both ends. Of a
        conversation also the messages of a role ("user", "assistant", …), or one by its number ("turn:-1": the last
        that was given). None: the vector's own choice.
    op : {"add", "ablate", "ablate_add", "clamp", "rotate"}, optional
        What is done with the vector; see `STEER_OPS`. None: the vector's own choice.

    Raises
    ------
    UserError
        The coefficient is not finite, or `write` or `op` is unknown.
    """

    name: str
    coefficient: float = 1.0
    layers: Any = None
    write: Any = None
    op: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "coefficient", check_coefficient(self.name, self.coefficient))
        if self.write is not None:
            object.__setattr__(self, "write", check_write(self.write))
        if self.op is not None and self.op not in STEER_OPS:
            raise UserError(f"steering operation {self.op!r} is unknown; one of {', '.join(STEER_OPS)}")

    def __repr__(self) -> str:
        chosen = ((what, getattr(self, what)) for what in ("layers", "write", "op"))
        more = "".join(f", {what}={value!r}" for what, value in chosen if value is not None)
        return escaped(f"Steer({self.name!r}, {self.coefficient!r}{more})")

    @property
    def key(self) -> str:
        """What tells apart the ways in which one vector can be written."""
        return f"{self.name}:{self.op}:{self.write}:{self.layers}"


def check_write(write: Any) -> str:
    """Return a write position as a name or as a range in text, or raise `UserError`."""
    if isinstance(write, tuple) and len(write) == 2:
        write = slice(*write)
    if isinstance(write, slice):
        start, stop = write.start or 0, write.stop
        if write.step not in (None, 1) or not all(isinstance(at, Integral) for at in (start, stop or 0)):
            raise UserError(f"write positions {write!r} must be whole numbers without a step")
        if start < 0 or (stop is not None and stop <= start):
            raise UserError(f"write positions {start}:{stop} hold no token; they count from 0 at the first")
        return f"{start}-" if stop is None else f"{start}-{stop - 1}"
    if isinstance(write, str) and (write in WRITE_POSITIONS or is_turn(write) or _RANGE.fullmatch(write)):
        if write not in WRITE_POSITIONS and not is_turn(write):
            start, stop = write_range(write)
            if stop is not None and stop <= start:
                raise UserError(f"write positions {write!r} hold no token; the first stands before the last")
        return write
    raise UserError(
        f"write position {write!r} is unknown; one of {', '.join(WRITE_POSITIONS)}, a range such as 4-9, or in a "
        f"conversation {', '.join(ROLES)} or turn:N"
    )


def is_turn(position: str) -> bool:
    """Tell whether a position is that of messages: a role's, or one by its number."""
    return position in ROLES or _TURN.fullmatch(position) is not None


def turns_written(position: str, turns: Sequence[Turn], prompt_length: int) -> list[tuple[int, int | None]]:
    """First position and end (None: open) of each message that a role or a number means; see `is_turn`.

    What is generated after a conversation is the assistant's.

    >>> turns_written("assistant", [Turn("user", 3, 7), Turn("assistant", 9, 12)], 15)
    [(9, 12), (15, None)]
    """
    if match := _TURN.fullmatch(position):
        number = int(match[1])
        chosen = [turns[number]] if -len(turns) <= number < len(turns) else []
    else:
        chosen = [turn for turn in turns if turn.role == position]
    spans: list[tuple[int, int | None]] = [(turn.start, turn.stop) for turn in chosen if turn.start < turn.stop]
    return [*spans, (prompt_length, None)] if turns and position == "assistant" else spans


def write_range(write: str) -> tuple[int, int | None]:
    """First position and end (None: open) of a range in text, both counted from 0."""
    match = _RANGE.fullmatch(write)
    assert match is not None, write
    first, dash, last = match.groups()
    if dash is None:
        return int(first), int(first) + 1
    return int(first), int(last) + 1 if last else None


def check_coefficient(name: str, coefficient: float) -> float:
    """Return the coefficient as a float, or raise `UserError` when it is not a finite number."""
    try:
        value = float(coefficient)
    except (TypeError, ValueError):
        raise UserError(f"coefficient of {name!r} must be a number, got {coefficient!r}") from None
    if not math.isfinite(value):
        raise UserError(f"coefficient of {name!r} must be finite, got {value}")
    if abs(value) > _LARGEST:
        raise UserError(f"coefficient of {name!r} must be at most {_LARGEST:.3g}, got {value}")
    return value
