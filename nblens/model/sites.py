"""Names of sites, and where in a block each one is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from nblens.errors import UserError, shown

if TYPE_CHECKING:
    from torch import nn

__all__ = ["INNER_SITES", "SITES", "BlockSites", "SiteLocation", "check_site"]

SITES = {
    "resid_pre": "the residual stream entering the block",
    "ln1_out": "output of the norm before attention",
    "attn_out": "what attention adds to the residual stream",
    "resid_mid": "the residual stream between attention and MLP",
    "ln2_out": "output of the norm before the MLP",
    "mlp_out": "what the MLP adds to the residual stream",
    "resid_post": "the residual stream leaving the block",
}
"""TransformerLens' names, in the order in which a sequential block passes them."""
INNER_SITES = tuple(site for site in SITES if site not in ("resid_pre", "resid_post"))


@dataclass(frozen=True)
class SiteLocation:
    """The module whose input or output a site is."""

    module: nn.Module
    end: Literal["input", "output"] = "output"
    scale: float = 1.0
    """what the block multiplies it with before adding it to the residual stream (granite's residual_multiplier)"""
    flat: bool = False
    """it has shape (rows · width, d_model)"""
    written_at: SiteLocation | None = None
    """where a vector is added to change the site, when changing this very tensor would not: a norm reads a copy of the
    residual stream"""


@dataclass(frozen=True)
class BlockSites:
    """Where the inner sites of one block are, and why some are not there."""

    found: dict[str, SiteLocation] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    """site → reason"""
    normed: bool = False
    """a norm lies over each sum, so that contributions do not add up beyond the block"""


def check_site(site: str) -> str:
    """Return the site's name, or raise `UserError` when it is unknown."""
    if site not in SITES:
        raise UserError(f"site {shown(site)} is unknown; one of {', '.join(SITES)}")
    return site
