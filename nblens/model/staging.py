"""Find the architecture of a model whose blocks are dealt out to several processes.

transformers puts identity layers where the blocks of other stages are. Here every stage gets a copy of the final norm
and the lm_head, and the states that others captured, so that all of them read the same: what is written per block is
written where the block is, and nothing else has to know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from nblens.model.architecture import Architecture, find_architecture, find_blocks, probe_logits
from nblens.model.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_staged_architecture"]

_PASS = "pass"


def find_staged_architecture(model: PreTrainedModel) -> Architecture:
    """Find on every stage what `find_architecture` finds on the last one, which has the lm_head.

    The others take part in each of its forward passes, and get its norm and lm_head.
    """
    stage = Stage(model, len(find_blocks(model)[1]))
    _count_tokens(model)
    found: Architecture | Exception
    if stage.is_last:
        try:
            with _with_all_stages(model, stage):
                found = find_architecture(model)
        except Exception as error:
            found = error
        stage.tell(replace(found, blocks=()) if isinstance(found, Architecture) else found)
    else:
        while (said := stage.tell()) == _PASS:
            probe_logits(model)
        found = said
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
