"""`Cells`: readouts of one sequence over layers × tokens, as plain CPU arrays, and what one asks of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, Self

import numpy as np

from nblens.circumstances import Circumstances
from nblens.errors import UserError, shown
from nblens.layers import format_layers, parse_layers
from nblens.text import whole_characters
from nblens.views.panels import TokenGrid

__all__ = ["METRICS", "PER_CELL", "PER_CELL_MANY", "PER_TOKEN", "Cells"]

METRICS = ("prob", "entropy", "kl", "rank")
"""What a cell of the grid can show: probability of the top token, entropy (nats), KL to the last block (nats),
rank of the token that follows."""

PER_TOKEN = ("token_ids", "next_ids")
PER_CELL = ("entropy", "kl_to_final", "next_logprob", "next_rank")
PER_CELL_MANY = ("top_ids", "top_logprobs", "target_logprobs", "target_ranks")


@dataclass(frozen=True, repr=False, eq=False)
class Cells(TokenGrid):
    """What was read of every cell; every probability is normalised over the full vocabulary."""

    tokens: tuple[str, ...]
    """text of each fed token, (n_tokens,)"""
    token_ids: np.ndarray
    """int32 (n_tokens,)"""
    layers: tuple[int, ...]
    """block indices read, ascending, (n_layers,)"""
    site: str
    top_ids: np.ndarray
    """int32 (n_layers, n_tokens, k), most likely first"""
    top_logprobs: np.ndarray
    """float32 (n_layers, n_tokens, k), nats"""
    entropy: np.ndarray
    """float32 (n_layers, n_tokens), nats"""
    kl_to_final: np.ndarray
    """float32 (n_layers, n_tokens), nats: KL(this block ‖ last block)"""
    next_ids: np.ndarray
    """int32 (n_tokens,): the token that actually follows; -1 after the last where nothing was sampled"""
    next_logprob: np.ndarray
    """float32 (n_layers, n_tokens), of next_ids; NaN where there is none"""
    next_rank: np.ndarray
    """int32 (n_layers, n_tokens), of next_ids; -1 where there is none"""
    target_ids: np.ndarray
    """int32 (n_targets,)"""
    target_logprobs: np.ndarray
    """float32 (n_layers, n_tokens, n_targets)"""
    target_ranks: np.ndarray
    """int32 (n_layers, n_tokens, n_targets)"""
    vocabulary: Mapping[int, str] = field(default_factory=dict)
    """text of every token id that occurs in this trajectory"""
    bytes_of_tokens: Mapping[int, str] = field(default_factory=dict)
    """of every fed token that holds part of a character: its bytes in hexadecimal digits"""
    prompt_length: int = 0
    """how many of the tokens are the prompt's; the rest were generated"""
    n_blocks: int = 0
    """blocks in the model (layers may be fewer)"""
    model: str = ""
    lens: str = "logit"
    circumstances: Circumstances = field(default_factory=Circumstances)
    """under what it was read: revision, dtype, steering, chat template, sampling"""
    timings: Mapping[str, float] = field(default_factory=dict)
    """seconds of the whole run, all its rows together, by phase: prefill and decode (the model's passes over prompt
    and new tokens), readout (the lens), total; on a GPU work counts in the phase that waits for it"""

    def __post_init__(self) -> None:
        n_layers, n_tokens, n_targets = len(self.layers), len(self.tokens), len(self.target_ids)
        top = (n_layers, n_tokens, self.top_ids.shape[-1] if self.top_ids.ndim == 3 else -1)
        target = (n_layers, n_tokens, n_targets)
        shapes = {
            **dict.fromkeys(PER_TOKEN, (n_tokens,)),
            **dict.fromkeys(PER_CELL, (n_layers, n_tokens)),
            **{"top_ids": top, "top_logprobs": top, "target_logprobs": target, "target_ranks": target},
            "target_ids": (n_targets,),
        }
        for name, shape in shapes.items():
            _check_array(name, getattr(self, name), shape)
        for name, values, kind in (("tokens", self.tokens, str), ("layers", self.layers, int)):
            if not all(isinstance(value, kind) for value in values):
                raise ValueError(f"{name} must be {kind.__name__}s, got {values[:3]}")
        kinds: dict[str, type] = {"n_blocks": int, "prompt_length": int, "site": str, "model": str, "lens": str}
        for name, wanted in kinds.items():
            if not isinstance(getattr(self, name), wanted):
                raise ValueError(f"{name} must be {wanted.__name__}, got {getattr(self, name)!r}")

    @property
    def text(self) -> str:
        """The fed tokens as one string; tokens that hold parts of one character make it together."""
        text, held = "", b""
        for token, token_id in zip(self.tokens, self.token_ids.tolist(), strict=True):
            if (part := self.bytes_of_tokens.get(token_id)) is not None:
                held += bytes.fromhex(part)
                continue
            text += held.decode(errors="replace") + token
            held = b""
        return text + held.decode(errors="replace")

    @property
    def characters(self) -> tuple[str, ...]:
        """What each fed token that holds part of a character makes with its neighbours; empty for any other."""
        parts = (self.bytes_of_tokens.get(token_id) for token_id in self.token_ids.tolist())
        return whole_characters([None if part is None else bytes.fromhex(part) for part in parts])

    def top(self, layer: int = -1, token: int = -1) -> list[tuple[str, float]]:
        """Most likely tokens with their probabilities at one cell; `top_ids` tells tokens of one text apart.

        Parameters
        ----------
        layer : int
            Block index; negative counts from the model's last block.
        token : int
            Token position; negative counts from the last that was fed, generated ones too.
        """
        row = self._layer_row(layer)
        if not isinstance(token, Integral) or not -self.n_tokens <= token < self.n_tokens:
            raise UserError(f"token {token!r} is outside this trajectory of {self.n_tokens} tokens")
        ids, logprobs = self.top_ids[row, token], self.top_logprobs[row, token]
        return [(self.token_text(i), float(p)) for i, p in zip(ids, np.exp(logprobs), strict=True)]

    def metric(self, name: str) -> np.ndarray:
        """One number per cell, (n_layers, n_tokens): "prob", "entropy", "kl" or "rank".

        "prob" is the probability of the cell's top token, "rank" the rank of the token that follows (-1: none).
        """
        if name == "prob":
            return np.asarray(np.exp(self.top_logprobs[..., 0]))
        if name == "entropy":
            return self.entropy
        if name == "kl":
            return self.kl_to_final
        if name == "rank":
            return self.next_rank
        raise UserError(f"metric {shown(name)} is unknown; one of {', '.join(METRICS)}")

    def truncated(self, n_tokens: int) -> Self:
        """The same trajectory over its first `n_tokens` tokens."""
        cut: dict[str, Any] = {"tokens": self.tokens[:n_tokens]}
        cut |= {name: getattr(self, name)[:n_tokens] for name in PER_TOKEN}
        cut |= {name: getattr(self, name)[:, :n_tokens] for name in (*PER_CELL, *PER_CELL_MANY)}
        return replace(self, **cut, prompt_length=min(self.prompt_length, n_tokens))

    def _layer_row(self, layer: int) -> int:
        block = layer + self.n_blocks if isinstance(layer, Integral) and layer < 0 else layer
        if not isinstance(layer, Integral) or block not in self.layers:
            raise UserError(f"layer {layer!r} was not read; this trajectory holds {format_layers(self.layers)}")
        return self.layers.index(block)

    def _at_layers(self, layers: Any) -> Self:
        """The same over some of its layers."""
        rows = self._rows_of(layers)
        cut = {name: getattr(self, name)[rows] for name in (*PER_CELL, *PER_CELL_MANY)}
        return replace(self, layers=tuple(self.layers[row] for row in rows), **cut)

    def _rows_of(self, layers: Any) -> list[int]:
        """Places of some layers among those that were read."""
        wanted = parse_layers(layers, self.n_blocks)
        rows = [row for row, layer in enumerate(self.layers) if layer in wanted]
        if not rows:
            raise UserError(f"layers {layers!r} were not read; the trajectory holds {list(self.layers)}")
        return rows

    def _followed_by(self, more: Self) -> Self:
        """The same with the tokens after it.

        What follows the last token is now known; its rank and probability are taken from the top k, and stay unknown
        where it is not among them.
        """
        same = ("layers", "site", "n_blocks")
        if any(getattr(self, name) != getattr(more, name) for name in same) or (
            self.top_ids.shape[-1] != more.top_ids.shape[-1] or not np.array_equal(self.target_ids, more.target_ids)
        ):
            raise UserError(f"cannot append {more!r} to {self!r}: other layers, site, targets or top_k")
        if not more.n_tokens:
            return self
        one = self._leading_to(int(more.token_ids[0])) if self.n_tokens else self
        arrays: dict[str, Any] = {
            name: np.concatenate([getattr(one, name), getattr(more, name)], axis=axis)
            for axis, names in enumerate((PER_TOKEN, (*PER_CELL, *PER_CELL_MANY)))
            for name in names
        }
        return replace(
            one,
            tokens=one.tokens + more.tokens,
            vocabulary={**one.vocabulary, **more.vocabulary},
            bytes_of_tokens={**one.bytes_of_tokens, **more.bytes_of_tokens},
            prompt_length=one.prompt_length if one.prompt_length < one.n_tokens else one.n_tokens + more.prompt_length,
            **arrays,
        )

    def _leading_to(self, token_id: int) -> Self:
        """The same with what follows its last token filled in, if that was not known."""
        if self.next_ids[-1] == token_id:
            return self
        next_ids, rank, logprob = (getattr(self, name).copy() for name in ("next_ids", "next_rank", "next_logprob"))
        here = self.top_ids[:, -1] == token_id
        found = here.any(-1)
        place = here.argmax(-1)
        next_ids[-1] = token_id
        rank[:, -1] = np.where(found, place + 1, -1)
        values = np.take_along_axis(self.top_logprobs[:, -1], place[:, None], -1)[:, 0]
        logprob[:, -1] = np.where(found, values, np.nan)
        return replace(self, next_ids=next_ids, next_rank=rank, next_logprob=logprob)


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    kind = np.integer if name.endswith(("ids", "rank", "ranks")) else np.floating
    if not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} holds {array.dtype}, expected {kind.__name__} numbers")
