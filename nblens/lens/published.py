"""Lenses in the layouts that others publish: tuned-lens 0.2 and jlens."""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nblens.errors import FileFormatError, first_line
from nblens.files import plain_file, read_safetensors, read_whole
from nblens.records import sound_content
from nblens.text import byte_size

__all__ = ["lens_file", "read_published"]

_CONFIG, _PARAMS, _JACOBIAN = "config.json", "params.pt", "lens.pt"

_MOST_PICKLED = 2**24
"""Bytes of what torch.save pickles beside the tensors: names and shapes."""
_MOST_OLD = 2**28
"""Bytes of a file in torch's format before 1.6, which can only be read as a whole."""


def lens_file(path: str | os.PathLike[str]) -> str | None:
    """Find the file with the tensors of a lens at `path`: itself, or one in a published folder; None: none."""
    candidates = (os.fspath(path), os.path.join(path, _PARAMS), os.path.join(path, _JACOBIAN))
    return next((file for file in candidates if os.path.isfile(file)), None)


def read_published(path: str | os.PathLike[str], name: str | None = None) -> dict[str, Any]:
    """Read the fields of a `Lens` from a published one; see `Lens.load`. Their tensors are not checked yet.

    Raises
    ------
    FileFormatError
        The file is damaged, or is in neither layout.
    """
    path = Path(path)
    file = lens_file(path)
    if file is None and os.path.isdir(path):
        raise FileFormatError(f"{path} is no lens: it holds neither {_PARAMS} (tuned-lens) nor {_JACOBIAN} (jlens)")
    content = _content(Path(file or path))
    config = _config(path / _CONFIG) if file == os.path.join(path, _PARAMS) else None
    with sound_content(path):
        try:
            if config is not None:
                fields = {"name": name or path.name, **_tuned(content, config)}
            else:
                fields = {"name": name or path.stem, **_jacobian(content)}
        except KeyError as error:
            size = byte_size(os.stat(file or path).st_size)
            raise FileFormatError(f"{path} is no lens, or damaged: its {size} lack {error}") from error
    return fields | {part: _in_memory(fields[part]) for part in ("weights", "biases") if part in fields}


def _tuned(parameters: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Translator i of tuned-lens reads hidden state i, which enters block i, as h + Linear(h)."""
    n_blocks, d_model = int(config["num_hidden_layers"]), int(config["d_model"])
    tensors: dict[str, dict[int, Any]] = {"weight": {}, "bias": {}}
    for key, tensor in parameters.items():
        match = re.fullmatch(r"(\d{1,6})\.(weight|bias)", key)
        if match is None:
            raise ValueError(f"a parameter is called {key!r}, not 0.weight, 0.bias, …")
        tensors[match[2]][int(match[1])] = tensor
    if sorted(tensors["weight"]) != list(range(n_blocks)):
        raise ValueError(f"{_CONFIG} says {n_blocks} translators, {_PARAMS} holds {sorted(tensors['weight'])}")
    _check_width(tensors["weight"], d_model)
    model = str(config.get("base_model_name_or_path", ""))
    parts = {"weights": tensors["weight"], "biases": tensors["bias"]}
    return {"kind": "tuned", **parts, "model": model, "n_blocks": n_blocks}


def _jacobian(content: Mapping[str, Any]) -> dict[str, Any]:
    """Matrix l of jlens carries the output of block l: depth l + 1."""
    matrices = content["J"]
    layers = [int(layer) for layer in content["source_layers"]]
    by_layer = (
        {int(layer): matrix for layer, matrix in matrices.items()}
        if isinstance(matrices, Mapping)
        else dict(zip(layers, matrices, strict=True))
    )
    if sorted(by_layer) != sorted(layers):
        raise ValueError(f"source_layers are {sorted(layers)}, J holds {sorted(by_layer)}")
    fit = {"n_texts": int(content["n_prompts"])} if "n_prompts" in content else {}
    _check_width(by_layer, int(content["d_model"]))
    return {"kind": "jacobian", "weights": {layer + 1: matrix for layer, matrix in by_layer.items()}, "fit": fit}


def _check_width(matrices: Mapping[int, Any], d_model: int) -> None:
    sizes = {size for matrix in matrices.values() for size in getattr(matrix, "shape", ())}
    if sizes and d_model not in sizes:
        raise ValueError(f"it says d_model {d_model}, its matrices have {min(sizes)}")


def _config(path: Path) -> Mapping[str, Any]:
    content = read_whole(path)
    with sound_content(path):
        return _mapping(json.loads(content.decode()), path)


def _content(path: Path) -> Mapping[str, Any]:
    """The dictionary of a file of torch.save, or of safetensors, read without running anything that it brings."""
    if path.suffix == ".safetensors":
        arrays, metadata = read_safetensors(path)
        return {**metadata, **{key: torch.from_numpy(array) for key, array in arrays.items()}}
    with plain_file("read", path):
        try:
            # mapped: what the file turns out not to need is never read
            mapped = _is_mappable(path)
            return _mapping(torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mapped), path)
        except (OSError, FileFormatError):
            raise
        except Exception as error:  # the unpickler passes on whatever a damaged file makes it stumble over
            reason = first_line(error)[:120]
            raise FileFormatError(f"{path} is damaged, or holds more than tensors: {reason}") from error


def _is_mappable(path: Path) -> bool:
    """Tell whether a file of torch.save can be looked into before its tensors are read; out of bounds it is refused."""
    size = os.stat(path).st_size
    if not zipfile.is_zipfile(path):
        if size > _MOST_OLD:
            raise FileFormatError(
                f"{path} was not read: {byte_size(size)} that are no file of torch.save (1.6 or later)"
            )
        return False
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, as torch.save never does")
            if entry.filename.endswith(".pkl") and entry.file_size > _MOST_PICKLED:
                raise ValueError(f"it pickles {byte_size(entry.file_size)} beside its tensors")
    return True


def _in_memory(tensors: Mapping[int, Any]) -> dict[int, Any]:
    """Copies that stay what they are when the file changes; what declares more than it has is left for its refusal."""
    return {depth: tensor.clone() if _is_whole(tensor) else tensor for depth, tensor in tensors.items()}


def _is_whole(tensor: Any) -> bool:
    if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.element_size()


def _mapping(content: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise FileFormatError(f"{path} is no lens: it holds a {type(content).__name__}")
    return content
