"""`Trajectory`: one sequence's readouts over layers × tokens, as plain CPU arrays."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import UserError, escaped
from nblens.files import replace_file
from nblens.layers import format_layers
from nblens.lens.export import as_frame, as_json
from nblens.lens.shown import Shown
from nblens.records import RecordFormat, sound_content

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from nblens.lens.difference import TrajectoryDiff

__all__ = ["AGAINST", "METRICS", "Trajectory"]

METRICS = ("prob", "entropy", "kl", "rank")
"""What a cell of the grid can show: probability of the top token, entropy (nats), KL to the last block (nats),
rank of the token that follows."""

AGAINST = ("final", "next", "target")
"""Which top token counts as right: the last block's, the one that actually follows, or the first target."""

_FORMAT = RecordFormat("nblens.trajectory", 1, "a trajectory")
_ROUNDING = 0.01  # nats that the logarithm of a probability of 1 may lie above 0, in any precision
_PER_TOKEN = ("token_ids", "next_ids")
_PER_CELL = ("entropy", "kl_to_final", "next_logprob", "next_rank")
_PER_CELL_MANY = ("top_ids", "top_logprobs", "target_logprobs", "target_ranks")


@dataclass(frozen=True, repr=False, eq=False)
class Trajectory(Shown):
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
    prompt_length: int = 0
    """how many of the tokens are the prompt's; the rest were generated"""
    n_blocks: int = 0
    """blocks in the model (layers may be fewer)"""
    model: str = ""
    lens: str = "logit"
    timings: Mapping[str, float] = field(default_factory=dict)
    """seconds of the whole run, all its rows together, by phase: prefill and decode (the model's passes over prompt
    and new tokens), readout (the lens), total; on a GPU work counts in the phase that waits for it"""

    def __post_init__(self) -> None:
        n_layers, n_tokens, n_targets = len(self.layers), len(self.tokens), len(self.target_ids)
        top = (n_layers, n_tokens, self.top_ids.shape[-1] if self.top_ids.ndim == 3 else -1)
        target = (n_layers, n_tokens, n_targets)
        shapes = {
            **dict.fromkeys(_PER_TOKEN, (n_tokens,)),
            **dict.fromkeys(_PER_CELL, (n_layers, n_tokens)),
            **{"top_ids": top, "top_logprobs": top, "target_logprobs": target, "target_ranks": target},
            "target_ids": (n_targets,),
        }
        for name, shape in shapes.items():
            _check_array(name, getattr(self, name), shape)
        for name, values, kind in (("tokens", self.tokens, str), ("layers", self.layers, int)):
            if not all(isinstance(value, kind) for value in values):
                raise ValueError(f"{name} must be {kind.__name__}s, got {values[:3]}")
        for name, kind in (("n_blocks", int), ("prompt_length", int), ("site", str), ("model", str), ("lens", str)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must be {kind.__name__}, got {getattr(self, name)!r}")

    @property
    def n_layers(self) -> int:
        """Number of blocks read."""
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """Number of tokens fed."""
        return len(self.tokens)

    @property
    def reading(self) -> str:
        """Site and lens, for a title: "resid_post", or "resid_post, tuned lens"."""
        return self.site if self.lens == "logit" else f"{self.site}, {self.lens} lens"

    @property
    def text(self) -> str:
        """The fed tokens as one string."""
        return "".join(self.tokens)

    def token_text(self, token_id: int) -> str:
        """Text of a token id that occurs here; `⟨id⟩` for one that does not."""
        return self.vocabulary.get(int(token_id), f"⟨{int(token_id)}⟩")

    def top(self, layer: int = -1, token: int = -1) -> list[tuple[str, float]]:
        """Most likely tokens with their probabilities at one cell.

        Parameters
        ----------
        layer : int
            Block index; negative counts from the model's last block.
        token : int
            Token position; negative counts from the last.
        """
        row = self._layer_row(layer)
        if not -self.n_tokens <= token < self.n_tokens:
            raise UserError(f"token {token} is outside this trajectory of {self.n_tokens} tokens")
        ids, logprobs = self.top_ids[row, token], self.top_logprobs[row, token]
        return [(self.token_text(i), float(p)) for i, p in zip(ids, np.exp(logprobs), strict=True)]

    def metric(self, name: str) -> np.ndarray:
        """One number per cell, (n_layers, n_tokens): "prob", "entropy", "kl" or "rank".

        "prob" is the probability of the cell's top token, "rank" the rank of the token that follows (-1: none).
        """
        if name == "prob":
            return np.exp(self.top_logprobs[..., 0])
        if name == "entropy":
            return self.entropy
        if name == "kl":
            return self.kl_to_final
        if name == "rank":
            return self.next_rank
        raise UserError(f"metric {name!r} is unknown; one of {', '.join(METRICS)}")

    def decided_at(self, against: str = "final") -> np.ndarray:
        """First block from which the top token stays the right one, int32 (n_tokens,); -1 where it never does.

        >>> session.lens("The capital of France is").decided_at().tolist()
        [0, 6, 1, 0, 7, 6]

        Only the blocks in `layers` are looked at.

        Parameters
        ----------
        against : {"final", "next", "target"}
            The right token: the top token of the last block read, which always agrees with itself; the one that
            actually follows; or the first of the targets.
        """
        if against not in AGAINST:
            raise UserError(f"against {against!r} is unknown; one of {', '.join(AGAINST)}")
        if against == "target" and not len(self.target_ids):
            raise UserError("this trajectory follows no target; ask the lens for one with targets=")
        top = self.top_ids[..., 0]
        right = {"final": top[-1], "next": self.next_ids, "target": self.target_ids[:1]}[against]
        stays = np.logical_and.accumulate((top == right)[::-1], axis=0)[::-1]
        first = np.asarray(self.layers, dtype=np.int32)[np.argmax(stays, axis=0)]
        return np.where(stays[-1], first, np.int32(-1))

    def to_frame(self, *, long: bool = False) -> pd.DataFrame:
        """A pandas data frame with one row per cell, or one per cell and rank.

        >>> session.lens("The capital of France is", layers=-1).to_frame().top_token.iloc[-1]
        ' Paris'

        Parameters
        ----------
        long : bool
            False: layer, position, token, top_token, top_prob, entropy, kl_to_final, next_logprob, next_rank, and
            `logprob[TOKEN]` for each target. True: layer, position, token, rank (1 is the most likely), top_token,
            top_prob.
        """
        return as_frame(self, long=long)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Token → layer → component → [[token, probability], …] as JSON, returned and, where `path` is given, written.

        ::

            {"format": "nblens.trajectory_json", "version": 1, "model": …, "lens": "logit", "layers": [0, 1],
             "prompt_length": 6, "tokens": [
              {"position": 0, "token": "The", "id": 14,
               "layers": {"0": {"block": [[" capital", 0.31], …]}, "1": {…}}},
              …
            ]}

        Components are "block" for `resid_post`, "attn" for `attn_out`, "mlp" for `mlp_out`; other sites keep their
        names. Probabilities are those over the full vocabulary, to seven digits. The shape is that of the tool of
        arXiv 2604.06483.
        """
        text = as_json({self.site: self})
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
        plain["vocabulary"] = {str(i): text for i, text in self.vocabulary.items()}
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
            The two were read at different layers or sites.
        """
        from nblens.lens.difference import TrajectoryDiff

        return TrajectoryDiff.between(self, other)

    def plot_tokens(
        self, tokens: Sequence[str | int] | None = None, *, position: int = -1, metric: str = "prob"
    ) -> Figure:
        """Probability or rank ("prob", "rank") of chosen tokens over depth; see `nblens.plots.token_curves`."""
        from nblens import plots

        return plots.token_curves(self, tokens, position=position, metric=metric)

    def plot_depth(self, metric: str = "entropy") -> Figure:
        """A metric over depth, median and middle half of the tokens; see `nblens.plots.depth_curves`.

        That function also draws several trajectories: ``depth_curves({"logit": one, "tuned": other}, "kl")``.
        """
        from nblens import plots

        return plots.depth_curves(self, metric)

    def plot_decided(self, against: str = "final") -> Figure:
        """Histogram of `decided_at`; see `nblens.plots.decided_histogram`, which also takes many trajectories."""
        from nblens import plots

        return plots.decided_histogram(self, against=against)

    def truncated(self, n_tokens: int) -> Trajectory:
        """The same trajectory over its first `n_tokens` tokens."""
        cut: dict[str, Any] = {"tokens": self.tokens[:n_tokens]}
        cut |= {name: getattr(self, name)[:n_tokens] for name in _PER_TOKEN}
        cut |= {name: getattr(self, name)[:, :n_tokens] for name in (*_PER_CELL, *_PER_CELL_MANY)}
        return replace(self, **cut, prompt_length=min(self.prompt_length, n_tokens))

    def _layer_row(self, layer: int) -> int:
        block = layer + self.n_blocks if layer < 0 else layer
        if block not in self.layers:
            raise UserError(f"layer {layer} was not read; this trajectory holds {format_layers(self.layers)}")
        return self.layers.index(block)

    def __repr__(self) -> str:
        return escaped(
            f"Trajectory({self.n_layers} layers × {self.n_tokens} tokens at {self.reading}, "
            f"top {self.top_ids.shape[-1]}, {self.model})"
        )


def _array_names() -> tuple[str, ...]:
    return (*_PER_TOKEN, *_PER_CELL, *_PER_CELL_MANY, "target_ids")


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    kind = np.integer if name.endswith(("ids", "rank", "ranks")) else np.floating
    if not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} holds {array.dtype}, expected {kind.__name__} numbers")
