"""Decoding steps recorded once and replayed: on one CUDA device a CUDA graph, elsewhere nothing.

Everything that a step reads and writes stays at one address: token ids, positions, mask and KV cache here, coefficients
in the steering bank, activations in the capture buffer. So the recorded step serves every token of every run of the
same shape, and a moved slider changes a tensor, not the recording. What a recording holds addresses of is kept
together, and the next run of the same shape takes it over with its own prompt, vectors and coefficients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import torch

from nblens.engine.runner import Runner
from nblens.errors import first_line
from nblens.model.architecture import input_device, logit_tolerance
from nblens.model.batching import Batching
from nblens.model.capture import CaptureBuffer
from nblens.model.generation import Batch, cache_name, takes
from nblens.specs import RunSpec
from nblens.steering.bank import SteeringBank, layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "CudaGraphRecorder",
    "Recorder",
    "Recording",
    "StaticDecoder",
    "Workspace",
    "Workspaces",
    "decodes_statically",
    "find_recorder",
]

_ROOM = 256
"""columns by which a cache grows, so that prompts of like length share a recording"""


@dataclass(frozen=True)
class Recording:
    """What was recorded."""

    output: torch.Tensor
    """overwritten by every replay, and undefined before the first"""
    replay: Callable[[], None]


class Recorder(Protocol):
    """Records what a function does to tensors."""

    def record(self, step: Callable[[], torch.Tensor]) -> Recording:
        """Record one call, without any effect on the tensors that it writes to.

        Raises
        ------
        RuntimeError
            The step cannot be recorded: it reads a tensor's value in Python.
        """


class CudaGraphRecorder:
    """Records on a CUDA device. Not run by the project so far: no GPU was at hand."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def record(self, step: Callable[[], torch.Tensor]) -> Recording:
        """See `Recorder.record`."""
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the device meanwhile: a widget's, or the user's own
        with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            output = step()
        return Recording(output, graph.replay)


def find_recorder(model: PreTrainedModel) -> Recorder | None:
    """Find what records steps of a model; None where it is not whole on one CUDA device."""
    tensors = list(chain(model.parameters(), model.buffers()))
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(hasattr(tensor, "to_local") for tensor in tensors):
        return None
    device = devices.pop()
    return CudaGraphRecorder(device) if device.type == "cuda" else None


def decodes_statically(model: PreTrainedModel, batching: Batching) -> bool:
    """Tell whether one and the same step fits every token of this model.

    Layers with a sliding window take other branches when it is full; state-space layers have states of their own.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    if (
        replace(batching, longest=None, varies=False) != Batching()
        or cache_name(model) != "past_key_values"
        or not model._can_compile_fullgraph
    ):
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
        output: Any = self._model(
            input_ids=self._ids,
            attention_mask=self._mask,
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits
        return logits[:, -1]

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
        layers: Sequence[Any] = self.cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(column)


@dataclass(frozen=True)
class Workspace:
    """What the steps of a run read and write."""

    bank: SteeringBank
    """steers them"""
    buffer: CaptureBuffer | None
    """takes their activations; None: nothing is captured"""
    decoder: StaticDecoder | None = None
    """feeds generated tokens by a step that may be recorded; None: plain calls of the model do"""


class Workspaces:
    """Makes workspaces; keeps the last one with a decoder, whose cache takes the memory of the longest text it fits.

    Parameters
    ----------
    runner : Runner
        The model.
    recorder : Recorder, optional
        What records its steps; None: nothing does.
    """

    def __init__(self, runner: Runner, recorder: Recorder | None) -> None:
        self._runner = runner
        self._recorder = recorder if recorder and decodes_statically(runner.model, runner.batching) else None
        self._kept: tuple[Any, Workspace] | None = None

    def take(
        self, spec: RunSpec, batch: Batch, places: Mapping[str, tuple[int, ...]], width: int, window: int
    ) -> Workspace:
        """Give what a run works in: the one that is kept, where its recorded step fits this run, too.

        Parameters
        ----------
        places : mapping of str to tuple of int
            Blocks to capture per site.
        width : int
            Columns of a prompt's step.
        window : int
            Decoded columns that wait for one readout.
        """
        if self._kept is not None and (decoder := self._kept[1].decoder) is not None and decoder.refused:
            self._kept = self._recorder = None  # what cannot be recorded runs faster over a cache that grows
        if self._recorder is None or spec.generation is None or self._is_hooked():
            return self._new(spec, batch, places, batch.rows * max(min(width, batch.width), window))
        length = -(-(batch.width + spec.generation.max_new_tokens) // _ROOM) * _ROOM
        capacity = batch.rows * max(width, window)
        weights = tuple(parameter.data_ptr() for parameter in self._runner.model.parameters())
        kinds = tuple(places.items()), layout_of(spec.steering), weights, _adapters(self._runner.model)
        shape = (batch.rows, length, capacity, *kinds)
        if self._kept is not None and self._kept[0] == shape:
            workspace = self._kept[1]
            workspace.bank.fill(spec.steering)
            if workspace.buffer is not None:
                workspace.buffer.clear()  # of a run that failed
            return workspace
        self._kept = None  # before the next one takes its memory
        decoder = StaticDecoder(self._runner.model, batch.rows, length, self._recorder)
        workspace = self._new(spec, batch, places, capacity, decoder)
        self._kept = shape, workspace
        return workspace

    def forget(self) -> None:
        """Free what is kept: memory ran out."""
        self._kept = None

    def _new(
        self,
        spec: RunSpec,
        batch: Batch,
        places: Mapping[str, tuple[int, ...]],
        capacity: int,
        decoder: StaticDecoder | None = None,
    ) -> Workspace:
        architecture = self._runner.architecture
        buffer = CaptureBuffer(architecture, places, capacity, self._runner.output_device) if places else None
        return Workspace(SteeringBank(spec.steering, batch.rows, architecture.dtype), buffer, decoder)

    def _is_hooked(self) -> bool:
        """Tell whether the user has hooks on the model: a recording would run them once instead of at every token."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self._runner.model.modules())


def _adapters(model: PreTrainedModel) -> tuple[str, ...]:
    """Describe which of the adapters that peft has put on a model act, and how strongly: a recording has that fixed."""
    states = []
    for module in model.modules():
        if isinstance(active := getattr(module, "active_adapters", None), list):
            others = (getattr(module, name, None) for name in ("disable_adapters", "merged_adapters", "scaling"))
            states.append(f"{active} {list(others)}")
    return tuple(states)
