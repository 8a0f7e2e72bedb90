"""`Circumstances`: what one has to know of a run, beside its model, to read its numbers and to repeat it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from nblens.layers import format_layers
from nblens.specs import RunSpec, SteeringWrite
from nblens.text import few, short_number, visible

__all__ = ["Circumstances", "SteeredBy", "circumstances_of", "live_name"]

_LIVE = "live:"
_SHORT_REVISION = 7  # characters of a commit that tell it from others
_USUAL = ("add", "all", "resid_post")


@dataclass(frozen=True)
class SteeredBy:
    """One vector as it was written when a run began.

    >>> out = session.generate("The summer was", 2, steer={"cheerful": 1.5})
    >>> [str(steered) for steered in out.circumstances.steering]
    ['cheerful=1.5 at block 6']
    """

    name: str
    coefficient: float
    layers: tuple[int, ...]
    """blocks that were written"""
    site: str = "resid_post"
    op: str = "add"
    write: str = "all"

    def __str__(self) -> str:
        blocks = "block" if len(self.layers) == 1 else "blocks"
        special = [value for value in (self.op, self.write, self.site) if value not in _USUAL]
        more = f" ({', '.join(special)})" if special else ""
        return f"{self.name}={short_number(self.coefficient)} at {blocks} {format_layers(self.layers)}{more}"


@dataclass(frozen=True)
class Circumstances:
    """Under what a run was read, beside model, site and lens; the live setting of `session.steer` counts.

    >>> session.lens("The summer was", steer={"cheerful": 1.5}).circumstances.facts
    ('float32', 'steered: cheerful=1.5 at block 6')
    """

    revision: str = ""
    """commit of the model's files; empty where none is known"""
    dtype: str = ""
    steering: tuple[SteeredBy, ...] = ()
    """what steered when the run began"""
    template: str = ""
    """what was done with the chat template: "chat template", with its options; empty: none was used"""
    temperature: float = 0.0
    seed: int | None = None
    """of sampling; None where nothing was sampled"""
    targets: tuple[str, ...] = ()
    """texts of the tokens that the lens was asked to follow"""

    @property
    def facts(self) -> tuple[str, ...]:
        """Each in a few words, for a caption; what is as usual is left out, but for the dtype."""
        facts = [f"revision {self.revision[:_SHORT_REVISION]}" if self.revision else "", self.dtype, self.template]
        if self.steering:
            facts.append(f"steered: {', '.join(map(str, self.steering))}")
        if self.seed is not None:
            facts.append(f"temperature {short_number(self.temperature)}, seed {self.seed}")
        if self.targets:
            facts.append(f"following {few(map(visible, self.targets))}")
        return tuple(filter(None, facts))

    def as_plain(self) -> dict[str, Any]:
        """As what JSON knows; see `of_plain`."""
        return asdict(self)

    @classmethod
    def of_plain(cls, plain: Mapping[str, Any]) -> Self:
        """Read what `as_plain` gave; raises `TypeError` or `ValueError` where it is something else."""
        steering = tuple(_read_steered_by(**one) for one in plain.get("steering", ()))
        read = cls(**{**plain, "steering": steering, "targets": tuple(plain.get("targets", ()))})
        for name in ("revision", "dtype", "template"):
            if not isinstance(getattr(read, name), str):
                raise ValueError(f"{name} must be text, got {getattr(read, name)!r}")
        if read.seed is not None and not isinstance(read.seed, int):
            raise ValueError(f"seed must be a whole number, got {read.seed!r}")
        _ = read.facts  # what cannot be told is no circumstance
        return read


def circumstances_of(origin: Circumstances, spec: RunSpec, row: int) -> Circumstances:
    """A model's own circumstances, with what a run does to one of its rows."""
    sampled = spec.generation if spec.generation and spec.generation.temperature > 0 else None
    strengths = [(write, write.coefficients[row]) for write in spec.steering]
    return replace(
        origin,
        steering=tuple(_steered_by(write, strength) for write, strength in strengths if strength is not None),
        template=spec.templates[row] if spec.templates else "",
        temperature=sampled.temperature if sampled else 0.0,
        seed=sampled.seeds[row] if sampled else None,
    )


def live_name(key: str) -> str:
    """What `session.steer` changes is called so in a run, apart from vectors that a call names itself."""
    return f"{_LIVE}{key}"


def _steered_by(write: SteeringWrite, coefficient: float) -> SteeredBy:
    name = write.name.removeprefix(_LIVE).partition(":")[0]  # a vector's name holds no colon, a `Steer.key` does
    blocks = tuple(sorted(write.directions))
    return SteeredBy(name, float(coefficient), blocks, write.site, write.op, write.write)


def _read_steered_by(name: str, coefficient: float, layers: list[int], **more: str) -> SteeredBy:
    return SteeredBy(str(name), float(coefficient), tuple(int(block) for block in layers), **more)
