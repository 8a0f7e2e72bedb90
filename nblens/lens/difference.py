"""What differs between two trajectories: `TrajectoryDiff`, and the `Comparison` of a steered run with its base."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nblens.errors import UserError
from nblens.layers import format_layers
from nblens.lens.shown import Shown
from nblens.lens.trajectory import Trajectory

__all__ = ["Comparison", "TrajectoryDiff"]


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
        token's probability; where the token is not among the top k of `base`, its probability there counts as 0,
        and the change shown is too large by at most `prob_uncertainty`.
        """
        if name == "prob":
            base = np.where(self._same_token, np.exp(self.base.top_logprobs), 0.0).sum(-1)
            return np.exp(self.other.top_logprobs[..., 0]) - base
        change = self.other.metric(name).astype(np.float32) - self.base.metric(name)
        if name == "rank":
            change[(self.base.next_rank < 1) | (self.other.next_rank < 1)] = np.nan
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
        return np.where(self._same_token.any(-1), 0.0, np.exp(self.base.top_logprobs[..., -1]))

    @property
    def _same_token(self) -> np.ndarray:
        """Where `base` holds what `other` puts first, bool (n_layers, n_tokens, k)."""
        return self.base.top_ids == self.other.top_ids[..., :1]

    def __repr__(self) -> str:
        return (
            f"TrajectoryDiff({self.base.n_layers} layers × {self.base.n_tokens} tokens, "
            f"top token changed in {self.top1_changed.sum()} of {self.top1_changed.size} cells{self._from})"
        )

    @property
    def _from(self) -> str:
        changed = self.parts_at[self.parts_at >= 0]
        return f", from layer {changed.min()} on" if len(changed) else ""


@dataclass(frozen=True, repr=False, eq=False)
class Comparison(Shown):
    """The same prompt without and with steering: two rows of one batch.

    >>> both = session.compare("The summer was", steer={"cheerful": -1.5}, generate=1)
    >>> both.base_text, both.steered_text
    (' quite', ' dreary')
    >>> both.base.top()[0][0], both.steered.top()[0][0]
    (' quite', ' dreary')
    """

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
        return f"Comparison(base={self.base!r}, steered={self.steered!r}, diff={self.diff!r})"
