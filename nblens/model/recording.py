"""A computation over tensors that stay where they are, recorded once and then replayed without Python.

On one CUDA device that is a CUDA graph. Elsewhere there is no recorder, and every step runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["CudaGraphRecorder", "Recorder", "Recording", "find_recorder"]


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
    """What records steps of a model; None where it is not whole on one CUDA device."""
    tensors = list(chain(model.parameters(), model.buffers()))
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or any(hasattr(tensor, "to_local") for tensor in tensors):
        return None
    device = devices.pop()
    return CudaGraphRecorder(device) if device.type == "cuda" else None
