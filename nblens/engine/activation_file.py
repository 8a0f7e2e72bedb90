"""Raw activations written to one safetensors file while a run goes on.

Each slice goes to its place in the file as it comes, so that memory holds one step's activations, whatever the length
of the run. The format is that of the safetensors library, which reads it; the library itself writes only what is in
memory as a whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import BinaryIO, Self, cast

import torch

from nblens.engine.control import Emit
from nblens.errors import UserError
from nblens.files import check_replaceable, plain_file, replacing
from nblens.model.architecture import Architecture, ModelFacts
from nblens.specs import ActivationSlice, Event, RunFinished, RunSpec, TokensSampled

__all__ = ["ActivationFile", "ActivationRecorder"]

_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}


class ActivationRecorder:
    """Takes the activations out of a run's events and writes them to the file that its spec names.

    ::

        with ActivationRecorder(spec, architecture, emit) as recorder:
            run(spec, recorder)                 # recorder(event) for every event

    Consequences: a run that was stopped leaves a file of what it had read; one that failed leaves none.
    """

    def __init__(self, spec: RunSpec, facts: Architecture | ModelFacts, emit: Emit) -> None:
        assert spec.capture is not None
        assert spec.capture.to is not None
        self._prompts, self._capture, self._emit = spec.prompts, spec.capture, emit
        self._sampled: list[list[int]] = [[] for _ in spec.prompts]
        self._chosen: dict[int, tuple[int, ...]] = {}
        n_new = spec.generation.max_new_tokens - 1 if spec.generation else 0
        shapes = {}
        for row, prompt in enumerate(spec.prompts):
            n_tokens = len(prompt) + n_new
            if self._capture.positions:
                n_tokens = len(self._capture.positions[row])
            elif self._capture.from_end:
                n_tokens = len(self._capture.from_end[row].of(n_tokens))
            for site in self._capture.sites:
                shapes[self._name(row, site)] = (len(self._capture.blocks), n_tokens, facts.d_model)
        self._file = ActivationFile(spec.capture.to, shapes, facts.dtype)

    def __call__(self, event: Event) -> None:
        """Take in an event; all but activations go on to `emit`."""
        if isinstance(event, ActivationSlice):
            self._file.write(self._name(event.row, event.site), event.start, event.values)
            self._chosen[event.row] = event.positions
            return
        if isinstance(event, TokensSampled):
            event.place_in(self._sampled)
        elif isinstance(event, RunFinished):
            self._finish()
        self._emit(event)

    def _name(self, row: int, what: str) -> str:
        return self._capture.tensor_name(row, what, len(self._prompts))

    def _finish(self) -> None:
        capture, ids = self._capture, {}
        for row, prompt in enumerate(self._prompts):
            sequence = torch.tensor([*prompt, *self._sampled[row]], dtype=torch.int32)
            if kept := capture.positions[row] if capture.positions else self._chosen.get(row):
                sequence = sequence[[p for p in kept if p < len(sequence)]]
            n_written = self._file.n_tokens(self._name(row, capture.sites[0]))
            ids[self._name(row, "token_ids")] = sequence[:n_written]
        layers = ",".join(map(str, capture.blocks))
        self._file.finish({"format": "nblens.activations", "version": "1", "layers": layers}, ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.discard()


class ActivationFile:
    """Tensors (n_layers, n_tokens, d_model) by name, filled along their tokens.

    Parameters
    ----------
    path : str or os.PathLike
        The finished file; until `finish` the data is in a file without a name, which ends with the process.
    shapes : mapping of str to (int, int, int)
        Room for each tensor; fewer tokens than that may come.
    dtype : torch.dtype
        Of all of them.

    Raises
    ------
    UserError
        The file cannot be written, or the disk has no room for it.
    """

    def __init__(
        self, path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype
    ) -> None:
        self._path, self._shapes, self._dtype = Path(path), dict(shapes), dtype
        self._itemsize = torch.empty((), dtype=dtype).element_size()
        self._tokens = dict.fromkeys(shapes, 0)
        self._offsets, size = {}, 0
        for name, shape in shapes.items():
            self._offsets[name] = size
            size += prod(shape) * self._itemsize
        self._data = self._reserve(size)

    def _reserve(self, size: int) -> BinaryIO:
        with plain_file("write", self._path):
            folder = Path(os.path.realpath(self._path)).parent
            free = shutil.disk_usage(folder).free
            if 2 * size > free:  # the data, and the finished file while it is made of it
                raise UserError(
                    f"cannot write {self._path}: it takes {2 * size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
                )
            check_replaceable(self._path)
            return cast(BinaryIO, tempfile.TemporaryFile(dir=folder))

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Put tokens start … in their place, (n_layers, n, d_model); what was there is replaced."""
        _, room, d_model = self._shapes[name]
        values = values.to("cpu", self._dtype).contiguous()
        try:
            for layer, rows in enumerate(values):
                position = (layer * room + start) * d_model * self._itemsize
                self._data.seek(self._offsets[name] + position)
                self._data.write(rows.view(torch.uint8).numpy().data)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {error.strerror}") from error
        self._tokens[name] = max(self._tokens[name], start + values.shape[1])

    def n_tokens(self, name: str) -> int:
        """How many tokens of a tensor have come."""
        return self._tokens[name]

    def finish(self, metadata: Mapping[str, str], token_ids: Mapping[str, torch.Tensor]) -> Path:
        """Write the header, leave out room that was not used, and rename.

        Parameters
        ----------
        metadata : mapping of str to str
            Goes into the header.
        token_ids : mapping of str to torch.Tensor
            int32 tensors that are stored beside the activations.
        """
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name, (n_layers, _, d_model) in self._shapes.items():
            shape = [n_layers, self._tokens[name], d_model]
            begin, end = end, end + prod(shape) * self._itemsize
            header[name] = {"dtype": _DTYPES[self._dtype], "shape": shape, "data_offsets": [begin, end]}
        for name, ids in token_ids.items():
            begin, end = end, end + 4 * len(ids)
            header[name] = {"dtype": "I32", "shape": [len(ids)], "data_offsets": [begin, end]}
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format wants the data aligned
        try:
            with replacing(self._path) as out:
                out.write(len(encoded).to_bytes(8, "little") + encoded)
                self._copy_used(out)
                for ids in token_ids.values():
                    out.write(ids.to(torch.int32).numpy().tobytes())
        finally:
            self.discard()
        return self._path

    def _copy_used(self, out: BinaryIO) -> None:
        for name, (n_layers, room, d_model) in self._shapes.items():
            row = d_model * self._itemsize
            for layer in range(n_layers):
                self._data.seek(self._offsets[name] + layer * room * row)
                left = self._tokens[name] * row
                while left > 0:
                    piece = self._data.read(min(left, 2**24))
                    out.write(piece)
                    left -= len(piece)

    def discard(self) -> None:
        """Let go of the data; harmless when that was done."""
        with suppress(OSError):  # what is still to be written may have no room either
            self._data.close()
