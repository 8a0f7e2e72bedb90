"""Fitting a jacobian lens: what a change of an early residual stream does to the last one, on average."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from nblens.model.architecture import Architecture, input_device
from nblens.model.hooks import HookPoint, Instrumentation
from nblens.specs import FitSpec, LensTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["LONGEST", "SKIPPED", "JacobianFit"]

SKIPPED = 16
"""Tokens at a text's start that are left out: they attract attention whatever they are."""

LONGEST = 128
"""Tokens of a text that are used."""


class JacobianFit:
    """The mean Jacobian of the last block's output by the residual stream at each depth.

    J_l = mean over texts and positions t of Σ_{t' ≥ t} ∂h_last[t'] / ∂h_l[t]: a change of one token's stream, and what
    it does to that token and to all that follow it. Positions t and t' leave out a text's first 16 tokens and its last,
    and texts are cut to 128 tokens: the estimator of Gurnee et al. 2026 ("Verbalizable Representations Form a Global
    Workspace in Language Models", transformer-circuits.pub/2026/workspace) in their reference implementation, jlens.

    A text goes through the model once, as many copies as fit into `batch_tokens`; a backward pass then gives one
    output dimension for each copy.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, spec: FitSpec) -> None:
        self._model, self._architecture = model, architecture
        self._texts = [text[:LONGEST] for text in spec.texts if len(text[:LONGEST]) > SKIPPED + 1]
        self._copies = [min(architecture.d_model, max(1, spec.batch_tokens // len(text))) for text in self._texts]
        self._sums = torch.zeros(architecture.n_blocks, architecture.d_model, architecture.d_model)
        self.n_texts = 0
        """how many texts the mean is over"""
        self.n_steps = sum(-(-architecture.d_model // copies) for copies in self._copies)

    def steps(self) -> Iterator[None]:
        """Work through the texts; a step is one backward pass."""
        for text, copies in zip(self._texts, self._copies, strict=True):
            jacobians = torch.zeros_like(self._sums)
            yield from self._differentiate(text, copies, jacobians)
            self._sums += jacobians
            self.n_texts += 1

    def tensors(self) -> LensTensors:
        """The mean over the texts that are done; no weights before the first is."""
        depths = range(self._architecture.n_blocks) if self.n_texts else ()
        return LensTensors("", "jacobian", {depth: self._sums[depth] / self.n_texts for depth in depths})

    def _differentiate(self, text: tuple[int, ...], copies: int, jacobians: torch.Tensor) -> Iterator[None]:
        """Fill in the Jacobians of one text, (n_blocks, d_model, d_model), a few output dimensions at a time."""
        last, streams = self._forward(text, copies)
        used = slice(SKIPPED, len(text) - 1)
        d_model = self._architecture.d_model
        for start in range(0, d_model, copies):
            dimensions = range(start, min(start + copies, d_model))
            wanted = torch.zeros_like(last)
            for copy, dimension in enumerate(dimensions):
                wanted[copy, used, dimension] = 1
            gradients = torch.autograd.grad(last, streams, wanted, retain_graph=dimensions.stop < d_model)
            for depth, gradient in enumerate(gradients):
                rows = gradient[: len(dimensions), used].float().mean(1)
                jacobians[depth, dimensions.start : dimensions.stop] = rows.cpu()
            yield

    def _forward(self, text: tuple[int, ...], copies: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The last block's output, (copies, n_tokens, d_model), and the streams it depends on, with their graph."""
        streams: list[torch.Tensor] = []
        blocks = self._architecture.blocks
        enter = HookPoint(blocks[0], "input", edit=lambda h: h.detach().requires_grad_(), capture=streams.append)
        leave = [HookPoint(block, capture=streams.append) for block in blocks]
        # of the logits, which nobody wants here, as few as the model lets one choose
        few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self._model.forward).parameters else {}
        ids = torch.tensor([text] * copies, device=input_device(self._model))
        with torch.enable_grad(), Instrumentation([enter, *leave]):
            self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **few)
        *streams, last = streams
        return last, streams
