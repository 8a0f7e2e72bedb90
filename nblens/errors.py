"""Everything that nblens raises.

::

    NblensError
    ├── UserError (also ValueError)      a mistake in what was asked; one line, says what would do
    │   ├── NoModelError                 no model is loaded
    │   ├── UnknownNameError (also KeyError)   a vector or lens that the session does not have
    │   ├── DoesNotFitError              a model too large for the devices; `.plan` says what would fit
    │   ├── VectorMismatchError          a steering vector made for another model
    │   └── FileFormatError              a damaged, foreign or hostile file
    ├── UnsupportedModelError            a part could not be found, or the readout is not the model's own
    ├── DeviceMemoryError (also MemoryError)   out of memory even with the smallest chunk
    ├── NumericalError (also ArithmeticError)  activations or logits are inf or NaN; says from which block and site on
    └── WorkerError                      the thread that runs the model died

    Interrupted (KeyboardInterrupt)      a run was stopped; `.partial` holds what it had produced
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = [
    "DeviceMemoryError",
    "DoesNotFitError",
    "FileFormatError",
    "Interrupted",
    "NblensError",
    "NoModelError",
    "NumericalError",
    "UnknownNameError",
    "UnsupportedModelError",
    "UserError",
    "VectorMismatchError",
    "WorkerError",
    "escaped",
    "first_line",
    "is_out_of_memory",
    "shown",
    "unsupported",
    "warn_caller",
]

_LONGEST_VALUE = 80  # characters of a value that a message quotes
_LONGEST_LINE = 1000  # characters of a line of a message, whatever it quotes


class NblensError(Exception):
    """Base of every error that nblens raises on purpose.

    Messages quote what others wrote, such as tokens and names of files: characters that a terminal would act on or
    not show stand as their escapes.
    """

    _layout = "\n"
    """what is left of a message's layout"""

    def __init__(self, message: str = "") -> None:
        lines = str(message).split("\n") if "\n" in self._layout else [str(message)]
        super().__init__("\n".join(_bounded(escaped(_bounded(line), self._layout)) for line in lines))


class UserError(NblensError, ValueError):
    """A mistake in what was asked for: the message, one line, names the value and what would do."""

    _layout = ""


class NoModelError(UserError):
    """No model is loaded in this session."""


class UnknownNameError(UserError, KeyError):
    """A name that the session's vectors or lenses do not have."""

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would show it in quotes


class DoesNotFitError(UserError):
    """A model that is too large for the devices, refused before its weights are read.

    Attributes
    ----------
    plan : nblens.Plan
        What each device would have to hold, and settings that would fit.
    """

    _layout = "\n"

    def __init__(self, message: str, plan: Any = None) -> None:
        super().__init__(message)
        self.plan = plan


class VectorMismatchError(UserError):
    """A steering vector that does not belong to the loaded model."""


class FileFormatError(UserError):
    """A file that is damaged, not ours, or not safe to read."""


class UnsupportedModelError(NblensError):
    """A model whose parts could not be found, or whose readout was disproved."""


class DeviceMemoryError(NblensError, MemoryError):
    """Device memory ran out even with the smallest chunk; the model stays usable."""


class NumericalError(NblensError, ArithmeticError):
    """What a model computed is inf or NaN, so that nothing can be read from it; the model stays usable."""


class WorkerError(NblensError):
    """The thread or process that runs the model died; load the model again."""


class Interrupted(KeyboardInterrupt):
    """A run was interrupted.

    It is a `KeyboardInterrupt`, so that a loop over prompts stops too.

    Attributes
    ----------
    partial
        The result up to the interruption (what the call would have returned), or None.
    """

    def __init__(self, message: str, partial: Any = None) -> None:
        super().__init__(message)
        self.partial = partial


def first_line(error: BaseException) -> str:
    """What an error says, cut to one line, for a message that quotes it."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether it is CUDA's or numpy's error, or one of two plain `RuntimeError`s of the CPU allocator."""
    cpu = ("not enough memory", "can't allocate memory")
    # by its name: this file is there before torch is
    torchs = isinstance(error, RuntimeError) and type(error).__name__ == "OutOfMemoryError"
    return torchs or isinstance(error, MemoryError) or any(words in str(error) for words in cpu)


@contextmanager
def unsupported(said: str) -> Iterator[None]:
    """Call what fails inside a model's own code a model that is not supported; memory that runs out is not its fault.

    Raises
    ------
    UnsupportedModelError
        Whatever else was raised inside, after what is said here.
    """
    try:
        yield
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UnsupportedModelError(f"{said}: {first_line(error)}") from error


def shown(value: object) -> str:
    """A value for a message: its repr, cut where it is long, its type where it has none."""
    part = value[:_LONGEST_VALUE] if isinstance(value, (str, bytes)) else value
    try:
        text = repr(part)
    except Exception:  # a number of thousands of digits; what holds itself too deeply; what a user's class does
        text = f"a {type(value).__name__}"
    return text if len(text) <= _LONGEST_VALUE else f"{text[: _LONGEST_VALUE - 1]}…"


def warn_caller(message: str) -> None:
    """Warn of something in one line, as if the line warned that called this package from outside."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "nblens":
        level, frame = level + 1, frame.f_back
    warnings.warn(_bounded(escaped(_bounded(message))), RuntimeWarning, stacklevel=level)


def _bounded(line: str) -> str:
    """A line of a message without its midst, where what it quotes made it long: what failed and what to do stay."""
    if len(line) <= _LONGEST_LINE:
        return line
    return f"{line[: _LONGEST_LINE // 2 - 1]} … {line[-(_LONGEST_LINE // 2 - 2) :]}"


def escaped(text: str, kept: str = "") -> str:
    """Text with every character that a terminal acts on or does not show as its escape, but for those `kept`."""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)
