"""Find the sites inside a block by arithmetic, not by name.

One tiny forward pass shows what goes into and comes out of every module of a block. The contributions of attention
and MLP are the two outputs that add up to what the block does to the residual stream,

    resid_pre + attn_out = resid_mid        resid_mid + mlp_out = resid_post

(side by side in parallel blocks, with a norm over each sum in post-norm blocks, times a constant in granite). A site
whose equation does not hold is not there, and says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from nblens.model.architecture import Architecture, named_scale, probe_logits
from nblens.model.hooks import hidden_of
from nblens.model.sites import INNER_SITES, BlockSites, SiteLocation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["find_inner_sites"]

_SAMPLE = 4096  # elements of each tensor that the equations are checked on
_NOTICED = 0.02  # share of elements that must break the equation where a part is left out
_TINY = 1e-12


@torch.no_grad()
def find_inner_sites(model: PreTrainedModel, architecture: Architecture) -> list[BlockSites]:
    """Run a tiny forward pass and solve each block's equations as soon as it has ended."""
    solved: dict[int, BlockSites] = {}
    runs: Counter[nn.Module] = Counter()
    values: list[_Value] = []
    handles: list[Any] = []

    def note(module: nn.Module, path: str, end: Literal["input", "output"], value: Any) -> None:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            values.append(_Value(len(values), module, path, end, value.shape, _sample(value)))

    def watch(module: nn.Module, path: str, block: int) -> None:
        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if path == "":
                values.clear()
            note(module, path, "input", args[0] if args else kwargs.get("hidden_states"))

        def leaving(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            runs[module] += 1
            note(module, path, "output", hidden_of(output))
            if path == "":
                solved[block] = _Equations(values, architecture.dtype, model.config).solve()

        handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        handles.append(module.register_forward_hook(leaving))

    try:
        watched: set[nn.Module] = set()  # a module of several blocks is watched once
        for block, root in enumerate(architecture.blocks):
            if not architecture.has(block):
                solved[block] = BlockSites()
                continue
            for path, module in root.named_modules(memo=watched):
                watch(module, path, block)
        probe_logits(model)
    finally:
        for handle in handles:
            handle.remove()
    return [_without_shared(solved[block], runs) for block in range(architecture.n_blocks)]


def _without_shared(sites: BlockSites, runs: Counter[nn.Module]) -> BlockSites:
    """Drop sites whose module serves several blocks: a hook could not tell them apart."""
    shared = {site for site, place in sites.found.items() if runs[place.module] > 1}
    reason = "its module runs more than once in a forward pass"
    found = {site: place for site, place in sites.found.items() if site not in shared}
    return replace(sites, found=found, missing=sites.missing | dict.fromkeys(shared, reason))


@dataclass(frozen=True)
class _Value:
    """A tensor that went into or came out of a module."""

    order: int
    module: nn.Module
    path: str
    end: Literal["input", "output"]
    shape: torch.Size
    sample: torch.Tensor
    """float64 (n,) on the CPU: elements at the same places of every tensor of this size"""

    @property
    def location(self) -> SiteLocation:
        """Where to hook it."""
        return SiteLocation(self.module, self.end, flat=len(self.shape) == 2)

    @property
    def depth(self) -> int:
        """How many modules it is inside of."""
        return self.path.count(".")


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().flatten()
    if len(flat) > _SAMPLE:
        # an odd stride that shares no factor with a width: all positions and all dimensions are visited
        index = torch.arange(_SAMPLE, device=flat.device) * 104_729 % len(flat)
        flat = flat[index]
    return flat.double().cpu()


class _Equations:
    """Everything that went through one block in one forward pass, and which of it adds up."""

    def __init__(self, values: list[_Value], dtype: torch.dtype, config: Any) -> None:
        block_input, block_output = values[0], values[-1]
        self._pre, self._post, self._config = block_input.sample, block_output.sample, config
        # of a sum of two rounded numbers, beside their magnitudes
        self._precision = max(torch.finfo(dtype).eps, 1e-5)
        ran = Counter(value.module for value in values if value.end == "output")
        self._values = [v for v in values if v.path and _alike(v.shape, block_input.shape) and ran[v.module] == 1]
        self._outputs = sorted((v for v in self._values if v.end == "output"), key=lambda v: v.depth)
        self._norms = [v for v in self._values if "norm" in type(v.module).__name__.lower()]

    def solve(self) -> BlockSites:
        """Try the forms of a block that are in use."""
        if sites := self._sequential() or self._post_norm() or self._parallel():
            return sites
        reason = "no two of its modules add up to what it does to the residual stream"
        return BlockSites(missing=dict.fromkeys(INNER_SITES, reason))

    def _sequential(self) -> BlockSites | None:
        """Attention, then an MLP that reads the sum: pre + a = mid, mid + m = post."""
        for attention, mlp, scale in self._pairs():
            later = (v for v in self._values if v.order > attention.order)
            mid = next((v for v in later if self._sums_to(v.sample, self._pre, scale * attention.sample)), None)
            if mid is not None:
                found = _contributions(attention, mlp, scale)
                found["resid_mid"] = replace(mid.location, written_at=found["attn_out"])
                return self._with_norms(found, mid.sample)
        return None

    def _parallel(self) -> BlockSites | None:
        """Both read the block's input: pre + a + m = post."""
        for attention, mlp, scale in self._pairs():
            sites = self._with_norms(_contributions(attention, mlp, scale), self._pre)
            sites.missing["resid_mid"] = "attention and MLP read the same input, side by side"
            if "ln2_out" in sites.found and sites.found["ln2_out"] == sites.found.get("ln1_out"):
                del sites.found["ln2_out"]
                sites.missing["ln2_out"] = "attention and MLP share one norm; it is ln1_out"
            return sites
        return None

    def _post_norm(self) -> BlockSites | None:
        """A norm over each sum: mid = norm(pre + a), post = norm(mid + m)."""
        norms = [v for v in self._norms if v.end == "output"]
        over_post = next((v for v in norms if torch.equal(v.sample, self._post)), None)
        if over_post is None:
            return None
        for over_mid in norms:
            if over_mid.order >= over_post.order:
                continue
            attention = self._addend(self._pre, self._input_of(over_mid))
            mlp = self._addend(over_mid.sample, self._input_of(over_post))
            if attention is not None and mlp is not None:
                found = _contributions(attention, mlp, 1.0)
                found["resid_mid"] = over_mid.location
                reason = "its norms stand after attention and MLP, over the sums"
                return BlockSites(found, {"ln1_out": reason, "ln2_out": reason}, normed=True)
        return None

    def _pairs(self) -> Iterator[tuple[_Value, _Value, float]]:
        """Outputs a, m with pre + scale·a + scale·m = post, outermost modules first."""
        for attention in self._outputs:
            for mlp in self._outputs:
                if attention.order >= mlp.order or attention.path.startswith(f"{mlp.path}."):
                    continue
                scale = self._scale(attention.sample + mlp.sample)
                if self._sums_to(self._post, self._pre, scale * attention.sample, scale * mlp.sample):
                    yield attention, mlp, scale

    def _scale(self, total: torch.Tensor) -> float:
        """The constant that brings a sum closest to what the block adds, with each element beside its own rounding.

        A constant within the error of the measurement is taken for what it is named: 1, or a number of the config.
        """
        rounding = self._post.abs() + self._pre.abs() + _TINY
        wanted, given = (self._post - self._pre) / rounding, total / rounding
        size = (given @ given).clamp(min=1e-30)
        scale = wanted @ given / size
        error = ((wanted - scale * given).square().mean() / size).sqrt()
        return named_scale(scale.item(), self._config, 3 * error.item()) if scale > 0 else 1.0

    def _addend(self, base: torch.Tensor, total: torch.Tensor | None) -> _Value | None:
        """The outermost output that `base` lacks to be `total`."""
        if total is None:
            return None
        return next((v for v in self._outputs if self._sums_to(total, base, v.sample)), None)

    def _input_of(self, output: _Value) -> torch.Tensor | None:
        return next((v.sample for v in self._values if v.module is output.module and v.end == "input"), None)

    def _with_norms(self, found: dict[str, SiteLocation], mid: torch.Tensor) -> BlockSites:
        """Add the norms that read the stream before attention and before the MLP."""
        missing: dict[str, str] = {}
        inputs = [v for v in self._norms if v.end == "input"]
        before_attention = [v for v in inputs if torch.equal(v.sample, self._pre)]
        before_mlp = [v for v in inputs if torch.equal(v.sample, mid)]
        for site, norms in (("ln1_out", before_attention[:1]), ("ln2_out", before_mlp[-1:])):
            if norms:
                found[site] = replace(norms[0].location, end="output")
            else:
                missing[site] = "no norm reads the residual stream there"
        return BlockSites(found, missing)

    def _sums_to(self, total: torch.Tensor, *parts: torch.Tensor) -> bool:
        """Tell whether the parts add up to the total, and none could be left out unnoticed.

        Element by element, beside the magnitudes that were added: a few huge dimensions, which large models have, hide
        nothing.
        """
        if any(part.shape != total.shape for part in parts):
            return False
        rounding = self._precision * (total.abs() + sum(part.abs() for part in parts)) + _TINY
        rest = total - sum(parts)
        if (rest.abs() > rounding).any():
            return False
        return all(((rest + part).abs() > rounding).double().mean() > _NOTICED for part in parts)


def _alike(shape: torch.Size, stream: torch.Size) -> bool:
    """Tell whether a tensor is laid out as the residual stream, (rows, width, d_model), or flattened over rows."""
    return shape == stream or (shape[-1:] == stream[-1:] and len(shape) == 2 and shape.numel() == stream.numel())


def _contributions(attention: _Value, mlp: _Value, scale: float) -> dict[str, SiteLocation]:
    return {
        "attn_out": replace(attention.location, scale=scale),
        "mlp_out": replace(mlp.location, scale=scale),
    }
