"""Blocks below all that a setting writes: they say the same under every setting, and run once for all of them.

A block that has run gives back what it gave, to hooks and to the blocks above, without running again. Whether a model
bears that is not assumed: `can_skip` compares, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from nblens.engine.control import Control, Listening
from nblens.engine.runner import Runner
from nblens.model.architecture import Architecture
from nblens.model.generation import Batch
from nblens.model.hooks import hidden_of
from nblens.specs import SteeringWrite
from nblens.steering.operations import REST

__all__ = ["acts", "can_skip", "highest_unwritten", "outputs_of", "skipping"]

_AFTER_A_BLOCK = "resid_post"
_PROOF_ROWS = ((3, 5, 4, 6), (6, 4, 3))  # ids that every vocabulary has


def highest_unwritten(writes: Iterable[SteeringWrite], setting: int, n_blocks: int) -> int:
    """The last block whose own computation nothing changes under a setting; -1: there is none."""
    first = n_blocks - 1
    for write in writes:
        if acts(write, setting):
            lowest = min(write.directions)
            first = min(first, lowest if write.site == _AFTER_A_BLOCK else lowest - 1)
    return first


def acts(write: SteeringWrite, setting: int) -> bool:
    """Tell whether a vector does anything under a setting."""
    coefficient = write.coefficients[setting]
    return coefficient is not None and coefficient != REST[write.op]


def outputs_of(runner: Runner, batch: Batch, blocks: Sequence[int], control: Control) -> dict[int, Any]:
    """What some blocks return of a batch that is fed in one step, unsteered; nothing where the run was stopped."""
    outputs: dict[int, Any] = {}

    def keep(block: int) -> Callable[..., None]:
        return lambda module, args, output: outputs.__setitem__(block, output)

    with ExitStack() as handles:
        for block in blocks:
            handles.callback(runner.architecture.blocks[block].register_forward_hook(keep(block)).remove)
        runner.forward(batch, Listening(control))
    return {} if control.cancelled else outputs


@contextmanager
def skipping(architecture: Architecture, last: int, output: Any, times: int) -> Iterator[None]:
    """Have the blocks up to `last` not run: it gives back `output`, each row of it so many times, one after the other.

    Hooks on a block hear of it as if it had run.
    """
    states = hidden_of(output).repeat_interleave(times, 0)

    def passing_on(*args: Any, **kwargs: Any) -> Any:
        return _as_returned(output, args[0] if args else kwargs["hidden_states"])

    with ExitStack() as undo:
        for block in range(last + 1):
            given = passing_on if block < last else lambda *args, **kwargs: _as_returned(output, states)
            undo.enter_context(_forward_replaced(architecture.blocks[block], given))
        yield


def can_skip(runner: Runner, control: Control | None = None) -> bool:
    """Tell whether blocks of this model can be left out so, by trying; not where the run was stopped."""
    control = control or Control()
    architecture = runner.architecture
    n_blocks, blocks = architecture.n_blocks, architecture.blocks
    if n_blocks < 2 or not runner.ranks.alone or architecture.stage is not None or len(set(blocks)) < n_blocks:
        return False
    if runner.batching.leftovers or runner.batching.rows != "padded":
        return False
    batch, last = runner.batch(_PROOF_ROWS), n_blocks // 2
    whole, skipped = list[torch.Tensor](), list[torch.Tensor]()
    captures: Mapping[Any, Any] = {(_AFTER_A_BLOCK, n_blocks - 1): whole.append}
    runner.forward(batch, Listening(control), capture=captures)
    outputs = outputs_of(runner, batch, [last], control)
    if control.cancelled:
        return False
    try:
        with skipping(architecture, last, outputs[last], 1):
            runner.forward(batch, Listening(control), capture={(_AFTER_A_BLOCK, n_blocks - 1): skipped.append})
    except Exception:  # a model that asks something of what its blocks leave behind
        return False
    return len(whole) == len(skipped) == 1 and torch.equal(whole[0], skipped[0])


def _as_returned(output: Any, states: torch.Tensor) -> Any:
    """States in the form in which a block returns them."""
    if not isinstance(output, (tuple, list)):
        return states
    rest = (states, *output[1:])
    return type(output)._make(rest) if hasattr(output, "_make") else type(output)(rest)


@contextmanager
def _forward_replaced(module: torch.nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(module).get("forward")  # accelerate puts one of its own there
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
