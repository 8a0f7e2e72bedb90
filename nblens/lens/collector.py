"""`TrajectoryCollector`: slices of a run → a `Trajectory` per row and site."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from nblens.circumstances import Circumstances, circumstances_of
from nblens.lens.attribution import ATTRIBUTION, CONTRIBUTIONS, Attribution
from nblens.lens.comparison import BESIDE_BASE
from nblens.lens.trajectory import Trajectory
from nblens.specs import AttributionSpec, LensSpec, ReadoutSlice, RunSpec, TokensSampled

__all__ = ["TrajectoryCollector"]


class TrajectoryCollector:
    """Takes in the events of a run; a trajectory can be built at any time, also of an unfinished run.

    Slices and tokens are placed by their position: one that comes twice, after a restart with a smaller chunk,
    replaces itself.
    """

    def __init__(
        self,
        spec: RunSpec,
        n_blocks: int,
        model: str,
        text_of: Callable[[int], str],
        bytes_of: Callable[[int], bytes | None] = lambda token_id: None,
        origin: Circumstances | None = None,
    ) -> None:
        self._spec, self._n_blocks, self._model, self._text_of = spec, n_blocks, model, text_of
        self._bytes_of, self._origin = bytes_of, origin or Circumstances()
        self._slices: dict[tuple[int, str], dict[int, ReadoutSlice]] = defaultdict(dict)
        self.sampled: list[list[int]] = [[] for _ in spec.prompts]
        """new tokens of each row"""

    def add(self, event: object) -> None:
        """Take in one event; those that carry no readout and no token are ignored."""
        if isinstance(event, ReadoutSlice):
            self._slices[event.row, event.site][event.start] = event
        elif isinstance(event, TokensSampled):
            event.place_in(self.sampled)

    def circumstances(self, row: int) -> Circumstances:
        """Under what a row is read."""
        return circumstances_of(self._origin, self._spec, row)

    def trajectory(self, row: int, site: str, timings: Mapping[str, float] | None = None) -> Trajectory:
        """What has been read so far of one row at one site."""
        lens = self._lens
        target_ids = self._target_ids(row, site)
        parts = [_with_targets(part, len(target_ids)) for part in self._parts(row, site)]
        arrays = _joined([_no_tokens(lens, len(target_ids)), *parts])
        n_tokens = arrays["top_ids"].shape[1]
        sequence = np.asarray([*self._spec.prompts[row], *self.sampled[row]], dtype=np.int32)
        next_ids = np.full(n_tokens, -1, dtype=np.int32)
        following = sequence[1 : n_tokens + 1]
        next_ids[: len(following)] = following
        token_ids = sequence[:n_tokens]
        occurring = {
            *token_ids.tolist(),
            *next_ids.tolist(),
            *target_ids,
            *arrays["top_ids"].ravel().tolist(),
        }
        vocabulary = {i: self._text_of(i) for i in sorted(occurring) if i >= 0}
        parts_of_characters = {i: part.hex() for i in sorted({*token_ids.tolist()}) if (part := self._bytes_of(i))}
        return Trajectory(
            tokens=tuple(vocabulary[i] for i in token_ids.tolist()),
            token_ids=token_ids,
            layers=lens.blocks,
            site=site,
            next_ids=next_ids,
            target_ids=np.asarray(target_ids, dtype=np.int32),
            vocabulary=vocabulary,
            bytes_of_tokens=parts_of_characters,
            prompt_length=min(len(self._spec.prompts[row]), n_tokens),
            n_blocks=self._n_blocks,
            model=self._model,
            lens=lens.lens,
            circumstances=replace(self.circumstances(row), targets=tuple(map(self._text_of, lens.target_ids or ()))),
            timings=dict(timings or {}),
            **arrays,
        )

    def beside_base(self, site: str) -> dict[str, np.ndarray]:
        """What was read of the second row beside the first, by names of `Comparison`; empty where nothing was."""
        parts = self._parts(1, site)
        names = [name for name in BESIDE_BASE if any(name in part for part in parts)]
        missing = [np.full(part["entropy"].shape, np.nan, np.float32) for part in parts]  # where the first had ended
        return {
            name: np.concatenate([part.get(name, nan) for part, nan in zip(parts, missing, strict=True)], axis=1)
            for name in names
        }

    @property
    def _lens(self) -> LensSpec:
        assert self._spec.lens is not None, "the run has no lens"
        return self._spec.lens

    def _target_ids(self, row: int, site: str) -> tuple[int, ...]:
        """What was asked for, or the leaders that the slices from the prompt's end on name."""
        asked = self._lens.target_ids
        if asked is not None:
            return asked
        return max((piece.target_ids for piece in self._slices[row, site].values()), key=len, default=())

    def unreadable(self) -> dict[tuple[str, int], int]:
        """(site, block) → at how many tokens, over all rows, its readout is NaN."""
        counts: dict[tuple[str, int], int] = defaultdict(int)
        for (_, site), pieces in self._slices.items():
            for piece in pieces.values() if site != ATTRIBUTION else ():
                lost = np.isnan(piece.arrays["top_logprobs"][:, :, 0]).sum(1)
                for layer in np.flatnonzero(lost):
                    counts[site, self._lens.blocks[layer]] += int(lost[layer])
        return dict(counts)

    def attribution(self, row: int, timings: Mapping[str, float] | None = None) -> Attribution:
        """What has been read so far of one row's logits and their parts."""
        asked = self._spec.attribution
        assert asked is not None, "the run takes no logits apart"
        parts = self._parts(row, ATTRIBUTION) or [_no_logits(asked)]
        arrays = _joined(parts)
        n_tokens = arrays["logits"].shape[1]
        sequence = [*self._spec.prompts[row], *self.sampled[row]][:n_tokens]
        return Attribution(
            tokens=tuple(map(self._text_of, sequence)),
            layers=asked.blocks,
            target_ids=asked.target_ids,
            target_tokens=tuple(map(self._text_of, asked.target_ids)),
            contributions={site: arrays[site] for site in CONTRIBUTIONS},
            embedding=arrays["embedding"][0],
            bias=arrays["bias"][0, :1].sum(0),
            logits=arrays["logits"][0],
            model=self._model,
            circumstances=self.circumstances(row),
            timings=dict(timings or {}),
        )

    def _parts(self, row: int, site: str) -> list[Mapping[str, np.ndarray]]:
        """Arrays of consecutive slices from the first token on."""
        parts, expected = [], 0
        while piece := self._slices[row, site].get(expected):
            parts.append(piece.arrays)
            expected += next(iter(piece.arrays.values())).shape[1]
        return parts


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}


def _no_logits(asked: AttributionSpec) -> dict[str, np.ndarray]:
    def none(n_layers: int) -> np.ndarray:
        return np.zeros((n_layers, 0, len(asked.target_ids)), np.float32)

    return dict.fromkeys(CONTRIBUTIONS, none(len(asked.blocks))) | dict.fromkeys(
        ("embedding", "logits", "bias"), none(1)
    )


def _with_targets(arrays: Mapping[str, np.ndarray], n_targets: int) -> Mapping[str, np.ndarray]:
    """The arrays of a slice, with nothing for targets that were found in a later one."""
    if arrays["target_ranks"].shape[-1] == n_targets:
        return arrays
    cells = (*arrays["entropy"].shape, n_targets)
    return {
        **arrays,
        "target_logprobs": np.full(cells, np.nan, np.float32),
        "target_ranks": np.full(cells, -1, np.int32),
    }


def _no_tokens(lens: LensSpec, n_targets: int) -> dict[str, np.ndarray]:
    cells = (len(lens.blocks), 0)
    return {
        "top_ids": np.zeros((*cells, lens.top_k), np.int32),
        "top_logprobs": np.zeros((*cells, lens.top_k), np.float32),
        "entropy": np.zeros(cells, np.float32),
        "kl_to_final": np.zeros(cells, np.float32),
        "next_logprob": np.zeros(cells, np.float32),
        "next_rank": np.zeros(cells, np.int32),
        "target_logprobs": np.zeros((*cells, n_targets), np.float32),
        "target_ranks": np.zeros((*cells, n_targets), np.int32),
    }
