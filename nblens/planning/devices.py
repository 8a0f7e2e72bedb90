"""The devices that a model may use and how much memory each has: those that are here, or those that are described."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeGuard

import torch

from nblens.errors import UserError
from nblens.model.placement import free_memory

__all__ = ["Limits", "accelerators", "described_limits", "device_name", "is_description", "limits_here"]

Limits = Mapping[str, int | None]
"""device → bytes that may be used there; None where nothing says"""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12} | {
    "KI": 2**10,
    "MI": 2**20,
    "GI": 2**30,
    "TI": 2**40,
}
_DEVICE = re.compile(r"(cuda|xpu|npu|mps)(:\d+)?|cpu|disk")


def device_name(device: Any) -> str:
    """Return what torch calls a device: `0` and `"0"` are `cuda:0`."""
    name = str(device)
    if name.isdecimal():
        return f"cuda:{name}"
    return "cuda:0" if name == "cuda" else name


def is_description(devices: Any) -> TypeGuard[Mapping[Any, int | str]]:
    """Tell whether it maps devices to memory, and is no accelerate `device_map` (of modules to devices)."""
    return isinstance(devices, Mapping) and all(_DEVICE.fullmatch(device_name(key)) for key in devices)


def described_limits(description: Mapping[Any, int | str]) -> dict[str, int]:
    """Bytes of each device in a description such as `{0: "80GiB", "cpu": "200GB"}`.

    Raises
    ------
    UserError
        A device or a size that cannot be understood.
    """
    limits: dict[str, int] = {}
    for key, size in description.items():
        name = device_name(key)
        if not _DEVICE.fullmatch(name) or name == "disk":
            raise UserError(f"memory is described as {{0: '80GiB', 'cpu': '200GiB'}}; got device {key!r}")
        limits[name] = _byte_count(size)
    if not limits:
        raise UserError("memory is described as {0: '80GiB', 'cpu': '200GiB'}; got nothing")
    return dict(sorted(limits.items(), key=lambda item: _order(item[0])))


def limits_here(devices: Any, max_memory: Mapping[Any, int | str] | None, freed: Mapping[str, int]) -> Limits:
    """Find what may be used on this machine.

    Parameters
    ----------
    devices : str or mapping
        As `nblens.load` takes it.
    max_memory : mapping, optional
        Bounds, as `described_limits` reads them; devices that they leave out are not used.
    freed : mapping
        Bytes per device that will be free before weights are read: the model that is loaded now.
    """
    if isinstance(devices, Mapping):
        names = sorted({device_name(device) for device in devices.values()} - {"disk"}, key=_order)
    elif devices == "auto":
        names = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        names = [*names, "cpu"]
    elif devices in ("balanced", "balanced_low_0", "sequential"):
        return limits_here("auto", max_memory, freed)
    else:
        names = [device_name(devices)]
        if not _DEVICE.fullmatch(names[0]):
            raise UserError(f"device {devices!r} is unknown; one of auto, cpu, cuda:0, … or an accelerate device_map")
    missing = [n for n in names if n.startswith("cuda") and int(n.partition(":")[2]) >= torch.cuda.device_count()]
    if missing:
        raise UserError(f"there is no {missing[0]} here; this machine has {torch.cuda.device_count()} CUDA devices")
    limits = {name: _free(name, freed.get(name, 0)) for name in names}
    if max_memory is None:
        return limits
    bounds = described_limits(max_memory)
    if unknown := [name for name in bounds if name not in limits]:
        raise UserError(
            f"max_memory names {unknown[0]}, which is not among the devices to load on ({', '.join(limits)}); "
            "nblens.plan and --plan compute for machines that are not here"
        )
    return {name: bound if (here := limits[name]) is None else min(bound, here) for name, bound in bounds.items()}


def accelerators(limits: Mapping[str, Any]) -> list[str]:
    """The devices that compute beside a CPU."""
    return [name for name in limits if name not in ("cpu", "disk")]


def _free(device: str, freed: int) -> int | None:
    free, _ = free_memory(device)
    return None if free is None else free + freed


def _byte_count(size: int | str) -> int:
    """`"20GiB"`, `"20 GB"`, or a number of bytes."""
    if isinstance(size, int) and not isinstance(size, bool) and size >= 0:
        return size
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", str(size).upper())
    if match is None or match[2] == "I":
        raise UserError(f"memory is given as bytes or as 20GiB, 500MB, …; got {size!r}")
    return int(float(match[1]) * _UNITS[match[2]])


def _order(name: str) -> tuple[bool, str, int]:
    kind, _, index = name.partition(":")
    return kind == "cpu", kind, int(index or 0)
