"""What is said between the process of a session and its ranks, beside requests and their events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nblens.errors import NblensError

if TYPE_CHECKING:
    from nblens.model.architecture import ModelFacts
    from nblens.model.placement import Placement

__all__ = ["Failure", "Joined", "LoadOrder"]


@dataclass(frozen=True)
class LoadOrder:
    """Which model, and how it is spread."""

    source: str
    where: Mapping[str, Any]
    """revision and trust_remote_code"""
    dtype: str
    """"auto": the checkpoint's own on a GPU, float32 on a CPU"""
    pad_id: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    more: Mapping[str, Any] = field(default_factory=dict)
    """what else `from_pretrained` is told of the weights"""

    @property
    def size(self) -> int:
        """Ranks."""
        return max(self.tp, self.pp)


@dataclass(frozen=True)
class Joined:
    """A rank that has loaded its part."""

    facts: ModelFacts
    placement: Placement
    parameters: Mapping[str, int]
    """how many numbers each of its parameters has, over all ranks that share it"""
    pid: int
    node: str


@dataclass(frozen=True)
class Failure:
    """What a rank raised."""

    rank: int
    at: float
    """seconds since the epoch"""
    message: str
    """the error's own, and the end of its traceback"""
    error: NblensError | None = None
    """where it was raised on purpose"""
    died: bool = False
    """the process is no more, or answers no more"""
