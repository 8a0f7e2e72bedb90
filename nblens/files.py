"""Files that survive a crash and never run code: safetensors with a JSON header, written then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from nblens.errors import FileFormatError, UserError
from nblens.text import byte_size

__all__ = [
    "check_replaceable",
    "expanded",
    "plain_file",
    "read_safetensors",
    "read_whole",
    "replace_file",
    "replacing",
    "safetensors_header",
    "write_safetensors",
]

_KEPT = 60  # characters of a name that its temporary name repeats: a longer one would not fit beside it
_MOST_LINKS = 40  # that lead to a file one after the other, as many as Linux follows
_MOST_TEXT = 2**28  # bytes of a file that is read as a whole
_POSIX = os.name == "posix"  # files have owners, groups and permissions

Metadata = dict[str, str]


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> Path:
    """Write arrays and metadata to `path` in one step: a reader sees the old file or the new one."""
    from safetensors.numpy import save

    return replace_file(path, save(dict(arrays), metadata=dict(metadata)))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], Metadata]:
    """Read arrays and metadata; `FileFormatError` when the file is not sound safetensors."""
    with _safetensors(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _metadata(file)  # noqa: SIM118  no mapping


def safetensors_header(path: str | os.PathLike[str]) -> tuple[Metadata, list[str], int]:
    """Read metadata, the names of arrays and the file's size in bytes, but no array; raises as `read_safetensors`."""
    with _safetensors(path) as file:
        return _metadata(file), list(file.keys()), os.stat(path).st_size


@contextmanager
def _safetensors(path: str | os.PathLike[str]) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    with plain_file("read", path) as path:
        try:
            with safe_open(path, framework="np") as file:
                yield file
        except (FileNotFoundError, IsADirectoryError, PermissionError):
            raise
        except MemoryError as error:
            size = byte_size(os.stat(path).st_size)
            raise UserError(f"cannot read {path}: there is no memory for its {size}") from error
        except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
            raise FileFormatError(f"{path} is not a sound safetensors file: {error}") from error


def _metadata(file: Any) -> Metadata:
    return dict(file.metadata() or {})


def read_whole(path: str | os.PathLike[str], most: int = _MOST_TEXT) -> bytes:
    """Read a file that has no header to look at first; one of more than `most` bytes is refused unread."""
    with plain_file("read", path) as path, open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise FileFormatError(f"{path} was not read: it holds {byte_size(size)}, and at most {byte_size(most)} fit")
        return file.read()


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
    """Write `path` in one step: a reader sees the old file or the new one; see `replacing`."""
    with replacing(path) as file:
        file.write(content)
    return Path(path)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file beside `path` that takes its place when the block ends; where it fails, nothing changes.

    The new file has the permissions, the owner and the group of the one that it replaces, as far as the system lets
    it. A link stays a link, and what it points to is replaced; a file that nobody may write is refused.
    """
    with plain_file("write", path) as asked:
        target = _behind_links(asked)
        before = _replaceable(target)
        handle, temporary = _beside(target, 0o666 if before is None else 0o600)
        try:
            with _opened(handle) as file:
                if before is not None and _POSIX:
                    _take_over(handle, before)
                yield file
            os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` where `replacing` would refuse what is there: for work that takes long before it is saved."""
    with plain_file("write", path) as asked:
        _replaceable(_behind_links(asked))


def _behind_links(path: Path) -> Path:
    """The file that is meant where `path` is a link, or a link to a link."""
    for _ in range(_MOST_LINKS):
        if not path.is_symlink():
            return path
        _check_link(path)
        path = path.parent / os.readlink(path)
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


def _check_link(link: Path) -> None:
    """Refuse to follow a stranger's link in a folder such as /tmp, where anybody could have put it."""
    if not _POSIX:
        return
    folder = os.stat(link.parent)
    anybodys = folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH
    if anybodys and os.lstat(link).st_uid not in (os.geteuid(), folder.st_uid):
        raise UserError(f"cannot write {link}: it is another user's link in a folder that anybody may write to")


def _replaceable(target: Path) -> os.stat_result | None:
    """What is known of the file that will be replaced; None where there is none."""
    if not target.exists():
        return None
    known = os.stat(target)
    if not known.st_mode & 0o222 or not os.access(target, os.W_OK):
        raise UserError(f"cannot write {target}: it is read-only; give another name, or make it writable (chmod u+w)")
    return known


def _beside(path: Path, mode: int) -> tuple[int, str]:
    """A new file in the folder of `path`, open, and its name; a rename within a folder is one step.

    The system itself takes from `mode` what new files do not get.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        temporary = os.path.join(path.parent, f".{path.name[:_KEPT]}.{secrets.token_hex(4)}")
        with suppress(FileExistsError):
            return os.open(temporary, flags, mode), temporary


def _opened(handle: int) -> BinaryIO:
    try:
        return os.fdopen(handle, "wb")
    except BaseException:
        os.close(handle)
        raise


def _take_over(handle: int, before: os.stat_result) -> None:
    """Give a file the owner, group and permissions of another."""
    mode = stat.S_IMODE(before.st_mode)
    try:
        os.fchown(handle, before.st_uid, before.st_gid)
    except PermissionError:  # only root gives files away
        try:
            os.fchown(handle, -1, before.st_gid)
        except PermissionError:
            mode &= ~stat.S_IRWXG  # they were meant for another group
    os.fchmod(handle, mode)
