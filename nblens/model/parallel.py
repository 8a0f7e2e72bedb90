"""Can a model be spread over several devices? Asked of its configuration, before any weight is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nblens.errors import UserError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["check_parallel"]


def check_parallel(config: PretrainedConfig, *, tp: int, pp: int) -> None:
    """Raise `UserError` unless transformers can spread a model of this configuration so.

    Parameters
    ----------
    config : transformers.PretrainedConfig
        Of the whole model.
    tp, pp : int
        Ranks that share every block's weights, and stages that blocks are dealt out to; 1: not at all.
    """
    for name, size in (("tp", tp), ("pp", pp)):
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


def _divisors(counts: dict[str, int]) -> str:
    fitting = [n for n in range(2, min(counts.values()) + 1) if not any(count % n for count in counts.values())]
    return (
        f"give tp={' or '.join(map(str, fitting))}" if fitting else "it cannot be tensor-parallel; load it without tp"
    )
