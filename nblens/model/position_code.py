"""Find the length of a text beyond which a model codes the positions of all its tokens otherwise.

A rotary embedding may have other frequencies for long texts (longrope), or others for each length (dynamic NTK). What
was cached before such a length does not fit what comes after it. No text of that length is needed to find it: the last
of eight tokens is said to stand there, and what the model makes of the first seven must stay the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.model.architecture import Architecture, input_device, probe_ids
from nblens.model.generation import takes

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = ["PositionCode", "context_of"]

_CONTEXTS = ("max_position_embeddings", "max_target_positions", "max_seq_len")
"""what configurations call the most tokens that a text may have"""

_TOKENS = 8
_SHORT = _TOKENS + 1  # a gap tells the positions that are given from those that a model counts itself


def context_of(config: PreTrainedConfig) -> int | None:
    """Most tokens of a text, as a model's configuration says; None where it does not."""
    text = config.get_text_config(decoder=True)
    numbers = (getattr(text, name, None) for name in _CONTEXTS)
    return next((number for number in numbers if type(number) is int and number > 0), None)


class PositionCode:
    """How a model's position code depends on the length of a text.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that takes positions.
    architecture : Architecture
        Its parts; over several stages all of them look together.
    """

    longest: int | None = None
    """most tokens of a text whose positions are coded as those of short ones; None: however long"""
    varies: bool = False
    """whether beyond that each length has a code of its own"""
    looked: bool = False
    """whether there was anything to ask; the last pass was then a short one"""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model, self._stage = model, architecture.stage
        limit = context_of(model.config)
        if limit is None or limit <= _SHORT or not takes(model, "position_ids"):
            return
        self.looked = True
        far = self._codes(limit)
        self._short = self._codes(_SHORT)
        if self._is_short(far):
            return
        same, other = _SHORT, limit
        while other - same > 1:
            middle = (same + other) // 2
            same, other = (middle, other) if self._is_short(self._at(middle)) else (same, middle)
        self.longest = same
        self.varies = not self._alike(self._at(other), far)
        self._codes(_SHORT)

    def long_pass(self) -> None:
        """Have the model meet a text beyond the longest of the short ones."""
        self._codes((self.longest or _TOKENS) + 1)

    def _at(self, length: int) -> list[_Coded]:
        """What is made of a text so long, once an earlier long one is forgotten."""
        self._codes(_SHORT)
        return self._codes(length)

    def _is_short(self, codes: list[_Coded]) -> bool:
        return self._alike(codes, self._short)

    def _alike(self, one: list[_Coded], other: list[_Coded]) -> bool:
        alike = len(one) == len(other) and all(map(_Coded.agrees, one, other))
        return alike if self._stage is None else all(self._stage.gather(alike))

    def _codes(self, length: int) -> list[_Coded]:
        """What modules that are told positions, and have no parts, make of all tokens but the last."""
        positions = torch.arange(_TOKENS)
        positions[-1] = length - 1
        codes: list[_Coded] = []

        def note(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            given = (*args, *kwargs.values())
            if any(_holds(value, positions) for value in given):
                made = output if isinstance(output, (tuple, list)) else (output,)
                codes.append(_Coded(_but_last(given), _but_last(made)))

        leaves = [module for module in self._model.modules() if next(module.children(), None) is None]
        handles = [leaf.register_forward_hook(note, with_kwargs=True) for leaf in leaves]
        device = input_device(self._model)
        ids = probe_ids(self._model)[:1].to(device)
        try:
            self._model(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                position_ids=positions[None].to(device),
                use_cache=False,
            )
        finally:
            for handle in handles:
                handle.remove()
        return codes


@dataclass(frozen=True)
class _Coded:
    """What one module was given of the first tokens, and what it made of them."""

    given: list[torch.Tensor]
    made: list[torch.Tensor]

    def agrees(self, other: _Coded) -> bool:
        """Tell whether the same was made of the same; what was given may differ by rounding, which says nothing."""
        return not _equal(self.given, other.given) or _equal(self.made, other.made)


def _equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _but_last(values: Iterable[Any]) -> list[torch.Tensor]:
    """Numbers of all tokens but the last, where tokens are the last dimension but one."""
    tensors = (value for value in values if isinstance(value, torch.Tensor) and value.ndim >= 2)
    return [value[..., :-1, :].clone() for value in tensors if value.shape[-2] == _TOKENS]


def _holds(value: Any, positions: torch.Tensor) -> bool:
    """Tell whether these are the positions, however often they are repeated."""
    if not isinstance(value, torch.Tensor) or value.is_floating_point() or value.shape[-1:] != positions.shape:
        return False
    return bool((value.cpu() == positions).all())
