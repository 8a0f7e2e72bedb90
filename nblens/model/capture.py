"""`CaptureBuffer`: preallocated memory that hooked sites copy their activations into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from nblens.model.architecture import Architecture
from nblens.model.generation import Step

__all__ = ["CaptureBuffer", "RowSpan"]


@dataclass(frozen=True)
class RowSpan:
    """Consecutive tokens of one row that lie side by side in a buffer."""

    row: int
    start: int
    """absolute position of the first"""
    place: slice
    """where they are in the buffer"""
    next_ids: torch.Tensor
    """int64 (n,) on the CPU: the token that follows each, -1 where there is none"""


class CaptureBuffer:
    """Activations of several sites and blocks for up to `capacity` tokens.

    Sites **copy** into it: a view would keep the whole forward pass alive. It fills over one or more steps, is
    read, and is used again.
    """

    def __init__(
        self,
        architecture: Architecture,
        places: Mapping[str, Sequence[int]],
        capacity: int,
        device: torch.device,
    ) -> None:
        """Reserve memory for the blocks in `places[site]` of each site."""
        self._architecture = architecture
        self._places = {site: tuple(blocks) for site, blocks in places.items()}
        self._data = {
            site: torch.empty((len(blocks), capacity, architecture.d_model), dtype=architecture.dtype, device=device)
            for site, blocks in self._places.items()
        }
        self._capacity = capacity
        self._lookup: torch.Tensor | None = None  # memory of a fixed step's places: a recording knows it by its address
        self._place: torch.Tensor | None = None  # where the coming step is written; None: behind what is there
        self.clear()

    @property
    def writers(self) -> dict[tuple[str, int], Callable[[torch.Tensor], None]]:
        """What every hook gives its activation to, by site and block."""
        return {(site, block): self.writer(site, block) for site, blocks in self._places.items() for block in blocks}

    def writer(self, site: str, block: int) -> Callable[[torch.Tensor], None]:
        """The callable that a hook gives the site's activation to, (rows, width, d_model)."""
        slot = self._data[site][self._places[site].index(block)]

        def write(hidden: torch.Tensor) -> None:
            flat = hidden.flatten(0, 1)
            if self._place is not None:
                slot.index_copy_(0, self._place, flat)
                return
            slot[self._used : self._used + len(flat)].copy_(flat)

        return write

    def begin(self, rows: int, *, fixed: bool = False) -> None:
        """Say how the coming step is written: `fixed`, a step of one column whose place a recording can look up."""
        if not fixed:
            self._place = None
            return
        if self._lookup is None:
            device = next(iter(self._data.values())).device
            self._lookup = torch.empty(rows, dtype=torch.long, device=device)
        self._place = torch.arange(self._used, self._used + rows, out=self._lookup)

    def commit(self, step: Step) -> None:
        """Take note of the step whose activations have been written."""
        rows, width = step.positions.shape
        self._rows += [row for row in range(rows) for _ in range(width)]
        self._positions += step.positions.flatten().tolist()
        self._next_ids += step.next_ids.flatten().tolist()
        self._used += rows * width

    def has_room_for(self, tokens: int) -> bool:
        """Tell whether another step of so many tokens (padding counted) fits."""
        return self._used + tokens <= self._capacity

    def drain(self) -> tuple[dict[str, torch.Tensor], list[RowSpan]]:
        """Hand out what was captured and start anew.

        Returns
        -------
        dict of str to torch.Tensor
            site → (n_blocks, n, d_model): views of the buffer, valid until the next step.
        list of RowSpan
            Where each row's tokens are in them; padding is gone.
        """
        order = [i for i in range(self._used) if self._positions[i] >= 0]
        order.sort(key=lambda i: (self._rows[i], self._positions[i]))
        if order != list(range(len(order))):
            self._compact(order)
        spans, offset = [], 0
        for row, group in groupby(order, key=self._rows.__getitem__):
            indices = list(group)
            place = slice(offset, offset + len(indices))
            next_ids = torch.tensor([self._next_ids[i] for i in indices])
            spans.append(RowSpan(row, self._positions[indices[0]], place, next_ids))
            offset = place.stop
        self.clear()
        whole = self._architecture.whole
        return {site: whole(data[:, :offset], self._places[site]) for site, data in self._data.items()}, spans

    def _compact(self, order: list[int]) -> None:
        """Bring the wanted tokens to the front, a block at a time so that only one is held twice."""
        for data in self._data.values():
            index = torch.tensor(order, device=data.device)
            for slot in data:
                slot[: len(order)] = slot[index]

    def clear(self) -> None:
        """Forget what was written."""
        self._used = 0
        self._rows: list[int] = []
        self._positions: list[int] = []
        self._next_ids: list[int] = []
