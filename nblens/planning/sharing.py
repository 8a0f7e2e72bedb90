"""How the parts of a model are shared out among devices, and what each device then has to hold.

Blocks over devices is accelerate's own inference, given budgets from which keys, values, activations and the lens'
buffers have been taken off; ranks of tensor and pipeline parallelism follow transformers' plans.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Self

import torch
from torch import nn

from nblens.errors import UserError
from nblens.model.placement import in_words, step_tokens
from nblens.planning.blueprint import Blueprint
from nblens.planning.devices import Limits, accelerators, device_name
from nblens.planning.plan import DevicePlan
from nblens.readout.readout import TILE_ELEMENTS

__all__ = ["NO_ROOM", "Setting", "device_plans", "infer_device_map"]

NO_ROOM = "no room"

_ACCELERATOR_OVERHEAD = 2**30  # the CUDA context, workspaces of its libraries, and memory lost to fragmentation
_CPU_OVERHEAD = 24 * 2**20  # weights repacked for products, and what the allocator keeps: benchmarks/plan_accuracy.py
_STATISTICS = 160  # bytes per token and block: top tokens with their log-probabilities, running sums
_STREAMS, _MLP_TENSORS = 8, 4  # copies of a step's residual stream, and of its widest activation, alive at once
_TRIES = 12


@dataclass(frozen=True)
class Setting:
    """What may be changed to make a model fit."""

    dtype: str | torch.dtype = "auto"
    quantization: str | None = None
    tp: int = 1
    pp: int = 1
    context: int | None = None
    batch: int = 1
    disk: bool = False
    """whether weights may wait on disk"""

    @property
    def ranks(self) -> int:
        """Processes that the model is spread over; 1: this one, which may use several devices."""
        return self.tp * self.pp

    def with_context(self, context: int) -> Self:
        """The same with room for so many tokens."""
        return replace(self, context=context)


def infer_device_map(blueprint: Blueprint, setting: Setting, limits: Limits) -> dict[str, str]:
    """Module → device: whole blocks, accelerators first, then memory, then disk; evenly over several accelerators.

    Where there is no room for a part, its device is "disk", although nothing may wait there.
    """
    first = next(iter(limits))
    whole = {"": first}
    if limits[first] is None or (len(limits) == 1 and not setting.disk):
        return whole
    if not _excess(blueprint, setting, limits, whole):
        return whole
    budgets = {name: 2**62 if size is None else size for name, size in limits.items()}
    for even in _even_budgets(blueprint, setting, budgets):
        device_map = _settled(blueprint, setting, limits, even)
        if set(device_map.values()) <= set(accelerators(limits)) and not _excess(
            blueprint, setting, limits, device_map
        ):
            return device_map
    return _settled(blueprint, setting, limits, budgets)


def _even_budgets(blueprint: Blueprint, setting: Setting, budgets: dict[str, int]) -> Iterator[dict[str, int]]:
    """Budgets under which all accelerators get about the same, tightest first."""
    names = accelerators(budgets)
    if len(names) < 2:
        return
    sizes = _Load(blueprint, setting).block_sizes
    share, biggest = sum(blueprint.sizes.values()) // len(names), max(sizes, default=0)
    for slack in (biggest // 8, biggest // 2, biggest, 2 * biggest):
        most = dict.fromkeys(names, share + slack)
        most[names[0]] += biggest  # accelerate keeps the first with room for the largest block
        yield {name: min(size, most.get(name, size)) for name, size in budgets.items()}


def _settled(blueprint: Blueprint, setting: Setting, limits: Limits, budgets: dict[str, int]) -> dict[str, str]:
    """Infer again with what was too much taken off the budgets, until nothing is."""
    budgets = dict(budgets)
    device_map: dict[str, str] = {}
    for _ in range(_TRIES):
        device_map = _accelerate_map(blueprint, budgets)
        excess = _excess(blueprint, setting, limits, device_map)
        if not excess:
            break
        for name, size in excess.items():
            used = _held_weights(blueprint, device_map, name)
            budgets[name] = max(0, min(budgets[name], used) - size)
    return device_map


def _accelerate_map(blueprint: Blueprint, budgets: Mapping[str, int]) -> dict[str, str]:
    from accelerate.utils import infer_auto_device_map

    names = accelerators(budgets)
    max_memory: dict[int | str, int] = {index: budgets[name] for index, name in enumerate(names)}
    if "cpu" in budgets:
        max_memory["cpu"] = budgets["cpu"]
    blocks = blueprint.model.get_submodule(blueprint.blocks_path)
    with _quiet("accelerate.utils.modeling"):  # it warns of devices that are not here, and of what has no room
        found = infer_auto_device_map(
            blueprint.model,
            max_memory=max_memory,
            no_split_module_classes=sorted({type(block).__name__ for block in blocks.children()}),
        )
    return {path: names[place] if isinstance(place, int) else str(place) for path, place in found.items()}


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _excess(blueprint: Blueprint, setting: Setting, limits: Limits, device_map: Mapping[str, Any]) -> dict[str, int]:
    """Tell by how much each device would be overfull."""
    _, plans = device_plans(blueprint, setting, limits, device_map)
    return {plan.device: -plan.left_bytes for plan in plans if plan.left_bytes is not None and plan.left_bytes < 0}


def _held_weights(blueprint: Blueprint, device_map: Mapping[str, Any], device: str) -> int:
    return sum(size for name, size in blueprint.sizes.items() if _device_of(name, device_map) == device)


def device_plans(
    blueprint: Blueprint, setting: Setting, limits: Limits, device_map: Mapping[str, Any] | None
) -> tuple[int, tuple[DevicePlan, ...]]:
    """Tokens of a step, and what each device holds."""
    load = _Load(blueprint, setting)
    if setting.ranks > 1:
        return _rank_plans(load, limits)
    return _mapped_plans(load, limits, device_map or {})


class _Load:
    """What a setting of a model asks for, wherever it is."""

    def __init__(self, blueprint: Blueprint, setting: Setting) -> None:
        assert setting.context is not None  # who plans has settled it
        self.blueprint, self.setting, self.context = blueprint, setting, setting.context
        self.sizes = blueprint.shard_sizes(setting.tp)

    @cached_property
    def cache(self) -> list[int]:
        """Bytes of each block's keys and values."""
        share = self.setting.tp if self.blueprint.shards_cache else 1
        sizes = self.blueprint.cache_sizes(self.context)
        return [self.setting.batch * -(-size // share) for size in sizes]

    @property
    def block_sizes(self) -> list[int]:
        """Bytes of each block's weights."""
        return [sum(self.sizes_under(path).values()) for path in self.blueprint.block_paths]

    def sizes_under(self, path: str) -> dict[str, int]:
        """Parameters of one module."""
        return {name: size for name, size in self.sizes.items() if name.startswith(f"{path}.")}

    def chunk(self, limit: int | None, weights: int) -> int:
        """Tokens of a step, as a run chooses them beside the lm_head."""
        return step_tokens(self._captured(1), None if limit is None else max(0, limit - weights))

    def _captured(self, tokens: int) -> int:
        blueprint = self.blueprint
        return blueprint.n_blocks * tokens * blueprint.d_model * blueprint.dtype.itemsize

    def readout(self, chunk: int) -> int:
        """Beside the lm_head: captured activations, tiles of logits, statistics, and the logits to sample from."""
        blueprint, tokens = self.blueprint, max(chunk, self.setting.batch)
        tiles = TILE_ELEMENTS * (3 * 4 + blueprint.dtype.itemsize)
        statistics = blueprint.n_blocks * tokens * _STATISTICS
        logits = 2 * self.setting.batch * blueprint.vocab_size * 4
        return self._captured(tokens) + tiles + statistics + logits

    def working(self, chunk: int, device: str) -> int:
        """Activations of one step, wherever blocks run."""
        blueprint, setting = self.blueprint, self.setting
        tokens, itemsize = max(chunk, setting.batch), blueprint.dtype.itemsize
        streams = _STREAMS * tokens * blueprint.d_model * itemsize
        widest = _MLP_TENSORS * tokens * -(-blueprint.widest // setting.tp) * itemsize
        layer = max(self.cache, default=0)
        # keys and values are copied to grow, and repeated for the heads that share them
        group = blueprint.n_heads // max(1, blueprint.n_kv_heads)
        attention = layer + (layer * group if group > 1 else 0) + tokens * self.context * (1 + itemsize)
        overhead = _CPU_OVERHEAD if device.startswith("cpu") else _ACCELERATOR_OVERHEAD
        return streams + widest + attention + blueprint.dequantized + overhead


def _mapped_plans(load: _Load, limits: Limits, device_map: Mapping[str, Any]) -> tuple[int, tuple[DevicePlan, ...]]:
    blueprint, setting = load.blueprint, load.setting
    held: dict[str, list[str]] = {name: [] for name in limits}
    for name in load.sizes:
        held.setdefault(_device_of(name, device_map), []).append(name)
    computing = [name for name in accelerators(held) if held[name]] or ["cpu"]
    runs_on = {name: name if name in computing else computing[0] for name in held}
    head = runs_on[_device_of(f"{blueprint.head_path}.weight", device_map)]
    chunk = load.chunk(limits.get(head), sum(load.sizes[name] for name in held.get(head, [])))
    plans = []
    for device, names in held.items():
        here = [place for place in runs_on if runs_on[place] == device]  # also parts that wait elsewhere
        blocks = [
            block for block, path in enumerate(blueprint.block_paths) if _device_of(f"{path}.", device_map) in here
        ]
        waiting = [name for place in here if place != device for name in held[place]]
        working = load.working(chunk, device) + _largest_module(load, waiting) if here and (blocks or names) else 0
        label = NO_ROOM if device == "disk" and not setting.disk else device
        if not names and not working:
            continue
        plans.append(
            DevicePlan(
                device=label,
                parts=_parts(blueprint, names),
                weight_bytes=sum(load.sizes[name] for name in names),
                expert_bytes=sum(load.sizes[name] for name in names if blueprint.is_expert(name)),
                cache_bytes=sum(load.cache[block] for block in blocks),
                readout_bytes=load.readout(chunk) if device == head else 0,
                working_bytes=working,
                limit_bytes=limits.get(device),
            )
        )
    return chunk, tuple(plans)


def _rank_plans(load: _Load, limits: Limits) -> tuple[int, tuple[DevicePlan, ...]]:
    blueprint, setting = load.blueprint, load.setting
    names = _rank_devices(limits, setting)
    stages = [_stage(blueprint, stage, setting.pp) for stage in range(setting.pp)]
    held = [[name for name in load.sizes if _in_stage(blueprint, name, stage, setting.pp)] for stage in stages]
    weights = [sum(load.sizes[name] for name in names_here) for names_here in held]
    if setting.pp > 1 and blueprint.tied:
        weights[-1] += load.sizes[f"{blueprint.embedding_path}.weight"]  # each end has its own
    for stage in range(setting.pp - 1):  # which reads through its own copy of the lm_head
        weights[stage] += load.sizes[f"{blueprint.embedding_path if blueprint.tied else blueprint.head_path}.weight"]
    chunk = load.chunk(limits_of(names[-1], limits, setting), weights[-1])
    plans = []
    for rank, device in enumerate(names):
        stage = rank // setting.tp
        blocks = stages[stage]
        plans.append(
            DevicePlan(
                device=device,
                parts=_share(rank, setting) + _parts(blueprint, held[stage]),
                weight_bytes=weights[stage],
                expert_bytes=sum(load.sizes[name] for name in held[stage] if blueprint.is_expert(name)),
                cache_bytes=sum(load.cache[block] for block in blocks),
                readout_bytes=load.readout(chunk),
                working_bytes=load.working(chunk, device),
                limit_bytes=limits_of(device, limits, setting),
            )
        )
    return chunk, tuple(plans)


def _share(rank: int, setting: Setting) -> str:
    return f"shard {rank % setting.tp + 1} of {setting.tp}: " if setting.tp > 1 else ""


def _rank_devices(limits: Limits, setting: Setting) -> list[str]:
    names = accelerators(limits)
    if not names:
        return [f"cpu, rank {rank}" for rank in range(setting.ranks)]
    if len(names) < setting.ranks:
        raise UserError(
            f"tp={setting.tp} and pp={setting.pp} need {setting.ranks} devices, and there are {len(names)}: "
            f"{', '.join(names)}"
        )
    return names[: setting.ranks]


def limits_of(device: str, limits: Limits, setting: Setting) -> int | None:
    """Bytes for one rank: ranks on the CPU share its memory."""
    if not device.startswith("cpu"):
        return limits[device]
    return None if limits["cpu"] is None else limits["cpu"] // setting.ranks


def _stage(blueprint: Blueprint, stage: int, stages: int) -> range:
    """Blocks of a pipeline stage: as many for each, what is over for the last, as transformers cuts them."""
    each = blueprint.n_blocks // stages
    return range(stage * each, blueprint.n_blocks if stage == stages - 1 else (stage + 1) * each)


def _in_stage(blueprint: Blueprint, name: str, blocks: range, stages: int) -> bool:
    block = _block_of(blueprint, name)
    if block is not None:
        return block in blocks
    if name.startswith(f"{blueprint.embedding_path}."):
        return blocks.start == 0
    return blocks.stop == blueprint.n_blocks


def _block_of(blueprint: Blueprint, name: str) -> int | None:
    prefix = f"{blueprint.blocks_path}."
    return int(name.removeprefix(prefix).partition(".")[0]) if name.startswith(prefix) else None


def _device_of(name: str, device_map: Mapping[str, Any]) -> str:
    """Find where a parameter goes: what its innermost module in the map says."""
    path = name
    while path not in device_map and path:
        path = path.rpartition(".")[0]
    return device_name(device_map.get(path, "cpu"))


def _largest_module(load: _Load, names: Sequence[str]) -> int:
    """Bytes of the largest module with weights of its own: accelerate brings offloaded ones in one by one."""
    sizes: dict[str, int] = {}
    for name in names:
        module = name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + load.sizes[name]
    return max(sizes.values(), default=0)


def _parts(blueprint: Blueprint, names: Sequence[str]) -> str:
    blocks = sorted({block for name in names if (block := _block_of(blueprint, name)) is not None})
    parameters = dict(blueprint.model.named_parameters())
    others: dict[str, None] = {}
    for name in names:
        if _block_of(blueprint, name) is None and name in parameters:
            others[_part(blueprint, name)] = None
    if blueprint.tied and "embedding" in others:
        others["lm_head"] = None
    return in_words(blocks, list(others))


def _part(blueprint: Blueprint, name: str) -> str:
    if name.startswith(f"{blueprint.embedding_path}."):
        return "embedding"
    if name.startswith(f"{blueprint.head_path}."):
        return "lm_head"
    module: nn.Module = blueprint.model.get_submodule(name.rpartition(".")[0])
    return "norm" if "norm" in type(module).__name__.lower() else name.split(".")[-2]
