"""`Decodings`: what a recorded decoding step reads and writes, kept from run to run.

A recording holds addresses: of the KV cache, the steering bank and the capture buffer. They are kept together, and
the next run of the same shape takes them over with its own prompt, vectors and coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nblens.model.architecture import Architecture, output_device
from nblens.model.capture import CaptureBuffer
from nblens.model.feeding import Feeding
from nblens.model.generation import Batch
from nblens.model.recording import Recorder
from nblens.model.static_decoding import StaticDecoder, decodes_statically
from nblens.specs import RunSpec
from nblens.steering.bank import SteeringBank, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Decoding", "Decodings"]

_ROOM = 256
"""columns by which a cache grows, so that prompts of like length share a recording"""


@dataclass(frozen=True)
class Decoding:
    """Of one shape: how tokens are fed, what steers them, and where activations go."""

    shape: tuple[Any, ...]
    decoder: StaticDecoder
    bank: SteeringBank
    buffer: CaptureBuffer | None


class Decodings:
    """Keeps the last one, whose cache takes the memory of the longest text that it has room for."""

    def __init__(
        self, model: PreTrainedModel, architecture: Architecture, feeding: Feeding, recorder: Recorder | None
    ) -> None:
        self._model, self._architecture = model, architecture
        self._recorder = recorder if recorder and decodes_statically(model, feeding) else None
        self._kept: Decoding | None = None

    def take(
        self, spec: RunSpec, batch: Batch, places: Mapping[str, tuple[int, ...]], capacity: int
    ) -> Decoding | None:
        """What a run decodes with; None where steps are not recorded.

        Parameters
        ----------
        places : mapping of str to tuple of int
            Blocks to capture per site.
        capacity : int
            Tokens that the capture buffer must hold.
        """
        if self._kept is not None and self._kept.decoder.refused:
            self._kept = self._recorder = None  # what cannot be recorded runs faster over a cache that grows
        if self._recorder is None or spec.generation is None or self._is_hooked():
            return None
        length = -(-(batch.width + spec.generation.max_new_tokens) // _ROOM) * _ROOM
        weights = tuple(parameter.data_ptr() for parameter in self._model.parameters())
        shape = (batch.rows, length, capacity, tuple(places.items()), layout_of(spec.steering), weights)
        if self._kept is not None and self._kept.shape == shape:
            self._kept.bank.fill(spec.steering)
            if self._kept.buffer is not None:
                self._kept.buffer.clear()  # of a run that failed
            return self._kept
        self._kept = None  # before the next one takes its memory
        buffer = None
        if places:
            buffer = CaptureBuffer(self._architecture, places, capacity, output_device(self._architecture))
        bank = SteeringBank(spec.steering, batch.rows, self._architecture.dtype)
        decoder = StaticDecoder(self._model, batch.rows, length, self._recorder)
        self._kept = Decoding(shape, decoder, bank, buffer)
        return self._kept

    def forget(self) -> None:
        """Free what is kept: memory ran out."""
        self._kept = None

    def _is_hooked(self) -> bool:
        """Whether the user has hooks on the model: a recording would run them once instead of at every token."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._model.modules())
