"""Residuals → top-k, log-probabilities, entropy, KL and ranks, without holding a row of logits per layer and token.

The vocabulary is walked in tiles. For each tile of the lm_head's rows, every block's residuals are multiplied with it
into one reused float32 buffer, which brings running statistics up to date. The tile of weights stays in the
processor's cache while all blocks use it. Memory is three tiles and the statistics, whatever the vocabulary and the
length. Where the lm_head is cut along the vocabulary, each rank walks its own rows, and the statistics are merged.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nblens.errors import UnsupportedModelError, first_line
from nblens.model.architecture import Architecture, logit_tolerance, output_device
from nblens.readout.fused_readout import FusedReadout, can_read, runs_fast
from nblens.readout.online_softmax import OnlineSoftmax
from nblens.readout.vocabulary import VocabularyShard, find_shard

__all__ = ["TILE_ELEMENTS", "Readout", "ReadoutResult"]

TILE_ELEMENTS = 2**20
_TILE_COLUMNS = 4096
_PROOF_ROWS = 4


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
    kl_of_pairs: torch.Tensor | None
    """(n_slots, n_pairs), nats"""
    wanted_logprobs: torch.Tensor
    """(n_slots, n, n_wanted), nats"""
    wanted_ranks: torch.Tensor
    """int64 (n_slots, n, n_wanted); 1 is the most likely, -1: not asked for"""
    normed: torch.Tensor
    """(n_slots, n, …): what the lm_head was given; valid as long as the caller leaves its buffer alone"""
    normaliser: torch.Tensor
    """(n_slots, n): log-sum-exp of the logits"""
    kernels: FusedReadout | None
    """what read it; None: by tiles"""

    def reordered(self, order: torch.Tensor) -> ReadoutResult:
        """The same with row `order[i]` in the place of row i; `normed` is changed itself, a slot at a time."""
        for slot in self.normed:
            slot.copy_(slot[order])
        rows = ("top_ids", "top_logprobs", "entropy", "kl_to_final", "wanted_logprobs", "wanted_ranks", "normaliser")
        values = {name: getattr(self, name) for name in rows}
        return replace(self, **{name: value[:, order] for name, value in values.items() if value is not None})


class Readout:
    """The model's tail and lm_head, applied to residuals of any block.

    Parameters
    ----------
    architecture : Architecture
        A proven architecture: the readout of the last block equals the model's logits.
    tile_elements, tile_columns : int
        Size of a tile of logits, and how many vocabulary entries it spans.
    shard : VocabularyShard, optional
        The part of the lm_head to read, with others who read the rest. None: found out.
    fused : bool, optional
        Read by the kernels of `fused_readout`. None: where they are made for the device, and agree with this one at
        `prove`. What they cannot do is read by tiles.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        tile_elements: int = TILE_ELEMENTS,
        tile_columns: int = _TILE_COLUMNS,
        shard: VocabularyShard | None = None,
        fused: bool | None = None,
    ) -> None:
        self._architecture = architecture
        self._fused = fused
        self._shard = shard or find_shard(architecture.lm_head)
        self._head = _Head(architecture, tile_elements, self._shard)
        self._tile_elements, self._tile_columns = tile_elements, tile_columns

    @torch.no_grad()
    def prove(self) -> float:
        """Read random residuals out by tiles of the vocabulary, and by the model's own modules; both must agree.

        Returns
        -------
        float
            Largest absolute difference of a logit.

        Raises
        ------
        UnsupportedModelError
            The difference is beyond `logit_tolerance`: the lm_head does more than multiply with its weight.
        """
        architecture = self._architecture
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn((_PROOF_ROWS, architecture.d_model), generator=generator, dtype=torch.float32)
        normed = architecture.apply_tail(hidden.to(output_device(architecture), architecture.dtype))
        expected = architecture.transform.apply_(architecture.lm_head(normed).float())
        error = 0.0
        for columns in self._tile_spans(self._tile_columns):
            tiled = self._head.tile(normed, columns.start, torch.empty_like(expected[:, columns]))
            error = max(error, (tiled - expected[:, columns]).abs().max().item())
        tolerance = logit_tolerance(expected, architecture.dtype)
        if not error <= tolerance:
            raise UnsupportedModelError(
                f"{architecture.family}: its {architecture.lm_head_path} differs from a product with its weight by "
                f"{error:.3g} (allowed {tolerance:.3g})"
            )
        self._prove_kernels(normed.view(2, -1, normed.shape[-1]), tolerance)
        return error

    def _prove_kernels(self, normed: torch.Tensor, tolerance: float) -> None:
        """Read by tiles from now on where the kernels fail on this device, unless they were asked for."""
        kernels = self._kernels(normed, 1, 1, None)
        if kernels is None:
            return
        try:
            error = kernels.error(normed)
        except Exception as failure:  # of a compiler and a driver: they have no common error
            if self._fused:
                raise
            reason = first_line(failure)
        else:
            if error <= tolerance:
                return
            reason = f"they differ from float64 sums by {error:.3g} (allowed {tolerance:.3g})"
            if self._fused:
                raise UnsupportedModelError(f"{self._architecture.family}: the fused kernels fail: {reason}")
        warnings.warn(f"the lens reads without its fused kernels, and slower: {reason}", RuntimeWarning, stacklevel=3)
        self._fused = False

    @torch.no_grad()
    def read(
        self,
        hidden: torch.Tensor,
        *,
        top_k: int,
        wanted: torch.Tensor | None = None,
        ranks: bool = True,
        entropy: bool = False,
        final: int | None = None,
        n_pairs: int = 0,
    ) -> ReadoutResult:
        """Read residuals out.

        Parameters
        ----------
        hidden : torch.Tensor
            (n_slots, n, d_model). **Overwritten** with its final norm: the buffer is the caller's to reuse.
        top_k : int
            How many of the most likely tokens.
        wanted : torch.Tensor, optional
            int64 (n, n_wanted): ids whose log-probability is asked for at every row; -1 for none.
        ranks, entropy : bool
            Compute the wanted ids' ranks, and the entropy, too.
        final : int, optional
            Slot that holds the last block: compute KL(slot ‖ last block) of every slot.
        n_pairs : int
            Compute KL(row ‖ next row) of so many pairs of rows: 0 and 1, 2 and 3, … By tiles alone.
        """
        normed = self._normalise(hidden)
        if wanted is None:
            wanted = torch.empty((normed.shape[1], 0), dtype=torch.long, device=normed.device)
        asked: dict[str, Any] = {"ranks": ranks, "entropy": entropy, "final": final, "n_pairs": n_pairs}
        result = self._walk(normed, top_k, wanted, **asked)
        if normed.dtype == torch.float16 and self._head.sliceable and not result.normaliser.isfinite().all():
            # a logit beyond 65504 was inf
            result = self._walk(normed.float(), top_k, wanted, **asked)
        return result

    def _walk(
        self,
        normed: torch.Tensor,
        top_k: int,
        wanted: torch.Tensor,
        *,
        ranks: bool,
        entropy: bool,
        final: int | None,
        n_pairs: int,
    ) -> ReadoutResult:
        """Walk the vocabulary; products are taken in the dtype of `normed`."""
        n_slots, vocab_size = len(normed), self._architecture.vocab_size
        counted = ranks and wanted.numel() > 0
        columns_here = self._head.columns
        top_k_here = min(top_k, len(columns_here))
        kernels = self._kernels(normed, top_k_here, wanted.shape[1] if counted else 0, final) if not n_pairs else None
        thresholds = self._head.pick(normed, wanted.clamp(min=0), kernels) if counted else None
        stats = OnlineSoftmax(
            n_slots,
            top_k_here,
            wanted,
            thresholds=thresholds,
            entropy=entropy,
            final=final,
            n_pairs=n_pairs,
            first=columns_here.start,
        )
        if kernels is not None:
            found = thresholds
            if wanted.numel() and not counted:
                found = self._head.pick_here(normed, wanted.clamp(min=0), kernels)
            kernels.read(stats, normed, top_k_here, wanted=wanted, thresholds=thresholds, found=found, final=final)
        else:
            # top-k alone needs one buffer of the three: it may be larger, which makes fewer and better products
            larger = 1 if stats.needs_scratch else 2
            tiles = _Tiles(normed, self._head, stats, final, larger * self._tile_elements)
            for columns in self._tile_spans(larger * self._tile_columns):
                tiles.read(columns.start, columns.stop)
        if self._shard is not None:
            stats.merge(self._shard.gather, min(top_k, vocab_size))
        top_ids, top_logprobs = stats.top
        wanted_logprobs, wanted_ranks = stats.wanted
        return ReadoutResult(
            top_ids=top_ids,
            top_logprobs=top_logprobs,
            entropy=stats.entropy,
            kl_to_final=stats.kl_to_final,
            kl_of_pairs=stats.kl_of_pairs,
            wanted_logprobs=wanted_logprobs,
            wanted_ranks=wanted_ranks,
            normed=normed,
            normaliser=stats.normaliser,
            kernels=kernels,
        )

    @torch.no_grad()
    def more_logprobs(self, result: ReadoutResult, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of further ids of what was read, without another pass over the vocabulary.

        Parameters
        ----------
        ids : torch.Tensor
            int64 (n, m); -1 for none.

        Returns
        -------
        torch.Tensor
            float32 (n_slots, n, m), nats; NaN where there is no id.
        """
        logits = self._head.pick(result.normed, ids.clamp(min=0), result.kernels)
        return (logits - result.normaliser[..., None]).masked_fill((ids < 0).expand(logits.shape), torch.nan)

    @torch.no_grad()
    def logprobs_of(self, result: ReadoutResult, rows: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of an id at each place and row of some rows, float32 (n_slots, m), nats.

        Parameters
        ----------
        rows : torch.Tensor
            int64 (m,): of what was read.
        ids : torch.Tensor
            int64 (n_slots, m).
        """
        slots = [  # one at a time: the ids of all would be many columns for each of them
            self._head.pick(normed[None, rows], own[:, None], result.kernels)[0, :, 0]
            for normed, own in zip(result.normed, ids, strict=True)
        ]
        return torch.stack(slots) - result.normaliser[:, rows]

    def _kernels(self, normed: torch.Tensor, top_k: int, n_counted: int, final: int | None) -> FusedReadout | None:
        """Make what reads such a request in one kernel; None: to be read by tiles."""
        if self._fused is False or not self._head.sliceable:
            return None
        weight, bias = self._head.held
        if (self._fused is None and not runs_fast(weight)) or not can_read(normed, weight, top_k, n_counted):
            return None
        first = self._head.columns.start
        return FusedReadout.of(normed, weight, bias, self._architecture.transform, first=first, final=final)

    def _tile_spans(self, columns: int) -> list[slice]:
        here = self._head.columns
        return _spans(here, columns if self._head.sliceable else len(here))

    def _normalise(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the tail, in place where it keeps the width."""
        slots = []
        for slot in hidden:
            normed = self._architecture.apply_tail(slot)
            slots.append(slot.copy_(normed) if normed.shape == slot.shape else normed)
        return hidden if slots[0].shape == hidden[0].shape else torch.stack(slots)


class _Tiles:
    """Walks one range of the vocabulary after another, through buffers that live as long as the read."""

    def __init__(
        self, normed: torch.Tensor, head: _Head, stats: OnlineSoftmax, final: int | None, tile_elements: int
    ) -> None:
        self._normed, self._head, self._stats, self._final = normed, head, stats, final
        self._tile_elements = tile_elements
        self._order = [slot for slot in range(len(normed)) if slot != final]
        self._buffers: dict[str, torch.Tensor] = {}

    def read(self, start: int, stop: int) -> None:
        """Take in vocabulary entries start … stop-1 of every slot and row."""
        columns = stop - start
        even = 2 * max(1, self._tile_elements // columns // 2)  # both rows of a pair lie in one tile
        for rows in _spans(range(self._normed.shape[1]), even):
            n_rows = rows.stop - rows.start
            final_tile = None
            if self._final is not None:
                slots = slice(self._final, self._final + 1)
                final_tile = self._update(slots, rows, start, self._buffer("final", 1, n_rows, columns), None)[0]
            per_tile = max(1, self._tile_elements // (n_rows * columns))
            for slots in _runs(self._order, per_tile):
                tile = self._buffer("tile", slots.stop - slots.start, n_rows, columns)
                self._update(slots, rows, start, tile, final_tile)

    def _update(
        self, slots: slice, rows: slice, start: int, tile: torch.Tensor, final_tile: torch.Tensor | None
    ) -> torch.Tensor:
        self._head.tile(self._normed[slots, rows].flatten(0, 1), start, tile.flatten(0, 1))
        scratch = self._buffer("scratch", *tile.shape) if self._stats.needs_scratch else None
        self._stats.update(slots, rows, tile, start, scratch=scratch, final_tile=final_tile)
        return tile

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        """A view of the buffer of that name, made at its first use, when tiles are largest."""
        size = torch.Size(shape).numel()
        if name not in self._buffers or len(self._buffers[name]) < size:
            self._buffers[name] = torch.empty(size, dtype=torch.float32, device=self._normed.device)
        return self._buffers[name][:size].view(shape)


class _Head:
    """The lm_head, or the part of it that is here; by tiles of the vocabulary where its weight can be sliced."""

    def __init__(self, architecture: Architecture, tile_elements: int, shard: VocabularyShard | None) -> None:
        self._module, self._shard = architecture.lm_head, shard
        self._vocab_size = architecture.vocab_size
        self._transform = architecture.transform
        self._whole_rows = max(1, tile_elements // architecture.vocab_size)

    @property
    def columns(self) -> range:
        """Vocabulary entries that are read here."""
        if self._shard is None:
            return range(self._vocab_size)
        return range(self._shard.first, self._shard.first + len(self._shard.weight))

    @property
    def sliceable(self) -> bool:
        """Whether a product with rows of its weight is what the module would return.

        An offloaded weight sits on "meta" outside its module's forward, a quantized one is not a matrix, and a user's
        hook on the module may change what it returns.
        """
        module = self._module
        return self._shard is not None or (
            type(module) is nn.Linear
            and not module.weight.is_meta
            and type(module.weight.data) is torch.Tensor
            and not module._forward_hooks
            and not module._forward_pre_hooks
        )

    def tile(self, normed: torch.Tensor, start: int, out: torch.Tensor) -> torch.Tensor:
        """Logits of vocabulary entries from `start` on, as many as `out`, float32 (n, columns), has room for."""
        stop = start + out.shape[-1]
        if not self.sliceable:
            return out.copy_(self._all(normed)[..., start:stop])
        weight, bias = self._rows(slice(start - self.columns.start, stop - self.columns.start), normed.dtype)
        if normed.dtype != torch.float32:
            out.copy_(F.linear(normed, weight, bias))
        elif bias is None:
            torch.mm(normed, weight.T, out=out)
        else:
            torch.addmm(bias, normed, weight.T, out=out)
        return self._transform.apply_(out)

    def pick(self, normed: torch.Tensor, ids: torch.Tensor, kernels: FusedReadout | None) -> torch.Tensor:
        """Float32 logits of chosen ids per row, (n_slots, n, d), (n, m) → (n_slots, n, m).

        By the same product as `tile` or the kernels, not by a dot product per row: the two round differently.
        """
        logits = self.pick_here(normed, ids, kernels)
        return logits if self._shard is None else torch.stack(self._shard.gather(logits)).amax(0)

    def pick_here(self, normed: torch.Tensor, ids: torch.Tensor, kernels: FusedReadout | None) -> torch.Tensor:
        """As `pick`; -inf for ids whose weights are elsewhere."""
        if self._shard is None:
            return self._picked(normed, ids, kernels)
        here, rows = self._shard.inside(ids)
        if not here.any():
            return normed.new_full((len(normed), *ids.shape), -torch.inf, dtype=torch.float32)
        return self._picked(normed, rows, kernels).masked_fill(~here, -torch.inf)

    def _picked(self, normed: torch.Tensor, rows: torch.Tensor, kernels: FusedReadout | None) -> torch.Tensor:
        columns: torch.Tensor
        columns, place = torch.unique(rows, return_inverse=True)
        if not self.sliceable:
            parts = torch.split(normed.flatten(0, 1), self._whole_rows)
            flat = torch.cat([self._all(part)[:, columns] for part in parts])
            return torch.unflatten(flat, 0, normed.shape[:2]).gather(-1, place.expand(len(normed), -1, -1))
        if kernels is not None:
            return torch.stack([kernels.logits(slot, columns).gather(-1, place) for slot in normed])
        weight, bias = self._rows(columns, normed.dtype)
        logits = [self._transform.apply_(F.linear(slot, weight, bias).float()).gather(-1, place) for slot in normed]
        return torch.stack(logits)

    def _rows(self, rows: slice | torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights and biases of some of the rows that are here."""
        weight, bias = self.held
        return weight[rows].to(dtype), None if bias is None else bias[rows].to(dtype)

    @property
    def held(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a head that is `sliceable`."""
        held: Any = self._module if self._shard is None else self._shard
        return held.weight, held.bias

    def _all(self, normed: torch.Tensor) -> torch.Tensor:
        return self._transform.apply_(self._module(normed).float())


def _spans(of: range, size: int) -> list[slice]:
    return [slice(start, min(start + size, of.stop)) for start in range(of.start, of.stop, max(1, size))]


def _runs(order: list[int], size: int) -> list[slice]:
    """Cut ascending slots into runs of neighbours, at most `size` long, so that a run is a view."""
    runs: list[slice] = []
    for slot in order:
        if runs and runs[-1].stop == slot and slot - runs[-1].start < size:
            runs[-1] = slice(runs[-1].start, slot + 1)
        else:
            runs.append(slice(slot, slot + 1))
    return runs
