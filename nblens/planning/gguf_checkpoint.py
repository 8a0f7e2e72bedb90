"""A model in a GGUF file, as llama.cpp takes it: transformers dequantises it, and then it is a model like others."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nblens.errors import UserError
from nblens.gguf_reader import gguf_library, gguf_reader
from nblens.planning.checkpoint import Headers, hub_or_cache, read_by_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["GgufCheckpoint", "find_gguf", "is_gguf", "plain_model"]

_ENDING = ".gguf"


@dataclass(frozen=True)
class GgufCheckpoint:
    """One file that holds a whole model, its tokenizer and its chat template."""

    source: str
    """the folder, or the name on the Hub"""
    file: str
    local: dict[str, Any]
    """as in `Checkpoint`"""
    headers: Headers
    """of the tensors as they are stored"""
    kinds: tuple[str, ...]
    """GGUF's names of how they are stored, the most common first"""

    @property
    def dtype(self) -> torch.dtype:
        """What the dequantised numbers are kept in on a GPU: of 16 bits, unless the file itself has more."""
        return torch.float32 if self.kinds[:1] == ("F32",) else torch.bfloat16


def is_gguf(model: str | os.PathLike[str] | None, gguf: str | None) -> bool:
    """Tell whether a GGUF file is meant, by its path or by its name."""
    return gguf is not None or (isinstance(model, (str, os.PathLike)) and str(model).lower().endswith(_ENDING))


def find_gguf(
    model: str | os.PathLike[str] | None, gguf: str | None, revision: str | None = None
) -> GgufCheckpoint | None:
    """Find the GGUF file that is meant by a path to it, or by its name in a folder or on the Hub; None: none is.

    Raises
    ------
    UserError
        There is no such file; it is damaged, one of several, or holds what cannot be dequantised.
    """
    if not is_gguf(model, gguf):
        return None
    if gguf is None:
        path = Path(os.path.expanduser(os.fspath(model or "")))
        source, gguf = str(path.parent), path.name
    else:
        if model is None:
            raise UserError(f"gguf={gguf!r} is a file of a model; name its folder, or its name on the Hub, too")
        source = os.path.expanduser(os.fspath(model))
    gguf_library()
    with read_by_libraries(os.path.join(source, gguf)):
        return _found(source, gguf, revision)


def plain_model(model: PreTrainedModel) -> PreTrainedModel:
    """A model that was dequantised, without what marks it as quantized: its weights are plain, and can be saved."""
    for name in ("is_quantized", "quantization_method", "hf_quantizer"):
        vars(model).pop(name, None)
    for config in {id(c): c for c in (model.config, model.config.get_text_config(decoder=True))}.values():
        vars(config).pop("quantization_config", None)
    return model


def _found(source: str, file: str, revision: str | None) -> GgufCheckpoint:
    from transformers.utils.hub import cached_file

    if Path(source).is_dir():
        if not Path(source, file).is_file():
            raise ValueError("there is no such file")
        return _checked(source, file, {}, Path(source, file))
    local = hub_or_cache(source, file, revision)
    path = cached_file(source, file, revision=revision, **local)
    if path is None:
        raise ValueError("there is no such file")
    return _checked(source, file, local, Path(path))


def _checked(source: str, file: str, local: dict[str, Any], path: Path) -> GgufCheckpoint:
    """What a header says, unless transformers could not make a model of it."""
    reader = gguf_reader(path)
    parts = _value(reader, "split.count")
    if isinstance(parts, int) and parts > 1:
        raise ValueError(
            f"it is one of {parts} parts, and only a whole file can be read; join them with "
            "llama-gguf-split --merge FIRST_PART WHOLE"
        )
    if _value(reader, "general.architecture") is None or not reader.tensors:
        raise ValueError("it holds no model (no general.architecture, or no tensors)")
    if taken := {tensor.tensor_type for tensor in reader.tensors if not _can_dequantize(tensor.tensor_type)}:
        names = ", ".join(sorted(kind.name for kind in taken))
        raise ValueError(f"tensors stored as {names} cannot be dequantised by the gguf package; take another file")
    kinds = Counter(tensor.tensor_type.name for tensor in reader.tensors for _ in range(len(tensor.shape)))
    headers = {tensor.name: (tensor.tensor_type.name, int(tensor.n_bytes)) for tensor in reader.tensors}
    return GgufCheckpoint(source, file, local, headers, tuple(kind for kind, _ in kinds.most_common()))


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _can_dequantize(kind: Any) -> bool:
    """Tell whether the package knows how, by a block of zeros."""
    gguf = gguf_library()
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
