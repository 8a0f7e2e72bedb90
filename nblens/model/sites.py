"""Names of sites, and where in a block each one is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from nblens.errors import UserError
from nblens.model.architecture import Architecture

__all__ = ["SITES", "SiteLocation", "check_site", "locate"]

SITES = {
    "resid_pre": "the residual stream entering the block",
    "resid_post": "the residual stream leaving the block",
}
"""TransformerLens' names. Sites inside a block are added by giving `locate` their place."""


@dataclass(frozen=True)
class SiteLocation:
    """The module whose input or output a site is."""

    module: nn.Module
    end: Literal["input", "output"]


def check_site(site: str) -> str:
    """Return the site's name, or raise `UserError` when it is unknown."""
    if site not in SITES:
        raise UserError(f"site {site!r} is unknown; one of {', '.join(SITES)}")
    return site


def locate(architecture: Architecture, site: str, block: int) -> SiteLocation:
    """Where to hook a site of one block."""
    end: Literal["input", "output"] = "input" if check_site(site) == "resid_pre" else "output"
    return SiteLocation(architecture.blocks[block], end)
