"""Where a text is read: names, indices and spans as positions, and as words."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from numbers import Integral
from typing import Any

from nblens.errors import UserError, shown
from nblens.specs import Span, Turn
from nblens.steering.steer import ROLES, is_turn, turns_written

__all__ = [
    "READ_POSITIONS",
    "WITH_SPECIAL",
    "Read",
    "check_read",
    "mean_positions",
    "read_name",
    "read_span",
    "read_words",
    "takes_special",
]

Read = str | int | slice | tuple[int, int]
"""Read position in a text: "last", "label", "mean", an index, or a span; a mean may end in "+special"."""

READ_POSITIONS = ("last", "label", "mean")

WITH_SPECIAL = "+special"
"""Ends a read position whose mean takes in special tokens and a text's first."""

_SPAN = re.compile(r"\s*(-?\d+)\s*-\s*(-?\d+)\s*")


def read_span(read: Read, length: int, label: int | None = None, turns: Sequence[Turn] = ()) -> Span:
    """The positions of a text that are read: from a first up to, not including, a last.

    >>> read_span("3-7", 20), read_span((3, 8), 20), read_span(-2, 20), read_span("mean", 20)
    ((3, 8), (3, 8), (18, 19), (0, 20))

    A mean leaves some of these out, unless its name ends in "+special": see `mean_positions`.

    Parameters
    ----------
    read : {"last", "label", "mean"}, int, slice, (int, int) or str
        The last token, the label, the mean over a text, the token at an absolute index (negative: from the end),
        or the mean over a span: a slice or (start, stop) as Python counts, or text such as "3-7" with both ends. Of a
        conversation the mean over the last message of a role ("user", …), or over one by its number ("turn:0").
    length : int
        Tokens of the text.
    label : int, optional
        Where its label stands.
    turns : sequence of Turn
        Its messages.

    Raises
    ------
    UserError
        The position is unknown, or outside the text.
    """
    check_read(read)
    read = _without_ending(read)
    if isinstance(read, str) and is_turn(read):
        return _of_turn(read, length, turns)
    if isinstance(read, str) and read in READ_POSITIONS:
        if read == "label" and label is None:
            raise UserError("this text has no label to read")
        return {"last": (length - 1, length), "mean": (0, length), "label": (label or 0, (label or 0) + 1)}[read]
    if isinstance(read, Integral) and not isinstance(read, bool):
        return _index(int(read), length)
    ends = _ends(read)
    start, stop = (None if end is None else _end(end, length, read) for end in ends)
    start, stop = 0 if start is None else start, length if stop is None else stop
    if start >= stop:
        raise UserError(f"read span {read_name(read)} holds no token of a text of {length} tokens")
    return start, stop


def check_read(read: Read) -> None:
    """Raise `UserError` unless it is one of the forms of a read position, whatever the text."""
    mean = _without_ending(read)
    if mean != read and mean != "mean" and not is_turn(mean) and not _SPAN.fullmatch(mean):
        raise _unknown(read)
    named = isinstance(mean, str) and (mean in READ_POSITIONS or is_turn(mean))
    if not named and not (isinstance(mean, Integral) and not isinstance(mean, bool)):
        _ends(mean)


def takes_special(read: Read) -> bool:
    """Tell whether a mean takes in special tokens and a text's first."""
    return isinstance(read, str) and read.endswith(WITH_SPECIAL)


def mean_positions(ids: Sequence[int], span: Span, left_out: Collection[int] | None) -> list[int]:
    """The positions of a span that its mean is taken over.

    Special tokens and a text's first one are where a model's attention goes that has nothing to look at. Their
    activations can be a hundred times as long as those of all others, and a mean that took them in would be theirs:
    they are left out, but for a span of one token, which is no mean.

    Parameters
    ----------
    ids : sequence of int
        The text's tokens.
    span : (int, int)
        From a first up to, not including, a last.
    left_out : collection of int, optional
        Ids of special tokens. None: nothing is left out.
    """
    positions = range(*span)
    if left_out is None or len(positions) == 1:
        return list(positions)
    return [position for position in positions if position and ids[position] not in left_out]


def read_words(read: str) -> str:
    """A read position as a report calls it, with what its mean leaves out.

    >>> read_words("mean"), read_words("3-7+special"), read_words("last")
    ('mean without special and first tokens', '3-7 with special tokens', 'last')
    """
    mean = _without_ending(read)
    span = _SPAN.fullmatch(mean)
    if mean != "mean" and not is_turn(mean) and (span is None or span[1] == span[2]):
        return read
    return f"{mean} with special tokens" if takes_special(read) else f"{mean} without special and first tokens"


def read_name(read: Read) -> str:
    """A read position as text, in a form that can be given again.

    >>> read_name((3, 8)), read_name(slice(-3, None)), read_name(-1)
    ('3-7', '-3--1', '-1')
    """
    if isinstance(read, str) or not isinstance(read, (slice, tuple, list)):
        return str(read)
    start, stop = _ends(read)
    return f"{start or 0}-{-1 if stop is None else stop - 1}"


def _without_ending(read: Any) -> Any:
    return read.removesuffix(WITH_SPECIAL) if isinstance(read, str) else read


def _unknown(read: Any) -> UserError:
    known = ", ".join(READ_POSITIONS)
    return UserError(
        f"read position {shown(read)} is unknown; one of {known}, an index, a span such as 3-7, or in a conversation "
        f"{', '.join(ROLES)} or turn:N"
    )


def _of_turn(read: str, length: int, turns: Sequence[Turn]) -> Span:
    """The tokens of the last message that is meant."""
    spans = turns_written(read, turns, length)
    given = [(start, stop) for start, stop in spans if stop is not None]
    if not given:
        roles = ", ".join(dict.fromkeys(turn.role for turn in turns))
        known = f"its messages are {roles}" if roles else "it is no conversation: give messages, or chat"
        raise UserError(f"read position {read!r}: a text has no such message; {known}")
    return given[-1]


def _index(index: int, length: int) -> Span:
    if not -length <= index < length:
        raise UserError(f"read position {index} is outside a text of {length} tokens")
    return index % length, index % length + 1


def _end(end: int, length: int, read: Read) -> int:
    place = end + length if end < 0 else end
    if not 0 <= place <= length:
        raise UserError(f"read span {read_name(read)} is outside a text of {length} tokens")
    return place


def _ends(read: Any) -> tuple[int | None, int | None]:
    """Start and stop as Python counts; None: the text's own end."""
    if isinstance(read, str) and (match := _SPAN.fullmatch(read)):
        return int(match[1]), int(match[2]) + 1 or None
    if isinstance(read, slice) and read.step in (None, 1):
        ends: tuple[Any, ...] = (read.start, read.stop)
    elif isinstance(read, (tuple, list)) and len(read) == 2:
        ends = tuple(read)
    else:
        ends = (read,)
    whole = [end is None or (isinstance(end, Integral) and not isinstance(end, bool)) for end in ends]
    if len(ends) != 2 or not all(whole):
        raise _unknown(read)
    return ends[0], ends[1]
