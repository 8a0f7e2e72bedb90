"""What a checkpoint says about itself without its weights being read: configuration and safetensors headers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nblens.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["DEMO_MODEL", "Headers", "checkpoint_dtype", "read_config", "read_headers", "source_of"]

DEMO_MODEL = "nblens-demo"
"""Name of the model that comes with nblens."""

Headers = dict[str, tuple[str, int]]
"""tensor → (safetensors' name of its dtype, bytes)"""

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def source_of(model: str | None) -> str:
    """Where a model is loaded from: an id or a folder; None is the model that comes with nblens."""
    return str(Path(__file__).parents[1] / "demo" / "weights") if model is None else model


def read_config(model: str | None, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration.

    Raises
    ------
    UserError
        There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source_of(model), revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model!r}: {first_line(error)}") from error


def read_headers(source: str, revision: str | None = None) -> Headers | None:
    """Names, types and sizes of the tensors in a checkpoint; None where no safetensors headers are to be had."""
    folder = Path(source)
    if folder.is_dir():
        return _local_headers(sorted(folder.glob("*.safetensors")))
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        metadata = HfApi().get_safetensors_metadata(source, revision=revision)
    except (OSError, ValueError, HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError):
        return None
    tensors = [tensor for file in metadata.files_metadata.values() for tensor in file.tensors.items()]
    return {name: (info.dtype, info.data_offsets[1] - info.data_offsets[0]) for name, info in tensors}


def _local_headers(paths: list[Path]) -> Headers | None:
    from safetensors import SafetensorError, safe_open

    headers: Headers = {}
    for path in paths:
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a mapping
                    tensor = file.get_slice(name)
                    dtype, shape = tensor.get_dtype(), tensor.get_shape()
                    headers[name] = (dtype, torch.Size(shape).numel() * _bits(dtype) // 8)
        except (SafetensorError, OSError) as error:
            raise UserError(f"cannot load {str(path.parent)!r}: {path.name} is damaged: {first_line(error)}") from error
    return headers or None


def _bits(dtype: str) -> int:
    """Bits of an element: `BF16`, `I64`, `F8_E4M3`, …"""
    return _BITS.get(dtype) or int("".join(c for c in dtype.partition("_")[0] if c.isdecimal()))


def checkpoint_dtype(config: Any, headers: Headers | None) -> torch.dtype:
    """What `dtype="auto"` loads, as in transformers: what the configuration names, else the first floating type."""
    text = config.get_text_config(decoder=True)
    named = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if named is not None:
        return named if isinstance(named, torch.dtype) else getattr(torch, str(named))
    stored = (_FLOATS[dtype] for dtype, _ in (headers or {}).values() if dtype in _FLOATS)
    return next(stored, torch.float32)
