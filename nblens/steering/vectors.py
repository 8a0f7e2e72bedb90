"""`SteeringVector`: directions per block for one site, with where they come from."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from nblens.errors import UserError, VectorMismatchError, escaped, shown
from nblens.layers import format_layers, parse_layers
from nblens.records import RecordFormat, sound_content
from nblens.steering.read_positions import read_words
from nblens.steering.steer import STEER_OPS, check_write
from nblens.text import short_number

__all__ = ["SteeringVector"]

_FORMAT = RecordFormat("nblens.steering_vector", 1, "a steering vector", most_bytes=2**30)


@dataclass(frozen=True, repr=False, eq=False)
class SteeringVector:
    """A direction for every block of one site; raw, never silently normalised.

    >>> vector = session.vectors["cheerful"]  # of session.extract("cheerful", pairs)
    >>> vector.layers, vector.site
    ((6,), 'resid_post')
    >>> half = (0.5 * vector).at((5, 6))
    >>> nblens.SteeringVector.load(half.save("half.safetensors")).norms == half.norms
    True

    Arithmetic returns new vectors; `v.layers` are the blocks written when nothing else is asked for. What was measured
    follows the directions: `kl_range` of `0.5 * v` is twice as wide, in `-v` its ends and the sign of `separation`
    change, and what holds of `v` alone is not said of a sum.
    """

    name: str
    directions: Mapping[int, np.ndarray]
    """block → float32 (d_model,)"""
    site: str = "resid_post"
    layers: tuple[int, ...] = ()
    """blocks written by default"""
    write: str = "all"
    """positions written by default"""
    op: str = "add"
    """operation by default"""
    model: str = ""
    n_blocks: int = 0
    method: str = ""
    read: str = ""
    n_pairs: int = 0
    separation: Mapping[int, float] = field(default_factory=dict)
    """block → how far apart it holds the two sides of pairs that the direction has not seen: the mean of their
    differences in standard deviations; empty where there were too few pairs"""
    separation_interval: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """block → its 95 % confidence interval"""
    data_hash: str = ""
    """SHA-256 of the contrast pairs' token ids"""
    activation_norms: Mapping[int, float] = field(default_factory=dict)
    """block → mean Euclidean norm of a token's unsteered activation where it was read, over both sides"""
    kl_range: tuple[float, float] | None = None
    """coefficients that stay within the KL budget of the last `session.steerability`, written as by default"""

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
        object.__setattr__(self, "write", check_write(self.write))
        if self.op not in STEER_OPS:
            raise UserError(f"steering operation {self.op!r} is unknown; one of {', '.join(STEER_OPS)}")
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
        return {block: _norm(d) for block, d in self.directions.items()}

    def separation_words(self, block: int) -> str:
        """The separation at a block with its interval: "2.8 (95% CI 0.9 to 4.7)"; empty where it was not judged."""
        if block not in self.separation:
            return ""
        distance = short_number(round(self.separation[block], 2))
        if block not in self.separation_interval:
            return distance
        low, high = (short_number(round(end, 2)) for end in self.separation_interval[block])
        return f"{distance} (95% CI {low} to {high})"

    def normalized(self) -> SteeringVector:
        """Return the same directions with norm 1 at every block; a zero direction stays zero.

        `kl_range` is kept where the blocks that are written by default had one norm.
        """
        norms = {self.norms[block] for block in self.layers} - {0.0}
        kept = self._kl_range_times(norms.pop()) if len(norms) == 1 or self._is_any_length else None
        return replace(self._map(lambda d: d / (_norm(d) or 1.0)), kl_range=kept)

    def at(self, layers: tuple[int, ...]) -> SteeringVector:
        """Return the same vector, written at other blocks by default; `kl_range` is that of the blocks before."""
        moved = replace(self, layers=layers)
        return moved if set(moved.layers) == set(self.layers) else replace(moved, kl_range=None)

    def written(self, site: str | None, layers: Any, write: Any, op: str | None) -> SteeringVector:
        """Return the same vector, written otherwise by default; itself where it is written so already.

        Parameters
        ----------
        site : str, optional
            Its own, or None.
        layers, write, op
            As in `nblens.Steer`. None: its own.

        Raises
        ------
        UserError
            A site that is not its own, a block that it has no direction for, or no such position or operation.
        """
        if site not in (None, self.site):
            raise UserError(
                f"steering vector {self.name!r} is of {self.site}, got site {shown(site)}; a vector of another site is "
                "made with extract(…, site=…)"
            )
        blocks = self.layers if layers is None else parse_layers(layers, self.n_blocks or max(self.directions) + 1)
        moved = replace(self.at(blocks), write=self.write if write is None else write, op=op or self.op)
        same = (moved.layers, moved.write, moved.op) == (self.layers, self.write, self.op)
        return self if same else replace(moved, kl_range=None)

    def is_like(self, other: SteeringVector) -> bool:
        """Tell whether another one has the same directions and is written in the same way; `kl_range` may differ."""
        if self.directions.keys() != other.directions.keys() or self.d_model != other.d_model:
            return False
        if any((direction != other.directions[block]).any() for block, direction in self.directions.items()):
            return False
        mine, others = self._plain(), other._plain()
        return all(mine[what] == others[what] for what in mine if what != "kl_range")

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
        """Write to safetensors: `direction.{block}` float32 tensors, everything else as JSON in the header.

        A name that ends in `.gguf` is written by `to_gguf`.
        """
        if _is_gguf(path):
            return self.to_gguf(path)
        arrays = {f"direction.{block}": d for block, d in self.directions.items()}
        return _FORMAT.save(path, self._plain(), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], name: str | None = None) -> SteeringVector:
        """Read a file written by `save`; `name` renames it. A name that ends in `.gguf` is read by `from_gguf`.

        Raises
        ------
        FileFormatError
            The file is damaged, or is not a steering vector.
        """
        if _is_gguf(path):
            return cls.from_gguf(path, name)
        plain, arrays = _FORMAT.load(path)
        with sound_content(path):
            directions = {int(key.removeprefix("direction.")): array for key, array in arrays.items()}
            return cls._from_plain(directions, plain, name)

    def to_gguf(self, path: str | os.PathLike[str], *, model_hint: str | None = None) -> Path:
        """Write a control vector for llama.cpp (`--control-vector FILE`) and repeng.

        >>> session.vectors["cheerful"].at((3, 4)).to_gguf("cheerful.gguf", model_hint="llama").name
        'cheerful.gguf'

        The blocks of `layers` are written, `direction.{block}` for the output of that block at coefficient 1, and
        every other field for `from_gguf`. A vector that such a file cannot describe is refused.

        Parameters
        ----------
        path : str or os.PathLike
            A name that ends in `.gguf`.
        model_hint : str, optional
            Family of the model, which llama.cpp ignores and repeng compares; else the `model_type` of `model` where
            its config is on this machine, else `model`.

        Raises
        ------
        UserError
            The vector is for another site than `resid_post`, for some tokens only, or for block 0; or the `gguf`
            package is not installed.
        """
        from nblens.steering.gguf_file import ControlVector, model_family, write_control_vector

        unlike = {
            f"at {self.site}, a control vector at resid_post": self.site != "resid_post",
            f"to {self.write} tokens, a control vector to all": self.write != "all",
            f"by {self.op!r}, a control vector by plain addition": self.op != "add",
            "at block 0, where llama.cpp takes none: choose blocks with .at((1, …))": 0 in self.layers,
        }
        if reason := next((reason for reason, holds in unlike.items() if holds), None):
            raise UserError(f"cannot write {path}: {self.name!r} is added {reason}; .safetensors takes any vector")
        directions = {block: self.directions[block] for block in self.layers}
        hint = model_hint or model_family(self.model)
        return write_control_vector(path, ControlVector(directions, hint, self._plain()))

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], name: str | None = None) -> SteeringVector:
        """Read a control vector, written by `to_gguf`, by repeng's `export_gguf` or by llama.cpp; `name` renames it.

        >>> path = session.vectors["cheerful"].to_gguf("cheerful.gguf")
        >>> nblens.SteeringVector.from_gguf(path).norms.keys()
        dict_keys([6])

        One from elsewhere is named after its file, and written at `resid_post` of every block that it has, to all
        tokens. Its `model` is the file's `model_hint`.

        Raises
        ------
        UserError
            The file cannot be opened, or the `gguf` package is not installed.
        FileFormatError
            The file is damaged, or is no control vector.
        """
        from nblens.steering.gguf_file import read_control_vector

        file = read_control_vector(path)
        with sound_content(path):
            if file.fields is None:
                stem = re.sub(r"[^\w.-]", "_", Path(path).stem)
                return cls(name or stem, file.directions, model=file.model_hint)
            vector = cls._from_plain(file.directions, file.fields, name)
            if (vector.site, vector.write, vector.op) != ("resid_post", "all", "add"):
                raise ValueError(f"site {vector.site!r}, write {vector.write!r}, operation {vector.op!r}")
            return vector

    def _plain(self) -> dict[str, Any]:
        """All but the directions."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "directions"}

    @classmethod
    def _from_plain(
        cls, directions: Mapping[int, np.ndarray], plain: Mapping[str, Any], name: str | None
    ) -> SteeringVector:
        ends = plain.get("kl_range")
        ends = None if ends is None else _ends("kl_range", ends)
        plain = {**plain, "name": name or plain["name"], "kl_range": ends}
        for what in ("name", "site", "write", "op", "model", "method", "read", "data_hash"):
            if not isinstance(plain.get(what, ""), str):
                raise ValueError(f"{what} {shown(plain[what])} is no text")
        for what in ("n_blocks", "n_pairs"):
            plain[what] = _count(what, plain.get(what, 0))
        plain["layers"] = tuple(_count("layers", block) for block in plain["layers"])
        for what, by_block in (
            ("separation", plain["separation"]),
            ("activation_norms", plain.get("activation_norms", {})),
        ):
            plain[what] = {int(block): _number(what, value) for block, value in by_block.items()}
        intervals = plain.get("separation_interval", {})
        plain["separation_interval"] = {int(block): _ends("separation_interval", i) for block, i in intervals.items()}
        return cls(directions=directions, **plain)

    def __mul__(self, factor: float) -> SteeringVector:
        if not math.isfinite(factor):
            raise UserError(f"cannot multiply steering vector {self.name!r} by {factor}")
        scaled, sign = self._map(lambda d: d * np.float32(factor)), float(np.sign(np.float32(factor)))
        if not sign:
            return replace(scaled, separation={}, separation_interval={}, kl_range=None)
        return replace(
            scaled,
            separation={block: sign * distance for block, distance in self.separation.items()},
            separation_interval={block: _times(sign, ends) for block, ends in self.separation_interval.items()},
            kl_range=self._kl_range_times(1 / factor),
        )

    __rmul__ = __mul__

    def __neg__(self) -> SteeringVector:
        return -1 * self

    def __add__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        if self.site != other.site or set(self.directions) != set(other.directions) or self.d_model != other.d_model:
            raise VectorMismatchError(
                f"cannot add {self.name!r} ({self.site}, {len(self.directions)} blocks × {self.d_model}) and "
                f"{other.name!r} ({other.site}, {len(other.directions)} blocks × {other.d_model})"
            )
        # how it is written is the first one's; what was found out about either is not known of the sum
        return SteeringVector(
            f"{self.name}+{other.name}",
            {block: d + other.directions[block] for block, d in self.directions.items()},
            site=self.site,
            layers=self.layers,
            write=self.write,
            op=self.op,
            model=self.model if self.model == other.model else "",
            n_blocks=self.n_blocks or other.n_blocks,
            activation_norms=dict(sorted(self.activation_norms.items() & other.activation_norms.items())),
        )

    def __sub__(self, other: SteeringVector) -> SteeringVector:
        if not isinstance(other, SteeringVector):
            return NotImplemented
        return replace(self + -other, name=f"{self.name}-{other.name}")

    @property
    def _is_any_length(self) -> bool:
        """Whether coefficients mean the same at every length and sign: of an ablation only the axis counts."""
        return self.op == "ablate"

    def _kl_range_times(self, factor: float) -> tuple[float, float] | None:
        """The range of a vector that needs so many times the coefficient for the same effect."""
        if self.kl_range is None or self._is_any_length:
            return self.kl_range
        ends = _times(factor, self.kl_range)
        return ends if all(map(math.isfinite, ends)) else None

    def _map(self, function: Callable[[np.ndarray], np.ndarray]) -> SteeringVector:
        return replace(self, directions={block: function(d) for block, d in self.directions.items()})

    def __repr__(self) -> str:
        norms = [self.norms[block] for block in self.layers]
        span = f"{min(norms):.2f}" if len(set(norms)) == 1 else f"{min(norms):.2f}-{max(norms):.2f}"
        judged = [(self.separation[b], b) for b in self.layers if b in self.separation_interval]
        apart = f", separation {self.separation_words(max(judged)[1])}" if judged else ""
        origin = (
            f", {self.method} of {self.n_pairs} {'pair' if self.n_pairs == 1 else 'pairs'} "
            f"read at {read_words(self.read)}"
            if self.method
            else ""
        )
        return escaped(
            f"SteeringVector({self.name!r}, {self.site} of block {format_layers(self.layers)}, "
            f"norm {span}{apart}{origin}, {len(self.directions)} × {self.d_model})"
        )


def _norm(direction: np.ndarray) -> float:
    # in float32 the squares of a direction that fits would not
    return float(np.linalg.norm(direction.astype(np.float64)))


def _is_gguf(path: str | os.PathLike[str]) -> bool:
    return Path(path).suffix.lower() == ".gguf"


def _times(factor: float, ends: tuple[float, float]) -> tuple[float, float]:
    low, high = sorted(end * factor for end in ends)
    return low, high


def _count(what: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{what} {shown(value)} is no whole number from 0 up")
    return value


def _number(what: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ValueError(f"{what} {shown(value)} is no finite number")
    return float(value)


def _ends(what: str, ends: Any) -> tuple[float, float]:
    low, high = (_number(what, end) for end in ends)
    if low > high:
        raise ValueError(f"{what} ends before it begins: {low}, {high}")
    return low, high
