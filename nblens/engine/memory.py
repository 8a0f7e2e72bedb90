"""Serving a request although memory ran out: with smaller steps, else with an error that says what would help."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from nblens.errors import DeviceMemoryError, NblensError, first_line, is_out_of_memory
from nblens.model.generation import Batch
from nblens.model.placement import free_memory, step_tokens

__all__ = [
    "chunk_that_fits",
    "is_out_of_memory",
    "memory_errors_told",
    "nothing_kept",
    "out_of_memory",
    "with_smaller_chunks",
]

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


def nothing_kept(function: Callable[..., Result]) -> Callable[..., Result]:
    """Let errors leave a function without what the frames of their tracebacks have in memory.

    A notebook holds the last traceback until the next error, and a traceback the local variables of all its frames: a
    KV cache, or half a model.
    """

    @functools.wraps(function)
    def guarded(*args: Any, **options: Any) -> Result:
        try:
            return function(*args, **options)
        except BaseException as error:
            _let_go(error)
            raise

    return guarded


@contextmanager
def memory_errors_told() -> Iterator[None]:
    """Let no allocator's own error out of a request; what memory ran out for is let go."""
    try:
        yield
    except DeviceMemoryError as error:
        _let_go(error)
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _let_go(error)
        raise DeviceMemoryError(
            f"out of memory ({first_line(error)}); shorten the prompts, or take fewer rows, layers or sites"
        ) from error


def _let_go(error: BaseException) -> None:
    """Empty the frames of one of our own errors; of what led to it, and of others, keep the lines alone."""
    if isinstance(error, NblensError):
        traceback.clear_frames(error.__traceback__)
        _as_text(error.__cause__)
    else:
        _as_text(error)


def _as_text(error: BaseException | None) -> None:
    """Keep the lines of a traceback, and of those that led to it, as notes: closures outlive an emptied frame."""
    while error is not None:
        error.add_note("".join(traceback.format_tb(error.__traceback__)).rstrip())
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def out_of_memory(doing: str, batch: Batch, chunk: int) -> DeviceMemoryError:
    """The error that names what was asked, and what would need less."""
    return DeviceMemoryError(
        f"out of memory while {doing} ({batch.rows} rows × {batch.width} tokens, {chunk} tokens a step); "
        "shorten the prompt, or take fewer rows, layers or sites"
    )
