"""Files that survive a crash and never run code: safetensors with a JSON header, written then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from nblens.errors import FileFormatError, UserError

__all__ = ["read_safetensors", "replace_file", "umask", "write_safetensors"]


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Path:
    """Write arrays and metadata to `path` in one step: a reader sees the old file or the new one."""
    from safetensors.numpy import save

    return replace_file(path, save(dict(arrays), metadata=dict(metadata)))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read arrays and metadata; `FileFormatError` when the file is not sound safetensors."""
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise UserError(f"cannot read {path}: it is a folder")
    try:
        with safe_open(path, framework="np") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot read {path}: {error.strerror or 'no such file'}") from error
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise FileFormatError(f"{path} is not a sound safetensors file: {error}") from error


def replace_file(path: str | os.PathLike[str], content: bytes) -> Path:
    """Write under a temporary name beside `path`, then rename."""
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes a private file; a result is meant to be shared like any other
        os.chmod(temporary, 0o666 & ~umask())
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, IsADirectoryError):
            raise UserError(f"cannot write {path}: it is a folder") from error
        raise
    return path


def umask() -> int:
    """Permissions that new files do not get."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
