"""Lenses made by hand, and their translators once more in float64."""

import torch
from tiny_models import D_MODEL, N_BLOCKS

from nblens.lens.lens import Lens


def make_lens(kind="tuned", *, d_model=D_MODEL, n_blocks=N_BLOCKS, scale=0.1, dtype=torch.float32, seed=0, **fields):
    """A lens of random translators that change every prediction."""
    generator = torch.Generator().manual_seed(seed)
    identity = torch.eye(d_model) if kind == "jacobian" else torch.zeros(d_model, d_model)
    weights = {
        depth: (identity + scale * torch.randn(d_model, d_model, generator=generator)).to(dtype)
        for depth in range(n_blocks)
    }
    biases = {depth: scale * torch.randn(d_model, generator=generator) for depth in weights if kind == "tuned"}
    return Lens("made", kind, weights, biases, n_blocks=n_blocks, **fields)


def exact_translators(lens):
    """The lens' formula in float64, by depth."""

    def translator(depth):
        weight = lens.weights[depth].double()
        if lens.kind == "jacobian":
            return lambda h: torch.einsum("ij,...j->...i", weight, h.double())
        bias = lens.biases[depth].double()
        return lambda h: h.double() + torch.einsum("ij,...j->...i", weight, h.double()) + bias

    return [translator(depth) for depth in range(lens.n_blocks)]
