"""`Leftovers`: what a model keeps outside its cache, so that one request could reach the next; put back before each.

Most decoders keep nothing. recurrent_gemma has its recurrent state in its modules, and a rotary embedding that grows
with the text its longest one. `Snapshot` finds them by what a request changes, whatever they are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nblens.errors import UnsupportedModelError

__all__ = ["Leftovers", "Snapshot"]

_LARGEST = 2**20  # elements of a tensor of which a copy is kept


@dataclass(frozen=True, eq=False)
class Leftovers:
    """Attributes of modules, and what they were before a request."""

    entries: tuple[_Entry, ...] = ()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self.entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Their paths in the model."""
        return tuple(entry.path for entry in self.entries)

    def put_back(self) -> None:
        """Let each be what it was."""
        for entry in self.entries:
            entry.put_back()


class Snapshot:
    """What a model's modules hold beside submodules: tensors and plain values, as they are now."""

    def __init__(self, model: nn.Module) -> None:
        self._by_module = [
            [_Entry(holder, name, f"{path}.{name}" if path else name) for holder, name in _held(module)]
            for path, module in model.named_modules()
        ]

    def changes(self) -> Leftovers:
        """Find what is another by now.

        Raises
        ------
        UnsupportedModelError
            A weight is, or something too large to be kept twice.
        """
        found: list[_Entry] = []
        for entries in self._by_module:
            changed = [entry for entry in entries if entry.is_changed()]
            for entry in changed:
                if not entry.can_be_put_back:
                    raise UnsupportedModelError(
                        f"the model's {entry.path} changes as it runs: what it says depends on what it was asked before"
                    )
            # a number alone is somebody's counter; one beside a tensor may say what the tensor stands for
            if any(entry.is_tensor for entry in changed):
                found += changed
        return Leftovers(tuple(found))


class _Entry:
    """One attribute, and what it was."""

    def __init__(self, holder: dict[str, Any], name: str, path: str) -> None:
        self._holder, self._name, self.path = holder, name, path
        self._value = value = holder[name]
        self._is_weight = isinstance(value, nn.Parameter)
        self._version, self._copy = 0, None
        if isinstance(value, torch.Tensor):
            self._version = _version(value)
            if not self._is_weight and not value.is_meta and value.numel() <= _LARGEST:
                self._copy = value.detach().clone()

    @property
    def is_tensor(self) -> bool:
        """Whether it was or is one."""
        return isinstance(self._value, torch.Tensor) or isinstance(self._holder.get(self._name), torch.Tensor)

    @property
    def can_be_put_back(self) -> bool:
        """Whether what it was is still known."""
        return not self._is_weight and (not isinstance(self._value, torch.Tensor) or self._copy is not None)

    def is_changed(self) -> bool:
        """Tell whether it is another value now; what offloading moves about is not."""
        before, now = self._value, self._holder.get(self._name)
        if not isinstance(before, torch.Tensor) or not isinstance(now, torch.Tensor):
            return before is not now and (self.is_tensor or bool(before != now))
        if now is before and _version(now) == self._version:
            return False
        if self._is_weight:
            return now is before
        if before.is_meta or now.is_meta:
            return False
        if self._copy is None or now.shape != self._copy.shape or now.dtype != self._copy.dtype:
            return True
        return not torch.equal(now.to(self._copy.device), self._copy)

    def put_back(self) -> None:
        """Let it be what it was, at the address that it had."""
        if self._copy is not None and _version(self._value) != self._version:
            self._value.copy_(self._copy)
            self._version = _version(self._value)
        self._holder[self._name] = self._value


def _held(module: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a module's own tensors and plain values are."""
    plain = [name for name, value in vars(module).items() if isinstance(value, (torch.Tensor, int, float, type(None)))]
    held: list[tuple[dict[str, Any], str]] = [(vars(module), name) for name in plain if name != "training"]
    for holder in (module._buffers, module._parameters):
        held += [(holder, name) for name, value in holder.items() if value is not None]
    return held


def _version(tensor: torch.Tensor) -> int:
    """How often it was written to in place; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version
