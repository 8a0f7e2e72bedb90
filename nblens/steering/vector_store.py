"""`VectorStore`: the steering vectors of a session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import replace

from nblens.errors import UserError
from nblens.layers import format_layers, parse_layers
from nblens.model.sites import check_site
from nblens.specs import SteeringWrite
from nblens.steering.steer import Steer, check_coefficient
from nblens.steering.vectors import SteeringVector

__all__ = ["Steering", "VectorStore", "check_name", "check_op"]

Steering = Mapping[str, float] | Iterable[Steer] | None
"""None: the live setting; a dict of name → coefficient; or `Steer` values."""

_MOST = 10_000  # of these


class VectorStore(MutableMapping[str, SteeringVector]):
    """The steering vectors of a session, by name; only those that fit its model.

    >>> session.vectors["gloomy"] = -session.vectors["cheerful"]
    >>> list(session.vectors)
    ['cheerful', 'gloomy']
    """

    def __init__(self, n_blocks: int, d_model: int) -> None:
        self._n_blocks, self._d_model = n_blocks, d_model
        self._vectors: dict[str, SteeringVector] = {}

    def __getitem__(self, name: str) -> SteeringVector:
        try:
            return self._vectors[name]
        except KeyError:
            known = ", ".join(sorted(self._vectors))
            hint = f"one of {known}" if known else "there is none yet: make one with %%steer or session.extract"
            raise UserError(f"steering vector {name!r} is unknown; {hint}") from None

    def __setitem__(self, name: str, vector: SteeringVector) -> None:
        check_name(name)
        if not isinstance(vector, SteeringVector):
            raise UserError(f"{name!r} must be a SteeringVector, got {type(vector).__name__}")
        check_site(vector.site)
        vector.check_fits(n_blocks=self._n_blocks, d_model=self._d_model)
        self._vectors[name] = replace(vector, name=name)

    def __delitem__(self, name: str) -> None:
        del self._vectors[self[name].name]

    def __contains__(self, name: object) -> bool:
        return name in self._vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._vectors.values())) or "no steering vectors"

    def steers(self, steer: Mapping[str, float] | Iterable[Steer]) -> list[Steer]:
        """Read a setting: unknown names and coefficients that are not finite are refused."""
        if isinstance(steer, Mapping):
            return [self.usual(name, coefficient) for name, coefficient in steer.items()]
        steers = []
        for item in steer if isinstance(steer, Iterable) else [steer]:
            if not isinstance(item, Steer):
                raise UserError(f"steer takes {{name: coefficient}} or nblens.Steer values, got {item!r}")
            self[item.name]
            steers.append(item)
            if len(steers) > _MOST:
                raise UserError(f"steer must be a list that ends; {steer!r:.80} has more than {_MOST:,} values")
        return steers

    def write(self, steer: Steer, coefficients: tuple[float | None, ...], *, has_labels: bool = False) -> SteeringWrite:
        """Resolve a `Steer` to directions by block, with a coefficient for each row (None: not steered).

        Only answers that are scored have labels to write at.
        """
        vector = self[steer.name]
        if steer.write == "label" and not has_labels:
            raise UserError(
                f"{steer.name!r} is written at 'label', the token from which an answer's label is predicted: only "
                "scored answers have one; give write='last' for the prompt's last token"
            )
        blocks = vector.layers if steer.layers is None else parse_layers(steer.layers, self._n_blocks)
        if missing := [block for block in blocks if block not in vector.directions]:
            raise UserError(
                f"steering vector {steer.name!r} has no direction for block {missing[0]}; "
                f"it has {format_layers(sorted(vector.directions))}"
            )
        directions = {block: vector.directions[block] for block in blocks}
        check_op(steer.name, vector.site, steer.op)
        return SteeringWrite(steer.name, vector.site, directions, coefficients, steer.write, steer.op)

    def usual(self, name: str, coefficient: float = 1.0) -> Steer:
        """The vector as it is written where nothing else is asked for."""
        return Steer(name, check_coefficient(name, coefficient), write=self[name].write, op=self[name].op)


def check_op(name: str, site: str, op: str) -> None:
    """Raise `UserError` where a site cannot be written in this way."""
    if op != "add" and site == "resid_mid":
        raise UserError(
            f"{name!r} cannot {op} at resid_mid: a vector there is added to what attention returns; "
            "use resid_pre or resid_post"
        )


def check_name(name: str) -> None:
    """Raise `UserError` unless the name can stand in `name=1.5`."""
    if not isinstance(name, str) or not name or not all(c.isalnum() or c in "_-." for c in name):
        raise UserError(f"a vector's name is letters, digits, '_', '-' or '.'; got {name!r}")
