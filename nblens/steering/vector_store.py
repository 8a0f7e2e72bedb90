"""`VectorStore`: the steering vectors of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice

from nblens.errors import UnknownNameError, UserError, shown
from nblens.layers import format_layers, parse_layers
from nblens.model.sites import check_site
from nblens.specs import SteeringWrite
from nblens.steering.steer import Steer
from nblens.steering.vectors import SteeringVector
from nblens.stores import NamedStore

__all__ = ["OneSetting", "Steering", "VectorStore", "check_name", "check_op", "setting_for_each"]

OneSetting = Mapping[str, float] | Iterable[Steer] | None
"""None: the live setting; a dict of name → coefficient; or `Steer` values."""

Steering = OneSetting | Sequence[OneSetting]
"""One setting, or a list with one for each prompt."""

_MOST = 10_000  # of these


class VectorStore(NamedStore[SteeringVector]):
    """The steering vectors of a session, by name; only those that fit its model.

    >>> session.vectors["gloomy"] = -session.vectors["cheerful"]
    >>> list(session.vectors)
    ['cheerful', 'gloomy']

    A vector that is deleted steers no more; one that is put in the place of another steers as that one did.
    """

    def __init__(self, n_blocks: int, d_model: int) -> None:
        super().__init__()
        self._n_blocks, self._d_model = n_blocks, d_model
        self.on_removal: Callable[[str], object] = lambda name: None
        """is told the name of a vector that was deleted"""

    def _unknown(self, name: object) -> UnknownNameError:
        known = ", ".join(sorted(self))
        hint = f"one of {known}" if known else "there is none yet: make one with %%steer or session.extract"
        return UnknownNameError(f"steering vector {name!r} is unknown; {hint}")

    def __setitem__(self, name: str, vector: SteeringVector) -> None:
        check_name(name)
        if not isinstance(vector, SteeringVector):
            raise UserError(f"{name!r} must be a SteeringVector, got {type(vector).__name__}")
        check_site(vector.site)
        vector.check_fits(n_blocks=self._n_blocks, d_model=self._d_model)
        self._put(name, replace(vector, name=name))

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.on_removal(name)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.values())) or "no steering vectors"

    def snapshot(self) -> VectorStore:
        """Return the vectors as they are now: what other threads add or delete changes nothing in it."""
        taken = VectorStore(self._n_blocks, self._d_model)
        taken._values = self._values
        return taken

    def steers(self, steer: Mapping[str, float] | Iterable[Steer]) -> list[Steer]:
        """Read a setting: unknown names and coefficients that are not finite are refused."""
        if isinstance(steer, Mapping):
            steers = [Steer(name, coefficient) for name, coefficient in steer.items()]
        else:
            steers = list(islice(steer if isinstance(steer, Iterable) else [steer], _MOST + 1))
        if len(steers) > _MOST:
            raise UserError(f"steer must be a list that ends; {shown(steer)} has more than {_MOST:,} values")
        for item in steers:
            if not isinstance(item, Steer):
                raise UserError(f"steer takes {{name: coefficient}} or nblens.Steer values, got {shown(item)}")
            self[item.name]
        return steers

    def write(self, steer: Steer, coefficients: tuple[float | None, ...], *, has_labels: bool = False) -> SteeringWrite:
        """Resolve a `Steer` to directions by block, with a coefficient for each row (None: not steered).

        Only answers that are scored have labels to write at.
        """
        vector, (positions, op) = self[steer.name], self.way(steer)
        if positions == "label" and not has_labels:
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
        check_op(steer.name, vector.site, op)
        return SteeringWrite(steer.name, vector.site, directions, coefficients, positions, op)

    def way(self, steer: Steer) -> tuple[str, str]:
        """At which positions and by which operation a vector is written: as the `Steer` says, else the vector's own."""
        vector = self[steer.name]
        return steer.write or vector.write, steer.op or vector.op

    def resolved(self, steer: Steer) -> Steer:
        """Put the vector's own positions and operation where none are given."""
        write, op = self.way(steer)
        return replace(steer, write=write, op=op)


def setting_for_each(steer: Steering) -> Sequence[OneSetting] | None:
    """The settings where there is one for each prompt: a list in which one is a dict, a list, or None; else None."""
    if isinstance(steer, (list, tuple)) and any(one is None or isinstance(one, (Mapping, list)) for one in steer):
        return steer
    return None


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
