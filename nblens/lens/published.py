"""Lenses in the layouts that others publish: tuned-lens 0.2 and jlens."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from nblens.errors import FileFormatError, first_line
from nblens.files import plain_file, read_safetensors
from nblens.records import sound_content

__all__ = ["lens_file", "read_published"]

_CONFIG, _PARAMS, _JACOBIAN = "config.json", "params.pt", "lens.pt"


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
                return {"name": name or path.name, **_tuned(content, config)}
            return {"name": name or path.stem, **_jacobian(content)}
        except KeyError as error:
            raise FileFormatError(f"{path} is no lens, or damaged: it lacks {error}") from error


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
    with plain_file("read", path):
        content = path.read_bytes()
    with sound_content(path):
        return _mapping(json.loads(content.decode()), path)


def _content(path: Path) -> Mapping[str, Any]:
    """The dictionary of a file of torch.save, or of safetensors, read without running anything that it brings."""
    if path.suffix == ".safetensors":
        arrays, metadata = read_safetensors(path)
        return {**metadata, **{key: torch.from_numpy(array) for key, array in arrays.items()}}
    with plain_file("read", path):
        try:
            return _mapping(torch.load(path, map_location="cpu", weights_only=True), path)
        except (OSError, FileFormatError):
            raise
        except Exception as error:  # the unpickler passes on whatever a damaged file makes it stumble over
            reason = first_line(error)[:120]
            raise FileFormatError(f"{path} is damaged, or holds more than tensors: {reason}") from error


def _mapping(content: object, path: Path) -> Mapping[str, Any]:
    if not isinstance(content, Mapping) or not all(isinstance(key, str) for key in content):
        raise FileFormatError(f"{path} is no lens: it holds a {type(content).__name__}")
    return content
