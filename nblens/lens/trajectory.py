"""`Trajectory`: one sequence's readouts over layers × tokens; `TrajectoryDiff`: what differs between two."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from nblens import plots
from nblens.circumstances import Circumstances
from nblens.colors import Scale
from nblens.errors import UserError, escaped
from nblens.files import replace_file
from nblens.layers import format_layers
from nblens.lens.cell_panels import panel_of
from nblens.lens.cells import METRICS, PER_CELL, PER_CELL_MANY, PER_TOKEN, Cells
from nblens.lens.export import as_frame, as_json
from nblens.lens.shown import Shown
from nblens.records import RecordFormat, sound_content
from nblens.views.panels import GridPanel, Metric

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Trajectory", "TrajectoryDiff"]

_FORMAT = RecordFormat("nblens.trajectory", 1, "a trajectory")
_ROUNDING = 0.01  # nats that the logarithm of a probability of 1 may lie above 0, in any precision


@dataclass(frozen=True, repr=False, eq=False)
class Trajectory(Cells, Shown):
    """What every block would have said at every token of one sequence.

    >>> traj = session.lens("The capital of France is")
    >>> text, probability = traj.top(layer=-1, token=-1)[0]
    >>> text, round(probability, 2)
    (' Paris', 0.99)
    >>> traj.entropy.shape  # blocks, tokens
    (12, 6)

    Rows are tokens that were fed to the model, in absolute positions 0 … n_tokens-1: the prompt, then the
    generated tokens but the last one, which was sampled and never fed. All logarithms are natural; every
    probability is normalised over the full vocabulary. Ranks start at 1 (the most likely token).
    """

    def to_frame(self, *, long: bool = False) -> pd.DataFrame:
        """A pandas data frame with one row per cell, or one per cell and rank.

        >>> session.lens("The capital of France is", layers=-1).to_frame().top_token.iloc[-1]
        ' Paris'

        Parameters
        ----------
        long : bool
            False: layer, position, token, token_id, top_token, top_id, top_prob, entropy, kl_to_final, next_logprob,
            next_rank, and `logprob[TOKEN]` for each target, or `logprob[TOKEN (id 5)]` where two have one text. True:
            layer, position, token, token_id, rank (1 is the most likely), top_token, top_id, top_prob.
        """
        return as_frame(self, long=long)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Token → layer → component → [[token, probability], …] as JSON, returned and, where `path` is given, written.

        ::

            {"format": "nblens.trajectory_json", "version": 1, "model": …, "lens": "logit",
             "circumstances": ["float32", "steered: cheerful=1.5 at block 6"], "layers": [0, 1],
             "prompt_length": 6, "tokens": [
              {"position": 0, "token": "The", "id": 14,
               "layers": {"0": {"block": [[" capital", 0.31], …]}, "1": {…}},
               "ids": {"0": {"block": [233, …]}, "1": {…}}},
              …
            ]}

        Components are "block" for `resid_post`, "attn" for `attn_out`, "mlp" for `mlp_out`; other sites keep their
        names. Probabilities are those over the full vocabulary, to seven digits. `ids` says which tokens they are of,
        since several may have one text. The shape of the rest is that of the tool of arXiv 2604.06483.
        """
        text = as_json({self.site: panel_of(self)})
        if path is not None:
            replace_file(path, text.encode())
        return text

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one safetensors file: arrays, and everything else as JSON in its header.

        >>> path = session.lens("The capital of France is").save("france.safetensors")
        >>> nblens.Trajectory.load(path).text
        '<s>The capital of France is'

        The file is written under a temporary name and renamed, so a kill in between leaves the old file.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _array_names()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        plain["circumstances"] = self.circumstances.as_plain()
        for name in ("vocabulary", "bytes_of_tokens"):
            plain[name] = {str(i): text for i, text in plain[name].items()}
        return _FORMAT.save(path, plain, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read a file written by `save`.

        Raises
        ------
        FileFormatError
            The file is damaged, or is not a trajectory.
        """
        plain, arrays = _FORMAT.load(path)
        with sound_content(path):
            plain["vocabulary"] = {int(i): str(text) for i, text in plain["vocabulary"].items()}
            parts = plain.get("bytes_of_tokens", {})
            plain["bytes_of_tokens"] = {int(i): bytes.fromhex(part).hex() for i, part in parts.items()}
            plain["circumstances"] = Circumstances.of_plain(plain.get("circumstances", {}))
            plain["tokens"], plain["layers"] = tuple(plain["tokens"]), tuple(plain["layers"])
            for name in ("top_logprobs", "next_logprob", "target_logprobs"):
                if (arrays[name] > _ROUNDING).any():
                    raise ValueError(f"{name} holds a probability above 1")
            plain |= {name: arrays[name] for name in _array_names()}
            return cls(**plain)

    def diff(self, other: Trajectory) -> TrajectoryDiff:
        """What changed from this trajectory to `other`, cell by cell, over their common tokens.

        Raises
        ------
        UserError
            The two were read at different layers or sites, or are of different vocabularies.
        """
        return TrajectoryDiff.between(self, other)

    def plot_tokens(
        self, tokens: Sequence[str | int] | None = None, *, position: int = -1, metric: str = "prob"
    ) -> Figure:
        """Probability or rank ("prob", "rank") of chosen tokens over depth; see `nblens.plots.token_curves`."""
        return plots.token_curves(self, tokens, position=position, metric=metric)

    def plot_depth(self, metric: str = "entropy") -> Figure:
        """A metric over depth, median and middle half of the tokens; see `nblens.plots.depth_curves`.

        That function also draws several trajectories: ``depth_curves({"logit": one, "tuned": other}, "kl")``.
        """
        return plots.depth_curves(self, metric)

    def plot_decided(self, against: str = "final") -> Figure:
        """Histogram of `decided_at`; see `nblens.plots.decided_histogram`, which also takes many trajectories."""
        return plots.decided_histogram(self, against=against)

    def __repr__(self) -> str:
        facts = ", ".join(filter(None, (self.model, *self.circumstances.facts)))
        return escaped(
            f"Trajectory({self.n_layers} layers × {self.n_tokens} tokens at {self.reading}, "
            f"top {self.top_ids.shape[-1]}, {facts})"
        )

    def _panels(self) -> tuple[GridPanel, ...]:
        return (panel_of(self),)


def _array_names() -> tuple[str, ...]:
    return (*PER_TOKEN, *PER_CELL, *PER_CELL_MANY, "target_ids")


@dataclass(frozen=True, repr=False, eq=False)
class TrajectoryDiff(Shown):
    """Signed differences `other - base` over the tokens that both share, (n_layers, n_tokens).

    >>> one = session.lens("In Warsaw you pay with the")
    >>> other = session.lens("In Warsaw you pay with the", steer={"cheerful": 1.0})
    >>> diff = one.diff(other)
    >>> diff.metric("prob").shape
    (12, 7)
    >>> bool((diff.metric("entropy")[:6] == 0).all())  # the vector is written at block 6: none before it changes
    True
    """

    base: Trajectory
    other: Trajectory
    top1_changed: np.ndarray
    """bool (n_layers, n_tokens)"""
    base_logprob: np.ndarray | None = None
    """float32 (n_layers, n_tokens), nats: of the token that `other` puts first, in `base`. None: of two runs apart,
    where it is known only among the top k"""
    kl_from_base: np.ndarray | None = None
    """float32 (n_layers, n_tokens), nats: KL(base ‖ other) over the whole vocabulary. None: of two runs apart"""

    @classmethod
    def between(
        cls,
        base: Trajectory,
        other: Trajectory,
        base_logprob: np.ndarray | None = None,
        kl_from_base: np.ndarray | None = None,
    ) -> Self:
        """Align the two on their longest common run of tokens from the start.

        Parameters
        ----------
        base, other : Trajectory
        base_logprob, kl_from_base : numpy.ndarray, optional
            What was read while both ran, float32 (n_layers, n_tokens of `other`); see the fields of these names.
        """
        if base.layers != other.layers or base.site != other.site:
            raise UserError(
                f"cannot compare {base.site} at layers {format_layers(base.layers)} with "
                f"{other.site} at layers {format_layers(other.layers)}"
            )
        texts = other.vocabulary
        if strange := [i for i, text in base.vocabulary.items() if texts.get(i, text) != text]:
            one, same = base.token_text(strange[0]), other.token_text(strange[0])
            raise UserError(
                f"cannot compare {base.model} with {other.model}: token id {strange[0]} is {one!r} in one and {same!r} "
                "in the other"
            )
        length = min(base.n_tokens, other.n_tokens)
        differs = base.token_ids[:length] != other.token_ids[:length]
        length = int(np.argmax(differs)) if differs.any() else length
        base, other = base.truncated(length), other.truncated(length)
        changed = base.top_ids[..., 0] != other.top_ids[..., 0]
        beside = [None if array is None else array[:, :length] for array in (base_logprob, kl_from_base)]
        return cls(base, other, changed, *beside)

    def metric(self, name: str) -> np.ndarray:
        """Signed difference of a metric, or the KL between the two, (n_layers, n_tokens).

        Parameters
        ----------
        name : {"prob", "entropy", "kl", "rank", "kl_from_base"}
            "prob" follows one token through both runs, the token that `other` puts first: it is the change of that
            token's probability. In the difference of a `Comparison` it is exact. Of two runs apart, the token may not
            be among the top k of `base`: its probability there then counts as 0, and the change shown is too large by
            at most `prob_uncertainty`. "rank" is NaN where different tokens follow in the two, and where none does.
            "kl" is the change of KL(block ‖ last block); "kl_from_base" is KL(base ‖ other) in nats over the whole
            vocabulary, at the same block of both, which `Session.compare` alone reads.

        Raises
        ------
        UserError
            The metric is unknown, or was not read.
        """
        if name == "kl_from_base":
            if self.kl_from_base is None:
                raise UserError(
                    "KL between two runs is read while both run: session.compare(prompt, steer=...).diff has it, "
                    'unless its metrics leave out "kl" or the model takes no two rows at once'
                )
            return self.kl_from_base
        if name == "prob":
            listed = np.where(self._same_token, np.exp(self.base.top_logprobs), 0.0).sum(-1)
            base = np.where(self._is_read, np.exp(self._read_logprob), listed)
            return np.asarray(np.exp(self.other.top_logprobs[..., 0]) - base)
        change: np.ndarray = self.other.metric(name).astype(np.float32) - self.base.metric(name)
        if name == "rank":
            same_next = (self.base.next_ids == self.other.next_ids) & (self.base.next_ids >= 0)
            change[(self.base.next_rank < 1) | (self.other.next_rank < 1) | ~same_next] = np.nan
        return change

    @property
    def parts_at(self) -> np.ndarray:
        """The lowest layer read at which the two put different tokens first, int (n_tokens,); -1 where none does."""
        layers = np.array(self.base.layers)[:, None]
        lowest = np.where(self.top1_changed, layers, np.iinfo(int).max).min(0)
        return np.where(self.top1_changed.any(0), lowest, -1)

    @property
    def prob_uncertainty(self) -> np.ndarray:
        """By how much `metric("prob")` may be too large, (n_layers, n_tokens): 0 where it is exact.

        Elsewhere it is the probability of the last of `base`'s top k, which the token cannot exceed; a larger
        `top_k` makes it smaller.
        """
        exact = self._same_token.any(-1) | self._is_read
        return np.where(exact, 0.0, np.exp(self.base.top_logprobs[..., -1]))

    @property
    def _read_logprob(self) -> np.ndarray:
        """`base_logprob`, NaN where there is none."""
        return np.full(self.top1_changed.shape, np.nan) if self.base_logprob is None else self.base_logprob

    @property
    def _is_read(self) -> np.ndarray:
        """Where what `other` puts first is known in `base` though it is not among its top k, bool."""
        return np.asarray(~self._same_token.any(-1) & ~np.isnan(self._read_logprob))

    @property
    def _same_token(self) -> np.ndarray:
        """Where `base` holds what `other` puts first, bool (n_layers, n_tokens, k)."""
        return np.asarray(self.base.top_ids == self.other.top_ids[..., :1])

    def __repr__(self) -> str:
        return (
            f"TrajectoryDiff({self.base.n_layers} layers × {self.base.n_tokens} tokens, "
            f"top token changed in {self.top1_changed.sum()} of {self.top1_changed.size} cells{self._from})"
        )

    @property
    def _from(self) -> str:
        changed = self.parts_at[self.parts_at >= 0]
        return f", from layer {changed.min()} on" if len(changed) else ""

    def _panel(self, title: str, sides: tuple[GridPanel, GridPanel]) -> GridPanel:
        """The change in each cell, over the tokens of `other`; `sides` are both runs, which may go on from there."""
        metrics = [Metric(name, np.asarray(self.metric(name), dtype=float), Scale.difference(name)) for name in METRICS]
        if self.kl_from_base is not None:
            name, apart = "kl_from_base", np.asarray(self.kl_from_base, dtype=float)
            metrics.append(Metric(name, apart, Scale.magnitude(name)))
        return replace(
            panel_of(self.other, title),
            metrics=tuple(metrics),
            base_logprob=self.base_logprob,
            marked=self.top1_changed,
            mark_means="token differs from base",
            sides=sides,
        )

    def _panels(self) -> tuple[GridPanel, ...]:
        return (self._panel("", (panel_of(self.base, "base"), panel_of(self.other, "other"))),)

    def _at_layers(self, layers: Any) -> Self:
        rows = self.other._rows_of(layers)
        beside = (None if array is None else array[rows] for array in (self.base_logprob, self.kl_from_base))
        return self.between(self.base._at_layers(layers), self.other._at_layers(layers), *beside)

    def _followed_by(self, more: Self) -> Self:
        return self.between(self.base._followed_by(more.base), self.other._followed_by(more.other))
