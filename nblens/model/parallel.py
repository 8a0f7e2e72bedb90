"""Can a model be spread over several devices? Asked of its configuration, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nblens.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["check_parallel", "tensor_ranks"]

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def tensor_ranks(tp: int, ep: int) -> int:
    """Tell how many ranks share what is not an expert: with `ep` alone, as many as share the experts."""
    return ep if tp == 1 else tp


def check_parallel(config: PretrainedConfig, *, tp: int, pp: int, ep: int = 1) -> None:
    """Raise `UserError` unless transformers can spread a model of this configuration so.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the whole model.
    tp, pp : int
        Ranks that share every block's weights, and stages that blocks are dealt out to; 1: not at all.
    ep : int
        Ranks that experts are dealt out to, whole; 1: every rank holds a part of each.
    """
    for name, size in (("tp", tp), ("pp", pp), ("ep", ep)):
        if type(size) is not int or size < 1:
            raise UserError(f"{name} must be a whole number of ranks from 1 on, got {size!r}")
    if tp > 1 and pp > 1:
        raise UserError(f"tp={tp} and pp={pp} cannot be combined yet; give one of them")
    text = config.get_text_config(decoder=True)
    family = config.model_type
    if tp > 1:
        if not getattr(text, "base_model_tp_plan", None):
            raise UserError(f"transformers has no tensor-parallel plan for {family} models; load it without tp")
        _check_heads(text, family, tp)
    if ep > 1:
        _check_experts(text, family, tp=tp, ep=ep)
    if pp > 1:
        if not getattr(text, "base_model_pp_plan", None):
            raise UserError(f"transformers has no pipeline-parallel plan for {family} models; load it without pp")
        if text.num_hidden_layers < pp:
            raise UserError(f"pp={pp} stages need as many blocks; this {family} model has {text.num_hidden_layers}")


def _check_heads(text: PretrainedConfig, family: str, tp: int) -> None:
    """A rank holds whole heads: a model cut inside one loads, and dies in its first pass."""
    counts = {"attention heads": text.num_attention_heads}
    counts["key-value heads"] = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    for what, count in counts.items():
        if count % tp:
            raise UserError(f"tp={tp} does not divide the {count} {what} of this {family} model; {_divisors(counts)}")


def _check_experts(text: PretrainedConfig, family: str, *, tp: int, ep: int) -> None:
    if not getattr(text, "base_model_ep_plan", None):
        raise UserError(f"transformers has no expert-parallel plan for {family} models; load it without ep")
    if ep != tp:
        raise UserError(f"ep={ep} needs tp={ep}, got tp={tp}: ranks that share a batch share all of the model")
    count = next((getattr(text, name) for name in _EXPERTS if getattr(text, name, None)), ep)
    if count % ep:
        raise UserError(f"ep={ep} does not divide the {count} experts of this {family} model")


def _divisors(counts: dict[str, int]) -> str:
    fitting = [n for n in range(2, min(counts.values()) + 1) if not any(count % n for count in counts.values())]
    return (
        f"give tp={' or '.join(map(str, fitting))}" if fitting else "it cannot be tensor-parallel; load it without tp"
    )
