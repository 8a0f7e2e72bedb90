"""`StaticDecoder`: decoding over a KV cache of fixed size, by one step that is recorded once and replayed.

Everything that a step reads and writes stays at one address: token ids, positions, mask and cache here, coefficients
in the steering bank, activations in the capture buffer. So the recorded step serves every token of every run of the
same shape, and a moved slider changes a tensor, not the recording.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from nblens.errors import first_line
from nblens.model.architecture import input_device, logit_tolerance
from nblens.model.feeding import Feeding
from nblens.model.generation import Batch, cache_name, takes
from nblens.model.recording import Recorder, Recording

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["StaticDecoder", "decodes_statically"]


def decodes_statically(model: PreTrainedModel, feeding: Feeding) -> bool:
    """Whether one and the same step fits every token of this model.

    Layers with a sliding window take other branches when it is full; state-space layers have states of their own.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if feeding != Feeding() or cache_name(model) != "past_key_values" or not model._can_compile_fullgraph:
        return False
    if not (takes(model, "position_ids") and takes(model, "logits_to_keep")):
        return False
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return all(type(layer) is StaticLayer for layer in layers)


class StaticDecoder:
    """Decodes batches of one shape, one after the other.

    The first step of the first batch runs as it is written, and is then recorded. The recording must give that
    step's logits again; else it is thrown away, and every step runs as it is written.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        One that `decodes_statically`.
    rows, length : int
        Of every batch: rows, and the columns that its prompts and new tokens have room in.
    recorder : Recorder
        What records the step.
    """

    def __init__(self, model: PreTrainedModel, rows: int, length: int, recorder: Recorder) -> None:
        from transformers import StaticCache

        self._model, self._recorder = model, recorder
        self._recording: Recording | None = None
        self.refused = ""
        """why no recording is used; empty as long as nothing speaks against it"""
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        device = input_device(model)
        self._mask = torch.zeros((rows, length), dtype=torch.long, device=device)
        self._ids = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self._positions = torch.zeros((rows, 1), dtype=torch.long, device=device)

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._recording is not None

    def begin(self, batch: Batch) -> None:
        """Forget the last batch, and take in where the next one is padded; its prompts go into `cache`."""
        self.cache.reset()
        self._mask.zero_()
        self._mask[:, : batch.width] = batch.mask

    def step(self, ids: torch.Tensor, positions: torch.Tensor, column: int) -> torch.Tensor:
        """Feed one more token of every row.

        Parameters
        ----------
        ids, positions : torch.Tensor
            int64 (rows, 1)
        column : int
            Of the padded batch.

        Returns
        -------
        torch.Tensor
            Logits, (rows, vocab_size), valid until the next step.
        """
        self._ids.copy_(ids)
        self._positions.copy_(positions)
        self._mask[:, column] = 1
        if self._recording is not None:
            self._recording.replay()
            return self._recording.output
        logits = self._forward()
        if not self.refused:
            self._record(logits, column)
        return logits

    def _forward(self) -> torch.Tensor:
        output = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _record(self, expected: torch.Tensor, column: int) -> None:
        """Record the step that has just been run, and run it again from the recording."""
        try:
            recording = self._recorder.record(self._forward)
        except RuntimeError as error:
            self.refused = first_line(error)
            return
        self._go_back_to(column)
        recording.replay()
        difference = (recording.output - expected).abs().max().item()
        if difference <= logit_tolerance(expected, expected.dtype):
            self._recording = recording
            return
        self.refused = f"the recorded step gave other logits than the step itself, by {difference:.3g}"
        self._go_back_to(column)
        self._forward()  # over whatever the recording wrote

    def _go_back_to(self, column: int) -> None:
        """Have the next step fed at a column that was fed before."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(column)
