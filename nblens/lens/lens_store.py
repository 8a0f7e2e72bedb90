"""`LensStore`: the lenses of a session beside the logit lens."""

from __future__ import annotations

import os
from dataclasses import replace

from nblens.errors import UnknownNameError, UserError
from nblens.lens.lens import LOGIT, Lens
from nblens.lens.published import lens_file
from nblens.stores import NamedStore

__all__ = ["LensStore"]


class LensStore(NamedStore[Lens]):
    """The lenses of a session, by name; only those that fit its model.

    >>> session.lenses["plain"] = nblens.Lens("plain", "jacobian", {1: torch.eye(192)})
    >>> list(session.lenses)
    ['plain']

    The path of a lens file is a name too: it is read at first use, and again when the file has changed.
    """

    def __init__(self, n_blocks: int, d_model: int) -> None:
        super().__init__()
        self._n_blocks, self._d_model = n_blocks, d_model
        self._read: dict[str, tuple[int, int, int]] = {}

    def __getitem__(self, name: str) -> Lens:
        if isinstance(name, str) and (name in self._read or name not in self):
            self._read_file(name)
        return super().__getitem__(name)

    def _unknown(self, name: object) -> UnknownNameError:
        known = ", ".join([LOGIT, *sorted(self)])
        return UnknownNameError(
            f"lens {name!r} is unknown; one of {known}, or the path of a lens file "
            "(session.fit_lens(texts) makes a tuned lens)"
        )

    def __setitem__(self, name: str, lens: Lens) -> None:
        self.check_name(name)
        if not isinstance(lens, Lens):
            raise UserError(f"{name!r} must be a Lens, got {type(lens).__name__}")
        lens.check_fits(n_blocks=self._n_blocks, d_model=self._d_model)
        self._put(name, replace(lens, name=name))
        self._read.pop(name, None)

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._read.pop(name, None)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values())) or "no lens beside the logit lens"

    def check_name(self, name: str) -> None:
        """Raise `UserError` unless a lens can be kept under this name."""
        if not isinstance(name, str) or not name.strip() or name == LOGIT:
            raise UserError(f"a lens needs a name other than {LOGIT!r}; got {name!r}")

    def check(self, name: str, sites: tuple[str, ...], blocks: tuple[int, ...]) -> None:
        """Raise `UserError` unless the lens of this name reads these blocks at these sites."""
        if name != LOGIT:
            lens = self[name]
            for site in sites:
                lens.check_reads(site, blocks, self._n_blocks)

    def _read_file(self, name: str) -> None:
        path = os.path.expanduser(name)
        if (file := lens_file(path)) is None:
            return
        state = os.stat(file)
        stamp = (state.st_mtime_ns, state.st_ino, state.st_size)
        if self._read.get(name) != stamp:
            self[name] = Lens.load(path, name)
            self._read[name] = stamp
