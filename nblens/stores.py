"""`NamedStore`: values by name that other threads may change while one iterates over them."""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import Any, TypeVar, overload

from nblens.errors import UnknownNameError

__all__ = ["NamedStore"]

T = TypeVar("T")
D = TypeVar("D")


class NamedStore(MutableMapping[str, T]):
    """A mapping of names to values; whoever iterates sees it as it was at the beginning, whatever others do meanwhile.

    What is inside is never changed: a change puts another dict in its place, under a lock that only writers take.
    `items()` and `values()` are of one moment; ``dict(store)`` asks for one name after the other, as Python does.
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

    @overload
    def pop(self, name: str, /) -> T: ...
    @overload
    def pop(self, name: str, /, default: T | D) -> T | D: ...
    def pop(self, name: str, /, *default: Any, **named: Any) -> Any:
        """Take a value out; of several threads one gets it, the others get `default`."""
        with self._writing:
            return super().pop(name, *default, **named)

    def popitem(self) -> tuple[str, T]:
        """Take out any one value, with its name."""
        with self._writing:
            return super().popitem()

    def clear(self) -> None:
        """Take out all values that are there now."""
        with self._writing:
            super().clear()

    def setdefault(self, name: str, default: Any = None) -> T:
        """Return the value of a name, with `default` put in where there is none."""
        with self._writing:
            super().setdefault(name, default)
            return self[name]

    def items(self) -> ItemsView[str, T]:
        """Names with their values, as they are now."""
        return self._values.items()

    def values(self) -> ValuesView[T]:
        """All values, as they are now."""
        return self._values.values()
