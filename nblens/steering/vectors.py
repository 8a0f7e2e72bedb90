"""`SteeringVector`: directions per block for one site, with where they come from."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np

from nblens.errors import FileFormatError, UserError, VectorMismatchError
from nblens.files import read_safetensors, write_safetensors
from nblens.layers import format_layers
from nblens.specs import WRITE_POSITIONS

__all__ = ["SteeringVector"]

_FORMAT = "nblens.steering_vector"
_VERSION = 1


@dataclass(frozen=True, repr=False, eq=False)
class SteeringVector:
    """A direction for every block of one site; raw, never silently normalised.

    >>> v = session.extract("cheerful", pairs)         # doctest: +SKIP
    >>> (v + 0.5 * other).normalized().save("v.safetensors")    # doctest: +SKIP

    Arithmetic returns new vectors; `v.layers` are the blocks written when nothing else is asked for.
    """

    name: str
    directions: Mapping[int, np.ndarray]
    """block → float32 (d_model,)"""
    site: str = "resid_post"
    layers: tuple[int, ...] = ()
    """blocks written by default"""
    write: str = "all"
    """positions written by default"""
    model: str = ""
    n_blocks: int = 0
    method: str = ""
    read: str = ""
    n_pairs: int = 0
    separation: Mapping[int, float] = field(default_factory=dict)
    """block → how far apart it holds the two sides of held-back pairs, in standard deviations (d′)"""
    data_hash: str = ""
    """SHA-256 of the contrast pairs' token ids"""

    def __post_init__(self) -> None:
        if not self.directions:
            raise UserError(f"steering vector {self.name!r} holds no direction")
        arrays = {int(b): np.asarray(d, dtype=np.float32) for b, d in sorted(self.directions.items())}
        if min(arrays) < 0:
            raise UserError(f"steering vector {self.name!r} has a direction for block {min(arrays)}")
        shapes = {array.shape for array in arrays.values()}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1:
            raise UserError(f"directions of {self.name!r} must be 1-D and equally long, got shapes {sorted(shapes)}")
        if broken := [block for block, array in arrays.items() if not np.isfinite(array).all()]:
            raise UserError(f"steering vector {self.name!r} is not finite at block {broken[0]}")
        object.__setattr__(self, "directions", arrays)
        object.__setattr__(self, "layers", tuple(self.layers) or tuple(arrays))
        if missing := sorted(set(self.layers) - set(arrays)):
            raise UserError(f"steering vector {self.name!r} has no direction for block {missing[0]}")

    @property
    def d_model(self) -> int:
        """Width of the directions."""
        return len(next(iter(self.directions.values())))

    @property
    def norms(self) -> dict[int, float]:
        """Euclidean norm per block."""
        return {block: float(np.linalg.norm(d)) for block, d in self.directions.items()}

    def normalized(self) -> SteeringVector:
        """The same directions with norm 1 at every block; a zero direction stays zero."""
        return self._map(lambda d: d / (np.linalg.norm(d) or 1.0))

    def at(self, layers: tuple[int, ...]) -> SteeringVector:
        """The same vector, written at other blocks by default."""
        return replace(self, layers=layers)

    def check_fits(self, *, n_blocks: int, d_model: int) -> None:
        """Raise `VectorMismatchError` unless the vector belongs to a model of this shape."""
        blocks = self.n_blocks or max(self.directions) + 1
        fits_depth = blocks == n_blocks if self.n_blocks else max(self.directions) < n_blocks
        if self.d_model != d_model or not fits_depth or max(self.directions) >= n_blocks:
            raise VectorMismatchError(
                f"steering vector {self.name!r} was made for {blocks} blocks × {self.d_model} "
                f"({self.model or 'unknown model'}); the loaded model has {n_blocks} blocks × {d_model}"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write to safetensors: `direction.{block}` float32 tensors, everything else as JSON in the header."""
        arrays = {f"direction.{block}": d for block, d in self.directions.items()}
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "directions"}
        metadata = {"format": _FORMAT, "version": str(_VERSION), "fields": json.dumps(plain)}
        return write_safetensors(path, arrays, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> SteeringVector:
        """Read a file written by `save`; `name` renames it.

        Raises
        ------
        FileFormatError
            The file is damaged, or is not a steering vector.
        """
        arrays, metadata = read_safetensors(path)
        if metadata.get("format") != _FORMAT or metadata.get("version") != str(_VERSION):
            raise FileFormatError(
                f"{path} is not a steering vector of version {_VERSION} "
                f"(format {metadata.get('format', 'none')}, version {metadata.get('version', 'none')})"
            )
        try:
            plain = json.loads(metadata["fields"])
            plain["layers"] = tuple(int(block) for block in plain["layers"])
            plain["separation"] = {int(block): float(d) for block, d in plain["separation"].items()}
            plain["name"] = name or str(plain["name"])
            plain["n_blocks"] = int(plain["n_blocks"])
            if not isinstance(plain["site"], str) or plain["write"] not in WRITE_POSITIONS:
                raise ValueError(f"site {plain['site']!r}, write {plain['write']!r}")
            directions = {int(key.removeprefix("direction.")): array for key, array in arrays.items()}
            return cls(directions=directions, **plain)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"{path} is damaged: {error}") from error

    def __mul__(self, factor: float) -> SteeringVector:
        if not math.isfinite(factor):
            raise UserError(f"cannot multiply steering vector {self.name!r} by {factor}")
        return self._map(lambda d: d * np.float32(factor))

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return self._map(np.negative)

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if self.site != other.site or set(self.directions) != set(other.directions) or self.d_model != other.d_model:
            raise VectorMismatchError(
                f"cannot add {self.name!r} ({self.site}, {len(self.directions)} blocks × {self.d_model}) and "
                f"{other.name!r} ({other.site}, {len(other.directions)} blocks × {other.d_model})"
            )
        total = {block: d + other.directions[block] for block, d in self.directions.items()}
        return replace(self, directions=total, name=f"{self.name}+{other.name}", separation={}, data_hash="")

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return replace(self + -other, name=f"{self.name}-{other.name}")

    def _map(self, function: object) -> SteeringVector:
        return replace(self, directions={block: function(d) for block, d in self.directions.items()})  # type: ignore[operator]

    def __repr__(self) -> str:
        norms = [self.norms[block] for block in self.layers]
        span = f"{min(norms):.2f}" if len(set(norms)) == 1 else f"{min(norms):.2f}-{max(norms):.2f}"
        origin = f", {self.method} of {self.n_pairs} pairs read at {self.read}" if self.method else ""
        return (
            f"SteeringVector({self.name!r}, {self.site} of block {format_layers(self.layers)}, "
            f"norm {span}{origin}, {len(self.directions)} × {self.d_model})"
        )
