"""`Ranks`: the processes that share one model, and how they agree; `AgreedControl`: a `Control` that is one to all.

Every rank runs the same loop over the same request. Whatever a rank decides by its own clock, its own memory or a
message that reaches it earlier than the others has to be agreed upon first: ranks that part ways wait for each other
without end, or go on with different texts.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from nblens.engine.control import Coefficient, Coefficients, Control
from nblens.errors import WorkerError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["AgreedControl", "Ranks"]


class Ranks:
    """The processes that share one model.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Of CPU tensors, used for agreement alone: collectives of the model never mix with these. None: one process.
    rank, size : int
        Which of them this is, and how many there are.
    """

    def __init__(self, group: ProcessGroup | None = None, rank: int = 0, size: int = 1) -> None:
        self.group, self.rank, self.size = group, rank, size

    @property
    def alone(self) -> bool:
        """Whether there is but one."""
        return self.size == 1

    def largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks: one small collective."""
        if self.alone:
            return list(values)
        from torch import distributed

        found = torch.tensor(values, dtype=torch.int64)
        distributed.all_reduce(found, distributed.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def smallest(self, values: Sequence[int]) -> list[int]:
        """The smallest of each value over the ranks."""
        return [-value for value in self.largest([-value for value in values])]

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, in their order."""
        if self.alone:
            return [value]
        from torch import distributed

        said: list[Any] = [None] * self.size
        distributed.all_gather_object(said, value, group=self.group)
        return said

    def all_come(self, purpose: str) -> bool:
        """Tell whether every rank has left its run for one purpose.

        What they say is as long as in `AgreedControl.agree`: a rank that was to take its next step finds out there
        that the others do not.
        """
        checksum = zlib.crc32(purpose.encode())
        _, _, largest, negated, _ = self.largest([0, 0, checksum, -checksum, 0])
        return largest == -negated


class AgreedControl(Control):
    """A `Control` that reads the same on every rank, between one `agree` and the next.

    Coefficients come numbered from 1. A rank may have got more of them than another: those that all have got are
    taken, so that a change takes effect at the same step everywhere.
    """

    def __init__(self, ranks: Ranks, number: int = 0) -> None:
        super().__init__()
        self._ranks = ranks
        self._waiting: list[tuple[int, Coefficients]] = []
        self._received = 0
        self.version = 0
        """number of the last change that was taken on every rank"""
        self._stopped = False
        # begins with the request's number: ranks that were to serve different requests would find out
        self._checksum = zlib.crc32(str(number).encode())

    def receive(self, version: int, coefficients: Coefficients) -> None:
        """Take a numbered change, to be made when all ranks have it."""
        with self._lock:
            self._waiting.append((version, coefficients))
            self._received = version

    def agree(self, *, due: bool = False, sampled: Sequence[int | None] = ()) -> bool:
        """See `Control.agree`.

        Raises
        ------
        WorkerError
            The ranks have sampled different tokens.
        """
        self._checksum = zlib.crc32(repr(list(sampled)).encode(), self._checksum)
        cancel, behind, largest, negated, read = self._ranks.largest(
            [super().cancelled, -self._received, self._checksum, -self._checksum, due]
        )
        if largest != -negated:
            raise WorkerError(
                "the ranks that share the model have sampled different tokens; what they computed since cannot be "
                "trusted; if it happens again, load the model in another precision or on devices of one kind"
            )
        self._stopped, self.version = bool(cancel), -behind
        return bool(read)

    def take_coefficients(self) -> dict[str, Coefficient]:
        """Take what all ranks have got by now, and was not taken yet; the latest value of a name wins."""
        taken: dict[str, Coefficient] = {}
        with self._lock:
            for version, coefficients in self._waiting:
                if version <= self.version:
                    taken |= coefficients
            self._waiting = [(version, c) for version, c in self._waiting if version > self.version]
        return taken

    @property
    def cancelled(self) -> bool:
        """Whether all ranks have agreed to stop."""
        return self._stopped
