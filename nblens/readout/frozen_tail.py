"""The way from the last residual to a logit as a linear map, with each token's final norm held at its scale.

A logit is then a sum over whatever was added to the residual stream: direct logit attribution (Elhage et al. 2021, "A
Mathematical Framework for Transformer Circuits"). Norms are not told apart by name: LayerNorm and RMSNorm, whatever
their weight, are γ · P(h) / σ + β, where P is the identity or takes the mean off, and each part shows by trying.
"""

from __future__ import annotations

import torch
from torch import nn

from nblens.errors import UnsupportedModelError, unsupported
from nblens.model.architecture import Architecture, output_device
from nblens.readout.vocabulary import find_shard

__all__ = ["FrozenTail"]

_LARGE = 1e3  # beside which the small number in a norm's denominator is nothing


class FrozenTail:
    """Tail and lm_head of a few tokens' logits, linear in the residual.

    ::

        tail = FrozenTail(architecture, token_ids)
        logits = hidden.double() @ tail.directions * tail.scales(hidden)[:, None] + tail.bias

    Logits are those before a soft-cap, which is not linear.

    Parameters
    ----------
    architecture : Architecture
        A proven architecture.
    token_ids : sequence of int
        Whose logits.

    Raises
    ------
    UnsupportedModelError
        The tail is something other than a norm and linear modules whose weights can be read.
    """

    directions: torch.Tensor
    """float64 (d_model, n)"""
    bias: torch.Tensor
    """float64 (n,)"""

    def __init__(self, architecture: Architecture, token_ids: list[int]) -> None:
        self._architecture = architecture
        self._norm: _Norm | None = None
        weight, bias = _head_rows(architecture, token_ids)
        directions, total = weight.double().T, bias.double()
        for module in reversed(architecture.tail):
            if isinstance(module, nn.Linear):
                weight, bias = _matrix(module, architecture.family)
                total = total + bias.double() @ directions
                directions = weight.double().T @ directions
            elif self._norm is None:
                self._norm = _Norm(module, len(directions), architecture)
                total = total + self._norm.shift @ directions
                directions = self._norm.center((self._norm.weight[:, None] * directions).T).T
            else:
                raise UnsupportedModelError(f"{architecture.family}: more than one norm stands before its lm_head")
        self.directions = directions * architecture.transform.scale
        self.bias = total * architecture.transform.scale

    def scales(self, hidden: torch.Tensor) -> torch.Tensor:
        """Measure what each token's final norm multiplies with, 1/σ, float64 (n,), of last residuals (n, d_model)."""
        if self._norm is None:
            return torch.ones(len(hidden), dtype=torch.float64, device=hidden.device)
        for module in self._architecture.tail:
            if module is self._norm.module:
                break
            hidden = module(hidden)
        return self._norm.scales(hidden)


class _Norm:
    """A norm taken apart: γ, β, and whether it takes the mean off."""

    def __init__(self, module: nn.Module, width: int, architecture: Architecture) -> None:
        self.module, self._family = module, architecture.family
        device, dtype = output_device(architecture), architecture.dtype
        signs = torch.ones(width, device=device, dtype=dtype)
        signs[1::2] = -1  # of mean 0 and size 1, but for an odd width
        self.shift: torch.Tensor = self._of(torch.zeros_like(signs))
        moved = self._of(_LARGE * signs + 4 * _LARGE) - self.shift
        still = self._of(_LARGE * signs) - self.shift
        self._centers = bool((moved - still).abs().max() < 0.1 * still.abs().max())
        probe = self.center(_LARGE * signs.double()[None])[0]
        self.weight: torch.Tensor = still / probe * probe.square().mean().sqrt()

    def _of(self, hidden: torch.Tensor) -> torch.Tensor:
        """What it makes of one token, float64; refuses a module that takes no stream of the lm_head's width."""
        said = f"its final {type(self.module).__name__} is no norm of a stream of {len(hidden)} dimensions"
        with unsupported(f"{self._family}: {said}"):
            normed: torch.Tensor = self.module(hidden[None])[0].double()
        return normed

    def center(self, hidden: torch.Tensor) -> torch.Tensor:
        """P(h)."""
        return hidden - hidden.mean(-1, keepdim=True) if self._centers else hidden

    def scales(self, hidden: torch.Tensor) -> torch.Tensor:
        """1/σ of each row, by least squares; refuses a norm that is not of this form."""
        normed: torch.Tensor = self.module(hidden).double() - self.shift
        unscaled = self.weight * self.center(hidden.double())
        scales = (normed * unscaled).sum(-1) / unscaled.square().sum(-1).clamp(min=1e-30)
        error = (normed - scales[:, None] * unscaled).abs().max()
        tolerance = 2**-6 if hidden.dtype in (torch.bfloat16, torch.float16) else 1e-4
        if not error <= tolerance * normed.abs().max():
            raise UnsupportedModelError(
                f"{self._family}: its final norm {type(self.module).__name__} is not a scaled copy of its input"
            )
        return scales


def _head_rows(architecture: Architecture, token_ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (n, d) and biases (n,) of some tokens."""
    shard = find_shard(architecture.lm_head)
    if shard is None:
        return _matrix(architecture.lm_head, architecture.family, token_ids)
    weight, bias = shard.rows(torch.tensor(token_ids, device=shard.weight.device))
    return weight, weight.new_zeros(len(weight)) if bias is None else bias


def _matrix(module: nn.Module, family: str, rows: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a linear module, or chosen rows of them; those that are offloaded are brought in."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        if not isinstance(module, nn.Linear) or module.weight.is_meta or type(module.weight.data) is not torch.Tensor:
            merge = ": merge the adapter first" if _is_adapted(module) else ""
            raise UnsupportedModelError(
                f"{family}: the weight of its {type(module).__name__} cannot be read here{merge}"
            )
        weight = module.weight
        bias = weight.new_zeros(len(weight)) if module.bias is None else module.bias
        chosen = slice(None) if rows is None else rows
        return weight[chosen], bias[chosen]


def _is_adapted(module: nn.Module) -> bool:
    """Tell whether a linear module has others inside, as an adapter's has."""
    return any(isinstance(part, nn.Linear) for part in module.modules() if part is not module)
