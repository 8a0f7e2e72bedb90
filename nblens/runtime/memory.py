"""Serving a request although memory ran out: with smaller steps, else with an error that says what would help."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from nblens.errors import DeviceMemoryError
from nblens.model.generation import Batch
from nblens.model.placement import free_memory, step_tokens

__all__ = ["chunk_that_fits", "is_out_of_memory", "out_of_memory", "with_smaller_chunks"]

Result = TypeVar("Result")


def chunk_that_fits(bytes_per_token: int, device: torch.device) -> int:
    """Tokens per step over all rows: the usual number, fewer where little memory is free."""
    free, _ = free_memory(str(device))
    return step_tokens(bytes_per_token, free)


def with_smaller_chunks(
    attempt: Callable[[int], Result], chunk: int, fewest: int, batch: Batch, *, again: bool = True
) -> Result:
    """Call `attempt` with a chunk that is halved each time memory runs out, down to the fewest tokens of a step.

    Not `again` where several ranks run the model: one that began anew alone would meet the others at another step.
    """
    chunk = max(chunk, fewest)
    while True:
        try:
            return attempt(chunk)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if chunk <= fewest or not again:
                raise out_of_memory("reading the prompt", batch, chunk) from error
        chunk = max(fewest, chunk // 2)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether it is CUDA's error, or one of the two that the CPU allocator raises as plain `RuntimeError`."""
    cpu = ("not enough memory", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in cpu)


def out_of_memory(doing: str, batch: Batch, chunk: int) -> DeviceMemoryError:
    """The error that names what was asked, and what would need less."""
    return DeviceMemoryError(
        f"out of memory while {doing} ({batch.rows} rows × {batch.width} tokens, {chunk} tokens a step); "
        "shorten the prompt, or take fewer rows, layers or sites"
    )
