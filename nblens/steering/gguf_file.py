"""Steering vectors in the layout of llama.cpp's control vectors, which repeng writes and reads too.

::

    general.architecture        "controlvector"
    controlvector.model_hint    family of the model, such as "llama"
    controlvector.layer_count   how many directions the file holds
    direction.{L}               float32 (d_model,), added to the output of block L
    nblens.version, nblens.fields, nblens.sha256    what else a `SteeringVector` knows; other readers pass over it

L is our block, with no shift. llama.cpp adds `direction.{L}` where layer `il == L`, counted from 0, ends
(`build_cvec(cur, il)` right before `l_out`, at every token; `llama_adapter_cvec::apply` stores layer 1 at offset 0)
and refuses L = 0 (`common_control_vector_load_one`). repeng reads `hidden_states[L + 1]` and adds to the output of
`layers[L]`. A repeng file may hold `direction.0`; it is read as block 0.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nblens.errors import FileFormatError, first_line
from nblens.files import plain_file, replace_file
from nblens.gguf_reader import gguf_library, gguf_reader
from nblens.text import byte_size

__all__ = ["ControlVector", "model_family", "read_control_vector", "write_control_vector"]

_ARCHITECTURE = "controlvector"
_HINT, _COUNT = f"{_ARCHITECTURE}.model_hint", f"{_ARCHITECTURE}.layer_count"
_VERSION, _FIELDS, _SHA256 = "nblens.version", "nblens.fields", "nblens.sha256"
_FORMAT = 1
_DIRECTION = re.compile(r"direction\.(0|[1-9][0-9]{0,5})")
_MOST_VALUES = 20_000
"""A control vector's header holds some tens of values, and eight for every direction."""

_MOST_BYTES = 2**30
"""A control vector holds one number for each dimension of each block."""


@dataclass(frozen=True)
class ControlVector:
    """Content of a control vector's file."""

    directions: Mapping[int, np.ndarray]
    """block → float32 (d_model,)"""
    model_hint: str
    fields: Mapping[str, Any] | None = None
    """what nblens keeps beside it; None: the file is from elsewhere"""


def write_control_vector(path: str | os.PathLike[str], vector: ControlVector) -> Path:
    """Write to GGUF in one step: a reader sees the old file or the new one."""
    gguf = gguf_library()
    fields = json.dumps(vector.fields)
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / "draft.gguf"
        with closing(gguf.GGUFWriter(draft, _ARCHITECTURE)) as writer:
            writer.add_string(_HINT, vector.model_hint)
            writer.add_uint32(_COUNT, len(vector.directions))
            writer.add_uint32(_VERSION, _FORMAT)
            writer.add_string(_FIELDS, fields)
            writer.add_string(_SHA256, _digest(vector.directions, fields))
            for block, direction in sorted(vector.directions.items()):
                writer.add_tensor(f"direction.{block}", direction)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        return replace_file(path, draft.read_bytes())


def read_control_vector(path: str | os.PathLike[str]) -> ControlVector:
    """Read a control vector, whoever wrote it.

    Raises
    ------
    UserError
        The file cannot be opened, or the `gguf` package is not installed.
    FileFormatError
        The file is damaged, or is no control vector.
    """
    gguf = gguf_library()
    with plain_file("read", path) as path:
        try:
            with np.errstate(over="raise"):
                return _read(gguf_reader(path, _MOST_VALUES), gguf.GGUFValueType, gguf.GGMLQuantizationType.F32)
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # gguf passes on whatever a damaged file makes it stumble over
            raise FileFormatError(f"{path} is not a sound control vector: {first_line(error)[:200]}") from error


def model_family(model: str) -> str:
    """The `model_type` of a model whose config is on this machine; else the name itself."""
    if not model:
        return "unknown"
    from transformers import PreTrainedConfig

    with suppress(OSError, ValueError, KeyError):
        return str(PreTrainedConfig.get_config_dict(model, local_files_only=True)[0]["model_type"])
    return model


def _read(reader: Any, kinds: Any, float32: Any) -> ControlVector:
    def value(key: str, kind: Any) -> Any:
        field = reader.get_field(key)
        return field.contents() if field is not None and field.types == [kind] else None

    architecture = value("general.architecture", kinds.STRING)
    if architecture != _ARCHITECTURE:
        raise ValueError(f"its architecture is {architecture!r:.60}, not {_ARCHITECTURE!r}")
    directions = _directions(reader, float32)
    hint = value(_HINT, kinds.STRING) or ""
    if not any(key.startswith("nblens.") for key in reader.fields):
        return ControlVector(directions, hint)
    version, fields = value(_VERSION, kinds.UINT32), value(_FIELDS, kinds.STRING)
    if version != _FORMAT or fields is None:
        raise ValueError(f"{_VERSION} is {version}, and this nblens reads {_FORMAT}")
    if value(_SHA256, kinds.STRING) != _digest(directions, fields):
        raise ValueError(f"its content is not what {_SHA256} says")
    return ControlVector(directions, hint, json.loads(fields))


def _directions(reader: Any, float32: Any) -> dict[int, np.ndarray]:
    # tensors may lie on top of one another: a small file would ask for much memory
    size = sum(tensor.n_bytes for tensor in reader.tensors)
    if size > len(reader.data):
        raise ValueError("its tensors are larger than the file")
    if size > _MOST_BYTES:
        raise ValueError(f"its tensors hold {byte_size(size)}, and a control vector's at most {byte_size(_MOST_BYTES)}")
    directions = {}
    for tensor in reader.tensors:
        match = _DIRECTION.fullmatch(tensor.name)
        if match is None:
            raise ValueError(f"a tensor is called {tensor.name!r:.60}, not direction.1, direction.2, …")
        if tensor.tensor_type != float32:
            raise ValueError(f"{tensor.name} is {tensor.tensor_type.name}, and a direction is F32")
        if len(tensor.shape) != 1 or not tensor.n_elements:
            raise ValueError(f"{tensor.name} has shape {tuple(tensor.shape.tolist())}, and a direction is 1-D")
        directions[int(match[1])] = np.array(tensor.data, dtype=np.float32)
    return directions


def _digest(directions: Mapping[int, np.ndarray], fields: str) -> str:
    content = hashlib.sha256(fields.encode())
    for block, direction in sorted(directions.items()):
        content.update(f"\n{block}:{len(direction)}\n".encode())
        content.update(direction.astype("<f4").tobytes())
    return content.hexdigest()
