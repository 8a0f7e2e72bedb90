"""`LiveSteering`: what steers wherever a call does not say."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from nblens.errors import UserError
from nblens.steering.reach import check_acts
from nblens.steering.steer import Steer
from nblens.steering.vector_store import VectorStore

__all__ = ["LiveSteering"]


class LiveSteering:
    """The live setting: what steers wherever `steer` is not given.

    >>> session.steer({"cheerful": -1.5})
    >>> session.generate("The summer was", 2).text
    ' dreary.'
    >>> session.steer.off()
    >>> session.generate("The summer was", 2).text
    ' quite great'

    A new coefficient takes effect at the next token of a run in progress. What is written in another way (layers,
    positions, operation) is so from the next run on, and off in the present one. A vector that is deleted is off for
    good: another one of its name does not steer.

    Parameters
    ----------
    vectors : VectorStore
        Where names are looked up.
    send : callable
        Takes {`Steer.key` of a vector's way: coefficient, or None for off} to the run in progress.
    """

    def __init__(self, vectors: VectorStore, send: Callable[[Mapping[str, float | None]], None]) -> None:
        self._vectors, self._send = vectors, send
        self._setting: dict[str, Steer] = {}
        self._keys: dict[str, str] = {}
        """what was sent of each: its vector may be written in another way by now"""
        self._changing = threading.RLock()
        vectors.on_removal = self._forget

    def __call__(self, steer: Mapping[str, float] | Iterable[Steer]) -> None:
        """Set coefficients; names left out stay as they are. All are checked before any changes."""
        self._set(self._vectors.steers(steer), keep=True)

    def only(self, steer: Mapping[str, float] | Iterable[Steer]) -> None:
        """Set coefficients and turn every other vector off, in one step of a run in progress."""
        self._set(self._vectors.steers(steer), keep=False)

    def _set(self, steers: list[Steer], *, keep: bool) -> None:
        names = [item.name for item in steers]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"the live setting holds one strength per vector, got {twice[0]!r} twice")
        vectors = self._vectors.snapshot()
        for item in steers:
            check_acts(vectors.write(item, (item.coefficient,)))
        with self._changing:
            steers = [item for item in steers if item.name in self._vectors]  # another thread may have deleted one
            gone = self._setting.keys() & names if keep else self._setting.keys()
            off = self._turned_off(gone)
            self._setting = (self._setting if keep else {}) | {item.name: item for item in steers}
            self._keys = (self._keys if keep else {}) | {item.name: vectors.resolved(item).key for item in steers}
            self._send(off | {self._keys[item.name]: item.coefficient for item in steers})

    def rename(self, name: str, new: str) -> None:
        """Give a vector another name; where it steers, it goes on under that one.

        Raises
        ------
        UserError
            There is no such vector, there is one of the new name, or it is no name.
        """
        with self._changing:
            vector = self._vectors[name]
            if new in self._vectors:
                raise UserError(f"there is a vector {new!r} already; remove it first, or give another name")
            self._vectors[new] = vector
            steer = self.setting.get(name)
            if steer is not None:
                self([replace(steer, name=new)])
            del self._vectors[name]

    @property
    def setting(self) -> dict[str, Steer]:
        """The present setting by name; vectors that were deleted are gone from it."""
        return {name: steer for name, steer in self._setting.items() if name in self._vectors}

    def off(self) -> None:
        """Stop steering; the vectors stay."""
        with self._changing:
            self._send(self._turned_off(self._setting))
            self._setting, self._keys = {}, {}

    def _forget(self, name: str) -> None:
        """Let a deleted vector steer no more, in a run in progress from the next token on."""
        with self._changing:
            if name in self._setting:
                self._send({self._keys[name]: None})
                self._setting = {other: steer for other, steer in self._setting.items() if other != name}

    def _turned_off(self, names: Iterable[str]) -> dict[str, float | None]:
        """What tells a run in progress that these are off, whichever way of theirs it carries."""
        off, vectors = dict[str, float | None](), self._vectors.snapshot()
        for name in names:
            off[self._keys[name]] = None
            if name in vectors:
                off[vectors.resolved(self._setting[name]).key] = None
        return off

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.setting.values())) or "no steering"
