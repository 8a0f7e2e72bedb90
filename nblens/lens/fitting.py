"""Fitting the translators of a lens to texts, and measuring them on texts held out."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from nblens.errors import UserError
from nblens.lens.jacobian import JacobianFit
from nblens.lens.lens import Lens
from nblens.model.architecture import Architecture, output_device
from nblens.model.batching import packed
from nblens.specs import FitFinished, FitSpec, LensTensors, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["TunedFit", "data_hash", "fit_translators", "hold_out"]

Ids = tuple[int, ...]
ReadResiduals = Callable[[Sequence[Ids]], torch.Tensor]
"""Texts → the residual streams of all their tokens by depth, (n_blocks + 1, n_tokens, d_model)"""

_PIECE = 2**22  # logits at once
_MOMENTUM, _LARGEST_GRADIENT = 0.9, 1.0
_EVERY, _MOST_HELD_OUT = 5, 64


def fit_translators(
    model: PreTrainedModel,
    architecture: Architecture,
    spec: FitSpec,
    read: ReadResiduals,
    emit: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> FitFinished:
    """Fit a lens and measure it; one that is stopped keeps what it has, unmeasured."""
    fit = TunedFit(architecture, spec, read) if spec.kind == "tuned" else JacobianFit(model, architecture, spec)
    done = 0
    for kl in fit.steps():
        done += 1
        emit(Progress(done, fit.n_steps, kl))
        if cancelled():
            break
    tensors = fit.tensors()
    before: tuple[float, ...] = ()
    after: tuple[float, ...] = ()
    if not cancelled():
        batches = map(read, _batches(spec.held_out, spec.batch_tokens))
        before, after = mean_divergences(architecture, Lens.of(tensors).to(output_device(architecture)), batches)
    weights, biases = ({depth: t.cpu() for depth, t in part.items()} for part in (tensors.weights, tensors.biases))
    return FitFinished(weights, biases, done, fit.n_texts, before, after, cancelled())


class TunedFit:
    """An affine translator per depth that brings its readout near the model's own output.

    Minimises KL(model's output ‖ lens) over tokens (Belrose et al. 2023, arXiv 2303.08112, §3), all depths side by
    side on the same residual streams. Translators begin as the identity and learn by SGD with Nesterov momentum, a
    gradient clipped per depth and a rate that falls linearly to zero, as in the paper's own training.
    """

    def __init__(self, architecture: Architecture, spec: FitSpec, read: ReadResiduals) -> None:
        self._architecture, self._spec, self._read = architecture, spec, read
        d_model, device = architecture.d_model, output_device(architecture)
        depths = range(architecture.n_blocks)
        # on top of the identity
        self._weights = [torch.zeros(d_model, d_model, device=device, requires_grad=True) for _ in depths]
        self._biases = [torch.zeros(d_model, device=device, requires_grad=True) for _ in depths]
        self.n_steps = spec.steps
        self._n_read = 0

    @property
    def n_texts(self) -> int:
        """How many texts it has learned from."""
        return min(self._n_read, len(self._spec.texts))

    def steps(self) -> Iterator[float]:
        """Learn; after each step the mean KL over its tokens and all depths, in nats, before the step was taken.

        Raises
        ------
        UserError
            The divergence is no longer finite.
        """
        optimizer = torch.optim.SGD(
            [*self._weights, *self._biases], lr=self._spec.learning_rate, momentum=_MOMENTUM, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / self.n_steps)
        batches = _shuffled(self._spec.texts, self._spec.batch_tokens, self._spec.seed)
        for step, texts in zip(range(self.n_steps), batches, strict=False):
            kl = self._differentiate(self._read(texts))
            self._n_read += len(texts)
            if not math.isfinite(kl):
                raise UserError(
                    f"the fit diverged at step {step + 1} (KL {kl}); "
                    f"give a learning_rate below {self._spec.learning_rate:g}"
                )
            for pair in zip(self._weights, self._biases, strict=True):
                torch.nn.utils.clip_grad_norm_(pair, _LARGEST_GRADIENT)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            yield kl

    def tensors(self) -> LensTensors:
        """The translators so far."""
        weights = {depth: weight.detach() for depth, weight in enumerate(self._weights)}
        return LensTensors("", "tuned", weights, {depth: bias.detach() for depth, bias in enumerate(self._biases)})

    def _differentiate(self, residuals: torch.Tensor) -> float:
        """Leave the gradient of the mean divergence with the translators; the mean over depths is returned.

        The model's own parameters, which may want gradients too, get none.
        """
        n, total = residuals.shape[1], 0.0
        for rows, target in _targets(self._architecture, residuals):
            for depth, pair in enumerate(zip(self._weights, self._biases, strict=True)):
                weight, bias = pair
                with torch.enable_grad():
                    hidden = residuals[depth, rows].float()
                    translated = (hidden + F.linear(hidden, weight, bias)).to(residuals.dtype)
                    kl = _divergence(self._architecture, translated, target).sum() / n
                for parameter, gradient in zip(pair, torch.autograd.grad(kl, pair), strict=True):
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
                total += kl.item()
        return total / len(self._weights)


def mean_divergences(
    architecture: Architecture, lens: Lens, batches: Iterable[torch.Tensor]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean KL(model's output ‖ readout) over tokens by depth, without and with the translators, in nats."""
    sums = torch.zeros(2, architecture.n_blocks, dtype=torch.float64)
    n_tokens = 0
    for residuals in batches:
        n_tokens += residuals.shape[1]
        for rows, target in _targets(architecture, residuals):
            for depth in range(architecture.n_blocks):
                hidden = residuals[depth, rows]
                for i, read in enumerate((hidden, lens.translate(hidden, depth))):
                    sums[i, depth] += _divergence(architecture, read, target).sum().item()
    before, after = (sums / n_tokens).tolist()
    return tuple(before), tuple(after)


def hold_out(texts: Sequence[Ids]) -> tuple[tuple[Ids, ...], tuple[Ids, ...]]:
    """Texts to fit to, and texts to measure with: every fifth, at most 64, and at least one."""
    held = set(range(_EVERY - 1, len(texts), _EVERY)[:_MOST_HELD_OUT]) or {len(texts) - 1}
    return tuple(t for i, t in enumerate(texts) if i not in held), tuple(texts[i] for i in sorted(held))


def data_hash(spec: FitSpec) -> str:
    """SHA-256 of the token ids that a lens is fitted to."""
    return hashlib.sha256(json.dumps(spec.texts).encode()).hexdigest()


def _targets(architecture: Architecture, residuals: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
    """The model's own log-probabilities, (n, vocab_size), a piece of the tokens at a time."""
    n, size = residuals.shape[1], max(1, _PIECE // architecture.vocab_size)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        yield rows, _logits(architecture, residuals[-1, rows]).log_softmax(-1)


def _divergence(architecture: Architecture, hidden: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """KL(target ‖ readout of hidden) of each token, (n,), nats."""
    logprobs = _logits(architecture, hidden).log_softmax(-1)
    return F.kl_div(logprobs, target, reduction="none", log_target=True).sum(-1)


def _logits(architecture: Architecture, hidden: torch.Tensor) -> torch.Tensor:
    """Float32 logits that a gradient can flow through: `LogitTransform.apply_` works in place."""
    transform = architecture.transform
    logits = architecture.lm_head(architecture.apply_tail(hidden)).float() * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def _shuffled(texts: Sequence[Ids], batch_tokens: int, seed: int) -> Iterator[list[Ids]]:
    """Batches without end: all texts in a new order, again and again."""
    order, rng = list(texts), random.Random(seed)
    while True:
        rng.shuffle(order)
        yield from _batches(order, batch_tokens)


def _batches(texts: Sequence[Ids], batch_tokens: int) -> Iterator[list[Ids]]:
    """Neighbours that fit into a padded batch of so many tokens."""
    for batch in packed([len(text) for text in texts], batch_tokens):
        yield [texts[number] for number in batch]
