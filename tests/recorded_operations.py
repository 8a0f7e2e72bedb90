"""A recorder for a machine without a GPU: what a CUDA graph keeps is kept, what it loses is lost.

Recording runs a step once and undoes what it wrote. Replaying runs the same operations on the very same tensors, with
nothing of Python between them: a number, a branch or a tensor that the step took from Python stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.utils import import_utils

from nblens.engine.cuda_graph import Recording

_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::unique_dim", "aten::_unique2")
"""operations whose result Python must wait for"""


class OperationRecorder:
    """Counts what it recorded and how often that was replayed."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, step: Callable[[], torch.Tensor]) -> Recording:
        """See `nblens.engine.cuda_graph.Recorder.record`."""
        tape = _Tape()
        with pytest.MonkeyPatch.context() as patch, tape:
            patch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)  # so that masks are not looked into
            output = step()
        tape.undo()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return Recording(output, replay)


class _Tape(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple, dict, Any]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for written in _written(func, args, kwargs):
            self._before.setdefault(written.data_ptr(), (written, written.clone()))
        result = func(*args, **kwargs)
        self._calls.append((func, args, kwargs, result))
        return result

    def undo(self) -> None:
        for written, before in self._before.values():
            written.copy_(before)

    def replay(self) -> None:
        for func, args, kwargs, result in self._calls:
            if any(returned.alias_info is not None for returned in func._schema.returns):
                if _written(func, args, kwargs):
                    func(*args, **kwargs)
                continue  # a view of what is there
            new = func(*args, **kwargs)
            for kept, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(value)


def _written(func: Any, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """Arguments that an operation changes."""
    given = zip(func._schema.arguments, args, strict=False)
    named = ((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs)
    return [
        value
        for argument, value in (*given, *named)
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
    ]
