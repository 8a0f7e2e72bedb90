"""`SiteMap`: where the sites of a model's blocks are."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from nblens.errors import UserError
from nblens.model.architecture import Architecture
from nblens.model.block_anatomy import find_inner_sites
from nblens.model.sites import INNER_SITES, BlockSites, SiteLocation, check_site
from nblens.model.stage import Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["SiteMap"]


class SiteMap:
    """Finds sites; those inside the blocks at first use, with one tiny forward pass."""

    def __init__(self, model: PreTrainedModel, architecture: Architecture) -> None:
        self._model, self._architecture = model, architecture
        self._blocks: list[BlockSites] | None = None

    def locate(self, site: str, block: int) -> SiteLocation:
        """Find where to hook a site of one block.

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
            self._blocks = find_inner_sites(self._model, self._architecture)
            if stage := self._architecture.stage:
                self._blocks = _of_all_stages(self._blocks, stage)
        return self._blocks


def _of_all_stages(blocks: list[BlockSites], stage: Stage) -> list[BlockSites]:
    """Gather what is missing in each block, by the process that runs it."""
    known = {block: replace(blocks[block], found={}) for block in stage.blocks}
    everywhere = {block: sites for part in stage.gather(known) for block, sites in part.items()}
    return [blocks[block] if block in stage.blocks else everywhere[block] for block in range(len(blocks))]
