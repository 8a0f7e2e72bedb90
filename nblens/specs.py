"""What crosses from the notebook to the model: requests, and the events of a run.

Plain frozen values that pickle. A closure or a module never crosses, so the same request works in this
process and in a worker on another machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

__all__ = [
    "EXTRACTION_METHODS",
    "FINISHED",
    "LENS_KINDS",
    "LENS_METRICS",
    "PHASES",
    "ActivationSlice",
    "AttributionSpec",
    "CaptureSpec",
    "Event",
    "ExtractionFinished",
    "ExtractionSpec",
    "FitFinished",
    "FitSpec",
    "GenerationSpec",
    "LensSpec",
    "LensTensors",
    "Positions",
    "Progress",
    "ReadoutSlice",
    "Request",
    "RunFinished",
    "RunSpec",
    "ScoredText",
    "Scores",
    "ScoringSpec",
    "Span",
    "SteeringWrite",
    "TokensSampled",
    "Turn",
]

LENS_METRICS = ("entropy", "kl", "rank")
"""What a lens can compute beside log-probabilities: of the top tokens, the token that follows, and targets."""


PHASES = ("prefill", "decode", "readout", "total")
"""What the seconds of a run are counted by."""

EXTRACTION_METHODS = ("mean_diff", "pca_diff", "pca_center", "logistic")
"""How contrast pairs become a direction."""

Span = tuple[int, int]
"""Absolute positions from a first up to, not including, a last."""

LENS_KINDS = ("tuned", "jacobian")
"""Lenses that have translators: affine, fitted to the model's output; or the mean Jacobian of the last block."""


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: the tokens that hold its content."""

    role: str
    start: int
    """absolute position of the first"""
    stop: int
    """the one after the last; as `start` where no token is known to hold it"""


@dataclass(frozen=True)
class SteeringWrite:
    """A `Steer` resolved against the model: directions by block, and a coefficient for each row."""

    name: str
    site: str
    directions: Mapping[int, np.ndarray]
    """block → float32 (d_model,)"""
    coefficients: tuple[float | None, ...]
    """one per row of the batch; None: not steered"""
    write: str = "all"
    op: str = "add"


@dataclass(frozen=True)
class LensSpec:
    """What the lens reads at every token."""

    blocks: tuple[int, ...]
    sites: tuple[str, ...] = ("resid_post",)
    top_k: int = 5
    target_ids: tuple[int, ...] | None = ()
    """None: the leaders at the prompt's last token, the distinct top tokens over the blocks, of which log-probabilities
    are read from there on, and as far back as one step reaches"""
    lens: str = "logit"
    """"logit", or the name of `LensTensors` that were sent before"""
    metrics: tuple[str, ...] = LENS_METRICS
    compared: bool = False
    """the second row is the first under steering: at each of its tokens, read what the first makes of its top token,
    and where "kl" is among the metrics, KL(first ‖ second)"""


@dataclass(frozen=True)
class AttributionSpec:
    """Whose logits are taken apart into what every block adds."""

    blocks: tuple[int, ...]
    target_ids: tuple[int, ...]


@dataclass(frozen=True)
class Positions:
    """Tokens of one row; negative numbers count from the end of what is fed, which the run alone knows.

    >>> Positions(span=(-3, None, None)).of(9), Positions(indices=(-1, 0)).of(9)
    ((6, 7, 8), (0, 8))
    """

    indices: tuple[int, ...] = ()
    span: tuple[int | None, int | None, int | None] | None = None
    """start, stop and step of a slice, in the place of indices"""

    @property
    def counts_from_end(self) -> bool:
        """Whether other tokens are meant where more are fed."""
        start, stop, step = self.span or (None, None, None)
        return any(n < 0 for n in (*self.indices, start or 0, stop or 0, step or 1))

    def of(self, n_fed: int) -> tuple[int, ...]:
        """Absolute positions of a row of so many tokens, ascending; those outside of it are left out."""
        if self.span is not None:
            return tuple(sorted(range(n_fed)[slice(*self.span)]))
        return tuple(sorted({i % n_fed for i in self.indices if -n_fed <= i < n_fed}))

    def may_hold(self, position: int, n_fed: int) -> bool:
        """Whether a position may still be meant once `n_fed` tokens have been fed, and more may follow."""
        if self.span is None:
            return position in self.indices or any(i < 0 and position - i >= n_fed for i in self.indices)
        start, stop, step = self.span
        if step not in (None, 1):
            return True
        first = (start or 0) + n_fed if (start or 0) < 0 else start or 0
        return position >= first and (stop is None or stop < 0 or position < stop)


@dataclass(frozen=True)
class CaptureSpec:
    """Which raw activations are kept."""

    blocks: tuple[int, ...]
    sites: tuple[str, ...]
    positions: tuple[tuple[int, ...], ...] = ()
    """absolute positions to keep for each row, ascending; empty: all"""
    from_end: tuple[Positions, ...] = ()
    """in the place of `positions`, for each row, where the end decides"""
    to: str | None = None
    """file that they are written to as they come, instead of being handed out"""

    def tensor_name(self, row: int, site: str, n_rows: int) -> str:
        """What a row's activations at a site are called in the file."""
        return site if n_rows == 1 else f"{row}.{site}"


@dataclass(frozen=True)
class GenerationSpec:
    """How text is continued.

    `options` are further fields of transformers' `GenerationConfig` (`top_p`, `repetition_penalty`,
    `stop_strings`, …). Each row draws from a generator of its own, so that its text does not depend on the rows
    beside it.
    """

    max_new_tokens: int
    temperature: float = 0.0
    seeds: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunSpec:
    """One run: a batch of prompts through the model once, read, kept, steered and continued as asked."""

    prompts: tuple[tuple[int, ...], ...]
    lens: LensSpec | None = None
    attribution: AttributionSpec | None = None
    capture: CaptureSpec | None = None
    generation: GenerationSpec | None = None
    steering: tuple[SteeringWrite, ...] = ()
    chunk: int | None = None
    """prompt tokens per step over all rows; None: chosen from the model's size"""
    watched: bool = False
    """somebody is looking: read out decoded tokens every 100 ms instead of every 64 steps"""
    turns: tuple[tuple[Turn, ...], ...] = ()
    """for each prompt the messages that it was made of; empty: no prompt is a conversation"""
    templates: tuple[str, ...] = ()
    """what was done with the chat template for each prompt, in words; of no account for the run"""


@dataclass(frozen=True)
class ExtractionSpec:
    """Contrast pairs to turn into a direction per block."""

    positive: tuple[tuple[int, ...], ...]
    negative: tuple[tuple[int, ...], ...]
    positive_spans: tuple[Span, ...] = ()
    """for each text the positions whose mean activation is read; empty: its last token"""
    negative_spans: tuple[Span, ...] = ()
    left_out: tuple[int, ...] | None = None
    """ids of special tokens, which means leave out beside each text's first; None: means take in all of a span"""
    site: str = "resid_post"
    method: str = "mean_diff"
    blocks: tuple[int, ...] = ()
    """for which directions are computed; empty: all"""
    n_shuffles: int = 0
    """how many times the same is computed with the sides of each pair swapped or not, at random"""
    seed: int = 0
    """of the swaps"""
    batch_size: int = 256
    """most pairs that go through the model at once; fewer where their texts are long"""


@dataclass(frozen=True)
class ScoredText:
    """Tokens to feed, and what may follow the prompt among them."""

    ids: tuple[int, ...]
    prompt_length: int
    """how many of `ids` are prompt; the rest is the beginning of an answer"""
    answers: tuple[tuple[int, ...], ...]
    """tokens of each answer, one more than `ids` holds: all share what was fed and differ in the last"""
    label: int | None = None
    """position of the answers' label"""
    turns: tuple[Turn, ...] = ()
    """the messages of a prompt that is a conversation"""


@dataclass(frozen=True)
class ScoringSpec:
    """Texts whose answers are scored under several settings of steering."""

    texts: tuple[ScoredText, ...]
    n_settings: int
    steering: tuple[SteeringWrite, ...] = ()
    """with a coefficient for each setting"""
    kl: bool = False
    """compute KL(first setting ‖ setting) of the predicted distributions, too"""
    batch_tokens: int = 2048
    """most tokens that go through the model at once"""


@dataclass(frozen=True)
class LensTensors:
    """The translators that `LensSpec.lens` shall stand for in later runs; without weights: forget them."""

    name: str
    kind: str = ""
    weights: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """depth → (d_model, d_model)"""
    biases: Mapping[int, torch.Tensor] = field(default_factory=dict)
    """depth → (d_model,)"""


@dataclass(frozen=True)
class FitSpec:
    """A lens to fit to texts."""

    kind: str
    texts: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    """texts that measure the lens and take no part in fitting it"""
    steps: int = 0
    """tuned lens alone: how often its translators learn"""
    learning_rate: float = 0.0
    """tuned lens alone"""
    batch_tokens: int = 1024
    """most tokens that go through the model at once"""
    seed: int = 0


@dataclass(frozen=True)
class ReadoutSlice:
    """What the lens read for consecutive tokens of one row at one site."""

    row: int
    site: str
    start: int
    """absolute position of the first token"""
    arrays: Mapping[str, np.ndarray]
    """field of `Trajectory` → (n_layers, n, …)"""
    target_ids: tuple[int, ...] = ()
    """what the arrays' targets are"""


@dataclass(frozen=True)
class ActivationSlice:
    """Raw activations of consecutive tokens of one row at one site."""

    row: int
    site: str
    start: int
    """place of the first among the row's kept tokens: its absolute position where all are kept"""
    values: torch.Tensor
    """(n_layers, n, d_model), on the CPU, in the model's dtype"""
    positions: tuple[int, ...] = ()
    """absolute positions of the tokens, where `CaptureSpec.from_end` chose them"""


@dataclass(frozen=True)
class TokensSampled:
    """One decoding step: the new token of every row, None for a row that had ended or was not fed in this step."""

    step: int
    """how many new tokens the fed rows had before"""
    token_ids: tuple[int | None, ...]

    def place_in(self, rows: Sequence[list[int]]) -> None:
        """Put the tokens where they belong among each row's new ones.

        A step that comes again, after a restart with a smaller chunk, takes the place of what it repeats.
        """
        for row, token in zip(rows, self.token_ids, strict=True):
            if token is not None:
                row[self.step :] = [token]


@dataclass(frozen=True)
class RunFinished:
    """The last event of a run."""

    cancelled: bool
    timings: Mapping[str, float]
    """seconds by `PHASES`, without those there were not; forward_tokens: columns × steps that went through the model"""


@dataclass(frozen=True)
class ExtractionFinished:
    """The last event of an extraction."""

    directions: np.ndarray
    """float32 (n_blocks, d_model), of the blocks that were asked for; zeros where it was stopped"""
    separation: np.ndarray
    """float32 (n_blocks,): of pairs that the direction has not seen, as in `nblens.steering.judging`; NaN: too few"""
    separation_error: np.ndarray
    """float32 (n_blocks,): its standard error"""
    n_judges: int
    """by how many pairs"""
    activation_norms: np.ndarray
    """float32 (n_blocks,): mean Euclidean norm of a token's activation where it was read, over both sides"""
    shuffled: np.ndarray
    """float32 (n_shuffles, n_blocks, d_model): directions of pairs with randomly swapped sides"""
    carried: tuple[tuple[int, int], ...]
    """per block: of how many texts one token carries more than half of the mean's norm, and which it is most often"""
    data_hash: str
    cancelled: bool


@dataclass(frozen=True)
class Scores:
    """The scores of one text."""

    text: int
    logprobs: np.ndarray
    """float32 (n_settings, n_answers, n_tokens): of every token of an answer after those before it, nats"""
    kl: np.ndarray | None = None
    """float32 (n_settings, n_tokens): KL(first setting ‖ setting) where each token is predicted, nats"""


@dataclass(frozen=True)
class Progress:
    """One step of a fit, or one batch of an extraction, is done."""

    step: int
    """how many are done"""
    n_steps: int
    kl: float | None = None
    """tuned lens: mean KL(model's output ‖ lens) over this step's tokens and all depths, nats"""


@dataclass(frozen=True)
class FitFinished:
    """The last event of a fit."""

    weights: Mapping[int, torch.Tensor]
    """depth → float32 (d_model, d_model) on the CPU; empty where it was stopped too early"""
    biases: Mapping[int, torch.Tensor]
    """depth → float32 (d_model,) on the CPU"""
    steps: int
    """how many were done"""
    n_texts: int
    """how many it has seen"""
    kl_before: tuple[float, ...]
    """per depth, of the logit lens on held-out texts, nats; empty where the fit was stopped"""
    kl_after: tuple[float, ...]
    """per depth, of the fitted lens"""
    cancelled: bool


Request = RunSpec | ExtractionSpec | ScoringSpec | FitSpec | LensTensors
"""What a backend can be asked for."""

Event = (
    ReadoutSlice | ActivationSlice | TokensSampled | Scores | Progress | RunFinished | ExtractionFinished | FitFinished
)

FINISHED = (RunFinished, ExtractionFinished, FitFinished)
"""Events that are the last of their request."""


def finished(events: Sequence[Event]) -> RunFinished | ExtractionFinished | FitFinished:
    """The last event of a request that has ended."""
    last = events[-1]
    assert isinstance(last, FINISHED)
    return last
