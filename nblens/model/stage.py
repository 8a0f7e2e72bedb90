"""`Stage`: one of several processes that each run some of a model's blocks, and what it needs of the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Stage"]


class Stage:
    """The share of the blocks that is here.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Loaded with `DistributedConfig(pp_size=…)`.
    n_blocks : int
        Of the whole model.
    """

    def __init__(self, model: PreTrainedModel, n_blocks: int) -> None:
        own: Any = model._pp_stage
        self._group = own.pp_group
        self._last = torch.distributed.get_global_rank(own.pp_group, own.pp_size - 1)
        self.is_last = own.pp_is_last_stage
        self.blocks = range(*own.layer_range_for_rank(own.pp_rank, n_blocks))

    def complete(self, states: torch.Tensor, blocks: Sequence[int]) -> torch.Tensor:
        """States (n_blocks, …) with those of other stages' blocks in the place of what was captured here."""
        for slot, block in enumerate(blocks):
            if block not in self.blocks:
                states[slot] = 0
        whole = states.contiguous()
        torch.distributed.all_reduce(whole, group=self._group)  # of one stage's values and zeros: exact
        return whole

    def tell(self, value: Any = None) -> Any:
        """Return what the last stage says, on all of them."""
        said = [value]
        torch.distributed.broadcast_object_list(said, src=self._last, group=self._group)
        return said[0]

    def gather(self, value: Any) -> list[Any]:
        """Return what every stage says, in their order."""
        said: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(said, value, group=self._group)
        return said
