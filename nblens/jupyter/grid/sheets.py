"""What a grid shows, from the objects that it is made of: named sites, each with one trajectory or two to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nblens.errors import UserError
from nblens.layers import parse_layers
from nblens.lens.by_site import SiteTrajectories
from nblens.lens.difference import Comparison, TrajectoryDiff
from nblens.lens.trajectory import Trajectory

__all__ = ["BASE", "DIFFERENCE", "STEERED", "Site", "joined", "read_sites", "shown_object"]

BASE, STEERED, DIFFERENCE = "base", "steered", "difference"
_PER_CELL = ("top_ids", "top_logprobs", "entropy", "kl_to_final", "next_logprob", "next_rank")
_PER_TARGET = ("target_logprobs", "target_ranks")


@dataclass(frozen=True)
class Site:
    """One grid among which the reader can switch: a trajectory, or two of the same prompt."""

    name: str
    base: Trajectory
    steered: Trajectory | None = None

    @property
    def trajectories(self) -> dict[str, Trajectory]:
        """By view, without the difference, which is drawn from both."""
        return {BASE: self.base} if self.steered is None else {BASE: self.base, STEERED: self.steered}

    @property
    def views(self) -> tuple[str, ...]:
        """What can be looked at."""
        return (BASE,) if self.steered is None else (BASE, STEERED, DIFFERENCE)

    @property
    def n_shared(self) -> int:
        """Tokens over which the two can be compared."""
        return self.base.n_tokens if self.steered is None else self.base.diff(self.steered).base.n_tokens


def read_sites(objects: tuple[Any, ...], layers: Any = None) -> tuple[Site, ...]:
    """Sites of one object or several, by their names; `layers` leaves out the other blocks.

    Raises
    ------
    UserError
        There is nothing to show, or something that is no trajectory.
    """
    sites: dict[str, Site] = {}
    for obj in objects:
        for name, one in obj.items() if isinstance(obj, Mapping) else [("", obj)]:
            site = _site(str(name), one, layers)
            unique = site.name
            while unique in sites:
                unique = f"{site.name} ({len(sites) + 1})"
            sites[unique] = replace(site, name=unique)
    if not sites:
        raise UserError("there is nothing to show; give a trajectory, a comparison or several of them")
    return tuple(sites.values())


def _site(name: str, obj: Any, layers: Any) -> Site:
    if isinstance(obj, Trajectory):
        one, other = obj, None
    elif isinstance(obj, Comparison):
        one, other = obj.base, obj.steered
    elif isinstance(obj, TrajectoryDiff):
        one, other = obj.base, obj.other
    else:
        raise UserError(f"a grid shows trajectories, comparisons and differences, not {type(obj).__name__}")
    if layers is not None:
        one, other = _at_layers(one, layers), None if other is None else _at_layers(other, layers)
    if other is not None and (one.layers != other.layers or one.top_ids.shape[-1] != other.top_ids.shape[-1]):
        raise UserError("the two sides of a comparison were read at different layers or with different top_k")
    return Site(name or one.site, one, other)


def _at_layers(trajectory: Trajectory, layers: Any) -> Trajectory:
    wanted = parse_layers(layers, trajectory.n_blocks)
    rows = [row for row, layer in enumerate(trajectory.layers) if layer in wanted]
    if not rows:
        raise UserError(f"layers {layers!r} were not read; the trajectory holds {list(trajectory.layers)}")
    cut = {name: getattr(trajectory, name)[rows] for name in (*_PER_CELL, *_PER_TARGET)}
    return replace(trajectory, layers=tuple(trajectory.layers[row] for row in rows), **cut)


def joined(one: Trajectory, more: Trajectory) -> Trajectory:
    """A trajectory and the tokens after it as one.

    What follows the last token of `one` is now known; its rank and probability are taken from the top k, and stay
    unknown where it is not among them.

    Raises
    ------
    UserError
        The two were read differently.
    """
    same = ("layers", "site", "n_blocks")
    if any(getattr(one, name) != getattr(more, name) for name in same) or (
        one.top_ids.shape[-1] != more.top_ids.shape[-1] or not np.array_equal(one.target_ids, more.target_ids)
    ):
        raise UserError(f"cannot append {more!r} to {one!r}: other layers, site, targets or top_k")
    if not more.n_tokens:
        return one
    one = _followed_by(one, int(more.token_ids[0])) if one.n_tokens else one
    arrays: dict[str, Any] = {
        name: np.concatenate([getattr(one, name), getattr(more, name)]) for name in ("token_ids", "next_ids")
    }
    arrays |= {
        name: np.concatenate([getattr(one, name), getattr(more, name)], axis=1) for name in (*_PER_CELL, *_PER_TARGET)
    }
    return replace(
        one,
        tokens=one.tokens + more.tokens,
        vocabulary={**one.vocabulary, **more.vocabulary},
        prompt_length=one.prompt_length if one.prompt_length < one.n_tokens else one.n_tokens + more.prompt_length,
        **arrays,
    )


def _followed_by(trajectory: Trajectory, token_id: int) -> Trajectory:
    """The trajectory with what follows its last token filled in, if that was not known."""
    if trajectory.next_ids[-1] == token_id:
        return trajectory
    next_ids, rank, logprob = (getattr(trajectory, n).copy() for n in ("next_ids", "next_rank", "next_logprob"))
    here = trajectory.top_ids[:, -1] == token_id
    found = here.any(-1)
    place = here.argmax(-1)
    next_ids[-1] = token_id
    rank[:, -1] = np.where(found, place + 1, -1)
    values = np.take_along_axis(trajectory.top_logprobs[:, -1], place[:, None], -1)[:, 0]
    logprob[:, -1] = np.where(found, values, np.nan)
    return replace(trajectory, next_ids=next_ids, next_rank=rank, next_logprob=logprob)


def shown_object(sites: tuple[Site, ...]) -> Any:
    """What the rest of nblens draws for the same: a trajectory, a comparison, or trajectories by name."""
    if len(sites) == 1:
        (site,) = sites
        return site.base if site.steered is None else Comparison(site.base, site.steered)
    plain = {
        f"{site.name} {view}" if site.steered else site.name: trajectory
        for site in sites
        for view, trajectory in site.trajectories.items()
    }
    return SiteTrajectories(plain)
