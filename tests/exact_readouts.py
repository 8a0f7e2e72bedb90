"""Readouts whose every logit is exact, and what they must find, in float64.

Residuals and weights are small integers, and scales powers of two: what is compared is the statistics alone, and equal
logits are ties.
"""

import torch
from torch import nn

from nblens.model.architecture import Architecture, LogitTransform


def architecture_of(lm_head, *, tail=(), transform=None, d_model=None, vocab_size=None):
    return Architecture(
        family="made-up",
        blocks=(nn.Identity(),),
        blocks_path="blocks",
        tail=tuple(tail),
        tail_paths=tuple(f"tail{i}" for i in range(len(tail))),
        lm_head=lm_head,
        lm_head_path="lm_head",
        d_model=d_model or lm_head.in_features,
        vocab_size=vocab_size or lm_head.out_features,
        dtype=torch.float32,
        transform=transform or LogitTransform(),
    )


def integers(generator, *shape, size=3):
    return torch.randint(-size, size + 1, shape, generator=generator).float()


def head_of(generator, d_model, vocab_size, *, bias=True):
    head = nn.Linear(d_model, vocab_size, bias=bias)
    with torch.no_grad():
        head.weight.copy_(integers(generator, vocab_size, d_model))
        if bias:
            head.bias.copy_(integers(generator, vocab_size))
    return head.requires_grad_(False)


def exact_logits(architecture, hidden):
    """float64, (n_slots, n, vocab_size)."""
    head, transform = architecture.lm_head, architecture.transform
    logits = hidden.double() @ head.weight.double().T
    if head.bias is not None:
        logits = logits + head.bias.double()
    logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def assert_exact(result, logits, *, top_k, wanted, final):
    """Compare a `ReadoutResult` that was asked for everything with float64 logits."""
    finite = logits.isfinite()
    logprobs = logits.log_softmax(-1)
    p = logprobs.exp()
    close = {"rtol": 0, "atol": 2e-6 * max(10.0, logits[finite].abs().max().item())}

    def p_times(x):
        return torch.where(p > 0, p * x, 0.0).sum(-1)

    assert result.top_ids.shape == result.top_logprobs.shape == (*logits.shape[:2], top_k)
    # Which of several equals stands where is free; what they are is not, and none stands twice
    chosen = logits.gather(-1, result.top_ids)
    torch.testing.assert_close(chosen, logits.sort(-1, descending=True).values[..., :top_k], rtol=0, atol=1e-5)
    assert all(len(set(ids.tolist())) == top_k for ids in result.top_ids.flatten(0, 1))
    torch.testing.assert_close(result.top_logprobs.double(), logprobs.gather(-1, result.top_ids), **close)
    torch.testing.assert_close(result.entropy.double(), p_times(-logprobs), **close)
    kl = p_times(logprobs - logprobs[final])
    torch.testing.assert_close(result.kl_to_final.double(), kl, **close)
    assert (result.kl_to_final[final] == 0).all()
    assert (result.kl_to_final >= 0).all()
    assert (result.entropy >= 0).all()
    assert (result.entropy <= finite.sum(-1).double().log() + 1e-5).all()
    index = wanted.clamp(min=0).expand(len(logits), *wanted.shape)
    own = logits.gather(-1, index)
    none = (wanted < 0).expand(index.shape)
    expected = logprobs.gather(-1, index).masked_fill(none, torch.nan)
    torch.testing.assert_close(result.wanted_logprobs.double(), expected, equal_nan=True, **close)
    # a soft-cap presses what is exact together, beyond float32
    slack = 0 if logits[finite].frac().eq(0).all() else 1e-4
    low = 1 + (logits[..., None, :] > own[..., None] + slack).sum(-1)
    high = low if slack == 0 else (logits[..., None, :] > own[..., None] - slack).sum(-1)
    assert (low.masked_fill(none, -1) <= result.wanted_ranks).all()
    assert (result.wanted_ranks <= high.masked_fill(none, -1)).all()
