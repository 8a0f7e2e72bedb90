"""`OnlineSoftmax`: top-k, log-sum-exp, entropy, KL and ranks of many rows, brought up to date tile by tile.

The online softmax of Milakov & Gimelshein 2018 (arXiv 1805.02867), extended to entropy and KL. With m a row's running
maximum over the columns seen so far,

    total = Σ e^(z−m)      spread = Σ e^(z−m)·(z−m)      cross = Σ e^(z−m)·(z_f−m_f)

where z_f are the last block's logits and m_f their running maximum; for the KL between two rows, z_f are those of the
other row. A tile is worked on in place: a temporary of its
size would cost more than the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["OnlineSoftmax", "top_of_rows"]

# Stands for −inf in sums of p·log q: it makes 0·(−inf) a 0, and anything else so large that it is seen as infinite
_FLOOR = -1e30
_SCALARS = ("max", "total", "spread", "cross", "apart")
_GROUP = 64  # columns whose maximum is looked at before the columns themselves


class OnlineSoftmax:
    """Running statistics of (n_slots, n) rows of logits.

    Parameters
    ----------
    n_slots : int
        Places that are read (blocks).
    top_k : int
        How many of the largest logits to keep.
    wanted : torch.Tensor
        int64 (n, n_wanted): ids whose logits are kept at every row; -1 for none.
    thresholds : torch.Tensor, optional
        float32 (n_slots, n, n_wanted), the wanted ids' logits: count what lies above them.
    entropy : bool
        Compute the entropy too.
    final : int, optional
        Slot of the last block: compute KL(slot ‖ last block).
    n_pairs : int
        Of the first rows, compute KL(row ‖ next row) of every second one, so many: 0 and 1, 2 and 3, …
    first : int
        The column that the first tile begins with.
    """

    def __init__(
        self,
        n_slots: int,
        top_k: int,
        wanted: torch.Tensor,
        *,
        thresholds: torch.Tensor | None = None,
        entropy: bool = False,
        final: int | None = None,
        n_pairs: int = 0,
        first: int = 0,
    ) -> None:
        self._first = first
        self._n_paired = 2 * n_pairs
        self._top_k, self._wanted, self._thresholds = top_k, wanted, thresholds
        self._entropy, self._final = entropy, final
        rows, many = (n_slots, len(wanted)), (n_slots, *wanted.shape)

        def filled(shape: tuple[int, ...], value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full(shape, value, dtype=dtype, device=wanted.device)

        self._max = filled(rows, torch.finfo(torch.float32).min)  # finite, so that a tile of −inf leaves no NaN
        self._total = filled(rows, 0)
        self._spread = filled(rows, 0)
        self._cross = filled(rows, 0)
        self._apart = filled(rows, 0)  # as `_cross`, with the next row in the place of the last block
        self._final_shrink = filled(rows[1:], 0)
        self._top_values = filled((*rows, top_k), -torch.inf)
        self._top_ids = filled((*rows, top_k), 0, torch.long)
        self._found = filled(many, -torch.inf)
        self._above = filled(many, 0, torch.long)

    @property
    def needs_scratch(self) -> bool:
        """Whether sums beside the log-sum-exp are asked for."""
        return self._entropy or self._final is not None or self._n_paired > 0

    def update(
        self,
        slots: slice,
        rows: slice,
        tile: torch.Tensor,
        start: int,
        *,
        scratch: torch.Tensor | None = None,
        final_tile: torch.Tensor | None = None,
    ) -> None:
        """Take in the logits of columns `start` … of some rows.

        Parameters
        ----------
        slots, rows : slice
            What the tile is of. Of every tile, the last block comes first; both rows of a pair come at once.
        tile : torch.Tensor
            float32 (slots, rows, columns); **overwritten**: the running maximum is taken off.
        scratch : torch.Tensor, optional
            Memory of the tile's shape, where `needs_scratch`.
        final_tile : torch.Tensor, optional
            (rows, columns): the last block's tile as its own update left it.
        """
        place = (slots, rows)
        self._update_top(place, tile, start)
        self._update_wanted(place, tile, start)
        # the largest logit so far is the first of the running top-k
        new_max = self._top_values[place][..., 0].clamp(min=torch.finfo(torch.float32).min)
        shrink = (self._max[place] - new_max).clamp_(min=_FLOOR)  # −inf at the first tile
        self._max[place] = new_max
        shifted = tile.sub_(new_max[..., None])
        if self.needs_scratch:
            self._update_sums(place, shifted, shrink, scratch, final_tile)
        else:
            self._total[place] = self._total[place] * shrink.exp() + shifted.exp_().sum(-1)

    def _update_sums(
        self,
        place: tuple[slice, slice],
        shifted: torch.Tensor,
        shrink: torch.Tensor,
        scratch: torch.Tensor | None,
        final_tile: torch.Tensor | None,
    ) -> None:
        """Rescale the sums to the new maxima, then add the tile's share."""
        scale = shrink.exp()
        weights = torch.exp(shifted.clamp_(min=_FLOOR), out=scratch)
        before = self._total[place]
        if self._n_paired:
            self._update_pairs(place, shifted, shrink, weights)
        total = before * scale + weights.sum(-1)
        spread = (self._spread[place] + before * shrink) * scale
        if final_tile is None:
            self._final_shrink[place[1]] = shrink[0]
            self._spread[place] = spread + weights.mul_(shifted).sum(-1)  # `shifted` is needed by the other slots
        else:
            cross = (self._cross[place] + before * self._final_shrink[place[1]]) * scale
            self._spread[place] = spread + shifted.mul_(weights).sum(-1)
            self._cross[place] = cross + weights.mul_(final_tile).sum(-1)
        self._total[place] = total

    def _update_pairs(
        self, place: tuple[slice, slice], shifted: torch.Tensor, shrink: torch.Tensor, weights: torch.Tensor
    ) -> None:
        slots, rows = place
        paired = min(rows.stop, self._n_paired) - rows.start
        if paired <= 0:
            return
        one, other = slice(0, paired, 2), slice(1, paired, 2)
        before = self._total[place][:, one] * shrink[:, other]
        new = (weights[:, one] * shifted[:, other]).sum(-1)
        at = (slots, slice(rows.start, rows.start + paired, 2))
        self._apart[at] = (self._apart[at] + before) * shrink[:, one].exp() + new

    def _update_top(self, place: tuple[slice, slice], tile: torch.Tensor, start: int) -> None:
        seen = start - self._first
        before = min(self._top_k, seen)  # entries of the running top-k that are filled
        after = min(self._top_k, seen + tile.shape[-1])
        values, columns = top_of_rows(tile, min(self._top_k, tile.shape[-1]))
        values = torch.cat([self._top_values[place][..., :before], values], -1)
        ids = torch.cat([self._top_ids[place][..., :before], columns + start], -1)
        values, order = values.topk(after, dim=-1)
        self._top_values[place][..., :after] = values
        self._top_ids[place][..., :after] = ids.gather(-1, order)

    def _update_wanted(self, place: tuple[slice, slice], tile: torch.Tensor, start: int) -> None:
        for i in range(self._wanted.shape[1]):
            ids, at = self._wanted[place[1], i], (*place, i)
            inside = (ids >= start) & (ids < start + tile.shape[-1])
            column = (ids - start).clamp(0, tile.shape[-1] - 1)
            own = tile.gather(-1, column.expand(tile.shape[:2])[..., None])[..., 0]
            self._found[at] = torch.where(inside, own, self._found[at])
            if self._thresholds is not None:
                threshold = self._thresholds[at]
                # a token is never above itself, though its logit here may differ from the threshold by a rounding
                itself = inside & (own > threshold)
                self._above[at] += (tile > threshold[..., None]).sum(-1) - itself.long()

    def merge(self, gather: Callable[[torch.Tensor], list[torch.Tensor]], top_k: int) -> None:
        """Take in what others found in other columns; all of them merge, and all have the whole then.

        Parameters
        ----------
        gather : callable
            Gets this part's numbers, float32 (n_slots, n, width), and returns those of every part, this one's too.
        top_k : int
            How many of the largest to keep of all; a part may have had fewer columns.
        """
        parts = [self.named(part, top_k) for part in gather(self._packed(top_k))]
        maxima = torch.stack([part["max"] for part in parts])
        self._max = maxima.amax(0)
        shrinks = (maxima - self._max).clamp_(min=_FLOOR)
        scales = shrinks.exp()
        totals = torch.stack([part["total"] for part in parts])
        self._total = (totals * scales).sum(0)
        if self.needs_scratch:
            spreads = torch.stack([part["spread"] for part in parts])
            self._spread = ((spreads + totals * shrinks) * scales).sum(0)
        if self._final is not None:
            crosses = torch.stack([part["cross"] for part in parts])
            self._cross = ((crosses + totals * shrinks[:, self._final, None]) * scales).sum(0)
        if self._n_paired:
            aparts = torch.stack([part["apart"] for part in parts])
            self._apart = ((aparts + totals * shrinks.roll(-1, -1)) * scales).sum(0)  # of every second row
        values, order = torch.cat([part["top_values"] for part in parts], -1).topk(top_k, dim=-1)
        ids = torch.cat([part["top_ids"] for part in parts], -1)
        self._top_k, self._top_values, self._top_ids = top_k, values, ids.gather(-1, order).long()
        self._found = torch.stack([part["found"] for part in parts]).amax(0)
        if self._thresholds is not None:
            self._above = torch.stack([part["above"] for part in parts]).sum(0)

    def _packed(self, top_k: int) -> torch.Tensor:
        """Everything that others need to know, four bytes a number; integers by their bits."""
        missing = top_k - self._top_values.shape[-1]
        values = torch.nn.functional.pad(self._top_values, (0, missing), value=-torch.inf)
        ids = torch.nn.functional.pad(self._top_ids, (0, missing))
        columns = [values, ids.int().view(torch.float32), self._max[..., None], self._total[..., None], self._found]
        if self.needs_scratch:
            columns.append(self._spread[..., None])
        if self._final is not None:
            columns.append(self._cross[..., None])
        if self._n_paired:
            columns.append(self._apart[..., None])
        if self._thresholds is not None:
            columns.append(self._above.int().view(torch.float32))
        return torch.cat(columns, -1)

    def empty_parts(self, n_parts: int, top_k: int) -> torch.Tensor:
        """Memory for the numbers of further parts, to be filled by their names and merged."""
        shape = (n_parts, *self._max.shape, sum(self._widths(top_k).values()))
        return torch.empty(shape, dtype=torch.float32, device=self._max.device)

    def named(self, numbers: torch.Tensor, top_k: int) -> dict[str, torch.Tensor]:
        """Views of what `_packed` put together, (…, width): (…,) each, or (…, k), (…, n_wanted); integers int32."""
        widths = self._widths(top_k)
        named = dict(zip(widths, numbers.split_with_sizes(list(widths.values()), -1), strict=True))
        for name in named.keys() & {"top_ids", "above"}:
            named[name] = named[name].view(torch.int32)
        return {name: values.squeeze(-1) if name in _SCALARS else values for name, values in named.items()}

    def _widths(self, top_k: int) -> dict[str, int]:
        n_wanted = self._wanted.shape[1]
        widths = {"top_values": top_k, "top_ids": top_k, "max": 1, "total": 1, "found": n_wanted}
        if self.needs_scratch:
            widths["spread"] = 1
        if self._final is not None:
            widths["cross"] = 1
        if self._n_paired:
            widths["apart"] = 1
        if self._thresholds is not None:
            widths["above"] = n_wanted
        return widths

    @property
    def top(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and log-probabilities of the largest, (n_slots, n, k)."""
        return self._top_ids, self._top_values - self.normaliser[..., None]

    @property
    def wanted(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities and ranks of the wanted ids, (n_slots, n, n_wanted); NaN and -1 where there is none."""
        missing = (self._wanted < 0).expand(self._found.shape)
        logprobs = (self._found - self.normaliser[..., None]).masked_fill(missing, torch.nan)
        ranks = self._above + 1 if self._thresholds is not None else torch.full_like(self._above, -1)
        return logprobs, ranks.masked_fill(missing, -1)

    @property
    def entropy(self) -> torch.Tensor | None:
        """Nats, (n_slots, n)."""
        return (self._total.log() - self._spread / self._total).clamp_(min=0) if self._entropy else None

    @property
    def kl_to_final(self) -> torch.Tensor | None:
        """KL(slot ‖ last block), nats, (n_slots, n)."""
        if self._final is None:
            return None
        log_total = self._total.log()
        kl = _divergence((self._spread - self._cross) / self._total - log_total + log_total[self._final])
        kl[self._final] = 0.0
        return kl

    @property
    def kl_of_pairs(self) -> torch.Tensor | None:
        """KL(first row ‖ second row) of each pair, nats, (n_slots, n_pairs)."""
        if not self._n_paired:
            return None
        one, other = slice(0, self._n_paired, 2), slice(1, self._n_paired, 2)
        total = self._total[:, one]
        cross_entropy = (self._spread[:, one] - self._apart[:, one]) / total
        return _divergence(cross_entropy - total.log() + self._total[:, other].log())

    @property
    def normaliser(self) -> torch.Tensor:
        """Log-sum-exp of the logits, (n_slots, n)."""
        return self._max + self._total.log()


def _divergence(kl: torch.Tensor) -> torch.Tensor:
    """A KL without what rounding and the floor leave: −1e-7, and numbers that stand for infinity."""
    kl = kl.clamp_(min=0)
    return kl.masked_fill_(kl > -_FLOOR / 1e10, torch.inf)


def top_of_rows(tile: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Largest k of every row, values and columns, as `torch.topk`.

    The k largest lie in the k groups of columns with the largest maxima, and a maximum is found several times faster
    than a top-k.
    """
    n_groups = tile.shape[-1] // _GROUP
    if 4 * k > n_groups:
        return tile.topk(k, dim=-1)
    grouped = torch.unflatten(tile[..., : n_groups * _GROUP], -1, (n_groups, _GROUP))
    groups = grouped.amax(-1).topk(k, dim=-1, sorted=False).indices
    inside = torch.arange(_GROUP, device=tile.device)
    columns = (groups[..., None] * _GROUP + inside).flatten(-2)
    ungrouped = torch.arange(n_groups * _GROUP, tile.shape[-1], device=tile.device)
    columns = torch.cat([columns, ungrouped.expand(*columns.shape[:-1], -1)], -1)
    values, place = tile.gather(-1, columns).topk(k, dim=-1)
    return values, columns.gather(-1, place)
