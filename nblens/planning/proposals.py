"""What would fit where a setting does not: smaller settings and larger machines, each planned like the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch

from nblens.errors import UnsupportedModelError, UserError
from nblens.planning.devices import Limits, accelerators
from nblens.planning.plan import Plan, Proposal
from nblens.planning.sharing import NO_ROOM, Setting
from nblens.text import byte_size

__all__ = ["Solver", "proposals_for"]

Solver = Callable[[Setting, Limits], Plan]

_SHORTEST = 256  # tokens: a shorter context is no use
_MOST_DEVICES = 64
_QUANTIZED = ("8bit", "4bit")


def proposals_for(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> tuple[Proposal, ...]:
    """Settings that fit: first what this machine can do without slowing down, then offloading, then more devices."""
    ways = (_shorter, _half_precision, _tensor_parallel, _quantized, _offloaded, _more_devices, _more_ranks)
    return tuple(proposal for way in ways if (proposal := way(found, setting, limits, solve)) is not None)


def _first_that_fits(candidates: Iterator[tuple[str, str, Setting, Limits]], solve: Solver) -> Proposal | None:
    for change, options, setting, limits in candidates:
        with suppress(UserError, UnsupportedModelError):
            if (plan := solve(setting, limits)).fits:
                return Proposal(change, options, plan)
    return None


def _shorter(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    def candidates() -> Iterator[Any]:
        context = 1 << (found.context - 1).bit_length() - 1
        while context >= _SHORTEST:
            yield f"room for {context} tokens", f"--context {context}", replace(setting, context=context), limits
            context //= 2

    return _first_that_fits(candidates(), solve)


def _half_precision(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    if found.dtype not in ("float32", "float64"):
        return None
    half = replace(setting, dtype=torch.bfloat16)
    return _first_that_fits(iter([("bfloat16", "--dtype bfloat16", half, limits)]), solve)


def _tensor_parallel(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    most = len(accelerators(limits))
    if setting.ranks > 1 or most < 2:
        return None
    ranks = ((n, replace(setting, tp=n)) for n in range(2, most + 1))
    return _first_that_fits(((f"tensor parallelism over {n}", f"--tp {n}", s, limits) for n, s in ranks), solve)


def _quantized(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    if setting.quantization is not None or setting.ranks > 1:
        return None
    on_accelerators = {name: limits[name] for name in accelerators(limits)} or limits
    names = ((name, replace(setting, quantization=name)) for name in _QUANTIZED)
    return _first_that_fits(
        ((f"{name} weights", f"--quantization {name}", s, on_accelerators) for name, s in names), solve
    )


def _offloaded(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    """Weights that wait in memory, where there is none described, or on disk."""
    if setting.ranks > 1 or setting.disk:
        return None

    def candidates() -> Iterator[Any]:
        if accelerators(limits) and "cpu" not in limits:
            homeless = sum(device.weight_bytes for device in found.devices if device.device == NO_ROOM)
            needed = max(homeless, sum(device.weight_bytes for device in found.devices)) + 2**30
            yield f"offloading to {byte_size(needed)} of memory", "", setting, {**limits, "cpu": needed}
        yield "offloading to disk", "--offload DIR", replace(setting, disk=True), limits

    return _first_that_fits(candidates(), solve)


def _more_devices(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    """More of the first accelerator, one process."""
    names, size = accelerators(limits), _size_of_first(limits)
    if not size or setting.ranks > 1:
        return None
    fewest = max(len(names) + 1, sum(device.weight_bytes for device in found.devices) // size)
    return _first_that_fits(
        ((_of_size(n, size), "", setting, _fleet(n, size)) for n in range(fewest, _MOST_DEVICES + 1)), solve
    )


def _more_ranks(found: Plan, setting: Setting, limits: Limits, solve: Solver) -> Proposal | None:
    """More of the first accelerator, a rank on each."""
    names, size = accelerators(limits), _size_of_first(limits)
    if not size:
        return None
    counts = (n for n in range(max(2, len(names)), _MOST_DEVICES + 1) if n != setting.tp)
    return _first_that_fits(
        (
            (_of_size(n, size), f"--tp {n}", replace(setting, tp=n, pp=1), _fleet(n, size))
            for n in counts
            if n > len(names) or setting.ranks > 1
        ),
        solve,
    )


def _size_of_first(limits: Limits) -> int | None:
    """Bytes of the first accelerator; None where there is none, or nothing says, 0 where it may not be used."""
    return next((limits[name] for name in accelerators(limits)), None)


def _fleet(n: int, size: int) -> Limits:
    return {f"cuda:{index}": size for index in range(n)}


def _of_size(n: int, size: int) -> str:
    return f"{n} devices of {byte_size(size)}"
