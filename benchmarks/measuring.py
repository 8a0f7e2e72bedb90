"""Time and memory of one piece of work. Imports torch alone, as the environments of peers hold nothing of nblens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["gpu_seconds", "in_turns", "processor_seconds", "ratio", "tensor_bytes"]


def processor_seconds(work: Callable[[], object]) -> float:
    """Time of one call over all threads, as this process alone spent it."""
    began = time.process_time()
    work()
    return time.process_time() - began


def gpu_seconds(work: Callable[[], object]) -> float:
    """Time of one call on the current CUDA device, between events in its stream."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    ended.synchronize()
    return began.elapsed_time(ended) / 1000


def in_turns(
    repeats: int,
    sides: Mapping[str, Callable[[], object]],
    seconds: Callable[[Callable[[], object]], float] = processor_seconds,
) -> dict[str, list[float]]:
    """Seconds of each side, one after the other in every turn; before that each runs once to warm up."""
    for work in sides.values():
        work()
    turns = [{name: seconds(work) for name, work in sides.items()} for _ in range(repeats)]
    return {name: [turn[name] for turn in turns] for name in sides}


def ratio(side: Sequence[float], against: Sequence[float]) -> float:
    """Median of the turns' ratios: what both shared in a turn cancels."""
    return statistics.median(s / a for s, a in zip(side, against, strict=True))


def tensor_bytes(work: Callable[[], object]) -> int:
    """Highest sum of bytes that PyTorch allocated minus those it freed while `work` runs.

    Of the calling thread alone: what is computed in another thread, or kept in NumPy, does not count.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
