"""Residuals → top-k, log-sum-exp, entropy, KL and ranks, without ever holding a row of logits per layer and token.

The vocabulary is walked in tiles. For each tile of the lm_head's rows, every block's residuals are multiplied
with it into one reused float32 buffer, and running statistics are brought up to date (the online softmax of
Milakov & Gimelshein 2018, arXiv 1805.02867, extended to entropy and KL). The tile of weights stays in the
processor's cache while all blocks use it. Memory is three tiles and the statistics, whatever the vocabulary and
the length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nblens.model.architecture import Architecture

__all__ = ["Readout", "ReadoutResult"]

_TILE_ELEMENTS = 2**20
_TILE_COLUMNS = 4096
# Stands for −inf in sums of p·log q: it makes 0·(−inf) a 0, and anything else so large that it is seen as infinite
_FLOOR = -1e30


@dataclass(frozen=True)
class ReadoutResult:
    """Statistics of n rows read at n_slots places; float32 on the readout's device. None: not asked for."""

    top_ids: torch.Tensor
    """int64 (n_slots, n, k)"""
    top_logprobs: torch.Tensor
    """(n_slots, n, k), nats"""
    entropy: torch.Tensor | None
    """(n_slots, n), nats"""
    kl_to_final: torch.Tensor | None
    """(n_slots, n), nats"""
    wanted_logprobs: torch.Tensor
    """(n_slots, n, n_wanted), nats"""
    wanted_ranks: torch.Tensor
    """int64 (n_slots, n, n_wanted); 1 is the most likely"""


class Readout:
    """The model's tail and lm_head, applied to residuals of any block.

    Parameters
    ----------
    architecture : Architecture
        A proven architecture: the readout of the last block equals the model's logits.
    tile_elements, tile_columns : int
        Size of a tile of logits, and how many vocabulary entries it spans.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        tile_elements: int = _TILE_ELEMENTS,
        tile_columns: int = _TILE_COLUMNS,
    ) -> None:
        self._architecture = architecture
        self._head = _Head(architecture, tile_elements)
        self._tile_elements = tile_elements
        self._tile_columns = tile_columns if self._head.sliceable else architecture.vocab_size

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Full logits of a few rows, float32 (n, vocab_size): for sampling checks and tests, not for lenses."""
        normed = self._architecture.apply_tail(hidden)
        return self._head.tile(normed, 0, self._architecture.vocab_size)

    def read(
        self,
        hidden: torch.Tensor,
        *,
        top_k: int,
        wanted: torch.Tensor | None = None,
        entropy: bool = False,
        final: int | None = None,
    ) -> ReadoutResult:
        """Read residuals out.

        Parameters
        ----------
        hidden : torch.Tensor
            (n_slots, n, d_model). **Overwritten** with its final norm: the buffer is the caller's to reuse.
        top_k : int
            How many of the most likely tokens.
        wanted : torch.Tensor, optional
            int64 (n, n_wanted): ids whose log-probability and rank are asked for at every row; -1 for none.
        entropy : bool
            Compute the entropy too.
        final : int, optional
            Slot that holds the last block: compute KL(slot ‖ last block) of every slot.
        """
        normed = self._normalise(hidden)
        n_slots, n = normed.shape[:2]
        if wanted is None:
            wanted = torch.empty((n, 0), dtype=torch.long, device=normed.device)
        stats = _RunningStats(normed, min(top_k, self._architecture.vocab_size), wanted, entropy, final)
        stats.wanted_logits = self._wanted_logits(normed, wanted)
        order = [slot for slot in range(n_slots) if slot != final]
        for start in range(0, self._architecture.vocab_size, self._tile_columns):
            stop = min(start + self._tile_columns, self._architecture.vocab_size)
            for rows in _spans(n, max(1, self._tile_elements // (stop - start))):
                self._read_tile(stats, normed, final, order, rows, start, stop)
        return stats.result()

    def _normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the tail, in place where it keeps the width."""
        slots = []
        for slot in hidden:
            normed = self._architecture.apply_tail(slot)
            slots.append(slot.copy_(normed) if normed.shape == slot.shape else normed)
        return hidden if slots[0].shape == hidden[0].shape else torch.stack(slots)

    def _wanted_logits(self, normed: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        """Logits of the wanted ids alone, (n_slots, n, n_wanted), to count what lies above them."""
        return self._head.pick(normed, wanted.clamp(min=0))

    def _read_tile(
        self,
        stats: _RunningStats,
        normed: torch.Tensor,
        final: int | None,
        order: list[int],
        rows: slice,
        start: int,
        stop: int,
    ) -> None:
        final_tile = None
        if final is not None:
            final_tile = self._head.tile(normed[final, rows], start, stop)
            stats.update(slice(final, final + 1), rows, final_tile[None], start, final_tile)
        n_rows = rows.stop - rows.start
        per_tile = max(1, self._tile_elements // (n_rows * (stop - start)))
        for group in _runs(order, per_tile):
            tile = self._head.tile(normed[group, rows].flatten(0, 1), start, stop)
            stats.update(group, rows, tile.unflatten(0, (-1, n_rows)), start, final_tile)


class _Head:
    """The lm_head, a tile of the vocabulary at a time where its weight can be sliced."""

    def __init__(self, architecture: Architecture, tile_elements: int) -> None:
        self._module = architecture.lm_head
        self._transform = architecture.transform
        self._whole_rows = max(1, tile_elements // architecture.vocab_size)
        weight = getattr(self._module, "weight", None)
        # An offloaded weight sits on "meta" outside its module's forward, a quantized one is not a matrix, and a
        # user's hook on the module may change what it returns
        self.sliceable = (
            type(self._module) is nn.Linear
            and not weight.is_meta
            and type(weight.data) is torch.Tensor
            and not self._module._forward_hooks
            and not self._module._forward_pre_hooks
        )

    def tile(self, normed: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Float32 logits of vocabulary entries start … stop-1, (n, stop-start)."""
        if not self.sliceable:
            return self._all(normed)[..., start:stop]
        bias = None if self._module.bias is None else self._module.bias[start:stop]
        logits = F.linear(normed, self._module.weight[start:stop], bias).float()
        return self._transform.apply_(logits)

    def pick(self, normed: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Float32 logits of chosen ids per row, (n_slots, n, d), (n, m) → (n_slots, n, m).

        By the same product as `tile`, not by a dot product per row: in half precision the two round differently.
        """
        columns, place = ids.unique(return_inverse=True)
        if not self.sliceable:
            parts = normed.flatten(0, 1).split(self._whole_rows)
            logits = torch.cat([self._all(part)[:, columns] for part in parts]).unflatten(0, normed.shape[:2])
            return logits.gather(-1, place.expand(len(normed), -1, -1))
        weight = self._module.weight[columns]
        bias = None if self._module.bias is None else self._module.bias[columns]
        logits = [self._transform.apply_(F.linear(slot, weight, bias).float()).gather(-1, place) for slot in normed]
        return torch.stack(logits)

    def _all(self, normed: torch.Tensor) -> torch.Tensor:
        return self._transform.apply_(self._module(normed).float())


class _RunningStats:
    """Online softmax statistics of (n_slots, n) rows over tiles of the vocabulary.

    With m the running maximum: `total` = Σ e^(z−m), `spread` = Σ e^(z−m)·(z−m), `cross` = Σ e^(z−m)·(z_f−m_f),
    where z_f are the last block's logits and m_f their running maximum.
    """

    def __init__(
        self, normed: torch.Tensor, top_k: int, wanted: torch.Tensor, entropy: bool, final: int | None
    ) -> None:
        shape, device = normed.shape[:2], normed.device
        self._top_k, self._wanted, self._final = top_k, wanted, final
        self._entropy = entropy
        self.wanted_logits: torch.Tensor
        lowest = torch.finfo(torch.float32).min  # finite, so that a tile of −inf leaves no NaN
        self._max = torch.full(shape, lowest, device=device)
        self._total = torch.zeros(shape, device=device)
        self._spread = torch.zeros(shape, device=device)
        self._cross = torch.zeros(shape, device=device)
        self._top_values = torch.empty((*shape, top_k), device=device)
        self._top_ids = torch.empty((*shape, top_k), dtype=torch.long, device=device)
        self._found = torch.full((*shape, wanted.shape[1]), -torch.inf, device=device)
        self._above = torch.zeros((*shape, wanted.shape[1]), dtype=torch.long, device=device)
        self._final_max = torch.full(shape[1:], lowest, device=device)
        self._final_shrink = torch.zeros(0)

    def update(
        self, slots: slice, rows: slice, tile: torch.Tensor, start: int, final_tile: torch.Tensor | None
    ) -> None:
        """Take in a tile, (slots, rows, columns), of which `final_tile`, (rows, columns), is the last block's.

        The last block itself must come first.
        """
        place = (slots, rows)
        self._update_top(place, tile, start)
        self._update_wanted(place, tile, start)
        new_max = torch.maximum(self._max[place], tile.amax(-1))
        shrink = (self._max[place] - new_max).clamp_(min=_FLOOR)  # −inf at the first tile
        self._max[place] = new_max
        scale = shrink.exp()
        shifted = tile.sub(new_max[..., None]).clamp_(min=_FLOOR)
        weights = shifted.exp()
        if self._final is not None:
            self._update_cross(place, weights, scale, final_tile)
        if self._entropy or self._final is not None:
            old = self._spread[place] + self._total[place] * shrink
            self._spread[place] = old * scale + (weights * shifted).sum(-1)
        self._total[place] = self._total[place] * scale + weights.sum(-1)

    def _update_cross(
        self, place: tuple[slice, slice], weights: torch.Tensor, scale: torch.Tensor, final_tile: torch.Tensor
    ) -> None:
        slots, rows = place
        if slots == slice(self._final, self._final + 1):
            new = torch.maximum(self._final_max[rows], final_tile.amax(-1))
            self._final_shrink = (self._final_max[rows] - new).clamp_(min=_FLOOR)
            self._final_max[rows] = new
        shifted = final_tile.sub(self._final_max[rows][:, None]).clamp_(min=_FLOOR)
        old = self._cross[place] + self._total[place] * self._final_shrink
        self._cross[place] = old * scale + torch.einsum("snv,nv->sn", weights, shifted)

    def _update_top(self, place: tuple[slice, slice], tile: torch.Tensor, start: int) -> None:
        before = min(self._top_k, start)  # entries of the running top-k that are filled
        after = min(self._top_k, start + tile.shape[-1])
        values, ids = tile.topk(min(self._top_k, tile.shape[-1]), dim=-1)
        values = torch.cat([self._top_values[place][..., :before], values], -1)
        ids = torch.cat([self._top_ids[place][..., :before], ids + start], -1)
        values, order = values.topk(after, dim=-1)
        self._top_values[place][..., :after] = values
        self._top_ids[place][..., :after] = ids.gather(-1, order)

    def _update_wanted(self, place: tuple[slice, slice], tile: torch.Tensor, start: int) -> None:
        for i in range(self._wanted.shape[1]):
            ids = self._wanted[place[1], i]
            above = (tile > self.wanted_logits[(*place, i)][..., None]).sum(-1)
            inside = (ids >= start) & (ids < start + tile.shape[-1])
            column = (ids - start).clamp(0, tile.shape[-1] - 1)
            own = tile.gather(-1, column.expand(tile.shape[:2])[..., None])[..., 0]
            # A token is never above itself, though its logit here may differ from `wanted_logits` by a rounding
            self._above[(*place, i)] += above - (inside & (own > self.wanted_logits[(*place, i)])).long()
            self._found[(*place, i)] = torch.where(inside, own, self._found[(*place, i)])

    def result(self) -> ReadoutResult:
        """Turn sums into log-probabilities, entropies, divergences and ranks."""
        log_total = self._total.log()
        normaliser = (self._max + log_total)[..., None]
        missing = (self._wanted < 0).expand(self._found.shape)
        entropy = kl = None
        if self._entropy:
            entropy = (log_total - self._spread / self._total).clamp_(min=0)
        if self._final is not None:
            kl = (self._spread - self._cross) / self._total - log_total + log_total[self._final]
            kl = kl.clamp_(min=0)  # rounding may leave −1e-7
            kl[self._final] = 0.0
            kl[kl > -_FLOOR / 1e10] = torch.inf
        return ReadoutResult(
            top_ids=self._top_ids,
            top_logprobs=self._top_values - normaliser,
            entropy=entropy,
            kl_to_final=kl,
            wanted_logprobs=(self._found - normaliser).masked_fill(missing, torch.nan),
            wanted_ranks=(self._above + 1).masked_fill(missing, -1),
        )


def _spans(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def _runs(order: list[int], size: int) -> list[slice]:
    """Cut ascending slots into runs of neighbours, at most `size` long, so that a run is a view."""
    runs: list[slice] = []
    for slot in order:
        if runs and runs[-1].stop == slot and slot - runs[-1].start < size:
            runs[-1] = slice(runs[-1].start, slot + 1)
        else:
            runs.append(slice(slot, slot + 1))
    return runs
