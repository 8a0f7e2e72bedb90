"""`Trajectory`: one sequence's readouts over layers × tokens, as plain CPU arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nblens.errors import FileFormatError, UserError
from nblens.files import read_safetensors, write_safetensors
from nblens.layers import format_layers

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["METRICS", "Comparison", "Trajectory", "TrajectoryDiff"]

METRICS = ("prob", "entropy", "kl", "rank")
"""What a cell of the grid can show: probability of the top token, entropy (nats), KL to the last block (nats),
rank of the token that follows."""

_FORMAT = "nblens.trajectory"
_VERSION = 1
_PER_TOKEN = ("token_ids", "next_ids")
_PER_CELL = ("entropy", "kl_to_final", "next_logprob", "next_rank")
_PER_CELL_MANY = ("top_ids", "top_logprobs", "target_logprobs", "target_ranks")


@dataclass(frozen=True, repr=False, eq=False)
class Trajectory:
    """What every block would have said at every token of one sequence.

    >>> traj = session.lens("The capital of France is")        # doctest: +SKIP
    >>> traj.top(layer=-1, token=-1)                            # doctest: +SKIP
    [(' Paris', 0.97), (' Lyon', 0.01), …]

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
    """seconds per phase"""

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
        if not isinstance(self.n_blocks, int):
            raise ValueError(f"n_blocks must be an int, got {self.n_blocks!r}")

    @property
    def n_layers(self) -> int:
        """Number of blocks read."""
        return len(self.layers)

    @property
    def n_tokens(self) -> int:
        """Number of tokens fed."""
        return len(self.tokens)

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

    def decided_at(self) -> np.ndarray:
        """First block from which the top token stays the last block's, int32 (n_tokens,).

        Only the blocks in `layers` are looked at; the last of them always agrees with itself.
        """
        agrees = self.top_ids[..., 0] == self.top_ids[-1, :, 0]
        stays = np.logical_and.accumulate(agrees[::-1], axis=0)[::-1]
        return np.asarray(self.layers, dtype=np.int32)[np.argmax(stays, axis=0)]

    def to_frame(self) -> pd.DataFrame:
        """One row per cell: layer, position, token, top token, its probability and the metrics."""
        import pandas as pd

        layer, position = np.meshgrid(self.layers, np.arange(self.n_tokens), indexing="ij")
        frame = pd.DataFrame(
            {
                "layer": layer.ravel(),
                "position": position.ravel(),
                "token": [self.tokens[p] for p in position.ravel()],
                "top_token": [self.token_text(i) for i in self.top_ids[..., 0].ravel()],
                "top_prob": np.exp(self.top_logprobs[..., 0]).ravel(),
                "entropy": self.entropy.ravel(),
                "kl_to_final": self.kl_to_final.ravel(),
                "next_logprob": self.next_logprob.ravel(),
                "next_rank": self.next_rank.ravel(),
            }
        )
        for i, target in enumerate(self.target_ids):
            frame[f"logprob[{self.token_text(target)}]"] = self.target_logprobs[..., i].ravel()
        return frame

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to one safetensors file: arrays, and everything else as JSON in its header.

        The file is written under a temporary name and renamed, so a kill in between leaves the old file.
        """
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in _array_names()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in arrays}
        plain["vocabulary"] = {str(i): text for i, text in self.vocabulary.items()}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "fields": json.dumps(plain)}
        return write_safetensors(path, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trajectory:
        """Read a file written by `save`.

        Raises
        ------
        FileFormatError
            The file is damaged, or is not a trajectory.
        """
        arrays, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT:
            raise FileFormatError(f"{path} is not a trajectory (format: {metadata.get('format', 'none')})")
        if metadata.get("version") != str(_VERSION):
            raise FileFormatError(
                f"{path} has trajectory format version {metadata.get('version')}; this nblens reads {_VERSION}"
            )
        try:
            plain = json.loads(metadata["fields"])
            plain["vocabulary"] = {int(i): str(text) for i, text in plain["vocabulary"].items()}
            plain["tokens"], plain["layers"] = tuple(plain["tokens"]), tuple(plain["layers"])
            return cls(**{name: arrays[name] for name in _array_names()}, **plain)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{path} is damaged: {error!r}") from error

    def diff(self, other: Trajectory) -> TrajectoryDiff:
        """What changed from this trajectory to `other`, cell by cell, over their common tokens.

        Raises
        ------
        UserError
            The two were read at different layers or sites.
        """
        return TrajectoryDiff.between(self, other)

    def to_html(self, path: str | os.PathLike[str] | None = None, *, metric: str = "prob") -> str:
        """The grid as one self-contained HTML page, returned and, where `path` is given, written."""
        from nblens.lens.html import render_page

        page = render_page(self, metric=metric)
        if path is not None:
            Path(path).write_text(page, encoding="utf-8")
        return page

    def plot(self, metric: str = "prob") -> Figure:
        """The grid as a matplotlib figure; `metric` as in `metric()`."""
        from nblens import plots

        return plots.trajectory_grid(self, metric=metric)

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
        return (
            f"Trajectory({self.n_layers} layers × {self.n_tokens} tokens at {self.site}, "
            f"top {self.top_ids.shape[-1]}, {self.model})"
        )

    def _repr_html_(self) -> str:
        from nblens.lens.html import render_fragment

        return render_fragment(self)


@dataclass(frozen=True, repr=False, eq=False)
class TrajectoryDiff:
    """Signed differences `other - base` over the tokens that both share, (n_layers, n_tokens)."""

    base: Trajectory
    other: Trajectory
    top1_changed: np.ndarray
    """bool (n_layers, n_tokens)"""

    @classmethod
    def between(cls, base: Trajectory, other: Trajectory) -> TrajectoryDiff:
        """Align the two on their longest common run of tokens from the start."""
        if base.layers != other.layers or base.site != other.site:
            raise UserError(
                f"cannot compare {base.site} at layers {format_layers(base.layers)} with "
                f"{other.site} at layers {format_layers(other.layers)}"
            )
        length = min(base.n_tokens, other.n_tokens)
        differs = base.token_ids[:length] != other.token_ids[:length]
        length = int(np.argmax(differs)) if differs.any() else length
        base, other = base.truncated(length), other.truncated(length)
        return cls(base, other, base.top_ids[..., 0] != other.top_ids[..., 0])

    def metric(self, name: str) -> np.ndarray:
        """Signed difference of a metric, (n_layers, n_tokens).

        "prob" follows one token through both runs: the token that `other` puts first. It is the change of that
        token's probability, a lower bound where it was not among the top k of `base`.
        """
        if name == "prob":
            return np.exp(self.other.top_logprobs[..., 0]) - self._base_probability_of_other_top()
        return self.other.metric(name).astype(np.float32) - self.base.metric(name)

    def _base_probability_of_other_top(self) -> np.ndarray:
        same = self.base.top_ids == self.other.top_ids[..., :1]
        return np.where(same, np.exp(self.base.top_logprobs), 0.0).sum(-1)

    def __repr__(self) -> str:
        return (
            f"TrajectoryDiff({self.base.n_layers} layers × {self.base.n_tokens} tokens, "
            f"top token changed in {self.top1_changed.mean():.0%} of cells)"
        )

    def _repr_html_(self) -> str:
        from nblens.lens.html import render_fragment

        return render_fragment(self)

    def plot(self, metric: str = "prob") -> Figure:
        """The differences as a matplotlib figure with a diverging map."""
        from nblens import plots

        return plots.trajectory_grid(self, metric=metric)


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """The same prompt without and with steering: two rows of one batch."""

    base: Trajectory
    steered: Trajectory
    base_text: str = ""
    """new text without steering; empty where nothing was generated"""
    steered_text: str = ""

    @property
    def diff(self) -> TrajectoryDiff:
        """`steered - base`."""
        return self.base.diff(self.steered)

    def __repr__(self) -> str:
        return f"Comparison(base={self.base!r}, steered={self.steered!r})"

    def _repr_html_(self) -> str:
        from nblens.lens.html import render_fragment

        return render_fragment(self)


def _array_names() -> tuple[str, ...]:
    return (*_PER_TOKEN, *_PER_CELL, *_PER_CELL_MANY, "target_ids")


def _check_array(name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} has shape {array.shape}, expected {shape}")
    kind = np.integer if name.endswith(("ids", "rank", "ranks")) else np.floating
    if not np.issubdtype(array.dtype, kind):
        raise ValueError(f"{name} holds {array.dtype}, expected {kind.__name__} numbers")
