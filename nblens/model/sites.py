"""Names of sites, and where in a block each one is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from torch import nn

from nblens.errors import UserError
from nblens.model.architecture import Architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from nblens.model.pipeline import Stage

__all__ = ["INNER_SITES", "SITES", "BlockSites", "SiteLocation", "SiteMap", "check_site"]

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


class SiteMap:
    """Finds sites; those inside the blocks at first use, with one tiny forward pass."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model, self._architecture = model, architecture
        self._blocks: list[BlockSites] | None = None

    def locate(self, site: str, block: int) -> SiteLocation:
        """Where to hook a site of one block.

        Raises
        ------
        UserError
            The site is unknown, or this block has none.
        """
        module = self._architecture.blocks[block]
        if check_site(site) and not self._architecture.has(block):
            self._check_missing(site, block)
            return SiteLocation(module)  # something of the right shape, in whose place that process puts what it has
        if check_site(site) == "resid_pre":
            return SiteLocation(module, "input")
        if site == "resid_post":
            return SiteLocation(module, "output")
        self._check_missing(site, block)
        return self.blocks[block].found[site]

    def _check_missing(self, site: str, block: int) -> None:
        if site in INNER_SITES and site in self.blocks[block].missing:
            reason = self.blocks[block].missing[site]
            raise UserError(f"block {block} of this {self._architecture.family} model has no {site}: {reason}")

    def check_additive(self) -> None:
        """Raise `UserError` unless every block adds its attention's and its MLP's output to the stream as they are."""
        for block, sites in enumerate(self.blocks):
            if sites.normed:
                raise UserError(
                    f"block {block} of this {self._architecture.family} model norms the stream after each addition: "
                    "its logits are no sum of what the blocks add"
                )

    @property
    def blocks(self) -> list[BlockSites]:
        """The inner sites of every block."""
        if self._blocks is None:
            from nblens.model.block_anatomy import find_inner_sites

            self._blocks = find_inner_sites(self._model, self._architecture)
            if stage := self._architecture.stage:
                self._blocks = _of_all_stages(self._blocks, stage)
        return self._blocks


def _of_all_stages(blocks: list[BlockSites], stage: Stage) -> list[BlockSites]:
    """What is missing in each block, by the process that runs it."""
    known = {block: replace(blocks[block], found={}) for block in stage.blocks}
    everywhere = {block: sites for part in stage.gather(known) for block, sites in part.items()}
    return [blocks[block] if block in stage.blocks else everywhere[block] for block in range(len(blocks))]


def check_site(site: str) -> str:
    """Return the site's name, or raise `UserError` when it is unknown."""
    if site not in SITES:
        raise UserError(f"site {site!r} is unknown; one of {', '.join(SITES)}")
    return site
