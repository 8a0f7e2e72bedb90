"""Will a model fit, and what goes where: `nblens.plan`, from the configuration and safetensors headers alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from nblens.errors import UserError
from nblens.model.parallel import check_parallel, tensor_ranks
from nblens.model.quantization import find_quantization
from nblens.planning.adapter import Adapter, find_adapter
from nblens.planning.blueprint import Blueprint, draw_blueprint
from nblens.planning.checkpoint import (
    DEMO_MODEL,
    checkpoint_dtype,
    commit_of,
    hub_or_cache,
    read_config,
    read_headers,
    source_of,
)
from nblens.planning.devices import Limits, accelerators, described_limits, is_description, limits_here
from nblens.planning.gguf_checkpoint import GgufCheckpoint, find_gguf
from nblens.planning.plan import Plan
from nblens.planning.proposals import proposals_for
from nblens.planning.sharing import Setting, device_plans, infer_device_map

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["DEFAULT_CONTEXT", "Checkpoint", "find_checkpoint", "named_dtype", "plan", "plan_of"]

DEFAULT_CONTEXT = 2048
"""tokens that there must be room for where nobody says"""


@dataclass(frozen=True)
class Checkpoint:
    """A model as it was published."""

    name: str
    config: PreTrainedConfig
    source: str | None
    """where its files are; None: only its configuration is known"""
    revision: str | None = None
    trust_remote_code: bool = False
    local: Mapping[str, Any] = field(default_factory=dict)
    """what has libraries look on this machine alone, where the Hub cannot be reached"""
    gguf: GgufCheckpoint | None = None
    """the file of it that is taken"""
    adapter: Adapter | None = None
    """what is put on it"""

    @property
    def where(self) -> dict[str, Any]:
        """What transformers is told of where the model is."""
        found = {"revision": self.revision, "trust_remote_code": self.trust_remote_code, **self.local}
        return found if self.gguf is None else found | {"gguf_file": self.gguf.file}

    @property
    def commit(self) -> str:
        """The commit of its files, once they are on this machine; empty where none is known."""
        if self.source is None:
            return ""
        return commit_of(self.source, self.gguf.file if self.gguf else "config.json", self.revision)


def plan(
    model: str | os.PathLike[str] | PreTrainedConfig | None,
    *,
    devices: str | Mapping[Any, Any] = "auto",
    max_memory: Mapping[int | str, int | str] | None = None,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    dtype: str | torch.dtype = "auto",
    quantization: str | None = None,
    offload_dir: str | None = None,
    context: int | None = None,
    batch: int = 1,
    propose: bool = True,
    revision: str | None = None,
    gguf: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """Tell what a model would put on each device, and whether it fits, without reading weights.

    >>> nblens.plan(None, devices={"cuda:0": "8GiB"}).verdict
    'it fits'
    >>> nblens.plan("meta-llama/Llama-3.1-70B", max_memory={0: "80GiB", 1: "80GiB"})  # doctest: +SKIP

    Parameters
    ----------
    model : str or os.PathLike or transformers.PreTrainedConfig or None
        A Hugging Face model id, a folder, or a configuration; None: the model that comes with nblens.
    devices : str or mapping
        As `nblens.load` takes it, or a description of a machine that need not be here:
        ``{"cuda:0": "80GiB", "cuda:1": "80GiB"}``.
    max_memory : mapping, optional
        Such a description, too: ``{0: "80GiB", "cpu": "200GiB"}``. Without either, what is free here.
    tp, pp, ep : int
        Ranks of tensor, pipeline and expert parallelism. All 1: one process, blocks over the devices.
    dtype, quantization, offload_dir, revision, gguf, adapter, trust_remote_code
        As `nblens.load` takes them.
    context : int, optional
        Tokens in each row, prompt and generated together. Default: 2048, or what the model was made for.
    batch : int
        Rows.
    propose : bool
        Look for settings that would fit where this one does not.

    Raises
    ------
    UserError
        There is no such model, an option is wrong, or ranks do not divide attention heads.
    UnsupportedModelError
        Its parts could not be found.
    """
    config: Any = model
    if not hasattr(model, "get_text_config"):  # no configuration
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        checkpoint = find_checkpoint(model, gguf, adapter, **where)
    else:
        checkpoint = Checkpoint(config.name_or_path or config.model_type, config, None)
    if is_description(devices):
        device_map = None
        limits: Limits = described_limits({**devices, **(max_memory or {})})
    else:
        device_map = devices if isinstance(devices, Mapping) else None
        limits = limits_here(devices, None, {}) if max_memory is None else described_limits(max_memory)
    check_parallel(checkpoint.config, tp=tensor_ranks(tp, ep), pp=pp, ep=ep)  # experts cut or whole: as many bytes
    setting = Setting(dtype, quantization, tensor_ranks(tp, ep), pp, context, batch, offload_dir is not None)
    return plan_of(checkpoint, limits, setting, device_map, propose=propose)


def find_checkpoint(
    model: str | os.PathLike[str] | None,
    gguf: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    **where: Any,
) -> Checkpoint:
    """What a model says about itself, and an adapter of it.

    `gguf` and `adapter` are as in `nblens.load`, `where` is its revision and whether its code is trusted.

    Of a name on the Hub that cannot be reached the copy on this machine is taken.

    Raises
    ------
    UserError
        There is no such model, or it cannot be taken.
    """
    if adapter is not None:
        beside = find_adapter(adapter)
        checkpoint = find_checkpoint(model, gguf, **where)
        return replace(checkpoint, name=f"{checkpoint.name} + {beside.name}", adapter=beside)
    found = find_gguf(model, gguf, where.get("revision"))
    if found is None:
        source = source_of(model)
        name = DEMO_MODEL if model is None else os.fspath(model)
        local = {} if model is None else hub_or_cache(source, revision=where.get("revision"))
        return Checkpoint(name, read_config(model, **where, **local), source, **where, local=local)
    name = os.path.join(os.fspath(model or ""), gguf) if gguf else os.fspath(model or "")
    config = read_config(found.source, gguf_file=found.file, **where, **found.local)
    return Checkpoint(name, config, found.source, **where, local=found.local, gguf=found)


def plan_of(
    checkpoint: Checkpoint,
    limits: Limits,
    setting: Setting,
    device_map: Mapping[str, Any] | None = None,
    *,
    propose: bool = True,
) -> Plan:
    """Plan one setting on devices of known limits; where it does not fit, with proposals that do."""
    _check_counts(setting)
    find_quantization(setting.quantization)
    if setting.quantization and getattr(checkpoint.config, "quantization_config", None) is not None:
        raise UserError(f"{checkpoint.name} was published quantized; leave quantization={setting.quantization!r} out")
    drawing = cache(lambda dtype, quantization: _draw(checkpoint, dtype, quantization))

    def solve(setting: Setting, limits: Limits, device_map: Mapping[str, Any] | None = None) -> Plan:
        blueprint = drawing(_dtype(checkpoint, setting.dtype, limits), setting.quantization)
        return _solve(checkpoint.name, blueprint, setting, limits, device_map)

    found = solve(setting, limits, device_map)
    if not propose or found.fits is not False:
        return found
    return replace(found, proposals=proposals_for(found, setting, limits, solve))


def named_dtype(name: str | torch.dtype) -> torch.dtype:
    """The floating type of that name.

    Raises
    ------
    UserError
        There is none.
    """
    dtype = name if isinstance(name, torch.dtype) else getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"dtype {name!r} is unknown; one of auto, float32, bfloat16, float16")
    return dtype


def _check_counts(setting: Setting) -> None:
    counts = {"batch": setting.batch, "context": setting.context or 1}
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} is at least 1, got {value}")


def _dtype(checkpoint: Checkpoint, dtype: str | torch.dtype, limits: Limits) -> torch.dtype:
    if dtype != "auto":
        return named_dtype(dtype)
    if not accelerators(limits):
        return torch.float32
    if checkpoint.gguf is not None:
        return checkpoint.gguf.dtype
    config = checkpoint.config
    named = getattr(config, "dtype", None) or getattr(config.get_text_config(decoder=True), "dtype", None)
    return checkpoint_dtype(config, None if named is not None else _headers(checkpoint))


def _draw(checkpoint: Checkpoint, dtype: torch.dtype, quantization: str | None) -> Blueprint:
    quantized = getattr(checkpoint.config, "quantization_config", None) is not None
    return draw_blueprint(
        checkpoint.config,
        dtype=dtype,
        quantization=quantization,
        headers=_headers(checkpoint) if quantized else None,
        trust_remote_code=checkpoint.trust_remote_code,
        adapter=checkpoint.adapter,
    )


def _headers(checkpoint: Checkpoint) -> Any:
    return None if checkpoint.source is None else read_headers(checkpoint.source, checkpoint.revision)


def _solve(
    name: str, blueprint: Blueprint, setting: Setting, limits: Limits, device_map: Mapping[str, Any] | None
) -> Plan:
    context = _context(setting.context, blueprint)
    setting = setting.with_context(context)
    check_parallel(blueprint.model.config, tp=setting.tp, pp=setting.pp)
    placed = dict(device_map or infer_device_map(blueprint, setting, limits)) if setting.ranks == 1 else None
    chunk, devices = device_plans(blueprint, setting, limits, placed)
    return Plan(
        model=name,
        n_parameters=blueprint.n_parameters,
        n_blocks=blueprint.n_blocks,
        dtype=str(blueprint.dtype).removeprefix("torch."),
        quantization=setting.quantization,
        tp=setting.tp,
        pp=setting.pp,
        context=context,
        batch=setting.batch,
        chunk=chunk,
        devices=devices,
        device_map=placed,
        kept_modules=(blueprint.head_path,),
    )


def _context(asked: int | None, blueprint: Blueprint) -> int:
    most = blueprint.context_limit
    if asked is None:
        return min(DEFAULT_CONTEXT, most or DEFAULT_CONTEXT)
    if most is not None and asked > most:
        raise UserError(f"a context of {asked} tokens is more than the {most} that the model was made for")
    return asked
