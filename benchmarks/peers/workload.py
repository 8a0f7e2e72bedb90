"""The weights, tokens, vectors and reference results that all sides work on, saved in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.models import llama_shape, random_prompt
from benchmarks.peers import lens, steering
from benchmarks.peers.side import TOP_K, load

_SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")
_LIVELIER = 4.0
"""times the usual spread of weights"""


def save_lens(folder: Path, n_blocks: int, d_model: int, vocab_size: int, n_tokens: int) -> Path:
    """A model with random weights, a prompt, and what the loop reads from it."""
    _save_model(folder, n_blocks, d_model, vocab_size)
    ids = list(random_prompt(n_tokens, vocab_size))
    torch.save({"ids": ids, "top": lens.loop(*load(folder), ids, TOP_K + 1)()}, folder / "lens.pt")
    return folder


def save_steering(folder: Path, n_blocks: int, d_model: int, vocab_size: int, n_tokens: int, n_new: int) -> Path:
    """A model with random weights, a prompt, vectors, and what hooks make of them."""
    _save_model(folder, n_blocks, d_model, vocab_size)
    model, tokenizer = load(folder)
    ids = list(random_prompt(n_tokens, vocab_size))
    every = _vectors(n_blocks, d_model)
    middle = n_blocks // 2
    cases = {
        "one block": _case(model, tokenizer, ids, n_new, {middle: every[middle]}),
        "all blocks": _case(model, tokenizer, ids, n_new, every),
    }
    torch.save({"ids": ids, "n_new": n_new, "cases": cases}, folder / "steering.pt")
    return folder


def _case(model: Any, tokenizer: Any, ids: list[int], n_new: int, vectors: steering.Vectors) -> dict[str, Any]:
    hooked = steering.hook(model, tokenizer, ids, n_new, vectors)
    text, plain = hooked.text(), hooked.plain()
    if text == plain:
        raise RuntimeError("the steered text is the unsteered one: equal texts would prove nothing; try larger vectors")
    return {"vectors": vectors, "text": text, "plain_text": plain, "top": hooked.top(TOP_K + 1)}


def _vectors(n_blocks: int, d_model: int) -> steering.Vectors:
    """Random directions, of about the length of an embedding."""
    generator = torch.Generator().manual_seed(1)
    return {block: 0.1 * torch.randn(d_model, generator=generator) for block in range(n_blocks)}


@torch.no_grad()
def _enlivened(model: PreTrainedModel) -> PreTrainedModel:
    """Norms that differ from one, as a norm left out would go unseen else; weights that do not repeat one token."""
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.mul_(_LIVELIER)
    return model


def _save_model(folder: Path, n_blocks: int, d_model: int, vocab_size: int) -> None:
    _enlivened(llama_shape(n_blocks, d_model, vocab_size)).save_pretrained(folder)
    words = {_SPECIAL[i] if i < len(_SPECIAL) else str(i): i for i in range(vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    named = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), _SPECIAL, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
