"""Which part of a model sits on which device, and how much memory is left there."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from nblens.layers import format_layers
from nblens.model.architecture import Architecture

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["DeviceShare", "Placement", "describe_placement", "free_memory"]


@dataclass(frozen=True)
class DeviceShare:
    """What one device holds."""

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
    """A loaded model, device by device."""

    model: str
    n_parameters: int
    n_blocks: int
    dtype: str
    seconds: float
    """how long loading took"""
    devices: tuple[DeviceShare, ...]


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
        blocks_of[_device_of(module, model)].append(block)
    others = {
        "embedding": model.get_input_embeddings(),
        "norm": architecture.tail,
        "lm_head": architecture.lm_head,
    }
    for part, modules in others.items():
        for module in modules if isinstance(modules, tuple) else (modules,):
            others_of[_device_of(module, model)][part] = None
    for parameter in model.parameters():
        bytes_of[str(parameter.device)] += parameter.numel() * parameter.element_size()
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
    parts = [part for part in others if part == "embedding"]
    parts += [f"blocks {span}"] if blocks else []
    parts += [part for part in others if part != "embedding"]
    free, total = free_memory(device)
    return DeviceShare(device, span, ", ".join(parts), weight_bytes, free, total)


def free_memory(device: str) -> tuple[int | None, int | None]:
    """Free and total bytes of a device; None where nothing says."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)
    if device == "cpu" and "SC_AVPHYS_PAGES" in os.sysconf_names:
        page = os.sysconf("SC_PAGE_SIZE")
        return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page
    return None, None
