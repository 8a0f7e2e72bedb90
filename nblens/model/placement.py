"""Which part of a model sits on which device, and how much memory is left there."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch

from nblens.layers import format_layers
from nblens.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["SMALLEST_STEP", "DeviceShare", "Placement", "describe_placement", "free_memory", "in_words", "step_tokens"]

_LARGEST_STEP, SMALLEST_STEP = 256, 16
_CAPTURE_SHARE = 4  # of the free memory, one part in so many is for captured activations


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds.

    >>> (share,) = session.placement.devices
    >>> share.device, share.blocks
    ('cpu', '0-11')
    """

    device: str
    blocks: str
    """block indices, such as "0-11"; empty where there are none"""
    parts: str
    """every part in order, such as "embedding, blocks 0-11, norm, lm_head" """
    weight_bytes: int
    free_bytes: int | None
    total_bytes: int | None


@dataclass(frozen=True)
class Placement:
    """A loaded model, device by device.

    >>> session.placement.n_blocks, session.placement.dtype
    (12, 'float32')
    """

    model: str
    n_parameters: int
    n_blocks: int
    dtype: str
    seconds: float
    """how long loading took"""
    devices: tuple[DeviceShare, ...]
    revision: str = ""
    """commit of the model's files; empty where none is known"""


def describe_placement(model: PreTrainedModel, architecture: Architecture, *, name: str, seconds: float) -> Placement:
    """Look where a model's weights are."""
    shares = _shares(model, architecture)
    return Placement(
        model=name,
        n_parameters=sum(p.numel() for p in model.parameters()),
        n_blocks=architecture.n_blocks,
        dtype=str(architecture.dtype).removeprefix("torch."),
        seconds=seconds,
        devices=tuple(shares),
    )


def _shares(model: PreTrainedModel, architecture: Architecture) -> list[DeviceShare]:
    blocks_of: dict[str, list[int]] = defaultdict(list)
    others_of: dict[str, dict[str, None]] = defaultdict(dict)
    bytes_of: dict[str, int] = defaultdict(int)
    for block, module in enumerate(architecture.blocks):
        if not architecture.has(block):
            continue
        blocks_of[_device_of(module, model)].append(block)
    others = {
        "embedding": model.get_input_embeddings(),
        "norm": architecture.tail,
        "lm_head": architecture.lm_head,
    }
    if architecture.stage and 0 not in architecture.stage.blocks:
        del others["embedding"]
    for part, modules in others.items():
        for module in modules if isinstance(modules, tuple) else (modules,):
            others_of[_device_of(module, model)][part] = None
    parameters = {*model.parameters(), *architecture.lm_head.parameters()}  # a stage reads through its own copy
    for parameter in parameters:
        here = parameter.to_local() if hasattr(parameter, "to_local") else parameter  # of a sharded one, the part
        bytes_of[str(parameter.device)] += here.numel() * here.element_size()
    if "meta" in bytes_of:  # offloaded: the bytes wait in memory or on disk
        bytes_of["offloaded"] = bytes_of.pop("meta")
    return [
        _share(device, blocks_of[device], list(others_of[device]), bytes_of.get(device, 0))
        for device in sorted({*blocks_of, *others_of, *bytes_of})
    ]


def _device_of(module: nn.Module, model: PreTrainedModel) -> str:
    parameter = next(module.parameters(), None)
    device = str(parameter.device if parameter is not None else model.device)
    return "offloaded" if device == "meta" else device


def _share(device: str, blocks: list[int], others: list[str], weight_bytes: int) -> DeviceShare:
    span = format_layers(blocks)
    free, total = free_memory(device)
    return DeviceShare(device, span, in_words(blocks, others), weight_bytes, free, total)


def in_words(blocks: list[int], others: list[str]) -> str:
    """Name parts of a model in order: "embedding, blocks 0-11, norm, lm_head"."""
    parts = [part for part in others if part == "embedding"]
    parts += [f"blocks {format_layers(blocks)}"] if blocks else []
    parts += [part for part in others if part != "embedding"]
    return ", ".join(parts)


def step_tokens(bytes_per_token: int, free: int | None) -> int:
    """Tokens of a step over all rows, each of which leaves so many bytes behind: fewer where little memory is free."""
    if free is None or not bytes_per_token:
        return _LARGEST_STEP
    return min(_LARGEST_STEP, max(SMALLEST_STEP, free // _CAPTURE_SHARE // bytes_per_token))


def free_memory(device: str) -> tuple[int | None, int | None]:
    """Free and total bytes of a device; None where nothing says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    if device == "cpu":
        memory = psutil.virtual_memory()
        free, total = memory.available, memory.total
        allowed, used = _cgroup_memory()
        if allowed is not None:
            free, total = min(free, max(0, allowed - used)), min(total, allowed)
        return free, total
    return None, None


def _cgroup_memory() -> tuple[int | None, int]:
    """Read what this process's container may use, and uses; file pages that can be dropped do not count."""
    folder = Path("/sys/fs/cgroup")
    try:
        allowed = int((folder / "memory.max").read_text())
        used = int((folder / "memory.current").read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no container, or "max": no limit
        return None, 0
    return allowed, used - int(statistics.get("inactive_file", 0))
