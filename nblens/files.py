"""Files that survive a crash and never run code: safetensors with a JSON header, written then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nblens.errors import FileFormatError, UserError

__all__ = [
    "expanded",
    "plain_file",
    "read_safetensors",
    "replace_file",
    "temporary_beside",
    "umask",
    "write_safetensors",
]

_KEPT = 60  # characters of a name that its temporary name repeats: a longer one would not fit beside it


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Path:
    """Write arrays and metadata to `path` in one step: a reader sees the old file or the new one."""
    from safetensors.numpy import save

    return replace_file(path, save(dict(arrays), metadata=dict(metadata)))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read arrays and metadata; `FileFormatError` when the file is not sound safetensors."""
    from safetensors import SafetensorError, safe_open

    with plain_file("read", path) as path:
        try:
            with safe_open(path, framework="np") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path} is not a sound safetensors file: {error}") from error


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with the home folder in the place of `~`; a home that nobody has stays as it is."""
    return Path(os.path.expanduser(path))


@contextmanager
def plain_file(verb: str, path: str | os.PathLike[str]) -> Iterator[Path]:
    """Open, read or write `path` inside; what the system refuses becomes a `UserError`: "cannot {verb} {path}: …".

    What exists and is neither a file nor a link to one is refused at once: a pipe would be waited for, and a device
    replaced by a file.
    """
    try:
        path = expanded(path)
        if b"\0" in os.fsencode(path):
            raise UserError(f"cannot {verb} {path}: its name holds a null character")
        if path.is_dir():
            raise UserError(f"cannot {verb} {path}: it is a folder")
        if path.exists() and not path.is_file():
            raise UserError(f"cannot {verb} {path}: it is no plain file")
        yield path
    except OSError as error:
        raise UserError(f"cannot {verb} {path}: {error.strerror or 'no such file'}") from error
    except UnicodeEncodeError as error:
        raise UserError(f"cannot {verb} {path}: its name holds half of a character") from error


def replace_file(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write under a temporary name beside `path`, then rename."""
    with plain_file("write", path) as path:
        handle, temporary = temporary_beside(path)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            # mkstemp makes a private file; a result is meant to be shared like any other
            os.chmod(temporary, 0o666 & ~umask())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    return path


def temporary_beside(path: Path) -> tuple[int, str]:
    """A new file in the folder of `path`, open, and its name; a rename within a folder is one step."""
    return tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_KEPT]}.")


def umask() -> int:
    """Permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
