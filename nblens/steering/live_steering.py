"""`LiveSteering`: what steers wherever a call does not say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from nblens.errors import UserError
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
    positions, operation) is so from the next run on, and off in the present one.

    Parameters
    ----------
    vectors : VectorStore
        Where names are looked up.
    send : callable
        Takes {`Steer.key`: coefficient, or None for off} to the run in progress.
    """

    def __init__(self, vectors: VectorStore, send: Callable[[Mapping[str, float | None]], None]) -> None:
        self._vectors, self._send = vectors, send
        self._setting: dict[str, Steer] = {}

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
        for item in steers:
            self._vectors.write(item, (item.coefficient,))
        before = [item for name, item in self._setting.items() if name in names or not keep]
        self._setting = (self._setting if keep else {}) | {item.name: item for item in steers}
        self._send({item.key: None for item in before} | {item.key: item.coefficient for item in steers})

    @property
    def setting(self) -> dict[str, Steer]:
        """The present setting by name; vectors that were deleted are gone from it."""
        return {name: steer for name, steer in self._setting.items() if name in self._vectors}

    def off(self) -> None:
        """Stop steering; the vectors stay."""
        self._send({item.key: None for item in self._setting.values()})
        self._setting.clear()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.setting.values())) or "no steering"
