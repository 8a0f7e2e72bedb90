"""`Stage`: one of several processes that each run some of a model's blocks, and what it needs of the others.

transformers puts identity layers where the blocks of other stages are. Here every stage gets a copy of the final norm
and the lm_head, and the states that others captured, so that all of them read the same: what is written per block is
written where the block is, and nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.model.architecture import Architecture, find_architecture, find_blocks, probe_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Stage", "find_staged_architecture"]

_PASS = "pass"


class Stage:
    """The share of the blocks that is here.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Loaded with `DistributedConfig(pp_size=…)`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        own: Any = model._pp_stage
        n_blocks = len(find_blocks(model)[1])
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
        """What the last stage says, on all of them."""
        said = [value]
        torch.distributed.broadcast_object_list(said, src=self._last, group=self._group)
        return said[0]

    def gather(self, value: Any) -> list[Any]:
        """What every stage says, in their order."""
        said: list[Any] = [None] * torch.distributed.get_world_size(self._group)
        torch.distributed.all_gather_object(said, value, group=self._group)
        return said


def find_staged_architecture(model: PreTrainedModel) -> Architecture:
    """What `find_architecture` finds on the last stage, which has the lm_head, on every stage.

    The others take part in each of its forward passes, and get its norm and lm_head.
    """
    stage = Stage(model)
    _count_tokens(model)
    found: Any = None
    if stage.is_last:
        try:
            with _with_all_stages(model, stage):
                found = find_architecture(model)
        except Exception as error:
            found = error
        stage.tell(replace(found, blocks=()) if isinstance(found, Architecture) else found)
    else:
        while (found := stage.tell()) == _PASS:
            probe_logits(model)
    if isinstance(found, Exception):
        raise found
    device = next(model.parameters()).device
    for module in (*found.tail, found.lm_head):
        module.to(device).requires_grad_(False)
    return replace(found, blocks=tuple(find_blocks(model)[1]), stage=stage)


@contextmanager
def _with_all_stages(model: PreTrainedModel, stage: Stage) -> Iterator[None]:
    """Call the other stages to every forward pass."""
    handle = model.register_forward_pre_hook(lambda *_: stage.tell(_PASS) and None)
    try:
        yield
    finally:
        handle.remove()


def _count_tokens(model: PreTrainedModel) -> None:
    """Let the cache count tokens in the layers of other stages, too: masks are made by the length of the first."""
    from transformers.distributed.pipeline_parallel import PipelineIdentityLayer

    for block, layer in enumerate(find_blocks(model)[1]):
        if isinstance(layer, PipelineIdentityLayer):
            layer.register_forward_pre_hook(_Counting(block), with_kwargs=True)


class _Counting:
    """Adds keys and values of one number to a layer's cache: one that holds no numbers counts as empty."""

    def __init__(self, block: int) -> None:
        self._block = block

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            hidden = args[0] if args else kwargs["hidden_states"]
            token = hidden.new_zeros((hidden.shape[0], 1, hidden.shape[1], 1))
            cache.update(token, token, self._block)
