"""`LensReader`: captured activations → slices of a trajectory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from nblens.errors import NumericalError
from nblens.lens.lens import Lens, depth_of
from nblens.model.architecture import Architecture
from nblens.model.capture import RowSpan
from nblens.readout.readout import Readout, ReadoutResult
from nblens.specs import LensSpec, ReadoutSlice

__all__ = ["LensReader"]

_MOST_LEADERS = 8


@dataclass(frozen=True)
class LensReader:
    """Reads what a buffer captured, as a `LensSpec` asks.

    The last block's `resid_post` is captured beside the asked-for blocks when KL is wanted: every other readout is
    compared with it. It is never translated.
    """

    architecture: Architecture
    readout: Readout
    spec: LensSpec
    lens: Lens | None = None
    """translators in front of the readout; None: the logit lens"""
    prompt_lengths: tuple[int, ...] = ()
    """tokens of each row's prompt: at its last, the leaders are found that stand in for targets"""
    _leaders: dict[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, tuple[int, ...]]:
        """Blocks to capture at each site."""
        places = dict.fromkeys(self.spec.sites, self.spec.blocks)
        if "kl" in self.spec.metrics:
            last = self.architecture.n_blocks - 1
            places["resid_post"] = tuple(sorted({*places.get("resid_post", ()), last}))
        return places

    def read(
        self,
        captured: dict[str, torch.Tensor],
        spans: Sequence[RowSpan],
        emit: Callable[[ReadoutSlice], None],
    ) -> None:
        """Read out everything captured and emit a slice per row and site; overwrites `captured`.

        Raises
        ------
        NumericalError
            Activations are inf or NaN.
        """
        # resid_post last: its last block, which the others are compared with, is overwritten when read
        for site in sorted(self.spec.sites, key=lambda name: name == "resid_post"):
            # of the stream itself: translators may overflow by themselves
            sums = captured[site].sum(-1, dtype=torch.float32)
            result, slots, pairs = self._read_site(site, captured, spans)
            self._check_finite(site, sums[slots], result.top_logprobs[slots, :, 0])
            if self.spec.target_ids is None:
                self._find_leaders(result, slots, site, spans)
                followed = self.readout.more_logprobs(result, self._leader_ids(site, spans).to(result.normed.device))
            beside_base = self._beside_base(result, slots, spans, pairs)
            for span in spans:
                arrays, target_ids = self._arrays(result, slots, span.place), self.spec.target_ids
                if span.row == 1:
                    arrays |= beside_base
                if target_ids is None:
                    target_ids = self._leaders.get((span.row, site), ())
                    logprobs = followed[slots, span.place, : len(target_ids)].cpu().numpy()
                    not_counted = np.full(logprobs.shape, -1, np.int32)
                    arrays |= {"target_logprobs": logprobs, "target_ranks": not_counted}
                emit(ReadoutSlice(span.row, site, span.start, arrays, target_ids))

    def _check_finite(self, site: str, sums: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Raise `NumericalError` where activations are inf or NaN; where only their readout is, its cells are NaN."""
        lost = logprobs.isnan().cpu()
        if lost.any() and (broken := lost & ~sums.isfinite().cpu()).any():
            block = self.spec.blocks[int(broken.any(1).nonzero()[0])]
            raise NumericalError(f"activations at {site} of block {block} are inf or NaN")

    def _find_leaders(self, result: ReadoutResult, slots: list[int], site: str, spans: Sequence[RowSpan]) -> None:
        """Note the distinct top tokens over the blocks at the last token of each prompt that ends here, last first."""
        for span in spans:
            last = self.prompt_lengths[span.row] - 1 - span.start
            if 0 <= last < span.place.stop - span.place.start:
                tops = result.top_ids[slots, span.place.start + last, 0].tolist()
                self._leaders[span.row, site] = tuple(dict.fromkeys(reversed(tops)))[:_MOST_LEADERS]

    def _leader_ids(self, site: str, spans: Sequence[RowSpan]) -> torch.Tensor:
        """The leaders of each token's row, int64 (n, m), filled up with -1."""
        of_rows = [self._leaders.get((span.row, site), ()) for span in spans]
        most = max(map(len, of_rows))
        rows = [torch.tensor([*ids, *[-1] * (most - len(ids))]) for ids in of_rows]
        return torch.cat([row.expand(len(span.next_ids), -1) for row, span in zip(rows, spans, strict=True)]).long()

    def _read_site(
        self, site: str, captured: dict[str, torch.Tensor], spans: Sequence[RowSpan]
    ) -> tuple[ReadoutResult, list[int], _Pairs | None]:
        hidden, final = captured[site], None
        blocks = self.places[site]
        if self.lens is not None:
            self._translate(self.lens, site, hidden, blocks)
        if "kl" in self.spec.metrics:
            if site != "resid_post":
                hidden = torch.cat([hidden, captured["resid_post"][-1:]])
            final = len(hidden) - 1
        wanted = self._wanted(spans).to(hidden.device)
        pairs = _Pairs.of(spans, hidden.device) if self.spec.compared else None
        beside = pairs if final is not None else None
        if beside is not None:  # each token beside the same of the other run
            wanted = wanted[beside.order]
            for slot in hidden:
                slot.copy_(slot[beside.order])
        result = self.readout.read(
            hidden,
            top_k=self.spec.top_k,
            wanted=wanted,
            ranks="rank" in self.spec.metrics,
            entropy="entropy" in self.spec.metrics,
            final=final,
            n_pairs=0 if beside is None else len(beside.base),
        )
        if beside is not None:
            result = result.reordered(beside.order.argsort())
        return result, [blocks.index(block) for block in self.spec.blocks], pairs

    def _beside_base(
        self, result: ReadoutResult, slots: list[int], spans: Sequence[RowSpan], pairs: _Pairs | None
    ) -> dict[str, np.ndarray]:
        """What the second row's tokens are beside those of the first; NaN for one that only the second has."""
        if pairs is None:
            return {}
        steered = next(span.place for span in spans if span.row == 1)
        columns = (pairs.steered - steered.start).cpu().numpy()

        def placed(values: torch.Tensor) -> np.ndarray:
            array = np.full((len(slots), steered.stop - steered.start), np.nan, np.float32)
            array[:, columns] = values[slots].cpu().numpy()
            return array

        found = self.readout.logprobs_of(result, pairs.base, result.top_ids[:, pairs.steered, 0])
        arrays = {"base_logprob": placed(found)}
        if result.kl_of_pairs is not None:
            arrays["kl_from_base"] = placed(result.kl_of_pairs)
        return arrays

    def _translate(self, lens: Lens, site: str, hidden: torch.Tensor, blocks: Sequence[int]) -> None:
        """Put translated streams in the place of captured ones, a block at a time so that only one is held twice."""
        for slot, block in zip(hidden, blocks, strict=True):
            if (depth := depth_of(site, block)) < self.architecture.n_blocks:
                slot.copy_(lens.translate(slot, depth))

    def _wanted(self, spans: Sequence[RowSpan]) -> torch.Tensor:
        """Ids asked for at every token: the one that follows, then the targets, (n, 1 + n_targets)."""
        following = torch.cat([span.next_ids for span in spans])
        targets = torch.tensor(self.spec.target_ids or (), dtype=torch.long).expand(len(following), -1)
        return torch.cat([following[:, None], targets], 1)

    def _arrays(self, result: ReadoutResult, slots: list[int], place: slice) -> dict[str, np.ndarray]:
        def numpy(values: torch.Tensor | None, dtype: type) -> np.ndarray:
            if values is None:
                return np.full((len(slots), place.stop - place.start), np.nan, dtype)
            return values[slots, place].cpu().numpy().astype(dtype)

        logprobs = numpy(result.wanted_logprobs, np.float32)
        ranks = numpy(result.wanted_ranks, np.int32)
        return {
            "top_ids": numpy(result.top_ids, np.int32),
            "top_logprobs": numpy(result.top_logprobs, np.float32),
            "entropy": numpy(result.entropy, np.float32),
            "kl_to_final": numpy(result.kl_to_final, np.float32),
            "next_logprob": logprobs[..., 0],
            "next_rank": ranks[..., 0],
            "target_logprobs": logprobs[..., 1:],
            "target_ranks": ranks[..., 1:],
        }


@dataclass(frozen=True)
class _Pairs:
    """Tokens that two rows have at the same positions."""

    base: torch.Tensor
    """int64 (n_pairs,): their places in the buffer, of the first row"""
    steered: torch.Tensor
    """of the second row"""
    order: torch.Tensor
    """int64 (n,): all places, the pairs' first, each one's two beside each other"""

    @classmethod
    def of(cls, spans: Sequence[RowSpan], device: torch.device) -> _Pairs | None:
        """Those of the first two rows; None where there are none."""
        by_row = {span.row: span for span in spans}
        if not {0, 1} <= set(by_row):
            return None
        positions = [range(s.start, s.start + len(s.next_ids)) for s in (by_row[0], by_row[1])]
        first, last = max(p.start for p in positions), min(p.stop for p in positions)
        if first >= last:
            return None
        base, steered = (
            torch.arange(first, last, device=device) + by_row[row].place.start - by_row[row].start for row in (0, 1)
        )
        paired = torch.stack([base, steered], 1).flatten()
        others = torch.ones(sum(len(span.next_ids) for span in spans), dtype=torch.bool, device=device)
        others[paired] = False
        return cls(base, steered, torch.cat([paired, others.nonzero()[:, 0]]))
