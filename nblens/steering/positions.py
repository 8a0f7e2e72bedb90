"""Write positions of a vector: kinds of token positions, and the columns of a step at which they lie."""

from __future__ import annotations

import torch

from nblens.errors import UserError
from nblens.model.generation import Batch
from nblens.steering.steer import is_turn, turns_written, write_range

__all__ = ["first_written", "written_columns"]


def written_columns(write: str, columns: range, batch: Batch) -> bool | torch.Tensor:
    """Find the columns of a step that are written: all (True), none (False), or bool (rows, width, 1).

    Positions are absolute in their row, whatever lies before it as padding, in the KV cache or in other chunks.
    """
    if write == "all":
        return True
    if write in ("prompt", "generated", "last") and columns.start >= batch.prompt_end:
        return write == "generated"
    position = torch.arange(columns.start, columns.stop) - batch.first_columns[:, None]
    chosen = _chosen(write, position, batch)
    if not chosen.any():
        return False
    return True if chosen.all() else chosen[..., None]


def first_written(write: str, batch: Batch) -> int:
    """Return the first column that any row writes; the batch's width where there is none."""
    position = torch.arange(batch.width) - batch.first_columns[:, None]
    written = _chosen(write, position, batch).any(0).nonzero()
    return int(written[0]) if len(written) else batch.width


def _chosen(write: str, position: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Tell which positions (rows, width) are written."""
    lengths = batch.prompt_lengths[:, None]
    if write == "all":
        return torch.ones_like(position, dtype=torch.bool)
    if write == "prompt":
        return position < lengths
    if write == "generated":
        return position >= lengths
    if write == "last":
        return position == lengths - 1
    if write == "label":
        if batch.labels is None:
            raise UserError("write position 'label' needs answers to be scored; in other runs write at 'last'")
        return position == torch.tensor(batch.labels)[:, None] - 1
    if is_turn(write):
        return _of_turns(write, position, batch)
    start, stop = write_range(write)
    return (position >= start) & (position < (torch.inf if stop is None else stop))


def _of_turns(write: str, position: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Tell which positions (rows, width) are of a role's messages, or of one message; in plain text none is."""
    chosen = torch.zeros_like(position, dtype=torch.bool)
    for row, turns in enumerate(batch.turns):
        for start, stop in turns_written(write, turns, int(batch.prompt_lengths[row])):
            chosen[row] |= (position[row] >= start) & (position[row] < (torch.inf if stop is None else stop))
    return chosen
