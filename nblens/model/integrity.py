"""`Proof`: which parts of a model were proven, to see before a run whether they still are the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from torch import nn

from nblens.model.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Proof"]


@dataclass(frozen=True)
class Proof:
    """What a model was when it was proven: modules by identity, and the numbers that they compute by.

    Weights may change, as in training: the proof is of what is done with them.
    """

    architecture: Architecture
    numbers: tuple[tuple[str, str], ...]
    """of the configuration: soft-cap, scales, depths, what positions are made of"""
    head: tuple[Any, ...]
    """shape, dtype and device of the lm_head's weight"""

    @classmethod
    def of(cls, model: PreTrainedModel, architecture: Architecture) -> Self:
        """Note what is proven of a model just now."""
        return cls(architecture, _numbers(model), _head(architecture.lm_head))

    def broken_by(self, model: PreTrainedModel) -> str:
        """Say what is no longer as it was, such as "its model.layers.5 was exchanged"; empty: nothing."""
        proven = self.architecture
        if proven.stage is not None:  # norm and lm_head came from another process; nobody reaches this model
            return ""
        blocks: Any = _there(model, proven.blocks_path) or ()
        if len(blocks) != proven.n_blocks:
            return f"its {proven.blocks_path} has {len(blocks)} blocks instead of {proven.n_blocks}"
        now = [*blocks, *(_there(model, path) for path in (*proven.tail_paths, proven.lm_head_path))]
        then = (*proven.blocks, *proven.tail, proven.lm_head)
        for number, (one, other) in enumerate(zip(now, then, strict=True)):
            if one is not other:
                return f"its {self._path(number)} was exchanged"
            if other._compiled_call_impl is not None:
                return f"its {self._path(number)} was compiled"
        if (numbers := _numbers(model)) != self.numbers:
            changed = min(name for name, _ in {*numbers} ^ {*self.numbers})
            return f"{changed} of its configuration has changed"
        for one, other in zip(_head(proven.lm_head), self.head, strict=True):
            if one != other:
                return f"the weight of its {proven.lm_head_path} is {one} now, not {other}"
        return ""

    def _path(self, number: int) -> str:
        proven = self.architecture
        if number < proven.n_blocks:
            return f"{proven.blocks_path}.{number}"
        return (*proven.tail_paths, proven.lm_head_path)[number - proven.n_blocks]


def _there(model: PreTrainedModel, path: str) -> nn.Module | None:
    """The module at a path; None where there is none."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _numbers(model: PreTrainedModel) -> tuple[tuple[str, str], ...]:
    given = vars(model.config.get_text_config(decoder=True)).items()
    return tuple((name, repr(value)) for name, value in given if type(value) in (int, float, dict))


def _head(lm_head: nn.Module) -> tuple[Any, ...]:
    weight = next(lm_head.parameters())
    return tuple(weight.shape), weight.dtype, weight.device
