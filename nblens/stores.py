"""`NamedStore`: values by name that other threads may change while one iterates over them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import TypeVar

from nblens.errors import UnknownNameError

__all__ = ["NamedStore"]

T = TypeVar("T")


class NamedStore(MutableMapping[str, T]):
    """A mapping of names to values; whoever iterates sees it as it was at the beginning, whatever others do meanwhile.

    What is inside is never changed: a change puts another dict in its place, under a lock that only writers take.
    """

    def __init__(self) -> None:
        self._values: Mapping[str, T] = {}
        self._writing = threading.RLock()

    def __getitem__(self, name: str) -> T:
        try:
            return self._values[name]
        except (KeyError, TypeError):
            raise self._unknown(name) from None

    @abstractmethod
    def _unknown(self, name: object) -> UnknownNameError:
        """What to raise where there is no such name."""

    def _put(self, name: str, value: T) -> None:
        with self._writing:
            self._values = {**self._values, name: value}

    def __delitem__(self, name: str) -> None:
        with self._writing:
            if name not in self._values:
                raise self._unknown(name)
            self._values = {other: value for other, value in self._values.items() if other != name}

    def __contains__(self, name: object) -> bool:
        try:
            return name in self._values
        except TypeError:  # what cannot be a key is none
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def items(self) -> ItemsView[str, T]:
        """Names with their values, as they are now."""
        return self._values.items()

    def values(self) -> ValuesView[T]:
        """All values, as they are now."""
        return self._values.values()
