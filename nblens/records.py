"""Saved values: a name, a version, fields as JSON and tensors, in one safetensors file, for every kind alike."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblens.errors import FileFormatError, first_line, shown
from nblens.files import read_safetensors, safetensors_header, write_safetensors
from nblens.text import byte_size

__all__ = ["RecordFormat", "sound_content"]

_LONGEST = 80  # characters of a foreign format's name that a message repeats
_LARGE = 2**24  # bytes from which on a message tells how large a file is


@dataclass(frozen=True)
class RecordFormat:
    """Marks a kind of value in its files, and names it in messages.

    ::

        lenses = RecordFormat("nblens.lens", 1, "a lens")
        path = lenses.save("halved.safetensors", {"name": "halved"}, {"weight.3": matrix})
        fields, tensors = lenses.load(path)

    The file's metadata are `format`, `version` and `fields`, a JSON object. A header that was read elsewhere, such as
    from a JSON file, is held against `check`.
    """

    name: str
    version: int
    called: str
    """with its article, as in "is not a lens"; see `check`"""
    most_bytes: int | None = None
    """of a file; a larger one cannot be of this kind, and is refused unread"""

    def save(self, path: str | os.PathLike[str], fields: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
        """Write in one step: a reader sees the old file or the new one."""
        metadata = {"format": self.name, "version": str(self.version), "fields": json.dumps(fields)}
        return write_safetensors(path, tensors, metadata)

    def load(self, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Read fields and tensors.

        Raises
        ------
        FileFormatError
            The file is damaged, holds another kind of value, or is of another version.
        """
        metadata, _, size = safetensors_header(path)
        self.accept(metadata, size, path)
        tensors, metadata = read_safetensors(path)
        return self.fields_of(metadata, path), tensors

    def accept(self, metadata: Mapping[str, str], size: int, source: str | os.PathLike[str]) -> None:
        """Raise `FileFormatError` unless a file of these metadata and so many bytes is worth reading."""
        try:
            self.check(metadata, source)
        except FileFormatError as error:
            if size < _LARGE:
                raise
            raise FileFormatError(f"{error}; its {byte_size(size)} were not read") from None
        if self.most_bytes is not None and size > self.most_bytes:
            raise FileFormatError(
                f"{source} was not read: it says that it is {self.called}, and holds {byte_size(size)} "
                f"(at most {byte_size(self.most_bytes)})"
            )

    def fields_of(self, metadata: Mapping[str, str], source: str | os.PathLike[str]) -> dict[str, Any]:
        """Read the fields out of a file's metadata; raises as `load` does, and calls the file `source`."""
        self.check(metadata, source)
        with sound_content(source):
            fields = json.loads(metadata["fields"])
            if not isinstance(fields, dict):
                raise ValueError(f"its fields are {shown(fields)}, not a JSON object")
            return fields

    def check(self, header: Mapping[str, object], source: str | os.PathLike[str]) -> None:
        """Raise `FileFormatError` unless a header names this format in this version."""
        name, version = (_text(header.get(key, "none")) for key in ("format", "version"))
        if name != self.name:
            raise FileFormatError(f"{source} is not {self.called} (format: {name})")
        if version != str(self.version):
            raise FileFormatError(
                f"{source} is {self.called} of version {version}; this nblens reads version {self.version}"
            )


@contextmanager
def sound_content(source: str | os.PathLike[str]) -> Iterator[None]:
    """Make a value of what was read inside; what damage makes that stumble over becomes a `FileFormatError`."""
    try:
        yield
    except FileFormatError:
        raise
    except KeyError as error:
        raise FileFormatError(f"{source} is damaged: it lacks {error}") from error
    except (TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise FileFormatError(f"{source} is damaged: {first_line(error)}") from error


def _text(value: object) -> str:
    return value[:_LONGEST] if isinstance(value, str) else shown(value)
