"""`VocabularyShard`: the rows of an lm_head that this rank holds, and what the ranks tell each other of theirs.

Tensor parallelism cuts the lm_head along the vocabulary. Each rank reads out its own rows; of what it finds only a few
numbers per residual travel, however large the vocabulary is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["VocabularyShard", "find_shard"]


@dataclass(frozen=True)
class VocabularyShard:
    """Consecutive rows of an lm_head, and the ranks that hold the others."""

    weight: torch.Tensor
    """(rows, d), this rank's part"""
    bias: torch.Tensor | None
    """(rows,)"""
    first: int
    """vocabulary entry of the first row: shards may differ in size"""
    group: ProcessGroup | None

    def gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Collect what every rank has for `own`, in the order of the vocabulary."""
        from torch import distributed

        parts = [torch.empty_like(own) for _ in range(distributed.get_world_size(self.group))]
        distributed.all_gather(parts, own.contiguous(), group=self.group)
        return parts

    def inside(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tell which ids are here, and their rows; some row for the others."""
        rows = ids - self.first
        here = (rows >= 0) & (rows < len(self.weight))
        return here, rows.clamp(0, max(0, len(self.weight) - 1))

    def rows(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights (n, d) and biases (n,) of chosen ids, from wherever they are."""
        here, rows = self.inside(ids)
        weight = self._summed(self.weight, here, rows)
        return weight, None if self.bias is None else self._summed(self.bias, here, rows)

    def _summed(self, values: torch.Tensor, here: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        from torch import distributed

        chosen = values.new_zeros((len(rows), *values.shape[1:]))
        chosen[here] = values[rows[here]]
        distributed.all_reduce(chosen, group=self.group)  # of one rank's row and zeros: exact
        return chosen


def find_shard(lm_head: nn.Module) -> VocabularyShard | None:
    """The part of a linear lm_head that is here; None where all of it is, or where it is cut in another way."""
    weight = getattr(lm_head, "weight", None)
    if type(lm_head) is not nn.Linear or not torch.distributed.is_available():
        return None
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(weight, DTensor) or tuple(weight.placements) != (Shard(0),):
        return None
    mesh = weight.device_mesh
    _, first = Shard.local_shard_size_and_offset(weight.shape[0], mesh.size(), mesh.get_local_rank())
    bias: torch.Tensor | None = lm_head.bias
    if isinstance(bias, DTensor):
        bias = bias.to_local()
    return VocabularyShard(weight.to_local().detach(), None if bias is None else bias.detach(), first, mesh.get_group())
