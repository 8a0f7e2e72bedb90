"""An adapter beside a model: found and held against the model before either's weights are read, then put on it.

Weights come from safetensors alone, through peft, and are kept apart from the model's own: what it computes is what
peft computes with the adapter, in the adapter's own precision.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nblens.errors import UserError, first_line, shown
from nblens.planning.checkpoint import hub_or_cache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Adapter", "adapters_of", "find_adapter", "lay_beside", "put_on"]

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLED = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {"lora_A": 1, "lora_B": 0}  # which side of theirs is as wide as the module's


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and what its weights are."""

    name: str
    """as it was named"""
    folder: Path
    base: str
    """what it says it was made for; may be empty"""
    tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
    """path in the model, dtype and shape of each"""


def find_adapter(adapter: str | os.PathLike[str]) -> Adapter:
    """Find an adapter by its folder or its name on the Hub, and read its safetensors header.

    Raises
    ------
    UserError
        There is none, its weights are pickled or damaged, or peft is not installed.
    """
    if not isinstance(adapter, (str, os.PathLike)):
        raise UserError(f"an adapter is a folder, or a name on the Hub; got {shown(adapter)}")
    name = os.fspath(adapter)
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UserError('adapters need peft, which is not installed: pip install "nblens[adapters]"') from error
    folder = _folder(os.path.expanduser(name))
    try:
        described = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors = _tensors(folder / _WEIGHTS)
        base = described.get("base_model_name_or_path") or ""
    except Exception as error:  # of json, safetensors and the system
        raise UserError(f"cannot load the adapter {name!r}: {first_line(error)}") from error
    return Adapter(name, folder, str(base), tensors)


def lay_beside(model: nn.Module, adapter: Adapter) -> None:
    """Put an adapter's weights beside those of a model on the "meta" device, so that they are counted.

    Raises
    ------
    UserError
        It is one of another model: a module is missing, or of another width.
    """
    modules = dict(model.named_modules())
    for number, (path, dtype, shape) in enumerate(adapter.tensors):
        owner, rest = _owner(path, modules)
        module = modules[owner]
        kind = rest.partition(".")[0]
        weight = getattr(module, "weight", None)
        wide = tuple(weight.shape) if isinstance(weight, torch.Tensor) else ()
        if not rest or not wide or (kind in _FACTORS and shape[_FACTORS[kind]] not in wide):
            wanted = f"a module of width {shape[_FACTORS[kind]]}" if kind in _FACTORS and wide else "a module"
            raise _misfit(adapter, f"it has {wanted} at {path.partition('.lora_')[0]}, and this one has not")
        if kind in ("weight", "bias") and tuple(getattr(module, kind).shape) != shape:
            raise _misfit(adapter, f"its {path} is {shape}, and this one's {tuple(getattr(module, kind).shape)}")
        parameter = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)
        module.register_parameter(f"adapter_{number}", parameter)


def put_on(model: PreTrainedModel, adapter: Adapter) -> None:
    """Put an adapter on a model that is in memory.

    Raises
    ------
    UserError
        peft cannot, or some of its weights found no place.
    """
    from peft import PeftConfig
    from safetensors.torch import load_file

    try:
        config = PeftConfig.from_pretrained(str(adapter.folder))
        config.inference_mode = True
        found: Any = model.load_adapter(
            peft_config=config, adapter_state_dict=load_file(adapter.folder / _WEIGHTS), adapter_name="default"
        )
    except Exception as error:  # whatever a strange configuration makes peft stumble over
        raise UserError(f"cannot load the adapter {adapter.name!r}: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(map(str, getattr(found, what, None) or ())):
            raise _misfit(adapter, f"{len(keys)} of its weights have no place in this one, such as {keys[0]}")


def adapters_of(model: Any) -> tuple[str, ...]:
    """Names of the adapters that act in a model, whoever put them on."""
    if not isinstance(getattr(model, "peft_config", None), dict):
        return ()
    active = getattr(model, "active_adapters", None) or getattr(model, "active_adapter", ())
    try:
        names = active() if callable(active) else active
    except ValueError:  # transformers has none
        return ()
    return (names,) if isinstance(names, str) else tuple(map(str, names or ()))


def _folder(source: str) -> Path:
    """The folder of an adapter's files, brought from the Hub where it is none."""
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        folder = Path(source)
    else:
        local = hub_or_cache(source, _CONFIG)
        try:
            found = [cached_file(source, file, **local) for file in (_CONFIG, _WEIGHTS)]
        except OSError as error:
            raise UserError(f"cannot load the adapter {source!r}: {first_line(error)}") from error
        folder = Path(str(found[0])).parent
    for file in (_CONFIG, _WEIGHTS):
        if not (folder / file).is_file():
            pickled = file == _WEIGHTS and (folder / _PICKLED).exists()
            why = (
                f"its weights are pickled ({_PICKLED}); take a copy with {_WEIGHTS}" if pickled else f"it has no {file}"
            )
            raise UserError(f"cannot load the adapter {source!r}: {why}")
    return folder


def _tensors(path: Path) -> tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]:
    from safetensors import safe_open

    found = []
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            part = file.get_slice(key)
            found.append((key.removeprefix(_PREFIX), _DTYPES[part.get_dtype()], tuple(part.get_shape())))
    if not found:
        raise ValueError("it holds no weights")
    return tuple(found)


_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _owner(path: str, modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The module that a weight belongs to, and the weight's own name in it."""
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if (owner := ".".join(parts[:n])) in modules:
            rest = ".".join(parts[n:])
            known = rest.startswith(("lora_", "ia3_")) or rest in ("weight", "bias")
            return (owner, rest) if known else ("", "")
    return "", ""


def _misfit(adapter: Adapter, why: str) -> UserError:
    base = f" of {adapter.base}" if adapter.base else ""
    return UserError(f"the adapter {adapter.name!r}{base} was made for another model: {why}")
