"""Tiny causal LMs of many families, built from a config, and a tokenizer trained on the spot: no download.

Every 1-D parameter (norm weights, biases) is drawn at random: at their initial 1s and 0s, a readout that forgets
them would look right.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 211
N_BLOCKS = 3
D_MODEL = 32

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_BLOCKS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1}
FAMILIES: dict[str, dict] = {
    "llama": {**_COMMON, "num_key_value_heads": 2},
    "qwen3": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8},
    "gpt2": {
        "vocab_size": VOCAB_SIZE,
        "n_embd": D_MODEL,
        "n_layer": N_BLOCKS,
        "n_head": 4,
        "n_positions": 128,
        **_SPECIAL,
    },
    "gpt_neox": _COMMON,
    "gemma2": {**_COMMON, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 2.0},
    "mistral": {**_COMMON, "num_key_value_heads": 2, "sliding_window": 6},
    "opt": {**_COMMON, "ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "cohere": {**_COMMON, "num_key_value_heads": 2, "logit_scale": 0.25},
    "granite": {**_COMMON, "num_key_value_heads": 2, "logits_scaling": 4.0},
    "phi": _COMMON,
    "falcon": {**_COMMON, "new_decoder_architecture": False, "alibi": False},
}
_GQA = {**_COMMON, "num_key_value_heads": 2}
_GPT = {"vocab_size": VOCAB_SIZE, "n_embd": D_MODEL, "n_layer": N_BLOCKS, "n_head": 4, "n_positions": 128, **_SPECIAL}
MORE_FAMILIES: dict[str, dict] = {
    "gptj": {**_GPT, "rotary_dim": 4},
    "bloom": {"vocab_size": VOCAB_SIZE, "hidden_size": D_MODEL, "n_layer": N_BLOCKS, "n_head": 4, **_SPECIAL},
    "mpt": {"vocab_size": VOCAB_SIZE, "d_model": D_MODEL, "n_layers": N_BLOCKS, "n_heads": 4, "max_seq_len": 128},
    "gpt_neo": {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": D_MODEL,
        "num_layers": N_BLOCKS,
        "num_heads": 4,
        "attention_types": [[["global", "local", "global"], 1]],
        "max_position_embeddings": 128,
        **_SPECIAL,
    },
    "stablelm": _GQA,
    "nemotron": {**_GQA, "head_dim": 8},
    "glm4": {**_GQA, "head_dim": 8},
    "olmo2": _GQA,
    "phi3": _GQA,
    "cohere2": {**_GQA, "sliding_window": 6},
    "granitemoe": {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2, "logits_scaling": 3.0},
    "qwen3_moe": {
        **_GQA,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "gemma3_text": {**_GQA, "head_dim": 8, "sliding_window": 6},
    "mixtral": {**_GQA, "num_local_experts": 4},
    "gpt_oss": {**_GQA, "head_dim": 8, "num_local_experts": 4},
    "deepseek_v3": {
        **_COMMON,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "biogpt": _COMMON,
    "minicpm3": _COMMON,
}
"""families beyond those that are held against the dense reference"""


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A fresh tiny model with random weights of a size that spreads its logits over several units."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **{**(FAMILIES | MORE_FAMILIES)[family], **overrides})
        )
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 2.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(1 + noise if parameter.ndim == 1 else noise)
    return model.eval().to(dtype)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of `VOCAB_SIZE` or fewer entries over ASCII text, with a beginning-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = sorted({c for c in pre_tokenizers.ByteLevel.alphabet() if c.isascii()} | {"Ġ", "Ċ"})
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=letters, show_progress=False
    )
    words = "the cat sat on the mat and the dog ran to the red house where a man had tea with her one day"
    tokenizer.train_from_iterator([words, words.title(), f" {words}"] * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    assert len(fast) <= VOCAB_SIZE
    return fast


def prompt_ids(length: int, seed: int = 0) -> list[int]:
    """Random token ids without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
