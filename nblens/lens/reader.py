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
            result, slots = self._read_site(site, captured, spans)
            self._check_finite(site, sums[slots], result.top_logprobs[slots, :, 0])
            if self.spec.target_ids is None:
                self._find_leaders(result, slots, site, spans)
                followed = self.readout.more_logprobs(result, self._leader_ids(site, spans).to(result.normed.device))
            for span in spans:
                arrays, target_ids = self._arrays(result, slots, span.place), self.spec.target_ids
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
    ) -> tuple[ReadoutResult, list[int]]:
        hidden, final = captured[site], None
        blocks = self.places[site]
        if self.lens is not None:
            self._translate(self.lens, site, hidden, blocks)
        if "kl" in self.spec.metrics:
            if site != "resid_post":
                hidden = torch.cat([hidden, captured["resid_post"][-1:]])
            final = len(hidden) - 1
        result = self.readout.read(
            hidden,
            top_k=self.spec.top_k,
            wanted=self._wanted(spans).to(hidden.device),
            ranks="rank" in self.spec.metrics,
            entropy="entropy" in self.spec.metrics,
            final=final,
        )
        return result, [blocks.index(block) for block in self.spec.blocks]

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
