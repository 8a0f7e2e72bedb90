"""What a checkpoint says about itself without its weights being read: configuration and safetensors headers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from nblens.errors import DeviceMemoryError, NblensError, UserError, first_line, is_out_of_memory, shown

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig

__all__ = [
    "DEMO_MODEL",
    "WITHOUT_ADAPTER",
    "Headers",
    "check_config",
    "check_files",
    "check_token_ids",
    "checkpoint_dtype",
    "commit_of",
    "has_adapter",
    "hub_or_cache",
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

WITHOUT_ADAPTER = {"adapter_kwargs": {"subfolder": "none"}}
"""Has transformers look for an adapter where there is none: with peft it would add one that lies beside the model."""

_ADAPTER = "adapter_config.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_SOUND = (".safetensors", ".safetensors.index.json")
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError)
"""what a file of another form makes a library stumble over"""
_HUB_SECONDS = 2.5
_NETWORK = ("httpx", "requests", "urllib3")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_BITS = {"BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def source_of(model: str | os.PathLike[str] | None) -> str:
    """Return where a model is loaded from: an id or a folder; None is the model that comes with nblens.

    Raises
    ------
    UserError
        It is nothing of these.
    """
    if model is None:
        return str(Path(__file__).parents[1] / "demo" / "weights")
    if not isinstance(model, (str, os.PathLike)):
        raise UserError(f"a model is a name on the Hub, a folder, or None for the built-in one; got {shown(model)}")
    return os.path.expanduser(os.fspath(model))


def hub_or_cache(source: str, file: str = "config.json", revision: str | None = None) -> dict[str, Any]:
    """Find out whether the Hub can be asked for a model; where not, what has libraries look on this machine alone.

    They would try again for half a minute before they look there.

    Parameters
    ----------
    source : str
        A folder, or a name on the Hub.
    file : str
        What a copy on this machine has.
    revision : str, optional
        Branch, tag or commit.

    Raises
    ------
    UserError
        It is neither on this machine nor to be had.
    """
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(source).exists():
        return {}
    try:
        copy = try_to_load_from_cache(source, file, revision=revision)
    except HFValidationError:
        raise UserError(f"cannot load {source!r}: there is no such folder, and it is no name on the Hub") from None
    if not (reason := "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)):
        return {}
    if not isinstance(copy, str):
        raise UserError(f"cannot load {source!r}: it is not on this machine, and the Hub cannot be asked ({reason})")
    return {"local_files_only": True}


def commit_of(source: str, file: str = "config.json", revision: str | None = None) -> str:
    """The commit of a model's files on this machine, by where the Hub's cache has one of them; empty: of a folder."""
    from huggingface_hub import try_to_load_from_cache

    copy = None if Path(source).exists() else try_to_load_from_cache(source, file, revision=revision)
    parts = Path(copy).parts if isinstance(copy, str) else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else ""


def _unreachable(endpoint: str) -> str:
    """Why nobody answers there; empty where somebody does."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=_HUB_SECONDS)
    except Exception as error:  # of whichever library the Hub's own asks by
        return f"{endpoint}: {first_line(error)}"
    return ""


def read_config(
    model: str | os.PathLike[str] | None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **more: Any,
) -> PreTrainedConfig:
    """A model's configuration; `more` as transformers takes it.

    Raises
    ------
    UserError
        There is no such model, its configuration cannot be read, or it says what cannot be loaded.
    """
    from transformers import AutoConfig

    source = source_of(model)
    _check_folder(source)
    with read_by_libraries(model):
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                source, revision=revision, trust_remote_code=trust_remote_code, **more
            )
        except (OSError, ValueError) as error:
            if base := _base_of_adapter(source, revision, more):
                raise UserError(
                    f"cannot load {str(model)!r}: it is an adapter of {base}, not a model; load that one, with "
                    f"adapter={str(model)!r}"
                ) from error
            raise
        n_blocks = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        if n_blocks is not None and not 1 <= n_blocks <= _MOST_BLOCKS:
            raise ValueError(f"its configuration asks for {shown(n_blocks)} blocks; at most {_MOST_BLOCKS}")
        check_config(config)
        named = getattr(config, "transformers_weights", None)
        if named is not None and not str(named).endswith(_SOUND):
            raise _pickled(source, str(named))
    return config


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what would fail only later, and far from its cause.

    Raises
    ------
    UserError
        The field, and its value.
    """
    check_token_ids(config)
    check_token_ids(config.get_text_config(decoder=True))
    if getattr(config, "_attn_implementation", None) == "flex_attention":
        raise UserError(
            "its configuration asks for attn_implementation 'flex_attention', which is compiled anew for each length "
            "and cannot go on from a cache in steps; take 'sdpa' or 'eager'"
        )


def check_token_ids(config: PreTrainedConfig | GenerationConfig | SimpleNamespace) -> None:
    """Raise `UserError` where the id of a special token is none."""
    for name in _TOKEN_IDS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, (list, tuple)) else () if value is None else (value,)
        if not all(isinstance(number, int) and not isinstance(number, bool) for number in ids):
            raise UserError(f"its configuration names {name} {shown(value)}, which is no token id")


@contextmanager
def read_by_libraries(model: str | os.PathLike[str] | None) -> Iterator[None]:
    """Have libraries read files of a model inside; whatever they stumble over is one line with its own reason.

    Raises
    ------
    DeviceMemoryError
        Memory ran out.
    UserError
        Everything else.
    """
    name = None if model is None else str(model)
    try:
        yield
    except UserError as error:
        line = str(error)
        raise UserError(line if line.startswith("cannot load") else f"cannot load {name!r}: {line}") from error
    except NblensError:
        raise
    except Exception as error:
        reason = first_line(error)
        if is_out_of_memory(error):
            raise DeviceMemoryError(
                f"cannot load {name!r}: out of memory while its files were read ({reason:.200}); nblens.plan tells "
                "what it takes, and what would take less"
            ) from error
        if isinstance(error, ImportError):
            reason = f"a package is missing ({reason:.200})"
        elif type(error).__module__.partition(".")[0] in _NETWORK:
            reason = f"the Hub cannot be reached ({reason:.200})"
        elif isinstance(error, _DAMAGED) or type(error).__name__ == "SafetensorError":
            reason = f"a file of it is damaged, or of another kind ({type(error).__name__}: {reason:.200})"
        elif not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason:.200}"
        raise UserError(f"cannot load {name!r}: {reason}") from error


def has_adapter(source: str) -> bool:
    """Tell whether an adapter lies in the folder of a model."""
    return (Path(source) / _ADAPTER).is_file()


def _base_of_adapter(source: str, revision: str | None, more: Mapping[str, Any]) -> str:
    """What the adapter in a folder without a model, or on the Hub, was made for; empty where there is none."""
    from transformers.utils.peft_utils import find_adapter_config_file

    with suppress(OSError, ValueError, TypeError):
        local = bool(more.get("local_files_only"))
        file = find_adapter_config_file(source, revision=revision, local_files_only=local)
        if file is not None and not (Path(source) / "config.json").exists():
            base = json.loads(Path(file).read_text(encoding="utf-8")).get("base_model_name_or_path")
            return shown(base) if base else "another model"
    return ""


def _pickled(source: str, file: str) -> UserError:
    return UserError(
        f"cannot load {source!r}: its weights are pickled ({file}), and to read such a file can run code "
        "that it brings; take a copy with *.safetensors"
    )


def _check_folder(source: str) -> None:
    """Refuse a folder that holds pipes, sockets or devices: a library that opens one waits in it for ever."""
    strange: list[str] = []
    with suppress(OSError, ValueError):  # no folder, or one that cannot be looked into: what reads it says so
        files = (path for path in Path(source).iterdir() if path.exists())
        strange = sorted(path.name for path in files if not (path.is_file() or path.is_dir()))
    if strange:
        raise UserError(f"cannot load {source!r}: {strange[0]} in it is no plain file")


def check_files(source: str, config: PreTrainedConfig) -> None:
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
            raise _pickled(source, pickled[0])
        raise UserError(f"cannot load {source!r}: it holds no weights (*.safetensors)")
    indices = sorted(folder.glob("*.safetensors.index.json"))
    with read_by_libraries(source):
        named = getattr(config, "transformers_weights", None)
        if named is not None and folder / str(named) not in (*weights, *indices):
            raise ValueError(f"its configuration names {str(named)!r}, which is none of its *.safetensors")
        for index in indices:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            if strange := sorted(shard for shard in shards if (folder / shard) not in weights):
                raise ValueError(f"{index.name} names {strange[0]!r}, which is none of its *.safetensors")
        if (file := folder / "generation_config.json").exists():
            fields = json.loads(file.read_text(encoding="utf-8"))
            check_token_ids(SimpleNamespace(**fields))  # before transformers compares them with numbers
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
