"""What every block says, computed the plain way, to hold nblens against.

One unpadded, uncached, unchunked pass over one row; residuals by plain hooks; then, in float64 and family by family,
the way from a residual to the logits written out by hand, the full log-softmax, and everything that follows from it.
Nothing here comes from nblens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

Weight = torch.Tensor


def rms_norm(x: torch.Tensor, weight: Weight, eps: float) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def layer_norm(x: torch.Tensor, weight: Weight, bias: Weight | None, eps: float) -> torch.Tensor:
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return x if bias is None else x + bias.double()


def linear(x: torch.Tensor, weight: Weight, bias: Weight | None = None) -> torch.Tensor:
    x = x @ weight.double().T
    return x if bias is None else x + bias.double()


def llama_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return linear(rms_norm(x, m.model.norm.weight, m.config.rms_norm_eps), m.lm_head.weight)


def gpt2_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    norm = m.transformer.ln_f
    return linear(layer_norm(x, norm.weight, norm.bias, m.config.layer_norm_epsilon), m.transformer.wte.weight)


def gpt_neox_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    norm = m.gpt_neox.final_layer_norm
    return linear(layer_norm(x, norm.weight, norm.bias, m.config.layer_norm_eps), m.get_output_embeddings().weight)


def gemma2_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # Gemma stores the norm's weight minus one, and caps its logits
    logits = linear(rms_norm(x, 1 + m.model.norm.weight.double(), m.config.rms_norm_eps), m.model.embed_tokens.weight)
    cap = m.config.final_logit_softcapping
    return cap * torch.tanh(logits / cap)


def opt_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    # opt-350m's form: no final norm, but a projection to the embeddings' width
    return linear(linear(x, m.model.decoder.project_out.weight), m.model.decoder.embed_tokens.weight)


def cohere_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    normed = layer_norm(x, m.model.norm.weight, None, m.config.layer_norm_eps)
    return linear(normed, m.model.embed_tokens.weight) * m.config.logit_scale


def granite_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return llama_logits(m, x) / m.config.logits_scaling


def phi_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    norm = m.model.final_layernorm
    normed = layer_norm(x, norm.weight, norm.bias, m.config.layer_norm_eps)
    return linear(normed, m.lm_head.weight, m.lm_head.bias)


def falcon_logits(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    norm = m.transformer.ln_f
    return linear(layer_norm(x, norm.weight, norm.bias, m.config.layer_norm_epsilon), m.lm_head.weight)


Logits = Callable[[nn.Module, torch.Tensor], torch.Tensor]
FAMILY: dict[str, tuple[str, Logits]] = {
    "llama": ("model.layers", llama_logits),
    "qwen3": ("model.layers", llama_logits),
    "mistral": ("model.layers", llama_logits),
    "gpt2": ("transformer.h", gpt2_logits),
    "gpt_neox": ("gpt_neox.layers", gpt_neox_logits),
    "gemma2": ("model.layers", gemma2_logits),
    "opt": ("model.decoder.layers", opt_logits),
    "cohere": ("model.layers", cohere_logits),
    "granite": ("model.layers", granite_logits),
    "phi": ("model.layers", phi_logits),
    "falcon": ("transformer.h", falcon_logits),
}
"""family → (where its blocks are, residual → logits)"""


@dataclass(frozen=True)
class Dense:
    """Full log-probabilities of one row at one site, float64 (n_blocks, n_tokens, vocab_size), and what follows."""

    logprobs: np.ndarray
    final: np.ndarray
    """of the last block's output, (n_tokens, vocab_size)"""

    @property
    def entropy(self) -> np.ndarray:
        return -(np.exp(self.logprobs) * self.logprobs).sum(-1)

    @property
    def kl_to_final(self) -> np.ndarray:
        return (np.exp(self.logprobs) * (self.logprobs - self.final)).sum(-1)

    @property
    def sorted_logprobs(self) -> np.ndarray:
        return -np.sort(-self.logprobs, axis=-1)

    def logprob(self, ids: np.ndarray) -> np.ndarray:
        """Of one id per token, (n_blocks, n_tokens)."""
        return np.take_along_axis(self.logprobs, self._index(ids), -1)[..., 0]

    def ranks(self, ids: np.ndarray, slack: float) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest rank of one id per token that rounding by `slack` allows; the most likely has 1."""
        own = np.take_along_axis(self.logprobs, self._index(ids), -1)
        others = np.arange(self.logprobs.shape[-1]) != ids[None, :, None]
        low = 1 + (others & (self.logprobs > own + slack)).sum(-1)
        return low, 1 + (others & (self.logprobs > own - slack)).sum(-1)

    def _index(self, ids: np.ndarray) -> np.ndarray:
        return np.broadcast_to(np.asarray(ids)[None, :, None], (len(self.logprobs), len(ids), 1))


@torch.no_grad()
def residuals(model: nn.Module, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """What enters and leaves every block for one row, (n_blocks, n_tokens, d_model) by site."""
    blocks = model.get_submodule(FAMILY[model.config.model_type][0])
    entering, leaving = {}, {}

    def keep(block: int) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            entering[block] = (args[0] if args else kwargs["hidden_states"]).clone()
            leaving[block] = (output[0] if isinstance(output, tuple) else output).clone()

        return hook

    handles = [block.register_forward_hook(keep(i), with_kwargs=True) for i, block in enumerate(blocks)]
    try:
        model(input_ids=torch.tensor([list(ids)]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {
        "resid_pre": torch.stack([entering[i][0] for i in range(len(blocks))]),
        "resid_post": torch.stack([leaving[i][0] for i in range(len(blocks))]),
    }


@torch.no_grad()
def dense(
    model: nn.Module,
    ids: Sequence[int],
    site: str = "resid_post",
    blocks: Sequence[int] | None = None,
    translators: Sequence[Callable[[torch.Tensor], torch.Tensor]] | None = None,
) -> Dense:
    """The dense lens of one row at some blocks (None: all).

    Translator i is applied to what enters block i, which is what leaves block i-1.
    """
    logits = FAMILY[model.config.model_type][1]
    states = residuals(model, ids)
    streams = states[site].double()
    if translators is not None:
        own = [*translators, lambda h: h][{"resid_pre": 0, "resid_post": 1}[site] :]
        streams = torch.stack([translate(h) for translate, h in zip(own, streams, strict=False)])
    chosen = streams if blocks is None else streams[list(blocks)]
    return Dense(
        logits(model, chosen).log_softmax(-1).numpy(),
        logits(model, states["resid_post"][-1].double()).log_softmax(-1).numpy(),
    )


def assert_equals_dense(trajectory, reference: Dense, *, tolerance: float = 1e-4, rank_slack: float = 5e-5) -> None:
    """Every array of a trajectory, against the reference over exactly its tokens and layers.

    Without targets of its own a trajectory follows leaders, whose ranks are not counted.
    """
    leaders = len(trajectory.target_ids) > 0 and (trajectory.target_ranks[..., 0] == -1).all()
    k = trajectory.top_ids.shape[-1]
    n_layers, n_tokens, vocab_size = reference.logprobs.shape
    assert trajectory.top_ids.shape == (n_layers, n_tokens, k)
    close = {"rtol": 0, "atol": tolerance}
    _assert_top(trajectory, reference, k, tolerance)
    np.testing.assert_allclose(trajectory.entropy, reference.entropy, **close)
    np.testing.assert_allclose(trajectory.kl_to_final, reference.kl_to_final, **close)
    assert (trajectory.kl_to_final >= 0).all()
    assert (trajectory.entropy >= 0).all()
    assert (trajectory.entropy <= np.log(vocab_size) + tolerance).all()
    followed = trajectory.next_ids >= 0
    following = np.maximum(trajectory.next_ids, 0)
    np.testing.assert_allclose(trajectory.next_logprob[:, followed], reference.logprob(following)[:, followed], **close)
    low, high = reference.ranks(following, rank_slack)
    assert (low <= trajectory.next_rank)[:, followed].all()
    assert (trajectory.next_rank <= high)[:, followed].all()
    assert np.isnan(trajectory.next_logprob[:, ~followed]).all()
    assert (trajectory.next_rank[:, ~followed] == -1).all()
    assert trajectory.target_logprobs.shape == (n_layers, n_tokens, len(trajectory.target_ids))
    for i, target in enumerate(trajectory.target_ids):
        ids = np.full(n_tokens, target)
        np.testing.assert_allclose(trajectory.target_logprobs[..., i], reference.logprob(ids), **close)
        if leaders:
            assert (trajectory.target_ranks[..., i] == -1).all()
            continue
        low, high = reference.ranks(ids, rank_slack)
        assert (low <= trajectory.target_ranks[..., i]).all()
        assert (trajectory.target_ranks[..., i] <= high).all()


def _assert_top(trajectory, reference: Dense, k: int, tolerance: float) -> None:
    ranked = reference.sorted_logprobs
    np.testing.assert_allclose(trajectory.top_logprobs, ranked[..., :k], rtol=0, atol=tolerance)
    own = np.take_along_axis(reference.logprobs, trajectory.top_ids.astype(np.int64), -1)
    # where two are closer than rounding, either may stand first: compare what the ids stand for
    np.testing.assert_allclose(own, ranked[..., :k], rtol=0, atol=1e-5)
    assert (np.diff(np.sort(trajectory.top_ids, -1)) > 0).all(), "an id stands twice among the top"
