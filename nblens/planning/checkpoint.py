"""What a checkpoint says about itself without its weights being read: configuration and safetensors headers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nblens.errors import NblensError, UserError, first_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = [
    "DEMO_MODEL",
    "Headers",
    "check_files",
    "checkpoint_dtype",
    "read_by_libraries",
    "read_config",
    "read_headers",
    "source_of",
]

DEMO_MODEL = "nblens-demo"
"""Name of the model that comes with nblens."""

_MOST_BLOCKS = 1_000
"""Building a model of what a hostile configuration asks for would never end."""

Headers = dict[str, tuple[str, int]]
"""tensor → (safetensors' name of its dtype, bytes)"""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def source_of(model: str | None) -> str:
    """Return where a model is loaded from: an id or a folder; None is the model that comes with nblens."""
    return str(Path(__file__).parents[1] / "demo" / "weights") if model is None else model


def read_config(model: str | None, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A model's configuration.

    Raises
    ------
    UserError
        There is no such model, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    with read_by_libraries(model):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            source_of(model), revision=revision, trust_remote_code=trust_remote_code
        )
        n_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        if n_blocks is not None and not 1 <= n_blocks <= _MOST_BLOCKS:
            raise ValueError(f"its configuration asks for {shown(n_blocks)} blocks; at most {_MOST_BLOCKS}")
    return config


@contextmanager
def read_by_libraries(model: str | None) -> Iterator[None]:
    """Have libraries read files of a model inside; whatever damaged files make them stumble over is a `UserError`."""
    try:
        yield
    except NblensError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model!r}: {first_line(error)}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(
            f"cannot load {model!r}: a file of it is damaged, or of another kind ({reason:.200})"
        ) from error


def check_files(source: str) -> None:
    """Refuse a folder with damaged weights, pickled ones, or none, without reading them.

    Raises
    ------
    UserError
        The file, and what is wrong with it.
    """
    from transformers import GenerationConfig

    folder = Path(source)
    if not folder.is_dir():
        return
    weights = sorted(folder.glob("*.safetensors"))
    _local_headers(weights)
    if not weights:
        pickled = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLED)
        if pickled:
            raise UserError(
                f"cannot load {source!r}: its weights are pickled ({pickled[0]}), and to read such a file can run code "
                "that it brings; take a copy with *.safetensors"
            )
        raise UserError(f"cannot load {source!r}: it holds no weights (*.safetensors)")
    with read_by_libraries(source):
        for index in folder.glob("*.safetensors.index.json"):
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if strange := sorted(shard for shard in shards if (folder / shard) not in weights):
                raise ValueError(f"{index.name} names {strange[0]!r}, which is none of its *.safetensors")
        if (folder / "generation_config.json").exists():
            GenerationConfig.from_pretrained(source)


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
    """Find what `dtype="auto"` loads in transformers: what the configuration names, else the first floating type."""
    text = config.get_text_config(decoder=True)
    named = getattr(config, "dtype", None) or getattr(text, "dtype", None)
    if named is not None:
        return named if isinstance(named, torch.dtype) else getattr(torch, str(named))
    stored = (_FLOATS[dtype] for dtype, _ in (headers or {}).values() if dtype in _FLOATS)
    return next(stored, torch.float32)
